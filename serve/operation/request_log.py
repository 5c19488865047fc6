"""One line of the log for every request: its id, what came of it, how long it took. Never text, unless asked for.

What a route knows it notes (`note`) while the request is under way; the line is written when its response is complete.
A request's id is the client's X-Request-Id where that is a sane one, else one of our own; the response has it too. Of
gRPC every request has a line, those inside a stream as well, with the id of the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import h11

POLLED = frozenset({"/health", "/live", "/ready", "/metrics"})
"""Asked every few seconds: their lines are of level DEBUG."""
MAX_PROMPT_BYTES = 20_000
"""Of a body that is logged."""
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

log = logging.getLogger("serve")


class _Answered(Exception):
    """What came behind the head was no HTTP: the server under us has answered 400 and ends the connection."""


@dataclasses.dataclass
class Facts:
    """What is known of a request. Fields that are None or empty are left out of its line."""

    request: str
    """Its id."""
    method: str
    route: str = "other"
    """The path as the application declares it; a path that nobody declared is no name to count by."""
    status: int | str | None = None
    """Of gRPC the name of its code. None: no response was begun."""
    seconds: float = 0.0
    answer: str | None = None
    """The id of the response's object."""
    user: str | None = None
    n: int | None = None
    finish: str = ""
    prompt: int | None = None
    """Tokens, as is `completion`."""
    completion: int | None = None
    outcome: str = ""
    text: str | None = None
    """The request's body, where it is to be logged."""

    def line(self) -> str:
        """The fields as a text of one line."""
        words = []
        for name, value in self.known().items():
            if isinstance(value, float):
                words.append(f"{name}={value:.3f}")
            else:
                words.append(f"{name}={value!r}" if name in ("user", "text") else f"{name}={value}")
        return " ".join(words)

    def known(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in vars(self).items() if value not in (None, "")}


_current: ContextVar[Facts | None] = ContextVar("serve_request", default=None)


def note(**facts: Any) -> None:
    """Adds fields of Facts to the request that is under way here, if one is."""
    if (current := _current.get()) is not None:
        for name, value in facts.items():
            assert hasattr(current, name), name
            setattr(current, name, value)


@contextlib.contextmanager
def recorded(facts: Facts, on_end: Callable[[Facts], None], *, is_polled: bool) -> Iterator[None]:
    """Times a request that is answered inside, where `note` adds to its facts; tells of it, and writes its line."""
    _current.set(facts)
    started = time.monotonic()
    try:
        yield
    finally:
        facts.seconds = time.monotonic() - started
        on_end(facts)
        log.log(logging.DEBUG if is_polled else logging.INFO, "%s", facts.line(), extra={"facts": facts.known()})


class RequestLog:
    """The application with ids, lines in the log, and `on_end` told of every request's scope and facts."""

    def __init__(self, app: Callable, *, on_end: Callable[[Mapping[str, Any], Facts], None] | None = None):
        self._app, self._on_end = app, on_end

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        facts = Facts(sane_id(given.decode("latin-1")) or new_id(), scope["method"])

        async def with_id(message) -> None:
            if message["type"] != "http.response.start":
                await send(message)
                return
            message = message | {"headers": [*message["headers"], (b"x-request-id", facts.request.encode())]}
            try:
                await send(message)
            except h11.LocalProtocolError as error:
                raise _Answered from error
            facts.status = message["status"]

        def ended(facts: Facts) -> None:
            facts.route = _route_of(scope)
            if self._on_end is not None:
                self._on_end(scope, facts)

        with recorded(facts, ended, is_polled=scope["path"] in POLLED):
            try:
                await self._app(scope, receive, with_id)
            except _Answered:
                facts.outcome = "no HTTP"
                while (await receive())["type"] != "http.disconnect":
                    pass
            except asyncio.CancelledError:
                facts.outcome = "cut off"
                raise


def sane_id(given: str) -> str | None:
    """A client's id, if it is one that a line of the log can hold as it is."""
    return given if _ID.fullmatch(given) else None


def new_id() -> str:
    """An id for a request whose client gave none."""
    return uuid.uuid4().hex


def _route_of(scope: Mapping[str, Any]) -> str:
    """The declared path; of a request that was refused before it was routed, its own, if that is one."""
    path = getattr(scope.get("route"), "path", None)
    if path is None and "app" in scope:
        for route in scope["app"].routes:
            is_its = "endpoint" in scope and getattr(route, "endpoint", None) is scope["endpoint"]
            if is_its or getattr(route, "path", None) == scope["path"]:
                path = route.path
    return "other" if path is None else path


class JSONLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z")
        line = {"time": when, "level": record.levelname, "logger": record.name}
        facts, current = getattr(record, "facts", None), _current.get()
        if facts is None:
            line["message"] = record.getMessage()
            line |= {} if current is None else {"request": current.request}
        else:
            line |= facts
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """A record as a line of text, with the id of the request that it belongs to."""

    def format(self, record: logging.LogRecord) -> str:
        text, current = super().format(record), _current.get()
        return text if current is None or hasattr(record, "facts") else f"{text} request={current.request}"


def log_to(stream: Any, *, kind: Literal["text", "json"]) -> None:
    """Sends the log to a stream, in lines of text or of JSON."""
    lines = JSONLines() if kind == "json" else TextLines("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
