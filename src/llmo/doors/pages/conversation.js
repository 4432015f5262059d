// What was said: turns of one question and one or two answers, kept in this tab only.

const KEPT = "llmo-conversation";

export class Conversation {
  constructor() {
    this.turns = [];
    this.load();
  }

  /** The messages that a turn's answers reply to: of each earlier turn the picked answer; one without is left out. */
  messages(turn) {
    const said = turn.system.trim() ? [{ role: "system", content: turn.system }] : [];
    for (const { question, answers, picked } of this.turns.slice(0, this.turns.indexOf(turn))) {
      const { text } = answers[picked];
      if (text) said.push({ role: "user", content: question }, { role: "assistant", content: text });
    }
    return [...said, { role: "user", content: turn.question }];
  }

  /** A new turn: a question and the names that are to answer it. */
  ask(question, names, system) {
    const turn = { question };
    this.renew(turn, names, system);
    this.turns.push(turn);
    return turn;
  }

  /** The same question, asked anew. */
  renew(turn, names, system) {
    Object.assign(turn, { answers: names.map(blank), system, picked: 0, better: null });
  }

  clear() {
    this.turns = [];
    this.save();
  }

  save() {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify(this.turns));
    } catch {
      sessionStorage.removeItem(KEPT); // longer than a browser keeps: it lasts until the page is left
    }
  }

  load() {
    try {
      this.turns = JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
    } catch {
      this.turns = [];
    }
    for (const answer of this.turns.flatMap((turn) => turn.answers)) {
      if (answer.state === "waiting" || answer.state === "writing") answer.state = "stopped";
    }
  }
}

/** An answer yet to come from one of the server's names. */
function blank({ name, model }) {
  return { endpoint: name, model, text: "", state: "waiting", note: "", usage: null, first: 0, seconds: 0, said: null, corrected: false };
}
