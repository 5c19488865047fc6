"""The tiny model's training step on 1, 2, 4 and 8 fake CPU devices: equal losses, and what cutting it up costs.

    python -m experiments.benchmarks.scaling

Hardware: 2 CPU cores
Time: about ten minutes, most of it compilation

Fake devices share the cores of the machine. Nothing can get faster here: the same global batch is the same arithmetic,
and what a mesh takes longer than one device is its overhead (copies between devices, smaller products, waiting). That
is a check that no layout does something absurd, not a prediction for real devices.

Every number of devices is a process of its own, and within it every mesh trains from the same weights on the same
batches. Numbers of devices and meshes take turns, a block of steps each; a figure is the median over all blocks. The
losses of the first steps are compared with those of one device before anything is timed; if they differ, nothing is
written. Overhead = median seconds / median seconds of one device with the same attention back end.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import record
from internjax.model.config import TINY, ModelConfig
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch

MODEL = dataclasses.replace(TINY, num_heads=8, num_kv_heads=8, head_dim=16)
"""The tiny model with as many heads as the largest mesh cuts them into."""
COUNTS = (1, 2, 4, 8)
NUM_CHECKED = 3
TOLERANCE = 2e-4
"""Largest difference of a loss to that of one device, float32; sums are taken in another order."""
ROOT = Path(__file__).parents[2]


class Layout(NamedTuple):
    mesh: MeshConfig
    attention: str = "xla"


def layouts(num_devices: int, part: str = "") -> dict[str, Layout]:
    """Returns the meshes for a number of devices whose name holds `part`; for one device those to compare with."""
    if num_devices == 1:
        found = {"one device": Layout(MeshConfig(fsdp=1)), "one device, ring": Layout(MeshConfig(fsdp=1), "ring")}
        rings = any(layout.attention == "ring" for count in COUNTS[1:] for layout in layouts(count, part).values())
        return found if rings else {"one device": found["one device"]}
    found = {
        f"fsdp {num_devices}": Layout(MeshConfig(fsdp=num_devices)),
        f"data {num_devices}": Layout(MeshConfig(data=num_devices, fsdp=1)),
        f"tensor {num_devices}": Layout(MeshConfig(fsdp=1, tensor=num_devices)),
        f"sequence {num_devices}, ring": Layout(MeshConfig(fsdp=1, sequence=num_devices), "ring"),
    }
    if num_devices == 8:
        mixed = MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)
        found["2 x 2 x 2 of fsdp, sequence and tensor, ring"] = Layout(mixed, "ring")
    return {name: layout for name, layout in found.items() if part in name}


def batch_at(model: ModelConfig, rows: int, seq_len: int, position: int) -> Batch:
    """Returns a batch of random tokens, two documents of unequal lengths per row."""
    tokens = np.random.default_rng((11, position)).integers(3, model.vocab_size, (rows, seq_len + 1), np.int32)
    index, first = np.arange(seq_len, dtype=np.int32), seq_len // 3
    positions = np.broadcast_to(np.where(index < first, index, index - first), (rows, seq_len))
    segments = np.broadcast_to(1 + (index >= first), (rows, seq_len)).astype(np.int32)
    mask = np.broadcast_to(index != first - 1, (rows, seq_len)).astype(np.float32)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, segments)


# --- one number of devices -------------------------------------------------------------------------------------------


def _initial_params() -> dict:
    """Returns the weights that every mesh starts from, on the host."""
    import jax

    from internjax import sharding
    from internjax.model import decoder

    with sharding.unconstrained():
        return jax.device_get(jax.jit(lambda key: decoder.init(MODEL, key))(jax.random.key(0)))


def _trainer(layout: Layout, params: dict, rows: int, seq_len: int) -> Callable[[int], float]:
    """Returns position -> loss of a step on that batch, once it is on the host."""
    from internjax import sharding
    from internjax.model import decoder
    from internjax.train.losses import next_token
    from internjax.train.optimizer import AdamW, Constant, make_optimizer
    from internjax.train.step import init_state, make_step, put_batch

    config = dataclasses.replace(MODEL, attention=layout.attention)
    mesh = sharding.make_mesh(layout.mesh)
    optimizer = make_optimizer(AdamW(peak_lr=1e-3), Constant(), num_steps=1_000_000)
    state = init_state(params, optimizer, mesh=mesh, axes=decoder.logical_axes(config))
    step = make_step(next_token(config), optimizer, mesh=mesh)

    def train(position: int) -> float:
        nonlocal state
        state, metrics = step(state, put_batch(batch_at(config, rows, seq_len, position), mesh))
        return float(metrics["loss"])

    return train


def worker(num_devices: int, rows: int, seq_len: int, part: str) -> None:
    """Trains a block of N steps with every mesh for every line "N" of the input; answers with a line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr; stdout is the answers'
    import jax

    assert jax.device_count() == num_devices, (jax.device_count(), num_devices)
    params = _initial_params()
    trainers = {name: _trainer(layout, params, rows, seq_len) for name, layout in layouts(num_devices, part).items()}
    position = 0
    for line in sys.stdin:
        answer = {}
        for name, train in trainers.items():
            seconds, losses = [], []
            for index in range(int(line)):
                started = time.perf_counter()
                losses.append(train(position + index))
                seconds.append(time.perf_counter() - started)
            answer[name] = {"seconds": seconds, "losses": losses}
        position += int(line)
        print(json.dumps(answer), file=out, flush=True)


def _started(num_devices: int, rows: int, seq_len: int, part: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.benchmarks.scaling", "--worker", str(num_devices)]
    command += ["--rows", str(rows), "--seq-len", str(seq_len), "--meshes", part]
    # The last of equal flags counts.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}".strip()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)


def _tell(process: subprocess.Popen, num_steps: int) -> None:
    process.stdin.write(f"{num_steps}\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen, num_devices: int) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise SystemExit(
            f"error: the process of {num_devices} devices ended with code {process.wait()}; its message stands above"
        )
    return json.loads(line)


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(
    counts: Sequence[int], rows: int, seq_len: int, *, part: str, num_blocks: int, block: int
) -> dict[str, dict[str, Any]]:
    """Returns the figures of every mesh; ends with a message if one trains something else than one device does."""
    assert counts[0] == 1, counts
    workers = {count: _started(count, rows, seq_len, part) for count in counts}
    try:
        for process in workers.values():
            _tell(process, NUM_CHECKED)  # all compile at once; nothing is timed here
        first = {count: _answer(process, count) for count, process in workers.items()}
        require_equal({name: answer["losses"] for answers in first.values() for name, answer in answers.items()})
        blocks: list[dict[int, dict[str, Any]]] = []
        for _ in range(num_blocks):
            blocks.append({})
            for count, process in workers.items():
                _tell(process, block)
                blocks[-1][count] = _answer(process, count)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    figures: dict[str, dict[str, Any]] = {}
    for count in counts:
        for name, layout in layouts(count, part).items():
            seconds = [second for each in blocks for second in each[count][name]["seconds"]]
            figures[name] = {
                "devices": count,
                "attention": layout.attention,
                "median_seconds": round(statistics.median(seconds), 5),
                "fastest_seconds": round(min(seconds), 5),
                "first_losses": first[count][name]["losses"],
            }
    for found in figures.values():
        alone = "one device, ring" if found["attention"] == "ring" else "one device"
        found["overhead"] = round(found["median_seconds"] / figures[alone]["median_seconds"], 3)
    return figures


def require_equal(losses: dict[str, Sequence[float]]) -> None:
    """Ends with a message naming the meshes whose losses are not those of one device."""
    wanted = losses["one device"]
    wrong = {
        name: given
        for name, given in losses.items()
        if not all(math.isclose(a, b, rel_tol=0, abs_tol=TOLERANCE) for a, b in zip(given, wanted, strict=True))
    }
    if wrong:
        raise SystemExit(f"error: losses differ from those of one device, {wanted}, by more than {TOLERANCE}: {wrong}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.scaling", description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", choices=COUNTS[1:], default=list(COUNTS[1:]))
    parser.add_argument("--meshes", default="", help="part of the names of the meshes to compare")
    parser.add_argument("--rows", type=int, default=16, help="rows of the global batch")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=5, help="turns of every mesh")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "scaling.json")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args.worker, args.rows, args.seq_len, args.meshes)
        return
    about = record.environment()
    counts = (1, *sorted(args.counts))
    found = measure(counts, args.rows, args.seq_len, part=args.meshes, num_blocks=args.blocks, block=args.steps)
    result = {
        "what": "seconds of one training step on fake devices that share the cores: overhead of a mesh, no speed-up",
        "formula": "overhead = median seconds / median seconds of one device with the same attention back end",
        "batch": [args.rows, args.seq_len],
        "model": dataclasses.asdict(MODEL),
        **about,
        "devices": f"{', '.join(map(str, counts))} fake CPU devices, one process each",
        "meshes": found,
    }
    for name, figures in found.items():
        print(f"{name:36} {figures['median_seconds'] * 1e3:9.1f} ms  {figures['overhead']:6.2f} x one device")
    record.write(args.output, result)


if __name__ == "__main__":
    main()
