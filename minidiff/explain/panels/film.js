// The film: a slider moves a large picture of each reel, all reels together. Everything that it shows stands in the page without it.
for (const film of document.querySelectorAll("[data-film]")) {
  const reels = [...film.querySelectorAll(".reel")].map((reel) => [...reel.querySelectorAll("figure")]);
  if (!reels.length || !reels[0].length) continue;
  const stage = document.createElement("div");
  stage.className = "stage";
  const screens = reels.map((figures, row) => {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption");
    for (const part of film.querySelectorAll(".reel")[row].querySelectorAll(".name"))
      caption.append(part.cloneNode(true));
    canvas.setAttribute("role", "img");
    figure.append(canvas, caption);
    stage.append(figure);
    return canvas;
  });
  const slider = document.createElement("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = reels[0].length - 1;
  page.name(slider, "step", "步");
  const said = document.createElement("output");
  film.prepend(stage, slider, said);

  function show() {
    const k = Number(slider.value);
    reels.forEach((figures, row) => {
      figures.forEach((figure, n) => (n === k ? figure.setAttribute("aria-current", "step") : figure.removeAttribute("aria-current")));
      const image = figures[k].querySelector("img");
      const canvas = screens[row];
      canvas.width = image.naturalWidth || image.width;
      canvas.height = image.naturalHeight || image.height;
      canvas.getContext("2d").drawImage(image, 0, 0);
      canvas.setAttribute("aria-label", image.alt);
    });
    said.replaceChildren(...[...reels[0][k].querySelector("figcaption").childNodes].map((node) => node.cloneNode(true)));
    slider.setAttribute("aria-valuetext", said.innerText);
  }
  document.addEventListener("spoken", show);
  slider.addEventListener("input", show);
  slider.value = slider.max;
  Promise.all([...film.querySelectorAll("img")].map((image) => image.decode().catch(() => null))).then(show);
  reels.forEach((figures) =>
    figures.forEach((figure, n) =>
      figure.addEventListener("click", () => {
        slider.value = n;
        show();
      }),
    ),
  );
}
