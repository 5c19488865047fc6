"""What a preflight found, shown: its results, and documents of the first batch with the learned stretches marked.

B batch, T time.
"""

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from internjax.text.marked import Marked, as_html, marked, terminal
from internjax.train.batch import Batch

if TYPE_CHECKING:
    from internjax.text.tokenizer import Tokenizer

MAX_TOKENS = 400


class Result(NamedTuple):
    """What one check found."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    message: str
    seconds: float
    cached: bool = False


class Report(NamedTuple):
    """All results, and the first samples with what is learned of them."""

    results: tuple[Result, ...]
    preview: tuple[Marked, ...]


def samples(batch: Batch, tokenizer: "Tokenizer", *, num_samples: int = 2) -> tuple[Marked, ...]:
    """Returns the first documents of a batch as text, each at most MAX_TOKENS long."""
    segments_BT = np.asarray(batch.segments)
    places = [
        (row, segment)
        for row, segments_T in enumerate(segments_BT[:num_samples])
        for segment in np.unique(segments_T[segments_T > 0])[:num_samples]
    ]
    return tuple(_sample(batch, tokenizer, row, segments_BT[row] == segment) for row, segment in places[:num_samples])


def _sample(batch: Batch, tokenizer: "Tokenizer", row: int, inside_T: np.ndarray) -> Marked:
    at = np.nonzero(inside_T)[0][:MAX_TOKENS]
    tokens_T, targets_T, mask_T = (np.asarray(field)[row] for field in (batch.tokens, batch.targets, batch.loss_mask))
    # A position's mask is that of the token after it, which is its target.
    return marked([tokens_T[at[0]], *targets_T[at]], [False, *(mask_T[at] > 0)], tokenizer)


_SIGNS = {"passed": "ok     ", "failed": "FAILED ", "skipped": "skipped"}


def text(report: Report, *, colour: bool = False) -> str:
    """Returns the report for a terminal: learned text is green with `colour`, between ⟦ and ⟧ without."""
    lines = ["preflight"]
    for each in report.results:
        seconds = "cached" if each.cached else f"{each.seconds:.1f} s"
        lines.append(f"  {_SIGNS[each.status]} {each.name}: {each.message} ({seconds})")
    for index, sample in enumerate(report.preview, 1):
        marks = "green" if colour else "between ⟦ and ⟧"
        lines += [f"sample {index} ({marks}: learned)", terminal(sample, colour=colour)]
    return "\n".join(lines)


def page(report: Report) -> str:
    """Returns the report as an HTML page that needs nothing but itself; all text is escaped."""
    rows = "".join(
        f"<tr><td>{each.status}</td><td>{html.escape(each.name)}</td><td>{html.escape(each.message)}</td></tr>"
        for each in report.results
    )
    shown = "".join(f"<pre>{as_html(sample)}</pre>" for sample in report.preview)
    style = (
        "body{font:15px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
        "pre{white-space:pre-wrap;border:1px solid #8886;padding:1rem}mark{background:#2a92;color:inherit;"
        "border-bottom:2px solid #2a9}td{padding:.2rem .6rem;vertical-align:top}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Preflight</title><style>{style}</style>'
        f"<h1>Preflight</h1><table>{rows}</table><p>Marked: what the loss learns.</p>{shown}</html>\n"
    )


def keep(report: Report, folder: Path) -> None:
    """Writes preflight.json, preflight.txt and preflight.html into an existing run folder."""
    rows = [each._asdict() for each in report.results]
    (folder / "preflight.json").write_text(json.dumps(rows, indent=1) + "\n")
    (folder / "preflight.txt").write_text(text(report) + "\n")
    (folder / "preflight.html").write_text(page(report))
