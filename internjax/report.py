"""Reports: one description, two forms: a self-contained HTML page and its Markdown twin.

    bits = Number("Bits per byte", 1.79, baseline="bigram 1.92", verdict="better", outcome="good")
    sections = [Section("Result", [Numbers([bits])])]
    write(folder, "Tiny run", sections)  # report.html and report.md

The page needs nothing but itself (inline style and SVG; no script, but a few lines where it has sliders), follows the
reader's light or dark setting, and folds on narrow screens. All text is escaped; figures are drawn here, so that their
colours follow the page.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from internjax.chart import Lines, escape, printable, svg
from internjax.figures import SCRIPT, STYLE, Bars, Slider, bars_html, format_number, slider_html

Outcome = Literal["good", "bad", "neutral"]
_VERDICT = {"good": "✓", "bad": "✗", "neutral": "•"}


@dataclass(frozen=True)
class Number:
    """A key number with what it is measured against. `verdict` says in words what `outcome` shows in colour."""

    label: str
    value: Any
    baseline: str = ""
    verdict: str = ""
    outcome: Outcome = "neutral"

    def __post_init__(self):
        if self.outcome not in get_args(Outcome):
            raise ValueError(f"outcome is {self.outcome!r}; give one of {list(get_args(Outcome))}")


@dataclass(frozen=True)
class Numbers:
    """Key numbers as tiles."""

    numbers: Sequence[Number]


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines. `Backticks` set code."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command or listing to copy."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of values; numbers stand to the right. Floats are shown with four significant digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def __post_init__(self):
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {index} has {len(row)} cells; the table has {len(self.columns)} columns")


@dataclass(frozen=True)
class Sample:
    """A text as a model wrote it."""

    label: str
    text: str


@dataclass(frozen=True)
class Samples:
    """Texts side by side (one prompt through several models, say)."""

    samples: Sequence[Sample]
    caption: str = ""


Block = Numbers | Text | Code | Table | Samples | Lines | Bars | Slider


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def write(
    folder: str | os.PathLike, title: str, sections: Sequence[Section], *, subtitle: str = "", name: str = "report"
) -> None:
    """Writes NAME.html and NAME.md into `folder`, each by an atomic rename."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    forms = {f"{name}.html": page, f"{name}.md": markdown}
    for file, form in forms.items():
        temporary = folder / f"{file}.part"
        temporary.write_text(form(title, sections, subtitle=subtitle), encoding="utf-8")
        os.replace(temporary, folder / file)


def page(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The report as one HTML document."""
    names = _anchors(sections)
    links = "".join(f'<a href="#{name}">{escape(part.title)}</a>' for name, part in zip(names, sections))
    contents = f"<nav>{links}</nav>" if len(sections) > 2 else ""
    body = "".join(
        f'<section id="{name}"><h2>{escape(part.title)}</h2>{_blocks_html(part.blocks)}</section>'
        for name, part in zip(names, sections)
    )
    lead = f'<p class="lead">{_inline_html(subtitle)}</p>' if subtitle else ""
    has_sliders = any(isinstance(block, Slider) for part in sections for block in part.blocks)
    script = f"<script>{SCRIPT}</script>" if has_sliders else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}{STYLE}</style></head>"
        f"<body><header><h1>{escape(title)}</h1>{lead}{contents}</header><main>{body}</main>{script}</body></html>\n"
    )


def markdown(title: str, sections: Sequence[Section], *, subtitle: str = "") -> str:
    """The report as Markdown, with the same content: charts become tables with a line of bars."""
    parts = [f"# {_plain(title)}"]
    if subtitle:
        parts.append(_paragraph(subtitle))
    for part in sections:
        parts.append(f"## {_plain(part.title)}")
        parts += [_block_markdown(block) for block in part.blocks]
    return "\n\n".join(parts) + "\n"


def format_value(value: Any) -> str:
    """A cell's text: floats with four significant digits, large integers with thousands separators, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return format_value(value.item())  # NumPy's and JAX's scalars
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:,.{digits}f}"
    return f"{value:.3e}"


# ------------------------------------------------------------------------------------------------------------- HTML


def _blocks_html(blocks: Sequence[Block]) -> str:
    """The blocks one below the other, neighbouring figures side by side."""
    parts = []
    for is_chart, group in itertools.groupby(blocks, key=lambda block: isinstance(block, Lines | Bars | Slider)):
        body = "".join(map(_block_html, group))
        parts.append(f'<div class="charts">{body}</div>' if is_chart else body)
    return "".join(parts)


def _block_html(block: Block) -> str:
    match block:
        case Numbers(numbers):
            return f'<div class="tiles">{"".join(map(_tile_html, numbers))}</div>'
        case Text(text):
            return "".join(f"<p>{_inline_html(part)}</p>" for part in _paragraphs(text))
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Table():
            return _table_html(block)
        case Samples(samples, caption):
            labels = [f"<figcaption>{escape(one.label)}</figcaption>" for one in samples]
            texts = [f'<pre dir="auto">{escape(one.text)}</pre>' for one in samples]
            cards = "".join(f"<figure>{label}{text}</figure>" for label, text in zip(labels, texts))
            return f'{_caption_html(caption)}<div class="samples">{cards}</div>'
        case Lines():
            return svg(block)
        case Bars():
            return bars_html(block)
        case Slider():
            return slider_html(block)
    raise ValueError(f"a section holds a {type(block).__name__}; give one of the blocks of internjax.report")


def _tile_html(number: Number) -> str:
    baseline = f'<span class="baseline">{_inline_html(number.baseline)}</span>' if number.baseline else ""
    said = f"{_VERDICT[number.outcome]} {escape(number.verdict)}"
    verdict = f'<span class="verdict">{said}</span>' if number.verdict else ""
    value = f"<strong>{escape(_without_zeros(number.value))}</strong>"
    label = f'<span class="label">{escape(number.label)}</span>'
    return f'<div class="tile {number.outcome}">{label}{value}{baseline}{verdict}</div>'


def _without_zeros(value: Any) -> str:
    """The formatted value without zeros that end its fraction: columns want them, a single number does not."""
    return re.sub(r"^(-?[\d,]+)(?:\.0+|(\.\d*?[1-9])0+)(e[-+]\d+)?$", r"\1\2\3", format_value(value))


MOST_COLUMNS = 8
"""Of a table that is shown as one on a narrow screen too."""


def _table_html(block: Table) -> str:
    numeric = [
        all(_is_number(row[index]) for row in block.rows) and bool(block.rows) for index in range(len(block.columns))
    ]
    kind = ["n" if is_numeric else "t" for is_numeric in numeric]
    head = "".join(f'<th class="{k}">{escape(name)}</th>' for k, name in zip(kind, block.columns))
    # Where a row does not fit beside its neighbours, a narrow screen shows it as a list, a name before every value.
    wide = len(block.columns) > MOST_COLUMNS
    names = [f' data-name="{escape(name)}"' if wide else "" for name in block.columns]
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{k}"{n}>{_inline_html(format_value(x))}</td>' for k, n, x in zip(kind, names, row))
        + "</tr>"
        for row in block.rows
    )
    start = '<table class="wide">' if wide else "<table>"
    table = f"{start}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{_caption_html(block.caption)}<div class="scroll">{table}</div>'


def _caption_html(caption: str) -> str:
    return f'<p class="caption">{_inline_html(caption)}</p>' if caption else ""


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool)) or hasattr(value, "dtype")


def _inline_html(text: str) -> str:
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", escape(text))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _anchors(sections: Sequence[Section]) -> list[str]:
    words = [re.sub(r"[^a-z0-9]+", "-", part.title.lower()).strip("-") for part in sections]
    return [f"s{index}-{word}" for index, word in enumerate(words)]


# --------------------------------------------------------------------------------------------------------- Markdown


def _block_markdown(block: Block) -> str:
    match block:
        case Numbers(numbers):
            rows = [
                (one.label, _without_zeros(one.value), one.baseline, f"{_VERDICT[one.outcome]} {one.verdict}".strip())
                for one in numbers
            ]
            return _table_markdown(Table(("number", "value", "baseline", "verdict"), rows))
        case Text(text):
            return "\n\n".join(map(_paragraph, _paragraphs(text)))
        case Code(text):
            return _fenced(text)
        case Table():
            return _table_markdown(block)
        case Samples(samples, caption):
            parts = [_paragraph(caption)] if caption else []
            for one in samples:
                parts += [f"**{_plain(one.label)}**", _fenced(one.text, "text")]
            return "\n\n".join(parts)
        case Lines():
            return _table_markdown(_chart_table(block))
        case Bars(title, bars, whole, part, caption):
            columns = ("", part, whole, "in words") if part else ("", whole, "in words")
            rows = [(bar.label, *((bar.part, bar.whole) if part else (bar.whole,)), bar.said) for bar in bars]
            return _table_markdown(Table(columns, rows, f"{title}. {caption}".strip()))
        case Slider():
            return _table_markdown(_slider_table(block))
    raise ValueError(f"a section holds a {type(block).__name__}; give one of the blocks of internjax.report")


def _chart_table(chart: Lines) -> Table:
    """The chart in numbers."""
    rows = []
    for name, points, bars in chart.summaries():
        y = [value for _, value in points]
        rows.append((name, len(y), y[0], y[-1], min(y), max(y), bars))
    rows += [(name, None, value, value, value, value, "") for name, value in (chart.baselines or {}).items()]
    columns = ("series", "points", "first", "last", "least", "most", "course")
    return Table(columns, rows, caption=f"{chart.title} ({chart.y_label} over {chart.x_label})")


def _slider_table(block: Slider) -> Table:
    """Some stops of a slider, the one in use among them."""
    last = len(block.stops) - 1
    shown = sorted({0, last // 4, last // 2, 3 * last // 4, last, block.now})
    rows = [
        (format_number(stop.value) + (" (in use)" if index == block.now else ""), stop.said)
        for index, stop in enumerate(block.stops)
        if index in shown
    ]
    return Table(("value", "what follows"), rows, f"{block.label}. {block.caption}".strip())


def _table_markdown(block: Table) -> str:
    rows = [[_cell(name) for name in block.columns], ["---"] * len(block.columns)]
    rows += [[_cell(format_value(cell)) for cell in row] for row in block.rows]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{_paragraph(block.caption)}\n\n{table}" if block.caption else table


def _cell(text: str) -> str:
    return _paragraph(text).replace("\\|", "|").replace("|", "\\|")


def _paragraph(text: str) -> str:
    """One line of Markdown: backticked code stays, everything else means only itself."""
    pieces = re.split(r"(`[^`\n]+`)", " ".join(printable(text).split()))
    return "".join(piece if index % 2 else _plain(piece, strip=False) for index, piece in enumerate(pieces))


def _plain(text: Any, *, strip: bool = True) -> str:
    text = printable(text)
    text = " ".join(text.split()) if strip else text
    return re.sub(r"([\\`*_\[\]<>#|~])", r"\\\1", text)


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


_STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1c2126;--soft:#5f6b76;--line:#e1e4e8;--code:#f2f3f5;--good:#1a7f4b;
--bad:#b3261e;--goodbg:#e9f6ef;--badbg:#fcebea;--shade:#c3d3e4;--c0:#0b6bcb;--c1:#cf4a2c;--c2:#1f8a5b;--c3:#9a6b00;--c4:#7a4fbf;
--c5:#5b6770}@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2125;--ink:#e6e9ec;--soft:#9aa6b2;
--line:#30373d;--code:#23292e;--good:#5fd39a;--bad:#ff8a80;--goodbg:#173226;--badbg:#3a1f1e;--shade:#3b4a5a;--c0:#6db3ff;
--c1:#ff9a7a;--c2:#63d39a;--c3:#f0c060;--c4:#bb9cff;--c5:#aab4be}}*{box-sizing:border-box}body{margin:0;
background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"PingFang SC","Microsoft YaHei",sans-serif}header,main{max-width:68rem;margin:0 auto;padding:0 1.25rem}header{
padding-top:2rem}h1{font-size:1.7rem;line-height:1.25;margin:0 0 .4rem}.lead{color:var(--soft);margin:0 0 .9rem}nav{
display:flex;flex-wrap:wrap;gap:.3rem .9rem;font-size:.9rem;padding-bottom:.7rem;
border-bottom:1px solid var(--line)}nav a{color:var(--c0);text-decoration:none}nav a:hover{
text-decoration:underline}section{padding:1.1rem 0 .4rem}h2{font-size:1.2rem;margin:.2rem 0 .7rem}p{margin:.5rem 0;
max-width:46rem}.caption{color:var(--soft);font-size:.92rem;margin:.9rem 0 .35rem}.tiles{display:grid;
grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.7rem;margin:.6rem 0}.tile{background:var(--card);
border:1px solid var(--line);border-left:4px solid var(--soft);border-radius:.5rem;padding:.6rem .8rem;display:flex;
flex-direction:column;gap:.1rem}.tile.good{border-left-color:var(--good)}.tile.bad{border-left-color:var(--bad)}
.tile .label{font-size:.83rem;color:var(--soft)}.tile strong{font-size:1.5rem;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}.tile .baseline{font-size:.83rem;color:var(--soft)}
.tile .verdict{align-self:flex-start;font-size:.8rem;font-weight:600;border-radius:.8rem;padding:.05rem .55rem;
margin-top:.3rem;background:var(--code)}.tile.good .verdict{color:var(--good);background:var(--goodbg)}
.tile.bad .verdict{color:var(--bad);background:var(--badbg)}.scroll{overflow-x:auto;background:var(--card);
border:1px solid var(--line);border-radius:.5rem;margin:.3rem 0 .9rem}table{border-collapse:collapse;width:100%;
font-size:.92rem}td.t{min-width:7rem}th,td{padding:.38rem .8rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line)}tr:last-child td{border-bottom:0}th{font-weight:600;color:var(--soft);
font-size:.85rem;white-space:nowrap}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}code,
pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono",monospace;font-size:.86rem}code{
background:var(--code);border-radius:.25rem;padding:.08rem .3rem}pre code{background:none;padding:0}pre{
background:var(--code);border-radius:.5rem;padding:.7rem .9rem;margin:.4rem 0;overflow:auto;max-height:26rem;
white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}.samples{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(18rem,100%),1fr));gap:.7rem;margin:.3rem 0 .9rem}.samples figure{
margin:0;display:flex;flex-direction:column;background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .7rem}.samples figcaption{font-size:.85rem;font-weight:600;color:var(--soft);
overflow-wrap:anywhere}.samples pre{margin:.35rem 0 0;flex:1}.charts{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(28rem,100%),1fr));
gap:.7rem;margin:.5rem 0 .9rem}.chart{background:var(--card);border:1px solid var(--line);border-radius:.5rem;
padding:.6rem .8rem;margin:0;max-width:46rem}.chart figcaption{font-weight:600;font-size:.95rem}
.chart figcaption span{font-weight:400;color:var(--soft);font-size:.83rem;margin-left:.4rem}.chart .legend{
display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.83rem;color:var(--soft);margin:.1rem 0 .2rem}
.chart .legend i{display:inline-block;width:1.25rem;vertical-align:middle;margin-right:.35rem}.chart svg{
display:block;width:100%;height:auto}.chart text{fill:var(--soft);font-size:14px}.chart .grid{stroke:var(--line);
stroke-width:1}.chart .axis{stroke:var(--soft);stroke-width:1}.chart path{fill:none;stroke-width:2;
stroke-linejoin:round;stroke-linecap:round}@media (min-width:62rem){.tiles{grid-template-columns:repeat(auto-fit,
minmax(14rem,1fr))}}@media (max-width:62rem){.wide thead{
display:none}.wide tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(14rem,1fr));gap:0 1.6rem;
padding:.4rem .8rem;border-bottom:1px solid var(--line)}.wide tr:last-child{border-bottom:0}.wide td{display:flex;
justify-content:space-between;gap:1rem;padding:.12rem 0;border:0}.wide td::before{content:attr(data-name);
color:var(--soft);font-size:.85rem;white-space:nowrap}}@media (max-width:34rem){header,main{padding:0 .9rem}
.chart text{font-size:18px}.tile strong{
font-size:1.3rem}}@media print{pre{max-height:none}.tile,.chart,.scroll,figure{break-inside:avoid}}
""".replace("\n", "")
