"""Thresholds of the perplexity filter, fitted from a validation sample by domain and language; their file, their page.

A threshold is where the wanted share of the sample stays. The page shows the documents next to it on either side: look
at them, and fit again with another share, or write another `value` into the file.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.classifier import ANY, keys_from_narrow
from data_pipelines.coherence import Measure, Scorer, ScoreThreshold, Thresholds, Windows
from data_pipelines.score_pages import histogram, nearest, thinned

FORMAT = 1
LEAST_SAMPLES = 50
"""Scored documents of a domain and language, or of a language, that give it a threshold of its own."""
EXCERPT = 400
"""Characters of the beginning, the middle and the end of a document that are shown."""


class Sample(NamedTuple):
    """A scored document (NaN: it has no score) and what is shown of its text."""

    id: str
    path: str
    domain: str
    language: str
    score: float
    text: str


class Fitted(NamedTuple):
    """A threshold, on how many documents it rests, which share of them stays and was to stay, and the nearest ones: of
    those that go (below), of those that stay (above), the nearest first."""

    domain: str
    language: str
    value: float
    num_samples: int
    kept_share: float
    wanted_share: float
    below: tuple[Sample, ...]
    above: tuple[Sample, ...]


class Fit(NamedTuple):
    """thresholds: that of all documents first. notes: what has no threshold of its own, and why."""

    thresholds: list[Fitted]
    notes: list[str]
    num_unscored: int


def excerpt(text: str) -> str:
    """Returns beginning, middle and end of a text."""
    if len(text) <= 3 * EXCERPT:
        return text
    middle = (len(text) - EXCERPT) // 2
    return "\n[...]\n".join((text[:EXCERPT], text[middle : middle + EXCERPT], text[-EXCERPT:]))


def fit_thresholds(
    validation: Sequence[Sample],
    target: Mapping[str, float],
    *,
    least_samples: int = LEAST_SAMPLES,
    num_borderline: int = 5,
) -> Fit:
    """Returns a threshold for all documents, for every language and for every (domain, language) with enough of them.

    target: domain -> share of its documents that is to stay; "*" for all others. A key with fewer than `least_samples`
    scored documents is left to its language, else to all, which a note says. Raises ValueError where nothing is scored.
    """
    if ANY not in target or not all(0 < share <= 1 for share in target.values()):
        raise ValueError(f"the shares to keep are {dict(target)}; give one above 0 up to 1, and one for {ANY!r}")
    scored = sorted((row for row in validation if row.score == row.score), key=lambda row: (row.score, row.id))
    num_unscored = len(validation) - len(scored)
    if not scored:
        raise ValueError(
            f"none of {len(validation)} documents has a score; give longer ones, or a scorer with smaller tokens"
        )
    keys = {(ANY, ANY)} | {(ANY, row.language) for row in validation} | {(r.domain, r.language) for r in validation}
    fitted: dict[tuple[str, str], Fitted] = {}
    lacking: list[tuple[tuple[str, str], int]] = []
    for key in sorted(keys, key=lambda key: (key[0] != ANY, key[1] != ANY, key)):
        rows = [row for row in scored if key[0] in (ANY, row.domain) and key[1] in (ANY, row.language)]
        if len(rows) >= least_samples or key == (ANY, ANY):
            fitted[key] = _fit(key, rows, target.get(key[0], target[ANY]), num_borderline)
        if len(rows) < least_samples:
            lacking.append((key, len(rows)))
    notes = [
        f"{', '.join(key)}: {number} scored documents, fewer than {least_samples}; "
        + ("look at the sample before you use it" if key == (ANY, ANY) else f"that of {_instead(key, fitted)} holds")
        for key, number in lacking
    ]
    if num_unscored:
        notes.append(
            f"{num_unscored} documents have no score, since they are shorter than a window; they count nowhere"
        )
    return Fit(list(fitted.values()), notes, num_unscored)


def _fit(key: tuple[str, str], rows: Sequence[Sample], share: float, num_borderline: int) -> Fitted:
    """The threshold of documents in ascending order of their score: half-way between the last to go and the next."""
    scores_D = np.array([row.score for row in rows])
    num_dropped = int((1 - share) * len(rows) + 1e-9)
    value = float(scores_D[0] if num_dropped == 0 else scores_D[num_dropped - 1 : num_dropped + 1].mean())
    above, below = nearest(scores_D, value, num_borderline)
    kept_share = float((scores_D >= value).mean())
    near = (tuple(rows[row] for row in side) for side in (below, above))
    return Fitted(*key, value, len(rows), kept_share, share, *near)


def _instead(key: tuple[str, str], fitted: Mapping[tuple[str, str], Fitted]) -> str:
    """The key whose threshold holds for one without."""
    return ", ".join(next(each for each in keys_from_narrow(*key) if each in fitted))


# --- the file --------------------------------------------------------------------------------------------------------


def write_thresholds(path: Path, fit: Fit, *, measure: Measure, scorer: Scorer, cut: Windows) -> None:
    """Writes the thresholds with what they were fitted by; borderline documents by id, path and score."""
    rows = []
    for item in fit.thresholds:
        near = {side: [[row.id, row.path, row.score] for row in getattr(item, side)] for side in ("below", "above")}
        rows.append(item._asdict() | near)
    values = {
        "format": FORMAT,
        "measure": measure,
        "scorer": {"name": scorer.name, "version": scorer.version},
        "windows": asdict(cut),
        "thresholds": rows,
        "notes": fit.notes,
    }
    _write(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def read_thresholds(path: str | Path) -> Thresholds:
    """Returns the thresholds of a file. Raises ValueError saying what is wrong with it."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
        found = tuple(
            ScoreThreshold(str(row["domain"]), str(row["language"]), float(row["value"]))
            for row in values["thresholds"]
        )
        return Thresholds(values["measure"], found, values["scorer"]["version"], Windows(**values["windows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no thresholds that can be read ({error}); fit them anew with "
            "python -m data_pipelines.long_text fit"
        ) from error


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# --- the page --------------------------------------------------------------------------------------------------------


def write_page(path: Path, fit: Fit, validation: Sequence[Sample], *, measure: Measure, scorer: Scorer) -> None:
    """Writes a self-contained HTML page: thresholds, how the scores lie, borderline documents."""
    from internjax import report

    whole = fit.thresholds[0]
    numbers = [
        report.Number("Documents", len(validation)),
        report.Number("Scored", whole.num_samples),
        report.Number("Stay", whole.kept_share, f"wanted {whole.wanted_share:g}"),
    ]
    groups = _groups(validation)
    said = [report.Text("\n\n".join(fit.notes))] if fit.notes else []
    rows = [item[:6] for item in fit.thresholds]
    table = report.Table(Fitted._fields[:6], rows, f"Documents whose {measure} lies below `value` go; `*`: all others")
    sections = [
        report.Section("Sample", [report.Numbers(numbers), *said]),
        report.Section("Thresholds", [table, _shares(groups)]),
        report.Section("Scores", [histogram(groups, _edges(groups), named="domain, language")]),
        report.Section("Borderline", [block for item in fit.thresholds for block in _borderline(item)]),
    ]
    title = f"Long text: thresholds of {measure}"
    _write(path, report.page(title, sections, subtitle=f"Scorer: `{scorer.name}`"))


def _groups(validation: Sequence[Sample]) -> dict[str, np.ndarray]:
    names = sorted({(row.domain, row.language) for row in validation})
    found = {
        ", ".join(key): np.array([r.score for r in validation if (r.domain, r.language) == key and r.score == r.score])
        for key in names
    }
    return {name: np.sort(scores) for name, scores in found.items() if len(scores)}


def _edges(groups: Mapping[str, np.ndarray]) -> list[float]:
    """Edges of bins of one width, round to three digits, around all but the outermost hundredths of the scores."""
    low, high = np.percentile(np.concatenate(list(groups.values())), [1, 99]).tolist()
    width = max((high - low) / 11, 1e-3)
    digits = max(0, 2 - int(np.floor(np.log10(width))))
    width = np.ceil(width * 10**digits) / 10**digits
    first = np.floor(low / width) * width
    return [round(float(first + width * number), digits) for number in range(13)]


def _shares(groups: Mapping[str, np.ndarray]) -> Any:
    """Chart: which share stays, by threshold."""
    from internjax import report

    series = {
        name: thinned([(float(score), 1 - row / len(scores)) for row, score in enumerate(scores)], 200)
        for name, scores in groups.items()
    }
    return report.Lines("What stays", series, "threshold", "share of the documents")


def _borderline(item: Fitted) -> list[Any]:
    from internjax import report

    blocks = []
    for said, rows in (("go", item.below), ("stay", item.above)):
        samples = [report.Sample(f"{row.score:.4f} {row.path}", row.text) for row in rows]
        if samples:
            caption = f"{item.domain}, {item.language}: these {said}, the nearest to {item.value:.4f} first"
            blocks.append(report.Samples(samples, caption))
    return blocks
