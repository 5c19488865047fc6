"""The ledger: what came in, what each stage dropped and why, what was kept. It sums, or the run fails.

Every part of a run (a slice of the input through some stages) has a ledger of its own, on disk; that of the run is
their sum, so it is the same after any number of interruptions.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Document, Outcome, num_text_bytes, text_buffer
from data_pipelines.measures import MEASURES, Bound, Profile, Sample, add_profile, add_sample, bounded, measure, settled
from data_pipelines.words import follow
from internjax.hf.folder import sync_tree

FORMAT = 1
"""Of ledger.json; `read_summary` refuses another."""


class StageCount(NamedTuple):
    stage: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_kept: int = 0
    bytes_kept: int = 0
    dropped: Mapping[str, int] = {}
    dropped_bytes: Mapping[str, int] = {}


class Fate(NamedTuple):
    """How one document ended: the stage and reason that dropped it, with the measured values."""

    id: str
    path: str
    stage: str
    reason: str
    detail: str


FATES = pa.schema(
    [
        *((name, pa.string()) for name in Fate._fields),
        *((name, pa.string()) for name in ("source", "domain", "language")),
        ("num_bytes", pa.int64()),
        ("text", pa.large_string()),
    ]
)
"""Dropped documents, as the stage that dropped each saw it; `text` is null unless the run keeps what it drops."""


@dataclass
class Ledger:
    """Grows batch by batch and stage by stage; `check` then proves that nothing vanished.

    stages: in the order of the chain. dropped: record batches of `FATES`, each of one stage (mapped files, in a large
    run). unreadable: file -> rows that were set aside. reports: stage -> figures that a decision over the corpus gave.
    came, stayed: what the documents in and those kept are like. samples: stage -> what it measured. repeated_ids: of
    rows that bear the id of another one, where there are such (`ids.py`).
    """

    stages: dict[str, StageCount] = field(default_factory=dict)
    dropped: list[pa.RecordBatch] = field(default_factory=list)
    kept_ids: set[str] = field(default_factory=set)
    unreadable: Counter[str] = field(default_factory=Counter)
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    came: Profile = field(default_factory=dict)
    stayed: Profile = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    repeated_ids: dict[str, Any] = field(default_factory=dict)
    keeps_text: bool = False


def sizes(batch: pa.RecordBatch) -> list[int]:
    """UTF-8 bytes per row."""
    offsets = text_buffer(batch).offsets
    return (offsets[1:] - offsets[:-1]).tolist()


def record(ledger: Ledger, stage: str, before: pa.RecordBatch, outcome: Outcome) -> pa.RecordBatch:
    """The rows that stay; the others are entered with their reason. Fails if the stage lost or invented rows."""
    enter(ledger, stage, before, outcome)
    stays = np.array([reason is None for reason in outcome.reasons], bool)
    if stays.all():
        return outcome.batch
    kept = _rows_that_stay(outcome.batch, stays)
    follow(outcome.batch, np.flatnonzero(stays), kept)
    return kept


def _rows_that_stay(batch: pa.RecordBatch, stays: np.ndarray) -> pa.RecordBatch:
    """The rows; where those that go have no text any more, the texts of the others are not copied."""
    data, offsets = text_buffer(batch)
    if (np.diff(offsets)[~stays] > 0).any():
        return batch.filter(pa.array(stays))
    bounds = np.append(offsets[:-1][stays], offsets[-1])
    texts = pa.LargeStringArray.from_buffers(len(bounds) - 1, pa.py_buffer(bounds), pa.py_buffer(data))
    columns = [texts if name == "text" else batch.column(name).filter(pa.array(stays)) for name in batch.schema.names]
    return pa.record_batch(columns, schema=batch.schema)


def enter(
    ledger: Ledger, stage: str, before: pa.RecordBatch, outcome: Outcome, *, came: np.ndarray | None = None
) -> None:
    """`record` where nobody needs the rows that stay, which are not copied then.

    came: which rows the stage was given, where some had gone before (None: all); without a reason the others count as
    nothing.
    """
    rows = before.num_rows
    if outcome.batch.num_rows != rows or len(outcome.reasons) != rows or len(outcome.details) != rows:
        raise RuntimeError(
            f"stage {stage!r} was given {rows} rows and returned {outcome.batch.num_rows} rows, "
            f"{len(outcome.reasons)} reasons, {len(outcome.details)} details; a stage returns one of each per row"
        )
    if outcome.checks:
        measure(ledger.samples.setdefault(stage, Sample()), stage, before, outcome)
    gone = [row for row, reason in enumerate(outcome.reasons) if reason is not None]
    num_came, bytes_in, bytes_kept = rows, num_text_bytes(before), num_text_bytes(outcome.batch)
    if came is not None:
        num_came = int(came.sum())
        bytes_in, bytes_kept = (int(np.array(sizes(each))[came].sum()) for each in (before, outcome.batch))
    dropped: Counter[str] = Counter()
    dropped_bytes: Counter[str] = Counter()
    if gone:
        row_bytes, bytes_after = sizes(before), sizes(outcome.batch)
        for row in gone:
            dropped[outcome.reasons[row]] += 1
            dropped_bytes[outcome.reasons[row]] += row_bytes[row]
            bytes_kept -= bytes_after[row]
        ledger.dropped.append(_fates(ledger, stage, before, outcome, gone, row_bytes))
    num_kept = num_came - len(gone)
    count = StageCount(stage, num_came, bytes_in, num_kept, bytes_kept, dict(dropped), dict(dropped_bytes))
    ledger.stages[stage] = add(ledger.stages.get(stage, StageCount(stage)), count)


def _fates(
    ledger: Ledger,
    stage: str,
    before: pa.RecordBatch,
    outcome: Outcome,
    gone: Sequence[int],
    row_bytes: Sequence[int],
) -> pa.RecordBatch:
    texts = ["text"] if ledger.keeps_text else []
    rows = before.select(["id", "path", "source", "domain", "language", *texts]).take(pa.array(gone, pa.int64()))
    text = rows.column("text") if texts else pa.nulls(len(gone), pa.large_string())
    columns = [
        rows.column("id"),
        rows.column("path"),
        pa.array([stage] * len(gone), pa.string()),
        pa.array([outcome.reasons[row] for row in gone], pa.string()),
        pa.array([outcome.details[row] or "" for row in gone], pa.string()),
        *(rows.column(name) for name in ("source", "domain", "language")),
        pa.array([row_bytes[row] for row in gone], pa.int64()),
        text,
    ]
    return pa.record_batch([column.cast(kind.type) for column, kind in zip(columns, FATES)], schema=FATES)


def add(one: StageCount, other: StageCount) -> StageCount:
    """The counts of two sets of documents that went through the same stage."""
    assert one.stage == other.stage, f"counts of {one.stage!r} and {other.stage!r} are no counts of one stage"
    numbers = [a + b for a, b in zip(one[1:5], other[1:5])]
    sums = [dict(sorted((Counter(a) + Counter(b)).items())) for a, b in zip(one[5:], other[5:])]
    return StageCount(one.stage, *numbers, *sums)


def merge(ledger: Ledger, part: Ledger) -> None:
    """Adds the ledger of a part to that of the run."""
    for name, count in part.stages.items():
        ledger.stages[name] = add(ledger.stages.get(name, StageCount(name)), count)
    ledger.dropped.extend(part.dropped)
    ledger.unreadable.update(part.unreadable)
    ledger.reports.update(part.reports)
    ledger.repeated_ids.update(part.repeated_ids)
    add_profile(ledger.came, part.came)
    add_profile(ledger.stayed, part.stayed)
    for name, sample in part.samples.items():
        add_sample(ledger.samples.setdefault(name, Sample()), sample, name)


def part_record(ledger: Ledger) -> dict[str, Any]:
    """The ledger of a part as JSON values, without its dropped documents and the rows of its samples."""
    counts = [count._asdict() for count in ledger.stages.values()]
    unreadable = dict(sorted(ledger.unreadable.items()))
    return {"stages": counts, "unreadable": unreadable, "came": ledger.came, "measured": _measured(ledger)}


def part_samples(ledger: Ledger) -> list[pa.RecordBatch]:
    """The rows of a part's samples, in the order of its record."""
    return [settled(ledger.samples[name]) for name in _measured(ledger)]


def of_part(about: Mapping[str, Any], dropped: list[pa.RecordBatch], samples: Iterable[pa.RecordBatch]) -> Ledger:
    """The ledger that `part_record` and `part_samples` told of."""
    held = {
        name: Sample([Bound(**bound) for bound in each["bounds"]], each["documents"], each["bytes"], [rows])
        for (name, each), rows in zip(about["measured"].items(), samples, strict=True)
    }
    stages = {count["stage"]: StageCount(**count) for count in about["stages"]}
    return Ledger(stages, dropped, unreadable=Counter(about["unreadable"]), came=about["came"], samples=held)


def check(ledger: Ledger) -> None:
    """Raises RuntimeError naming the stage whose counts do not add up."""
    previous: StageCount | None = None
    for count in ledger.stages.values():
        gone = sum(count.dropped.values())
        if count.documents_in != count.documents_kept + gone:
            raise RuntimeError(
                f"ledger does not sum at stage {count.stage!r}: "
                f"{count.documents_in} in, {count.documents_kept} kept, {gone} dropped with a reason"
            )
        if previous is not None and previous.documents_kept != count.documents_in:
            raise RuntimeError(
                f"documents vanished between stages: {previous.stage!r} kept {previous.documents_kept}, "
                f"{count.stage!r} was given {count.documents_in}"
            )
        previous = count
    named = sum(batch.num_rows for batch in ledger.dropped)
    gone = sum(sum(count.dropped.values()) for count in ledger.stages.values())
    if named != gone:
        raise RuntimeError(f"ledger does not sum: {gone} documents dropped, {named} of them have a name and a reason")


def summary(ledger: Ledger) -> dict[str, Any]:
    """Plain data for JSON and reports: documents and bytes in and kept, dropped by stage and reason."""
    counts = list(ledger.stages.values())
    first, last = (counts[0], counts[-1]) if counts else (StageCount(""), StageCount(""))
    return {
        "format": FORMAT,
        "documents_in": first.documents_in,
        "bytes_in": first.bytes_in,
        "documents_kept": last.documents_kept,
        "bytes_kept": last.bytes_kept,
        "documents_dropped": sum(sum(count.dropped.values()) for count in counts),
        "dropped": {
            count.stage: dict(sorted(count.dropped.items(), key=lambda item: (-item[1], item[0]))) for count in counts
        },
        "rows_set_aside": dict(sorted(ledger.unreadable.items())),
        **({"repeated_ids": ledger.repeated_ids} if ledger.repeated_ids else {}),
        "stages": [count._asdict() for count in counts],
        "reports": {name: dict(report) for name, report in ledger.reports.items()},
        "profiles": {"in": bounded(ledger.came), "kept": bounded(ledger.stayed)},
        "measured": _measured(ledger),
    }


def _measured(ledger: Ledger) -> dict[str, Any]:
    """Stage -> how much it measured, and its bounds, in the order of the stages."""
    return {
        name: {
            "documents": sample.num_documents,
            "bytes": sample.num_bytes,
            "bounds": [bound._asdict() for bound in sample.bounds],
        }
        for name in ledger.stages
        if (sample := ledger.samples.get(name)) and sample.bounds
    }


def fates(ledger: Ledger) -> Iterator[Fate]:
    """Every dropped document, in the order of the stages and then of the input."""
    for batch in dropped_in_order(ledger):
        for row in batch.select(Fate._fields).to_pylist():
            yield Fate(**row)


def dropped_in_order(ledger: Ledger) -> Iterator[pa.RecordBatch]:
    """The dropped documents as record batches of `FATES`, stage by stage: the order of the input within each."""
    of_stage: dict[str, list[pa.RecordBatch]] = {stage: [] for stage in ledger.stages}
    for batch in ledger.dropped:
        if batch.num_rows:
            of_stage[batch.column("stage")[0].as_py()].append(batch)
    for batches in of_stage.values():
        yield from batches


def explain(ledger: Ledger, document_id: str) -> str:
    """One line: kept, or the stage, reason and values that dropped the document (an unambiguous id prefix will do)."""
    return _explained(document_id, fates(ledger), ledger.kept_ids)


def read_summary(folder: str | Path) -> dict[str, Any]:
    """What `save` wrote as ledger.json; ValueError where the folder holds none, or one of another version."""
    path = Path(folder) / "ledger.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: it has no ledger.json; give the --output of data_pipelines.wanjuan")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{folder} was written by another version: its ledger has format {found.get('format')}, this one reads "
            f"{FORMAT}; run the chain again"
        )
    return found


def explain_run(folder: str | Path, document_id: str) -> str:
    """`explain` for a folder that the command wrote."""
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    folder = Path(folder)
    read_summary(folder)
    begins = pc.starts_with(pc.field("id"), document_id)
    dropped = ds.dataset(folder / "dropped.parquet").to_table(list(Fate._fields), filter=begins).to_pylist()
    kept = ds.dataset(folder / "documents", format="parquet").to_table(["id"], filter=begins)
    return _explained(document_id, (Fate(**row) for row in dropped), set(kept.column("id").to_pylist()))


def _explained(document_id: str, dropped: Iterable[Fate], kept_ids: set[str]) -> str:
    lines: dict[str, list[str]] = {}
    for fate in dropped:
        if document_id and fate.id.startswith(document_id):
            text = f"{fate.id} {fate.path}: dropped by {fate.stage}: {fate.reason} ({fate.detail})"
            lines.setdefault(fate.id, []).append(text)
    for name in kept_ids if document_id else ():
        if name.startswith(document_id):
            lines.setdefault(name, []).append(f"{name}: kept")
    if len(lines) != 1:
        some = "".join(f" {name}," for name in sorted(lines)[:3])
        raise ValueError(
            f"document id {document_id!r} matches {len(lines)} documents of this run;{some} "
            "give the id of one of them, or a longer prefix"
        )
    return "\n".join(next(iter(lines.values())))


def save(ledger: Ledger, folder: str | Path) -> None:
    """Writes dropped.parquet with a row per dropped document, measures.parquet, ledger.json; checks the sums first.

    The ledger comes last, when all that lies in the folder is on disk: with it the folder is whole.
    """
    check(ledger)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_parquet(dropped_in_order(ledger), folder / "dropped.parquet", FATES)
    _write_measures(part_samples(ledger), folder / "measures.parquet")
    text = json.dumps(summary(ledger), indent=2, ensure_ascii=False) + "\n"
    temporary = folder / "ledger.json.partial"
    temporary.write_text(text, encoding="utf-8")
    sync_tree(folder)
    temporary.replace(folder / "ledger.json")


def _write_measures(samples: Sequence[pa.RecordBatch], path: Path) -> None:
    import pyarrow.parquet as pq

    table = pa.Table.from_batches(samples, schema=MEASURES).combine_chunks()
    pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, use_dictionary=["stage"], write_statistics=["stage"])


ROW_GROUP_ROWS = 4096
ROW_GROUP_BYTES = 16 << 20


def write_parquet(batches: Iterable[pa.RecordBatch], path: Path, schema: pa.Schema) -> None:
    """Writes one file whose bytes depend on the rows alone, not on how they are cut into batches."""
    import pyarrow.parquet as pq

    few = [name for name in schema.names if name not in ("id", "text", "path", "detail", "meta", "num_bytes")]
    with pq.ParquetWriter(path, schema, use_dictionary=few, write_statistics=few) as writer:
        for group in regroup(batches, schema):
            writer.write_table(pa.Table.from_batches([group], schema=schema), row_group_size=max(group.num_rows, 1))


def regroup(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, *, rows: int = ROW_GROUP_ROWS, size: int = ROW_GROUP_BYTES
) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of at most `rows` rows and about `size` bytes of text, cut by the rows alone."""
    waiting: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        start = 0
        for row, row_bytes in enumerate(sizes(batch)):
            if num_rows and (num_rows == rows or num_bytes + row_bytes > size):
                waiting.append(batch.slice(start, row - start))
                yield _one(waiting, schema)
                waiting, num_rows, num_bytes, start = [], 0, 0, row
            num_rows += 1
            num_bytes += row_bytes
        waiting.append(batch.slice(start))
    if num_rows:
        yield _one(waiting, schema)


def _one(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    some = [batch for batch in batches if batch.num_rows]
    return some[0] if len(some) == 1 else pa.concat_batches(some)


def dropped_by_reason(ledger: Ledger) -> dict[str, int]:
    """Reason -> number of documents over all stages, the most frequent first."""
    total: Counter[str] = Counter()
    for count in ledger.stages.values():
        total.update(count.dropped)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def remember_kept(ledger: Ledger, documents: Iterable[Document]) -> None:
    """Enters the survivors, so that `explain` knows them."""
    ledger.kept_ids.update(document.id for document in documents)


_PLACE = re.compile(r"(.+?)(?::\d+(?:\[\d+\])?)?: ")


def file_of(message: str) -> str:
    """The file that a message "file:line: reason" is about."""
    found = _PLACE.match(message)
    return found.group(1) if found else message
