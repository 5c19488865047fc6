"""Reading spans of documents out of an open token folder while a run lasts.

Read by position instead of through the memory map: a file that is cut or lost meanwhile then gives an error that names
it, where a memory map would end the process without a word.
"""

import bisect
import functools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_pipelines.tokens import DOCUMENTS, MANIFEST, TokenFolder

# A process may hold some 1,000 files open; a corpus may have more shards.
_OPEN_FILES = 256
_BRING_BACK = "bring it back as it was, then run the same command again: it goes on from the last checkpoint"


class Shards:
    """Ids and masks of a token folder, by document and span; threads may share it."""

    def __init__(self, folder: TokenFolder):
        self._folder = folder
        self._first = folder.first_D.tolist()
        self._dtype = np.dtype(folder.manifest["dtype"]).newbyteorder("<")
        self._names = [shard["name"] for shard in folder.manifest["shards"]]
        self._manifest = _identity(folder.path / MANIFEST)
        self._file = functools.lru_cache(maxsize=_OPEN_FILES)(self._open)

    def ids(self, document: int, start: int, length: int) -> np.ndarray:
        """Returns `length` ids of a document from its token `start` on."""
        shard, at = self._place(document, start)
        return np.frombuffer(self._read(f"{self._names[shard]}.bin", at, length, self._dtype.itemsize), self._dtype)

    def mask(self, document: int, start: int, length: int) -> np.ndarray | None:
        """Returns the loss mask of these ids, or None where the folder has none."""
        if self._folder.masks is None:
            return None
        shard, at = self._place(document, start)
        return np.frombuffer(self._read(f"{self._names[shard]}.mask", at, length, 1), np.uint8)

    def _place(self, document: int, start: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._first, document) - 1
        return shard, int(self._folder.offsets[shard][document - self._first[shard]]) + start

    def _read(self, name: str, first: int, count: int, width: int) -> bytes:
        try:
            raw = self._file(name).read(first * width, count * width)
        except OSError as error:
            if self._is_replaced():
                raise OSError(
                    f"{self._folder.path} was written anew while the run read it, and its files no longer belong "
                    "together. Give the new text a folder of its own and bring the old one back, or begin a new run"
                ) from error
            raise OSError(
                f"{self._folder.path / name} was there when the run began and cannot be read any more "
                f"({error.strerror or error}); {_BRING_BACK}"
            ) from error
        if len(raw) != count * width:
            raise OSError(
                f"{self._folder.path / name} was cut while the run read it: it ends before byte "
                f"{(first + count) * width}; {_BRING_BACK}"
            )
        return raw

    def _open(self, name: str) -> "_File":
        file = _File(self._folder.path / name)
        if self._is_replaced():
            raise OSError(f"{name} belongs to other offsets than those held")
        return file

    def _is_replaced(self) -> bool:
        """Whether a folder that was written anew has taken the name of the one that was opened."""
        try:
            return _identity(self._folder.path / MANIFEST) != self._manifest
        except OSError:
            return False


class _File:
    """An open file. It is closed when nobody holds it any more: never under a thread that is reading from it."""

    def __init__(self, path: Path):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, first: int, count: int) -> bytes:
        return os.pread(self._descriptor, count, first)

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _identity(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def document_ids(folder: TokenFolder, documents: Iterable[int]) -> dict[int, str]:
    """Returns the id of each document, by its index; reads only the parts of documents.parquet that hold them."""
    import pyarrow.parquet as pq

    wanted, found, first = sorted(set(documents)), {}, 0
    with pq.ParquetFile(folder.path / DOCUMENTS) as file:
        for group in range(file.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            here = wanted[bisect.bisect_left(wanted, first) : bisect.bisect_left(wanted, stop)]
            if here:
                names = file.read_row_group(group, columns=["id"]).column("id")
                found |= {document: names[document - first].as_py() for document in here}
            first = stop
    return found
