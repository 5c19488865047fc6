"""Checkpoints: how long a save holds the step up, until it is committed, how long a restore takes, and how many bytes.

    python -m experiments.benchmarks.checkpoint

Hardware: 2 CPU cores and 5 GB of disk
Time: two minutes

Two states of plain parameters with AdamW's two moments (about 200 MB and 1 GB) are saved and restored in turn, and the
medians over the rounds are written. "save_stall" is what the training loop waits for; "commit" goes on beside it:
Orbax writes, every file is read again for its checksum, COMMITTED comes last. A restore verifies all checksums first.
"written_mb_per_second" and "read_mb_per_second" are bytes / (seconds to commit) and bytes / (seconds to restore).
For comparison, in the same rounds: the time that a plain write and sync of as many bytes takes on the same disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import TrainState, init_state

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
NUM_ARRAYS = 12


class Round(NamedTuple):
    """Seconds of one save and one restore, and the bytes on disk."""

    save_stall: float
    commit: float
    verify_and_restore: float
    plain_write: float
    disk_bytes: int


def state_of(num_bytes: int, seed: int) -> TrainState:
    """Returns a training state of about that many bytes: float32 parameters and two moments of each."""
    width = 1024
    rows = num_bytes // (3 * 4 * width * NUM_ARRAYS)
    keys = jax.random.split(jax.random.key(seed), NUM_ARRAYS)
    params = {f"layer_{i}": {"kernel": jax.random.normal(key, (rows, width))} for i, key in enumerate(keys)}
    state = init_state(params, make_optimizer(AdamW(), Constant(), 10), seed=seed)
    # Moments are zeros at the start, and zeros compress: numbers as a run has them take their place.
    fill = jax.jit(
        lambda leaf, key: (
            jax.random.normal(key, leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim
            else leaf
        )
    )
    leaves, structure = jax.tree.flatten(state.opt_state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    opt_state = jax.tree.unflatten(structure, [fill(leaf, key) for leaf, key in zip(leaves, keys)])
    return TrainState(
        state.step + 1, state.trainable, state.frozen, jax.block_until_ready(opt_state), state.rng, state.data_position
    )


def bytes_of(state: TrainState) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves((state.trainable, state.opt_state)))


def measure(state: TrainState, folder: Path) -> Round:
    """Returns one round in `folder`, which is removed afterwards."""
    with open_checkpoints(folder, CheckpointConfig(max_to_keep=1)) as checkpoints:
        started = time.perf_counter()
        checkpoints.save(state)
        stall = time.perf_counter() - started
        checkpoints.wait()
        commit = time.perf_counter() - started
    disk_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    with open_checkpoints(folder, CheckpointConfig(max_to_keep=1)) as checkpoints:
        started = time.perf_counter()
        restored = jax.block_until_ready(checkpoints.restore(state))
        restore = time.perf_counter() - started
    for given, wanted in zip(jax.tree.leaves(restored.trainable), jax.tree.leaves(state.trainable)):
        assert bool(jnp.array_equal(given, wanted)), "the restored parameters are not the saved ones"
    shutil.rmtree(folder)
    block = os.urandom(2**20)
    started = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder.parent) as file:
        for _ in range(disk_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return Round(stall, commit, restore, time.perf_counter() - started, disk_bytes)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200, 1000], help="sizes of the states")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    states = {size: state_of(size * 10**6, seed=size) for size in args.megabytes}
    rounds: dict[int, list[Round]] = {size: [] for size in states}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(state_of(10**6, seed=0), Path(folder) / "warm")  # the first save sets up what later ones use
        for index in range(args.rounds):
            for size, state in states.items():
                rounds[size].append(measure(state, Path(folder) / f"{size}-{index}"))
                print(f"round {index + 1}, {size} MB: {rounds[size][-1]}", flush=True)
    found = {}
    for size, state in states.items():
        medians = {
            name: round(statistics.median(getattr(one, name) for one in rounds[size]), 4) for name in Round._fields
        }
        found[f"{size} MB"] = {
            "state_bytes": bytes_of(state),
            "median_seconds": {name: value for name, value in medians.items() if name != "disk_bytes"},
            "disk_bytes": rounds[size][0].disk_bytes,
            "written_mb_per_second": round(bytes_of(state) / 1e6 / medians["commit"], 1),
            "read_mb_per_second": round(bytes_of(state) / 1e6 / medians["verify_and_restore"], 1),
            "plain_write_mb_per_second": round(rounds[size][0].disk_bytes / 1e6 / medians["plain_write"], 1),
            "stall_share_of_commit": round(medians["save_stall"] / medians["commit"], 4),
            "rounds": [one._asdict() for one in rounds[size]],
        }
    result = {
        "what": "seconds of a checkpoint: what the step waits for, until it is committed, verified and restored",
        "states": found,
        "load_average": os.getloadavg()[0],
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "orbax": version("orbax-checkpoint"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({size: row["median_seconds"] for size, row in found.items()}), f"written to {args.output}")


if __name__ == "__main__":
    main()
