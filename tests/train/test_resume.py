"""Processes that are really killed, and end where the process ends that was not: byte by byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internjax.train.checkpoint import committed_steps, problem
from internjax.train.loop import EXIT_PREEMPTED
from internjax.train.tracking import completed, read_rows

PROGRAM = Path(__file__).with_name("killed_run.py")
ROOT = PROGRAM.parent.parent.parent


def start(folder: Path, how: str = "end") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), how], env=environment, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=120)
    return process.returncode, said


def signal_at(process: subprocess.Popen, folder: Path, num_rows: int, number: int) -> None:
    """Sends a signal once the metrics have `num_rows` rows."""
    deadline = time.monotonic() + 100
    while len(read_rows(folder / "metrics.jsonl")) < num_rows:
        assert process.poll() is None, f"ended before row {num_rows}: {ended(process)}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four runs of the same config side by side: one left alone, three that die, each at other places."""
    folder = tmp_path_factory.mktemp("runs")
    whole, first, second, third = (folder / name for name in ("whole", "first", "second", "third"))
    exits = []

    def round_of(*processes):
        exits.append([ended(process) for process in processes])

    round_of(start(whole), start(first, "step:7"))
    round_of(start(first, "write:10"), start(second, "seal:20"))
    process = start(third)
    signal_at(process, third, 22, signal.SIGTERM)
    round_of(start(second, "remove:20"), process)
    # The last one is killed from outside at a moment that nobody chose.
    process = start(third)
    signal_at(process, third, random.randint(23, 38), signal.SIGKILL)
    round_of(start(first), process)
    round_of(start(second), start(third))
    return folder, exits


def test_every_death_was_the_one_that_was_meant(runs):
    _, exits = runs
    codes = [[code for code, _ in round_] for round_ in exits]
    kill = -signal.SIGKILL
    assert codes == [[0, kill], [kill, kill], [kill, EXIT_PREEMPTED], [0, kill], [0, 0]], exits


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_a_killed_run_ends_byte_for_byte_as_the_run_that_was_not(runs, name):
    folder, _ = runs
    whole = json.loads((folder / "whole" / "end.json").read_text())
    assert len(whole) > 30 and json.loads((folder / name / "end.json").read_text()) == whole
    assert (folder / name / "metrics.jsonl").read_bytes() == (folder / "whole" / "metrics.jsonl").read_bytes()
    assert len(read_rows(folder / name / "metrics.jsonl")) == 40
    assert committed_steps(folder / name / "checkpoints") == [30, 40]
    assert sorted(path.name for path in (folder / name / "checkpoints").iterdir()) == ["30", "40"]
    assert completed(folder / name) == {}


def test_sigterm_saves_where_it_was_and_says_so(runs):
    _, exits = runs
    said = exits[2][1][1]
    step = int(said.split("step ")[1].split()[0])
    assert step >= 22 and "is saved" in said and "run again" in said


def test_a_full_disk_ends_the_run_with_one_message_and_loses_nothing(tmp_path):
    code, said = ended(start(tmp_path / "run", "full:15"))
    assert code == 1
    message = said.splitlines()[-1]
    assert message.startswith("error: the checkpoint of step 20 could not be written") and "the disk is full" in message
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["10"] and problem(checkpoints, 10) is None
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")][:20] == list(range(1, 21))
    assert completed(tmp_path / "run") is None
