"""Training of a classifier from labelled texts: parts, calibration, thresholds at a wanted precision, measurements."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.classifier import ANY, Classifier, Settings, Threshold, fit, margins, sigmoid, text_rows
from data_pipelines.document import in_held_out

LEAST_OF_EACH = 5
"""Documents of either label that each part must hold."""
LEAST_DROPPED = 5
"""A threshold whose precision rests on fewer documents is not chosen."""
LEAST_FOR_KEY = 100
"""Documents of a domain and language in the calibration part that give it a threshold of its own."""


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
    """Returns the point of most recall with that precision that drops enough documents to believe it, or None.

    Of equal recall the strictest: a looser one drops nothing but good documents more.
    """
    good = [point for point in points if point.precision >= precision and point.num_dropped >= LEAST_DROPPED]
    return max(good, key=lambda point: (point.recall, point.precision), default=None)


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
