// A conversation as a value: a tree of messages, since an edited question and an answer made anew stand beside what was
// there before. What is shown and sent is one path through it, by the choices made.
//
// conversation: {version, id, title, created, updated, model, settings, messages: [message], chosen: {parent: child}}
// message: {id, parent, role: "user" | "assistant" | "tool", content, created} and, of an answer, {calls, model, finish,
// usage, times, failure}; of a tool's output, {callId, name}. A parent is an id, or "" for the first turn.

import { checkedSettings } from "./settings.js";

export const VERSION = 1;
const ROLES = ["user", "assistant", "tool"];

export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(9));
  return Array.from(bytes, (byte) => byte.toString(36).padStart(2, "0")).join("");
}

export function newConversation(settings) {
  const now = Date.now();
  const empty = { title: "", model: "", messages: [], chosen: {} };
  return { version: VERSION, id: newId(), created: now, updated: now, ...empty, settings: checkedSettings(settings) };
}

const childrenOf = (conversation, parent) => conversation.messages.filter((message) => message.parent === parent);

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const shown = [];
  for (let parent = ""; ;) {
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
  if (!isObject(value)) fail("not an object");
  if (value.version !== VERSION) fail(`its version is ${JSON.stringify(value.version)}, not ${VERSION}`);
  if (!isId(value.id)) fail("it has no id");
  if (!Array.isArray(value.messages)) fail("it has no messages");
  const seen = new Set([""]);
  const messages = value.messages.map((message, at) => {
    if (!isObject(message) || !ROLES.includes(message.role)) fail(`message ${at} has no role of ${ROLES.join(", ")}`);
    if (typeof message.content !== "string") fail(`message ${at} has no text`);
    if (!isId(message.id) || seen.has(message.id)) fail(`message ${at} has no id of its own`);
    if (!seen.has(message.parent)) fail(`message ${at} stands behind none`);
    if (!(message.calls ?? []).every?.((call) => typeof call?.function?.arguments === "string")) {
      fail(`message ${at} has calls without arguments`);
    }
    seen.add(message.id);
    return checkedMessage(message);
  });
  return {
    version: VERSION,
    id: value.id,
    title: text(value.title),
    created: number(value.created) ?? Date.now(),
    updated: number(value.updated) ?? Date.now(),
    model: text(value.model),
    settings: checkedSettings(value.settings),
    messages,
    chosen: isObject(value.chosen) ? value.chosen : {},
  };
}

const isId = (value) => typeof value === "string" && /^\w{1,64}$/.test(value);
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const text = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : undefined);

/** A message with what this page shows of it; a detail that is not of its kind is left out. */
function checkedMessage({ id, parent, created, role, content, ...rest }) {
  const message = { id, parent, created: number(created) ?? 0, role, content };
  if (role === "tool") return { ...message, callId: text(rest.callId), name: text(rest.name) };
  if (role === "user") return message;
  const { calls, model, finish, usage, times, failure } = rest;
  const called = (call) => ({
    id: text(call.id),
    type: "function",
    function: { name: text(call.function.name), arguments: call.function.arguments },
  });
  message.model = text(model);
  if (calls?.length) message.calls = calls.map(called);
  if (text(finish)) message.finish = finish;
  if (number(usage?.prompt_tokens) !== undefined && number(usage.completion_tokens) !== undefined) {
    const { prompt_tokens, completion_tokens } = usage;
    const cached_tokens = number(usage.prompt_tokens_details?.cached_tokens) ?? 0;
    message.usage = { prompt_tokens, completion_tokens, prompt_tokens_details: { cached_tokens } };
  }
  if (number(times?.first) !== undefined) message.times = { first: times.first, total: number(times.total) };
  if (isObject(failure))
    message.failure = { kind: text(failure.kind), text: text(failure.text), retryAt: number(failure.retryAt) };
  return message;
}
