"""Documents of parquet and Arrow files, a batch of rows in memory at a time.

A row that cannot be read raises ValueError "file:row: reason", or its message is handed to `on_bad_row` and it is left
out, as in `readers.py`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from data_pipelines.document import SCHEMA, Document, to_documents
from data_pipelines.readers import MAX_ARRAY_BYTES, TEXT_FIELDS, BadRow, File, Row, document_of_row, read_bytes


def parquet_documents(
    file: File, *, on_bad_row: BadRow = None, start: int = 0, stop: int = -1, first_row: int = 1
) -> Iterator[Document]:
    """A document per row of a parquet file (row groups start:stop; stop -1: to the last)."""
    table = open_parquet(file)
    groups = range(start, table.num_row_groups if stop < 0 else stop)
    batches = table.iter_batches(256, row_groups=list(groups))
    yield from _batch_documents(file, batches, table.schema_arrow, on_bad_row, first_row)


def arrow_documents(file: File, *, on_bad_row: BadRow = None) -> Iterator[Document]:
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
    small = (batch.slice(row, 256) for batch in batches for row in range(0, batch.num_rows, 256))
    yield from _batch_documents(file, small, reader.schema, on_bad_row, 1)


def open_parquet(file: File) -> Any:
    """A `pyarrow.parquet.ParquetFile`, or ValueError where the file is none."""
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file.path if file.stream is None else pa.BufferReader(_whole(file)))
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


def _batch_documents(
    file: File, batches: Iterable[pa.RecordBatch], schema: pa.Schema, on_bad_row: BadRow, first_row: int
) -> Iterator[Document]:
    """A document per row. Rows of this project's own schema are taken as they are, with their ids."""
    if not TEXT_FIELDS & set(schema.names):
        raise ValueError(f"{file.path}: no column 'text' or 'content'; it has {', '.join(schema.names)}")
    row = first_row - 1
    try:
        for batch in batches:
            if batch.schema.equals(SCHEMA):
                row += batch.num_rows
                yield from to_documents(batch)
                continue
            for fields in batch.to_pylist():
                row += 1
                found, path = Row(f"{file.path}:{row}", fields), f"{file.name}:{row}"
                yield from document_of_row(found, path=path, source=file.path.stem, on_bad_row=on_bad_row)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path}:{row + 1}: damaged from here on ({error}); copy the file again") from error
