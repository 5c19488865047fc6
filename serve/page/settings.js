// How a conversation is answered: what the model is told first, sampling, and tools. An empty field is the server's own
// value and is not sent.

import { h } from "./element.js";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, about: "0 is greedy" },
  { name: "top_p", label: "Top-p", min: 0, max: 1, step: 0.05, above: 0, about: "the most likely tokens with this probability together" },
  { name: "top_k", label: "Top-k", min: 0, step: 1, about: "the k most likely tokens; 0: all" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, about: "of one answer; else what the context holds" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0, max: 10, step: 0.05, above: 0, about: "1 is none" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, about: "0 is none" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, about: "0 is none" },
  { name: "seed", label: "Seed", step: 1, about: "the same answer again; else a new one each time" },
];
const DEFAULTS = { temperature: "1", top_p: "1", top_k: "all", max_tokens: "context", repetition_penalty: "1" };
const EMPTY = { presence_penalty: "0", frequency_penalty: "0", seed: "random" };

/** What of the settings goes into a request. */
export function asFields(settings) {
  const numbers = NUMBERS.filter(({ name }) => Number.isFinite(settings[name])).map(({ name }) => [name, settings[name]]);
  const stop = Array.isArray(settings.stop) && settings.stop.length ? { stop: settings.stop } : {};
  const tools = typeof settings.tools === "string" && settings.tools ? { tools: readTools(settings.tools) } : {};
  return { ...Object.fromEntries(numbers), ...stop, ...tools };
}

/** How many settings are not the server's own. */
export const numSet = (settings) => Object.keys(asFields(settings)).length + (settings.system ? 1 : 0);

function readTools(text) {
  const value = JSON.parse(text);
  if (!Array.isArray(value)) throw new Error("wanted a list [...] of tools");
  // A bare function {name, description, parameters} is one too.
  return value.map((tool) => (tool?.type === "function" ? tool : { type: "function", function: tool }));
}

/**
 * Fills the panel with the fields of settings and calls `changed()` when one has a new value that is right. One that is
 * not is said beside the field, and the value before it stays.
 */
export function showSettings(panel, settings, { changed, useForNew }) {
  const set = (name, value) => {
    if (value === null) delete settings[name];
    else settings[name] = value;
    changed();
  };
  const system = textField("System prompt", "system", settings.system ?? "", {
    rows: 5,
    placeholder: "What the model is told first",
    read: (text) => set("system", text.trim() ? text : null),
  });
  const stop = textField("Stop strings, one a line", "stop", (settings.stop ?? []).join("\n"), {
    rows: 2,
    placeholder: "none",
    read: (text) => {
      const lines = text.split("\n").filter(Boolean);
      set("stop", lines.length ? lines : null);
    },
  });
  const tools = textField("Tools, a JSON list", "tools", settings.tools ?? "", {
    rows: 4,
    placeholder: '[{"name": "add", "description": "Adds.", "parameters": {"type": "object"}}]',
    read: (text) => {
      if (text.trim()) readTools(text);
      set("tools", text.trim() ? text : null);
    },
  });
  const reset = () => {
    for (const name of Object.keys(settings)) delete settings[name];
    changed();
    showSettings(panel, settings, { changed, useForNew });
  };
  const buttons = h(
    "div",
    { class: "row" },
    h("button", { type: "button", class: "plain", on: { click: reset } }, "Reset"),
    h("button", { type: "button", class: "plain", title: "New chats begin with these settings", on: { click: useForNew } }, "Use for new chats"),
  );
  panel.replaceChildren(system, h("div", { class: "numbers" }, NUMBERS.map((each) => numberField(each, settings, set))), stop, tools, buttons);
}

let fieldCount = 0;

function field(label, input, about) {
  const id = `field-${(fieldCount += 1)}`;
  const told = h("p", { class: "fault", id: `${id}-fault`, hidden: true });
  input.id = id;
  input.setAttribute("aria-describedby", told.id);
  const say = (fault) => {
    told.textContent = fault ?? "";
    told.hidden = !fault;
    input.toggleAttribute("aria-invalid", Boolean(fault));
    if (fault) input.setAttribute("aria-invalid", "true");
  };
  return { element: h("div", { class: "field" }, h("label", { for: id, title: about }, label), input, told), say };
}

function textField(label, name, value, { rows, placeholder, read }) {
  const input = h("textarea", { name, rows: String(rows), placeholder, spellcheck: "false" });
  input.value = value;
  const { element, say } = field(label, input);
  input.addEventListener("input", () => {
    try {
      read(input.value);
      say(null);
    } catch (error) {
      say(`${error.message}. It is not used.`);
    }
  });
  return element;
}

function numberField({ name, label, min, max, step, above, about }, settings, set) {
  const placeholder = DEFAULTS[name] ?? EMPTY[name];
  const input = h("input", { type: "number", name, min, max, step: "any", inputmode: step === 1 ? "numeric" : "decimal", placeholder });
  input.step = String(step);
  if (Number.isFinite(settings[name])) input.value = String(settings[name]);
  const { element, say } = field(label, input, about);
  input.addEventListener("input", () => {
    const [value, isEmpty] = [input.valueAsNumber, input.value === "" && !input.validity.badInput];
    if (isEmpty) return say(null), set(name, null);
    const isBad = Number.isNaN(value) || (step === 1 && !Number.isSafeInteger(value));
    const isOut = value < (min ?? -Infinity) || value > (max ?? Infinity) || value === above;
    if (isBad || isOut) return say(`Give ${rangeOf({ min, max, step, above })}. It is not used.`);
    say(null);
    return set(name, value);
  });
  return element;
}

function rangeOf({ min, max, step, above }) {
  const kind = step === 1 ? "a whole number" : "a number";
  if (min === undefined) return kind;
  const low = above === min ? `more than ${min}` : `${min} or more`;
  return max === undefined ? `${kind}, ${low}` : `${kind}, ${low}, at most ${max}`;
}
