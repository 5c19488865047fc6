"""Training and judging the classifiers of the web chain: advertisements, fluency, toxicity, adult content.

    python -m data_pipelines.quality train --data labelled.jsonl --output models/advertisement --drop above
    python -m data_pipelines.quality score --classifier models/advertisement --input pages.jsonl --output scored.jsonl

A row of labelled.jsonl is {"text": ..., "label": 1}; labels are 0 and 1, true and false, or names with --positive NAME.
`domain` and `language` give thresholds of their own, a second annotator's labels (--second-label-field) an agreement.
Texts are parted by their hash: most to learn from, two held-out parts to calibrate and choose thresholds, and to test.
DIR/report.html shows what was measured; report.json holds the numbers. In what is printed and written, * stands for
all domains, or all languages.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.classifier import (
    MANIFEST,
    Classifier,
    Settings,
    joined_scores,
    open_classifier,
    probabilities,
    text_rows,
    write_classifier,
)
from data_pipelines.quality_training import Labelled, train
from data_pipelines.readers import Row

BATCH_ROWS = 512


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
    for place, row in _newest((row for name in files for row in read_rows(name)), text_field):
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


def _newest(rows: Iterable[Row], text_field: str) -> list[Row]:
    """The rows without those that a later one, with the same id and text, labels anew (`tiers.read_labels`)."""
    found: dict[Any, Row] = {}
    for number, row in enumerate(rows):
        name = row.value.get("id")
        found[number if name is None else (str(name), str(row.value.get(text_field)))] = row
    return list(found.values())


def _label(value: Any, positive: str, place: str, field: str) -> int:
    if positive and isinstance(value, str):
        return int(value == positive)
    if not positive and (value in (0, 1) or value in ("0", "1")):
        return int(value)
    wanted = f"a name, since --positive {positive} was given" if positive else "0 or 1 (or names, with --positive NAME)"
    raise ValueError(f"{place}: {field!r} is {value!r}; wanted {wanted}")


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
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    train_parser.add_argument("--text-field", default="text", metavar="NAME", help="field of the text (default: text)")
    train_parser.add_argument("--label-field", default="label", metavar="NAME", help="of the label (default: label)")
    train_parser.add_argument("--second-label-field", default="", metavar="NAME", help="a second annotator's labels")
    train_parser.add_argument("--positive", default="", metavar="NAME", help="where labels are names: that of label 1")
    train_parser.add_argument(
        "--precision", type=float, default=0.9, metavar="P", help="of what is dropped (default: 0.9)"
    )
    train_parser.add_argument(
        "--held-out", type=float, default=0.2, metavar="P", help="share not learned from (default: 0.2)"
    )
    train_parser.add_argument(
        "--epochs", type=int, default=defaults.epochs, metavar="N", help="passes over the rows (default: %(default)s)"
    )
    train_parser.add_argument(
        "--learning-rate", type=float, default=defaults.learning_rate, metavar="X", help="default: %(default)s"
    )
    train_parser.add_argument(
        "--log2-buckets", type=int, default=defaults.log2_buckets, metavar="N",
        help="weights of the model, as a power of 2 (default: %(default)s)",
    )  # fmt: skip
    train_parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="default: %(default)s")
    score = commands.add_parser("score", help="documents -> the same rows with a score of each classifier")
    score.add_argument("--classifier", nargs="+", required=True, metavar="DIR", help="folders that train wrote")
    score.add_argument("--input", nargs="+", required=True, metavar="FILE", help="JSONL or parquet")
    score.add_argument("--output", required=True, metavar="FILE.jsonl", help="rows with {'scores': {NAME: score}}")
    score.add_argument("--text-field", default="text", metavar="NAME", help="field of the text (default: text)")
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
    try:
        with partial.open("w", encoding="utf-8") as lines:
            while batch := list(itertools.islice(rows, BATCH_ROWS)):
                for name, count in _add_scores(batch, classifiers, given.text_field):
                    scored[name] += count
                lines.writelines(json.dumps(row.value, ensure_ascii=False, default=str) + "\n" for row in batch)
                num_rows += len(batch)
        for name, count in scored.items():
            if count == 0:
                raise ValueError(
                    f"{name} scored none of {num_rows} rows: field {given.text_field!r} holds no word in any; name "
                    "the field of the text with --text-field"
                )
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)
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
            row.value["scores"] = joined_scores(row.value.get("scores"), {name: score})
        counts.append((name, int((~np.isnan(found)).sum())))
    return counts


if __name__ == "__main__":
    sys.exit(main())
