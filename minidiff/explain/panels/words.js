// Words: a token, a transformer and a step are picked, and the map lies over the picture.
for (const place of document.querySelectorAll("[data-words]")) {
  const { tokens, calls, groups, tops, maps } = page.read("data-words");
  const levels = page.bytes(maps);
  const top = page.floats(tops);
  const sizes = groups.map(([, h, w]) => h * w);
  const block = sizes.reduce((a, b) => a + b, 0) * tokens.length;
  const image = place.querySelector("img");
  const names = (en, zh) => {
    const both = [["en", en], ["zh", zh]].map(([code, text]) => {
      const span = document.createElement("span");
      span.lang = code;
      span.textContent = text;
      return span;
    });
    return both;
  };

  // The values of one map: call n, group g, token k.
  function read(n, g, k) {
    const before = sizes.slice(0, g).reduce((a, b) => a + b, 0) * tokens.length;
    const start = n * block + before + k * sizes[g];
    const most = top[(n * groups.length + g) * tokens.length + k];
    return levels.subarray(start, start + sizes[g]).reduce((out, v, m) => ((out[m] = (v / 255) * most), out), new Float32Array(sizes[g]));
  }

  // The average map of token k at the size of the largest, and that size; group or call -1: over all of them.
  function map(k, group, call) {
    const some = group < 0 ? groups.map((_, g) => g) : [group];
    const when = call < 0 ? calls.map((_, n) => n) : [call];
    const [, h, w] = some.map((g) => groups[g]).reduce((a, b) => (b[1] * b[2] > a[1] * a[2] ? b : a));
    const sum = new Float32Array(h * w);
    for (const n of when)
      for (const g of some) {
        const one = read(n, g, k);
        const [, gh, gw] = groups[g];
        for (let y = 0; y < h; y++)
          for (let x = 0; x < w; x++)
            sum[y * w + x] += one[Math.floor((y * gh) / h) * gw + Math.floor((x * gw) / w)] / (some.length * when.length);
      }
    return [sum, h, w];
  }

  const canvas = document.createElement("canvas");
  canvas.setAttribute("role", "img");
  const said = document.createElement("output");
  const buttons = document.createElement("div");
  buttons.className = "tokens";
  buttons.setAttribute("role", "group");
  page.name(buttons, "token", "词元");
  const layer = document.createElement("select");
  page.name(layer, "transformer", "层");
  const every = new Option("", -1);
  page.tell((words) => (every.text = words), "all transformers", "所有层");
  layer.add(every);
  groups.forEach(([name, h, w], g) => layer.add(new Option(name.includes(" x ") ? name : `${name} (${h} x ${w})`, g)));
  const step = document.createElement("input");
  step.type = "range";
  step.min = -1;
  step.max = calls.length - 1;
  step.value = -1;
  page.name(step, "step", "步");
  const apart = tokens.map(([, , kind], k) => {
    if (kind !== "word") return 0;
    const [sum] = map(k, -1, -1);
    return Math.max(...sum) - sum.reduce((a, b) => a + b, 0) / sum.length;
  });
  let chosen = apart.indexOf(Math.max(...apart)); // the word whose map shows most: read much at one place, little elsewhere
  let seenPadding = 0;
  tokens.forEach(([, text, kind], k) => {
    if (kind === "padding" && seenPadding++ > 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = kind === "padding" ? `+${seenPadding}` : text;
    button.dataset.token = k;
    button.dataset.kind = kind;
    button.addEventListener("click", () => {
      chosen = k;
      show();
    });
    buttons.append(button);
  });

  function show() {
    const call = Number(step.value);
    const [sum, h, w] = map(chosen, Number(layer.value), call);
    let most = 0;
    let total = 0;
    for (const v of sum) {
      most = Math.max(most, v);
      total += v;
    }
    const small = document.createElement("canvas");
    small.width = w;
    small.height = h;
    const inside = small.getContext("2d");
    const heat = inside.createImageData(w, h);
    sum.forEach((v, m) => heat.data.set([255, 90, 0, Math.round((230 * v) / (most || 1))], 4 * m));
    inside.putImageData(heat, 0, 0);
    canvas.width = 2 * image.width;
    canvas.height = 2 * image.height;
    const context = canvas.getContext("2d");
    context.filter = "grayscale(1) brightness(0.6)";
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.imageSmoothingEnabled = true;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    for (const button of buttons.children) button.setAttribute("aria-pressed", String(Number(button.dataset.token) === chosen));
    const share = ((100 * total) / sum.length).toFixed(2);
    const highest = (100 * most).toFixed(1);
    const time = call < 0 ? ["all steps", "所有步"] : [`timestep ${calls[call][1]}`, `时间步 ${calls[call][1]}`];
    said.replaceChildren(
      ...names(
        `${tokens[chosen][1]}, ${time[0]}: ${share} % of the attention, at most ${highest} % at one place`,
        `${tokens[chosen][1]}，${time[1]}：占注意力的 ${share} %，单个位置最高 ${highest} %`,
      ),
    );
    canvas.setAttribute("aria-label", said.innerText);
    step.setAttribute("aria-valuetext", page.chosen(...time));
  }

  const controls = document.createElement("div");
  controls.className = "map-controls";
  controls.append(buttons, layer, step, said);
  image.hidden = true;
  place.append(canvas, controls);
  layer.addEventListener("change", show);
  step.addEventListener("input", show);
  document.addEventListener("spoken", show);
  image.decode().catch(() => null).then(show);
}
