"""Processes that are really killed, and end where the process ends that was not: byte by byte."""

import json
import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from internjax.train.checkpoint import committed_steps, problem
from internjax.train.heartbeat import EXIT_PREEMPTED
from internjax.train.loop import EXIT_PREEMPTED as OF_THE_LOOP
from internjax.train.tracking import completed, read_rows
from tests.train import killed_run

KILL = -signal.SIGKILL
SEED = 20
# Each process is forked off a server that has imported everything and touched no device.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.killed_run"])


class Life:
    """One process of a run."""

    def __init__(self, folder: Path, how: str = "end"):
        self.said = folder.with_suffix(f".{time.monotonic_ns()}.said")
        self.process = CONTEXT.Process(target=killed_run.run, args=(str(folder), how, str(self.said)), daemon=True)
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Returns its exit code and what it said."""
        self.process.join(120)
        return self.process.exitcode, self.said.read_text() if self.said.exists() else ""


def rows_of(folder: Path) -> int:
    return len(read_rows(folder / "metrics.jsonl"))


def order_of(folder: Path) -> dict[str, set[str]]:
    """Returns what was read at each position of the data, over all lives of a run."""
    order: dict[str, set[str]] = {}
    for line in folder.with_suffix(".order").read_text().splitlines():
        position, digest = line.split()
        order.setdefault(position, set()).add(digest)
    return order


def deaths(draw: random.Random) -> list[str]:
    """Returns five deaths of one run, one in eight steps or so, of five of the six kinds."""
    kinds = draw.sample(["step", "any", "write", "seal", "commit", "remove"], 5)
    return [f"{kind}:{draw.randrange(8 * index + 1, 8 * index + 8)}" for index, kind in enumerate(kinds)]


def lives(folder: Path, planned: list[str]) -> list[tuple[str, int, str]]:
    """Starts the run again and again until it ends; returns how each life ended."""
    return [(how, *Life(folder, how).end()) for how in [*planned, "end"]]


@pytest.mark.slow
def test_runs_killed_at_20_random_moments_end_byte_for_byte_as_the_run_that_was_not(tmp_path):
    draw = random.Random(SEED)
    plans = {tmp_path / name: deaths(draw) for name in ("first", "second", "third", "fourth")}
    print(f"seed {SEED}:", {folder.name: plan for folder, plan in plans.items()})
    whole = tmp_path / "whole"
    assert Life(whole).end() == (0, "")
    digests, metrics, order = json.loads((whole / "end.json").read_text()), (whole / "metrics.jsonl").read_bytes(), {}
    assert len(digests) > 30 and rows_of(whole) == killed_run.NUM_STEPS
    order = order_of(whole)
    with ThreadPoolExecutor(2) as pool:
        ended = dict(zip(plans, pool.map(lives, plans, plans.values())))
    for folder, told in ended.items():
        assert [code for _, code, _ in told] == [KILL] * 5 + [0], told
        assert json.loads((folder / "end.json").read_text()) == digests, told
        assert (folder / "metrics.jsonl").read_bytes() == metrics, told
        assert order_of(folder) == order and all(len(read) == 1 for read in order.values())
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["40", "45"]
        assert completed(folder) == {}


def test_sigterm_saves_and_a_second_life_goes_on(tmp_path):
    assert EXIT_PREEMPTED == OF_THE_LOOP == 75
    folder = tmp_path / "run"
    life = Life(folder, "pace:0.02")
    while rows_of(folder) < 12:
        assert life.process.is_alive(), life.end()
        time.sleep(0.002)
    os.kill(life.process.pid, signal.SIGTERM)
    code, said = life.end()
    saved = int(said.split("SIGTERM: step ")[1].split()[0])
    assert code == EXIT_PREEMPTED and 12 <= saved < killed_run.NUM_STEPS
    assert committed_steps(folder / "checkpoints")[-1] == saved == rows_of(folder)


def test_a_full_disk_ends_the_run_with_one_message_and_loses_nothing(tmp_path):
    code, said = Life(tmp_path / "run", "full:8").end()
    assert code == 1
    assert said.startswith("error: the checkpoint of step 10 could not be written") and "the disk is full" in said
    assert len(said.splitlines()) == 1  # one clear message, without the tracebacks of the writers
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["5"] and problem(checkpoints, 5) is None
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")][:10] == list(range(1, 11))
    assert completed(tmp_path / "run") is None
