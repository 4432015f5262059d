// Talks to the server this page came from: every request carries the key, every refusal becomes one sentence.

export class Refused extends Error {
  constructor(status, message, hint = "") {
    super(message);
    this.status = status;
    this.hint = hint;
  }
}

export class Server {
  constructor(key) {
    this.key = key;
  }

  /** What generates text, endpoints and their adapters (ENDPOINT:ADAPTER): {name, model (version), state}. */
  async generators() {
    const [endpoints, { data }] = await Promise.all([this.#json("v1/endpoints"), this.#json("v1/models")]);
    const states = new Map(endpoints.map(({ name, state }) => [name, state]));
    return data.map(({ id: name, root: model }) => ({ name, model, state: states.get(endpointOf(name)) ?? "gone" }));
  }

  async rate(entry) {
    await this.#json("v1/feedback", { method: "POST", body: JSON.stringify(entry) });
  }

  /** Pieces of one answer as they come: {text} | {model} | {finish} | {usage}. Aborting the signal cancels it there. */
  async *answer(body, signal) {
    const asked = { ...body, stream: true, stream_options: { include_usage: true } };
    const reply = await this.#request("v1/chat/completions", { method: "POST", body: JSON.stringify(asked), signal });
    let ended = false;
    for await (const data of events(reply.body)) {
      if (data === "[DONE]") { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw refusal(reply.status, chunk.error);
      if (chunk.system_fingerprint) yield { model: chunk.system_fingerprint }; // the version behind the name
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) { ended = true; yield { finish: choice.finish_reason }; }
      if (chunk.usage) yield { usage: chunk.usage };
    }
    if (!ended) throw new Refused(0, "the answer broke off", "the server or the network ended it; try again");
  }

  async #json(path, options = {}) {
    return (await this.#request(path, options)).json();
  }

  async #request(path, options) {
    const headers = { Authorization: `Bearer ${this.key}`, "Content-Type": "application/json" };
    let reply;
    try {
      reply = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(0, "the server cannot be reached", "is it up? start it with: llmo up");
    }
    if (reply.ok) return reply;
    const told = await reply.json().catch(() => ({}));
    throw refusal(reply.status, told.error ?? {});
  }
}

/** The endpoint behind a name that may be one of its adapters. */
export function endpointOf(name) {
  return name.split(":")[0];
}

/** Our own errors say what and hint, those in OpenAI's shape say message. */
function refusal(status, error) {
  return new Refused(status, error.what ?? error.message ?? `the server said ${status}`, error.hint ?? "");
}

/** The data of each server-sent event. */
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      held += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = held.split(/\r\n|\n|\r/);
      held = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(line[5] === " " ? 6 : 5);
      }
      if (done) return;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
