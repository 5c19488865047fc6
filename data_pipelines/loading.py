"""From token folders to training batches: one or several sources, packed by plan, read ahead by Grain.

The sequence of batches is a function of (folders, limits, weights, sizes, seed) and of the absolute step: neither
processes, threads nor mesh change it, and `batches(...)(step)` gives the same batches whether a run began there or
came there. A document of n tokens gives n - 1 positions, each an input with the next token as its target; a position
never predicts across two documents. An epoch of a folder reads every document once, or as often as the folder says.

D documents, R rows, B rows of a batch, T tokens of a row.
"""

import bisect
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data_pipelines import packing
from data_pipelines.packing import Packing, Plan
from data_pipelines.shards import Shards, document_ids
from data_pipelines.tokens import DOCUMENTS, TokenFolder, open_tokens
from internjax.train.batch import Batch

ENDLESS = 1 << 40
"""Length of the rows: they go on epoch after epoch."""
# Token files are read through at opening up to this size, about a second's work; see `open_folder`.
_READ_THROUGH = 1 << 30
# Smaller folders are planned in less than the time that a file takes.
_KEEP_PLANS_FROM = 1 << 20


class Piece(NamedTuple):
    """A part of a document in a row: `length` positions from its token `start` on."""

    folder: TokenFolder
    document: int
    start: int
    length: int


class PackedRows(Protocol):
    """What batches are made of: rows by absolute number (`Rows` of one folder, `mixing.Mixture` of several)."""

    seq_len: int
    vocab_size: int

    def pieces(self, index: int) -> list[Piece]:
        """Returns what row `index` (counted from the run's beginning) is made of, in order."""
        ...

    def fill(self, index: int, batch: Batch, b: int) -> None:
        """Writes row `index` into row b of a batch of zeros."""
        ...


class Rows:
    """Endless rows of a token folder, epoch after epoch, each with its own order; random access by absolute row."""

    def __init__(
        self,
        folder: TokenFolder,
        *,
        seq_len: int,
        packing: Packing,
        seed: int,
        min_tokens: int = 0,
        max_tokens: int = 0,
        max_epochs: float = 0.0,
    ):
        if min_tokens < 0 or max_tokens < 0 or not max_epochs >= 0:
            raise ValueError(
                f"min_tokens, max_tokens and max_epochs are 0 (no limit) or more, given {min_tokens}, {max_tokens} "
                f"and {max_epochs} for {folder.path}"
            )
        self.folder = folder
        self.seq_len = seq_len
        self.vocab_size: int = folder.manifest["vocab_size"]
        self.packing: Packing = packing
        self.seed = seed
        self.limits = (min_tokens, max_tokens)
        self.max_epochs = max_epochs
        self._own_D = _within(folder, min_tokens, max_tokens)
        # As often as an epoch reads them.
        self._kept_D = self._own_D if folder.times_D is None else _repeated(folder.times_D, self._own_D)
        self._lengths_D = folder.lengths_D if self._kept_D is None else folder.lengths_D[self._kept_D]
        self._shards = Shards(folder)
        self._positions_T = np.arange(seq_len, dtype=np.int32)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)
        self._first_row = [0]  # of every epoch planned so far
        self._lock = threading.Lock()  # Grain's threads come to a new epoch at the same time

    @functools.cached_property
    def num_positions(self) -> int:
        """Positions that one epoch can use; those of a document as often as an epoch reads it."""
        return packing.num_positions(self._lengths_D, seq_len=self.seq_len, packing=self.packing)

    def read_D(self) -> np.ndarray:
        """Returns the numbers of the documents that are read: within the limits, and fit for a row; each once."""
        lengths_D = self.folder.lengths_D if self._own_D is None else self.folder.lengths_D[self._own_D]
        used_D = np.flatnonzero(packing.used(lengths_D, seq_len=self.seq_len, packing=self.packing))
        return used_D if self._own_D is None else self._own_D[used_D]

    def times_D(self) -> np.ndarray:
        """Returns how often an epoch reads each of `read_D`."""
        read_D = self.read_D()
        return np.ones(len(read_D), np.int64) if self.folder.times_D is None else self.folder.times_D[read_D]

    @functools.cached_property
    def num_rows(self) -> int:
        """Rows of the first epoch; with `whole` another epoch may have a few more or less."""
        return self.plan(0).num_rows

    @functools.cached_property
    def max_rows(self) -> float:
        """Rows that max_epochs allows."""
        return int(self.max_epochs * self.num_rows) if self.max_epochs else float("inf")

    @functools.cached_property
    def num_left_out(self) -> int:
        """Documents within the limits that fit no row, or have no position."""
        if self.folder.times_D is None:
            return self.plan(0).num_left_out
        return len(self.folder.lengths_D) - self.num_filtered - len(self.read_D())

    @property
    def num_filtered(self) -> int:
        """Documents outside min_tokens .. max_tokens."""
        return 0 if self._own_D is None else len(self.folder.lengths_D) - len(self._own_D)

    def plan(self, epoch: int) -> Plan:
        """Returns the packing plan of an epoch; its documents are counted in the folder."""
        return self._plan(epoch)

    def _make_plan(self, epoch: int) -> Plan:
        how = {"seq_len": self.seq_len, "packing": self.packing, "seed": self.seed, "epoch": epoch}

        def make() -> Plan:
            try:
                plan = packing.plan_rows(self._lengths_D, **how)
            except ValueError as error:
                raise ValueError(f"{self.folder.path}: {error}") from error
            return plan if self._kept_D is None else plan._replace(document_P=self._kept_D[plan.document_P])

        if len(self._lengths_D) < _KEEP_PLANS_FROM:
            return make()
        files = self.folder.manifest["files"]
        offsets = [files[f"{shard['name']}.idx"]["sha256"] for shard in self.folder.manifest["shards"]]
        about = {"version": 1, "limits": self.limits, "offsets": offsets} | how
        if self.folder.times_D is not None:
            about["times"] = files[DOCUMENTS]["sha256"]
        return packing.kept_plan(self.folder.path / "plans", about, make)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: field[0] for name, field in row_batch(self, [index])._asdict().items()}

    def _place(self, index: int) -> tuple[Plan, int]:
        """Returns the plan of the epoch that has the row, and its number there."""
        if index >= self.max_rows:
            raise ValueError(
                f"{self.folder.path} may be read for {self.max_epochs:g} epochs, {self.max_rows} rows, and row {index} "
                "is asked for; allow more epochs, add text or end the run earlier"
            )
        with self._lock:
            if self.packing == "concat":  # every epoch has equally many rows
                epoch, row = divmod(index, self.num_rows)
            else:
                while index >= self._first_row[-1]:
                    self._first_row.append(self._first_row[-1] + self.plan(len(self._first_row) - 1).num_rows)
                epoch = bisect.bisect_right(self._first_row, index) - 1
                row = index - self._first_row[epoch]
            return self.plan(epoch), row

    def pieces(self, index: int) -> list[Piece]:
        """Returns what row `index` (counted from the run's beginning) is made of, in order."""
        plan, row = self._place(index)
        here = slice(int(plan.first_R[row]), int(plan.first_R[row + 1]))
        columns = (column[here].tolist() for column in (plan.document_P, plan.start_P, plan.length_P))
        return [Piece(self.folder, *piece) for piece in zip(*columns)]

    def fill(self, index: int, batch: Batch, b: int) -> None:
        """Writes row `index` into row b of a batch of zeros."""
        tokens, targets, loss_mask, positions, segments = (field[b] for field in batch)
        at = 0
        for segment, (_, document, start, length) in enumerate(self.pieces(index), 1):
            here = slice(at, at + length)
            ids = self._shards.ids(document, start, length + 1)
            mask = self._shards.mask(document, start + 1, length)
            tokens[here] = ids[:-1]
            targets[here] = ids[1:]
            loss_mask[here] = 1.0 if mask is None else mask
            positions[here] = self._positions_T[:length]
            segments[here] = segment
            at += length

    def documents(self, step: int, batch_size: int) -> list[str]:
        """Returns what the batch of a step is made of; see `described`."""
        return described(self, range(step * batch_size, (step + 1) * batch_size))


def described(rows: PackedRows, indices: Sequence[int]) -> list[str]:
    """Returns a line for each piece of these rows: FOLDER document ID tokens FIRST..LAST (row NUMBER of them).

    FIRST and LAST are counted in the document from 0; LAST is the last target.
    """
    pieces = [(b, piece) for b, index in enumerate(indices) for piece in rows.pieces(index)]
    wanted: dict[Path, tuple[TokenFolder, list[int]]] = {}
    for _, piece in pieces:
        wanted.setdefault(piece.folder.path, (piece.folder, []))[1].append(piece.document)
    names = {path: document_ids(folder, documents) for path, (folder, documents) in wanted.items()}
    return [
        f"{piece.folder.path} document {names[piece.folder.path][piece.document]} "
        f"tokens {piece.start}..{piece.start + piece.length} (row {b})"
        for b, piece in pieces
    ]


def row_batch(rows: PackedRows, indices: Sequence[int]) -> Batch:
    """Returns rows by their absolute numbers as one batch `[B, T]` of numpy arrays.

    Raises ValueError where an id lies outside the vocabulary: a device would silently read another embedding.
    """
    shape = (len(indices), rows.seq_len)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
    )
    for b, index in enumerate(indices):
        rows.fill(index, batch, b)
    for ids in (batch.tokens, batch.targets):
        if ids.size and int(ids.view(np.uint32).max()) >= rows.vocab_size:
            b = int((ids.view(np.uint32) >= rows.vocab_size).any(1).argmax())
            raise ValueError(
                f"the id {int(ids[b].view(np.uint32).max())} was read, and the tokenizer has {rows.vocab_size}: the "
                f"files were altered; write them anew. What was read: {described(rows, [indices[b]])}"
            )
    return batch


def open_rows(
    folder: str | os.PathLike, *, seq_len: int, packing: Packing, seed: int, tokenizer_sha256: str | None = None
) -> Rows:
    """Returns the rows of a token folder; `rows.plan(0)` tells how many an epoch has and what was left out."""
    return Rows(open_folder(folder, tokenizer_sha256), seq_len=seq_len, packing=packing, seed=seed)


def open_folder(folder: str | os.PathLike, tokenizer_sha256: str | None) -> TokenFolder:
    """Returns the token folder after what can be looked at in about a second.

    Every file is there and as long as written; offsets have their checksums. Token files are read through where the
    folder has at most _READ_THROUGH bytes of them; larger ones are trusted (`open_tokens(folder)` reads them through),
    and every id is compared with the vocabulary when it is read.
    """
    small = sum(path.stat().st_size for path in Path(folder).glob("*.bin")) <= _READ_THROUGH
    opened = open_tokens(folder, tokenizer_sha256=tokenizer_sha256, verify=small)
    for shard in () if small else opened.manifest["shards"]:
        path = opened.path / f"{shard['name']}.idx"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != opened.manifest["files"][path.name]["sha256"]:
            raise ValueError(f"{path} was altered after it was written (its sha256 differs); write the folder anew")
    return opened


def _within(folder: TokenFolder, min_tokens: int, max_tokens: int) -> np.ndarray | None:
    """Returns the documents with lengths within the limits; None for all."""
    if not min_tokens and not max_tokens:
        return None
    lengths_D = folder.lengths_D
    kept_D = np.flatnonzero((lengths_D >= min_tokens) & (lengths_D <= (max_tokens or lengths_D.max())))
    if not len(kept_D):
        raise ValueError(
            f"none of the {len(lengths_D)} documents of {folder.path} has between {min_tokens} and "
            f"{max_tokens or 'any number of'} tokens: they have {lengths_D.min()} to {lengths_D.max()}, half of them "
            f"at least {int(np.median(lengths_D))}; change min_tokens or max_tokens"
        )
    return packing.narrow(kept_D)


def _repeated(times_D: np.ndarray, own_D: np.ndarray | None) -> np.ndarray:
    """Returns the numbers of the documents, each as often as an epoch reads it."""
    own_D = np.arange(len(times_D)) if own_D is None else own_D
    return packing.narrow(np.repeat(own_D, times_D[own_D]))


class _Batches:
    """What Grain reads from: element i is the batch of step i."""

    def __init__(self, rows: PackedRows, batch_size: int, only_rows: Sequence[int]):
        self._rows = rows
        self._batch_size = batch_size
        self._only_rows = only_rows

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, step: int) -> dict[str, np.ndarray] | dict[str, Exception]:
        first = step * self._batch_size
        try:
            return row_batch(self._rows, [first + b for b in self._only_rows])._asdict()
        except (OSError, ValueError) as error:
            return {"error": error}  # raised, Grain would add lines on its own frames to the message


def batches(
    rows: PackedRows,
    *,
    batch_size: int,
    only_rows: Sequence[int] | None = None,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Callable[[int], Iterator[Batch]]:
    """Returns step -> the batches `[B, T]` from that absolute step on, read ahead by Grain's threads.

    batch_size is that of the whole job. A process that holds only some rows of every batch names them in `only_rows`
    (ascending, from 0); it then gets, and reads, just those. Neither that nor threads and prefetch (in batches) change
    which row stands where.
    """
    import grain

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, given {batch_size}")
    own = tuple(range(batch_size)) if only_rows is None else tuple(only_rows)
    if not own or own[0] < 0 or own[-1] >= batch_size or any(b <= a for a, b in zip(own, own[1:])):
        raise ValueError(
            f"only_rows names rows of a batch of {batch_size} in ascending order, from 0 to {batch_size - 1}, "
            f"given {own}"
        )

    def from_step(step: int) -> Iterator[Batch]:
        dataset = grain.MapDataset.source(_Batches(rows, batch_size, own))[step:]
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        for batch in dataset.to_iter_dataset(options):
            if "error" in batch:
                raise batch["error"]
            yield Batch(**batch)

    return from_step
