"""Whether a server is well: /health for people and load balancers, /live and /ready for what restarts and routes.

What they say, the KServe v2 protocol says too, over HTTP and gRPC.

/health  200 ok | degraded (some replicas have stopped);  503 loading | compiling n of m | draining | stuck | failed
/ready   200 while requests are taken, else 503
/live    503 only where a restart is the remedy: the engine has stopped, or hangs
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from internjax.decode.device import Compiled
from serve.operation.guards import Doors, respond
from serve.operation.refusal import Refusal


class Health(NamedTuple):
    """What a server says of itself."""

    status: str
    fault: str | None
    faults: list[str | None]
    """Of every replica."""

    @property
    def why(self) -> str:
        """Why it is not well, in words."""
        return f"the server is {self.status}" + ("" if self.fault is None else f": {self.fault}")

    @property
    def is_ready(self) -> bool:
        return self.status in ("ok", "degraded")

    @property
    def is_live(self) -> bool:
        return self.status not in ("stuck", "failed")


class Working(Protocol):
    """What answers: a `serve.pipeline.Pipeline` or a `serve.rest.scores.Scorer`."""

    def fault(self) -> str | None: ...

    def faults(self) -> list[str | None]: ...

    def silent_seconds(self) -> float: ...


def health_of(working: Working, doors: Doors, *, stuck_seconds: float) -> Health:
    """How the engines are, by what they do: an engine that has work and shows no sign of life is stuck."""
    fault, faults = working.fault(), working.faults()
    if fault is not None:
        return Health("failed", fault, faults)
    silent = working.silent_seconds()
    if silent > stuck_seconds:
        return Health("stuck", f"the engine has work and has not gone on with it for {silent:.0f} seconds", faults)
    if doors.closed is not None:
        return Health("draining", None, faults)
    return Health("degraded" if any(faults) else "ok", None, faults)


def add_health_routes(app: FastAPI, now: Callable[[], Health], *, model_name: str) -> None:
    """Adds /health, /live and /ready. now: returns how the server is."""

    def answer(health: Health, *, is_well: bool) -> Response:
        state: dict[str, Any] = {"status": health.status, "model": model_name, "fault": health.fault}
        if len(health.faults) > 1:
            state["replicas"] = [{"fault": each} for each in health.faults]
        return JSONResponse(state, status_code=200 if is_well else 503)

    # In the event loop: they are answered while all threads wait for something.
    @app.get("/health")
    async def health() -> Response:
        found = now()
        return answer(found, is_well=found.is_ready)

    @app.get("/ready")
    async def ready() -> Response:
        found = now()
        return answer(found, is_well=found.is_ready)

    @app.get("/live")
    async def live() -> Response:
        found = now()
        return answer(found, is_well=found.is_live)


class Starting:
    """What answers while the model is not there yet: how far it is, and 503 for all that needs it. gRPC asks it too."""

    def __init__(self, model_name: str, *, page: Mapping[str, Callable[[Request], Awaitable[Response]]] | None = None):
        """page: what answers paths of the chat page, which tells whoever comes now how far the model is."""
        self.status = "loading"
        self._model_name, self._page, self._started = model_name, page or {}, time.monotonic()

    def compiled(self, program: Compiled) -> None:
        """Notes that a program is there, and that the next one is made now."""
        self.status = f"compiling {min(program.number + 1, program.count)} of {program.count}"

    def health(self) -> Health:
        return Health(self.status, None, [])

    def refusal(self) -> Refusal:
        """What is said to who asks for the model."""
        seconds = time.monotonic() - self._started
        message = f"the model is not there yet ({self.status}, for {seconds:.0f} seconds); try again soon"
        return Refusal(message, status=503, code="unavailable")

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] in ("/health", "/ready", "/live"):
            seconds = round(time.monotonic() - self._started, 1)
            state = {"status": self.status, "model": self._model_name, "fault": None, "seconds": seconds}
            response: Callable = JSONResponse(state, status_code=200 if scope["path"] == "/live" else 503)
        elif scope["path"] in self._page and scope["method"] in ("GET", "HEAD"):
            response = await self._page[scope["path"]](Request(scope, receive))
        else:
            response = respond(self.refusal())
        await response(scope, receive, send)
