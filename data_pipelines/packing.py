"""Which pieces of which documents make each row of an epoch: a plan from document lengths alone, kept on disk.

D documents, R rows, P pieces (a part of a document in a row).
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Packing = Literal["concat", "whole"]

# Documents that are considered together when whole documents are fitted into rows.
_FIT_BLOCK = 8192
# From here on the fitting is compiled: below, numba's own start (about a second) would cost more than it saves.
_COMPILE_FROM = 20_000

_MAGIC = b"IJPLAN1\n"
_ARRAYS = ("first_R", "document_P", "start_P", "length_P")
_CHECK_BYTES = 1 << 24


class Plan(NamedTuple):
    """Rows of one epoch: row r holds the pieces first_R[r] .. first_R[r + 1] - 1."""

    first_R: np.ndarray
    """[R + 1] int64."""
    document_P: np.ndarray
    start_P: np.ndarray
    length_P: np.ndarray
    """Of every piece: positions (inputs with a target), not tokens. int32 where the numbers fit, else int64."""
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


def num_positions(lengths_D: np.ndarray, *, seq_len: int, packing: Packing) -> int:
    """Returns how many positions (inputs with a target) the packing can use of documents of these lengths."""
    return int((lengths_D[used(lengths_D, seq_len=seq_len, packing=packing)] - 1).sum())


def used(lengths_D: np.ndarray, *, seq_len: int, packing: Packing) -> np.ndarray:
    """Returns which documents of these lengths have a position, and fit a row where they stay whole."""
    return (lengths_D > 1) & ((lengths_D <= seq_len + 1) | (packing == "concat"))


def _with_rows(plan: Plan, rows_R: np.ndarray) -> Plan:
    """Returns the plan with its rows in the given order."""
    num_pieces_R = np.diff(plan.first_R)[rows_R]
    first_R = np.concatenate([[0], np.cumsum(num_pieces_R)])
    pieces = np.repeat(plan.first_R[:-1][rows_R] - first_R[:-1], num_pieces_R) + np.arange(first_R[-1])
    columns = (narrow(column)[pieces] for column in (plan.document_P, plan.start_P, plan.length_P))
    return Plan(first_R, *columns, plan.num_left_out)


def narrow(column: np.ndarray) -> np.ndarray:
    """Returns the column as int32 where its values fit: a plan of 10^9 pieces is 12 GB instead of 24."""
    return column.astype(np.int32 if column.max(initial=0) < 1 << 31 else np.int64)


def _concat(positions_D: np.ndarray, order: np.ndarray, seq_len: int) -> Plan:
    order = order[positions_D[order] > 0]
    num_left_out = len(positions_D) - len(order)
    ends = np.cumsum(positions_D[order])
    num_rows = int(ends[-1] // seq_len) if len(ends) else 0
    begins = ends - positions_D[order]
    used = int(np.searchsorted(begins, num_rows * seq_len))
    order, begins, ends = order[:used], begins[:used], np.minimum(ends[:used], num_rows * seq_len)
    # A document has a piece in every row that it reaches into.
    first_row = begins // seq_len
    num_pieces = (ends - 1) // seq_len - first_row + 1
    which = np.repeat(np.arange(used), num_pieces)
    row_P = np.repeat(first_row - (np.cumsum(num_pieces) - num_pieces), num_pieces) + np.arange(len(which))
    begin_P = np.maximum(begins[which], row_P * seq_len)
    length_P = np.minimum(ends[which], (row_P + 1) * seq_len) - begin_P
    first = np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=num_rows))])
    return Plan(first, order[which], begin_P - begins[which], length_P, num_left_out)


def _whole(positions_D: np.ndarray, order: np.ndarray, seq_len: int) -> Plan:
    fitting = order[(positions_D[order] > 0) & (positions_D[order] <= seq_len)]
    fit = _best_fit if len(fitting) < _COMPILE_FROM else _compiled_best_fit()
    placed, row_P, num_rows = [], np.empty(len(fitting), np.int64), 0
    for begin in range(0, len(fitting), _FIT_BLOCK):
        block = fitting[begin : begin + _FIT_BLOCK]
        block = block[np.argsort(-positions_D[block], kind="stable")]
        rows = row_P[begin : begin + len(block)]
        opened = fit(positions_D[block], seq_len, rows)
        rows += num_rows
        num_rows += opened
        placed.append(block)
    documents = np.concatenate(placed) if placed else np.zeros(0, np.int64)
    documents = documents[np.argsort(row_P, kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(row_P, minlength=num_rows))])
    starts = np.zeros(len(documents), np.int64)
    return Plan(first, documents, starts, positions_D[documents], len(positions_D) - len(fitting))


def _best_fit(sizes, seq_len, rows):
    """Fills rows[d] with the row of each document, taken in this order, and returns the number of rows.

    A document goes to the row with the least space that still holds it (of equal ones the first opened), else to a new
    row. Runs as plain Python and compiled. Keys are space and row in one integer, sorted: the row is found by
    bisection, and since its space shrinks, only keys before it move.
    """
    keys = np.empty(sizes.shape[0], np.int64)
    num_rows = 0
    for d in range(sizes.shape[0]):
        size = sizes[d]
        at, high = 0, num_rows
        while at < high:
            middle = (at + high) // 2
            if keys[middle] < size << 32:
                at = middle + 1
            else:
                high = middle
        if at < num_rows:
            space, row = keys[at] >> 32, keys[at] & 0xFFFFFFFF
        else:
            space, row = seq_len, num_rows
            num_rows += 1
        rows[d] = row
        key = ((space - size) << 32) | row
        new, high = 0, at
        while new < high:
            middle = (new + high) // 2
            if keys[middle] < key:
                new = middle + 1
            else:
                high = middle
        keys[new + 1 : at + 1] = keys[new:at].copy()
        keys[new] = key
    return num_rows


@functools.cache
def _compiled_best_fit():
    import numba

    return numba.njit(cache=True, nogil=True)(_best_fit)


def kept_plan(folder: Path, key: Mapping[str, Any], make: Callable[[], Plan]) -> Plan:
    """Returns the plan that `folder` holds under `key`, else make()'s, which is then kept there.

    Of several processes that ask at once, one plans and the others wait for it. A file that is torn, altered or of
    another key is told and replaced. Where the folder cannot be written, the plan stays in memory. A kept plan is
    memory-mapped, so processes of one machine share it.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{name}.plan"
    if (plan := _read(path, key)) is not None:
        return plan
    with _only_one(folder):
        if (plan := _read(path, key)) is not None:
            return plan
        plan = make()
        # Without the room or the right to keep it, everything goes on; only the next process plans again.
        with contextlib.suppress(OSError):
            _write(path, key, plan)
        return plan


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system frees when a process dies; goes on without where there is none."""
    import fcntl

    try:
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _write(path: Path, key: Mapping[str, Any], plan: Plan) -> None:
    arrays = [np.ascontiguousarray(getattr(plan, name)) for name in _ARRAYS]
    header = {
        "key": dict(key),
        "num_left_out": plan.num_left_out,
        "arrays": [[array.dtype.str, len(array), _checksum(array)] for array in arrays],
    }
    head = _MAGIC + json.dumps(header, sort_keys=True).encode()
    head += b" " * (-(len(head) + 1) % 64) + b"\n"  # arrays begin at multiples of 8 bytes
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with new.open("wb") as file:
            file.write(head)
            for array in sorted(arrays, key=lambda array: -array.itemsize):
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def _read(path: Path, key: Mapping[str, Any]) -> Plan | None:
    """Returns the plan in the file; None where there is none, and with a message where it is not as written."""
    try:
        with path.open("rb") as file:
            if file.readline() != _MAGIC:
                raise ValueError("it is no plan")
            header = json.loads(file.readline())
            if header["key"] != json.loads(json.dumps(dict(key))):
                raise ValueError("it belongs to other data")
            at, arrays = file.tell(), {}
            described = dict(zip(_ARRAYS, header["arrays"], strict=True))
        if not {kind for kind, _, _ in described.values()} <= {"<i4", "<i8"}:
            raise ValueError("its arrays are no integers")
        for name, (kind, size, checksum) in sorted(described.items(), key=lambda item: -np.dtype(item[1][0]).itemsize):
            arrays[name] = np.asarray(np.memmap(path, kind, "r", offset=at, shape=(size,)))
            at += arrays[name].nbytes
            if _checksum(arrays[name]) != checksum:
                raise ValueError(f"the checksum of {name} differs")
        return Plan(**arrays, num_left_out=int(header["num_left_out"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"the packing plan {path} cannot be used ({error}); it is planned anew", file=sys.stderr)
        return None


def _checksum(array: np.ndarray) -> int:
    raw, value = array.view(np.uint8), 0
    for begin in range(0, len(raw), _CHECK_BYTES):
        value = zlib.crc32(raw[begin : begin + _CHECK_BYTES], value)
    return value
