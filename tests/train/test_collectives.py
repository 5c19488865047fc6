"""What the compiled steps of the 7B and the 20B send between devices, and that the compiler has no complaint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import QUICK_FLAGS
from tests.train.compiled_steps import STEPS

ROOT = Path(__file__).resolve().parents[2]
FAKE = {
    # Machine code is not what is looked at: the collectives stand in the program before it is made.
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=64 {QUICK_FLAGS}",
    "JAX_PLATFORMS": "cpu",
    # Of a program from the cache the compiler says nothing; what it said is kept beside it.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output() -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.train.compiled_steps"],
        cwd=ROOT,
        env=os.environ | FAKE,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(params=STEPS)
def step(output, request) -> dict:
    assert output.returncode == 0, output.stderr[-2000:]
    rows = {row["name"]: row for row in map(json.loads, output.stdout.splitlines())}
    model, mesh, _, rows_of_batch, time = STEPS[request.param]
    return rows[request.param] | {"model": model, "mesh": mesh, "time": time // mesh.sequence}


def results(step, *, but: tuple[str, ...] = ()) -> list[tuple[str, str, tuple[int, ...], bool]]:
    """Returns (operation, dtype, shape, in a loop) of every array that a collective brings."""
    return [
        (operation, kind, tuple(dims), in_loop)
        for operation, shapes, in_loop in step["collectives"]
        for kind, *dims in shapes
        if operation not in but
    ]


def test_nothing_is_rematerialised_against_our_will(output):
    assert output.returncode == 0, output.stderr[-2000:]
    assert len(output.stdout.splitlines()) == len(STEPS)
    complaints = [json.loads(row)["complaints"] for row in output.stdout.splitlines()] + [output.stderr]
    assert not any("rematerialization" in each for each in complaints), complaints


def test_logits_stay_where_they_are(step):
    widths = {step["model"].vocab_size, step["model"].vocab_size // step["mesh"].tensor}
    with_vocabulary = [dims for _, _, dims, _ in results(step) if widths & set(dims)]
    # What has the vocabulary in it is a matrix, with the width of the model on the other side: the head and the
    # gradients of head and embedding table.
    columns = {step["model"].d_model, step["model"].d_model // step["mesh"].fsdp}
    assert with_vocabulary and all(len(dims) == 2 and columns & set(dims) for dims in with_vocabulary), with_vocabulary


def test_the_head_is_gathered_once(step):
    head = {step["model"].d_model, step["model"].vocab_size // step["mesh"].tensor}
    gathered = [
        in_loop for operation, _, dims, in_loop in results(step) if operation == "all-gather" and set(dims) == head
    ]
    assert gathered == [False]
    summed = [
        in_loop for operation, _, dims, in_loop in results(step) if operation != "all-gather" and set(dims) == head
    ]
    assert summed and not any(summed)


def test_activations_are_not_gathered(step):
    """Token ids are, since the table stays. Beside the sums of tensor parallelism and the ring no activation moves."""
    moved = [
        (operation, dims)
        for operation, kind, dims, _ in results(step, but=("all-reduce", "collective-permute"))
        if step["time"] in dims and kind != "s32"
    ]
    # Rows of the table for columns, there and back.
    assert {operation for operation, _ in moved} == {"all-to-all"}
    passed_on = [dims for operation, _, dims, _ in results(step) if operation == "collective-permute"]
    assert bool(passed_on) == (step["mesh"].sequence > 1)
