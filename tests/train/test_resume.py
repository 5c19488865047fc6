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


@pytest.mark.slow
def test_killed_runs_end_byte_for_byte_as_the_run_that_was_not(tmp_path):
    """Four runs of one config side by side: one left alone, three that die, each at other places."""
    whole, first, second, third = (tmp_path / name for name in ("whole", "first", "second", "third"))
    kill, exits = -signal.SIGKILL, []

    def round_of(*processes, wanted):
        exits.append([ended(process) for process in processes])
        assert [code for code, _ in exits[-1]] == wanted, exits[-1]

    round_of(start(whole), start(first, "step:7"), wanted=[0, kill])
    round_of(start(first, "write:10"), start(second, "seal:20"), wanted=[kill, kill])
    process = start(third)
    signal_at(process, third, 22, signal.SIGTERM)
    round_of(start(second, "remove:20"), process, wanted=[kill, EXIT_PREEMPTED])
    said = exits[-1][1][1]
    saved = int(said.split("SIGTERM: step ")[1].split()[0])
    assert saved >= 22 and "is saved" in said and committed_steps(third / "checkpoints")[-1] == saved
    # The last one is killed from outside at a moment that nobody chose.
    process = start(third)
    signal_at(process, third, random.randint(saved + 1, 38) if saved < 38 else 38, signal.SIGKILL)
    round_of(start(first), process, wanted=[0, kill])
    round_of(start(second), start(third), wanted=[0, 0])

    digests = json.loads((whole / "end.json").read_text())
    assert len(digests) > 30
    for folder in (first, second, third):
        assert json.loads((folder / "end.json").read_text()) == digests, folder.name
        assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes(), folder.name
        assert len(read_rows(folder / "metrics.jsonl")) == 40
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["30", "40"], folder.name
        assert completed(folder) == {}


def test_a_full_disk_ends_the_run_with_one_message_and_loses_nothing(tmp_path):
    code, said = ended(start(tmp_path / "run", "full:15"))
    assert code == 1
    assert said.startswith("error: the checkpoint of step 20 could not be written") and "the disk is full" in said
    assert len(said.splitlines()) == 1  # one clear message, without the tracebacks of the writers
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["10"] and problem(checkpoints, 10) is None
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")][:20] == list(range(1, 21))
    assert completed(tmp_path / "run") is None
