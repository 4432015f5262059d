// Shows turns: the question, its answer or two beside each other, and what can be said of them.

import { render } from "./markdown.js";

export class TurnView {
  /** `act` has rate(turn, answer, rating), prefer(turn, which), correct(turn, answer, text), again(turn), copy(text, button). */
  constructor(turn, act) {
    this.turn = turn;
    this.act = act;
    this.node = make("section", "turn");
    this.question = make("div", "question", turn.question);
    this.grid = make("div", "answers");
    this.verdict = make("div", "verdict");
    this.tie = button("Both are equal", () => act.prefer(turn, "tie"));
    this.again = button("Regenerate", () => act.again(turn));
    this.verdict.append(this.tie, this.again);
    this.node.append(this.question, this.grid, this.verdict);
    this.reset();
  }

  /** Build the answers anew, as after asking again. */
  reset() {
    this.answers = this.turn.answers.map((answer) => new AnswerView(this.turn, answer, this.act));
    this.grid.classList.toggle("two", this.answers.length === 2);
    this.grid.replaceChildren(...this.answers.map((view) => view.node));
    this.update();
  }

  update(last = this.last) {
    this.last = last;
    for (const view of this.answers) view.update();
    const settled = this.turn.answers.every(({ state }) => state !== "waiting" && state !== "writing");
    this.tie.hidden = !settled || !comparable(this.turn);
    this.tie.setAttribute("aria-pressed", String(this.turn.better === "tie"));
    this.again.hidden = !settled || !last;
  }
}

/** Whether there are two answers to choose between. */
function comparable({ answers }) {
  return answers.length === 2 && answers.every(({ text, state }) => text && state !== "waiting" && state !== "writing");
}

class AnswerView {
  constructor(turn, answer, act) {
    this.turn = turn;
    this.answer = answer;
    this.act = act;
    this.node = make("article", "answer");
    this.title = make("h3");
    this.text = make("div", "text");
    this.note = make("p", "note");
    this.foot = make("footer");
    this.figures = make("span", "figures");
    this.good = this.rating("Good", "good");
    this.bad = this.rating("Bad", "bad");
    this.mend = button("Correct", () => this.correct());
    this.buttons = [
      button("Copy", (event) => act.copy(answer.text, event.currentTarget)),
      this.good,
      this.bad,
      this.mend,
    ];
    this.which = turn.answers[0] === answer ? "first" : "second";
    this.better = button("This one is better", () => act.prefer(turn, this.which));
    this.foot.append(this.figures, ...this.buttons, this.better);
    this.node.append(this.title, this.text, this.note, this.foot);
  }

  rating(text, rating) {
    return button(text, () => this.act.rate(this.turn, this.answer, rating));
  }

  update() {
    const { answer, turn } = this;
    const open = answer.state === "waiting" || answer.state === "writing";
    const goesOn = turn.answers.length === 2 && turn.answers[turn.picked] === answer && answer.text;
    this.title.textContent = `${answer.endpoint} · ${answer.model}` + (goesOn && !open ? " · the chat goes on with this one" : "");
    this.node.classList.toggle("picked", Boolean(goesOn) && !open);
    this.node.setAttribute("aria-busy", String(open));
    this.text.classList.toggle("waiting", answer.state === "waiting");
    render(this.text, answer.text, this.act.copy);
    this.note.textContent = answer.note || (answer.state === "stopped" ? "stopped" : "");
    this.note.className = answer.state === "failed" ? "note failed" : "note";
    this.note.hidden = !this.note.textContent;
    this.figures.textContent = open ? "" : figures(answer);
    for (const node of this.buttons) node.hidden = open || !answer.text;
    this.better.hidden = !comparable(turn);
    this.better.setAttribute("aria-pressed", String(turn.better === this.which));
    this.good.setAttribute("aria-pressed", String(answer.said === "good"));
    this.bad.setAttribute("aria-pressed", String(answer.said === "bad"));
    this.mend.setAttribute("aria-pressed", String(answer.corrected));
  }

  /** A text field with the answer in it: what it should have been. */
  correct() {
    if (this.node.querySelector("form")) return;
    const form = make("form", "correction");
    const field = make("textarea");
    field.value = this.answer.text;
    field.rows = Math.min(14, Math.max(3, this.answer.text.split("\n").length + 1));
    field.setAttribute("aria-label", "What it should have said");
    const save = button("Save the correction", () => {});
    save.type = "submit";
    const leave = button("Cancel", () => form.remove());
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); form.remove(); }
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      if (await this.act.correct(this.turn, this.answer, field.value)) form.remove();
    });
    form.append(field, save, leave);
    this.node.append(form);
    field.focus();
    form.scrollIntoView({ block: "nearest" });
  }
}

function figures({ usage, first, seconds, finish }) {
  const parts = [];
  if (usage) parts.push(`${usage.completion_tokens} tokens`);
  if (usage && seconds > first) parts.push(`${Math.round(usage.completion_tokens / (seconds - first || seconds))} a second`);
  if (first) parts.push(`first after ${first.toFixed(first < 10 ? 2 : 0)} s`);
  if (finish === "length") parts.push("cut at the limit");
  return parts.join(" · ");
}

function button(text, act) {
  const node = make("button", "", text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

function make(name, className = "", text = "") {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
}
