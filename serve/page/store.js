// Conversations in the browser's storage, one entry each. What cannot be kept or read is told by an Error or a list,
// and nothing that is there is ever deleted because it could not be read.

import { checked, newId } from "./tree.js";

const PREFIX = "internjax.chat.";
const DEFAULTS = "internjax.settings";
const THEME = "internjax.theme";
const KEY = "internjax.key";

/** Everything that is kept: {conversations, unreadable: [names of entries], fault: why nothing can be kept, or null}. */
export function loadAll() {
  const [conversations, unreadable] = [[], []];
  try {
    for (const name of Object.keys(localStorage).filter((each) => each.startsWith(PREFIX))) {
      try {
        conversations.push(checked(JSON.parse(localStorage.getItem(name))));
      } catch {
        unreadable.push(name);
      }
    }
  } catch (error) {
    return { conversations, unreadable, fault: `The browser keeps nothing for this page (${error.message})` };
  }
  return { conversations, unreadable, fault: null };
}

/** The conversation as it is kept now, or null. */
export function loadOne(id) {
  try {
    return checked(JSON.parse(localStorage.getItem(PREFIX + id)));
  } catch {
    return null;
  }
}

/** Keeps a conversation. Throws an Error that says why it could not be. */
export function save(conversation) {
  const text = JSON.stringify(conversation);
  try {
    localStorage.setItem(PREFIX + conversation.id, text);
  } catch (error) {
    const isFull = error.name === "QuotaExceededError";
    const size = `${(text.length / 1024).toFixed(0)} KB`;
    throw new Error(isFull ? `the browser's storage is full (this conversation has ${size})` : error.message);
  }
}

export function forget(id) {
  localStorage.removeItem(PREFIX + id);
}

/** Calls `changed(id)` when another tab of this page has kept or deleted a conversation. */
export function watch(changed) {
  addEventListener("storage", (event) => {
    if (event.key === null) changed(null);
    else if (event.key.startsWith(PREFIX)) changed(event.key.slice(PREFIX.length));
  });
}

/** A file's text with conversations, and with entries that could not be read, as they are. */
export function exported(conversations, unreadable) {
  const raw = Object.fromEntries(unreadable.map((name) => [name, localStorage.getItem(name)]));
  const whole = { kind: "internjax-chats", conversations };
  return JSON.stringify(unreadable.length ? { ...whole, unreadable: raw } : whole, null, 1);
}

/**
 * The conversations of an exported text. One that is here already as it is in the text is left out; one that has changed
 * comes beside it. Throws an Error that says what is wrong; then nothing has come.
 */
export function imported(text, here) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`the file is not JSON (${error.message})`);
  }
  if (value?.kind !== "internjax-chats" || !Array.isArray(value.conversations)) {
    const wanted = '{"kind": "internjax-chats", "conversations": [...]}';
    throw new Error(`the file is not one that this page exported; wanted ${wanted}`);
  }
  const come = [];
  for (const each of value.conversations) {
    const conversation = checked(each);
    const own = [...here, ...come].find(({ id }) => id === conversation.id);
    if (own && JSON.stringify(checked(own)) === JSON.stringify(conversation)) continue;
    come.push(own ? { ...conversation, id: newId() } : conversation);
  }
  return come;
}

const kept = (storage, name) => {
  try {
    return storage().getItem(name);
  } catch {
    return null; // a browser that keeps nothing has nothing
  }
};
const keep = (storage, name, text) => {
  try {
    if (text) storage().setItem(name, text);
    else storage().removeItem(name);
  } catch {
    // A choice that lasts as long as the page does is no loss; a conversation goes through `save`.
  }
};

export function loadDefaults() {
  try {
    const value = JSON.parse(kept(() => localStorage, DEFAULTS));
    return typeof value === "object" && value !== null ? value : {};
  } catch {
    return {};
  }
}
export const saveDefaults = (settings) => keep(() => localStorage, DEFAULTS, JSON.stringify(settings));

export const loadTheme = () => kept(() => localStorage, THEME) ?? "auto";
export const saveTheme = (theme) => keep(() => localStorage, THEME, theme);

/** The API key lasts as long as the tab. */
export const loadKey = () => kept(() => sessionStorage, KEY) ?? "";
export const saveKey = (key) => keep(() => sessionStorage, KEY, key);
