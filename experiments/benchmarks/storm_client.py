"""The client of `experiments.benchmarks.storm`: HTTP by hand, so that it can leave at any byte of a request or answer.

An exchange has one connection and always an end: a deadline turns silence into the end "hung".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

PLACES = ("head", "body", "queue", "prefill", "answer", "end")
"""Where a client leaves: before its head or its body is sent, at once behind it, a moment later, in the midst of what
is answered, or by a reset behind the last byte."""

Place = Literal["head", "body", "queue", "prefill", "answer", "end"]
End = Literal["complete", "left", "broken", "hung"]


class Exchange(NamedTuple):
    """A request over HTTP. `data` is all of it where it is no proper request."""

    method: str
    path: str
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    data: bytes | None = None
    is_chunked: bool = False
    leaves: Place | None = None
    when: float = 0.0
    """How far into that part, in [0, 1)."""
    is_slow: bool = False
    """Reads a few bytes at a time."""


class Heard(NamedTuple):
    """What came of an exchange."""

    end: End
    status: int | None = None
    """None: no answer was begun, as far as the client knows."""
    headers: Mapping[str, str] = {}
    body: bytes = b""
    why: str = ""

    def json(self) -> Any:
        """The body's value, or None where it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    def events(self) -> list[str]:
        """The data of a stream's events."""
        lines = self.body.decode(errors="replace").splitlines()
        return [line[6:] for line in lines if line.startswith("data: ")]


class _Left(Exception):
    """The client went away, as it meant to."""


async def exchange(asked: Exchange, url: str, *, seconds: float) -> Heard:
    """What is heard of a request to the server at `url`. seconds: until it counts as hung."""
    heard: dict[str, Any] = {}
    try:
        async with asyncio.timeout(seconds):
            await _exchange(asked, url, heard)
        return Heard("complete", **_told(heard))
    except _Left:
        return Heard("left", **_told(heard))
    except TimeoutError:
        return Heard("hung", **_told(heard), why=f"no end within {seconds:g} seconds")
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        return Heard("broken", **_told(heard), why=f"{type(error).__name__}: {error}"[:200])


def _told(heard: Mapping[str, Any]) -> dict[str, Any]:
    return {**heard, "body": bytes(heard.get("body", b""))}


def head_of(asked: Exchange, host: str) -> bytes:
    """The head of a request, as it is sent."""
    length = ("Transfer-Encoding", "chunked") if asked.is_chunked else ("Content-Length", str(len(asked.body)))
    given = {name.lower() for name, _ in asked.headers}
    own = [("Host", host), ("Connection", "close"), *([length] if asked.method == "POST" else [])]
    lines = [(name, value) for name, value in own if name.lower() not in given] + list(asked.headers)
    first = f"{asked.method} {asked.path} HTTP/1.1"
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in lines), "", ""]).encode()


async def _exchange(asked: Exchange, url: str, heard: dict[str, Any]) -> None:
    parts = urllib.parse.urlsplit(url)
    family, kind, protocol, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0]
    link = socket.socket(family, kind, protocol)
    link.setblocking(False)
    if asked.is_slow:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    writer = sending = None
    try:
        await asyncio.get_running_loop().sock_connect(link, address)
        reader, writer = await asyncio.open_connection(sock=link, limit=1 << 16)
        sending = asyncio.ensure_future(_send(asked, parts.netloc, writer))
        if asked.leaves in ("head", "body", "queue"):
            await sending
            raise _Left
        if asked.leaves == "prefill":
            await sending
            await asyncio.sleep(0.05 * asked.when)
            raise _Left
        await _hear(asked, reader, heard)
        if asked.leaves == "end":
            raise _Left
    finally:
        if sending is not None:
            sending.cancel()
            # A server that refuses a long body closes before all of it was sent.
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sending
        if writer is None:
            link.close()
        elif asked.leaves == "end" or asked.when > 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def _send(asked: Exchange, host: str, writer: asyncio.StreamWriter) -> None:
    head = head_of(asked, host) if asked.data is None else asked.data
    if asked.leaves == "head":
        head = head[: int(len(head) * asked.when)]
    writer.write(head)
    if asked.data is None and asked.leaves != "head":
        body = asked.body[: int(len(asked.body) * asked.when)] if asked.leaves == "body" else asked.body
        if asked.is_chunked:
            size = max(1, len(body) // 3)
            pieces = [body[start : start + size] for start in range(0, len(body), size)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
            body += b"" if asked.leaves == "body" else b"0\r\n\r\n"
        writer.write(body)
    await writer.drain()


async def _hear(asked: Exchange, reader: asyncio.StreamReader, heard: dict[str, Any]) -> None:
    """Reads status, headers and body into `heard`, and leaves where it is to be left."""
    impatience = asyncio.timeout(asked.when * 0.2 if asked.leaves == "answer" else None)
    try:
        async with impatience:  # until the answer begins: one that is no stream may take long
            head = await reader.readuntil(b"\r\n\r\n")
    except TimeoutError:
        if impatience.expired():
            raise _Left from None
        raise
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    heard["status"] = int(first.split(" ")[1])
    pairs = (line.partition(":") for line in lines)
    headers = heard["headers"] = {name.lower(): value.strip() for name, _, value in pairs}
    body = heard["body"] = bytearray()
    enough = 40 + int(asked.when * 4000) if asked.leaves == "answer" else None
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await _line(reader), 16):
            await _take(reader, size, body, asked.is_slow)
            await reader.readexactly(2)
            if enough is not None and len(body) >= enough:
                raise _Left
        await reader.readexactly(2)
    elif "content-length" in headers:
        size = int(headers["content-length"])
        await _take(reader, size if enough is None else min(size, enough), body, asked.is_slow)
    else:
        body += await reader.read()
    if asked.leaves == "answer":
        raise _Left


async def _line(reader: asyncio.StreamReader) -> bytes:
    return (await reader.readuntil(b"\r\n"))[:-2]


async def _take(reader: asyncio.StreamReader, size: int, body: bytearray, is_slow: bool) -> None:
    while size:
        piece = await reader.read(min(size, 64) if is_slow else size)
        if not piece:
            raise EOFError("the connection ended inside the answer")
        body += piece
        size -= len(piece)
        if is_slow:
            await asyncio.sleep(0.002)


def leaving(asked: Exchange, rng: random.Random) -> Exchange:
    """The same request by a client that leaves somewhere."""
    return asked._replace(leaves=rng.choice(PLACES), when=rng.random())
