// The turns of a conversation as elements: what was said, what can be done with it, what it took.

import { copyButton, h, icon, iconButton, plainButton } from "./element.js";
import { codeBlock, showMarkdown } from "./markdown.js";
import { path, versions } from "./tree.js";

/**
 * Shows a conversation in a list. `running` is the answer that is being written, or null; `act` holds what buttons do:
 * {edit(message, text), again(message), choose(message), output(call, text), giveKey()}.
 */
export function showTurns(list, conversation, { running, act }) {
  const turns = path(conversation);
  list.replaceChildren(...turns.map((message) => turn(message, { conversation, turns, running, act })));
}

/** Shows more of the answer that is being written. */
export function growTurn(list, message) {
  const element = list.querySelector(`[data-id="${message.id}"]`);
  if (element === null) return;
  element.classList.toggle("waiting", !message.content && !message.calls?.length);
  showMarkdown(element.querySelector(".said"), message.content);
}

const NAMES = { user: "You", assistant: "Answer", tool: "Tool output" };

function turn(message, context) {
  const isRunning = context.running === message;
  const element = h("article", {
    class: `turn ${message.role}`,
    "data-id": message.id,
    "aria-label": NAMES[message.role],
  });
  if (message.role === "assistant") {
    const said = h("div", { class: "said" });
    showMarkdown(said, message.content);
    element.append(said, ...calls(message, context));
    element.classList.toggle("waiting", isRunning && !message.content && !message.calls?.length);
    if (isRunning) element.setAttribute("aria-busy", "true");
  } else if (message.role === "user") {
    element.append(h("div", { class: "bubble" }, message.content));
  } else {
    element.append(
      h(
        "div",
        { class: "output" },
        codeBlock(message.content, outputLanguage(message.content), `output of ${message.name || "a tool"}`),
      ),
    );
  }
  if (isRunning) return element;
  const fault = failure(message, context);
  if (fault) element.append(fault);
  element.append(foot(message, context, element));
  return element;
}

/** What stands under a turn: its versions, what can be done with it, what it took. */
function foot(message, context, element) {
  const { act, running } = context;
  const buttons = [versionButtons(message, context)];
  if (message.content && message.role !== "tool") buttons.push(copyButton(() => message.content, "Copy the text"));
  if (!running && !message.failure) {
    if (message.role === "assistant") {
      buttons.push(iconButton("again", "Answer again", () => act.again(message)));
    } else {
      buttons.push(iconButton("edit", "Edit and send again", () => edit(message, context, element)));
    }
  }
  const took = message.role === "assistant" && (message.content || message.calls) ? counters(message) : null;
  return h("footer", {}, buttons, took);
}

function versionButtons(message, { conversation, running, act }) {
  const { all, at } = versions(conversation, message);
  if (all.length < 2) return null;
  const step = (shape, label, to) =>
    iconButton(shape, label, () => act.choose(all[to], label), { disabled: Boolean(running) || all[to] === undefined });
  const where = h("span", { "aria-label": `Version ${at + 1} of ${all.length}` }, `${at + 1} / ${all.length}`);
  return h(
    "span",
    { class: "versions" },
    step("left", "Earlier version", at - 1),
    where,
    step("right", "Later version", at + 1),
  );
}

function edit(message, { act }, element) {
  const input = h("textarea", { rows: "3", "aria-label": "The edited text" });
  input.value = message.content;
  const before = [...element.children];
  const cancel = () => {
    element.replaceChildren(...before);
    element.classList.remove("editing");
    element.querySelector('[aria-label="Edit and send again"]')?.focus();
  };
  const send = (event) => {
    event.preventDefault();
    if (input.value.trim()) act.edit(message, input.value);
  };
  const form = h(
    "form",
    { class: "edit", on: { submit: send } },
    input,
    h("div", { class: "row" }, plainButton("Cancel", cancel), h("button", { type: "submit", class: "main" }, "Send")),
  );
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    } else if (isSend(event)) {
      send(event);
    }
  });
  element.classList.add("editing");
  element.replaceChildren(form);
  fit(input);
  input.addEventListener("input", () => fit(input));
  input.focus();
  input.setSelectionRange(input.value.length, input.value.length);
}

/** Enter alone, and not the one that chooses among words of an input method. */
export const isSend = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

/** Makes a text field as high as its text, up to its largest height in the style. */
export function fit(input) {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function calls(message, context) {
  const { turns, running, act } = context;
  const behind = turns.slice(turns.indexOf(message) + 1);
  const next = behind.findIndex((each) => each.role !== "tool");
  const given = new Set((next < 0 ? behind : behind.slice(0, next)).map((each) => each.callId));
  const isOpen = next < 0 && !running;
  return (message.calls ?? []).map((call) => {
    const { name, arguments: text } = call.function;
    const parsed = parse(text);
    const isCode = name === "interpreter" && typeof parsed?.code === "string";
    const isShort = parsed === undefined || (text.length < 70 && !text.includes("\n"));
    const shown = isCode ? parsed.code : isShort ? text : JSON.stringify(parsed, null, 2);
    return h(
      "section",
      { class: "call", "aria-label": `Tool call: ${name}` },
      h("p", { class: "name" }, icon("tool"), h("span", {}, "Calls "), h("code", {}, name || "no tool by name")),
      codeBlock(shown, isCode ? "python" : "json", isCode ? "code" : "arguments"),
      parsed === undefined &&
        h("p", { class: "fault" }, "Its arguments are not JSON, so this turn cannot be sent on; let it answer again."),
      isOpen && parsed !== undefined && !given.has(call.id) ? outputForm(call, act) : null,
    );
  });
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

const outputLanguage = (text) => (/^\s*[[{]/.test(text) && parse(text) !== undefined ? "json" : "");

/** The place for what a tool returned: this page runs none. */
function outputForm(call, act) {
  const input = h("textarea", {
    rows: "2",
    placeholder: "What the tool returned",
    "aria-label": `Output of ${call.function.name}`,
  });
  const send = (event) => {
    event.preventDefault();
    act.output(call, input.value);
  };
  input.addEventListener("keydown", (event) => isSend(event) && send(event));
  input.addEventListener("input", () => fit(input));
  return h(
    "form",
    { class: "tool-output", on: { submit: send } },
    input,
    h("button", { type: "submit", class: "main" }, "Send output"),
  );
}

const NOTES = {
  length: "Cut: the limit of tokens is reached.",
  stopped: "Stopped.",
  left: "Broken off: the page was closed while it was written.",
};

function failure(message, { act }) {
  if (message.role !== "assistant") return null;
  if (!message.failure) {
    const note = NOTES[message.finish ?? "left"];
    if (note) return h("p", { class: "note" }, note);
    const isEmpty = !message.content && !message.calls?.length;
    return isEmpty ? h("p", { class: "note" }, "The answer is empty.") : null;
  }
  const { kind, text, retryAt } = message.failure;
  const hints = {
    context: "Start a new chat, edit an earlier message, or lower the largest number of tokens.",
    broken: message.content ? "What had come is kept above." : null,
  };
  const isKey = kind === "key";
  const again = () => (isKey ? act.giveKey(message) : act.again(message));
  const button = plainButton(isKey ? "Enter the API key" : "Try again", again);
  if (retryAt) countDown(button, retryAt);
  return h("div", { class: "failure" }, h("p", {}, sentence(text), hints[kind] ? ` ${hints[kind]}` : null), button);
}

/** The server's messages begin small and end open, as those of programs do. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Keeps a button from being pressed until the server wants to be asked again. */
function countDown(button, until) {
  const tick = () => {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    button.disabled = seconds > 0;
    button.textContent = seconds > 0 ? `Try again in ${seconds} s` : "Try again";
    if (seconds > 0) setTimeout(tick, 250);
  };
  tick();
}

/** What an answer took: tokens as the server counted them, times as they passed here. */
function counters({ model, usage, times }) {
  const parts = [];
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const held = cached ? ` (${cached.toLocaleString("en")} cached)` : "";
    const [prompt, said] = [usage.prompt_tokens, usage.completion_tokens].map((each) => each.toLocaleString("en"));
    parts.push([`${prompt}${held} → ${said} tokens`, "Prompt (of it in the server's cache) → answer"]);
  }
  if (Number.isFinite(times?.first)) {
    parts.push([`first after ${seconds(times.first)}`, "Until the first token was here"]);
    const during = (times.total - times.first) / 1000;
    if (usage?.completion_tokens > 1 && during > 0.05) {
      const rate = (usage.completion_tokens - 1) / during;
      const shown = rate < 100 ? rate.toPrecision(2) : Math.round(rate).toLocaleString("en");
      parts.push([`${shown} tokens/s`, "From the first token to the last"]);
    }
  }
  if (model) parts.push([model, "The model that answered"]);
  return h(
    "span",
    { class: "counters" },
    parts.map(([text, title]) => h("span", { title }, text)),
  );
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
