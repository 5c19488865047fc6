"""Several processes as one job: they train, save and resume together, and end together, whatever happens to one."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from internjax.train import processes
from internjax.train.checkpoint import committed_steps, problem
from internjax.train.heartbeat import EXIT_PEER_LOST, EXIT_PREEMPTED, Beat, Heartbeat, Seen, judge
from internjax.train.tracking import read_rows

PROGRAM = Path(__file__).with_name("process_run.py")
ROOT = PROGRAM.parent.parent.parent
SILENCE = 5


def start(*folders: Path, plans: tuple[str, ...] = (), num_processes: int = 2, restarts: int = 0) -> subprocess.Popen:
    """Starts the program in one process with 8 devices, or as a job of several that share them."""
    command = [sys.executable, str(PROGRAM), os.pathsep.join(map(str, folders)), *plans]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "disabled",
        "INTERNJAX_SILENCE_SECONDS": str(SILENCE),
        "INTERNJAX_STEP_SECONDS": "60",
    }
    if num_processes > 1:
        how = ["--processes", num_processes, "--devices", 8 // num_processes, "--restarts", restarts, "--grace", 20]
        command = [sys.executable, "-m", "experiments.launch.local", *map(str, how), "--", *command]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=280)
    return process.returncode, said


def order_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder.parent / f"order-{folder.name}").iterdir()}


def losses(folder: Path) -> np.ndarray:
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    return np.array([row["loss"] for row in rows])


@pytest.mark.slow
def test_two_processes_train_save_and_resume_as_one(tmp_path):
    whole, alone, broken, other, full = (tmp_path / name for name in ("whole", "alone", "broken", "other", "full"))
    # One job: `whole` from end to end. In `broken` process 0 gets SIGTERM; process 1 is killed while step 4 is saved,
    # then stopped after step 5; each time the job ends and starts again. In `full` process 1 cannot write step 6.
    plans = ("term:1:0:broken", "commit:4:1:broken", "stop:5:1:broken", "full:5:1:full")
    code, said = ended(start(whole, broken, full, plans=plans, restarts=3))
    assert code == 1, said
    assert committed_steps(whole / "checkpoints") == [4, 6]
    listed = json.loads((whole / "checkpoints" / "6" / "checksums.json").read_text())
    writers = {part for name in listed for part in name.split("/") if part.startswith("ocdbt.process_")}
    assert writers == {"ocdbt.process_0", "ocdbt.process_1"} and problem(whole / "checkpoints", 6) is None

    assert said.count("started again") == 3 and "process 1 ended with exit code 137" in said
    assert said.count(f"exit code {EXIT_PREEMPTED}: started again") == 1
    assert f"process 0 ended with exit code {EXIT_PEER_LOST}" in said
    assert said.count("process 0 ends: process 1 has given no sign of life for") == 2
    # Both stopped after the same step and saved it. Step 4 is committed in the background: whether before process 1 is
    # stopped is left open.
    saved = re.search(r"SIGTERM: step (\d) is saved", said)[1]
    first, second, third = re.findall(r"resumed from step (\d)", said)
    assert first == saved and int(saved) < 4 and second in (saved, "2") and third in (second, "4"), said
    assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert json.loads((broken / "end.json").read_text()) == json.loads((whole / "end.json").read_text())
    assert order_of(broken) == order_of(whole)

    # What one process cannot write ends the job with its message, and both with its exit code.
    assert "[1] error: the checkpoint of step 6 could not be written" in said and "the disk is full" in said, said
    assert re.search(r"^\[0\] process 0 ends: (process 1 ended with )?exit code 1", said, re.MULTILINE), said
    assert committed_steps(full / "checkpoints") == [2, 4]

    # One process with all 8 devices: from the start, and from what two have saved.
    shutil.copytree(whole, other)
    shutil.rmtree(other / "checkpoints" / "6")
    (other / "complete.json").unlink()
    code, said = ended(start(alone, other, num_processes=1))
    assert code == 0 and said.count("resumed from step") == said.count("resumed from step 4") == 1, said
    np.testing.assert_allclose(losses(alone), losses(whole), rtol=1e-5)
    assert order_of(alone) == order_of(whole) and len(order_of(whole)) == 6 * 8
    np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
    assert set(order_of(other)) == {f"{position}-{row}" for position in range(4, 6) for row in range(8)}
    assert order_of(other).items() <= order_of(whole).items()


def beat(count=1, doing="trains", step=5, seconds=1.0, **more) -> Beat:
    return Beat(count, doing, step, seconds, **more)


@pytest.mark.parametrize(
    "seen, own, code, said",
    [
        ({1: Seen(beat(), 95.0)}, beat(), None, None),
        ({1: Seen(beat(), 39.0)}, beat(), 76, "process 1 has given no sign of life for 61 s .* did: trains"),
        ({1: Seen(beat(code=0), 0.0)}, beat(), None, None),
        ({1: Seen(beat(code=75), 0.0)}, beat(), None, None),
        ({1: Seen(beat(code=3, message="boom"), 99.0)}, beat(), 3, "process 1 ended with exit code 3: boom"),
        (
            {1: Seen(beat(doing="waits for batch 5", seconds=400.0), 99.0), 2: Seen(beat(step=6, seconds=350.0), 99.0)},
            beat(step=6, seconds=350.0),
            76,
            "no step has ended for 300 s .behind: process 1.* process 1: waits for batch 5, for 400 s; process 2",
        ),
        ({1: Seen(beat(step=None, seconds=9000.0), 99.0)}, beat(step=None, seconds=9000.0), None, None),
    ],
)
def test_the_verdict(seen, own, code, said):
    verdict = judge(seen, own, index=0, now=100.0, answered=0.0, silence=60.0, step_deadline=300.0)
    assert (verdict and verdict.code) == code
    if said:
        assert re.search(said, verdict.message), verdict.message


def test_a_coordinator_that_does_not_answer_is_named():
    how = {"now": 100.0, "silence": 60.0, "step_deadline": 300.0}
    seen = {0: Seen(beat(), 30.0)}
    assert "process 0, which coordinates" in judge(seen, beat(), index=1, answered=39.0, **how).message
    assert judge({0: Seen(beat(), 99.0)}, beat(), index=1, answered=99.0, **how) is None


def hearts(num: int) -> list[Heartbeat]:
    """Returns started heartbeats of several processes that share a dictionary in this one."""
    board: dict[int, str] = {}
    found = [
        Heartbeat(
            lambda text, index=index: board.__setitem__(index, text),
            lambda: dict(board),
            index=index,
            num_processes=num,
            silence=2.0,
            step_deadline=60.0,
        )
        for index in range(num)
    ]
    for heart in found:
        heart.start()
    return found


@pytest.mark.parametrize("seed", range(3))
def test_all_processes_stop_after_the_same_step(seed):
    draw = random.Random(seed)
    together = hearts(3)
    asked_at = {draw.randrange(3): draw.randrange(3, 9)}  # one is asked; the others hear of it
    gate, stopped = threading.Condition(), {}
    begun = [0, 0, 0]

    def train(index):
        for step in range(1, 40):
            behind = step - 1
            with gate:  # a collective: nobody is more than a step ahead of the slowest, as on devices
                begun[index] = step
                gate.notify_all()
                assert gate.wait_for(lambda behind=behind: min(begun) >= behind, 20)
            time.sleep(draw.uniform(0, 0.02))
            if together[index].stop_after(step, asked_at.get(index, 99) <= step):
                stopped[index] = step
                return

    threads = [threading.Thread(target=train, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(stopped) == 3 and len(set(stopped.values())) == 1, stopped
    assert min(asked_at.values()) <= stopped[0] <= min(asked_at.values()) + 2
    leaving = [threading.Thread(target=heart.leave, args=(EXIT_PREEMPTED,)) for heart in together]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join(10)
        assert not thread.is_alive()


def test_who_has_ended_in_order_waits_and_hears_of_an_error_that_comes_later(monkeypatch):
    """Process 0 fails while it writes the model; process 1 has nothing left to do."""
    ends = {}
    monkeypatch.setattr(
        Heartbeat, "end_now", lambda heart, code, message: ends.setdefault(heart._index, (code, message))
    )
    first, second = hearts(2)
    waiting = threading.Thread(target=second.leave, args=(0,), daemon=True)
    waiting.start()
    time.sleep(0.5)
    assert waiting.is_alive()
    started = time.monotonic()
    first.leave(1, "no room for the model")
    # The coordinator stays until the other has had the time to end too; here it cannot, and is not waited for.
    assert 1.0 < time.monotonic() - started < 8
    assert ends == {1: (1, "process 0 ended with exit code 1: no room for the model")} and waiting.is_alive()
    second.leave(1, "told")  # lets the threads of this test end
    first._over.set(), second._over.set()


def test_a_job_of_one_process_needs_nothing():
    with processes.job():
        assert processes.count() == 1 and processes.index() == 0
        assert processes.gather("x", "mine") == ["mine"] and processes.first("y", lambda: {"a": 1}) == {"a": 1}
        assert processes.stop_after(3, True) and not processes.stop_after(3, False)
        data = iter
        assert processes.watched(data) is data


class Store:
    """The key-value store of a job, as one of its processes sees it."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def key_value_delete(self, key):
        del self.values[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


@pytest.fixture
def one_of_two(monkeypatch):
    store = Store()
    monkeypatch.setattr(processes, "_client", lambda: store)
    monkeypatch.setattr(processes, "_where", processes.Place("a:1", 2, 0, None))
    monkeypatch.setattr(processes, "_calls", processes.Counter())
    return store


def test_nobody_waits_for_ever_for_a_process_that_does_not_come(one_of_two):
    with pytest.raises(OSError, match="process 1 did not come to 'save' within 0.1 s"):
        processes.gather("save", "mine", timeout=0.1)
    with pytest.raises(OSError, match="process 1: disk full"):
        processes.gather("orbax", "mine", failed=lambda: "process 1: disk full")


def test_what_was_gathered_is_in_order_and_does_not_pile_up(one_of_two):
    for call in range(5):
        one_of_two.key_value_set(f"internjax/gather/save/{call}/1", f"yours {call}")
        assert processes.peek("save") == {1: f"yours {call}"}
        assert processes.gather("save", f"mine {call}") == [f"mine {call}", f"yours {call}"]
    assert [value for value in one_of_two.values.values() if value.startswith("mine")] == ["mine 3", "mine 4"]


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_an_error_of_process_0_is_everyones(one_of_two, monkeypatch, error):
    def fail():
        raise error("no room")

    one_of_two.key_value_set("internjax/gather/x/0/1", "{}")
    with pytest.raises(error, match="no room"):
        processes.first("x", fail)
    # The other process has the same told.
    told = one_of_two.values["internjax/gather/x/0/0"]
    one_of_two.values = {"internjax/gather/x/0/0": told}
    monkeypatch.setattr(processes, "_where", processes.Place("a:1", 2, 1, None))
    monkeypatch.setattr(processes, "_calls", processes.Counter())
    with pytest.raises(error, match="no room"):
        processes.first("x", lambda: pytest.fail("it is process 0 that does it"))


LOCAL = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {"SLURM_JOB_ID": "5000", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({}, None),
        (LOCAL, ("127.0.0.1:99", 2, 1, None)),
        (LOCAL | {"JAX_NUM_PROCESSES": "1"}, None),
        ({**LOCAL, "JAX_PROCESS_ID": "0", "JOB_COMPLETION_INDEX": "1"}, ("127.0.0.1:99", 2, 0, None)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            ("a:1", 2, 1, None),
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "n[03-05,9],m1"}, ("n03:62344", 4, 3, None)),
        (SLURM | {"SLURM_STEP_NODELIST": "n03,n04"}, ("n03:62344", 4, 3, None)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "gpu7", "SLURM_STEP_TASKS_PER_NODE": "4(x1)", "SLURM_LOCALID": "2"},
            ("gpu7:62344", 4, 3, (2,)),
        ),
        ({"SLURM_JOB_ID": "5000", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # the batch script itself
    ],
)
def test_the_environment_says_where_a_process_stands(environment, wanted):
    assert processes.place(environment) == wanted


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "not JAX_PROCESS_ID and JAX_COORDINATOR_ADDRESS"),
        (LOCAL | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2; wanted host:port, a number, and a number from 0"),
        (LOCAL | {"JAX_COORDINATOR_ADDRESS": "here"}, "wanted host:port"),
        (LOCAL | {"JAX_NUM_PROCESSES": "two"}, "wanted host:port"),
    ],
)
def test_half_a_description_is_refused(environment, said):
    with pytest.raises(ValueError, match=said):
        processes.place(environment)


def test_a_deadline_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="INTERNJAX_SILENCE_SECONDS is a number of seconds above 0; given 'soon'"):
        processes.initialize(LOCAL | {"INTERNJAX_SILENCE_SECONDS": "soon"})
