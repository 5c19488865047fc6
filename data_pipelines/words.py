"""Words of a batch, found once for all stages that ask for them one after another."""

import threading
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import text_buffer


class Words(NamedTuple):
    """Hash, bytes and flags of every word of a batch; those of row d lie at starts[d]:starts[d + 1]."""

    hashes: np.ndarray
    lengths: np.ndarray
    flags: np.ndarray
    starts: np.ndarray


class Spans(NamedTuple):
    """Hash of every word; those of row d lie at starts[d]:stops[d]. Other words may lie between."""

    hashes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray


class _Known(NamedTuple):
    """A column of texts, and the words of another one of which it is these rows (None: it is that column)."""

    texts: pa.Array
    words: Words
    rows: np.ndarray | None


_last = threading.local()


def find_words(batch: pa.RecordBatch) -> Words:
    """Returns the words of every row, as `kernels.words` defines a word.

    Where this thread found them last for the same column, or for one that it was made from (`follow`), they are given
    again; they are in memory until then.
    """
    known = _known(batch)
    if known is None:
        words = _found(batch)
    elif known.rows is None:
        return known.words
    else:
        words = _of_rows(known.words, known.rows)
    _last.known = _Known(batch.column("text"), words, None)
    return words


def find_spans(batch: pa.RecordBatch) -> Spans:
    """`find_words` for what needs hashes alone: where rows follow others, they are not copied."""
    known = _known(batch)
    if known is None or known.rows is None:
        words = find_words(batch)
        return Spans(words.hashes, words.starts[:-1], words.starts[1:])
    return Spans(known.words.hashes, known.words.starts[known.rows], known.words.starts[known.rows + 1])


def follow(before: pa.RecordBatch, rows: np.ndarray, after: pa.RecordBatch) -> None:
    """Says that `after` has the texts of these rows, ascending, of `before`."""
    known = _known(before)
    if known is not None:
        rows = rows if known.rows is None else known.rows[rows]
        _last.known = _Known(after.column("text"), known.words, rows)


def forget() -> None:
    """Lets the memory go."""
    _last.known = None


def _known(batch: pa.RecordBatch) -> _Known | None:
    known = getattr(_last, "known", None)
    return known if known is not None and _place(known.texts) == _place(batch.column("text")) else None


def _place(texts: pa.Array) -> tuple[int, ...]:
    """Where the texts lie in memory; as long as a column is held, no other one has its place."""
    return len(texts), texts.offset, *(0 if buffer is None else buffer.address for buffer in texts.buffers())


def _found(batch: pa.RecordBatch) -> Words:
    from data_pipelines import kernels

    data, offsets = text_buffer(batch)
    size = 2 * int(offsets[-1] - offsets[0]) // 3 + 2
    hashes, lengths, flags = np.empty(size, np.uint64), np.empty(size, np.int32), np.empty(size, np.uint8)
    starts = np.zeros(len(offsets), np.int64)
    found = kernels.words(data, offsets, hashes, lengths, flags, starts)
    return Words(hashes[:found], lengths[:found], flags[:found], starts)


def _of_rows(words: Words, rows: np.ndarray) -> Words:
    first = words.starts[rows]
    starts = np.concatenate([[0], np.cumsum(words.starts[rows + 1] - first)])
    spans = list(zip(first.tolist(), words.starts[rows + 1].tolist(), strict=True))
    columns = [np.concatenate([np.zeros(0, each.dtype), *(each[a:b] for a, b in spans)]) for each in words[:3]]
    return Words(*columns, starts)
