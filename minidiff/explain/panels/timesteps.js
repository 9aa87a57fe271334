// Timesteps: the rows of the ruler for another number of steps, and the numbers of one noise level.
{
  const text = page.chosen;
  const slider = (home, en, zh, max, value) => {
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: 0, max, step: 1 });
    input.value = value;
    page.name(input, en, zh);
    const output = document.createElement("output");
    const row = document.createElement("label");
    row.append(input, " ", output);
    home.append(row);
    return [input, output];
  };

  for (const home of document.querySelectorAll("[data-spacings]")) {
    const { grids, spacings, steps } = page.read("data-timesteps");
    const tried = Object.keys(grids).map(Number).sort((a, b) => a - b);
    const [input, output] = slider(home, "number of steps", "步数", tried.length - 1, tried.indexOf(steps));
    const ruler = document.getElementById("timesteps-ruler");
    const { low, high, left, right } = ruler.dataset;
    const at = (t) => Number(left) + ((t - low) / (high - low)) * (right - left);
    const show = () => {
      const n = tried[Number(input.value)];
      grids[n].forEach((times, k) => {
        const row = ruler.querySelector(`[data-row="${k + 1}"]`);
        const like = row.querySelector("line");
        const marks = times.map((t) => {
          const mark = like.cloneNode();
          mark.setAttribute("x1", at(t));
          mark.setAttribute("x2", at(t));
          return mark;
        });
        row.replaceChildren(...marks);
      });
      const said = spacings.map((name, k) => `${name}: ${grids[n][k].slice(0, 3).join(", ")}${n > 3 ? ", …" : ""}`);
      output.textContent = text(`${n} steps. `, `${n} 步。`) + said.join("; ");
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", show);
    document.addEventListener("spoken", show);
    show();
  }

  for (const home of document.querySelectorAll("[data-levels]")) {
    const { alpha_bar, visited } = page.read("data-timesteps");
    const table = page.floats(alpha_bar);
    const middle = Math.round(visited[Math.floor(visited.length / 2)]);
    const [input, output] = slider(home, "timestep", "时间步", table.length - 1, middle);
    const show = () => {
      const t = Number(input.value);
      const level = table[t];
      const sigma = Math.sqrt((1 - level) / level);
      const f = (value) => Number(value.toPrecision(5)).toString();
      output.textContent =
        `t = ${t}: alpha_bar ${f(level)}, signal ${f(Math.sqrt(level))}, noise ${f(Math.sqrt(1 - level))}, ` +
        `sigma ${f(sigma)}, SNR ${f(level / (1 - level))}` +
        (visited.includes(t) ? text(" (visited by this run)", "（这次经过）") : "");
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", show);
    document.addEventListener("spoken", show);
    show();
  }
}
