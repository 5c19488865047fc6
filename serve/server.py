"""A server with a lifetime: a port is taken, the application answers on it, and it is gone when closed."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.kept import KeepLimits
    from serve.pipeline import Pipeline
    from serve.scores import Scorer

_READY_SECONDS = 30.0


class Server:
    """A running server. Use it as a context manager, or `close` it; the pipeline behind it stays open."""

    def __init__(
        self,
        pipeline: Pipeline | Scorer,
        port: socket.socket,
        *,
        model_name: str,
        api_key: str | None,
        drain_seconds: int,
        adapter_root: Path | None,
        grpc_port: socket.socket | None,
        keep: KeepLimits | None,
        web: bool,
    ):
        # Here, so that a port can be taken, or found in use, before anything heavy is loaded.
        import uvicorn

        from serve.kept import KeepLimits
        from serve.openai import create_app, create_score_app
        from serve.scores import Scorer
        from serve.web import add_page

        if isinstance(pipeline, Scorer):
            app = create_score_app(pipeline, model_name=model_name, api_key=api_key)
        else:
            how = {"adapter_root": adapter_root, "keep": keep or KeepLimits()}
            app = create_app(pipeline, model_name=model_name, api_key=api_key, **how)
            if web:
                add_page(app)
        self._grpc = None
        if grpc_port is not None and isinstance(pipeline, Scorer):
            raise ValueError("a reward model is served over REST alone, and grpc_port is given; leave it out")
        if grpc_port is not None:
            from serve.grpc import GrpcServer
            from serve.kserve import Served

            host, number = grpc_port.getsockname()[:2]
            grpc_port.close()  # gRPC takes no socket of others: it was held so far to be there for it now
            served = Served(pipeline, model_name, api_key)
            self._grpc = GrpcServer(served, host=host, port=number, drain_seconds=drain_seconds)
        port.listen(128)
        host, number = port.getsockname()[:2]
        self.url = f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"
        self.grpc_address = None if self._grpc is None else self._grpc.address
        self.model_name = model_name
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=drain_seconds,
            )
        )
        self._thread = threading.Thread(target=self._server.run, args=([port],), name="serve", daemon=True)
        self._thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Takes no more requests, lets those under way finish for the drain time, and frees the port."""
        self._server.should_exit = True
        if self._grpc is not None:
            self._grpc.leave()
        self._thread.join()
        if self._grpc is not None:
            self._grpc.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and (self._grpc is None or self._grpc.alive)


def start_server(
    pipeline: Pipeline | Scorer,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int | socket.socket = 0,
    api_key: str | None = None,
    drain_seconds: int = 10,
    adapter_root: Path | None = None,
    grpc_port: int | socket.socket | None = None,
    keep: KeepLimits | None = None,
    web: bool = True,
) -> Server:
    """A server of `pipeline`, answering when this returns. `port` 0 takes a free one: see `Server.url`.

    adapter_root, keep: see `serve.openai.create_app`. grpc_port: for the KServe v2 protocol over gRPC as well, 0 for a
    free one: see `Server.grpc_address`. web: whether the chat page is at `/`; a reward model has none.
    """
    taken = port if isinstance(port, socket.socket) else take_port(host, port)
    if isinstance(grpc_port, int):
        grpc_port = take_grpc_port(host, grpc_port)
    how = {"api_key": api_key, "drain_seconds": drain_seconds, "adapter_root": adapter_root, "grpc_port": grpc_port}
    how |= {"keep": keep, "web": web}
    server = Server(pipeline, taken, model_name=model_name, **how)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            with direct.open(f"{server.url}/health", timeout=5) as response:
                if json.load(response)["status"] != "failed":
                    return server
        if not server.alive or time.monotonic() > deadline:
            server.close()
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
