"""Texts for the chat page: markdown with the elements that it becomes, attacks, what is made to be slow to read.

SHOW and LAWFUL are functions of the browser: of texts, the elements they become, and what is wrong with those.
"""

MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ `f * g` _h_ i_j_k": (
        "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f * g</code> <em>h</em> "
        "i_j_k</p>"
    ),
    "2 * 3 * 4, **open, *a **b** c*, **x *y***": (
        "<p>2 * 3 * 4, **open, <em>a <strong>b</strong> c</em>, <strong>x <em>y</em></strong></p>"
    ),
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n### B ##\n#no\n####### no": '<h3 class="h1">A</h3><h5 class="h3">B</h5><p>#no<br>####### no</p>',
    "- a\n- b\n  - c\n\n    more\n- d": (
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>more</p></li></ul></li><li><p>d</p></li></ul>"
    ),
    "3. a\n4. b\n   ```\n   c\n   ```": (
        '<ol start="3"><li>a</li><li>b<div class="code"><pre tabindex="0" aria-label="Code, text"><code>c</code></pre>'
        "</div></li></ol>"
    ),
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- [x] a\n- [ ] b": (
        '<ul><li class="task"><input type="checkbox" disabled="" checked="">a</li>'
        '<li class="task"><input type="checkbox" disabled="">b</li></ul>'
    ),
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "in\n1984. A year\n---\n* * *": "<p>in<br>1984. A year</p><hr><hr>",
    "x\n| a | b |\n|:-:|--:|\n| `1|2` | 3 \\| 4 |\n| 5 |": (
        '<p>x</p><div class="scroll" tabindex="0" role="group" aria-label="Table"><table><thead><tr>'
        '<th class="middle">a</th><th class="right">b</th></tr></thead><tbody><tr><td class="middle"><code>1|2</code>'
        '</td><td class="right">3 | 4</td></tr><tr><td class="middle">5</td><td class="right"></td></tr></tbody>'
        "</table></div>"
    ),
    "[a *b*](https://x.org/p_(q) \"t\") <https://y.org> https://z.org/a_b_c.": (
        '<p><a href="https://x.org/p_(q)">a <em>b</em></a> <a href="https://y.org/">https://y.org</a> '
        '<a href="https://z.org/a_b_c">https://z.org/a_b_c</a>.</p>'
    ),
    "\\*a\\* ``b ` c`` [d] (e) [f](": "<p>*a* <code>b ` c</code> [d] (e) [f](</p>",
    "```json\n{\"a\": [1, true]}\n": (
        '<div class="code"><pre tabindex="0" aria-label="Code, json"><code>{<span class="name">"a"</span>: '
        '[<span class="number">1</span>, <span class="constant">true</span>]}\n</code></pre></div>'
    ),
    "![i](data:image/png;base64,AAAA) ![j](/k.png) ![l](https://x.org/m.png)": (
        '<p><img src="data:image/png;base64,AAAA" alt="i" loading="lazy"> '
        '<img src="ORIGIN/k.png" alt="j" loading="lazy"> <a href="https://x.org/m.png">l</a></p>'
    ),
}  # fmt: skip
ATTACKS = (
    "<script>window.pwned = 1</script>",
    "<img src=x onerror=window.pwned=1>",
    "<svg/onload=window.pwned=1>",
    "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe>",
    "[a](javascript:window.pwned=1)",
    "[a](JaVaScRiPt:window.pwned=1)",
    "[a](java\tscript:window.pwned=1)",
    "[a](&#106;avascript:window.pwned=1)",
    "[a](\x01javascript:window.pwned=1)",
    "[a](<javascript:window.pwned=1>)",
    "[a](data:text/html,<script>window.pwned=1</script>)",
    "[a](vbscript:x) [b](file:///etc/passwd) [c](blob:x)",
    "![a](javascript:window.pwned=1)",
    "![a\" onerror=\"window.pwned=1](x)",
    "![a](data:text/html,<script>window.pwned=1</script>)",
    "<javascript:window.pwned=1>",
    "`<img src=x onerror=window.pwned=1>`",
    "```<img src=x onerror=window.pwned=1>\n<script>window.pwned=1</script>\n```",
    "| <img src=x onerror=window.pwned=1> |\n|--|\n| <b onclick=window.pwned=1>x</b> |",
    "# <a href=javascript:window.pwned=1>x</a>",
    "> - **<style>*{display:none}</style>**",
    "[<img src=x onerror=window.pwned=1>](https://x.org/\" onmouseover=\"window.pwned=1)",
)  # fmt: skip
_MANY = 3000
SLOW = [
    unit * _MANY
    for unit in (
        *("[", "![", "[a](", "*a ", "**a *b ", "_a", "`", "`a``", "~", ">", "- ", "1. ", "# ", "|", "\\", "<https://"),
        *("| a |\n", "```\n", "a\n> "),
    )
]
SLOW += [" " * _MANY + "x", "-" + " " * _MANY + ":", "```python\n" + '"""' * _MANY]

SHOW = """(async (texts) => {
  const { showMarkdown } = await import("/page/markdown.js");
  return texts.map((text) => {
    const element = document.createElement("div");
    showMarkdown(element, text);
    for (const bar of element.querySelectorAll(".bar")) bar.remove();
    return element.innerHTML.replaceAll(' target="_blank" rel="noopener noreferrer"', "");
  });
})"""
LAWFUL = """(texts) => import("/page/markdown.js").then(({ showMarkdown }) => texts.map((text) => {
  const element = document.createElement("div");
  document.body.append(element);
  showMarkdown(element, text);
  const blocks = "div p h3 pre ul ol li blockquote table thead tbody tr th td button svg path";
  const names = new Set(`${blocks} span em strong del code a img br`.split(" "));
  const faults = [...element.querySelectorAll("*")].flatMap((each) => [
    ...(names.has(each.localName) ? [] : [each.localName]),
    ...[...each.attributes].filter(({ name }) => /^(on|style|srcdoc)/.test(name)).map(({ name }) => name),
    ...(each.href && !/^https?:/.test(each.href) ? [each.href] : []),
    ...(each.src && !each.src.startsWith(location.origin) ? [each.src] : []),
  ]);
  for (const link of element.querySelectorAll("a")) if (!/^https?:/.test(link.href)) faults.push(link.href);
  const shown = element.textContent;
  element.remove();
  return [faults, shown];
}))"""
