// Answers under way, one of each conversation at most: asked for, grown as they come, and what ended them.

import { Failure, answer } from "./api.js";
import { asFields } from "./settings.js";
import { addMessage, asRequest } from "./tree.js";

const running = new Map(); // by the conversation's id: {controller, message}

/** The answer that is being written in a conversation, or null. */
export const runningIn = (conversation) => running.get(conversation.id)?.message ?? null;

/** Ends the answer of a conversation where it stands; what has come stays. */
export const stop = (conversation) => running.get(conversation.id)?.controller.abort();

/**
 * Asks `model` for an answer to `turns`, which becomes a message behind the last of them. Calls `began()`, `grown(message)`
 * with every part and `ended(message)`. `askKey()` resolves to a key, or to null: then the answer fails. `fault`: why
 * nothing can be asked at all, or null.
 */
export async function respond(conversation, turns, { model, fault, key, askKey, began, grown, ended }) {
  const message = addMessage(conversation, turns.at(-1).id, { role: "assistant", model });
  const controller = new AbortController();
  running.set(conversation.id, { controller, message });
  began();
  let started = performance.now();
  const passed = () => performance.now() - started;
  const onPart = ({ text, calls }) => {
    message.times ??= { first: passed() };
    message.content += text;
    for (const { index, id, type, function: more } of calls) {
      const begun = (message.calls ??= [])[index];
      if (begun === undefined) message.calls[index] = { id, type, function: { ...more } };
      else begun.function.arguments += more.arguments; // a call comes in pieces
    }
    grown(message);
  };
  try {
    if (fault) throw fault;
    const request = {
      model,
      messages: asRequest(turns, conversation.settings.system),
      ...asFields(conversation.settings),
    };
    const asked = (withKey) => answer(request, { key: withKey, signal: controller.signal, onPart });
    const { finish, usage } = await asked(key()).catch(async (error) => {
      if (error.kind !== "key") throw error;
      const given = await askKey();
      if (given === null) throw error;
      started = performance.now();
      return asked(given);
    });
    Object.assign(message, { finish, usage });
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.failure = told(error);
  }
  // One that was cut off is no call; the server gives its text.
  if (message.finish !== "tool_calls") delete message.calls;
  if (message.times) message.times.total = passed();
  running.delete(conversation.id);
  ended(message);
}

function told(error) {
  if (!(error instanceof Failure)) {
    console.error(error);
    return { kind: "page", text: `This page could not read the answer: ${error.message}` };
  }
  const retryAt = error.retryAfter === null ? null : Date.now() + 1000 * error.retryAfter;
  return { kind: error.kind, text: error.message, retryAt };
}
