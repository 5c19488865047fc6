"""What a corpus stage decided, on disk: a file for every part of the corpus, and what it does to the part's documents.

N.arrow          rows of part N that go, with reason and detail
N.changes.arrow  rows of part N that are changed, with the new values (absent where there are none)
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.document import SCHEMA, Decision, Outcome

DECISION = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())])


def write_decision(decision: Decision, firsts: np.ndarray, folder: Path) -> None:
    """Writes the file or two of each part. firsts: the number in the corpus of each part's first document, and of all.

    Raises ValueError where a change has another type than its column.
    """
    bounds = np.searchsorted(decision.rows, firsts)
    for number, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        columns = [
            pa.array(decision.rows[start:stop] - firsts[number], pa.int64()),
            pa.array(decision.reasons[start:stop], pa.string()),
            pa.array(decision.details[start:stop], pa.string()),
        ]
        with pa.ipc.new_file(str(folder / f"{number}.arrow"), DECISION) as writer:
            writer.write_table(pa.table(columns, schema=DECISION))
    if decision.changes is not None:
        _write_changes(decision.changes, firsts, folder)


def _write_changes(changes: pa.RecordBatch, firsts: np.ndarray, folder: Path) -> None:
    for name in changes.schema.names:
        if name != "row" and changes.schema.field(name).type != SCHEMA.field(name).type:
            raise ValueError(
                f"column {name!r} would become {changes.schema.field(name).type}; wanted {SCHEMA.field(name)}"
            )
    place = changes.schema.get_field_index("row")
    rows = changes.column("row").to_numpy()
    bounds = np.searchsorted(rows, firsts)
    for number, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        if start < stop:
            own = pa.array(rows[start:stop] - firsts[number], pa.int64())
            batch = changes.slice(start, stop - start).set_column(place, "row", own)
            with pa.ipc.new_file(str(folder / f"{number}.changes.arrow"), batch.schema) as writer:
                writer.write_batch(batch)


def file_batches(path: Path) -> list[pa.RecordBatch]:
    """The batches of an Arrow file, memory-mapped: what is not looked at is not read."""
    with pa.memory_map(str(path)) as file:  # the mapping lives as long as the batches; the file is closed at once
        reader = pa.ipc.open_file(file)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def read_decision(path: Path) -> pa.Table:
    """The rows of a part that go."""
    return pa.Table.from_batches(file_batches(path), DECISION)


def read_changes(path: Path) -> pa.Table | None:
    """The rows that the decision at `path` changes; None where there are none."""
    written = path.with_suffix(".changes.arrow")
    return pa.Table.from_batches(file_batches(written)) if written.is_file() else None


def rows_gone(paths: Sequence[Path]) -> np.ndarray:
    """The rows of a part that any of its decisions drops, ascending, each once."""
    rows = [read_decision(path).column("row").to_numpy() for path in paths]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


def outcome_of(batch: pa.RecordBatch, rows: np.ndarray, drops: pa.Table, changes: pa.Table | None) -> Outcome:
    """What a decision makes of a batch, whose rows are these of the part."""
    reasons: list[str | None] = [None] * batch.num_rows
    details: list[str | None] = [None] * batch.num_rows
    for at, found in zip(*_places(rows, drops)):
        reasons[at], details[at] = drops.column("reason")[found].as_py(), drops.column("detail")[found].as_py()
    return Outcome(batch if changes is None else _changed(batch, rows, changes), reasons, details)


def _changed(batch: pa.RecordBatch, rows: np.ndarray, changes: pa.Table) -> pa.RecordBatch:
    at, found = _places(rows, changes)
    where = np.arange(batch.num_rows)
    where[at] = batch.num_rows + np.arange(len(at))
    for name in changes.column_names:
        if name != "row":
            both = pa.chunked_array(
                [batch.column(name), *changes.column(name).take(pa.array(found, pa.int64())).chunks]
            )
            column = both.take(pa.array(where)).combine_chunks()
            place = SCHEMA.get_field_index(name)
            batch = batch.set_column(place, SCHEMA.field(name), column)
    return batch


def _places(rows: np.ndarray, held: pa.Table) -> tuple[list[int], list[int]]:
    """Where those of `rows` that the decision names stand in `rows`, and in the decision."""
    _, at, found = np.intersect1d(rows, held.column("row").to_numpy(), assume_unique=True, return_indices=True)
    return at.tolist(), found.tolist()
