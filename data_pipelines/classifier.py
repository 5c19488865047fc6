"""A linear model over hashed words and characters: its scores, its folder, and the stage that drops by it.

`quality.py` trains one from labelled documents. MODEL/manifest.json holds settings, calibration, thresholds, metrics,
and the checksum of weights.npy (float32, one per bucket).

    Stage("advertisements", "batch", classified("models/advertisement", drop="above", reason="advertisement"))
    Stage("fluency", "batch", classified("models/fluency", drop="below", reason="not_fluent"))
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from data_pipelines.document import SCHEMA, Check, Outcome, TextBuffer, text_buffer

FORMAT = 2
MANIFEST = "manifest.json"
WEIGHTS = "weights.npy"
ANY = "*"
OTHER_KEYS = "all others"
"""What the threshold for any domain and language holds for, beside those of some."""
WORD_BLOCK = 1 << 24
"""Bytes whose words are found at once: the arrays for them take 13 bytes per byte."""

Drop = Literal["above", "below"]


@dataclass(frozen=True)
class Settings:
    """drop: on which side of the threshold a document goes; its score is the probability of the label 1."""

    drop: Drop = "above"
    log2_buckets: int = 18
    window_bytes: int = 4000
    """A longer document is cut into windows of about this size."""
    worst_windows: int = 3
    """Its score is that of the mean of so many windows, those nearest to being dropped."""
    epochs: int = 8
    learning_rate: float = 0.05
    decay: float = 1e-6
    seed: int = 0

    def __post_init__(self):
        if self.drop not in get_args(Drop):
            raise ValueError(f"drop is {self.drop!r}; give one of {', '.join(get_args(Drop))}")
        if not 10 <= self.log2_buckets <= 26:
            raise ValueError(f"log2_buckets is {self.log2_buckets}; give 10 to 26")
        for name in ("window_bytes", "worst_windows", "epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")


class Threshold(NamedTuple):
    """Where documents of a domain and language are dropped ("*": any), with what was measured when it was chosen."""

    domain: str
    language: str
    value: float
    num_documents: int
    num_dropped: int
    precision: float
    recall: float


class Classifier(NamedTuple):
    """Probability of the label 1 = sigmoid(slope x margin + offset), by Platt's calibration."""

    settings: Settings
    weights: np.ndarray
    bias: float
    slope: float = 1.0
    offset: float = 0.0
    thresholds: tuple[Threshold, ...] = ()


class Windows(NamedTuple):
    """Window w is data[bounds[w]:bounds[w + 1]], of row rows[w]; its words are hashes[starts[w]:starts[w + 1]]."""

    data: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray


# --- scores ----------------------------------------------------------------------------------------------------------


def fit(texts: Sequence[str], labels_D: np.ndarray, settings: Settings) -> Classifier:
    """Returns the uncalibrated model of texts and labels (0 or 1): logistic loss, AdaGrad, the same on every run."""
    from data_pipelines import hashing

    cut = cut_windows(text_rows(texts), settings.window_bytes)
    num_windows = len(cut.rows)
    shares_W = (1.0 / np.bincount(cut.rows, minlength=len(texts)))[cut.rows]
    labels_W = np.asarray(labels_D, np.float64)[cut.rows]
    weights = np.zeros(1 << settings.log2_buckets, np.float32)
    squares, bias, scratch = np.zeros_like(weights), np.zeros(2), _scratch(cut)
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(num_windows)
        hashing.learn(
            cut.data, cut.bounds, cut.hashes, cut.starts, labels_W, shares_W, order, weights, squares, bias,
            settings.learning_rate, settings.decay, scratch,
        )  # fmt: skip
    return Classifier(settings, weights, float(bias[0]))


def margins(text: TextBuffer, classifier: Classifier) -> np.ndarray:
    """Returns the linear score of every row, NaN for one without a word: the mean of its worst windows."""
    from data_pipelines import hashing

    settings, num_rows = classifier.settings, len(text.offsets) - 1
    cut = cut_windows(text, settings.window_bytes)
    margins_W = np.empty(len(cut.rows))
    arrays = cut.data, cut.bounds, cut.hashes, cut.starts
    hashing.margins(*arrays, classifier.weights, classifier.bias, _scratch(cut), margins_W)
    has_words = ~np.isnan(margins_W)
    rows_W, margins_W = cut.rows[has_words], margins_W[has_words]
    order = np.lexsort((-margins_W if settings.drop == "above" else margins_W, rows_W))
    rows_W, margins_W = rows_W[order], margins_W[order]
    rank_W = np.arange(len(rows_W)) - np.searchsorted(rows_W, rows_W)
    worst = rank_W < settings.worst_windows
    sums_D = np.bincount(rows_W[worst], margins_W[worst], minlength=num_rows)
    counts_D = np.bincount(rows_W[worst], minlength=num_rows)
    return np.where(counts_D > 0, sums_D / np.maximum(counts_D, 1), np.nan)


def probabilities(text: TextBuffer, classifier: Classifier) -> np.ndarray:
    """Returns the probability of the label 1 per row; NaN for a row without a word."""
    return sigmoid(classifier.slope * margins(text, classifier) + classifier.offset)


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(values, -500, 500)))


def cut_windows(text: TextBuffer, window_bytes: int) -> Windows:
    """Returns the windows of every row with their words, as `kernels.words` defines a word."""
    from data_pipelines import hashing, kernels

    data, offsets = text
    num_rows, size = len(offsets) - 1, int(offsets[-1] - offsets[0])
    bounds, rows = (np.empty(2 + 2 * num_rows + size // window_bytes, np.int64) for _ in range(2))
    num_windows = hashing.windows(data, offsets, window_bytes, bounds, rows)
    bounds, rows = bounds[: num_windows + 1], rows[:num_windows]
    starts, parts, found, first = np.zeros(num_windows + 1, np.int64), [], 0, 0
    while first < num_windows:
        last = max(int(np.searchsorted(bounds, bounds[first] + WORD_BLOCK, side="right")) - 1, first + 1)
        block = bounds[first : last + 1]
        room = int(block[-1] - block[0]) + 1
        hashes, lengths, flags = np.empty(room, np.uint64), np.empty(room, np.int32), np.empty(room, np.uint8)
        count = kernels.words(data, block, hashes, lengths, flags, starts[first : last + 1])
        starts[first : last + 1] += found
        parts.append(hashes[:count].copy())
        found, first = found + count, last
    return Windows(data, bounds, rows, np.concatenate(parts) if parts else np.zeros(0, np.uint64), starts)


def _scratch(cut: Windows) -> np.ndarray:
    return np.empty(4 * int(np.diff(cut.bounds).max(initial=0)) + 4, np.uint64)


def text_rows(texts: Sequence[str]) -> TextBuffer:
    """Returns the UTF-8 of the texts end to end."""
    return text_buffer(pa.record_batch([pa.array(texts, pa.large_string())], names=["text"]))


# --- the stage -------------------------------------------------------------------------------------------------------


def classified(
    folder: str | Path, *, drop: Drop, reason: str, threshold: float | None = None
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops documents by the model of a folder, with this reason; scores stay in meta.

    threshold None: those chosen when the model was trained, by (domain, language), else by language, else for all. A
    document without a word has no score and goes as "unscored": where a model scores nothing, nothing is kept, and the
    run fails. `drop` must be the side that the model was trained for.
    """
    classifier, name = _open_for(folder, drop), Path(folder).name
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"threshold is {threshold}; give a probability between 0 and 1")

    def apply(batch: pa.RecordBatch) -> Outcome:
        found_D = probabilities(text_buffer(batch), classifier)
        scores_D = found_D.tolist()
        reasons: list[str | None] = []
        details: list[str | None] = []
        keys = list(zip(batch.column("domain").to_pylist(), batch.column("language").to_pylist(), strict=True))
        chosen = {key: threshold_for(classifier, *key) for key in set(keys)}
        for score, key in zip(scores_D, keys, strict=True):
            found = chosen[key]
            bound = found.value if threshold is None else threshold
            goes = score > bound if drop == "above" else score < bound
            reasons.append("unscored" if score != score else reason if goes else None)
            chosen_for = f" ({found.domain}, {found.language})" if threshold is None else ""
            details.append(f"{name}: {score:.4f} is {drop} {bound:.4f}{chosen_for}" if goes else None)
            if score != score:
                details[-1] = f"{name}: it has no word to score"
        bounds = {(item.domain, item.language): item.value for item in classifier.thresholds}
        checks = checks_by_key(reason, found_D, drop, bounds if threshold is None else {(ANY, ANY): threshold}, keys)
        return Outcome(with_scores(batch, {name: scores_D}), reasons, details, checks)

    return apply


def score_by(folder: str | Path, *, drop: Drop) -> Callable[[pa.RecordBatch], np.ndarray]:
    """Returns the function that gives every row's probability of the label 1 by the model of a folder.

    A row without a word has 0.5. `drop` must be the side that the model was trained for.
    """
    classifier = _open_for(folder, drop)

    def score(batch: pa.RecordBatch) -> np.ndarray:
        return np.nan_to_num(probabilities(text_buffer(batch), classifier), nan=0.5)

    return score


def _open_for(folder: str | Path, drop: Drop) -> Classifier:
    classifier = open_classifier(folder)
    if drop != classifier.settings.drop:
        raise ValueError(
            f"{folder} was trained to drop documents {classifier.settings.drop} its threshold, the stage would drop "
            f"those {drop} it; give drop={classifier.settings.drop!r}, or train with --drop {drop}"
        )
    return classifier


def threshold_for(classifier: Classifier, domain: str, language: str) -> Threshold:
    """Returns the threshold of (domain, language), else that of the language, else the one for all."""
    held = {(item.domain, item.language): item for item in classifier.thresholds}
    return next(held[key] for key in keys_from_narrow(domain, language) if key in held)


def keys_from_narrow(domain: str, language: str) -> tuple[tuple[str, str], ...]:
    """Returns under which (domain, language) a threshold may stand, the one that wins first."""
    return (domain, language), (ANY, language), (ANY, ANY)


def checks_by_key(
    reason: str,
    values_D: np.ndarray,
    side: Drop,
    bounds: Mapping[tuple[str, str], float],
    keys: Sequence[tuple[str, str]],
) -> list[Check]:
    """Returns a check for every threshold, of the rows that it holds for; keys: (domain, language) of every row."""
    chosen = [next(each for each in keys_from_narrow(*key) if each in bounds) for key in keys]
    found = []
    for key, bound in bounds.items():
        mine_D = np.array([each == key for each in chosen], bool)
        named = ", ".join(part for part in key if part != ANY) or OTHER_KEYS
        of = named if len(bounds) > 1 else ""
        found.append(Check(reason, np.where(mine_D, values_D, np.nan), side, bound, of))
    return found


def joined_scores(before: Any, found: Mapping[str, float]) -> dict[str, float | None]:
    """Returns scores that were there before, where that is what they are, and those found: six digits, NaN as None."""
    new = {name: round(score, 6) if score == score else None for name, score in found.items()}
    return (before if isinstance(before, dict) else {}) | new


def with_scores(
    batch: pa.RecordBatch, scores: Mapping[str, Sequence[float]], *, rows: Sequence[int] | None = None
) -> pa.RecordBatch:
    """Returns the batch with {"scores": {name: score}} in the meta of these rows (None: all), a score per row of the
    batch; null where it is NaN. Scores that were there before stay."""
    metas = batch.column("meta").to_pylist()
    for row in range(batch.num_rows) if rows is None else rows:
        values = json.loads(metas[row])
        found = {name: float(scores_D[row]) for name, scores_D in scores.items()}
        values["scores"] = joined_scores(values.get("scores"), found)
        metas[row] = json.dumps(values, sort_keys=True, ensure_ascii=False)
    place = SCHEMA.get_field_index("meta")
    return batch.set_column(place, SCHEMA.field("meta"), pa.array(metas, pa.string()))


# --- the folder ------------------------------------------------------------------------------------------------------


def write_classifier(folder: Path, classifier: Classifier, about: dict[str, Any]) -> None:
    """Writes weights and manifest; `about` (JSON values: data, metrics) is kept in it."""
    np.save(folder / WEIGHTS, classifier.weights.astype("<f4"), allow_pickle=False)
    manifest = {
        "format": FORMAT,
        "settings": asdict(classifier.settings),
        "bias": classifier.bias,
        "calibration": {"slope": classifier.slope, "offset": classifier.offset},
        "thresholds": [threshold._asdict() for threshold in classifier.thresholds],
        "weights_sha256": _sha256(folder / WEIGHTS),
        **about,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def open_classifier(folder: str | Path) -> Classifier:
    """Returns the model of a folder. Raises ValueError naming what is missing, altered or of another format."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file() or not (folder / WEIGHTS).is_file():
        found = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise ValueError(
            f"{folder} holds no classifier: wanted {MANIFEST} and {WEIGHTS} (found: {found}); train one with "
            "python -m data_pipelines.quality train"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this version reads {FORMAT}")
        if manifest["weights_sha256"] != _sha256(folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} was altered after it was written, its sha256 differs")
        settings = Settings(**manifest["settings"])
        weights = np.load(folder / WEIGHTS, allow_pickle=False)
        calibration = manifest["calibration"]
        thresholds = tuple(Threshold(**item) for item in manifest["thresholds"])
        model = Classifier(settings, weights, manifest["bias"], calibration["slope"], calibration["offset"], thresholds)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read ({error}); train it anew") from error
    if weights.shape != (1 << settings.log2_buckets,) or not np.isfinite(weights).all():
        raise ValueError(f"{folder / WEIGHTS} has {weights.shape} values that do not fit its settings; train it anew")
    if not any((item.domain, item.language) == (ANY, ANY) for item in thresholds):
        raise ValueError(f"{folder} has no threshold for all documents; train it anew")
    return model


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
