"""Where the time of a run went: hand-computed rows, and a run that was really killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internjax.train.goodput import Goodput, goodput
from internjax.train.tracking import read_rows

ROOT = Path(__file__).resolve().parent.parent.parent


def step(at, number, seconds, *, steps=1, wait=0.0):
    return {"step": number, "steps": steps, "seconds": seconds, "input_wait": wait, "at": at}


def event(at, name, number, seconds):
    return {"event": name, "step": number, "seconds": seconds, "at": at}


WHOLE = [
    event(110.0, "start", 0, 10.0),  # it began at 100
    event(130.0, "compile", 1, 20.0),
    step(134.0, 3, 4.0, steps=2, wait=1.0),
    event(136.0, "checkpoint", 3, 2.0),
    event(139.0, "callbacks", 3, 3.0),
    step(144.0, 5, 4.0, steps=2),
    {"event": "end", "reason": "complete", "at": 150.0},
]


def test_one_start():
    spent = goodput(WHOLE)
    wanted = dict(start_up=10, compile=20, compute=7, input_wait=1, checkpoint=2, callbacks=3, other=7, wall=50)
    assert spent == Goodput(**wanted, num_starts=1)
    assert spent.goodput == 7 / 50 and spent.share("compile") == 0.4


def test_steps_done_again_are_lost_and_the_time_between_starts_is_down():
    killed = [row for row in WHOLE if row.get("event") != "end"]  # the last sign of life is at 144
    again = [
        event(166.0, "start", 4, 6.0),  # it began at 160; two of these seconds read the checkpoint
        event(166.0, "restore", 4, 2.0),
        event(176.0, "compile", 5, 10.0),
        step(180.0, 6, 3.0),
        {"event": "end", "reason": "complete", "at": 180.0},
    ]
    spent = goodput(killed + again)
    # Of the row that covers steps 4 and 5, step 5 was done again: half of its 4 seconds.
    assert spent == Goodput(
        start_up=10 + 4,
        restore=2,
        compile=30,
        compute=7 - 2 + 3,
        input_wait=1,
        lost=2,
        checkpoint=2,
        callbacks=3,
        down=160 - 144,
        other=(44 - 10 - 20 - 4 - 2 - 3 - 4) + (20 - 6 - 10 - 3),
        wall=80,
        num_starts=2,
        num_lost_steps=1,
    )


def test_work_is_lost_to_any_later_start():
    rows = [event(0.0, "start", 0, 0.0), step(10.0, 10, 10.0, steps=10)]
    rows += [event(20.0, "start", 8, 0.0), step(24.0, 12, 4.0, steps=4)]
    rows += [event(30.0, "start", 5, 0.0), step(45.0, 20, 15.0, steps=15)]  # the checkpoint of step 8 was damaged
    spent = goodput(rows)
    assert (spent.compute, spent.lost, spent.num_lost_steps) == (5 + 15, 5 + 4, 5 + 4)
    assert spent.wall == 45 and spent.down == 10 + 6


def test_nothing_ran():
    assert goodput([]) == Goodput() and goodput([step(1.0, 1, 1.0)]).goodput == 0.0


@pytest.mark.slow
def test_a_killed_run_tells_what_it_lost(tmp_path):
    def start(how):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
        program = "import sys; from tests.train import killed_run; killed_run.run(*sys.argv[1:])"
        command = [sys.executable, "-c", program, str(tmp_path / "run"), how, str(tmp_path / "said")]
        return subprocess.run(command, env=environment, timeout=120).returncode

    assert start("step:24") == -signal.SIGKILL
    assert not (tmp_path / "run" / "goodput.json").exists()
    assert start("end") == 0
    rows = read_rows(tmp_path / "run" / "timing.jsonl")
    spent = goodput(rows)
    assert json.loads((tmp_path / "run" / "goodput.json").read_text()) == spent.to_json()
    # The checkpoint of step 15 was whole for sure, that of step 20 may have been: what came after was done twice.
    _, again_from = (row["step"] for row in rows if row.get("event") == "start")
    num_lost = 24 - again_from
    assert again_from in (15, 20) and spent.num_starts == 2 and spent.num_lost_steps == num_lost
    twice = [row["seconds"] for row in rows if "event" not in row and again_from < row["step"] <= 24]
    assert len(twice) == num_lost + num_lost - 1  # the first of the second time compiled
    assert spent.lost == pytest.approx(sum(twice[:num_lost]), abs=1e-6)
    kinds = spent.to_json()["seconds"]
    assert sum(kinds.values()) == pytest.approx(spent.wall, abs=0.01)
    assert (
        kinds["down"] > 0.2
        and kinds["restore"] > 0
        and kinds["compile"] > 0
        and kinds["compute"] > 0
        and kinds["lost"] > 0
    )
