"""From token folders to training batches: a packing plan computed from lengths alone, read by Grain.

The sequence of batches is a function of (folder, sizes, seed) and of the absolute step: `batches(...)(step)` gives the
same batches whether a run began there or came there. A document of n tokens gives n - 1 positions, each an input with
the next token as its target; a position never predicts across two documents.

D documents, R rows, B rows of a batch, T tokens of a row.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from data_pipelines.tokens import TokenFolder, open_tokens
from internjax.train.batch import Batch

Packing = Literal["concat", "whole"]

# Documents that are considered together when whole documents are fitted into rows.
_FIT_BLOCK = 8192
_ENDLESS = 1 << 40


class Plan(NamedTuple):
    """Rows of one epoch: row r holds the pieces first_R[r] .. first_R[r + 1] - 1."""

    first_R: np.ndarray
    """[R + 1] int64."""
    document_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    """Of every piece: positions (inputs with a target), not tokens."""
    num_left_out: int
    """Documents that fit no row, or have no position."""

    @property
    def num_rows(self) -> int:
        return len(self.first_R) - 1


def plan_rows(lengths_D: np.ndarray, *, seq_len: int, packing: Packing, seed: int, epoch: int) -> Plan:
    """Returns the rows of an epoch from document lengths (in tokens) alone.

    concat: documents in random order end to end, cut at row ends; every row is full, a last incomplete one is left for
    the next epoch's order. whole: no document is cut; best fit, largest first, within blocks of the random order.
    The rows are shuffled after that, so that a batch does not hold neighbouring parts of one long document. Raises
    ValueError when no row results.
    """
    positions_D = np.maximum(np.asarray(lengths_D, np.int64) - 1, 0)
    order = np.random.default_rng((seed, epoch)).permutation(len(positions_D))
    if packing == "concat":
        plan = _concat(positions_D, order, seq_len)
    elif packing == "whole":
        plan = _whole(positions_D, order, seq_len)
    else:
        raise ValueError(f"unknown packing {packing!r}; known: concat, whole")
    if plan.num_rows == 0:
        wanted = "a shorter seq_len or more text" if packing == "concat" else "a longer seq_len"
        raise ValueError(
            f"no row of {seq_len} tokens results from {len(lengths_D)} documents with {int(positions_D.sum())} "
            f"positions in all (longest {int(positions_D.max(initial=0))}); give {wanted}"
        )
    return _with_rows(plan, np.random.default_rng((seed, epoch, 1)).permutation(plan.num_rows))


def _with_rows(plan: Plan, rows_R: np.ndarray) -> Plan:
    """Returns the plan with its rows in the given order."""
    num_pieces_R = np.diff(plan.first_R)[rows_R]
    first_R = np.concatenate([[0], np.cumsum(num_pieces_R)])
    pieces = np.repeat(plan.first_R[:-1][rows_R] - first_R[:-1], num_pieces_R) + np.arange(first_R[-1])
    return Plan(first_R, plan.document_P[pieces], plan.start_P[pieces], plan.length_P[pieces], plan.num_left_out)


def _concat(positions_D: np.ndarray, order: np.ndarray, seq_len: int) -> Plan:
    order = order[positions_D[order] > 0]
    ends = np.cumsum(positions_D[order])
    num_rows = int(ends[-1] // seq_len) if len(ends) else 0
    total = num_rows * seq_len
    # A piece ends where a document ends or a row ends.
    cuts = np.unique(np.concatenate([ends[ends < total], np.arange(1, num_rows + 1) * seq_len])).astype(np.int64)
    begins = np.concatenate([[0], cuts[:-1]]) if len(cuts) else cuts
    which = np.searchsorted(ends, begins, side="right")
    starts = begins - (ends - positions_D[order])[which] if len(cuts) else begins
    first = np.searchsorted(begins, np.arange(num_rows + 1) * seq_len)
    return Plan(first, order[which], starts, cuts - begins, len(positions_D) - len(order))


def _whole(positions_D: np.ndarray, order: np.ndarray, seq_len: int) -> Plan:
    import bisect

    fitting = order[(positions_D[order] > 0) & (positions_D[order] <= seq_len)]
    rows: list[list[int]] = []
    for begin in range(0, len(fitting), _FIT_BLOCK):
        block = fitting[begin : begin + _FIT_BLOCK]
        open_rows: list[tuple[int, int]] = []  # (space left, row), sorted
        for document in block[np.argsort(-positions_D[block], kind="stable")]:
            size = int(positions_D[document])
            at = bisect.bisect_left(open_rows, (size, -1))
            if at < len(open_rows):
                space, row = open_rows.pop(at)
            else:
                space, row = seq_len, len(rows)
                rows.append([])
            rows[row].append(int(document))
            bisect.insort(open_rows, (space - size, row))
    documents = np.array([document for row in rows for document in row], np.int64)
    first = np.cumsum([0, *(len(row) for row in rows)])
    lengths = positions_D[documents] if len(documents) else np.zeros(0, np.int64)
    return Plan(first, documents, np.zeros(len(documents), np.int64), lengths, len(positions_D) - len(fitting))


class Rows:
    """Endless rows of a token folder, epoch after epoch, each with its own order; random access for Grain."""

    def __init__(self, folder: TokenFolder, *, seq_len: int, packing: Packing, seed: int):
        self.folder = folder
        self.seq_len = seq_len
        self._plan = functools.lru_cache(maxsize=2)(
            lambda epoch: plan_rows(folder.lengths_D, seq_len=seq_len, packing=packing, seed=seed, epoch=epoch)
        )
        self._first_row = [0]  # of every epoch planned so far
        self._lock = threading.Lock()  # Grain's threads come to a new epoch at the same time

    def plan(self, epoch: int) -> Plan:
        """Returns the packing plan of an epoch."""
        return self._plan(epoch)

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        with self._lock:
            while index >= self._first_row[-1]:
                self._first_row.append(self._first_row[-1] + self.plan(len(self._first_row) - 1).num_rows)
            epoch = int(np.searchsorted(self._first_row, index, side="right")) - 1
            plan = self.plan(epoch)
        return self._row(plan, index - self._first_row[epoch])

    def _row(self, plan: Plan, row: int) -> dict[str, np.ndarray]:
        T = self.seq_len
        tokens, targets = np.zeros(T, np.int32), np.zeros(T, np.int32)
        loss_mask, positions = np.zeros(T, np.float32), np.zeros(T, np.int32)
        segments = np.zeros(T, np.int32)
        at = 0
        for segment, piece in enumerate(range(plan.first_R[row], plan.first_R[row + 1]), 1):
            document, start, length = int(plan.document_P[piece]), int(plan.start_P[piece]), int(plan.length_P[piece])
            ids, mask = self.folder.document(document), self.folder.mask(document)
            here = slice(at, at + length)
            tokens[here] = ids[start : start + length]
            targets[here] = ids[start + 1 : start + length + 1]
            loss_mask[here] = 1.0 if mask is None else mask[start + 1 : start + length + 1]
            positions[here] = np.arange(length)
            segments[here] = segment
            at += length
        return Batch(tokens, targets, loss_mask, positions, segments)._asdict()


def open_rows(
    folder: str | os.PathLike, *, seq_len: int, packing: Packing, seed: int, tokenizer_sha256: str | None = None
) -> Rows:
    """Returns the rows of a token folder; `rows.plan(0)` tells how many an epoch has and what was left out."""
    return Rows(open_tokens(folder, tokenizer_sha256=tokenizer_sha256), seq_len=seq_len, packing=packing, seed=seed)


def batches(
    rows: Rows, *, batch_size: int, num_threads: int = 2, prefetch: int = 16
) -> Callable[[int], Iterator[Batch]]:
    """Returns step -> the batches `[B, T]` from that absolute step on, read ahead by Grain's threads."""
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, given {batch_size}")

    def from_step(step: int) -> Iterator[Batch]:
        dataset = grain.MapDataset.source(rows)[step * batch_size :].batch(batch_size)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        for batch in dataset.to_iter_dataset(options):
            yield Batch(**batch)

    return from_step
