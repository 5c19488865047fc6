"""`make quickstart` on a fresh clone of the last commit: times, memory of all its processes, what the chain reached.

    python -m experiments.benchmarks.quickstart

Hardware: 2 CPU cores and 8 GB of memory; git, make and a network for the packages
Time: 7 to 14 minutes

The clone lies in a path with spaces. No cache of this project, of jax or of numba is there at first; pip's and uv's
caches are as they are. Three calls: `make setup` installs, `make quickstart` runs the chain in the installed checkout
(both together are what a bare checkout takes), `make quickstart ARGS=--fresh` runs it again with what was compiled.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import tiny
from experiments.benchmarks import record

RESULTS = record.RESULTS / "quickstart.json"
CALLS = {"setup": ("setup",), "installed": ("quickstart",), "again": ("quickstart", "ARGS=--fresh")}
EVERY = 0.25
"""Seconds between two looks at the memory."""


class Watched(NamedTuple):
    """A command that ended: wall seconds, and the most memory of all its processes together, shared pages once."""

    seconds: float
    peak_bytes: int


def watched(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> Watched:
    """Runs a command while it looks at the memory of its processes. Raises CalledProcessError where it fails."""
    peak, over = 0, threading.Event()

    def look() -> None:
        nonlocal peak
        while not over.wait(EVERY):
            peak = max(peak, sum(map(_memory, _family(process.pid))))

    started = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, env=dict(env)) as process:
        looking = threading.Thread(target=look)
        looking.start()
        try:
            code = process.wait()
        finally:
            over.set()
            looking.join()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return Watched(time.perf_counter() - started, peak)


def _family(pid: int) -> list[int]:
    """Returns a process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _memory(pid: int) -> int:
    """Returns the bytes of a process, its part of those that it shares; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def reached(root: Path) -> dict[str, Any]:
    """Returns what the chain in `root` says of itself: seconds of its stages, and the numbers of its first screen."""
    found = {stage.name: tiny.result(root, stage.name) for stage in tiny.stages()}
    evaluated, rlhf, calls = found["evaluate"], found["rlhf"], found["serve"]["calls"]
    return {
        "stages": {name: stage["seconds"] for name, stage in found.items()},
        "num_params": found["pretrain"]["num_params"],
        "tokens_per_second": found["pretrain"].get("tokens_per_second"),
        "bits_per_byte": evaluated["tasks"]["pretrain"]["held_out_text"]["value"],
        "baselines": evaluated["baselines"],
        "executed": {name: row["executed"]["value"] for name, row in evaluated["interpreter"].items()},
        "right": {name: row["right"]["value"] for name, row in evaluated["interpreter"].items()},
        "reward_accuracy": found["reward"]["held_out_accuracy"],
        "gold": [row["gold"] for row in rlhf["evaluations"]],
        "num_evaluated": rlhf["num_evaluated"],
        "logprob_difference": rlhf["logprob_difference"],
        "export": {name: row["max_logit_difference"] for name, row in found["export"].items() if isinstance(row, dict)},
        "quantised_bits_per_byte": {
            name: row["bits_per_byte"] for name, row in found["quantize"].items() if isinstance(row, dict)
        },
        "first_token_seconds": calls["stream"]["first_token_seconds"],
        "whole_answer_seconds": calls["chat"]["seconds"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    here = Path(__file__).resolve().parent.parent.parent
    ours = ("JAX_", "XLA_", "NUMBA_", "WANDB_", "PYTHON", "XDG_CACHE_HOME", "VIRTUAL_ENV", "MAKE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "a path with spaces"
        subprocess.run(["git", "clone", "--quiet", str(here), str(clone)], check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, check=True, capture_output=True, text=True)
        env |= {"XDG_CACHE_HOME": str(Path(folder) / "cache"), "UV_CACHE_DIR": _uv_cache()}
        calls, runs = {}, {}
        for name, targets in CALLS.items():
            calls[name] = watched(["make", *targets], cwd=clone, env=env)
            if name != "setup":
                runs[name] = reached(clone / "runs" / "tiny")
    result = {
        "what": "make quickstart on a fresh clone; bare: setup and installed; again: with what was compiled",
        "commit": commit.stdout.strip(),
        **record.environment(),
        "seconds": {"bare": calls["setup"].seconds + calls["installed"].seconds}
        | {name: call.seconds for name, call in calls.items()},
        "peak_bytes": {name: call.peak_bytes for name, call in calls.items()},
        "reached": runs["installed"],
        "reached_again": runs["again"],
    }
    record.write(args.output, result)


def _uv_cache() -> str:
    """Returns where uv keeps packages: XDG_CACHE_HOME names another folder for the clone."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return os.environ.get("UV_CACHE_DIR") or str(Path(cache) / "uv")


if __name__ == "__main__":
    main()
