// The list of conversations.

import { h, iconButton } from "./element.js";

const DAY = 86_400_000;

/** Shows the conversations whose title or text holds `query`. `act`: {open, rename, remove}, each of a conversation. */
export function showList(list, { conversations, current, query, isRunning, act }) {
  const wanted = query.trim().toLowerCase();
  const found = conversations
    .filter((each) => !wanted || textOf(each).includes(wanted))
    .sort((a, b) => b.updated - a.updated);
  const groups = Map.groupBy(found, ({ updated }) => dayOf(updated));
  const item = (conversation) => {
    const open = h(
      "button",
      {
        type: "button",
        class: "open",
        "aria-current": conversation === current ? "page" : null,
        title: conversation.title,
        on: { click: () => act.open(conversation) },
      },
      isRunning(conversation) ? h("span", { class: "busy", role: "img", "aria-label": "Answering" }) : null,
      h("span", {}, conversation.title || "Untitled"),
    );
    return h(
      "li",
      { "data-id": conversation.id },
      open,
      iconButton("edit", `Rename ${conversation.title}`, () => act.rename(conversation)),
      iconButton("bin", `Delete ${conversation.title}`, () => act.remove(conversation)),
    );
  };
  list.replaceChildren(
    ...[...groups].map(([day, group]) => h("section", {}, h("h2", {}, day), h("ul", {}, group.map(item)))),
    found.length ? "" : h("p", { class: "note" }, wanted ? "Nothing found." : "No conversations yet."),
  );
}

const textOf = ({ title, messages }) => [title, ...messages.map((each) => each.content)].join("\n").toLowerCase();

function dayOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / DAY);
  return days <= 0 ? "Today" : days === 1 ? "Yesterday" : days < 7 ? "This week" : "Earlier";
}
