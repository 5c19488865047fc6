"""A server with a lifetime: a port is taken, the application answers on it, and it is gone when closed."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.util
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.kserve.grpc import GrpcServer
    from serve.operation.guards import Operation
    from serve.pipeline import Pipeline
    from serve.rest.kept import KeepLimits
    from serve.rest.scores import Scorer

HEAD_SECONDS = 30.0
"""For a client to send the head of a request."""
_READY_SECONDS = 30.0


class Server:
    """A port on which an application answers. Use it as a context manager, or `close` it."""

    def __init__(self, app: Callable, port: socket.socket, *, model_name: str, drain_seconds: float):
        """Answers from now on. app: any ASGI application; another may take its place (`use`).

        drain_seconds: see `close`.
        """
        # Here, so that a port can be taken, or found in use, before anything heavy is loaded.
        import uvicorn

        from serve.metrics import count_requests
        from serve.operation.guards import MAX_HEAD_BYTES
        from serve.operation.request_log import RequestLog

        port.listen(128)
        host, number = port.getsockname()[:2]
        self.url = f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"
        self._grpc: GrpcServer | None = None
        self.grpc_address: str | None = None
        self.model_name = model_name
        self._app, self._drain_seconds = app, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._quiet = QuietConnections(HEAD_SECONDS)
        self._server = uvicorn.Server(
            uvicorn.Config(
                RequestLog(self._answer, on_end=count_requests),
                http="h11",  # the one whose headers are limited
                ws="none",
                lifespan="off",  # the application changes while the server runs; none has one
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_graceful_shutdown=1,
                callback_notify=self._each_second,
                timeout_notify=1,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([port],), name="serve", daemon=True)
        self._thread.start()

    async def _answer(self, scope, receive, send) -> None:
        await self._app(scope, receive, send)

    async def _each_second(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._quiet.end(self._server.server_state.connections)

    def use(self, app: Callable) -> None:
        """Has another application answer what comes from now on."""
        self._app = app

    def add_grpc(self, port: socket.socket, *, api_keys: Sequence[str], operation: Operation) -> None:
        """Answers the KServe v2 protocol over gRPC too, through the doors of the application that answers at the time.

        api_keys, operation: those of the applications. Raises ValueError where the port cannot be taken.
        """
        from serve.kserve.grpc import Front, GrpcServer

        host, number = port.getsockname()[:2]
        port.close()  # gRPC takes no socket of others: it was held so far to be there for it now
        self._wait(lambda: self._loop is not None, _READY_SECONDS)
        if self._loop is None:
            raise RuntimeError(f"the server at {self.url} did not start in {_READY_SECONDS:g} s")
        front = Front(lambda: self._app, tuple(api_keys), operation)
        self._grpc = GrpcServer(front, loop=self._loop, host=host, port=number)
        self.grpc_address = self._grpc.address

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server and frees the port.

        Requests that come or wait are refused with 503, while /health says that it drains. Those under way may finish
        for the drain time, then they are told that the server stops.
        """
        doors = getattr(getattr(self._app, "state", None), "doors", None)
        if doors is not None and self._loop is not None and self.alive:
            self._loop.call_soon_threadsafe(doors.close, "the server stops and takes no more requests")
            if self._grpc is not None:
                self._grpc.leave()
            self._wait(lambda: doors.num_inside == 0, self._drain_seconds)
            self._loop.call_soon_threadsafe(doors.cut)
            self._wait(lambda: doors.num_inside == 0, 1.0)
        if self._grpc is not None and self.alive:
            self._grpc.close()  # before the loop ends, which it has
        self._server.should_exit = True
        self._thread.join()

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline and not condition():
            time.sleep(0.02)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()


class QuietConnections:
    """Ends connections that say nothing: none has `seconds` for the head of a request, or to be gone when closed."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._since: dict[Any, tuple[Any, float]] = {}

    def end(self, connections: Iterable[Any]) -> None:
        """Ends those of uvicorn's connections that wait for the same thing for too long."""
        now, since = time.monotonic(), {}
        for connection in list(connections):
            cycle = connection.cycle
            if cycle is not None and not cycle.response_complete and not connection.transport.is_closing():
                continue  # under way: the doors see to it
            waiting_for, start = self._since.get(connection, (cycle, now))
            since[connection] = (cycle, start if waiting_for is cycle else now)
            if now - since[connection][1] > self._seconds:
                connection.transport.abort()
        self._since = since


def start_server(
    pipeline: Pipeline | Scorer,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int | socket.socket = 0,
    api_key: str | Sequence[str] | None = None,
    drain_seconds: float = 10,
    adapter_root: Path | None = None,
    grpc_port: int | socket.socket | None = None,
    operation: Operation | None = None,
    keep: KeepLimits | None = None,
    web: bool = True,
) -> Server:
    """A server of `pipeline`, answering when this returns. `port` 0 takes a free one: see `Server.url`.

    The pipeline stays open when it is closed. api_key, adapter_root, operation, keep, web: see
    `serve.openai.create_app`; a reward model takes the first and the third. grpc_port: for the KServe v2 protocol over
    gRPC as well, 0 for a free one: see `Server.grpc_address`.
    """
    from serve.openai import create_app, create_score_app
    from serve.operation.guards import Operation
    from serve.operation.keys import keys_of
    from serve.rest.kept import KeepLimits
    from serve.rest.scores import Scorer

    how = {"model_name": model_name, "api_key": api_key, "operation": operation or Operation()}
    if isinstance(pipeline, Scorer):
        if grpc_port is not None:
            raise ValueError("a reward model is served over REST alone, and grpc_port is given; leave it out")
        app = create_score_app(pipeline, **how)
    else:
        app = create_app(pipeline, adapter_root=adapter_root, keep=keep or KeepLimits(), web=web, **how)
    taken = port if isinstance(port, socket.socket) else take_port(host, port)
    if isinstance(grpc_port, int):
        grpc_port = take_grpc_port(host, grpc_port)
    server = Server(app, taken, model_name=model_name, drain_seconds=drain_seconds)
    try:
        if grpc_port is not None:
            server.add_grpc(grpc_port, api_keys=keys_of(api_key), operation=how["operation"])
        wait_until_ready(server)
    except BaseException:
        server.close()
        raise
    return server


def wait_until_ready(server: Server) -> None:
    """Returns when the server says that it is well; raises RuntimeError if it does not."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            with direct.open(f"{server.url}/health", timeout=5) as response:
                if json.load(response)["status"] != "failed":
                    return
        if not server.alive or time.monotonic() > deadline:
            raise RuntimeError(f"the server at {server.url} did not become healthy in {_READY_SECONDS:g} s")
        time.sleep(0.02)


def take_grpc_port(host: str, port: int) -> socket.socket:
    """`take_port` for gRPC. Raises ValueError as well where its packages are not installed."""
    missing = [name for name in ("grpc", "google.protobuf") if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"gRPC needs the packages grpcio and protobuf, and {' and '.join(missing)} cannot be imported; "
            "install the extra `serve`, or leave out --grpc-port: /v2 answers over HTTP"
        )
    return take_port(host, port, flag="--grpc-port")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in is not there
        return False


def take_port(host: str, port: int, *, flag: str = "--port") -> socket.socket:
    """A socket bound to the address, not yet listening. Raises ValueError if somebody else has it."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}; give 1..65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"host {host!r} is not an address of this machine ({error}); give 127.0.0.1, or 0.0.0.0"
        ) from error
    taken = socket.socket(family, kind, protocol)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(address)
        taken.listen(1)  # two sockets may be bound to one port, only one may listen
    except OSError as error:
        taken.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} on {host} is in use; give another one with {flag}, or 0 for a free one"
            ) from error
        raise ValueError(f"{host}:{port} cannot be taken ({error.strerror}); give another host or port") from error
    return taken
