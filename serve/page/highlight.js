// Colours for Python, JSON and shell: one expression a language, read from left to right. Other code stays as it is.

import { h } from "./element.js";

const PYTHON_WORDS =
  "and as assert async await break case class continue def del elif else except finally for from global if import in is " +
  "lambda match nonlocal not or pass raise return try while with yield";
const SHELL_WORDS =
  "if then elif else fi for while until do done case esac in function return export local set unset exit";
const words = (text) => `\\b(?:${text.replaceAll(" ", "|")})\\b`;

// The groups are comment, string, number, word, constant, name: their names are the classes of the style.
const PYTHON = new RegExp(
  [
    String.raw`(?<comment>#[^\n]*)`,
    String.raw`(?<string>(?:\b[rRbBuUfF]{1,2})?(?:"""(?:\\[^]|(?!""")[^\\])*(?:"""|$)|'''(?:\\[^]|(?!''')[^\\])*(?:'''|$)` +
      String.raw`|"(?:\\[^]|[^"\\\n])*"?|'(?:\\[^]|[^'\\\n])*'?))`,
    String.raw`(?<number>\b(?:0[xX][\da-fA-F_]+|0[bB][01_]+|\d[\d_]*(?:\.[\d_]*)?(?:[eE][+-]?\d+)?j?)\b)`,
    `(?<constant>${words("True False None self cls")}|@[\\w.]+)`,
    `(?<word>${words(PYTHON_WORDS)})`,
    String.raw`(?<name>(?<=\b(?:def|class)[ \t]+)\w+|\b\w+(?=\())`,
  ].join("|"),
  "g",
);
const JSON_TEXT = new RegExp(
  [
    String.raw`(?<name>"(?:\\[^]|[^"\\\n])*"(?=\s*:))`,
    String.raw`(?<string>"(?:\\[^]|[^"\\\n])*"?)`,
    String.raw`(?<number>-?\b\d+(?:\.\d+)?(?:[eE][+-]?\d+)?\b)`,
    `(?<constant>${words("true false null")})`,
  ].join("|"),
  "g",
);
const SHELL = new RegExp(
  [
    String.raw`(?<comment>(?<![\w$])#[^\n]*)`,
    String.raw`(?<string>"(?:\\[^]|[^"\\])*"?|'[^']*'?)`,
    String.raw`(?<constant>\$\{[^}\n]*\}|\$[\w@#?*!]+|(?<=\s)--?[A-Za-z][\w-]*)`,
    `(?<word>${words(SHELL_WORDS)})`,
    String.raw`(?<name>(?<=^[ \t]*(?:\$ )?|[|;&][ \t]*)[\w./-]+)`,
  ].join("|"),
  "gm",
);
const LANGUAGES = {
  python: PYTHON,
  py: PYTHON,
  python3: PYTHON,
  json: JSON_TEXT,
  jsonl: JSON_TEXT,
  sh: SHELL,
  bash: SHELL,
  shell: SHELL,
  zsh: SHELL,
  console: SHELL,
};
const LONGEST = 50_000; // characters; longer code is shown without colours

/** Nodes of a code: text, and spans of class comment, string, number, word, constant or name. */
export function highlighted(code, language) {
  const pattern = LANGUAGES[(language ?? "").toLowerCase()];
  if (pattern === undefined || code.length > LONGEST) return [document.createTextNode(code)];
  const nodes = [];
  let end = 0;
  for (const match of code.matchAll(pattern)) {
    if (match[0] === "") continue;
    if (match.index > end) nodes.push(document.createTextNode(code.slice(end, match.index)));
    const [kind] = Object.entries(match.groups).find(([, text]) => text !== undefined);
    nodes.push(h("span", { class: kind }, match[0]));
    end = match.index + match[0].length;
  }
  if (end < code.length) nodes.push(document.createTextNode(code.slice(end)));
  return nodes;
}
