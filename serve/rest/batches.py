"""Many texts read by a model in batches of rows, in threads of their own: who leaves or is cut off is left between two.

What asyncio itself keeps threads for, long chats and forks, does not wait behind them, nor does the server's end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from fastapi import Request
from starlette.requests import ClientDisconnect

from internjax.decode.embed import num_rows

Item = TypeVar("Item")
Done = TypeVar("Done")
PORTION_CHARS = 100_000
"""Of texts that are tokenised at once, unless one alone is longer: some hundredths of a second."""


class Batch(NamedTuple):
    """Texts that are read at once, by their places, in rows of so many tokens."""

    width: int
    places: list[int]


def batches_of(lengths: Sequence[int], widths: Iterable[int]) -> list[Batch]:
    """Texts of so many tokens in as few rows as wide as they must be. widths: ascending, the last holds the longest."""
    found, shorter = [], 0
    for width in widths:
        here = [place for place, length in enumerate(lengths) if shorter < length <= width]
        count = num_rows(width)
        found += [Batch(width, here[start : start + count]) for start in range(0, len(here), count)]
        shorter = width
    return found


def padded(texts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 (tokens `[rows, width]`, lengths `[rows]`), as many rows as are read at once at this width."""
    tokens, lengths = np.zeros((num_rows(width), width), np.int32), np.ones(num_rows(width), np.int32)
    for row, ids in enumerate(texts):
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return tokens, lengths


Read = Callable[[Sequence[Sequence[int]], int], np.ndarray]
"""Returns what a model says of texts, `[texts, ...]`, in rows of so many tokens."""


def read_each(texts: Sequence[Sequence[int]], batches: Iterable[Batch], read: Read) -> list[Callable[[], np.ndarray]]:
    """What is to be done for each batch."""
    return [partial(read, [texts[place] for place in batch.places], batch.width) for batch in batches]


def in_order(batches: Iterable[Batch], parts: Sequence[np.ndarray]) -> np.ndarray:
    """What was read of each batch, in the order of the texts."""
    places = [place for batch in batches for place in batch.places]
    return np.concatenate(parts)[np.argsort(places)]


def portions(items: Iterable[Item], size_of: Callable[[Item], int], *, most: int = PORTION_CHARS) -> list[list[Item]]:
    """The items in lists whose sizes come to `most` together, or that hold one alone."""
    found: list[list[Item]] = []
    size = most
    for item in items:
        size += size_of(item)
        if size > most or not found:
            found.append([])
            size = size_of(item)
        found[-1].append(item)
    return found


class Workers:
    """Two threads: while one reads with the model, which does one thing at a time, the other tokenises."""

    def __init__(self, name: str):
        self._threads = ThreadPoolExecutor(2, thread_name_prefix=name)

    async def map(
        self,
        function: Callable[[Item], Done],
        items: Iterable[Item],
        request: Request,
        *,
        size_of: Callable[[Item], int],
    ) -> list[Done]:
        """What the function returns of each item, in portions of about as much work; see `run`."""

        def of_all(part: Iterable[Item]) -> list[Done]:
            return [function(item) for item in part]

        parts = await self.run([partial(of_all, part) for part in portions(items, size_of)], request)
        return [done for part in parts for done in part]

    async def read(
        self, texts: Sequence[Sequence[int]], batches: Sequence[Batch], read: Read, request: Request
    ) -> np.ndarray:
        """What a model says of the texts, in their order; see `run`."""
        return in_order(batches, await self.run(read_each(texts, batches, read), request))

    async def run(self, pieces: Iterable[Callable[[], Done]], request: Request) -> list[Done]:
        """What the pieces return, done one after the other; those of several requests take turns.

        Raises ClientDisconnect when the client has left. Where the request is cancelled, the piece that is being done
        is the last one; nobody waits for it.
        """
        loop, done = asyncio.get_running_loop(), []
        for piece in pieces:
            if done and await request.is_disconnected():
                raise ClientDisconnect
            done.append(await loop.run_in_executor(self._threads, piece))
        return done
