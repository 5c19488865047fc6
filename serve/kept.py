"""What a server keeps for its clients between requests: found by ids nobody can guess, and for a time only."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from fastapi import Request

Value = TypeVar("Value")


class KeepLimits(NamedTuple):
    """How much is kept, and for how many seconds since it was used last. All of it is lost when the server ends."""

    sessions: int = 256
    session_seconds: float = 3600.0
    responses: int = 1024
    response_seconds: float = 24 * 3600.0


class Kept(NamedTuple):
    """A value that is kept, and when (in Unix time) it goes if nobody uses it."""

    id: str
    value: object
    expires_at: int


class Shelf(Generic[Value]):
    """Values by id, each for its owner alone, for `seconds` since it was used last. Safe for several threads.

    A value that `in_use` says is in use does not go.
    """

    def __init__(
        self,
        prefix: str = "",
        *,
        most: int,
        seconds: float,
        replaces: bool = False,
        in_use: Callable[[Value], bool] = lambda value: False,
        clock: Callable[[], float] = time.time,
    ):
        """replaces: where `most` are kept, the one unused for longest gives way to a new one."""
        self.most, self.seconds = most, seconds
        self._prefix, self._replaces, self._in_use, self._clock = prefix, replaces, in_use, clock
        self._rows: dict[str, _Row] = {}  # those used last are last
        self._lock = threading.Lock()

    def add(self, value: Value, *, owner: str, key: str | None = None) -> Kept | None:
        """Keeps it, or returns None where there is no room. key: its id, if it has one that nobody can guess."""
        with self._lock:
            self._forget()
            while self._replaces and len(self._rows) >= self.most > 0:
                del self._rows[next(iter(self._rows))]
            if len(self._rows) >= self.most:
                return None
            key = key or self._prefix + secrets.token_hex(16)
            self._rows[key] = _Row(value, owner, self._clock())
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
            self._rows.pop(key, None)

    def __len__(self) -> int:
        with self._lock:
            self._forget()
            return len(self._rows)

    def of(self, owner: str) -> list[Kept]:
        """All that an owner has, those used last at the end. They are not used by that."""
        with self._lock:
            self._forget()
            return [self._kept(key) for key, row in self._rows.items() if row.owner == owner]

    def _kept(self, key: str) -> Kept:
        row = self._rows[key]
        return Kept(key, row.value, int(row.used + self.seconds))

    def _forget(self) -> None:
        last = self._clock() - self.seconds
        for key in [key for key, row in self._rows.items() if row.used < last and not self._in_use(row.value)]:
            del self._rows[key]


class _Row(NamedTuple):
    value: object
    owner: str
    used: float


def owner_of(request: Request) -> str:
    """Who sends a request: the API key, as a digest; those without one are one owner."""
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
