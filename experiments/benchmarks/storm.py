"""A storm of requests over a server: malformed ones, clients that leave at any byte, more at once than it takes on.

    python -m experiments.benchmarks.storm                          # a tiny model, a server of its own, 10,000 requests
    python -m experiments.benchmarks.storm --requests 300           # a short one
    python -m experiments.benchmarks.storm --only 1234              # one request of it, and what is heard
    python -m experiments.benchmarks.storm --url http://HOST:PORT   # a server that runs; it should serve nobody else
    python -m experiments.benchmarks.storm --kill                   # kill -9 in the midst of answers, and a new start

Hardware: any; nothing in the result is a speed
Time: about 5 minutes on 2 CPU cores, 1 minute with --requests 300

Three of ten requests are malformed, three of ten are left by their client: within the head or the body, in the queue,
in prefill, in the midst of the answer, behind its last byte. Request `n` is a pure function of the seed and of what is
served, so that a fault can be looked at alone; in what company it came is chance. The demands are in `storm_checks`.
Exit status 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import record
from experiments.benchmarks.storm_checks import (
    IDLE,
    Check,
    Figures,
    Tally,
    checks,
    fault_of,
    new_tally,
    process_figures,
    series_of,
    told,
)
from experiments.benchmarks.storm_client import Exchange, Heard, exchange
from experiments.benchmarks.storm_traffic import KEPT, Case, Served, Step, case, post, probes

ROOT = Path(__file__).resolve().parents[2]
MODEL = "storm"
MARK = 1000
"""Requests after which memory, threads and files are read the first time."""
_SETTLE_SECONDS = 30.0
_START_SECONDS = 300.0
_MAX_BODY_MIB = 1
_SERVER = ("--max-batch", 4, "--max-context", 256, "--num-pages", 48, "--max-body", _MAX_BODY_MIB)
_LIMITS = ("--max-concurrent", 24, "--max-waiting", 8)


class Target(NamedTuple):
    """A server that is stormed."""

    url: str
    pid: int | None = None
    grpc: str | None = None
    """Its address for gRPC."""
    log: Path | None = None


# --- the server -------------------------------------------------------------------------------------------------------


def write_model(folder: Path) -> None:
    """Writes random weights of InternLM2's architecture and a tokenizer as a Hugging Face folder."""
    import jax

    from internjax.hf.generation import GenerationConfig
    from internjax.hf.save import save_model
    from internjax.model import decoder
    from internjax.model.config import ModelConfig
    from internjax.text.chat import stop_ids
    from internjax.text.tokenizer import train_tokenizer

    corpus = ["def gcd(a, b): return the greatest common divisor of two numbers.\nThe answer is 6, héllo wörld 你好.\n"]
    tokenizer = train_tokenizer(corpus * 20, vocab_size=340)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        initializer_range=0.2,
        dtype="float32",
    )
    params = jax.jit(lambda key: decoder.init(config, key))(jax.random.key(0))
    generation = GenerationConfig(eos_ids=stop_ids(tokenizer))
    save_model(folder, config=config, params=params, tokenizer=tokenizer, generation=generation)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@contextlib.contextmanager
def serving(model: Path, log: Path, *, port: int, grpc_port: int | None) -> Iterator[Target]:
    """A server process of the model, answering. Raises RuntimeError where it does not come to that."""
    flags = [*_SERVER, *_LIMITS, "--name", MODEL, "--port", port]
    flags += [] if grpc_port is None else ["--grpc-port", grpc_port]
    command = [sys.executable, "-m", "serve", model, *flags]
    with log.open("ab") as written:
        process = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=written, stderr=written)
    grpc = None if grpc_port is None else f"127.0.0.1:{grpc_port}"
    target = Target(f"http://127.0.0.1:{port}", process.pid, grpc, log)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not is_well(target.url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield target
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_well(url: str) -> bool:
    """Whether the server says that it takes requests."""
    try:
        return json.loads(_get(url, "/health"))["status"] in ("ok", "degraded")
    except (OSError, ValueError, KeyError):
        return False


def _get(url: str, path: str) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the shell names
    with direct.open(url + path, timeout=30) as response:
        return response.read()


def served_by(target: Target, *, max_body: int) -> Served:
    """What a server serves, as it says."""
    paths = set(json.loads(_get(target.url, "/openapi.json"))["paths"])
    for path in ("/v2", "/metrics"):
        with contextlib.suppress(urllib.error.HTTPError):
            _get(target.url, path)
            paths.add(path)
    if target.grpc is not None:
        paths.add("grpc")
    model = json.loads(_get(target.url, "/v1/models"))["data"][0]["id"]
    return Served(model, frozenset(paths), max_body)


# --- the storm --------------------------------------------------------------------------------------------------------


class Storm:
    """Sends cases to a server, so many at once, and counts what comes of them."""

    def __init__(self, target: Target, served: Served, *, seed: int, at_once: int, seconds: float):
        """seconds: for an exchange, before it counts as hung."""
        self.target, self.served, self.seed = target, served, seed
        self._at_once, self._seconds = at_once, seconds
        self.tally: Tally = new_tally()
        self._channel: Any = None

    async def run(self, numbers: Iterable[int]) -> None:
        """Sends the cases of these numbers; returns when all are over."""
        left = iter(numbers)

        async def send() -> None:
            for number in left:
                await self.send(case(number, self.served, seed=self.seed))

        await asyncio.gather(*(send() for _ in range(self._at_once)))

    async def send(self, what: Case) -> list[tuple[Step, Heard]]:
        """Sends the steps of a case one after the other."""
        self.tally.sent.update((what.kind, f"sort: {what.sort}"))
        heard_of, kept = [], None
        for index, step in enumerate(what.steps):
            asked = step.asked
            if KEPT in asked.path or KEPT.encode() in asked.body:
                if kept is None:
                    continue
                body = asked.body.replace(KEPT.encode(), kept.encode())
                asked = asked._replace(path=asked.path.replace(KEPT, kept), body=body)
            heard = await self._exchange(what, index, step._replace(asked=asked))
            heard_of.append((step, heard))
            if step.keeps and isinstance(found := heard.json(), dict):
                kept = found.get("id", kept)
            elif step.keeps:  # a stream's
                kept = next((f["response"]["id"] for e in heard.events() if "response" in (f := _value(e))), kept)
        return heard_of

    async def _exchange(self, what: Case, index: int, step: Step) -> Heard:
        if step.asked.method == "GRPC":
            return await self._call(what, index, step)
        for attempt in range(200):
            heard = await exchange(step.asked, self.target.url, seconds=self._seconds)
            told(self.tally, what, index, step, heard)
            if not step.insists or heard.status not in (409, 429, 503):
                if heard.status == 429:
                    await asyncio.sleep(0.1)  # else those who are refused run through the storm
                break
            await asyncio.sleep(min(0.02 * (attempt + 1), 0.5))
        return heard

    async def _call(self, what: Case, index: int, step: Step) -> Heard:
        """A call of gRPC, cancelled where its client leaves. The server counts it by code, and not as one of HTTP."""
        from experiments.benchmarks.storm_grpc import call, open_channel

        if self._channel is None:
            self._channel = open_channel(self.target.grpc)
        end = await call(step.asked, self._channel, seconds=self._seconds)
        self.tally.sent[f"grpc: {end.partition(':')[0]}"] += 1
        heard = Heard("hung", why="the call has no end") if end == "hung" else Heard("left")
        if end == "hung" or end.startswith("fault"):
            told(self.tally, what, index, step, heard if end == "hung" else Heard("broken", why=end))
        return heard

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def own(self, asked: Exchange) -> Heard:
        """A request that is not part of the storm, counted like the others."""
        what = Case(-1, "own", "good", (Step(asked, insists=True),))
        return (await self.send(what))[-1][1]

    async def greedy(self) -> list[Any]:
        """The tokens of the probes."""
        found = []
        for asked in probes(self.served):
            answer = (await self.own(asked)).json()
            choice = answer["choices"][0] if isinstance(answer, dict) and "choices" in answer else {}
            logprobs = choice.get("logprobs") or {}
            found.append(logprobs.get("tokens") or [token["token"] for token in logprobs.get("content", ())])
        return found

    async def settled(self, before: Figures | None = None) -> Figures:
        """The server's figures when nothing runs any more and as few files are open as before, or after some time."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            figures = self._figures(await self._metrics())
            is_idle = not any(figures.series.get(name) for name in IDLE)
            has_closed = before is None or (figures.files or 0) <= (before.files or 0)
            if (is_idle and has_closed) or time.monotonic() > deadline:
                return figures
            await asyncio.sleep(0.2)

    async def _metrics(self) -> str:
        return (await self.own(Exchange("GET", "/metrics"))).body.decode() if "/metrics" in self.served.paths else ""

    def _figures(self, metrics: str) -> Figures:
        of_process = {} if self.target.pid is None else process_figures(self.target.pid)
        return Figures(series_of(metrics), **of_process)

    async def end_sessions(self) -> int | None:
        """Ends the sessions whose clients left before they knew them; returns how many there are then."""
        if "/v1/sessions" not in self.served.paths:
            return None
        for session in ((await self.own(Exchange("GET", "/v1/sessions"))).json() or {}).get("data", ()):
            await self.own(Exchange("DELETE", f"/v1/sessions/{session['id']}"))
        return len((await self.own(Exchange("GET", "/v1/sessions"))).json()["data"])

    async def warm_up(self) -> None:
        """Asks for what is compiled when it is first needed: embeddings of every length."""
        if "/v1/embeddings" in self.served.paths:
            for length in (5, 65, 129, 250):
                await self.own(post("/v1/embeddings", {"model": self.served.model, "input": [5] * length}))


def _value(event: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(event), dict):
            return found
    return {}


async def storm(target: Target, *, requests: int, seed: int, at_once: int, seconds: float, max_body: int) -> dict:
    """What a storm of so many requests did to a server: see `checks`."""
    served = served_by(target, max_body=max_body)
    run = Storm(target, served, seed=seed, at_once=at_once, seconds=seconds)
    await run.warm_up()
    before = await run.greedy()
    start = await run.settled()
    # The request that read `start` is not in it, and counted from then on; the one that reads `end` is in the tally.
    run.tally = new_tally()
    mark = None
    if requests >= 2 * MARK:
        await run.run(range(MARK))
        mark = await run.settled(start)
    await run.run(range(MARK if mark else 0, requests))
    sessions_left = await run.end_sessions()
    after = await run.greedy()
    await run.close()
    end = await run.settled(mark or start)
    log = None if target.log is None else target.log.read_text(errors="replace")
    found = checks(run.tally, start, mark, end, tokens=(before, after), sessions_left=sessions_left, log=log)
    return {
        "requests": requests,
        "seed": seed,
        "at_once": at_once,
        "passed": all(check.passed is not False for check in found),
        "checks": [check._asdict() for check in found],
        "sent": dict(sorted(run.tally.sent.items())),
        "statuses": dict(sorted((run.tally.statuses + run.tally.perhaps).items())),
        "ends_without_status": dict(run.tally.unknown),
        "faults": [fault._asdict() for fault in run.tally.faults[:50]],
    }


async def only(target: Target, number: int, *, seed: int, seconds: float, max_body: int) -> bool:
    """Sends one request of a storm and shows it with all that is heard; returns whether it is as it should be."""
    run = Storm(target, served_by(target, max_body=max_body), seed=seed, at_once=1, seconds=seconds)
    what = case(number, run.served, seed=seed)
    print(f"request {number} of seed {seed}: {what.kind}, {what.sort}")
    for step, heard in await run.send(what):
        print(f"  {step.asked._replace(body=step.asked.body[:500])}\n  wants {step.wants}")
        print(f"  {heard._replace(body=heard.body[:2000])}\n  {fault_of(step, heard) or 'as it should be'}")
    await run.close()
    for fault in run.tally.faults:
        print(f"fault: {fault.what}")
    return not run.tally.faults


# --- kill -9 ----------------------------------------------------------------------------------------------------------


async def _killed(target: Target, served: Served) -> tuple[list[Any], list[Check], str | None]:
    """Kills a server in the midst of streams; returns its greedy tokens, what came of clients, and a session's id."""
    run = Storm(target, served, seed=0, at_once=1, seconds=30)
    tokens, session = await run.greedy(), None
    body = {"model": served.model, "max_tokens": 200, "ignore_eos": True, "stream": True}
    asked = [post("/v1/completions", body | {"prompt": "a"}) for _ in range(24)]
    if "/v1/sessions" in served.paths:
        session = (await run.own(post("/v1/sessions", {"model": served.model}))).json()["id"]
        turn = {"session_id": session, "messages": [{"role": "user", "content": "a"}]}
        asked.append(post("/v1/chat/completions", body | turn))
    clients = [asyncio.create_task(exchange(each._replace(is_slow=True), target.url, seconds=30)) for each in asked]
    await asyncio.sleep(0.3)  # some are in their streams, some wait for a slot
    assert target.pid is not None
    os.kill(target.pid, signal.SIGKILL)
    ends = [heard.end for heard in await asyncio.gather(*clients)]
    in_stream = sum(heard.result().status == 200 and heard.result().end == "broken" for heard in clients)
    is_broken, what = "hung" not in ends and in_stream > 0, f"{ends}, {in_stream} in streams"
    return tokens, [Check("clients see a broken connection", is_broken, what)], session


async def _again(target: Target, served: Served, tokens: list[Any], session: str | None) -> list[Check]:
    """What a server that was started anew says to those who come back."""
    run = Storm(target, served, seed=0, at_once=1, seconds=30)
    after = await run.greedy()
    found = [Check("greedy tokens are the same", tokens == after and all(tokens), f"{tokens!r:.200}")]
    if session is not None:
        turn = {"model": served.model, "session_id": session, "messages": [{"role": "user", "content": "a"}]}
        heard = await run.own(post("/v1/chat/completions", turn))
        code = ((heard.json() or {}).get("error") or {}).get("code")
        is_told = heard.status == 404 and code == "session_not_found"
        found.append(Check("sessions are refused", is_told, f"status {heard.status}, code {code}"))
    return found


def kill(model: Path, log: Path) -> dict:
    """Kills a server in the midst of answers, starts it again on its port, and says what its clients saw."""
    port = free_port()
    with serving(model, log, port=port, grpc_port=None) as target:
        served = served_by(target, max_body=_MAX_BODY_MIB << 20)
        tokens, found, session = asyncio.run(_killed(target, served))
    with serving(model, log, port=port, grpc_port=None) as target:
        found += asyncio.run(_again(target, served, tokens, session))
    return {"passed": all(check.passed for check in found), "checks": [check._asdict() for check in found]}


# --- the command ------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The result to be read."""
    words = {True: "ok", False: "FAILED", None: "not judged"}
    lines = [f"{words[check['passed']]:10}  {check['name']:34}  {check['detail']}" for check in result["checks"]]
    for name in ("sent", "statuses", "ends_without_status"):
        if name in result:
            lines.append(f"{name}: " + ", ".join(f"{key} {count}" for key, count in result[name].items()))
    lines += [
        f"fault in {fault['number']} ({fault['kind']}), step {fault['step']}: {fault['what']}"
        for fault in result.get("faults", ())[:20]
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=36, help="clients (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="until an answer counts as hung (%(default)g)")
    parser.add_argument("--only", type=int, metavar="N", help="send request N alone, and show what is heard")
    parser.add_argument("--url", help="of a server that runs, instead of one of its own")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="with --url: where it answers gRPC")
    parser.add_argument("--pid", type=int, help="with --url: its process, to look at memory, threads and files")
    parser.add_argument("--max-body", type=int, default=16, metavar="MIB", help="with --url: its own (%(default)s)")
    parser.add_argument("--kill", action="store_true", help="kill -9 in the midst of answers, and a new start")
    parser.add_argument("--log", type=Path, help="where the server's log goes (default: not kept)")
    parser.add_argument("--output", type=Path, help="default: results/storm.json, storm_kill.json with --kill")
    args = parser.parse_args(arguments)
    if args.url is not None and args.kill:
        parser.error("--kill is for a server of its own; leave out --url")
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder, "server.log")
        model = Path(folder, MODEL)
        if args.url is None:
            write_model(model)
        if args.kill:
            result = kill(model, log)
        else:
            own = serving(model, log, port=free_port(), grpc_port=free_port() if _has_grpc() else None)
            given = contextlib.nullcontext(Target(args.url, args.pid, args.grpc))
            with own if args.url is None else given as target:
                max_body = (_MAX_BODY_MIB if args.url is None else args.max_body) << 20
                common = {"seed": args.seed, "seconds": args.seconds, "max_body": max_body}
                if args.only is not None:
                    return 0 if asyncio.run(only(target, args.only, **common)) else 1
                result = asyncio.run(storm(target, requests=args.requests, at_once=args.at_once, **common))
    print(table(result))
    output = args.output or record.RESULTS / ("storm_kill.json" if args.kill else "storm.json")
    record.write(output, result | {"environment": record.environment()})
    return 0 if result["passed"] else 1


def _has_grpc() -> bool:
    return importlib.util.find_spec("grpc") is not None


if __name__ == "__main__":
    sys.exit(main())
