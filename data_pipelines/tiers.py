"""Files in three tiers by a quality score, and which files to label next.

    python -m data_pipelines.tiers agreement --scored FILE.jsonl --labels FILE.jsonl
    python -m data_pipelines.tiers label --scored FILE.jsonl [--labels FILE.jsonl] --count N --output FILE.jsonl

InternLM2's report, section 3.1.2: high-quality code is sampled more often, moderate code once, low-quality code is
dropped; a score counts only in languages where it agrees with people, and files of other languages are kept. Annotators
check the model's most confident verdicts, and earlier labels are checked again in each round. The thresholds are ours.

A row of --scored (JSONL or parquet) has id, text, language, and from 0 (low) to 1 (high) the field `quality`, or
`quality` in its meta, or what `data_pipelines.quality score` adds by a classifier named code_quality. A row of --labels
has id and label ("high" or "low"); for one id a later row holds. `label` writes rows to be labelled with their texts:
fill in `label`, append them to the labels, and they are what the classifier is trained on anew:

    python -m data_pipelines.quality train --data labels.jsonl --positive high --drop below --output models/code_quality
    python -m data_pipelines.quality score --classifier models/code_quality --input FILES --output scored.jsonl
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import SCHEMA, Check, Outcome
from data_pipelines.readers import json_rows
from data_pipelines.rows import read_rows

Label = Literal["high", "low"]
Score = Callable[[pa.RecordBatch], np.ndarray]
"""Quality of every row, from 0 to 1."""
CODE_QUALITY = "code_quality"
"""The name of the classifier whose scores are qualities."""


@dataclass(frozen=True)
class Tiers:
    """A score of at least `high` is the high tier, one below `low` the low one, the rest is moderate."""

    high: float = 0.8
    low: float = 0.2
    high_weight: int = 3
    """How often an epoch reads a file of the high tier, a moderate one being read once (`tokens --times weight`)."""
    languages: tuple[str, ...] | None = None
    """Where the score counts (None: everywhere); files of other languages are moderate."""

    def __post_init__(self):
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low is {self.low} and high {self.high}; wanted 0 <= low <= high <= 1")
        if self.high_weight != int(self.high_weight) or self.high_weight < 1:
            raise ValueError(
                f"high_weight is {self.high_weight}; wanted a whole number from 1 on, a moderate file's weight being 1"
            )


def score_of_meta(batch: pa.RecordBatch) -> np.ndarray:
    """Returns the field `quality` of every row's meta; a row without one is an error that names it."""
    found = [json.loads(meta).get("quality") for meta in batch.column("meta").to_pylist()]
    for row, value in enumerate(found):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            path = batch.column("path")[row].as_py()
            raise ValueError(f"{path} has no quality in meta ({value!r}); score the documents first")
    return np.asarray(found, np.float64)


def tiers(settings: Tiers, *, score: Score = score_of_meta) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops the low tier and enters quality, tier and weight into the meta of the rest.

    Raises ValueError where a score is missing, is no number or lies outside 0 to 1.
    """

    def apply(batch: pa.RecordBatch) -> Outcome:
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        scores_D = np.asarray(score(batch), np.float64)
        if scores_D.shape != (batch.num_rows,):
            raise ValueError(
                f"the scorer gave an array of shape {scores_D.shape} for {batch.num_rows} rows; wanted one each"
            )
        if not np.all((scores_D >= 0) & (scores_D <= 1)):  # NaN too
            row = int(np.flatnonzero(~((scores_D >= 0) & (scores_D <= 1)))[0])
            raise ValueError(
                f"the score of {batch.column('path')[row].as_py()} is {scores_D[row]}; wanted one from 0 to 1"
            )
        metas = []
        for row, meta in enumerate(batch.column("meta").to_pylist()):
            value = float(scores_D[row])
            counts = settings.languages is None or batch.column("language")[row].as_py() in settings.languages
            tier = "moderate" if not counts or settings.low <= value < settings.high else "high"
            if counts and value < settings.low:
                tier, reasons[row] = "low", "low_quality"
                details[row] = f"quality {value:.3f} is below {settings.low:g}"
            weight = settings.high_weight if tier == "high" else 1 if tier == "moderate" else 0
            fields = json.loads(meta) | {"quality": round(value, 6), "tier": tier, "weight": weight}
            metas.append(json.dumps(fields, sort_keys=True, ensure_ascii=False))
        place = SCHEMA.get_field_index("meta")
        batch = batch.set_column(place, SCHEMA.field("meta"), pa.array(metas, pa.string()))
        counts = settings.languages is None or np.isin(batch.column("language").to_pylist(), settings.languages)
        check = Check("low_quality", np.where(counts, scores_D, np.nan), "below", settings.low)
        return Outcome(batch, reasons, details, [check])

    return apply


# --- the score against people ----------------------------------------------------------------------------------------


class Scored(NamedTuple):
    """A file with its predicted quality."""

    id: str
    language: str
    quality: float
    text: str = ""


class Agreement(NamedTuple):
    """Of the labelled files of a language: how many, the share where score >= 0.5 says the same, Cohen's kappa."""

    samples: int
    accuracy: float
    kappa: float


def agreement(scored: Iterable[Scored], labels: Mapping[str, Label]) -> dict[str, Agreement]:
    """Returns by language how the score agrees with the labels; kappa is 0 where only one label occurs."""
    pairs: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for row in scored:
        if row.id in labels:
            pairs[row.language].append((row.quality >= 0.5, labels[row.id] == "high"))
    return {language: _agreement(found) for language, found in sorted(pairs.items())}


def _agreement(pairs: Sequence[tuple[bool, bool]]) -> Agreement:
    predicted, labelled = np.asarray(pairs).T
    accuracy = float((predicted == labelled).mean())
    p, q = float(predicted.mean()), float(labelled.mean())
    chance = p * q + (1 - p) * (1 - q)
    kappa = (accuracy - chance) / (1 - chance) if chance < 1 and 0 < q < 1 else 0.0
    return Agreement(len(pairs), accuracy, kappa)


def trusted_languages(
    found: Mapping[str, Agreement], *, min_kappa: float = 0.6, min_samples: int = 50
) -> tuple[str, ...]:
    """Returns the languages in which the score may decide, for `Tiers.languages`."""
    return tuple(
        language for language, row in sorted(found.items()) if row.samples >= min_samples and row.kappa >= min_kappa
    )


class ToLabel(NamedTuple):
    """why "contradicted": labelled before, and the score says the other; "confident": no label yet."""

    id: str
    language: str
    quality: float
    why: Literal["contradicted", "confident"]
    label: Label | None


def label_next(
    scored: Iterable[Scored],
    labels: Mapping[str, Label],
    *,
    count: int,
    confidence: float = 0.8,
    times: Mapping[str, int] = {},
) -> list[ToLabel]:
    """Returns at most `count` files for the annotators, the same for the same input in any order.

    First the earlier labels that the score contradicts, those that were given least often (`times`: id -> how often)
    and then the most confident first; they take half of the places, and more where nothing else is left, so that labels
    which people gave again and again do not come back for ever. Then files without a label whose score is at least
    `confidence` or at most 1 - confidence: high and low in turn, within each language by language, the most confident
    first, so that no language or side crowds out the others.
    """
    if count < 1 or not 0.5 <= confidence <= 1:
        raise ValueError(f"count is {count} and confidence {confidence}; wanted 1 or more, and a share from 0.5 to 1")
    rows = sorted(scored, key=lambda row: (-abs(row.quality - 0.5), row.id))
    again = [
        ToLabel(row.id, row.language, row.quality, "contradicted", labels[row.id])
        for row in rows
        if row.id in labels and (row.quality >= 0.5) != (labels[row.id] == "high")
    ]
    again.sort(key=lambda row: times.get(row.id, 1))
    queues: dict[tuple[str, bool], list[ToLabel]] = defaultdict(list)
    for row in rows:
        if row.id not in labels and abs(row.quality - 0.5) >= confidence - 0.5:
            side = row.quality >= 0.5
            queues[row.language, not side].append(ToLabel(row.id, row.language, row.quality, "confident", None))
    fresh = [
        (turn, key, item) for key, queue in queues.items() for turn, item in enumerate(queue)
    ]  # in turn: the first of each queue, then the second of each
    new = [item for _, _, item in sorted(fresh, key=lambda entry: entry[:2])]
    num_again = max((count + 1) // 2, count - len(new))
    return [*again[:num_again], *new][:count]


# --- the commands ----------------------------------------------------------------------------------------------------


def read_scored(path: str | Path) -> list[Scored]:
    """Returns the rows of a JSONL or parquet file with id, text, language and quality: its own field, else the score of
    CODE_QUALITY, else that of meta. A text without a word has no score, and is left out."""
    found = []
    for row in read_rows(path):
        meta = row.value.get("meta")
        meta = json.loads(meta) if isinstance(meta, str) else meta or {}
        scores = row.value.get("scores") or {}
        quality = row.value.get("quality", scores.get(CODE_QUALITY, meta.get("quality")))
        name = row.value.get("id")
        if quality is None and CODE_QUALITY in scores:
            continue
        if not isinstance(name, str) or not isinstance(quality, (int, float)) or not 0 <= quality <= 1:
            raise ValueError(
                f"{row.place}: id is {name!r} and quality {quality!r}; wanted a text and a number from 0 to 1: in "
                f"`quality`, in meta, or as the score of {CODE_QUALITY}; it has {', '.join(row.value) or 'nothing'}"
            )
        found.append(
            Scored(name, str(row.value.get("language", "und")), float(quality), str(row.value.get("text", "")))
        )
    return found


class Labels(NamedTuple):
    """Id -> label, and how often it was labelled; a later row for one id is a later round and its label holds."""

    label: dict[str, Label]
    times: Counter[str]


def read_labels(path: str | Path) -> Labels:
    """Returns the labels of a JSONL file."""
    labels = Labels({}, Counter())
    for row in json_rows(path):
        name, label = row.value.get("id"), row.value.get("label")
        if not isinstance(name, str) or label not in ("high", "low"):
            raise ValueError(f"{row.place}: id is {name!r} and label {label!r}; wanted a text and 'high' or 'low'")
        labels.label[name] = label
        labels.times[name] += 1
    return labels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.tiers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    compare = verbs.add_parser("agreement", help="by language, how the score agrees with the labels")
    select = verbs.add_parser("label", help="which files to label next")
    for verb in (compare, select):
        verb.add_argument("--scored", required=True, metavar="FILE", help="files with their quality, JSONL or parquet")
        verb.add_argument("--labels", required=verb is compare, metavar="FILE.jsonl", help="what people said, so far")
    select.add_argument("--count", type=int, required=True, metavar="N", help="files to label, at most")
    select.add_argument("--confidence", type=float, default=0.8, help="least certainty of a verdict (default: 0.8)")
    select.add_argument("--output", required=True, metavar="FILE.jsonl", help="rows to fill in `label` of: high or low")
    given = parser.parse_args(arguments)
    try:
        scored = read_scored(given.scored)
        labels, times = read_labels(given.labels) if given.labels else Labels({}, Counter())
        if given.verb == "agreement":
            return _print_agreement(agreement(scored, labels))
        chosen = label_next(scored, labels, count=given.count, confidence=given.confidence, times=times)
        _write_chosen(chosen, {row.id: row.text for row in scored}, Path(given.output))
        new = sum(row.why == "confident" for row in chosen)
        if 2 * new < len(chosen) or len(chosen) < given.count:
            print(
                f"{new} files without a label have a score as certain as {given.confidence:g}; with a lower "
                "--confidence there are more",
                file=sys.stderr,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_agreement(found: Mapping[str, Agreement]) -> int:
    trusted: Collection[str] = trusted_languages(found)
    for language, row in found.items():
        verdict = "the score counts" if language in trusted else "the score does not count"
        print(f"{language}: {row.samples} labels, accuracy {row.accuracy:.3f}, kappa {row.kappa:.3f}: {verdict}")
    if not found:
        print("error: no labelled id is among the scored rows; give the labels of these files", file=sys.stderr)
    return 0 if found else 1


def _write_chosen(chosen: Sequence[ToLabel], texts: Mapping[str, str], path: Path) -> None:
    lines = [json.dumps(row._asdict() | {"text": texts[row.id]}, ensure_ascii=False) + "\n" for row in chosen]
    path.write_text("".join(lines), "utf-8")
    again = sum(row.why == "contradicted" for row in chosen)
    print(f"{len(chosen)} files to label, {again} of them with a label that the score contradicts: {path}")


if __name__ == "__main__":
    sys.exit(main())
