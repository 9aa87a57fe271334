// The page around draw.js. With ?report in its address it draws at once, and sends the result to the server.

import { Model } from "/draw.js";

const form = document.querySelector("form"), said = document.querySelector("output");
const canvas = document.querySelector("canvas"), asked = new URLSearchParams(location.search);
for (const [name, value] of asked) if (form.elements[name]) form.elements[name].value = value;
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = "/ort/";

let model;

async function draw() {
  said.value = "loading ...";
  model ??= await Model.open(ort, "/model");
  const sides = { width: canvas.width, height: canvas.height };
  const { prompt, seed, guidance } = form.elements;
  const options = { seed: Number(seed.value), guidance: Number(guidance.value), ...sides };
  const found = await model.draw(prompt.value, { ...options, told: (i, n) => { said.value = `step ${i} of ${n}`; } });
  const size = canvas.width * canvas.height, picture = new ImageData(canvas.width, canvas.height);
  for (let k = 0; k < size; k++) {
    for (let c = 0; c < 3; c++) picture.data[4 * k + c] = Math.round(255 * (found.pixels[c * size + k] / 2 + 0.5));
    picture.data[4 * k + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  said.value = "done";
  return { latents: found.latents, picture: canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data };
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  draw().catch((error) => { said.value = String(error); });
});

if (asked.has("report")) {
  const send = (content) => fetch("/report", { method: "POST", body: JSON.stringify(content) });
  draw().then(({ latents, picture }) => send({ latents: [...latents], picture: [...picture] }),
    (error) => send({ error: String(error?.stack ?? error) }));
}
