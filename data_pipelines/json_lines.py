"""Documents of JSONL in record batches: texts go from the file to Arrow as bytes and are never Python strings.

A file is read in blocks of whole lines. A compiled loop finds the lines and takes the text out of each; the rest, which
is small, is read as any row is. Where a line is in any way unusual (the text's field twice or written with escapes,
half a surrogate pair, bytes that are no UTF-8, an error), it and those read with it are left to
`readers.documents_of_lines`.
"""

import io
import math
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines import readers
from data_pipelines.chain import Sizes
from data_pipelines.document import SCHEMA, Document, document_id, meta_json, storable
from data_pipelines.readers import BadRow, File, Row

NEWLINE = ord("\n")


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
        if start:
            content.seek(start)
        for block in _blocks(content, stop - start if stop >= 0 else math.inf, sizes.batch_bytes):
            while block:
                lines = _lines(block, sizes.batch_rows)
                batch = None if lines is None else _batch(block, lines, file, first_line)
                if batch is None:
                    raw = bytes(block)
                    rest = readers.lines_of(file, io.BytesIO(raw), on_bad_row, first_line=first_line)
                    yield from readers.documents_of_lines(rest, file, on_bad_row)
                    first_line += raw.count(b"\n") + (not raw.endswith(b"\n"))
                    break
                yield batch
                block, first_line = block[lines.stop :], first_line + lines.number


def _blocks(content: BinaryIO, size: float, block_bytes: int) -> Iterator[memoryview]:
    """The next `size` bytes in blocks of whole lines, each written over by the next one. Where the file turns out to be
    damaged, the lines before that are given first. Of a line that is too long to be held there are MAX_ROW_BYTES or
    more.
    """
    block = memoryview(np.empty(block_bytes + block_bytes // 16, np.uint8))  # most often the rest of a line has room
    while size > 0:
        filled, wanted = 0, min(block_bytes, size)
        try:
            while filled < wanted and (count := content.readinto1(block[filled:wanted])):
                filled += count
            rest = b"" if filled and block[filled - 1] == NEWLINE else content.readline(readers.MAX_ROW_BYTES)
        except Exception:  # every decompression has kinds of its own
            yield block[: bytes(block[:filled]).rfind(b"\n") + 1]
            raise
        if not filled:
            return
        if filled + len(rest) > len(block):
            longer = memoryview(np.empty(filled + len(rest), np.uint8))
            longer[:filled] = block[:filled]
            block = longer
        block[filled : filled + len(rest)] = rest
        yield block[: filled + len(rest)]
        size -= filled + len(rest)
        while rest and not rest.endswith(b"\n"):
            rest = content.readline(readers.MAX_ROW_BYTES)
            size -= len(rest)


class Lines(NamedTuple):
    """Some lines of a block. texts: theirs, as one column. spans: of each that is not blank, its number among them; its
    first byte; start and stop of the JSON string that is its text; its last byte and one. number: of all; stop: where
    the next one begins.
    """

    texts: pa.Array
    spans: list[list[int]]
    number: int
    stop: int


def _lines(block: memoryview, most: int) -> Lines | None:
    """The first lines of a block, as many as are asked for; None where one of them is not settled by the compiled loop,
    or may be too long.
    """
    from data_pipelines import json_scan

    if len(block) > readers.MAX_ROW_BYTES:
        return None
    out, offsets = np.empty(len(block) + 64, np.uint8), np.zeros(most + 1, np.int64)
    spans = np.empty((most, 5), np.int64)
    found, number, stop = json_scan.put_texts(np.frombuffer(block, np.uint8), out, offsets, spans)
    if found < 0:
        return None
    buffers = pa.py_buffer(offsets[: found + 1]), pa.py_buffer(out[: offsets[found]])
    texts = pa.LargeStringArray.from_buffers(found, *buffers)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:  # bytes that are no UTF-8
        return None
    return Lines(texts, spans[:found].tolist(), number, stop)


def _batch(block: memoryview, lines: Lines, file: File, first_line: int) -> pa.RecordBatch | None:
    """The documents of the lines; None where one of them has to be read in the other way."""
    columns: dict[str, list[str | None]] = {field.name: [] for field in SCHEMA if field.name != "text"}
    content, bounds = memoryview(lines.texts.buffers()[2]), np.frombuffer(lines.texts.buffers()[1], np.int64).tolist()
    source_of_file = file.path.stem
    for place, (number, begin, start, stop, end) in enumerate(lines.spans):
        try:
            value = readers.parse_line(b"".join((block[begin:start], block[stop:end])))
            if not isinstance(value, dict):
                return None
            row = Row(f"{file.path}:{first_line + number}", value)
            path = readers.path_of_row(row, file)
            found = readers.described(row, path=path, source=source_of_file, on_bad_row=None)
        except (ValueError, RecursionError):
            return None
        source, path = storable(found.source), storable(found.path)
        text = content[bounds[place] : bounds[place + 1]]
        columns["id"].append(document_id(text, source=source, path=path))
        columns["source"].append(source)
        columns["path"].append(path)
        columns["domain"].append(found.domain)
        columns["language"].append(found.language)
        columns["licence"].append(found.licence)
        columns["meta"].append(meta_json(found.meta))
    arrays = [lines.texts if field.name == "text" else pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.record_batch(arrays, schema=SCHEMA)
