"use strict";
// Shared by all reports: the switches of language and scheme, and small helpers. A page is complete without them.
const page = (() => {
  const root = document.documentElement;
  root.classList.add("scripted");

  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const language = () => root.dataset.lang;

  // Attributes and titles hold both languages, between no-break spaces, for readers without a script: one is chosen.
  const between = "\u00a0/\u00a0";
  const both = [];
  for (const element of document.querySelectorAll("[alt], [aria-label]"))
    for (const name of ["alt", "aria-label"]) {
      const parts = (element.getAttribute(name) || "").split(between);
      if (parts.length === 2) both.push([(text) => element.setAttribute(name, text), ...parts]);
    }
  for (const title of document.querySelectorAll("svg title")) {
    const parts = title.textContent.split(between);
    if (parts.length === 2) both.push([(text) => (title.textContent = text), ...parts]);
  }

  const chosen = (en, zh) => (language() === "zh" ? zh : en);

  // Words that no style sheet can choose, such as a menu's or an attribute's: written now, and with each new language.
  function tell(write, en, zh) {
    const now = () => write(chosen(en, zh));
    document.addEventListener("spoken", now);
    now();
  }
  const name = (element, en, zh) => tell((text) => element.setAttribute("aria-label", text), en, zh);

  function speak(code) {
    root.dataset.lang = code;
    root.lang = code;
    for (const [write, en, zh] of both) write(chosen(en, zh));
    for (const button of document.querySelectorAll("[data-speak]"))
      button.setAttribute("aria-pressed", String(button.dataset.speak === code));
    document.dispatchEvent(new CustomEvent("spoken"));
  }

  function scheme(name) {
    root.dataset.scheme = name;
  }

  speak(language());

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

  return { read, language, chosen, tell, name, speak, scheme, paint, bytes, floats };
})();
