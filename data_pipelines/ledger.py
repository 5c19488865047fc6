"""The ledger: what came in, what each stage dropped and why, what was kept. It sums, or the run fails."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_pipelines.document import Document, Outcome, num_text_bytes, text_buffer


class StageCount(NamedTuple):
    stage: str
    documents_in: int
    bytes_in: int
    documents_kept: int
    bytes_kept: int
    dropped: dict[str, int]
    dropped_bytes: dict[str, int]


class Fate(NamedTuple):
    """How one document ended: the stage and reason that dropped it, with the measured values."""

    id: str
    path: str
    stage: str
    reason: str
    detail: str


@dataclass
class Ledger:
    """Grows stage by stage during one run of a chain; `check` then proves that nothing vanished."""

    stages: list[StageCount] = field(default_factory=list)
    fates: dict[str, list[Fate]] = field(default_factory=dict)
    kept_ids: set[str] = field(default_factory=set)
    unreadable: Counter[str] = field(default_factory=Counter)


def sizes(batch: pa.RecordBatch) -> list[int]:
    """UTF-8 bytes per row."""
    offsets = text_buffer(batch).offsets
    return (offsets[1:] - offsets[:-1]).tolist()


def record(ledger: Ledger, stage: str, before: pa.RecordBatch, outcome: Outcome) -> pa.RecordBatch:
    """The rows that stay; the others are entered with their reason. Fails if the stage lost or invented rows."""
    rows = before.num_rows
    if outcome.batch.num_rows != rows or len(outcome.reasons) != rows or len(outcome.details) != rows:
        raise RuntimeError(
            f"stage {stage!r} was given {rows} rows and returned {outcome.batch.num_rows} rows, "
            f"{len(outcome.reasons)} reasons, {len(outcome.details)} details; a stage returns one of each per row"
        )
    dropped: Counter[str] = Counter()
    dropped_bytes: Counter[str] = Counter()
    ids, paths = before.column("id").to_pylist(), before.column("path").to_pylist()
    row_bytes = sizes(before)
    for row, reason in enumerate(outcome.reasons):
        if reason is None:
            continue
        dropped[reason] += 1
        dropped_bytes[reason] += row_bytes[row]
        fate = Fate(ids[row], paths[row], stage, reason, outcome.details[row] or "")
        ledger.fates.setdefault(ids[row], []).append(fate)
    kept = outcome.batch.filter(pa.array([reason is None for reason in outcome.reasons], pa.bool_()))
    count = StageCount(
        stage, rows, num_text_bytes(before), kept.num_rows, num_text_bytes(kept), dict(dropped), dict(dropped_bytes)
    )
    ledger.stages.append(count)
    return kept


def merge_last(ledger: Ledger, num_counts: int) -> None:
    """Folds the last `num_counts` counts, which are batches of one stage, into one."""
    parts = ledger.stages[-num_counts:]
    assert parts and len({part.stage for part in parts}) == 1, "only batches of one stage can be folded"
    dropped: Counter[str] = Counter()
    dropped_bytes: Counter[str] = Counter()
    for part in parts:
        dropped.update(part.dropped)
        dropped_bytes.update(part.dropped_bytes)
    total = [sum(part[i] for part in parts) for i in range(1, 5)]
    ledger.stages[-num_counts:] = [StageCount(parts[0].stage, *total, dict(dropped), dict(dropped_bytes))]


def check(ledger: Ledger) -> None:
    """Raises RuntimeError naming the stage whose counts do not add up."""
    previous: StageCount | None = None
    for count in ledger.stages:
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
    named = sum(len(fates) for fates in ledger.fates.values())
    gone = sum(sum(count.dropped.values()) for count in ledger.stages)
    if named != gone:
        raise RuntimeError(f"ledger does not sum: {gone} documents dropped, {named} of them have a name and a reason")


def summary(ledger: Ledger) -> dict[str, Any]:
    """Plain data for JSON and reports: documents and bytes in and kept, dropped by stage and reason."""
    first, last = (ledger.stages[0], ledger.stages[-1]) if ledger.stages else (None, None)
    return {
        "documents_in": first.documents_in if first else 0,
        "bytes_in": first.bytes_in if first else 0,
        "documents_kept": last.documents_kept if last else 0,
        "bytes_kept": last.bytes_kept if last else 0,
        "documents_dropped": sum(sum(count.dropped.values()) for count in ledger.stages),
        "dropped": {
            count.stage: dict(sorted(count.dropped.items(), key=lambda item: (-item[1], item[0])))
            for count in ledger.stages
        },
        "rows_set_aside": dict(sorted(ledger.unreadable.items())),
        "stages": [count._asdict() for count in ledger.stages],
    }


def explain(ledger: Ledger, document_id: str) -> str:
    """One line: kept, or the stage, reason and values that dropped the document (an unambiguous id prefix will do)."""
    known = sorted({*ledger.fates, *ledger.kept_ids})
    found = [name for name in known if name.startswith(document_id)] if document_id else []
    if len(found) != 1:
        raise ValueError(
            f"document id {document_id!r} matches {len(found)} documents of this run; "
            f"give one of its {len(known)} ids, or a longer prefix"
        )
    fates = ledger.fates.get(found[0], [])
    lines = [f"{fate.id} {fate.path}: dropped by {fate.stage}: {fate.reason} ({fate.detail})" for fate in fates]
    return "\n".join(lines + ([f"{found[0]}: kept"] if found[0] in ledger.kept_ids else []))


def save(ledger: Ledger, folder: str | Path) -> None:
    """Writes ledger.json, and dropped.parquet with one row per dropped document; checks the sums first."""
    import pyarrow.parquet as pq

    check(ledger)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fates = sorted(fate for fates in ledger.fates.values() for fate in fates)
    table = pa.table({name: pa.array([fate[i] for fate in fates], pa.string()) for i, name in enumerate(Fate._fields)})
    pq.write_table(table, folder / "dropped.parquet")
    text = json.dumps(summary(ledger), indent=2, ensure_ascii=False) + "\n"
    temporary = folder / "ledger.json.partial"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(folder / "ledger.json")


def dropped_by_reason(ledger: Ledger) -> dict[str, int]:
    """Reason -> number of documents over all stages, the most frequent first."""
    total: Counter[str] = Counter()
    for count in ledger.stages:
        total.update(count.dropped)
    return dict(total.most_common())


def remember_kept(ledger: Ledger, documents: Iterable[Document]) -> None:
    """Enters the survivors, so that `explain` knows them."""
    ledger.kept_ids.update(document.id for document in documents)
