"""A server with a lifetime: a port is taken, the application answers on it, and it is gone when closed."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.pipeline import Pipeline

_READY_SECONDS = 30.0


class Server:
    """A running server. Use it as a context manager, or `close` it; the pipeline behind it stays open."""

    def __init__(
        self,
        pipeline: Pipeline,
        port: socket.socket,
        *,
        model_name: str,
        api_key: str | None,
        drain_seconds: int,
        adapter_root: Path | None,
    ):
        # Here, so that a port can be taken, or found in use, before anything heavy is loaded.
        import uvicorn

        from serve.openai import create_app

        port.listen(128)
        host, number = port.getsockname()[:2]
        self.url = f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"
        self.model_name = model_name
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(pipeline, model_name=model_name, api_key=api_key, adapter_root=adapter_root),
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
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()


def start_server(
    pipeline: Pipeline,
    *,
    model_name: str,
    host: str = "127.0.0.1",
    port: int | socket.socket = 0,
    api_key: str | None = None,
    drain_seconds: int = 10,
    adapter_root: Path | None = None,
) -> Server:
    """A server of `pipeline`, answering when this returns. `port` 0 takes a free one: see `Server.url`.

    adapter_root: see `serve.openai.create_app`.
    """
    taken = port if isinstance(port, socket.socket) else take_port(host, port)
    how = {"api_key": api_key, "drain_seconds": drain_seconds, "adapter_root": adapter_root}
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


def take_port(host: str, port: int) -> socket.socket:
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
                f"port {port} on {host} is in use; give another one with --port, or 0 for a free one"
            ) from error
        raise ValueError(f"{host}:{port} cannot be taken ({error.strerror}); give another host or port") from error
    return taken
