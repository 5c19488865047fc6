"""Servers in processes of their own, and clients that ask them at once and note when what arrives.

A client costs little, so that what it takes of the machine is nearly nothing beside the servers: it reads what has come
of a streamed answer and notes the time; what that says is looked at when all clients are done. A server whose turn it
is not is stopped (SIGSTOP): even one that polls while it has nothing to do takes nothing from the others.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from serve.bench.targets import Timing

Found = TypeVar("Found")
Turns = Sequence[Mapping[str, str]]
"""Messages of a conversation, as OpenAI has them."""
TOGETHER = 1e-3
"""Seconds after an arrival in which whatever comes is part of it: parts that a server sends one by one at once."""
_READY_SECONDS, _ANSWER_SECONDS = 600, 600


class Service(NamedTuple):
    """How a contender's server is started: its command, to which `--port N` is added, and the model's name there."""

    command: Sequence[str]
    model: str


class Failed(Exception):
    """What a contender did that ends its part; the others go on."""


class Answer(NamedTuple):
    """A streamed answer: when its tokens came, and its text."""

    timing: Timing
    text: str


class Block(NamedTuple):
    """What several clients saw together."""

    answers: list[Answer]
    cpu_seconds: float
    """Of the server's process, in the meantime."""

    @property
    def num_new(self) -> int:
        return round(sum(answer.timing.num_new for answer in self.answers))

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        timings = [answer.timing for answer in self.answers]
        return max(timing.arrivals[-1] for timing in timings) - min(timing.start for timing in timings)


class Server:
    """A server that runs. It is stopped but for `turn`."""

    def __init__(self, service: Service, log: Path):
        """log: where what it prints goes. Raises Failed where it does not become healthy."""
        self.model = service.model
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process = subprocess.Popen(
            [*service.command, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Lets it run. What goes wrong meanwhile becomes Failed, with what the server said last if it ended."""
        self._signal(signal.SIGCONT)
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            self._explain(error)
        finally:
            self._signal(signal.SIGSTOP)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._explain(None)
            with contextlib.suppress(OSError, http.client.HTTPException), self.connection() as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.05)
        raise Failed(f"was not healthy after {_READY_SECONDS} s")

    def _explain(self, error: Exception | None) -> None:
        # A connection is closed a moment before the process is gone.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        if (code := self._process.poll()) is None:
            raise Failed(f"{type(error).__name__}: {error}") from error
        said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        raise Failed(f"ended with code {code}: {''.join(said)}") from error

    def connection(self) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_SECONDS))

    def cpu_seconds(self) -> float:
        """Returns what its threads have taken so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- asking ----------------------------------------------------------------------------------------------------------


class _Raw(NamedTuple):
    start: float
    pieces: list[tuple[float, bytes]]


def post(connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the server answers to a request whose answer comes whole; Failed where it refuses it."""
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    said = response.read()
    if response.status != 200:
        raise Failed(f"{path} answered {response.status}: {said[:300].decode(errors='replace')}")
    return json.loads(said)


def chat_body(model: str, turns: Turns, num_new: int) -> dict[str, Any]:
    """Returns a greedy request."""
    return {"model": model, "messages": list(turns), "max_tokens": num_new, "temperature": 0.0}


def _stream(connection: http.client.HTTPConnection, body: Mapping[str, Any]) -> _Raw:
    said = json.dumps(body | {"stream": True})
    start = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", said, {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        refusal = response.read()[:300].decode(errors="replace")
        raise Failed(f"/v1/chat/completions answered {response.status}: {refusal}")
    pieces = []
    while piece := response.read1():
        pieces.append((time.perf_counter(), piece))
    return _Raw(start, pieces)


def _read(raw: _Raw, num_new: int) -> Answer:
    """Returns the answer that a stream holds: a word with the space before it is a token."""
    arrivals, counts, texts, finish, rest = [], [], [], None, b""
    for at, piece in raw.pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        text = ""
        for event in events:
            if event == b"data: [DONE]":
                continue
            chunk = json.loads(event.removeprefix(b"data: "))
            if "error" in chunk:
                raise Failed(f"an answer broke off: {chunk['error']}")
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                finish = choice.get("finish_reason") or finish
        if not text:
            continue
        texts.append(text)
        if arrivals and at - arrivals[-1] < TOGETHER:
            counts[-1] += text.count(" ")
        else:
            arrivals.append(at)
            counts.append(text.count(" "))
    if sum(counts) != num_new or finish != "length":
        raise Failed(f"an answer of {num_new} tokens had {sum(counts)} and ended with {finish!r}")
    return Answer(Timing(raw.start, tuple(arrivals), tuple(counts), 0), "".join(texts))


def ask(server: Server, turns: Turns, num_new: int, *, session: str | None = None) -> Answer:
    """Returns the answer to one request, streamed. session: the id of the one that it goes on with."""
    fields = {} if session is None else {"session_id": session}
    with server.connection() as connection:
        return _read(_stream(connection, chat_body(server.model, turns, num_new) | fields), num_new)


def ask_together(server: Server, asked: Sequence[Sequence[Turns]], num_new: int) -> Block:
    """Returns what clients saw, each of which asks its conversations one after the other over one connection."""

    def client(own: Sequence[Turns]) -> list[_Raw]:
        with server.connection() as connection:
            return [_stream(connection, chat_body(server.model, turns, num_new)) for turns in own]

    before = server.cpu_seconds()
    with ThreadPoolExecutor(len(asked)) as pool:
        streams = list(pool.map(client, asked))
    spent = server.cpu_seconds() - before
    return Block([_read(raw, num_new) for own in streams for raw in own], spent)


class Contest:
    """Servers that take turns. One that fails is reported, and the others go on."""

    def __init__(self, services: Mapping[str, Service], folder: Path):
        """folder: where their logs go."""
        self.failed: dict[str, str] = {}
        self._servers: dict[str, Server] = {}
        self._round = 0
        try:
            for who, service in services.items():
                print(f"{who} starts", flush=True)
                try:
                    self._servers[who] = Server(service, folder / f"{who}.log")
                except Failed as error:
                    self._drop(who, error)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Contest":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _drop(self, who: str, error: Failed) -> None:
        self.failed[who] = str(error)
        print(f"{who} failed: {error}", flush=True)

    def turns(self, work: Callable[[Server], Found], *, only: Sequence[str] | None = None) -> dict[str, Found]:
        """Returns what `work` finds with each server that is left (of `only` those). Who begins changes each time."""
        left = [who for who in self._servers if who not in self.failed and (only is None or who in only)]
        begin = self._round % max(1, len(left))
        self._round += 1
        found = {}
        for who in left[begin:] + left[:begin]:
            try:
                with self._servers[who].turn():
                    found[who] = work(self._servers[who])
            except Failed as error:
                self._drop(who, error)
        return {who: found[who] for who in left if who in found}
