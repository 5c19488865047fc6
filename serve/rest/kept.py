"""What a server keeps for its clients between requests: found by ids nobody can guess, and for a time only."""

from __future__ import annotations

import hashlib
import itertools
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from fastapi import Request

Value = TypeVar("Value")


class KeepLimits(NamedTuple):
    """How much is kept, and for how many seconds since it was used last. All of it is lost when the server ends."""

    sessions: int = 256
    session_seconds: float = 3600.0
    responses: int = 1024
    response_seconds: float = 24 * 3600.0
    response_bytes: int = 256 << 20
    """Of memory, for all responses with what was said before them."""


class Kept(NamedTuple):
    """A value that is kept, and when (in Unix time) it goes if nobody uses it."""

    id: str
    value: object
    expires_at: int


class Shelf(Generic[Value]):
    """Values by id, each for its owner alone, for `seconds` since it was used last. Safe for several threads.

    Where there is no room, the owner who holds the largest part gives way: of the number or of the bytes, whichever
    part is larger. So nobody takes the places of others who hold less. What `in_use` says is in use does not go.
    """

    def __init__(
        self,
        prefix: str = "",
        *,
        most: int,
        seconds: float,
        replaces: bool = False,
        in_use: Callable[[Value], bool] = lambda value: False,
        max_bytes: int | None = None,
        bytes_of: Callable[[Value], int] = lambda value: 0,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ):
        """replaces: a new value takes the place of the one that its owner has not used for longest, where that owner
        holds the largest part; else there is no room for it. max_bytes: of all values together, by `bytes_of`. clock:
        by which `seconds` pass, however the machine's time is set; unix_time only tells when they will have passed."""
        self.most, self.seconds, self.max_bytes = most, seconds, max_bytes
        self._prefix, self._replaces, self._in_use, self._clock = prefix, replaces, in_use, clock
        self._bytes_of, self._unix_time = bytes_of, unix_time
        self._rows: dict[str, _Row] = {}  # those used last are last
        self._shares: dict[str, _Share] = {}  # by owner
        self._lock = threading.Lock()

    def add(self, value: Value, *, owner: str, key: str | None = None) -> Kept | None:
        """Keeps it, or returns None where there is no room. key: its id, if it has one that nobody can guess."""
        num_bytes = self._bytes_of(value)
        with self._lock:
            self._forget()
            going = self._giving_way(owner, num_bytes)
            if going is None:
                return None
            for each in going:
                self._drop(each)
            key = key or self._prefix + secrets.token_hex(16)
            self._rows[key] = _Row(value, owner, self._clock(), num_bytes)
            self._shares[owner] = self._shares.get(owner, _Share()).plus(1, num_bytes)
            return self._kept(key)

    def find(self, key: str, *, owner: str) -> Kept | None:
        """The value, which is used by that; None where the owner has none of this id (any more)."""
        with self._lock:
            self._forget()
            row = self._rows.get(key)
            if row is None or row.owner != owner:
                return None
            self._rows[key] = self._rows.pop(key)._replace(used=self._clock())
            return self._kept(key)

    def remove(self, key: str) -> None:
        with self._lock:
            if key in self._rows:
                self._drop(key)

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Of all values that are kept."""
        with self._lock:
            self._forget()
            return _sum(self._shares.values()).num_bytes

    def of(self, owner: str) -> list[Kept]:
        """All that an owner has, those used last at the end. They are not used by that."""
        with self._lock:
            self._forget()
            return [self._kept(key) for key, row in self._rows.items() if row.owner == owner]

    def _kept(self, key: str) -> Kept:
        row = self._rows[key]
        return Kept(key, row.value, int(self._unix_time() + row.used + self.seconds - self._clock()))

    def _forget(self) -> None:
        last = self._clock() - self.seconds
        old = itertools.takewhile(lambda item: item[1].used < last, self._rows.items())
        for key in [key for key, row in old if not self._in_use(row.value)]:
            self._drop(key)

    def _drop(self, key: str) -> None:
        row = self._rows.pop(key)
        left = self._shares[row.owner].plus(-1, -row.num_bytes)
        if left.num_values:
            self._shares[row.owner] = left
        else:
            del self._shares[row.owner]

    def _giving_way(self, owner: str, num_bytes: int) -> list[str] | None:
        """Those who go, so that there is room for one more value of the owner; None where there is none for it."""
        shares = self._shares | {owner: self._shares.get(owner, _Share()).plus(1, num_bytes)}
        total, going = _sum(shares.values()), []
        while self._part(total) > 1:
            parts = {other: self._part(share) for other, share in shares.items()}
            largest = max(parts.values())
            theirs = (key for key, row in self._rows.items() if parts[row.owner] == largest and key not in going)
            key = next((key for key in theirs if not self._in_use(self._rows[key].value)), None)
            if key is None or (parts[owner] == largest and not self._replaces):
                return None
            row = self._rows[key]
            going.append(key)
            total = total.plus(-1, -row.num_bytes)
            shares[row.owner] = shares[row.owner].plus(-1, -row.num_bytes)
        return going

    def _part(self, share: _Share) -> float:
        """Which part of all that there may be it is, by number or by bytes."""
        by_number = share.num_values / self.most if self.most else math.inf
        return by_number if self.max_bytes is None else max(by_number, share.num_bytes / max(self.max_bytes, 1))


class _Row(NamedTuple):
    value: object
    owner: str
    used: float
    num_bytes: int


class _Share(NamedTuple):
    """What one owner holds, or several."""

    num_values: int = 0
    num_bytes: int = 0

    def plus(self, num_values: int, num_bytes: int) -> _Share:
        return _Share(self.num_values + num_values, self.num_bytes + num_bytes)


def _sum(shares: Iterable[_Share]) -> _Share:
    total = _Share()
    for share in shares:
        total = total.plus(*share)
    return total


def owner_of(request: Request) -> str:
    """Who sends a request: the API key, as a digest; those without one are one owner."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
