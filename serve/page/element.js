// Elements are made here and nowhere else. Text becomes text: no function of the page makes markup of a string.

/**
 * An element. `attributes`: `class`, `on` ({event: listener}), `data-…`, booleans and strings; null leaves one out.
 * Children are elements, strings, or null.
 */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    } else if (value === true) {
      element.setAttribute(key, "");
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(key, value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = {
  menu: "M4 7h16M4 12h16M4 17h16",
  plus: "M12 5v14M5 12h14",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h10v11H9zM5 15V4h10",
  done: "M5 12l5 5 9-10",
  edit: "M4 20h4L19 9l-4-4L4 16zM13.5 6.5l4 4",
  again: "M20 12a8 8 0 1 1-2.3-5.7L20 8.5M20 4v4.5h-4.5",
  bin: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  close: "M6 6l12 12M18 6L6 18",
  sliders: "M4 7h9M19 7h1M16 4.5v5M4 17h3M13 17h7M10 14.5v5",
  light:
    "M12 8a4 4 0 1 0 .01 0zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.300 5.300l1.400 1.400M17.300 17.300l1.400 1.400M5.300 18.700l1.400-1.400M17.300 6.700l1.400-1.400",
  dark: "M20 14.5A8 8 0 0 1 9.5 4 8 8 0 1 0 20 14.5z",
  auto: "M12 4a8 8 0 1 0 .01 0zM12 4v16M12 8h6M12 12h8M12 16h6",
  tool: "M14.5 6.5a4 4 0 0 1 5-1L17 8l.5 1.5L19 10l2.5-2.5a4 4 0 0 1-5.5 5L8 20.5 3.5 16l8-8a4 4 0 0 1 3-1.5z",
  out: "M12 15V4M7 9l5-5 5 5M5 15v5h14v-5",
  in: "M12 4v11M7 10l5 5 5-5M5 15v5h14v-5",
  key: "M8 9a4 4 0 1 0 .01 0zM11 10.5L20 5M16.5 7l2 3.2",
};

/** A drawing in the colour of the text around it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

/** A button that shows an icon and is called by its label. */
export function iconButton(shape, label, listener, attributes = {}) {
  const told = { type: "button", class: "quiet", "aria-label": label, title: label, on: { click: listener } };
  return h("button", { ...told, ...attributes }, icon(shape));
}

/** A button that shows what it does. */
export function plainButton(text, listener, attributes = {}) {
  return h("button", { type: "button", class: "plain", on: { click: listener }, ...attributes }, text);
}

/** Puts a text on the clipboard; false where the browser does not let it (pages of other hosts without TLS). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "out-of-sight", "aria-hidden": "true", tabindex: "-1" });
    area.value = text;
    document.body.append(area);
    const before = document.activeElement;
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus?.();
    return copied;
  }
}

/** A button that copies what `text()` returns, and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    button.replaceChildren(icon(copied ? "done" : "close"));
    button.setAttribute("aria-label", copied ? "Copied" : "The browser does not let this page copy");
    button.title = button.getAttribute("aria-label");
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", label);
      button.title = label;
    }, 1500);
  });
  return button;
}
