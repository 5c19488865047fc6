// The page: what is open, what its buttons and keys do. Conversations are values (tree.js) that are shown and kept.

import { respond, runningIn, stop } from "./answers.js";
import { health, models } from "./api.js";
import { announce, asked, clearNotice, confirmed, notify } from "./dialog.js";
import { h, icon, iconButton, plainButton } from "./element.js";
import { fit, growTurn, isSend, showTurns } from "./messages.js";
import { numSet, showSettings } from "./settings.js";
import { showList } from "./sidebar.js";
import * as store from "./store.js";
import { placeTheme } from "./theme.js";
import { addMessage, choose, newConversation, path, pathBefore, removeLeaf } from "./tree.js";

const at = (id) => document.getElementById(id);
const isNarrow = matchMedia("(max-width: 860px)");
const SAVE_EVERY = 1000; // milliseconds, while an answer grows

const loaded = store.loadAll();
const state = {
  conversations: loaded.conversations,
  unreadable: loaded.unreadable,
  current: null,
  fresh: null, // a new one, which is not among the conversations until something is said
  models: [],
  key: store.loadKey(),
  drafts: new Map(), // what is typed and not sent, by the conversation's id
  unsaved: new Set(),
  timer: null,
  asking: null, // the timer after which the models are asked for again
};

// ------------------------------------------------------------------------------------------------- shown

function show() {
  const conversation = state.current;
  const running = runningIn(conversation);
  showTurns(at("turns"), conversation, { running, act });
  at("welcome").hidden = conversation.messages.length > 0;
  showTitle();
  at("send").replaceChildren(icon(running ? "stop" : "send"));
  at("send").setAttribute("aria-label", running ? "Stop the answer" : "Send");
  at("send").title = running ? "Stop (Esc)" : "Send (Enter)";
  at("send").classList.toggle("stop", Boolean(running));
  showSide();
  showModels();
}

function showTitle() {
  const { title } = state.current;
  at("title").textContent = title || "New chat";
  at("title").title = title;
  document.title = title ? `${title} · InternJAX` : "InternJAX";
}

function showSide() {
  const { conversations, current } = state;
  const isRunning = (each) => runningIn(each) !== null;
  showList(at("list"), { conversations, current, query: at("search").value, isRunning, act: { open, rename, remove } });
  const count = numSet(state.current.settings);
  at("open-settings").firstChild.dataset.count = count ? String(count) : "";
}

function showModels() {
  const names = state.models;
  const chosen = modelOf(state.current);
  at("model").replaceChildren(...names.map((name) => h("option", { value: name, selected: name === chosen }, name)));
  at("model").hidden = names.length === 0;
  at("welcome").replaceChildren(
    h("h2", {}, chosen ? `A conversation with ${chosen}` : "A conversation"),
    h("p", {}, `It goes to the server at ${location.host} and nowhere else.`),
  );
}

/** The model that answers: the one chosen, as long as it is served. */
const modelOf = ({ model }) => (state.models.includes(model) ? model : (state.models[0] ?? model));

const isAtEnd = () => at("scroll").scrollHeight - at("scroll").scrollTop - at("scroll").clientHeight < 60;

function scrollToEnd() {
  at("scroll").scrollTop = at("scroll").scrollHeight;
}

const jump = iconButton("down", "To the end", scrollToEnd, { class: "quiet jump", hidden: true });

let frame = null;
function grown(conversation, message) {
  keepLater(conversation);
  if (conversation !== state.current || frame !== null) return;
  frame = requestAnimationFrame(() => {
    frame = null;
    const follows = isAtEnd();
    growTurn(at("turns"), runningIn(state.current) ?? message);
    if (follows) scrollToEnd();
  });
}

// ------------------------------------------------------------------------------------------------- kept

function keep(conversation) {
  state.unsaved.delete(conversation);
  if (!state.conversations.includes(conversation)) return;
  try {
    store.save(conversation);
    clearNotice("storage");
  } catch (error) {
    const lost = "It is lost with this tab unless you export it";
    notify(
      "storage",
      `“${conversation.title}” is not kept: ${error.message}. ${lost}.`,
      plainButton("Export all", exportAll),
    );
  }
}

function keepLater(conversation) {
  state.unsaved.add(conversation);
  state.timer ??= setTimeout(keepNow, SAVE_EVERY);
}

function keepNow() {
  clearTimeout(state.timer);
  state.timer = null;
  for (const conversation of state.unsaved) keep(conversation);
}

function exportAll() {
  const text = store.exported(state.conversations, state.unreadable);
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const name = `internjax-chats-${new Date().toISOString().slice(0, 10)}.json`;
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

async function importFile() {
  const [file] = at("file").files;
  at("file").value = "";
  if (!file) return;
  try {
    const added = store.imported(await file.text(), state.conversations);
    state.conversations.push(...added);
    for (const conversation of added) keep(conversation);
    const count = added.length === 1 ? "One conversation was" : `${added.length} conversations were`;
    notify("import", `${count} imported.`);
  } catch (error) {
    notify("import", `Nothing was imported: ${error.message}.`);
  }
  showSide();
}

/** Another tab has kept or deleted a conversation. */
function changedElsewhere(id) {
  const own = state.conversations.find((each) => each.id === id);
  if (own && runningIn(own)) return; // what is being written here is kept over it
  const now = id === null ? null : store.loadOne(id);
  state.conversations = state.conversations.filter((each) => each !== own);
  if (now) state.conversations.push(now);
  if (own && own === state.current) state.current = now ?? newConversation(store.loadDefaults());
  show();
}

// ------------------------------------------------------------------------------------------------- said

async function ask(turns) {
  const conversation = state.current;
  const fault = state.models.length ? null : await loadModels();
  const model = modelOf(conversation);
  const ended = (message) => {
    keep(conversation);
    if (message.failure?.kind === "refused") loadModels(); // another one may be served by now
    if (conversation !== state.current) return showSide();
    const follows = isAtEnd();
    show();
    if (follows) scrollToEnd();
    const said = message.finish === "stopped" ? "Stopped" : `Answer: ${message.content.slice(0, 500)}`;
    return announce(message.failure ? message.failure.text : said);
  };
  const began = () => {
    keep(conversation);
    show();
    scrollToEnd();
    if (document.activeElement === document.body && !isNarrow.matches) at("input").focus();
    announce("The answer is being written");
  };
  const more = (message) => grown(conversation, message);
  respond(conversation, turns, { model, fault, key: () => state.key, askKey, began, grown: more, ended });
}

function say(fields, parent) {
  const conversation = state.current;
  if (!state.conversations.includes(conversation)) {
    state.conversations.push(conversation);
    state.fresh = null;
    history.replaceState(null, "", `#${conversation.id}`);
  }
  addMessage(conversation, parent, fields);
}

function send() {
  const [conversation, text] = [state.current, at("input").value];
  if (!text.trim() || runningIn(conversation)) return;
  say({ role: "user", content: text }, path(conversation).at(-1)?.id ?? "");
  at("input").value = "";
  state.drafts.delete(conversation.id);
  fit(at("input"));
  ask(path(conversation));
}

const act = {
  /** Says a turn in other words, beside what it was. */
  edit(message, text) {
    const { role, callId, name } = message;
    say({ role, content: text, ...(role === "tool" ? { callId, name } : {}) }, message.parent);
    ask(path(state.current));
  },
  again(message) {
    const turns = pathBefore(state.current, message);
    if (message.failure && !message.content && !message.calls) removeLeaf(state.current, message);
    ask(turns);
  },
  choose(message, label) {
    choose(state.current, message);
    keep(state.current);
    show();
    at("turns").querySelector(`[data-id="${message.id}"] [aria-label="${label}"]`)?.focus();
  },
  /** What a tool returned; the model is asked when each call of the turn has its output. */
  output(call, text) {
    const before = path(state.current);
    const caller = before.findLast((each) => each.role === "assistant");
    say({ role: "tool", content: text, callId: call.id, name: call.function.name }, before.at(-1).id);
    const turns = path(state.current);
    const given = new Set(turns.slice(turns.indexOf(caller) + 1).map((each) => each.callId));
    if (caller.calls.every(({ id }) => given.has(id))) return ask(turns);
    keep(state.current);
    return show();
  },
  async giveKey(message) {
    if ((await askKey()) !== null) act.again(message);
  },
};

async function askKey() {
  const text = `The server at ${location.host} asks for one. It is kept until this tab is closed.`;
  const given = await asked({ title: "API key", text, label: "Key", type: "password", action: "Use it" });
  if (given === null) return null;
  state.key = given;
  store.saveKey(given);
  if (state.models.length === 0) await loadModels();
  return given;
}

/** Asks for the models that are served; resolves to why that failed, or to null. A server that starts is asked again. */
async function loadModels() {
  clearTimeout(state.asking);
  try {
    state.models = await models(state.key);
    clearNotice("models");
    showModels();
    return null;
  } catch (error) {
    if (error.kind === "key" && (await askKey()) !== null) return null; // which has loaded them
    let text = error.message;
    if (error.kind === "busy" && error.retryAfter !== null) {
      const status = await health();
      if (status !== null) text = `The server is starting: ${status}. This page goes on by itself.`;
      clearTimeout(state.asking);
      state.asking = setTimeout(loadModels, 1000 * error.retryAfter);
    }
    notify("models", text, plainButton("Try again", loadModels));
    return error;
  }
}

// ------------------------------------------------------------------------------------------------- opened

/** At once, so that what is typed next is typed there: `hashchange` comes later, and only when one goes back or forth. */
function open(conversation) {
  if (conversation !== state.current) history.pushState(null, "", `#${conversation.id}`);
  openHash();
  openDrawer(false);
}

function openNew() {
  if (location.hash.length > 1) history.pushState(null, "", location.pathname + location.search);
  openHash();
  openDrawer(false);
}

/** Opens the conversation that the address names; a new one, if it names none that is here. */
function openHash() {
  if (state.current) state.drafts.set(state.current.id, at("input").value);
  if (state.fresh && !state.drafts.get(state.fresh.id)) state.fresh = null;
  const found = state.conversations.find(({ id }) => id === location.hash.slice(1));
  state.current = found ?? (state.fresh ??= newConversation(store.loadDefaults()));
  at("input").value = state.drafts.get(state.current.id) ?? "";
  showPanel();
  show();
  fit(at("input"));
  scrollToEnd();
  if (!isNarrow.matches) at("input").focus();
}

async function rename(conversation) {
  const title = await asked({ title: "Rename", label: "Title", value: conversation.title, action: "Rename" });
  if (title === null) return;
  conversation.title = title;
  keep(conversation);
  showTitle();
  showSide();
}

async function remove(conversation) {
  const text = `“${conversation.title}” is deleted from this browser with its ${conversation.messages.length} messages.`;
  if (!(await confirmed({ title: "Delete the conversation?", text, action: "Delete" }))) return;
  state.conversations = state.conversations.filter((each) => each !== conversation);
  stop(conversation);
  store.forget(conversation.id);
  if (conversation === state.current) openNew();
  else showSide();
}

function showPanel() {
  const changed = () => {
    keep(state.current);
    showSide();
  };
  const useForNew = () => {
    store.saveDefaults(state.current.settings);
    announce("New chats begin with these settings");
    notify("defaults", "New chats begin with these settings.");
  };
  showSettings(at("fields"), state.current.settings, { changed, useForNew });
}

const isDrawerOpen = () => document.body.classList.contains("drawer-open");
const areSettingsOpen = () => !at("settings").hidden;

/** Whether the focus is in a part of the page, or nowhere: a press beside what lies over the page takes it away. */
const hasFocus = (part) => part.contains(document.activeElement) || document.activeElement === document.body;

function openDrawer(isOpen) {
  const hadFocus = isDrawerOpen() && hasFocus(at("drawer"));
  document.body.classList.toggle("drawer-open", isOpen);
  showLayers();
  if (isOpen) at("new").focus();
  else if (hadFocus) at("open-drawer").firstChild.focus();
}

function openSettings(isOpen) {
  const hadFocus = areSettingsOpen() && hasFocus(at("settings"));
  at("settings").hidden = !isOpen;
  showLayers();
  if (isOpen && isNarrow.matches) at("settings").querySelector("button").focus();
  else if (hadFocus) at("open-settings").firstChild.focus();
}

/** On a narrow screen the list and the settings lie over the rest, which nobody reaches then. */
function showLayers() {
  const [isNear, drawer, settings] = [isNarrow.matches, isDrawerOpen(), areSettingsOpen()];
  document.body.classList.toggle("settings-open", settings);
  at("drawer").inert = isNear && !drawer;
  at("settings").inert = isNear && drawer;
  for (const rest of [document.querySelector("main"), at("skip")]) rest.inert = isNear && (drawer || settings);
  at("open-drawer").firstChild.setAttribute("aria-expanded", String(drawer));
  at("open-settings").firstChild.setAttribute("aria-expanded", String(settings));
}

// ------------------------------------------------------------------------------------------------- buttons and keys

function placeButtons() {
  at("new").append(icon("plus"), "New chat");
  at("close-drawer").append(iconButton("close", "Close the list", () => openDrawer(false)));
  at("open-drawer").append(iconButton("menu", "Conversations", () => openDrawer(true)));
  const toggle = () => openSettings(!areSettingsOpen());
  at("open-settings").append(iconButton("sliders", "Settings of this chat", toggle, { class: "quiet count" }));
  at("close-settings").append(iconButton("close", "Close the settings", () => openSettings(false)));
  at("jump-place").append(jump);
  const themePlace = h("span");
  at("tools").append(
    iconButton("out", "Export all conversations to a file", exportAll),
    iconButton("in", "Import conversations from a file", () => at("file").click()),
    iconButton("key", "API key", askKey),
    themePlace,
  );
  placeTheme(themePlace);
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.code === "KeyO") {
    event.preventDefault();
    openNew();
  } else if (event.key === "Escape") {
    // What lies over the conversation, or is used, goes first. Settings beside it may stay open while one stops answers.
    const inSettings = areSettingsOpen() && (isNarrow.matches || at("settings").contains(document.activeElement));
    if (isDrawerOpen()) openDrawer(false);
    else if (inSettings) openSettings(false);
    else if (runningIn(state.current)) stop(state.current);
    else openSettings(false);
  }
}

function listen() {
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (runningIn(state.current)) stop(state.current);
    else send();
  });
  at("input").addEventListener("keydown", (event) => {
    if (!isSend(event)) return;
    event.preventDefault();
    send();
  });
  at("input").addEventListener("input", () => fit(at("input")));
  at("model").addEventListener("change", () => {
    state.current.model = at("model").value;
    keep(state.current);
    showModels();
  });
  at("skip").addEventListener("click", () => at("input").focus());
  at("new").addEventListener("click", openNew);
  at("search").addEventListener("input", showSide);
  at("file").addEventListener("change", importFile);
  at("veil").addEventListener("click", () => (isDrawerOpen() ? openDrawer(false) : openSettings(false)));
  at("fields").addEventListener("submit", (event) => event.preventDefault());
  at("scroll").addEventListener("scroll", () => {
    jump.hidden = isAtEnd();
  });
  isNarrow.addEventListener("change", () => openDrawer(false));
  addEventListener("hashchange", openHash);
  addEventListener("keydown", onKey);
  addEventListener("pagehide", keepNow);
  store.watch(changedElsewhere);
}

placeButtons();
listen();
openDrawer(false);
openHash();
if (loaded.fault) notify("storage", `${loaded.fault}: conversations last as long as this tab.`);
if (loaded.unreadable.length) {
  const count = loaded.unreadable.length === 1 ? "One conversation" : `${loaded.unreadable.length} conversations`;
  const stays = "What cannot be read stays there, and is in an export as it is";
  notify(
    "unreadable",
    `${count} in the browser's storage cannot be read. ${stays}.`,
    plainButton("Export all", exportAll),
  );
}
loadModels();
