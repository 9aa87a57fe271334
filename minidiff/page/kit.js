"use strict";
// Shared by all reports: the switches of language and scheme, and small helpers. A page is complete without them.
const page = (() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const language = () => root.dataset.lang;

  function speak(code) {
    root.dataset.lang = code;
    root.lang = code;
    for (const button of document.querySelectorAll("[data-speak]"))
      button.setAttribute("aria-pressed", String(button.dataset.speak === code));
    document.dispatchEvent(new CustomEvent("spoken"));
  }

  function scheme(name) {
    root.dataset.scheme = name;
  }

  for (const button of document.querySelectorAll("[data-speak]"))
    button.addEventListener("click", () => speak(button.dataset.speak));
  for (const button of document.querySelectorAll("[data-scheme-switch]"))
    button.addEventListener("click", () => {
      const dark = root.dataset.scheme
        ? root.dataset.scheme === "dark"
        : matchMedia("(prefers-color-scheme: dark)").matches;
      scheme(dark ? "light" : "dark");
    });

  // A picture from numbers: `rows` of `columns` values, each turned into [r, g, b] by `colour`.
  function paint(canvas, columns, rows, colour) {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, rows);
    for (let k = 0; k < columns * rows; k++) {
      const [r, g, b] = colour(k);
      image.data.set([r, g, b, 255], 4 * k);
    }
    context.putImageData(image, 0, 0);
  }

  // Numbers that Python wrote as base64 of little-endian float32 or uint8.
  function bytes(text) {
    const raw = atob(text);
    const out = new Uint8Array(raw.length);
    for (let k = 0; k < raw.length; k++) out[k] = raw.charCodeAt(k);
    return out;
  }
  const floats = (text) => new Float32Array(bytes(text).buffer);

  return { read, language, speak, scheme, paint, bytes, floats };
})();
