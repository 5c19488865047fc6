// Markdown inside a line: code, emphasis, links, images. Returns nodes; what is not understood stays the text it is.

import { h } from "./element.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE = /https?:\/\/[^\s<>"'`]+/y;
const ANGLE = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const DELIMITERS = ["***", "___", "**", "__", "~~", "*", "_"];
const DEEPEST = 12;
const WORD = /[\p{L}\p{N}_]/u;

/** Nodes of a text. `depth`: how many emphases and links it lies in; deeper ones than a dozen are left as text. */
export function inline(text, depth = 0, inLink = false) {
  const nodes = [];
  const absent = new Set(); // delimiters without an end from here on: looked for once
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const take = (node, end) => {
    flush();
    nodes.push(...[node].flat());
    return end;
  };
  let at = 0;
  while (at < text.length) {
    const found = special(text, at, { absent, depth, inLink });
    if (found === null) {
      plain += text[at];
      at += 1;
    } else if (typeof found.node === "string") {
      plain += found.node;
      at = found.end;
    } else {
      at = take(found.node, found.end);
    }
  }
  flush();
  return nodes;
}

/** What begins at a place of the text, {node, end}, or null where it is a character as any other. */
function special(text, at, { absent, depth, inLink }) {
  const char = text[at];
  if (char === "\\") {
    if (text[at + 1] === "\n") return { node: h("br"), end: at + 2 };
    return ESCAPABLE.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
  }
  if (char === "\n") return { node: h("br"), end: at + 1 };
  if (char === "`") return code(text, at, absent);
  if (depth >= DEEPEST) return null;
  if (char === "!" && text[at + 1] === "[") return link(text, at + 1, { absent, depth, inLink, image: true });
  if (char === "[") return link(text, at, { absent, depth, inLink, image: false });
  if (char === "<") return address(text, at, ANGLE, 1, inLink);
  if (char === "h" && !WORD.test(text[at - 1] ?? " ")) return address(text, at, BARE, 0, inLink);
  if (char === "*" || char === "_" || char === "~") return emphasis(text, at, { absent, depth, inLink });
  return null;
}

function code(text, at, absent) {
  const ticks = /`+/y;
  ticks.lastIndex = at;
  const [run] = ticks.exec(text);
  const literal = { node: run, end: at + run.length };
  if (absent.has(run)) return literal;
  for (let from = at + run.length; ;) {
    const end = text.indexOf(run, from);
    if (end < 0) break;
    let after = end + run.length;
    while (text[after] === "`") after += 1;
    if (after === end + run.length) {
      const said = text.slice(at + run.length, end).replaceAll("\n", " ");
      const padded = said.length > 2 && said.startsWith(" ") && said.endsWith(" ") && said.trim();
      return { node: h("code", {}, padded ? said.slice(1, -1) : said), end: after };
    }
    from = after;
  }
  absent.add(run);
  return literal;
}

function address(text, at, pattern, group, inLink) {
  pattern.lastIndex = at;
  const match = pattern.exec(text);
  if (match === null || inLink) return null;
  let href = match[group];
  if (pattern === BARE) {
    // A sentence goes on behind an address: its mark, and a bracket that was opened before, are not part of it.
    href = href.replace(/[.,;:!?*_~]+$/, "");
    if (href.endsWith(")") && !href.includes("(")) href = href.slice(0, -1).replace(/[.,;:!?]+$/, "");
  }
  const end = pattern === BARE ? at + href.length : at + match[0].length;
  return { node: anchor(href, [document.createTextNode(href)]), end };
}

/** A link to an address that is safe to follow; else its text, with the address behind it. */
export function anchor(href, children) {
  const url = safeUrl(href, ["http:", "https:", "mailto:"]);
  if (url === null) return [...children, document.createTextNode(` (${href})`)];
  return h("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, children);
}

function safeUrl(href, protocols) {
  try {
    const url = new URL(href, document.baseURI);
    return protocols.includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** An image whose bytes are in the text, or that lies on this server. One from elsewhere would tell that server who
 * reads here, so it is shown as a link. */
function picture(src, alt) {
  const own = safeUrl(src, [location.protocol]);
  const isOwn = own !== null && new URL(own).origin === location.origin;
  if (isOwn || /^data:image\/(png|jpeg|gif|webp|avif|svg\+xml)[;,]/i.test(src)) {
    return h("img", { src: isOwn ? own : src, alt, loading: "lazy" });
  }
  return anchor(src, [document.createTextNode(alt || src)]);
}

/** [text](href "title") or ![alt](src). */
function link(text, at, { absent, depth, inLink, image }) {
  if (absent.has("](")) return null;
  const close = bracketEnd(text, at, "[", "]");
  if (close < 0 || text[close + 1] !== "(") {
    if (text.indexOf("](", at) < 0) absent.add("](");
    return null;
  }
  const end = bracketEnd(text, close + 1, "(", ")");
  if (end < 0) return null;
  const inside = text.slice(close + 2, end).trim();
  const match = /^(?:<([^<>\n]*)>|(\S*))(?:\s+(?:"[^"]*"|'[^']*'))?$/.exec(inside);
  if (match === null) return null;
  const [href, label] = [match[1] ?? match[2], text.slice(at + 1, close)];
  if (image) return { node: picture(href, label), end: end + 1 };
  if (inLink) return null;
  return { node: anchor(href, inline(label, depth + 1, true)), end: end + 1 };
}

// How far an end is looked for: an address is short, unless it is the picture itself.
const LONGEST = { text: 1000, address: 2000, picture: 8_000_000, emphasis: 1500 };

function bracketEnd(text, at, open, close) {
  const kind = open === "[" ? "text" : text.startsWith("data:", at + 1) ? "picture" : "address";
  let level = 0;
  for (let i = at; i < Math.min(text.length, at + LONGEST[kind]); i += 1) {
    if (text[i] === "\\") i += 1;
    else if (text[i] === open) level += 1;
    else if (text[i] === close && (level -= 1) === 0) return i;
    else if (open === "(" && text[i] === "\n") return -1;
  }
  return -1;
}

function emphasis(text, at, { absent, depth, inLink }) {
  const mark = DELIMITERS.find((each) => text.startsWith(each, at));
  if (mark === undefined) return null;
  const inWord = mark[0] === "_" && WORD.test(text[at - 1] ?? " ");
  const after = text[at + mark.length] ?? " ";
  const opens = /\S/.test(after) && after !== mark[0] && !inWord;
  const end = opens && !absent.has(mark) ? closing(text, at + mark.length, mark, absent) : -1;
  if (end < 0) {
    let run = at; // the whole run is text, so that *** is not tried again as ** and *
    while (text[run] === mark[0]) run += 1;
    return { node: text.slice(at, run), end: run };
  }
  const inner = inline(text.slice(at + mark.length, end), depth + 1, inLink);
  const names = { "***": ["em", "strong"], ___: ["em", "strong"], "**": ["strong"], __: ["strong"], "~~": ["del"] };
  const node = (names[mark] ?? ["em"]).reduceRight((children, name) => [h(name, {}, children)], inner);
  return { node, end: end + mark.length };
}

/** Where a mark ends what it began: behind no space, not inside code or what it begins anew, and as long as it was.
 * A mark that ends nowhere from here on becomes `absent`. */
function closing(text, from, mark, absent) {
  const end = Math.min(text.length, from + LONGEST.emphasis);
  let [inner, hasInner] = [0, false];
  for (let at = from; at < end;) {
    if (text[at] === "\\") {
      at += 2;
    } else if (text[at] === "`") {
      at = code(text, at, new Set()).end;
    } else if (text[at] === mark[0]) {
      let after = at;
      while (text[after] === mark[0]) after += 1;
      const isMark = after - at === mark.length;
      const closes = /\S/.test(text[at - 1]) && !(mark[0] === "_" && WORD.test(text[after] ?? " "));
      if (closes && isMark && (inner -= 1) < 0) return at;
      if (closes && inner <= 0 && after - at === 3 && mark.length < 3) return after - mark.length; // **bold and *both***
      if (!closes && isMark && /\S/.test(text[after] ?? " ")) [inner, hasInner] = [inner + 1, true];
      at = after;
    } else {
      at += 1;
    }
  }
  if (!hasInner && end === text.length) absent.add(mark);
  return -1;
}
