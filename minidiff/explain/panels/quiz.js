// The quiz: options become buttons, and the answer opens with the choice.
for (const quiz of document.querySelectorAll("[data-quiz]")) {
  const right = page.read("data-quiz").map(([, n]) => n);
  const score = document.createElement("output");
  let correct = 0;
  let done = 0;
  for (const item of quiz.querySelectorAll("[data-question]")) {
    const k = Number(item.dataset.question);
    const options = [...item.querySelectorAll("[data-option]")];
    let answered = false;
    options.forEach((option, n) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...option.childNodes);
      option.append(button);
      button.addEventListener("click", () => {
        if (!answered) {
          done += 1;
          correct += n === right[k] ? 1 : 0;
          score.textContent = `${correct} / ${done}`;
        }
        answered = true;
        options.forEach((each, m) => {
          each.classList.toggle("right", m === right[k]);
          each.classList.toggle("wrong", m === n && n !== right[k]);
        });
        item.querySelector("details").open = true;
      });
    });
  }
  quiz.after(score);
}
