"""Training and judging the classifiers of the web chain: advertisements, fluency, toxicity, adult content.

    python -m data_pipelines.quality train --data labelled.jsonl --output models/advertisement --drop above
    python -m data_pipelines.quality score --classifier models/advertisement --input pages.jsonl --output scored.jsonl

A row of labelled.jsonl is {"text": ..., "label": 1}; labels are 0 and 1, true and false, or names with --positive NAME.
`domain` and `language` give thresholds of their own, a second annotator's labels (--second-label-field) an agreement.
Texts are parted by their hash: most to learn from, two held-out parts to calibrate and choose thresholds, and to test.
MODEL/report.html shows what was measured; report.json holds the numbers.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.classifier import (
    ANY,
    MANIFEST,
    Classifier,
    Settings,
    Threshold,
    fit,
    margins,
    open_classifier,
    probabilities,
    sigmoid,
    text_rows,
    write_classifier,
)
from data_pipelines.document import in_held_out

LEAST_OF_EACH = 5
"""Documents of either label that each part must hold."""
LEAST_DROPPED = 5
"""A threshold whose precision rests on fewer documents is not chosen."""
LEAST_FOR_KEY = 100
"""Documents of a domain and language in the calibration part that give it a threshold of its own."""
BATCH_ROWS = 512


class Labelled(NamedTuple):
    """labels_D: 0 or 1. seconds_D: the second annotator's, -1 where there is none."""

    texts: list[str]
    labels_D: np.ndarray
    seconds_D: np.ndarray
    domains: list[str]
    languages: list[str]


class Point(NamedTuple):
    """Precision and recall of what is dropped at a threshold."""

    threshold: float
    precision: float
    recall: float
    num_dropped: int


# --- labelled rows ---------------------------------------------------------------------------------------------------


def read_labelled(
    files: Sequence[str],
    *,
    text_field: str = "text",
    label_field: str = "label",
    second_label_field: str = "",
    positive: str = "",
) -> Labelled:
    """Returns the labelled rows of JSONL or parquet files. Raises ValueError naming the first row that is none."""
    from data_pipelines.rows import read_rows

    found = Labelled([], np.zeros(0), np.zeros(0), [], [])
    labels, seconds = [], []
    for place, row in (row for name in files for row in read_rows(name)):
        for field in (text_field, label_field):
            if field not in row:
                raise ValueError(f"{place}: no field {field!r}; it has {', '.join(row) or 'none'}; name the right one")
        if not isinstance(row[text_field], str):
            raise ValueError(f"{place}: {text_field!r} is {type(row[text_field]).__name__}, wanted a string")
        found.texts.append(row[text_field])
        labels.append(_label(row[label_field], positive, place, label_field))
        second = row.get(second_label_field) if second_label_field else None
        seconds.append(-1 if second is None else _label(second, positive, place, second_label_field))
        found.domains.append(str(row.get("domain") or "web"))
        found.languages.append(str(row.get("language") or "und"))
    if second_label_field and not any(second >= 0 for second in seconds):
        raise ValueError(f"no row has the field {second_label_field!r}; leave --second-label-field out, or name it")
    return found._replace(labels_D=np.array(labels, np.int64), seconds_D=np.array(seconds, np.int64))


def _label(value: Any, positive: str, place: str, field: str) -> int:
    if positive and isinstance(value, str):
        return int(value == positive)
    if not positive and (value in (0, 1) or value in ("0", "1")):
        return int(value)
    wanted = f"a name, since --positive {positive} was given" if positive else "0 or 1 (or names, with --positive NAME)"
    raise ValueError(f"{place}: {field!r} is {value!r}; wanted {wanted}")


def kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Returns Cohen's kappa of two annotators' labels: 1 is agreement, 0 what chance gives (1960, 1.0 where both say
    one and the same label throughout)."""
    agreed = float(np.mean(first == second))
    chance = sum(float(np.mean(first == label) * np.mean(second == label)) for label in (0, 1))
    return 1.0 if chance == 1.0 else (agreed - chance) / (1.0 - chance)


def part_of(text: str, held_out: float) -> str:
    """Returns "learn", "calibrate" or "test", by the hash of the text alone."""
    if in_held_out(text, fraction=held_out / 2):
        return "calibrate"
    return "test" if in_held_out(text, fraction=held_out) else "learn"


# --- calibration and thresholds --------------------------------------------------------------------------------------


def calibrate(margins_D: np.ndarray, labels_D: np.ndarray) -> tuple[float, float]:
    """Returns slope and offset of Platt's sigmoid (1999): the least log loss against targets drawn in from 0 and 1."""
    positive = int(labels_D.sum())
    high, low = (positive + 1) / (positive + 2), 1 / (len(labels_D) - positive + 2)
    targets_D = np.where(labels_D > 0, high, low)
    inputs = np.stack([margins_D, np.ones(len(margins_D))], axis=1)
    theta = np.zeros(2)
    loss = _log_loss(inputs @ theta, targets_D)
    for _ in range(100):
        chances_D = sigmoid(inputs @ theta)
        gradient = inputs.T @ (chances_D - targets_D)
        curvature = (inputs * (chances_D * (1 - chances_D))[:, None]).T @ inputs + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while (new := _log_loss(inputs @ (theta - step), targets_D)) > loss:
            step /= 2
            if np.abs(step).max() < 1e-12:
                return float(theta[0]), float(theta[1])
        theta, loss = theta - step, new
        if np.abs(step).max() < 1e-10:
            break
    return float(theta[0]), float(theta[1])


def _log_loss(margins_D: np.ndarray, targets_D: np.ndarray) -> float:
    return float(np.sum(np.logaddexp(0, margins_D) - targets_D * margins_D))


def area_under_curve(scores_D: np.ndarray, labels_D: np.ndarray) -> float:
    """Returns the chance that a document of label 1 scores above one of label 0, ties counted half."""
    _, places, counts = np.unique(scores_D, return_inverse=True, return_counts=True)
    ranks_D = (np.cumsum(counts) - (counts - 1) / 2)[places]
    positive = int(labels_D.sum())
    above = ranks_D[labels_D > 0].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(labels_D) - positive)))


def curve(scores_D: np.ndarray, labels_D: np.ndarray, drop: str) -> list[Point]:
    """Returns a point between every two neighbouring scores, from the strictest threshold to the loosest."""
    sign = 1.0 if drop == "above" else -1.0
    order = np.argsort(-sign * scores_D, kind="stable")
    ranked, wanted = scores_D[order], (labels_D[order] > 0) == (drop == "above")
    hits, total = np.cumsum(wanted), max(int(wanted.sum()), 1)
    ends = np.flatnonzero(ranked[1:] != ranked[:-1])
    return [
        Point(float((ranked[k] + ranked[k + 1]) / 2), float(hits[k] / (k + 1)), float(hits[k] / total), int(k) + 1)
        for k in ends.tolist()
    ]


def choose(points: Sequence[Point], precision: float) -> Point | None:
    """Returns the loosest point with that precision that drops enough documents to believe it, or None."""
    good = [point for point in points if point.precision >= precision and point.num_dropped >= LEAST_DROPPED]
    return good[-1] if good else None


def choose_thresholds(
    scores_D: np.ndarray, data: Labelled, drop: str, precision: float
) -> tuple[list[Threshold], list[str]]:
    """Returns the threshold for all documents first, then those of languages, then of (domain, language); and a note
    for every key that has too few documents for its own."""
    keys = {(ANY, ANY)} | {(ANY, language) for language in data.languages} | set(zip(data.domains, data.languages))
    chosen, notes = [], []
    for domain, language in sorted(keys, key=lambda key: (key[0] != ANY, key[1] != ANY, key)):
        rows = [
            row
            for row, key in enumerate(zip(data.domains, data.languages, strict=True))
            if domain in (ANY, key[0]) and language in (ANY, key[1])
        ]
        points = curve(scores_D[rows], data.labels_D[rows], drop)
        found = choose(points, precision)
        if found and (len(rows) >= LEAST_FOR_KEY or (domain, language) == (ANY, ANY)):
            chosen.append(
                Threshold(
                    domain, language, found.threshold, len(rows), found.num_dropped, found.precision, found.recall
                )
            )
        elif (domain, language) == (ANY, ANY):
            best = max((p for p in points if p.num_dropped >= LEAST_DROPPED), key=lambda p: p.precision, default=None)
            reached = f"the best is {best.precision:.3f}" if best else "too few documents"
            raise ValueError(
                f"no threshold drops at least {LEAST_DROPPED} of {len(rows)} calibration documents with precision "
                f"{precision} ({reached}); give more or better labels, or a lower --precision"
            )
        else:
            why = "the precision is not reached" if len(rows) >= LEAST_FOR_KEY else f"fewer than {LEAST_FOR_KEY}"
            notes.append(f"{domain}, {language}: {len(rows)} documents, {why}; the wider threshold holds")
    return chosen, notes


# --- training --------------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """metrics: JSON values, measured on the test part. test: its rows; scores_D: their scores."""

    classifier: Classifier
    metrics: dict[str, Any]
    test: Labelled
    scores_D: np.ndarray
    notes: list[str]


def train(data: Labelled, settings: Settings, *, precision: float = 0.9, held_out: float = 0.2) -> Trained:
    """Returns the calibrated model with its thresholds, and what the test part says of it; equal data, equal bytes.

    Rows on which two annotators disagree are left out. Raises ValueError where labels are missing or do not suffice.
    """
    if not 0 < precision < 1 or not 0 < held_out < 0.9:
        raise ValueError(f"precision is {precision}, held_out {held_out}; give numbers between 0 and 1 (held_out 0.9)")
    doubled = data.seconds_D >= 0
    agreement = kappa(data.labels_D[doubled], data.seconds_D[doubled]) if doubled.any() else None
    agreed = [row for row in range(len(data.texts)) if not doubled[row] or data.labels_D[row] == data.seconds_D[row]]
    parts = {name: [] for name in ("learn", "calibrate", "test")}
    for row in agreed:
        parts[part_of(data.texts[row], held_out)].append(row)
    learn, calibration, test = (_rows(data, rows) for rows in parts.values())
    for name, part in zip(parts, (learn, calibration, test), strict=True):
        counts = [int((part.labels_D == label).sum()) for label in (0, 1)]
        if min(counts) < LEAST_OF_EACH:
            raise ValueError(
                f"the part to {name} has {counts[0]} documents with label 0 and {counts[1]} with label 1, of "
                f"{len(agreed)} in all; wanted at least {LEAST_OF_EACH} of each: give more labels of both kinds"
            )
    classifier = fit(learn.texts, learn.labels_D, settings)
    margins_D = _finite(margins(text_rows(calibration.texts), classifier))
    slope, offset = calibrate(margins_D, calibration.labels_D)
    separation = area_under_curve(margins_D, calibration.labels_D)
    if slope <= 0 or separation <= 0.5:
        raise ValueError(
            f"nothing was learned: on {len(margins_D)} held-out documents the score tells the labels apart in "
            f"{separation:.0%} of the pairs; look at the labels, and give more of them"
        )
    thresholds, notes = choose_thresholds(sigmoid(slope * margins_D + offset), calibration, settings.drop, precision)
    classifier = classifier._replace(slope=slope, offset=offset, thresholds=tuple(thresholds))
    scores_D = sigmoid(slope * _finite(margins(text_rows(test.texts), classifier)) + offset)
    metrics = {
        "num_documents": {name: len(rows) for name, rows in parts.items()},
        "num_positive": int(data.labels_D[agreed].sum()),
        "num_disagreed": len(data.texts) - len(agreed),
        "kappa": agreement,
        "wanted_precision": precision,
        **measure(scores_D, test.labels_D, settings.drop, thresholds[0].value),
    }
    return Trained(classifier, metrics, test, scores_D, notes)


def measure(scores_D: np.ndarray, labels_D: np.ndarray, drop: str, threshold: float) -> dict[str, Any]:
    """Returns what held-out scores say: area under the curve, Brier score, calibration error (10 bins), drops."""
    dropped_D = scores_D > threshold if drop == "above" else scores_D < threshold
    wanted_D = (labels_D > 0) == (drop == "above")
    bins_D = np.minimum((scores_D * 10).astype(int), 9)
    bins = [(float(scores_D[rows].mean()), float(labels_D[rows].mean()), int(rows.sum()))
            for b in range(10) if (rows := bins_D == b).any()]  # fmt: skip
    return {
        "area_under_curve": area_under_curve(scores_D, labels_D),
        "brier": float(np.mean((scores_D - labels_D) ** 2)),
        "calibration_error": sum(count * abs(mean - share) for mean, share, count in bins) / len(scores_D),
        "calibration_bins": bins,
        "precision": float(wanted_D[dropped_D].mean()) if dropped_D.any() else None,
        "recall": float(dropped_D[wanted_D].mean()),
        "dropped_share": float(dropped_D.mean()),
    }


def _rows(data: Labelled, rows: Sequence[int]) -> Labelled:
    picked = ([values[row] for row in rows] for values in (data.texts, data.domains, data.languages))
    texts, domains, languages = picked
    return Labelled(texts, data.labels_D[rows], data.seconds_D[rows], domains, languages)


def _finite(margins_D: np.ndarray) -> np.ndarray:
    """Margins with 0 for a text without a word, which says nothing either way."""
    return np.where(np.isnan(margins_D), 0.0, margins_D)


# --- commands --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains a classifier or scores documents, and returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        print(_train(given) if given.command == "train" else _score(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m data_pipelines.quality", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train_parser = commands.add_parser("train", help="labelled rows -> a classifier with its report")
    train_parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="labelled JSONL or parquet")
    train_parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; one of these is replaced"
    )
    train_parser.add_argument(
        "--drop", choices=("above", "below"), required=True,
        help="above: label 1 is what must go (advertisement, toxic); below: label 1 is what is wanted (fluent)",
    )  # fmt: skip
    train_parser.add_argument("--text-field", default="text")
    train_parser.add_argument("--label-field", default="label")
    train_parser.add_argument("--second-label-field", default="", help="a second annotator's labels")
    train_parser.add_argument("--positive", default="", metavar="NAME", help="where labels are names: that of label 1")
    train_parser.add_argument("--precision", type=float, default=0.9, help="of what is dropped (default: 0.9)")
    train_parser.add_argument("--held-out", type=float, default=0.2, help="share not learned from (default: 0.2)")
    train_parser.add_argument("--epochs", type=int, default=defaults.epochs)
    train_parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    train_parser.add_argument("--log2-buckets", type=int, default=defaults.log2_buckets)
    train_parser.add_argument("--seed", type=int, default=defaults.seed)
    score = commands.add_parser("score", help="documents -> the same rows with a score of each classifier")
    score.add_argument("--classifier", nargs="+", required=True, metavar="DIR", help="folders that train wrote")
    score.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL or parquet")
    score.add_argument("--output", required=True, metavar="FILE.jsonl", help="rows with {'scores': {NAME: score}}")
    score.add_argument("--text-field", default="text")
    return parser


def _train(given: argparse.Namespace) -> str:
    from data_pipelines.quality_report import write_report
    from data_pipelines.rows import digest
    from internjax.hf.folder import new_folder

    settings = replace(
        Settings(drop=given.drop), epochs=given.epochs, learning_rate=given.learning_rate,
        log2_buckets=given.log2_buckets, seed=given.seed,
    )  # fmt: skip
    data = read_labelled(
        given.data, text_field=given.text_field, label_field=given.label_field,
        second_label_field=given.second_label_field, positive=given.positive,
    )  # fmt: skip
    trained = train(data, settings, precision=given.precision, held_out=given.held_out)
    name = Path(given.output).absolute().name
    with new_folder(given.output, overwrite=True, marker=MANIFEST) as folder:
        about = {"data_sha256": [digest(file) for file in given.data], "metrics": trained.metrics}
        write_classifier(folder, trained.classifier, about)
        write_report(folder, name, trained)
    held = trained.classifier.thresholds[0]
    lines = [
        f"{given.output}: {len(data.texts)} labelled documents; documents {settings.drop} {held.value:.4f} go",
        "  test part: area under the curve {area_under_curve:.3f}, recall {recall:.3f}, calibration error "
        "{calibration_error:.3f}".format(**trained.metrics),
    ]
    if trained.metrics["precision"] is not None:
        lines.append(f"  precision {trained.metrics['precision']:.3f}, wanted {given.precision:g}")
    if trained.metrics["kappa"] is not None:
        lines.append(f"  annotators agree with kappa {trained.metrics['kappa']:.3f}")
    return "\n".join([*lines, *(f"  {note}" for note in trained.notes), f"report: {given.output}/report.html"])


def _score(given: argparse.Namespace) -> str:
    from data_pipelines.rows import read_rows

    classifiers = {Path(folder).absolute().name: open_classifier(folder) for folder in given.classifier}
    if len(classifiers) < len(given.classifier):
        raise ValueError(f"two of {', '.join(given.classifier)} have one name, which is that of the score; rename one")
    output = Path(given.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"--output is {output}; give a name that ends in .jsonl")
    scored = dict.fromkeys(classifiers, 0)
    rows = (row for name in given.input for row in read_rows(name))
    num_rows, partial = 0, output.with_name(f"{output.name}.partial")
    with partial.open("w", encoding="utf-8") as lines:
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            for name, count in _add_scores(batch, classifiers, given.text_field):
                scored[name] += count
            lines.writelines(json.dumps(row.value, ensure_ascii=False, default=str) + "\n" for row in batch)
            num_rows += len(batch)
    for name, count in scored.items():
        if count == 0:
            partial.unlink()
            raise ValueError(
                f"{name} scored none of {num_rows} rows: field {given.text_field!r} holds no word in any; name the "
                "field of the text with --text-field"
            )
    partial.replace(output)
    counts = ", ".join(f"{count} by {name}" for name, count in scored.items())
    return f"{output}: {num_rows} rows, scored {counts}"


def _add_scores(batch: Sequence[Any], classifiers: dict[str, Classifier], field: str) -> list[tuple[str, int]]:
    """Adds scores to the rows of a batch and returns how many each classifier gave."""
    for place, row in batch:
        if not isinstance(row.get(field), str):
            raise ValueError(
                f"{place}: {field!r} is {type(row.get(field)).__name__}, wanted a string; "
                f"the row has {', '.join(row) or 'nothing'}; name the field of the text with --text-field"
            )
    text = text_rows([row.value[field] for row in batch])
    counts = []
    for name, classifier in classifiers.items():
        found = probabilities(text, classifier)
        for row, score in zip(batch, found.tolist(), strict=True):
            before = row.value.get("scores")
            row.value["scores"] = (before if isinstance(before, dict) else {}) | {
                name: None if np.isnan(score) else round(score, 6)
            }
        counts.append((name, int((~np.isnan(found)).sum())))
    return counts


if __name__ == "__main__":
    sys.exit(main())
