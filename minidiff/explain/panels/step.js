// A step in numbers: another step, channel or place of the sample, written into the cells of the same sums.
for (const worked of document.querySelectorAll("[data-step]")) {
  const data = page.read("data-step");
  const [channels, rows, columns] = data.shape;
  let [channel, row, column] = data.place;
  const steps = data.steps.map((step) => ({
    ...step,
    next: page.floats(step.next),
    given: Object.fromEntries(Object.entries(step.given).map(([name, text]) => [name, page.floats(text)])),
  }));

  const text = (en, zh) =>
    [["en", en], ["zh", zh]].map(([lang, words]) => {
      const span = document.createElement("span");
      span.lang = lang;
      span.textContent = words;
      return span;
    });
  const picker = document.createElement("div");
  const canvas = document.createElement("canvas");
  const controls = document.createElement("div");
  const slider = document.createElement("input");
  const choice = document.createElement("select");
  picker.className = "picker";
  controls.className = "controls";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  slider.type = "range";
  slider.max = steps.length - 1;
  slider.value = Math.floor(steps.length / 2);
  page.name(slider, "step", "步");
  page.name(choice, "channel", "通道");
  for (let c = 0; c < channels; c++) {
    const option = new Option("", c);
    page.tell((words) => (option.text = words), `channel ${c}`, `通道 ${c}`);
    choice.add(option);
  }
  const hint = document.createElement("p");
  hint.append(...text("Pick a place of the sample: click, or use the arrow keys.", "选取样本中的一个位置：点击，或使用方向键。"));
  controls.append(hint, slider, choice);
  picker.append(canvas, controls);
  worked.prepend(picker);

  const number = (value) => String(Number(value.toPrecision(6)));
  function put(name, value) {
    for (const cell of worked.querySelectorAll(`[data-cell="${name}"]`))
      cell.textContent = typeof value === "number" ? number(value) : value;
  }
  const sum = (weights, values) => Object.entries(weights).reduce((all, [name, weight]) => all + weight * (values[name] || 0), 0);

  // The values of a step at the place: those that were recorded, and x0 and epsilon as sums of them.
  function values(step) {
    const at = (channel * rows + row) * columns + column;
    const found = Object.fromEntries(Object.entries(step.given).map(([name, numbers]) => [name, numbers[at]]));
    if (step.x0) {
      found.x0 = sum(step.x0, found);
      if (step.noise) found.epsilon = (found.x - step.signal * found.x0) / step.noise;
    }
    return [found, step.next[at]];
  }

  function lines(block, weights, found) {
    const body = block.querySelector("tbody");
    const last = body.lastElementChild;
    block.hidden = !weights;
    if (!weights) return;
    const made = Object.entries(weights).map(([name, weight]) => {
      const line = document.createElement("tr");
      const code = document.createElement("code");
      code.textContent = name;
      const value = found[name] || 0;
      for (const content of [code, number(value), number(weight), number(weight * value)]) {
        const cell = document.createElement("td");
        cell.append(content);
        line.append(cell);
      }
      return line;
    });
    last.lastElementChild.textContent = number(sum(weights, found));
    body.replaceChildren(...made, last);
  }

  function draw(numbers) {
    const scale = 8;
    const start = channel * rows * columns;
    const reach = Math.max(...numbers.slice(start, start + rows * columns).map(Math.abs)) || 1;
    page.paint(canvas, columns * scale, rows * scale, (k) => {
      const x = Math.floor((k % (columns * scale)) / scale);
      const y = Math.floor(k / (columns * scale) / scale);
      const value = numbers[start + y * columns + x] / reach;
      const away = Math.round(235 - 200 * Math.abs(value));
      return value < 0 ? [away, Math.round((away + 235) / 2), 235] : [235, Math.round((away + 200) / 2), away];
    });
    const context = canvas.getContext("2d");
    context.lineWidth = 2;
    context.strokeStyle = "#000";
    context.strokeRect(column * scale, row * scale, scale, scale);
    context.strokeStyle = "#fff";
    context.strokeRect(column * scale + 2, row * scale + 2, scale - 4, scale - 4);
    const [y, x] = [data.rows[row], data.columns[column]];
    const place = page.chosen(`channel ${channel}, row ${y}, column ${x}`, `通道 ${channel}，第 ${y} 行，第 ${x} 列`);
    canvas.setAttribute("aria-label", `x, ${place}`);
  }

  function show() {
    const step = steps[Number(slider.value)];
    const [found, next] = values(step);
    for (const [name, value] of Object.entries({ k: step.number, t: step.t, c: channel, y: data.rows[row], x: data.columns[column] }))
      put(name, value);
    const asked = { x: found.x, scale: step.scale, shown: found.x * step.scale, out: found.out };
    for (const [name, value] of Object.entries(asked)) put(`asked-${name}`, value);
    for (const block of worked.querySelectorAll("[data-block]")) lines(block, step[block.dataset.block], found);
    put("recorded", next);
    if (data.first && steps[0].number === 1) {
      const [begun] = values(steps[0]);
      put("first-x", begun.x);
      put("first-noise", begun.x / data.first);
    }
    slider.setAttribute("aria-valuetext", worked.querySelector(`.where:lang(${page.language()})`).textContent);
    draw(step.given.x);
  }

  function pick(y, x) {
    row = Math.min(rows - 1, Math.max(0, y));
    column = Math.min(columns - 1, Math.max(0, x));
    show();
  }
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    pick(Math.floor(((event.clientY - box.top) / box.height) * rows), Math.floor(((event.clientX - box.left) / box.width) * columns));
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    pick(row + way[0], column + way[1]);
  });
  slider.addEventListener("input", show);
  document.addEventListener("spoken", show);
  choice.addEventListener("change", () => {
    channel = Number(choice.value);
    show();
  });
  show();
}
