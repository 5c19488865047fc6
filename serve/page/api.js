// The REST interface of the server that sent this page: its models, and answers as they come.

/** Why a request has no answer. `kind`: key, busy, context, refused, server, gone (no response) or broken (midway). */
export class Failure extends Error {
  constructor(kind, message, { retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter; // seconds, or null
  }
}

const address = (path) => new URL(path, document.baseURI).href;
const headers = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function ask(path, how) {
  let response;
  try {
    response = await fetch(address(path), how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("gone", `The server at ${location.host} does not answer. Is it still running?`);
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // not this server's own words: a proxy's page, say
  }
  const said = error.message || `The server answered with status ${response.status}.`;
  if (response.status === 401) return new Failure("key", said);
  if (response.status === 429 || response.status === 503) {
    return new Failure("busy", said, { retryAfter: secondsOf(response.headers.get("Retry-After")) });
  }
  if (error.code === "context_length_exceeded") return new Failure("context", said);
  return new Failure(response.status >= 500 ? "server" : "refused", said);
}

/** Retry-After is a number of seconds, or a date. */
function secondsOf(text) {
  if (text === null) return null;
  const seconds = /^\d+$/.test(text.trim()) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.min(3600, Math.ceil(seconds))) : null;
}

/** The names of the models that are served, adapters included. */
export async function models(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data.map((model) => model.id);
}

/** How far a server is that has no models yet, in its own words; null where it does not say. */
export async function health() {
  try {
    const { status } = await (await fetch(address("health"))).json();
    return typeof status === "string" ? status : null;
  } catch {
    return null;
  }
}

/**
 * Asks for an answer and calls `onPart({text, calls})` as it comes. Returns {finish, usage}; throws Failure, or an
 * AbortError once `signal` says so. Closing the connection is what stops the server.
 */
export async function answer(request, { key, signal, onPart }) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const ended = { finish: null, usage: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return ended;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Failure("broken", chunk.error.message ?? "The answer broke off.");
    ended.usage = chunk.usage ?? ended.usage;
    const [choice] = chunk.choices ?? [];
    if (choice === undefined) continue;
    ended.finish = choice.finish_reason ?? ended.finish;
    const { content, tool_calls: calls } = choice.delta ?? {};
    if (content || calls) onPart({ text: content ?? "", calls: calls ?? [] });
  }
  throw new Failure("broken", "The connection broke off before the answer was complete.");
}

/** The data of server-sent events. Throws Failure where the connection is lost. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let [waiting, data] = ["", []];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new Failure("broken", "The connection broke off before the answer was complete.");
      });
      if (done) return;
      const lines = (waiting + value).split("\n");
      waiting = lines.pop();
      for (const line of lines.map((each) => each.replace(/\r$/, ""))) {
        if (line.startsWith("data:")) {
          data.push(line.slice(5).replace(/^ /, ""));
        } else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an answer that is left is not read on
  }
}
