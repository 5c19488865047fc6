"""Rows and documents of parquet and Arrow files, a batch of rows in memory at a time.

A row that cannot be read raises ValueError "file:row: reason", or its message is handed to `on_bad_row` and it is left
out, as in `readers.py`. What damages the file itself ends it: the rows before that are given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from data_pipelines import readers
from data_pipelines.chain import Sizes
from data_pipelines.document import SCHEMA, Document, to_documents
from data_pipelines.readers import MAX_ARRAY_BYTES, TEXT_FIELDS, BadRow, File, Row, read_bytes, set_aside

BATCH_ROWS = 256
"""Most rows that are Python objects at a time."""
UNREADABLE = (ValueError, ArithmeticError, LookupError, pa.ArrowException)
"""Of a row with a date that Python has none for, or a time zone that nobody knows."""


class Numbered(NamedTuple):
    """A row of a file, the first being 1, as what it was made."""

    number: int
    value: Any


def parquet_documents(
    file: File, *, on_bad_row: BadRow = None, start: int = 0, stop: int = -1, first_row: int = 1, sizes: Sizes = Sizes()
) -> Iterator[Document]:
    """A document per row of a parquet file (row groups start:stop; stop -1: to the last)."""
    table = open_parquet(file)
    groups = range(start, table.num_row_groups if stop < 0 else stop)
    batches = _parquet_batches(file, table, groups, sizes)
    yield from _documents(file, batches, table.schema_arrow, on_bad_row, first_row, sizes)


def arrow_documents(file: File, *, on_bad_row: BadRow = None, sizes: Sizes = Sizes()) -> Iterator[Document]:
    """A document per row of an Arrow file or stream, such as the `datasets` library saves."""
    try:
        source = pa.memory_map(str(file.path)) if file.stream is None else pa.BufferReader(_whole(file))
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path}: not a readable Arrow file ({error}); copy it again, or give a .jsonl") from None
    # A stream is cut off where its next batch is asked for.
    batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    yield from _documents(file, batches, reader.schema, on_bad_row, 1, sizes)


def parquet_rows(file: File, *, on_bad_row: BadRow = None, sizes: Sizes = Sizes()) -> Iterator[Row]:
    """The rows of a parquet file with "file:row"."""
    table = open_parquet(file)
    batches = _parquet_batches(file, table, range(table.num_row_groups), sizes)
    for number, fields in _rows(file, batches, pa.RecordBatch.to_pylist, on_bad_row, 1, sizes):
        yield Row(f"{file.path}:{number}", fields)


def open_parquet(file: File) -> Any:
    """A `pyarrow.parquet.ParquetFile`, or ValueError where the file is none."""
    import pyarrow.parquet as pq

    try:
        # Through a buffer, because otherwise whole columns of a row group are read, which may be as large as the file.
        return pq.ParquetFile(
            file.path if file.stream is None else pa.BufferReader(_whole(file)),
            pre_buffer=False,
            buffer_size=readers.BUFFER_BYTES,
        )
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file.path}: not a readable parquet file ({error}); copy it again, or give a .jsonl"
        ) from None


def _whole(file: File) -> bytes:
    """The bytes of a member of an archive whose format is not read from front to back."""
    raw = read_bytes(file.stream, MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        raise ValueError(f"{file.path}: more than {MAX_ARRAY_BYTES} bytes; take it out of its archive")
    return raw


def _parquet_batches(file: File, table: Any, groups: Sequence[int], sizes: Sizes) -> Iterator[pa.RecordBatch]:
    """Batches of as many rows as `sizes.batch_bytes` holds in the row group where they are longest."""
    about = [table.metadata.row_group(group) for group in groups]
    longest = max((group.total_byte_size / max(group.num_rows, 1) for group in about), default=0)
    num_rows = int(min(sizes.batch_bytes / max(longest, 1), BATCH_ROWS))
    read, total = 0, max(table.metadata.num_rows, 1)
    if file.reading is not None:
        file.reading.position = lambda: file.reading.size * read // total
    for batch in table.iter_batches(max(num_rows, 1), row_groups=list(groups)):
        read += batch.num_rows
        yield batch


def _documents(
    file: File,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    on_bad_row: BadRow,
    first_row: int,
    sizes: Sizes,
) -> Iterator[Document]:
    """A document per row. Rows of this project's own schema are taken as they are, with their ids."""
    if not TEXT_FIELDS & set(schema.names):
        raise ValueError(f"{file.path}: no column 'text' or 'content'; it has {', '.join(schema.names)}")
    if schema.equals(SCHEMA):
        for _, document in _rows(file, batches, to_documents, on_bad_row, first_row, sizes):
            yield document
        return
    for number, fields in _rows(file, batches, pa.RecordBatch.to_pylist, on_bad_row, first_row, sizes):
        row, path = Row(f"{file.path}:{number}", fields), f"{file.name}:{number}"
        yield from readers.document_of_row(row, path=path, source=file.path.stem, on_bad_row=on_bad_row)


def _rows(
    file: File,
    batches: Iterable[pa.RecordBatch],
    made: Callable[[pa.RecordBatch], list[Any]],
    on_bad_row: BadRow,
    first_row: int,
    sizes: Sizes,
) -> Iterator[Numbered]:
    """What `made` makes of the rows, `sizes.batch_bytes` of them at a time; those that it cannot make are set aside."""
    number = first_row
    try:
        for batch in batches:
            waiting = [batch]
            while waiting:
                batch = waiting.pop()
                values = _values(batch, made, sizes)
                if isinstance(values, list):
                    for value in values:
                        yield Numbered(number, value)
                        number += 1
                elif batch.num_rows > 1:
                    half = batch.num_rows // 2
                    waiting += [batch.slice(half), batch.slice(0, half)]
                else:
                    set_aside(f"{file.path}:{number}: {values}", on_bad_row)
                    number += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path}:{number}: damaged from here on ({error}); copy the file again") from error


def _values(batch: pa.RecordBatch, made: Callable[[pa.RecordBatch], list[Any]], sizes: Sizes) -> list[Any] | str:
    """What is made of the rows; or why not, of more than one row perhaps only that they are too many for one time."""
    if batch.num_rows > BATCH_ROWS:
        return "too many rows"
    batch.validate()  # of a damaged Arrow file, texts may begin or end outside of it
    size = sum(
        (column.indices if isinstance(column, pa.DictionaryArray) else column).nbytes for column in batch.columns
    )
    if size > (min(sizes.batch_bytes, readers.MAX_ROW_BYTES) if batch.num_rows > 1 else readers.MAX_ROW_BYTES):
        return f"a row of {size} bytes, more than {readers.MAX_ROW_BYTES}; split it"
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            return f"cannot be read (column {name!r}: {error}); mend the row, or leave it out"
    try:
        return made(batch)
    except UNREADABLE as error:
        return f"cannot be read ({error}); mend the row, or leave it out"
