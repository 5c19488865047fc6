"""Bars and sliders of `internjax.report`: plain HTML in the page's colours, and for sliders a few lines of script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from internjax.chart import escape


class Bar(NamedTuple):
    """`part` lies over `whole` (equal where there is but one number); said: both in words."""

    label: str
    whole: float
    part: float
    said: str


@dataclass(frozen=True)
class Bars:
    """Lengths side by side, on one scale. whole, part: what the two shades are; one name alone where part is whole."""

    title: str
    bars: Sequence[Bar]
    whole: str
    part: str = ""
    caption: str = ""

    def __post_init__(self):
        if not self.bars:
            raise ValueError(f"bars {self.title!r} has no bar; leave it out where nothing was counted")
        wrong = [bar for bar in self.bars if not (bar.whole >= 0 and bar.part >= 0)]
        if wrong:
            raise ValueError(f"bars {self.title!r} holds {wrong[0]}; give lengths of 0 or more")


class Stop(NamedTuple):
    """A place of a slider: its value, and the share (0 to 1) and the words to show there."""

    value: float
    share: float
    said: str


@dataclass(frozen=True)
class Slider:
    """A value to move, and what would follow. stops: by value, ascending; now: which of them is in use."""

    label: str
    stops: Sequence[Stop]
    now: int
    caption: str = ""

    def __post_init__(self):
        values = [stop.value for stop in self.stops]
        if values != sorted(set(values)) or not 0 <= self.now < len(values):
            raise ValueError(
                f"slider {self.label!r} has stops at {values} and stands at number {self.now}; give ascending values "
                "and the number of one of them"
            )


def bars_html(block: Bars) -> str:
    """The bars as an HTML figure."""
    most = max(max(bar.whole, bar.part) for bar in block.bars) or 1
    rows = "".join(
        f'<div class="bar"><span class="name" dir="auto">{escape(bar.label)}</span><span class="track">'
        f'<i class="whole" style="width:{100 * bar.whole / most:.2f}%"></i>'
        f'<i class="part" style="width:{100 * bar.part / most:.2f}%"></i></span>'
        f'<span class="said">{escape(bar.said)}</span></div>'
        for bar in block.bars
    )
    shades = [("part", block.part), ("whole", block.whole)] if block.part else [("part", block.whole)]
    legend = "".join(f'<span><i class="{shade}"></i>{escape(name)}</span>' for shade, name in shades)
    caption = f" <span>{escape(block.caption)}</span>" if block.caption else ""
    title = f"<figcaption>{escape(block.title)}{caption}</figcaption>"
    return (
        f'<figure class="chart bars">{title}<div class="legend">{legend}</div><div class="rows">{rows}</div></figure>'
    )


def slider_html(block: Slider) -> str:
    """The slider as HTML; without a script it shows what is in use."""
    stop = block.stops[block.now]
    data = escape(json.dumps([[format_number(stop.value), round(stop.share, 5), stop.said] for stop in block.stops]))
    label = escape(block.label)
    caption = f'<p class="caption">{escape(block.caption)}</p>' if block.caption else ""
    return (
        f'<figure class="chart slider" data-stops="{data}" data-now="{block.now}"><figcaption>{label} '
        f"<output>{escape(format_number(stop.value))}</output></figcaption>"
        f'<input type="range" min="0" max="{len(block.stops) - 1}" value="{block.now}" aria-label="{label}">'
        f'<div class="track"><i class="whole" style="width:{100 * stop.share:.2f}%"></i>'
        f'<i class="part" style="width:{100 * stop.share:.2f}%"></i></div>'
        f'<p class="said">{escape(stop.said)}</p><button type="button" hidden>back to what is in use</button>'
        f"{caption}</figure>"
    )


def format_number(value: float) -> str:
    """A threshold as short as it can be told from its neighbours."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


SCRIPT = """
for (const box of document.querySelectorAll(".slider")) {
  const stops = JSON.parse(box.dataset.stops), now = Number(box.dataset.now);
  const input = box.querySelector("input"), back = box.querySelector("button");
  const show = () => {
    const [value, share, said] = stops[input.valueAsNumber];
    box.querySelector("output").textContent = value;
    box.querySelector(".track .part").style.width = 100 * share + "%";
    box.querySelector(".said").textContent = said;
    input.setAttribute("aria-valuetext", value + ": " + said);
    back.hidden = input.valueAsNumber === now;
  };
  input.addEventListener("input", show);
  back.addEventListener("click", () => { input.value = now; show(); });
  input.value = now;
  show();
}
"""

STYLE = """
.bars{align-self:start}.bars .legend i{height:.7rem;border-radius:.15rem}.bars .rows{display:grid;gap:.25rem .6rem;
grid-template-columns:minmax(4rem,max-content) minmax(4rem,1fr) auto}.bar{display:grid;grid-column:1/-1;
grid-template-columns:subgrid;align-items:center;font-size:.85rem}.bar .name{overflow-wrap:anywhere;max-width:14rem}
.bar .said,.slider .said{color:var(--soft);font-variant-numeric:tabular-nums}.bar .said{text-align:right}.track{
position:relative;display:block;height:.85rem;background:var(--code);border-radius:.2rem;overflow:hidden}.track i{
position:absolute;inset:0 auto 0 0;border-radius:.2rem}i.whole{background:var(--shade)}i.part{background:var(--c0)}
.slider figcaption output{font-variant-numeric:tabular-nums;font-weight:400;color:var(--c0);margin-left:.5rem}
.slider input{width:100%;margin:.35rem 0;accent-color:var(--c0)}.slider .said{font-size:.85rem;margin:.4rem 0 .2rem}
.slider .caption{font-size:.8rem;margin:.2rem 0 0}.slider button{font:inherit;font-size:.8rem;color:var(--c0);
background:none;border:1px solid var(--line);border-radius:.3rem;padding:.05rem .5rem;cursor:pointer}
@media (max-width:34rem){.bars .rows{grid-template-columns:1fr auto}.bar .track{grid-column:1/-1;grid-row:2}}
""".replace("\n", "")
