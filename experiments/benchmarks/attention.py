"""Attention by itself: every back end forward and forward + backward at the head shapes of 1.8B and 7B, one run.

    python -m experiments.benchmarks.attention                 # the cells of the device at hand; --list shows them
    python -m experiments.benchmarks.attention --cells 4096    # those whose name holds 4096

Hardware: one NVIDIA GPU of 80 GB or more (Hopper for cudnn_packed); on a CPU small cells in float32 run, to see it work
Time: seconds on a CPU; not yet run on a GPU

All back ends of a cell are compiled first and then run in turns, so that whatever else the machine does meets all of
them; a figure is the median over all turns. What a back end cannot do stands in the result with its reason.

FLOPs = 4 x H x query heads x pairs forward, 3 times that with the backward pass, pairs = sum over documents of
L (L + 1) / 2: the causal half of the documents alone. What a back end computes beyond that (masked pairs, the forward
pass again) is not counted. Share of peak = FLOPs / seconds / dense bfloat16 peak. Temporary bytes are the compiler's.
Error: of the last query head in the last row against `xla` in float32 on the same rounded numbers, forward and
gradients, as a share of the largest value; one head, because the whole does not fit where T is 32768. A back end that
is further off than its dtype explains is not timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from experiments.benchmarks import record
from internjax.kernels.attention import Backend
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B
from internjax.train.flops import peak_flops

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest error by dtype, as a share of the largest value, at which a back end still computes attention."""


class Cell(NamedTuple):
    """Rows of T tokens, each of `num_documents` documents of equal length."""

    batch_size: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_documents: int
    dtype: str


def _cells() -> dict[str, Cell]:
    models, rows = {"1.8b": INTERNLM2_1_8B, "7b": INTERNLM2_7B}, {4096: 4, 32768: 1}
    return {
        f"{name} {rows[length]}x{length} {kind}": Cell(
            rows[length], length, model.num_heads, model.num_kv_heads, model.head_dim, documents, "bfloat16"
        )
        for name, model in models.items()
        for length in rows
        for kind, documents in (("whole", 1), ("packed 4", 4))
    }


GPU_CELLS = _cells()
CPU_CELLS = {
    "small 2x512 whole": Cell(2, 512, 4, 2, 32, 1, "float32"),
    "small 2x1024 packed 4": Cell(2, 1024, 4, 2, 32, 4, "float32"),
}
FORMULA = "4 x head_dim x query heads x sum of L (L + 1) / 2 over documents; 3 times that with the backward pass"


def forward_flops(cell: Cell) -> int:
    length = cell.seq_len // cell.num_documents
    pairs = cell.batch_size * cell.num_documents * length * (length + 1) // 2
    return 4 * cell.head_dim * cell.num_heads * pairs


class Inputs(NamedTuple):
    q: Any
    k: Any
    v: Any
    weights: Any
    """Of every output in the sum whose gradients are taken."""
    positions: Any
    segments: Any


def inputs_of(cell: Cell) -> Inputs:
    """Returns random inputs on the device, the same for every back end."""
    import jax.numpy as jnp

    rng = np.random.default_rng(0)
    B, T, length = cell.batch_size, cell.seq_len, cell.seq_len // cell.num_documents
    heads = (cell.num_heads, cell.num_kv_heads, cell.num_kv_heads, cell.num_heads)
    numbers = (rng.standard_normal((B, T, n, cell.head_dim), np.float32) for n in heads)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32) % length, (B, T))
    segments = np.broadcast_to(np.arange(T, dtype=np.int32) // length + 1, (B, T))
    return Inputs(*(jnp.asarray(x, cell.dtype) for x in numbers), jnp.asarray(positions), jnp.asarray(segments))


def _forward(backend: Backend) -> Callable[[Inputs], Any]:
    from internjax.kernels.attention import attention

    def forward(x: Inputs):
        return attention(
            x.q,
            x.k,
            x.v,
            q_positions_BT=x.positions,
            k_positions_BS=x.positions,
            q_segments_BT=x.segments,
            k_segments_BS=x.segments,
            backend=backend,
        )

    return forward


def _both(backend: Backend) -> Callable[[Inputs], Any]:
    """Returns inputs -> (output, dq, dk, dv)."""
    import jax

    def both(x: Inputs):
        out, vjp = jax.vjp(lambda q, k, v: _forward(backend)(x._replace(q=q, k=k, v=v)), x.q, x.k, x.v)
        return (out, *vjp(x.weights))

    return both


def measure(cell: Cell, backends: Sequence[Backend], *, num_turns: int, calls: int) -> dict[str, Any]:
    """Returns the figures of every back end, or why there are none."""
    import jax

    from internjax import sharding
    from internjax.sharding import MeshConfig, make_mesh

    found: dict[str, Any] = {}
    with sharding.use(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        x = inputs_of(cell)
        wanted = _reference(cell, x)
        programs: dict[str, dict[str, Any]] = {}
        for backend in backends:
            try:
                compiled = {
                    what: jax.jit(make(backend)).lower(x).compile()
                    for what, make in (("forward", _forward), ("forward_backward", _both))
                }
                errors = _errors(cell, compiled["forward_backward"], x, wanted)
                jax.block_until_ready(compiled["forward"](x))
            except ValueError as error:
                found[backend] = {"refused": str(error)}
            except RuntimeError as error:  # what XLA and jax's own checks of the GPU raise
                found[backend] = {"failed": (str(error).splitlines() or [type(error).__name__])[0][:300]}
            else:
                if all(error <= TOLERANCE[cell.dtype] for error in errors.values()):
                    programs[backend] = compiled
                    found[backend] = {"error": errors}
                else:
                    found[backend] = {"failed": f"differs from xla: {errors}"}
        seconds = in_turns(programs, x, num_turns=num_turns, calls=calls)
    for backend, compiled in programs.items():
        found[backend] |= {what: _figures(cell, what, compiled[what], seconds[backend][what]) for what in compiled}
    return found


def in_turns(programs: dict[str, dict[str, Any]], x: Any, *, num_turns: int, calls: int) -> dict[str, dict]:
    """Returns the seconds of every blocked call on `x`, by back end and program."""
    import jax

    seconds = {backend: {what: [] for what in compiled} for backend, compiled in programs.items()}
    for _ in range(num_turns):
        for backend, compiled in programs.items():
            for what, program in compiled.items():
                for _ in range(calls):
                    started = time.perf_counter()
                    jax.block_until_ready(program(x))
                    seconds[backend][what].append(time.perf_counter() - started)
    return seconds


def _last(cell: Cell, results: Sequence[Any]) -> list[np.ndarray]:
    """Returns (output, dq, dk, dv) of the last head in the last row, float32 on the host."""
    return [np.asarray(x[-1, :, -1], np.float32) for x in results]


def _only_last(x: Inputs) -> Inputs:
    """Returns the inputs with the weights of all but the last head in the last row at zero: so its keys' gradients
    come from it alone."""
    import jax.numpy as jnp

    weights = jnp.zeros_like(x.weights).at[-1, :, -1].set(x.weights[-1, :, -1])
    return x._replace(weights=weights)


def _reference(cell: Cell, x: Inputs) -> list[np.ndarray]:
    import jax
    import jax.numpy as jnp

    one = Inputs(
        *(leaf[-1:, :, -1:].astype(jnp.float32) for leaf in (x.q, x.k, x.v, x.weights)),
        x.positions[-1:],
        x.segments[-1:],
    )
    with jax.default_matmul_precision("highest"):
        return _last(cell, jax.jit(_both("xla"))(one))


def _errors(cell: Cell, program: Any, x: Inputs, wanted: Sequence[np.ndarray]) -> dict[str, float]:
    given = _last(cell, program(_only_last(x)))
    return {
        name: float(np.abs(a - b).max() / np.abs(b).max())
        for name, a, b in zip(("output", "dq", "dk", "dv"), given, wanted, strict=True)
    }


def _figures(cell: Cell, what: str, compiled: Any, seconds: Sequence[float]) -> dict[str, Any]:
    import jax

    median = statistics.median(seconds)
    flops = forward_flops(cell) * (1 if what == "forward" else 3)
    peak = peak_flops(jax.devices()[0].device_kind)
    return {
        "median_seconds": round(median, 7),
        "fastest_seconds": round(min(seconds), 7),
        "tflops_per_second": round(flops / median / 1e12, 4),
        "share_of_peak": None if peak is None else round(flops / median / peak, 4),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.attention", description=__doc__)
    parser.add_argument("--cells", default="", help="part of the names of the cells to run")
    parser.add_argument("--list", action="store_true", help="show the cells of this device and end")
    parser.add_argument("--back-ends", nargs="+", choices=get_args(Backend), default=list(get_args(Backend)))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5, help="calls of a turn")
    parser.add_argument("--output", type=Path, help="default: results/attention_DEVICE.json")
    args = parser.parse_args(arguments)
    import jax

    device = jax.devices()[0]
    cells = {name: cell for name, cell in _cells_of(device.platform).items() if args.cells in name}
    if args.list or not cells:
        print("\n".join(_cells_of(device.platform)))
        return
    result = {
        "what": "seconds of attention, blocked, medians of interleaved turns",
        "formula": FORMULA,
        "peak_flops": peak_flops(device.device_kind),
        **record.environment(),
        "cells": {},
    }
    for name, cell in cells.items():
        figures = measure(cell, args.back_ends, num_turns=args.turns, calls=args.calls)
        result["cells"][name] = {"cell": cell._asdict(), "back_ends": figures}
        print(name)
        for backend, found in figures.items():
            print(f"  {backend:14} {_line(found)}", flush=True)
    slug = "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "_")
    record.write(args.output or record.RESULTS / f"attention_{slug}.json", result)


def _cells_of(platform: str) -> dict[str, Cell]:
    return GPU_CELLS if platform == "gpu" else CPU_CELLS


def _line(found: dict[str, Any]) -> str:
    if "error" not in found:
        return next(f"{status}: {why}" for status, why in found.items())
    parts = []
    for what in ("forward", "forward_backward"):
        figures = found[what]
        share = "" if figures["share_of_peak"] is None else f" ({figures['share_of_peak']:.0%})"
        parts.append(f"{figures['median_seconds'] * 1e3:9.3f} ms {figures['tflops_per_second']:8.2f} TFLOP/s{share}")
        parts.append(f"{figures['temporary_bytes'] / 2**20:8.0f} MiB")
    return "  ".join(parts) + f"  error {max(found['error'].values()):.1e}"


if __name__ == "__main__":
    main()
