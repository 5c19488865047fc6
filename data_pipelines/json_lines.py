"""Documents of JSONL in record batches: texts go from the file to Arrow as bytes and are never Python strings.

A compiled loop takes the text out of each line; the rest, which is small, is read as any row is. Where a line is in any
way unusual (the text's field twice or written with escapes, half a surrogate pair, bytes that are no UTF-8, an error),
it and those read with it are left to `readers.documents_of_lines`.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines import readers
from data_pipelines.chain import Sizes
from data_pipelines.document import SCHEMA, Document, document_id, meta_json, storable
from data_pipelines.readers import BadRow, File, Line, Row


def row_batches(
    file: File,
    *,
    on_bad_row: BadRow = None,
    start: int = 0,
    stop: int = -1,
    first_line: int = 1,
    sizes: Sizes = Sizes(),
) -> Iterator[Document | pa.RecordBatch]:
    """What `readers.row_documents` gives, most of it, of a .jsonl, in record batches of the sizes."""
    if readers.uncompressed_suffix(file.path) == ".json":
        yield from readers.row_documents(file, on_bad_row=on_bad_row)
        return
    with readers.opened(file) as content:
        lines = readers.lines_of(file, content, on_bad_row, start=start, stop=stop, first_line=first_line)
        for some in _together(lines, sizes):
            batch = _batch(some, file)
            if batch is None:
                yield from readers.documents_of_lines(some, file, on_bad_row)
            else:
                some.clear()  # they need not be in memory beside their batch
                yield batch


def _together(lines: Iterable[Line], sizes: Sizes) -> Iterator[list[Line]]:
    """The lines in lists of the sizes, all of the last line besides. Where their file turns out to be damaged, those
    before that are given first.
    """
    lines, goes_on = iter(lines), True
    while goes_on:
        some: list[Line] = []
        size, damage, goes_on = 0, None, False
        try:
            for line in lines:
                some.append(line)
                size += len(line.raw)
                if size >= sizes.batch_bytes or len(some) >= sizes.batch_rows:
                    goes_on = True
                    break
        except Exception as error:  # every decompression has kinds of its own
            damage = error
        if some:
            yield some
        if damage is not None:
            raise damage


class Texts(NamedTuple):
    """The texts of some lines as one column, and the start and stop of each one's JSON string in its line."""

    column: pa.Array
    spans: np.ndarray


def _texts(lines: Sequence[Line]) -> Texts | None:
    """None where one of them is not settled by the compiled loop."""
    from data_pipelines import json_scan

    data = np.frombuffer(b"".join([line.raw for line in lines]), np.uint8)
    offsets = np.cumsum([0, *(len(line.raw) for line in lines)])
    out = np.empty(len(data) + 64, np.uint8)
    out_offsets, spans = np.zeros(len(offsets), np.int64), np.zeros((len(lines), 2), np.int64)
    if not json_scan.put_texts(data, offsets, out, out_offsets, spans):
        return None
    buffers = pa.py_buffer(out_offsets), pa.py_buffer(out[: out_offsets[-1]])
    column = pa.LargeStringArray.from_buffers(len(lines), *buffers)
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:  # bytes that are no UTF-8
        return None
    return Texts(column, spans)


def _batch(lines: Sequence[Line], file: File) -> pa.RecordBatch | None:
    """The documents of the lines; None where one of them has to be read in the other way."""
    texts = _texts(lines)
    if texts is None:
        return None
    columns: dict[str, list[str | None]] = {field.name: [] for field in SCHEMA if field.name != "text"}
    content, bounds = memoryview(texts.column.buffers()[2]), np.frombuffer(texts.column.buffers()[1], np.int64).tolist()
    source_of_file = file.path.stem
    for number, (line, (start, stop)) in enumerate(zip(lines, texts.spans.tolist(), strict=True)):
        try:
            row = Row(line.place, readers.parse_line(line.raw[:start] + line.raw[stop:]))
            if not isinstance(row.value, dict):
                return None
            path = readers.path_of_row(row, file)
            found = readers.described(row, path=path, source=source_of_file, on_bad_row=None)
        except (ValueError, RecursionError):
            return None
        source, path = storable(found.source), storable(found.path)
        text = content[bounds[number] : bounds[number + 1]]
        columns["id"].append(document_id(text, source=source, path=path))
        columns["source"].append(source)
        columns["path"].append(path)
        columns["domain"].append(found.domain)
        columns["language"].append(found.language)
        columns["licence"].append(found.licence)
        columns["meta"].append(meta_json(found.meta))
    arrays = [texts.column if field.name == "text" else pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)
