// A conversation as a value: a tree of messages, since an edited question and an answer made anew stand beside what was
// there before. What is shown and sent is one path through it, by the choices made.
//
// conversation: {version, id, title, created, updated, model, settings, messages: [message], chosen: {parent: child}}
// message: {id, parent, role: "user" | "assistant" | "tool", content, created} and, of an answer, {calls, model, finish,
// usage, times, failure}; of a tool's output, {callId, name}. A parent is an id, or "" for the first turn.

export const VERSION = 1;
const ROLES = ["user", "assistant", "tool"];

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

export function newConversation(settings) {
  const now = Date.now();
  const settled = structuredClone(settings);
  return { version: VERSION, id: newId(), title: "", created: now, updated: now, model: "", settings: settled, messages: [], chosen: {} };
}

const childrenOf = (conversation, parent) => conversation.messages.filter((message) => message.parent === parent);

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const shown = [];
  for (let parent = ""; ; ) {
    const children = childrenOf(conversation, parent);
    if (children.length === 0) return shown;
    const next = children.find((message) => message.id === conversation.chosen[parent]) ?? children.at(-1);
    shown.push(next);
    parent = next.id;
  }
}

/** The path down to a message, without it. */
export function pathBefore(conversation, message) {
  const shown = path(conversation);
  return shown.slice(0, shown.indexOf(message));
}

/** Adds a message below `parent` (an id, or "") and chooses it. */
export function addMessage(conversation, parent, fields) {
  const message = { id: newId(), parent, created: Date.now(), content: "", ...fields };
  conversation.messages.push(message);
  conversation.chosen[parent] = message.id;
  conversation.updated = message.created;
  if (!conversation.title && message.role === "user") conversation.title = titleOf(message.content);
  return message;
}

const titleOf = (text) => {
  const [line] = text.trim().split("\n");
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
};

/** Takes away a message that nothing stands behind, as an answer that failed before its first word. */
export function removeLeaf(conversation, message) {
  conversation.messages = conversation.messages.filter((each) => each !== message);
  if (conversation.chosen[message.parent] === message.id) delete conversation.chosen[message.parent];
}

/** A message and those that stand in its place: {all, at}. */
export function versions(conversation, message) {
  const all = childrenOf(conversation, message.parent);
  return { all, at: all.indexOf(message) };
}

export function choose(conversation, message) {
  conversation.chosen[message.parent] = message.id;
}

/** The messages of a request: what the model is told first, then the turns. */
export function asRequest(turns, system) {
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { role, content, calls, callId, failure } of turns) {
    if (role === "tool") {
      messages.push({ role, content, tool_call_id: callId });
    } else if (role === "user") {
      messages.push({ role, content });
    } else if (calls?.length) {
      messages.push({ role, content, tool_calls: calls });
    } else if (content || !failure) {
      messages.push({ role, content }); // an answer that failed before its first word was none
    }
  }
  return messages;
}

/** The conversation of a value that was read, with only what belongs there. Throws an Error that says what is wrong. */
export function checked(value) {
  const fail = (what) => {
    throw new Error(`it is no conversation of this page: ${what}`);
  };
  const isObject = (each) => typeof each === "object" && each !== null && !Array.isArray(each);
  if (!isObject(value)) fail("not an object");
  if (value.version !== VERSION) fail(`its version is ${JSON.stringify(value.version)}, not ${VERSION}`);
  if (typeof value.id !== "string" || !/^\w{1,64}$/.test(value.id)) fail("it has no id");
  if (!Array.isArray(value.messages)) fail("it has no messages");
  const seen = new Set([""]);
  for (const [at, message] of value.messages.entries()) {
    if (!isObject(message) || !ROLES.includes(message.role)) fail(`message ${at} has no role of ${ROLES.join(", ")}`);
    if (typeof message.content !== "string") fail(`message ${at} has no text`);
    if (typeof message.id !== "string" || seen.has(message.id)) fail(`message ${at} has no id of its own`);
    if (!seen.has(message.parent)) fail(`message ${at} stands behind none`);
    if (!(message.calls ?? []).every?.((call) => typeof call?.function?.arguments === "string")) {
      fail(`message ${at} has calls without arguments`);
    }
    seen.add(message.id);
  }
  const time = (each) => (Number.isFinite(each) ? each : Date.now());
  return {
    version: VERSION,
    id: value.id,
    title: typeof value.title === "string" ? value.title : "",
    created: time(value.created),
    updated: time(value.updated),
    model: typeof value.model === "string" ? value.model : "",
    settings: isObject(value.settings) ? value.settings : {},
    messages: value.messages,
    chosen: isObject(value.chosen) ? value.chosen : {},
  };
}
