// Markdown as models write it, to elements: headings, paragraphs, lists, tables, quotes, code, rules.
// HTML in it is text like any other. What is written while an answer grows is kept, block by block.

import { copyButton, h } from "./element.js";
import { highlighted } from "./highlight.js";
import { inline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]|$)/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const DELIMITER_ROW = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const LONGEST_RULE = 1000; // characters of a table's second row
const DEEPEST = 12;

/** Shows a text in an element. Called again with more text, it makes anew only the blocks that have changed. */
export function showMarkdown(element, text) {
  const wanted = blocks(text.replaceAll("\r\n", "\n").replaceAll("\0", "�").split("\n"));
  const shown = element.shownBlocks ?? [];
  let same = 0;
  while (same < shown.length && same < wanted.length && shown[same] === keyOf(wanted[same])) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...wanted.slice(same).map((block) => rendered(block, 0)));
  element.shownBlocks = wanted.map(keyOf);
}

const keyOf = (block) => `${block.kind}\n${block.lines.join("\n")}`;

/** The blocks of lines: {kind, lines}, where lines are as they were written. */
function blocks(lines) {
  const found = [];
  for (let at = 0; at < lines.length;) {
    const kind = kindOf(lines, at);
    const end = ENDS[kind](lines, at);
    if (kind !== "empty") found.push({ kind, lines: lines.slice(at, end) });
    at = end;
  }
  return found;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (!line.trim()) return "empty";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  if (isTable(lines, at)) return "table";
  return "paragraph";
}

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1] ?? ""];
  if (!head.includes("|") || rule.length > LONGEST_RULE || !DELIMITER_ROW.test(rule)) return false;
  return cells(head).length === cells(rule).length;
}

/** A line that goes on with the paragraph before it. */
function continues(lines, at) {
  const kind = kindOf(lines, at);
  if (kind === "list") {
    const [, , marker, space] = ITEM.exec(lines[at]);
    return space === "" || (/^\d/.test(marker) && !/^1[.)]/.test(marker)); // "in\n1984. A year" is a sentence
  }
  return kind === "paragraph";
}

const ENDS = {
  empty: (lines, at) => at + 1,
  heading: (lines, at) => at + 1,
  rule: (lines, at) => at + 1,
  fence(lines, at) {
    const [, , fence] = FENCE.exec(lines[at]);
    const closes = new RegExp(`^ {0,3}${fence[0] === "~" ? "~" : "`"}{${fence.length},}[ \\t]*$`);
    for (let end = at + 1; end < lines.length; end += 1) if (closes.test(lines[end])) return end + 1;
    return lines.length;
  },
  paragraph(lines, at) {
    let end = at + 1;
    while (end < lines.length && continues(lines, end)) end += 1;
    return end;
  },
  quote(lines, at) {
    let end = at + 1;
    while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end - 1].trim() !== ">" && continues(lines, end)))) {
      end += 1;
    }
    return end;
  },
  table(lines, at) {
    let end = at + 2;
    while (end < lines.length && lines[end].trim() && (lines[end].includes("|") || continues(lines, end))) end += 1;
    return end;
  },
  list(lines, at) {
    const first = ITEM.exec(lines[at]);
    const family = familyOf(first[2]);
    let [end, inside] = [at + 1, insideOf(first)];
    for (let next = end; next < lines.length; next += 1) {
      const [line, item] = [lines[next], ITEM.exec(lines[next])];
      if (!line.trim()) continue;
      const isMore = item !== null && !RULE.test(line) && familyOf(item[2]) === family;
      const isInside = widthOf(line) >= inside;
      const isLazy = next === end && continues(lines, next);
      if (!isMore && !isInside && !isLazy) break;
      if (isMore && !isInside) inside = insideOf(item);
      end = next + 1;
    }
    return end;
  },
};

const familyOf = (marker) => (/^\d/.test(marker) ? `1${marker.at(-1)}` : marker);
/** From which column on a line belongs to an item: that of its text, or two behind its mark, as many write it. */
const insideOf = ([, lead, marker]) => lead.length + Math.min(2, marker.length + 1);
const widthOf = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;

function rendered(block, depth) {
  const { kind, lines } = block;
  if (depth > DEEPEST) return h("p", {}, lines.join("\n"));
  return ELEMENTS[kind](lines, depth);
}

const children = (lines, depth) => blocks(lines).map((block) => rendered(block, depth + 1));

const ELEMENTS = {
  rule: () => h("hr"),
  paragraph: (lines) => h("p", {}, inline(lines.map((line) => line.trim()).join("\n"))),
  heading(lines) {
    const [whole, marks] = HEADING.exec(lines[0]);
    const text = lines[0]
      .slice(whole.length)
      .trim()
      .replace(/(^|[ \t])#+$/, "");
    // The page's own headings are above: an answer's begin at the third level.
    return h(`h${Math.min(6, marks.length + 2)}`, { class: `h${marks.length}` }, inline(text.trim()));
  },
  quote: (lines, depth) =>
    h(
      "blockquote",
      {},
      children(
        lines.map((line) => line.replace(QUOTE, "")),
        depth,
      ),
    ),
  fence(lines) {
    const [, indent, fence, info] = FENCE.exec(lines[0]);
    const isClosed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
    const own = new RegExp(`^ {0,${indent.length}}`);
    const code = lines.slice(1, isClosed ? -1 : undefined).map((line) => line.replace(own, ""));
    return codeBlock(code.join("\n"), info.trim().split(/\s+/)[0]);
  },
  table(lines) {
    const sides = cells(lines[1]).map((cell) => {
      if (!cell.endsWith(":")) return null;
      return cell.startsWith(":") ? "middle" : "right";
    });
    const row = (line, name) => {
      const texts = cells(line);
      return h(
        "tr",
        {},
        sides.map((side, at) => h(name, { class: side }, inline(texts[at] ?? ""))),
      );
    };
    const body = lines.slice(2).map((line) => row(line, "td"));
    const table = h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, body));
    return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, table);
  },
  list(lines, depth) {
    const found = items(lines);
    const start = /^\d/.test(found[0].marker) ? Number.parseInt(found[0].marker, 10) : null;
    // Where empty lines part the items, each holds paragraphs; else its text stands beside its mark.
    const isLoose = found.some(({ lines: own }, at) => {
      const before = at < found.length - 1 ? own : own.slice(0, -1);
      return before.some((line) => !line.trim());
    });
    const parts = found.map(({ lines: own }) => {
      const task = /^\[([ xX])\][ \t]+/.exec(own[0]);
      const rest = task ? [own[0].slice(task[0].length), ...own.slice(1)] : own;
      const inside = children(rest, depth).flatMap((child) =>
        !isLoose && child.tagName === "P" ? [...child.childNodes] : [child],
      );
      const box = task && h("input", { type: "checkbox", disabled: true, checked: task[1] !== " " });
      return h("li", { class: task ? "task" : null }, box, inside);
    });
    return start === null ? h("ul", {}, parts) : h("ol", { start: start === 1 ? null : String(start) }, parts);
  },
};

/** The items of a list: {marker, lines}, lines without the indentation of the item. */
function items(lines) {
  const found = [];
  let [indent, inside] = [0, Infinity];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match !== null && widthOf(line) < inside) {
      const space = match[3].length > 4 ? 1 : match[3].length || 1;
      indent = match[1].length + match[2].length + space;
      inside = insideOf(match);
      found.push({ marker: match[2], lines: [line.slice(indent)] });
    } else {
      const own = Math.min(widthOf(line), indent);
      found.at(-1).lines.push(line.replace(/^[ \t]*/, (lead) => lead.replaceAll("\t", "    ")).slice(own));
    }
  }
  return found;
}

/** The cells of a row of a table; \| is a bar inside one, as is a bar in code. */
function cells(line) {
  const found = [""];
  let inCode = false;
  const text = line
    .trim()
    .replace(/^\|/, "")
    .replace(/(?<!\\)\|$/, "");
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "`") inCode = !inCode && text.indexOf("`", at + 1) > 0;
    if (text[at] === "\\" && text[at + 1] === "|") {
      found[found.length - 1] += "|";
      at += 1;
    } else if (text[at] === "|" && !inCode) {
      found.push("");
    } else {
      found[found.length - 1] += text[at];
    }
  }
  return found.map((cell) => cell.trim());
}

/** Code with its language and a button that copies it. */
export function codeBlock(code, language, label = language || "text") {
  const pre = h("pre", { tabindex: "0", "aria-label": `Code, ${label}` }, h("code", {}, highlighted(code, language)));
  const bar = h(
    "div",
    { class: "bar" },
    h("span", {}, label),
    copyButton(() => code, "Copy code"),
  );
  return h("div", { class: "code" }, bar, pre);
}
