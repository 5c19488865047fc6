"""What stands before the routes: OpenAI's error envelope for every failure, keys, and limits of what is taken on.

From outside in: the length of the head, a browser's origin, the key, the doors. Through the doors go all requests that
may bring a body: it is read whole, within its limits, then the request waits for a place in order of arrival, or is
refused.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from serve.operation.keys import check_origin, is_opened
from serve.operation.refusal import Refusal, envelope
from serve.operation.request_log import MAX_PROMPT_BYTES, note
from serve.web import is_page

OPEN_PATHS = frozenset({"/health", "/live", "/ready", "/metrics", "/v2/health/live", "/v2/health/ready"})
"""What needs no key: it tells of the server, not of its users."""
WITHOUT_ENGINE = frozenset({"/tokenize", "/detokenize", "/v2/repository/index"})
"""What is answered though the engine has stopped."""
RETRY_SECONDS, MAY_PASS = 2, (429, 503)
"""When to try again, as refusals of these statuses say."""
MAX_HEAD_BYTES = 32 << 10
"""Of a request's path and headers."""
_DROP_SECONDS, _DROP_PAUSE, _DROP_BYTES = 3.0, 0.2, 64 << 20
"""What is read of a refused request's body: for so long, until so long a pause, and no more than so much."""


class Limits(NamedTuple):
    """What a server takes on. Requests beyond are refused: too large 413, too slow 408, too many 429."""

    body_bytes: int = 16 << 20
    body_seconds: float = 60.0
    """For a body to come in."""
    send_seconds: float = 60.0
    """For a client to read more of its answer, before it is given up."""
    max_running: int = 256
    """Requests that are worked on at once. The engine has a queue of its own for those that it has no slot for."""
    max_waiting: int = 256
    """Requests that wait until one of those is done."""


class Operation(NamedTuple):
    """How a server is run."""

    limits: Limits = Limits()
    origins: tuple[str, ...] = ()
    """Of pages whose scripts may ask it."""
    log_prompts: bool = False
    """Whether bodies of requests go into the log."""
    stuck_seconds: float = 120.0
    """Without a sign of life of an engine that has work, after which it counts as stuck."""


class Doors:
    """Who is inside, who waits, and whether more are let in: of all fronts, which share one event loop.

    Other threads may read.
    """

    def __init__(self, limits: Limits, fault: Callable[[], str | None]):
        """fault: says why no request can be served, or returns None."""
        if limits.max_running < 1 or limits.max_waiting < 0 or min(limits[:3]) <= 0:
            raise ValueError(f"limits are positive (max_waiting: or 0), given {limits}")
        self.limits, self._fault = limits, fault
        self.closed: str | None = None
        """Why nobody is let in, or None."""
        self.num_inside = self.num_running = 0
        """Requests whose body is read, that wait or that run; of those, the ones that run."""
        self._waiting: collections.deque[asyncio.Future] = collections.deque()
        self._works: set[asyncio.Task] = set()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    @contextlib.contextmanager
    def inside(self, *, needs_engine: bool = True) -> Iterator[None]:
        """Lets a request in. Raises Refusal where there are too many, or none is let in any more."""
        self._refuse_if_closed(needs_engine=needs_engine)
        limits = self.limits
        if self.num_inside >= limits.max_running + limits.max_waiting:
            raise Refusal(
                f"the server is busy: {limits.max_running} requests run and {limits.max_waiting} wait; try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1

    async def place(self, gone: asyncio.Task | None = None) -> bool:
        """Waits for a place; returns whether there is one, which is to be given back.

        gone: ends with the client; None: who waits here is cancelled then.
        """
        if self.num_running < self.limits.max_running:
            self.num_running += 1
            return True
        self._refuse_if_closed(needs_engine=False)  # since it was let in: who waits is refused
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait({turn, gone or turn}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if turn.done() and turn.result():
                self.give_back()
            raise
        finally:
            if not turn.done():
                self._waiting.remove(turn)
        if turn.done() and not turn.result():
            self._refuse_if_closed()
        return turn.done()

    def give_back(self) -> None:
        """Frees a place, for who waits longest."""
        if self._waiting:
            self._waiting.popleft().set_result(True)
        else:
            self.num_running -= 1

    async def placed(self, start: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """What comes of the work of a request that is inside and read, once it has a place. Raises Refusal where it
        gets none.

        Cancelled, it ends the work.
        """
        await self.place()
        try:
            work = asyncio.create_task(start())
            try:
                if await self.work(work):
                    return work.result()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
        finally:
            self.give_back()
        note(outcome="cut off")
        raise cut_off()

    async def work(self, work: asyncio.Task) -> bool:
        """Waits for the work of a request; returns False where `cut` ended it."""
        self._works.add(work)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:  # the server's own end
            work.cancel()
            raise
        finally:
            self._works.discard(work)
        if work.cancelled():
            return False
        work.result()
        return True

    def close(self, reason: str) -> None:
        """Lets nobody in from now on; who waits is refused, who runs may finish."""
        self.closed = reason
        while self._waiting:
            self._waiting.popleft().set_result(False)

    def cut(self) -> None:
        """Ends all that runs."""
        for work in self._works:
            work.cancel()

    def _refuse_if_closed(self, *, needs_engine: bool = True) -> None:
        if (reason := self.closed or (self._fault() if needs_engine else None)) is not None:
            raise Refusal(reason, status=503, code="unavailable")


def add_guards(app: FastAPI, doors: Doors, *, api_keys: Sequence[str], operation: Operation) -> None:
    """Gives the application its error envelopes and its guards.

    api_keys: one of them is wanted as bearer token, but for OPEN_PATHS; none: no key is needed. Raises ValueError for
    an origin that no page can have.
    """
    for origin in operation.origins:
        check_origin(origin)
    _add_error_envelopes(app)
    app.add_middleware(_ThroughDoors, doors=doors, log_prompts=operation.log_prompts)
    if api_keys:
        app.add_middleware(_RequireKey, keys=api_keys)
    if operation.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(operation.origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(_LimitHead)


class _ThroughDoors:
    """Reads bodies, gives requests their places, and gives up clients that are gone or do not read."""

    def __init__(self, app: Callable, doors: Doors, log_prompts: bool):
        self._app, self._doors, self._limits, self._log_prompts = app, doors, doors.limits, log_prompts

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        is_read = False
        try:
            with self._doors.inside(needs_engine=scope["path"] not in WITHOUT_ENGINE):
                bodies = await self._bodies(scope, receive)
                is_read = True
                if bodies:
                    await self._serve(scope, bodies, receive, send)
        except Refusal as refusal:
            is_slow = refusal.status == 408  # what is left of its body is not waited for
            if not is_read and not is_slow:
                await self._drop_body(scope, receive)
            await respond(refusal, scope, close=is_slow)(scope, receive, send)

    async def _bodies(self, scope, receive) -> list[bytes]:
        """The whole body, alone in a list from which it can be taken, or nothing where the client has gone."""
        limits, parts, num_bytes, more = self._limits, [], 0, True
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit():
            self._check_size(int(length[:20]))
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        note(outcome="client gone")
                        return []
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    self._check_size(num_bytes)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refusal(
                f"the body did not come in within {limits.body_seconds:g} seconds; send it faster, or less", status=408
            ) from None
        if self._log_prompts:
            note(text=b"".join(parts)[:MAX_PROMPT_BYTES].decode(errors="replace"))
        return [b"".join(parts)]

    async def _drop_body(self, scope, receive) -> None:
        """Reads what a refused client is sending: on one that still sends, the end of the connection drops the answer.

        Not from one that sends too much or too long, nor where it pauses: it may wait for the answer.
        """
        if b"expect" in dict(scope["headers"]):
            return  # it sends nothing before it is told to
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP_SECONDS):
                while num_bytes <= _DROP_BYTES:
                    async with asyncio.timeout(_DROP_PAUSE):
                        message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limits.body_bytes:
            raise Refusal(f"the body has more than {self._limits.body_bytes} bytes; send less", status=413)

    async def _serve(self, scope, bodies: list[bytes], receive, send) -> None:
        """Waits for a place and has the application answer, which is told of the client's leaving as ever."""
        gone = asyncio.create_task(receive())
        try:
            if not await self._doors.place(gone):
                note(outcome="client gone")
                return
            try:
                await self._answer(scope, bodies, gone, send)
            finally:
                self._doors.give_back()
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)

    async def _answer(self, scope, bodies: list[bytes], gone: asyncio.Task, send) -> None:
        sender = _Sender(send, self._limits.send_seconds)

        async def receive():
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            return await asyncio.shield(gone)

        work = asyncio.create_task(self._app(scope, receive, sender.send))
        with sender.watched(work):
            if await self._doors.work(work):
                return
        if sender.is_stuck:
            note(outcome="client does not read")
            return  # the response is not complete: the connection is closed
        note(outcome="cut off")
        refusal = cut_off()
        if sender.headers is None:
            await respond(refusal, scope)(scope, receive, send)
        elif dict(sender.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
            event = b"data: " + respond(refusal).body + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})


class _Sender:
    """Passes a response on and knows whether its client reads it. One timer for all parts: they may be thousands."""

    def __init__(self, send: Callable, seconds: float):
        self._send, self._seconds = send, seconds
        self._since: float | None = None
        """When the part that is under way was begun."""
        self.headers: list[tuple[bytes, bytes]] | None = None
        """Of the response, once it was begun."""
        self.is_stuck = False

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.headers = message["headers"]
        self._since = time.monotonic()
        await self._send(message)
        self._since = None

    @contextlib.contextmanager
    def watched(self, work: asyncio.Task) -> Iterator[None]:
        """Cancels the work when a part is not taken for the time, or up to a quarter more."""
        loop = asyncio.get_running_loop()

        def look() -> None:
            nonlocal timer
            self.is_stuck = self._since is not None and time.monotonic() - self._since >= self._seconds
            if self.is_stuck:
                work.cancel()
            else:
                timer = loop.call_later(self._seconds / 4, look)

        timer = loop.call_later(self._seconds / 4, look)
        try:
            yield
        finally:
            timer.cancel()


class _LimitHead:
    """Answers 431 where path and headers are long. What the server under it has read at once it lets through."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http":
            num_bytes = len(scope["path"]) + len(scope.get("query_string", b""))
            num_bytes += sum(len(name) + len(value) + 4 for name, value in scope["headers"])
            if num_bytes > MAX_HEAD_BYTES:
                message = f"path and headers have more than {MAX_HEAD_BYTES} bytes; send less"
                await respond(Refusal(message, status=431), scope, close=True)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _RequireKey:
    """Answers 401 to requests that do not carry one of the keys."""

    def __init__(self, app: Callable, keys: Sequence[str]):
        self._app, self._keys = app, keys

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and not (scope["path"] in OPEN_PATHS or is_page(scope["path"])):
            if not is_opened(dict(scope["headers"]).get(b"authorization", b""), self._keys):
                message = "the API key is missing or wrong; send the header Authorization: Bearer <key>"
                refusal = Refusal(message, status=401, code="invalid_api_key")
                await respond(refusal, scope, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


def cut_off() -> Refusal:
    """What is said of an answer that `Doors.cut` ended."""
    return Refusal("the server stops and the answer was not complete in time", status=503, code="unavailable")


def respond(
    refusal: Refusal,
    scope: Mapping[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    close: bool = False,
) -> Response:
    """The response of an error; one that may pass says when to try again. Under /v2 it has KServe's body."""
    error = envelope(refusal.message, status=refusal.status, param=refusal.param, code=refusal.code)
    if scope is not None and (scope["path"] == "/v2" or scope["path"].startswith("/v2/")):
        error = {"error": refusal.message}
    headers = dict(headers or {})
    if refusal.status in MAY_PASS:
        headers.setdefault("Retry-After", str(RETRY_SECONDS))
    if close:
        headers["Connection"] = "close"
    # In ASCII, because the message may quote what is no valid UTF-8.
    return Response(json.dumps(error), status_code=refusal.status, media_type="application/json", headers=headers)


def _methods_of(request: Request) -> set[str]:
    """The methods that a path takes; each of them may be a route of its own."""
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}


def _add_error_envelopes(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = first["loc"][1:]
        if not place and isinstance(first.get("input"), bytes):  # FastAPI has not read it as JSON
            given = request.headers.get("content-type")
            said = "has no Content-Type" if given is None else f"has the Content-Type {given!r:.100}"
            message = f"the body {said}; send it with Content-Type: application/json"
            return respond(Refusal(message, code="invalid_value"))
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        param = "".join(parts).lstrip(".")[:200] or None
        if first["type"] == "json_invalid":
            return respond(Refusal(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}"))
        if first["type"] == "extra_forbidden":
            message = f"unknown field {param}; it is not part of this request"
            return respond(Refusal(message, param=param, code="unknown_parameter"))
        given = "" if first["type"] == "missing" else f"; given {first['input']!r:.200}"
        message = f"{param or 'the body'}: {first['msg']}{given}"
        return respond(Refusal(message, param=param, code="invalid_value"))

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        note(outcome="client gone")
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        reason = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
        }
        refusal = Refusal(reason.get(error.status_code, str(error.detail)), status=error.status_code)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(sorted(_methods_of(request)))
        return respond(refusal, headers=headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return respond(Refusal(f"the server failed: {type(error).__name__}", status=500))
