"""Line charts as inline SVG, drawn for `internjax.report`: colours are the page's variables, light and dark."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 76, 26, 10, 44
MAX_POINTS = 320  # per series: one per two units of width
NUM_COLOURS = 6
_DASHES = ("", "6 4", "2 3")
_BARS = "▁▂▃▄▅▆▇█"

Point = tuple[float, float]


@dataclass(frozen=True)
class Lines:
    """A line chart. series: name -> (x, y) points, in order of x; points that are not finite leave a gap.

    baselines: name -> y of a dashed horizontal line. log_x, log_y: logarithmic axes, which want positive numbers.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_label: str
    y_label: str
    baselines: Mapping[str, float] | None = None
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self):
        points = [point for name in self.series for point in self.finite(name)]
        if not points:
            raise ValueError(f"chart {self.title!r} has no finite point; leave it out where nothing was measured")
        lowest = (min(x for x, _ in points), min([y for _, y in points] + list((self.baselines or {}).values())))
        for name, is_log, least in (("x", self.log_x, lowest[0]), ("y", self.log_y, lowest[1])):
            if is_log and least <= 0:
                raise ValueError(
                    f"chart {self.title!r} has {name} = {least} on a logarithmic axis; set log_{name}=False"
                )

    def finite(self, name: str) -> list[Point]:
        """The points of a series that can be drawn, as plain floats."""
        return [(float(x), float(y)) for x, y in self.series[name] if math.isfinite(x) and math.isfinite(y)]

    def summaries(self) -> list[tuple[str, list[Point], str]]:
        """Name, points and a line of bars for every series that has points: the chart in words."""
        return [(name, points, bars([y for _, y in points])) for name in self.series if (points := self.finite(name))]


class _Axis(NamedTuple):
    """A scale from values to pixels. ticks: value -> label."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: dict[float, str]

    def pixel(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.stop - self.start)


def svg(chart: Lines) -> str:
    """The chart as an HTML figure with its legend."""
    baselines = {name: float(y) for name, y in (chart.baselines or {}).items()}
    points = [point for name in chart.series for point in chart.finite(name)]
    x_axis = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, chart.log_x, wanted=6, margin=0.0)
    y_values = [y for _, y in points] + list(baselines.values())
    y_axis = _axis(y_values, HEIGHT - BOTTOM, TOP, chart.log_y, wanted=5, margin=0.06)
    parts = _frame(chart, x_axis, y_axis)
    legend = []
    for index, (name, y) in enumerate(baselines.items()):
        at, dash = y_axis.pixel(y), _DASHES[1 + index % 2]
        colour = f"var(--c{NUM_COLOURS - 1 - index % NUM_COLOURS})"
        style = f'style="stroke:{colour};stroke-width:1.5" stroke-dasharray="{dash}"'
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" {style}/>')
        legend.append((colour, dash, f"{name} ({_label(y)})"))
    for index, name in enumerate(chart.series):
        colour, dash = f"var(--c{index % NUM_COLOURS})", _DASHES[index // NUM_COLOURS % len(_DASHES)]
        path = _path(chart.series[name], x_axis, y_axis)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path d="{path}" style="stroke:{colour}"{dashes}><title>{escape(name)}</title></path>')
        legend.insert(index, (colour, dash, name))
    marks = "".join(
        f'<span><i style="border-top:.2rem {"dashed" if dash else "solid"} {colour}"></i>{escape(name)}</span>'
        for colour, dash, name in legend
    )
    label = escape(f"{chart.title}: {chart.y_label} over {chart.x_label}")
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    title = f"<figcaption>{escape(chart.title)} <span>{escape(chart.y_label)}</span></figcaption>"
    return f'<figure class="chart">{title}<div class="legend">{marks}</div>{drawing}</figure>'


def escape(text: object) -> str:
    """HTML of a text, whatever it holds."""
    return html.escape(printable(text))


def printable(text: object) -> str:
    """Text without what no document may hold: control characters and lone surrogates become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(text))


def bars(values: Sequence[float], width: int = 24) -> str:
    """The course of the values as a line of block characters."""
    step = max(1, math.ceil(len(values) / width))
    means = [sum(part) / len(part) for start in range(0, len(values), step) if (part := values[start : start + step])]
    low, high = min(means), max(means)
    return "".join(_BARS[int((value - low) / (high - low) * 7.999) if high > low else 3] for value in means)


def _frame(chart: Lines, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    """Grid, ticks and the label of the x axis (that of the y axis stands in the caption)."""
    bottom = HEIGHT - BOTTOM
    parts = []
    for value, label in y_axis.ticks.items():
        at = y_axis.pixel(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in x_axis.ticks.items():
        at = x_axis.pixel(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x_label)}</text>')
    return parts


def _path(points: Sequence[Point], x_axis: _Axis, y_axis: _Axis) -> str:
    """SVG path of a series: thinned out so that every peak stays, broken where a value is not finite."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    pieces = []
    for run in runs:
        pixels = [f"{x_axis.pixel(x):.1f} {y_axis.pixel(y):.1f}" for x, y in _thin(run)]
        if len(pixels) == 1:
            pixels *= 2  # a lone point is drawn as a dot
        pieces.append("M" + "L".join(pixels) if pixels else "")
    return "".join(pieces)


def _thin(points: list[Point]) -> list[Point]:
    """At most about MAX_POINTS points: of each stretch its first, lowest, highest and last."""
    if len(points) <= MAX_POINTS:
        return points
    step = math.ceil(len(points) / (MAX_POINTS / 4))
    kept: list[Point] = []
    for start in range(0, len(points), step):
        stretch = range(start, min(start + step, len(points)))
        low = min(stretch, key=lambda index: points[index][1])
        high = max(stretch, key=lambda index: points[index][1])
        kept += [points[index] for index in sorted({stretch[0], low, high, stretch[-1]})]
    return kept


def _axis(values: Sequence[float], start: float, stop: float, is_log: bool, *, wanted: int, margin: float) -> _Axis:
    low, high = min(values), max(values)
    if is_log:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        spread = (high / low) ** margin
        low, high = low / spread, high * spread
        return _Axis(low, high, start, stop, True, _log_ticks(low, high, wanted))
    if high == low:
        low, high = low - (abs(low) / 2 or 1), high + (abs(high) / 2 or 1)
    spread = (high - low) * margin
    low, high = low - spread, high + spread
    step = _nice((high - low) / wanted)
    first = math.ceil(low / step - 1e-9)
    ticks = [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]
    digits = len(f"{step:.9f}".rstrip("0").partition(".")[2])
    return _Axis(low, high, start, stop, False, {tick: _label(tick, digits) for tick in ticks})


def _log_ticks(low: float, high: float, wanted: int) -> dict[float, str]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    ticks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high] or [low, high]
    step = math.ceil(len(inside) / (2 * wanted))
    return {tick: _label(tick) for tick in inside[::step]}


def _nice(step: float) -> float:
    """The least of 1, 2, 2.5, 5, 10 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _label(value: float, digits: int | None = None) -> str:
    """A short number: 1500000 as 1.5M, 0.00002 as 2e-05."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):g}{letter}"
    if digits is not None and (size >= 1e-3 or value == 0) and digits <= 4:
        return f"{value + 0.0:.{digits}f}"
    return f"{value:.4g}" if 1 <= size < 1e4 else f"{value:.3g}"
