// Guidance: mixes the recorded predictions of a step anew, for any scale, and shows the numbers of one place.
for (const mixer of document.querySelectorAll("[data-guidance]")) {
  const { scale: own, shape, place, begin, colours, steps } = page.read("data-guidance");
  const [channels, height, width] = shape;
  const size = height * width;
  const read = new Map();
  const numbers = (k, name) => {
    const key = `${k} ${name}`;
    if (!read.has(key)) read.set(key, page.floats(steps[k][name]));
    return read.get(key);
  };
  const { side, block } = colours;
  const map = page.floats(colours.map);
  const outputs = 3 * block * block;
  let [channel, row, column] = place;

  // The picture of a sample: every place gives a block of pixels, by a linear map from the numbers around it.
  function coloured(x) {
    const pixels = new Float32Array(3 * size * block * block);
    const reach = (side - 1) / 2;
    for (let y = 0; y < height; y++)
      for (let z = 0; z < width; z++) {
        const sums = map.slice(map.length - outputs);
        let feature = 0;
        for (let c = 0; c < channels; c++)
          for (let dy = -reach; dy <= reach; dy++)
            for (let dz = -reach; dz <= reach; dz++, feature++) {
              if (y + dy < 0 || y + dy >= height || z + dz < 0 || z + dz >= width) continue;
              const value = x[c * size + (y + dy) * width + z + dz];
              for (let k = 0; k < outputs; k++) sums[k] += value * map[feature * outputs + k];
            }
        for (let k = 0; k < outputs; k++) {
          const [rgb, by, bz] = [Math.floor(k / block / block), Math.floor(k / block) % block, k % block];
          pixels[3 * ((y * block + by) * width * block + z * block + bz) + rgb] = sums[k];
        }
      }
    return pixels;
  }

  const text = page.chosen;
  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const slider = (en, zh, max, step, value) => {
    const input = make("input", { type: "range", min: 0, max, step });
    page.name(input, en, zh);
    input.value = value;
    const output = make("output");
    mixer.append(make("label", {}, input, " ", output));
    input.addEventListener("input", show);
    return [input, output];
  };

  const canvas = make("canvas", { tabindex: 0, role: "img" });
  const marker = make("span", { class: "marker", "aria-hidden": "true" });
  mixer.append(make("div", { class: "screen" }, canvas, marker));
  const [which, whichSaid] = slider("step", "步", steps.length - 1, 1, begin);
  const [amount, amountSaid] = slider("guidance scale", "引导强度", Math.max(10, 4 * own), 0.25, own);
  const [plane, planeSaid] = slider("channel", "通道", channels - 1, 1, channel);
  const said = make("p", { class: "mono", "aria-live": "polite" });
  mixer.append(said);

  function show() {
    const [k, s] = [Number(which.value), Number(amount.value)];
    channel = Number(plane.value);
    const [before, after] = [numbers(k, "x0_u"), numbers(k, "x0_c")];
    const mixed = (n) => before[n] + s * (after[n] - before[n]);
    const pixels = coloured(before.map((_, n) => mixed(n)));
    page.paint(canvas, width * block, height * block, (n) =>
      [0, 1, 2].map((rgb) => Math.round(255 * Math.min(1, Math.max(0, pixels[3 * n + rgb])))),
    );
    whichSaid.textContent = steps[k].label[page.language()];
    amountSaid.textContent = text(`scale ${s}`, `强度 ${s}`) + (s === own ? text(" (this run's)", "（这次使用的）") : "");
    planeSaid.textContent = text(`channel ${channel}`, `通道 ${channel}`);
    marker.style.left = `${(100 * column) / width}%`;
    marker.style.top = `${(100 * row) / height}%`;
    marker.style.width = `${100 / width}%`;
    marker.style.height = `${100 / height}%`;
    const n = channel * size + row * width + column;
    const [u, c] = [numbers(k, "u")[n], numbers(k, "c")[n]];
    const f = (value) => value.toFixed(4);
    const w = Math.round(1e6 * (s - 1)) / 1e6;
    const lines = [
      text(`row ${row}, column ${column}`, `行 ${row}，列 ${column}`) + `: u = ${f(u)}, c = ${f(c)}`,
      `u + s (c − u) = ${f(u)} + ${s} × ${f(c - u)} = ${f(u + s * (c - u))}`,
      `(1 + w) c − w u = ${1 + w} × ${f(c)} − ${w} × ${f(u)} = ${f((1 + w) * c - w * u)}`,
      `x0: ${f(before[n])} + ${s} × ${f(after[n] - before[n])} = ${f(mixed(n))}`,
    ];
    said.replaceChildren(...lines.flatMap((line) => [line, make("br")]));
    canvas.setAttribute("aria-label", `${whichSaid.textContent}, ${amountSaid.textContent}, ${lines[0]}`);
  }

  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    column = Math.min(width - 1, Math.floor(((event.clientX - box.left) / box.width) * width));
    row = Math.min(height - 1, Math.floor(((event.clientY - box.top) / box.height) * height));
    show();
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    column = Math.min(width - 1, Math.max(0, column + moves[event.key][0]));
    row = Math.min(height - 1, Math.max(0, row + moves[event.key][1]));
    show();
  });
  document.addEventListener("spoken", show);
  show();
}
