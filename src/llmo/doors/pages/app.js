// The chat page: the key, the endpoints, the settings, and what a question sets going.

import { endpointOf, Refused, Server } from "./api.js";
import { Conversation } from "./conversation.js";
import { TurnView } from "./view.js";

const KEY = "llmo-key";
const CHOICES = "llmo-choices";
const SETTINGS = ["system", "temperature", "max_tokens", "seed"];
const at = (id) => document.getElementById(id);

const conversation = new Conversation();
const views = new Map(); // turn -> its view
let server = null;
let names = []; // what the server can ask
let running = null; // the AbortController of the answers being written

// -- the key

function lock(reason = "") {
  sessionStorage.removeItem(KEY);
  server = null;
  at("refusal").textContent = reason;
  at("refusal").hidden = !reason;
  at("key").value = "";
  if (!at("door").open) at("door").showModal();
  at("key").focus();
}

async function open(key) {
  const candidate = new Server(key);
  try {
    names = await candidate.generators();
  } catch (error) {
    lock(worded(error));
    return;
  }
  server = candidate;
  sessionStorage.setItem(KEY, key);
  at("door").close();
  list();
  at("question").focus();
}

// -- choices

function list() {
  const kept = JSON.parse(sessionStorage.getItem(CHOICES) ?? "{}");
  for (const id of ["first", "second"]) {
    const options = names.map((name) => {
      const text = `${name.name} (${name.model})`;
      return new Option(name.state === "up" ? text : `${text}, ${name.state}`, name.name);
    });
    at(id).replaceChildren(...options);
    const known = names.some(({ name }) => name === kept[id]);
    at(id).value = known ? kept[id] : names.at(id === "first" ? 0 : -1)?.name ?? "";
  }
  at("compare").checked = kept.compare ?? false;
  for (const id of SETTINGS) at(id).value = kept[id] ?? "";
  compare();
  empty();
}

function keep() {
  const kept = { first: at("first").value, second: at("second").value, compare: at("compare").checked };
  for (const id of SETTINGS) kept[id] = at(id).value;
  sessionStorage.setItem(CHOICES, JSON.stringify(kept));
}

function compare() {
  at("beside").hidden = !at("compare").checked;
}

function chosen() {
  const ids = at("compare").checked ? ["first", "second"] : ["first"];
  return ids.map((id) => names.find(({ name }) => name === at(id).value)).filter(Boolean);
}

/** The settings that were filled in, as the request carries them. */
function settings() {
  const found = {};
  for (const id of SETTINGS.slice(1)) {
    if (at(id).value !== "") found[id] = at(id).valueAsNumber;
  }
  return found;
}

// -- asking

async function ask(question) {
  if (running || !question.trim()) return;
  if (!names.length) { empty(); return; }
  if (!SETTINGS.slice(1).every((id) => at(id).reportValidity())) return;
  const turn = conversation.ask(question, chosen(), at("system").value);
  at("question").value = "";
  fit();
  draw(turn);
  await answer(turn);
}

async function again(turn) {
  if (running) return;
  conversation.renew(turn, chosen(), at("system").value);
  views.get(turn).reset();
  await answer(turn);
}

/** Ask every chosen endpoint the same messages at once, until all have answered or were stopped. */
async function answer(turn) {
  running = new AbortController();
  busy(true);
  const body = { messages: conversation.messages(turn), ...settings() };
  scroll(true);
  await Promise.all(turn.answers.map((one) => write(turn, one, { ...body, model: one.endpoint })));
  running = null;
  if (!turn.answers[0].text && turn.answers[1]?.text) turn.picked = 1;
  busy(false);
  conversation.save();
  const near = isNear();
  views.get(turn).update();
  scroll(near);
}

async function write(turn, one, body) {
  const began = performance.now();
  try {
    for await (const piece of server.answer(body, running.signal)) {
      if (piece.text) {
        one.first ||= (performance.now() - began) / 1000;
        one.state = "writing";
        one.text += piece.text;
        soon(turn);
      }
      if (piece.model) one.model = piece.model;
      if (piece.finish) one.finish = piece.finish;
      if (piece.usage) one.usage = piece.usage;
    }
    one.state = "done";
    if (!one.text) one.note = "it had nothing to say";
  } catch (error) {
    one.state = error.name === "AbortError" ? "stopped" : "failed";
    if (one.state === "failed") one.note = worded(error);
    if (error.status === 401) lock(worded(error));
  }
  one.seconds = (performance.now() - began) / 1000;
  soon(turn);
}

function stop() {
  running?.abort();
}

// -- saying what one thinks of it

function entry(turn, answers, more) {
  const said = answers.map(({ endpoint, model, text }) => ({ endpoint: endpointOf(endpoint), model, content: text }));
  return { endpoint: said[0].endpoint, messages: conversation.messages(turn), answers: said, ...more };
}

async function tell(feedback, done) {
  try {
    await server.rate(feedback);
  } catch (error) {
    status(worded(error));
    if (error.status === 401) lock(worded(error));
    return false;
  }
  done();
  conversation.save();
  for (const view of views.values()) view.update();
  status("Kept as feedback, thank you.");
  return true;
}

const acts = {
  again,
  rate: (turn, one, rating) => tell(entry(turn, [one], { kind: "rating", rating }), () => { one.said = rating; }),
  prefer: (turn, which) => tell(entry(turn, turn.answers, { kind: "comparison", rating: which }), () => {
    turn.better = which;
    if (conversation.turns.at(-1) === turn) turn.picked = which === "second" ? 1 : 0;
  }),
  correct: (turn, one, text) => tell(entry(turn, [one], { kind: "correction", correction: text }), () => { one.corrected = true; }),
  copy,
};

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no secure context: plain HTTP from another machine
    const field = document.createElement("textarea");
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// -- showing

function draw(turn) {
  at("turns").querySelector(".empty")?.remove();
  const view = new TurnView(turn, acts);
  const before = views.get(conversation.turns.at(-2));
  views.set(turn, view);
  before?.update(false);
  view.update(true);
  at("turns").append(view.node);
}

let waiting = new Set();

/** Show a turn's news with the next frame, however many there are until then. */
function soon(turn) {
  if (waiting.size === 0) requestAnimationFrame(() => {
    const near = isNear();
    for (const each of waiting) views.get(each)?.update();
    waiting = new Set();
    if (near) scroll(true);
  });
  waiting.add(turn);
}

function isNear() {
  const { scrollTop, scrollHeight, clientHeight } = at("turns");
  return scrollHeight - scrollTop - clientHeight < 80;
}

function scroll(near = isNear()) {
  if (near) at("turns").scrollTop = at("turns").scrollHeight;
}

function empty() {
  if (conversation.turns.length) return;
  const node = document.createElement("p");
  node.className = "empty";
  node.textContent = names.length
    ? "Ask something. The conversation stays in this tab."
    : "No endpoint of this server generates text yet. Deploy a chat model with: llmo deploy MODEL";
  at("turns").replaceChildren(node);
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  for (const id of ["first", "second", "compare", "fresh"]) at(id).disabled = is;
  status(is ? "Writing…" : "");
}

function status(text) {
  at("status").textContent = text;
}

function worded(error) {
  if (!(error instanceof Refused)) return `something went wrong in this page: ${error.message}`;
  if (error.status === 401) return error.message; // its hint is for those who set the environment
  return error.hint ? `${error.message}; ${error.hint}` : error.message;
}

/** The question's field is as high as its text, up to a third of the window. */
function fit() {
  const field = at("question");
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
}

// -- wiring

at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = at("key").value.trim();
  if (/^[\x21-\x7e]+$/.test(key)) open(key);
  else lock("that holds characters that no key has");
});
at("door").addEventListener("cancel", (event) => event.preventDefault());
at("forget").addEventListener("click", () => { stop(); lock(); });
at("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(at("question").value); });
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("question").addEventListener("input", fit);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask(event.target.value);
  } else if (event.key === "ArrowUp" && !event.target.value && conversation.turns.length) {
    event.preventDefault();
    event.target.value = conversation.turns.at(-1).question;
    fit();
  }
});
addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
at("stop").addEventListener("click", stop);
at("compare").addEventListener("change", compare);
at("adjust").addEventListener("click", () => {
  const hidden = at("settings").toggleAttribute("hidden");
  at("adjust").setAttribute("aria-expanded", String(!hidden));
  if (!hidden) at("system").focus();
});
at("fresh").addEventListener("click", () => {
  conversation.clear();
  views.clear();
  status("");
  empty();
  at("question").focus();
});
for (const id of ["first", "second", "compare", ...SETTINGS]) at(id).addEventListener("change", keep);

for (const turn of conversation.turns) draw(turn);
for (const [turn, view] of views) view.update(turn === conversation.turns.at(-1));
scroll(true);
const kept = sessionStorage.getItem(KEY);
if (kept) open(kept);
else lock();
