// How a conversation is answered: what the model is told first, sampling, and tools. An empty field is the server's own
// value and is not sent.

import { h, plainButton } from "./element.js";

const NUMBERS = [
  // Checked as the server checks them; `above` is a bound that is not allowed itself.
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, about: "0 is greedy" },
  {
    name: "top_p",
    label: "Top-p",
    min: 0,
    max: 1,
    step: 0.05,
    above: 0,
    about: "the most likely tokens with this probability together",
  },
  { name: "top_k", label: "Top-k", min: 0, step: 1, about: "the k most likely tokens; 0: all" },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, about: "of one answer; else what the context holds" },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    min: 0,
    max: 10,
    step: 0.05,
    above: 0,
    about: "1 is none",
  },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, about: "0 is none" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, about: "0 is none" },
  { name: "seed", label: "Seed", step: 1, about: "the same answer again; else a new one each time" },
];

/** What of the settings goes into a request. */
export function asFields(settings) {
  const numbers = NUMBERS.filter(({ name }) => Number.isFinite(settings[name])).map(({ name }) => [
    name,
    settings[name],
  ]);
  const stop = settings.stop?.length ? { stop: settings.stop } : {};
  const tools = settings.tools ? { tools: readTools(settings.tools) } : {};
  return { ...Object.fromEntries(numbers), ...stop, ...tools };
}

/** The settings of a value that was read: those that a request may hold. */
export function checkedSettings(value) {
  const numbers = NUMBERS.filter(
    (each) => Number.isFinite(value?.[each.name]) && faultOf(each, value[each.name]) === null,
  );
  const settings = Object.fromEntries(numbers.map(({ name }) => [name, value[name]]));
  if (typeof value?.system === "string" && value.system) settings.system = value.system;
  if (Array.isArray(value?.stop)) settings.stop = value.stop.filter((each) => typeof each === "string" && each);
  try {
    if (readTools(value.tools)) settings.tools = value.tools;
  } catch {
    // no tools, or none that can be read
  }
  return settings;
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
    plainButton("Reset", reset),
    plainButton("Use for new chats", useForNew, { title: "New chats begin with these settings" }),
  );
  panel.replaceChildren(
    system,
    h(
      "div",
      { class: "numbers" },
      NUMBERS.map((each) => numberField(each, settings, set)),
    ),
    stop,
    tools,
    buttons,
  );
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
      say(`${error.message}. Not used.`);
    }
  });
  return element;
}

function numberField(kind, settings, set) {
  const { name, label, min, max, step, about } = kind;
  const placeholder = "default";
  const input = h("input", {
    type: "number",
    name,
    min,
    max,
    step: "any",
    inputmode: step === 1 ? "numeric" : "decimal",
    placeholder,
  });
  input.step = String(step);
  if (Number.isFinite(settings[name])) input.value = String(settings[name]);
  const { element, say } = field(label, input, about);
  input.addEventListener("input", () => {
    const [value, isEmpty] = [input.valueAsNumber, input.value === "" && !input.validity.badInput];
    if (isEmpty) return (say(null), set(name, null));
    const fault = faultOf(kind, value);
    say(fault);
    return fault === null ? set(name, value) : null;
  });
  return element;
}

/** What is wrong with a number, or null. */
function faultOf({ min = -Infinity, max = Infinity, step, above }, value) {
  const isRight = step === 1 ? Number.isSafeInteger(value) : Number.isFinite(value);
  if (isRight && value >= min && value <= max && value !== above) return null;
  const words = [step === 1 ? "a whole number" : "a number"];
  if (min !== -Infinity) words.push(above === min ? `more than ${min}` : `from ${min} on`);
  if (max !== Infinity) words.push(above === min ? `at most ${max}` : `to ${max}`);
  return `Wanted: ${words.join(", ")}. Not used.`.replace("on, to", "to");
}
