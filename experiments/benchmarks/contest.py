"""Contenders in processes of their own that work in turns: what benchmarks beside other frameworks have in common.

All have the settings of malloc (`internjax.host_memory`) that our commands for the same work have. Whatever else the
machine does meets all contenders, a block of steps each; a figure is the median over all blocks. What the first steps
gave (losses of training, tokens of decoding) is compared before anything is timed. A contender that ends early (no
memory, a package that is missing) is reported with its code, and the others go on.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from internjax.host_memory import keep_freed

NUM_CHECKED = 3
"""Steps whose results all contenders must agree on."""
_LAZY = 2
"""Steps after them that are not timed: what a framework still does lazily is done then."""


class Contender(NamedTuple):
    """step(position) does that piece of work and returns its result (a loss, tokens) once it is on the host;
    peak_bytes() of memory."""

    step: Callable[[int], Any]
    peak_bytes: Callable[[], int]


class Entry(NamedTuple):
    """How a contender's process is started: its arguments after `python`, variables of its environment, and which
    python."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    python: str = sys.executable


class Answers(NamedTuple):
    """What a contender said: the first steps, which are checked, and the timed blocks."""

    first: dict[str, Any]
    blocks: list[dict[str, Any]]
    failed: int | None = None
    """The exit code of a contender that ended early."""


def add_peer_python(parser: argparse.ArgumentParser) -> None:
    """Adds --peer-python: contenders on torch may be installed for another Python than ours."""
    parser.add_argument(
        "--peer-python",
        default=sys.executable,
        metavar="PYTHON",
        help="that has torch and transformers, and jax and flax too (default: this one)",
    )


def packages_of(python: str) -> dict[str, str]:
    """Returns the versions of the packages that are measured, as another Python has them."""
    code = "import json; from experiments.benchmarks import record; print(json.dumps(record.packages()))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise SystemExit(
            f"error: {python} does not run this code ({said[0]}); give --peer-python one with jax and flax"
        )
    return json.loads(done.stdout)


def peak_rss() -> int:
    """Returns the largest bytes of host memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes() -> int:
    """Returns the largest bytes that jax has held on the device; of host memory where it does not count them."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or peak_rss()


def work(build: Callable[[], Contender], *, keeps_memory: bool = True) -> None:
    """Does blocks of steps when told to ("N" on a line of the input) and answers each with a line of JSON.

    keeps_memory: as the commands of `experiments` and, so that malloc is set alike, a peer; what a server does is done
    as `python -m serve` does it, without.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr; stdout is the answers'
    if keeps_memory:
        keep_freed()
    contender, position = build(), 0
    for line in sys.stdin:
        seconds, results = [], []
        for _ in range(int(line)):
            started = time.perf_counter()
            results.append(contender.step(position))
            seconds.append(time.perf_counter() - started)
            position += 1
        answer = {"seconds": seconds, "results": results, "peak_bytes": contender.peak_bytes()}
        print(json.dumps(answer), file=out, flush=True)


def measure(
    entries: Mapping[str, Entry], *, num_blocks: int, block: int, check: Callable[[dict[str, list[Any]]], None]
) -> dict[str, Answers]:
    """Returns what every contender answered. `check` is given the results of the first steps, and may end the run."""
    workers = {who: _started(entry) for who, entry in entries.items()}
    failed: dict[str, int] = {}

    def ask(num_steps: int) -> dict[str, dict]:
        answers = {who: _ask(process, num_steps) for who, process in workers.items() if who not in failed}
        failed.update({who: workers[who].wait() for who, answer in answers.items() if answer is None})
        return {who: answer for who, answer in answers.items() if answer is not None}

    try:
        first = ask(NUM_CHECKED)
        check({who: answer["results"] for who, answer in first.items()})
        ask(_LAZY)
        blocks = [ask(block) for _ in range(num_blocks)]
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    return {
        who: Answers(first.get(who, {}), [each[who] for each in blocks if who in each], failed.get(who))
        for who in entries
    }


def _started(entry: Entry) -> subprocess.Popen:
    # Two frameworks share one card: neither may take all of it at the start.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"} | entry.environment
    command = [entry.python, *entry.arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(process: subprocess.Popen, num_steps: int) -> dict[str, Any] | None:
    try:
        process.stdin.write(f"{num_steps}\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def require_equal(losses: Mapping[str, list[float]], *, tolerance: float) -> None:
    """Ends the run when contenders that should train the same model do not."""
    reference = next(iter(losses.values()), [])
    if not all(np.allclose(given, reference, atol=tolerance, rtol=0) for given in losses.values()):
        raise SystemExit(
            f"error: the contenders do not train the same model; losses of the first steps: {dict(losses)}"
        )


def figures(answers: Answers, *, tokens: int, flops: float) -> dict[str, Any]:
    """Returns the figures of one contender whose steps handle `tokens` tokens with `flops` useful operations."""
    import jax

    from internjax.train.flops import mfu

    if answers.failed is not None or not answers.blocks:
        return {"failed": f"ended with code {answers.failed}; its message stands in the log"}
    seconds = sorted(second for block in answers.blocks for second in block["seconds"])
    median = statistics.median(seconds)
    used = mfu(flops, median, 1, jax.devices()[0].device_kind)
    return {
        "first_step_seconds": round(answers.first["seconds"][0], 2),
        "median_seconds": round(median, 5),
        "p99_seconds": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 5),
        "tokens_per_second": round(tokens / median),
        "mfu": None if used is None else round(used, 4),
        "peak_bytes": answers.blocks[-1]["peak_bytes"],
        "first_losses": answers.first["results"],
    }


def ratio(found: Mapping[str, dict], *, ours: str, peers: Sequence[str]) -> dict[str, float]:
    """Returns how many times as long a peer's step takes as ours; only of those that were measured."""
    if "failed" in found[ours]:
        return {}
    return {
        who: round(found[who]["median_seconds"] / found[ours]["median_seconds"], 3)
        for who in peers
        if "failed" not in found[who]
    }


def show(found: Mapping[str, dict]) -> None:
    """Prints a line for every contender."""
    for who, each in found.items():
        if "failed" in each:
            print(f"{who:20} {each['failed']}")
            continue
        used = "" if each["mfu"] is None else f", MFU {each['mfu']:.1%}"
        memory = f"{each['peak_bytes'] / 1e9:.2f} GB"
        print(
            f"{who:20} {each['median_seconds'] * 1e3:9.1f} ms  {each['tokens_per_second']:,} tokens/s, {memory}{used}"
        )
