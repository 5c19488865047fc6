// Questions that wait for an answer, and a notice that stays until it is closed.

import { h, iconButton, plainButton } from "./element.js";

/** Opens a dialog over the page; resolves to what `read(form)` returns on its button, to null when it is left. */
function opened({ title, text, fields, action, isDanger = false, read }) {
  const heading = h("h2", { id: "dialog-title" }, title);
  const cancel = plainButton("Cancel", () => dialog.close());
  const confirm = h("button", { type: "submit", class: isDanger ? "danger" : "main" }, action);
  const form = h(
    "form",
    { method: "dialog" },
    heading,
    text && h("p", {}, text),
    fields,
    h("div", { class: "row" }, cancel, confirm),
  );
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" }, form);
  return new Promise((resolve) => {
    let answer = null;
    form.addEventListener("submit", () => {
      answer = read(form);
    });
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(answer);
    });
    document.body.append(dialog);
    dialog.showModal();
    if (!fields) confirm.focus();
  });
}

/** Whether a person confirms. */
export async function confirmed({ title, text, action }) {
  return (await opened({ title, text, action, isDanger: true, read: () => true })) ?? false;
}

/** A line of text, or null. */
export function asked({ title, text, label, value = "", type = "text", action }) {
  const input = h("input", { type, value, required: true, autocomplete: "off", spellcheck: "false" });
  return opened({ title, text, fields: h("label", {}, label, input), action, read: () => input.value.trim() || null });
}

/** Shows a notice above the conversation until it is closed or cleared; one of a name stands only once. */
export function notify(name, text, button = null) {
  const shown = document.querySelector(`#notices [data-name="${name}"]`);
  if (shown?.firstChild.textContent === text) return; // heard once
  clearNotice(name);
  const close = iconButton("close", "Close this notice", () => clearNotice(name));
  const notice = h("div", { class: "notice", role: "alert", "data-name": name }, h("p", {}, text), button, close);
  document.querySelector("#notices").append(notice);
}

export function clearNotice(name) {
  document.querySelector(`#notices [data-name="${name}"]`)?.remove();
}

/** Says something to those who hear the page. */
export function announce(text) {
  document.querySelector("#status").textContent = text;
}
