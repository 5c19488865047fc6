"""Planned against measured peak memory of training steps: how far the planner is off on the GPU at hand.

    python -m experiments.benchmarks.plan_error                # all cells, one process each
    python -m experiments.benchmarks.plan_error --cells 1.8b   # those whose name holds 1.8b; --list shows all

Hardware: one NVIDIA GPU of 80 GB or more
Time: about 15 minutes; not yet run on GPU

A cell is a slice of a published model (some of its layers, all of its widths), a batch, a method and a policy. Its
process makes the state, takes three steps and reads `peak_bytes_in_use` of jax's allocator: bytes that were in use, not
the pool that jax reserves. The peak of making the state is kept beside it; a cell whose steps stayed below that says so
and counts for nothing. `python -m experiments.plan` quotes the result.

error = planned bytes / measured peak - 1
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.benchmarks import record
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, ModelConfig
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.sharding import MeshConfig
from internjax.train.memory import Job, estimate
from internjax.train.optimizer import AdamW

RESULT = record.RESULTS / "plan_error.json"
NUM_STEPS = 3


def _cell(model: ModelConfig, num_layers: int, rows: int, seq_len: int, remat: str, **changes: Any) -> Job:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    own = {name: changes.pop(name) for name in list(changes) if name in names}
    model = dataclasses.replace(model, num_layers=num_layers, remat=remat, **({"attention": "chunked"} | own))
    return Job(model, rows, seq_len, mesh=MeshConfig(fsdp=1), **changes)


_BF16 = {"param_dtype": "bfloat16", "optimizer": AdamW(moment_dtype="bfloat16")}
_LORA = {"param_dtype": "bfloat16", "lora": LoraConfig(rank=16)}

CELLS: dict[str, Job] = {
    "1.8b/8 full 4x2048 none": _cell(INTERNLM2_1_8B, 8, 4, 2048, "none"),
    "1.8b/8 full 4x2048 dots": _cell(INTERNLM2_1_8B, 8, 4, 2048, "dots"),
    "1.8b/8 full 4x2048 full": _cell(INTERNLM2_1_8B, 8, 4, 2048, "full"),
    "1.8b/8 full 2x2048 none xla": _cell(INTERNLM2_1_8B, 8, 2, 2048, "none", attention="xla"),
    "1.8b/8 full 4x4096 full cudnn": _cell(INTERNLM2_1_8B, 8, 4, 4096, "full", attention="cudnn"),
    "1.8b/8 full 1x32768 full": _cell(INTERNLM2_1_8B, 8, 1, 32768, "full"),
    "1.8b/8 full 8x2048 dots, 2 parts": _cell(INTERNLM2_1_8B, 8, 8, 2048, "dots", accumulate=2),
    "1.8b/24 full 4x4096 full": _cell(INTERNLM2_1_8B, 24, 4, 4096, "full"),
    "7b/8 full bf16 2x4096 full": _cell(INTERNLM2_7B, 8, 2, 4096, "full", **_BF16),
    "7b/8 full bf16 2x4096 dots": _cell(INTERNLM2_7B, 8, 2, 4096, "dots", **_BF16),
    "7b/8 full bf16 1x8192 full cudnn": _cell(INTERNLM2_7B, 8, 1, 8192, "full", attention="cudnn", **_BF16),
    "7b/32 lora 1x4096 full": _cell(INTERNLM2_7B, 32, 1, 4096, "full", **_LORA),
    "7b/16 lora 2x4096 dots": _cell(INTERNLM2_7B, 16, 2, 4096, "dots", **_LORA),
    "7b/16 qlora 1x2048 full": _cell(INTERNLM2_7B, 16, 1, 2048, "full", quantised=Quantised(), **_LORA),
    "7b/16 qlora 4x4096 full": _cell(INTERNLM2_7B, 16, 4, 4096, "full", quantised=Quantised(), **_LORA),
}


def measure(job: Job) -> dict[str, Any]:
    """Returns the allocator's peaks after making a job's state and after its steps; None where it keeps no count."""
    import jax
    import numpy as np

    from internjax.model import decoder, lora, quantize
    from internjax.train.batch import Batch
    from internjax.train.losses import next_token
    from internjax.train.optimizer import Constant, make_optimizer
    from internjax.train.step import init_state, make_step, put_batch

    def params_of(key):
        params = decoder.init(job.model, key)
        if job.quantised is None:
            return params
        return quantize.quantize_params(params, **dataclasses.asdict(job.quantised))

    optimizer = make_optimizer(job.optimizer, Constant(), NUM_STEPS)
    params = jax.jit(params_of)(jax.random.key(0))
    if job.lora is None:
        state = init_state(params, optimizer)
    else:
        weights = jax.jit(functools.partial(lora.init_lora, job.lora))(params, jax.random.key(1))
        state = init_state(weights, optimizer, frozen=params)
    del params
    step = make_step(next_token(job.model, lora_config=job.lora), optimizer, accumulate=job.accumulate)
    shape = (job.batch_size, job.seq_len)
    ids = np.random.default_rng(0).integers(0, job.model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(job.seq_len, dtype=np.int32), shape)
    batch = Batch(ids, ids, np.ones(shape, np.float32), positions, np.ones(shape, np.int32))
    made, loss = _peak(), float("nan")
    for _ in range(NUM_STEPS):
        state, metrics = step(state, put_batch(batch, None))
        loss = float(metrics["loss"])
    return {"state_peak_bytes": made, "step_peak_bytes": _peak(), "loss": loss}


def _peak() -> int | None:
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def run_cell(name: str) -> dict[str, Any]:
    """Returns a cell's planned and measured bytes; the measurement is made in a process of its own."""
    planned = estimate(CELLS[name], (1, 1, 1, 1))
    row: dict[str, Any] = {"cell": name, "planned_bytes": planned.total, "exact_bytes": planned.exact}
    # Without reservation a cell that is too large fails by itself and not because of what was reserved before.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "experiments.benchmarks.plan_error", "--measure", name]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1800)
    if done.returncode:
        return row | {"peak_bytes": None, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row |= json.loads(done.stdout.splitlines()[-1])
    by_steps = row["step_peak_bytes"] > row["state_peak_bytes"]
    return row | {"peak_bytes": row["step_peak_bytes"] if by_steps else None}


def main(arguments: list[str] | None = None) -> int:
    """Runs the cells that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.plan_error")
    parser.add_argument("--cells", default="", help="part of the names of the cells to run")
    parser.add_argument("--list", action="store_true", help="show the cells and what is planned for them")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    names = [name for name in CELLS if options.cells in name]
    if options.list:
        for name in names:
            print(f"{name:36}{estimate(CELLS[name], (1, 1, 1, 1)).total / 2**30:8.2f} GiB planned")
        return 0
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        print(
            f"error: plans are compared with the peak of a GPU's allocator, and this machine has {device.device_kind}. "
            "Run it where jax sees a GPU; --list shows the cells",
            file=sys.stderr,
        )
        return 2
    if options.measure:
        print(json.dumps(measure(CELLS[options.measure])))
        return 0
    if (os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") or "true").lower() != "false":
        print("note: cells run without preallocation; peaks are bytes in use, so the pool would not change them")
    rows = []
    for name in names:
        rows.append(run_cell(name))
        _show(rows[-1])
    errors = [row["planned_bytes"] / row["peak_bytes"] - 1 for row in rows if row["peak_bytes"]]
    if errors:
        size = statistics.median(map(abs, errors))
        print(f"{len(errors)} cells: median |error| {size:.1%}, worst {max(errors, key=abs):+.1%}; goal 5 %")
    result = {"formula": "planned_bytes / peak_bytes - 1", "device": device.device_kind} | record.environment()
    record.write(options.output, result | {"cells": rows})
    return 0


def _show(row: dict[str, Any]) -> None:
    planned = f"{row['cell']:36}{row['planned_bytes'] / 2**30:8.2f} GiB planned"
    if not row["peak_bytes"]:
        why = row.get("failed", "the peak is that of making the state: it counts for nothing")
        print(f"{planned}, {why}", flush=True)
        return
    error = row["planned_bytes"] / row["peak_bytes"] - 1
    print(f"{planned}, {row['peak_bytes'] / 2**30:8.2f} measured, {error:+.1%}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
