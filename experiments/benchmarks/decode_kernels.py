"""The kernels that decoding asks for, by themselves: attention over pages, and few rows times matrices of 4 bits.

    python -m experiments.benchmarks.decode_kernels                 # the cells of the device at hand; --list shows them
    python -m experiments.benchmarks.decode_kernels --cells int4    # those whose name holds int4

Hardware: one NVIDIA GPU of the Hopper generation; on a CPU small cells run with the reference alone, to see it work
Time: seconds on a CPU; not yet run on a GPU

Back ends of a cell run in turns, as in experiments.benchmarks.attention; a figure is the median over all turns. A call
goes through `layers` layers, each with its own pages or matrices, so that none is read from a cache of the chip and the
time of a launch is shared out. What a back end cannot do stands in the result with its reason, and under `not_run`.

Bytes of attention = 2 x rows x context x key/value heads x (bits x head_dim / 8, and 4 for scale and offset of few
bits); bytes of a product = in x out / 2, and its scales and zeros as they are stored (2 in x out beside bfloat16).
Share of bandwidth = bytes / seconds / the vendor's figure for reading. Error: against the reference in float32 on the
same rounded numbers, as a share of the largest value; a back end that is further off than TOLERANCE is not timed.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import record
from experiments.benchmarks.attention import in_turns
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B
from internjax.train.devices import find

TOLERANCE = 2e-2


class Paged(NamedTuple):
    """One query for each of `rows` rows whose caches hold `context` tokens in pages."""

    rows: int
    context: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    cache_dtype: str
    layers: int


class Product(NamedTuple):
    """`rows` rows times a matrix in groups of 128."""

    rows: int
    in_features: int
    out_features: int
    layers: int


Cell = Paged | Product
BACKENDS: dict[type, tuple[str, ...]] = {Paged: ("xla", "mosaic"), Product: ("bfloat16", "xla", "mosaic")}


def _gpu_cells() -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for name, model in {"1.8b": INTERNLM2_1_8B, "7b": INTERNLM2_7B}.items():
        heads = model.num_heads, model.num_kv_heads, model.head_dim
        for rows, context in ((1, 4096), (16, 4096), (64, 2048)):
            for dtype in ("bfloat16", "int8", "int4"):
                cells[f"{name} {dtype} cache {rows}x{context}"] = Paged(rows, context, *heads, 64, dtype, 8)
    width, hidden = INTERNLM2_7B.d_model, INTERNLM2_7B.ffn_dim
    for rows in (1, 8, 64):
        for sizes in ((width, width), (width, hidden), (hidden, width)):
            cells[f"7b int4 weights {rows} x {sizes[0]}x{sizes[1]}"] = Product(rows, *sizes, 8)
    return cells


GPU_CELLS = _gpu_cells()
CPU_CELLS: dict[str, Cell] = {
    "small int8 cache 2x256": Paged(2, 256, 4, 2, 64, 64, "int8", 2),
    "small int4 weights 2 x 256x128": Product(2, 256, 128, 2),
}


def num_bytes(cell: Cell, backend: str) -> int:
    """Returns the bytes that a call must read at least."""
    if isinstance(cell, Paged):
        bits = {"bfloat16": 16, "int8": 8, "int4": 4}[cell.cache_dtype]
        token = cell.head_dim * bits // 8 + (4 if bits < 16 else 0)
        return cell.layers * 2 * cell.rows * cell.context * cell.num_kv_heads * token
    matrix = cell.in_features * cell.out_features
    if backend == "bfloat16":
        return cell.layers * 2 * matrix
    # Scales of 2 bytes; zeros of 1, and of 2 as the kernel has them.
    return cell.layers * (matrix // 2 + matrix // 128 * (4 if backend == "mosaic" else 3))


def _paged(cell: Paged) -> tuple[Callable, Callable]:
    """Returns back end -> inputs, and (inputs, back end, dtype of the queries) -> outputs of the last layer."""
    import jax
    import jax.numpy as jnp

    from internjax.kernels.paged_attention import paged_attention

    rng = np.random.default_rng(0)
    few_bits = cell.cache_dtype != "bfloat16"
    pages_per_row = -(-cell.context // cell.page_size)
    num_pages = cell.rows * pages_per_row
    width = cell.head_dim // (2 if cell.cache_dtype == "int4" else 1)
    pages = (cell.layers, num_pages, cell.page_size, cell.num_kv_heads)
    keys = jax.random.split(jax.random.key(0), 6)
    if few_bits:
        k, v = (jax.random.bits(key, (*pages, width), jnp.uint8) for key in keys[:2])
        step = 4.0 / (255 if cell.cache_dtype == "int8" else 15)
        scales = [(step * jax.random.uniform(key, pages, minval=0.5)).astype(jnp.float16) for key in keys[2:4]]
        offsets = [jax.random.uniform(key, pages, minval=-2.0, maxval=-1.0).astype(jnp.float16) for key in keys[4:]]
        numbers = (scales[0], offsets[0], scales[1], offsets[1])
    else:
        k, v = (jax.random.normal(key, (*pages, width), jnp.bfloat16) for key in keys[:2])
        numbers = (None,) * 4
    table = jnp.asarray(rng.permutation(num_pages).reshape(cell.rows, pages_per_row), jnp.int32)
    q = jnp.asarray(rng.standard_normal((cell.rows, 1, cell.num_heads, cell.head_dim)), jnp.bfloat16)
    names = ("k_scales", "k_offsets", "v_scales", "v_offsets")

    def run(inputs, backend: str, dtype: str):
        q, k, v, table, *numbers = inputs
        positions_BT = jnp.full((cell.rows, 1), cell.context - 1, jnp.int32)
        out = q = q.astype(dtype)
        for layer in range(cell.layers):
            # Each layer waits for the one before it, as in a model.
            out = paged_attention(
                q + 0 * out,
                k,
                v,
                layer=jnp.int32(layer),
                page_table_BM=table,
                q_positions_BT=positions_BT,
                backend=backend,
                **dict(zip(names, numbers, strict=True)),
            )
        return out

    return lambda backend: (q, k, v, table, *numbers), run


def _product(cell: Product) -> tuple[Callable, Callable]:
    """Returns back end -> inputs, and (inputs, back end, dtype of the rows) -> outputs of the last matrix."""
    import jax
    import jax.numpy as jnp

    from internjax.model.quantize import dequantize, matmul, packed_for, quantize_array

    keys = jax.random.split(jax.random.key(0), cell.layers + 1)
    shape = (cell.in_features, cell.out_features)
    arrays = [
        quantize_array(jax.random.normal(key, shape, jnp.bfloat16), scheme="int4", scale_dtype="float16")
        for key in keys[1:]
    ]
    x = jax.random.normal(keys[0], (cell.rows, cell.in_features), jnp.bfloat16)

    def run(inputs, backend: str, dtype: str):
        x, arrays = inputs
        x, out = x.astype(dtype), jnp.zeros((cell.rows, 1), dtype)
        for array in arrays:
            out = matmul(x + 0 * out[:, :1], array)
        return out

    def inputs_of(backend: str):
        if backend == "bfloat16":
            return x, [jax.jit(dequantize)(array) for array in arrays]
        return x, [packed_for(array, backend) for array in arrays]

    return inputs_of, run


def measure(cell: Cell, backends: Sequence[str], *, num_turns: int, calls: int) -> dict[str, Any]:
    """Returns the figures of every back end, or why there are none."""
    import jax
    import jax.numpy as jnp

    inputs_of, run = _paged(cell) if isinstance(cell, Paged) else _product(cell)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(jax.jit(lambda x: run(x, "xla", "float32"))(inputs_of("xla")))
    found: dict[str, Any] = {}
    compiled: dict[str, Any] = {}
    programs: dict[str, dict[str, Callable]] = {}
    for backend in backends:
        try:
            own = inputs_of(backend)
            compiled[backend] = jax.jit(lambda x, backend=backend: run(x, backend, "bfloat16")).lower(own).compile()
            given = np.asarray(jax.block_until_ready(compiled[backend](own)).astype(jnp.float32))
        except ValueError as error:
            found[backend] = {"refused": str(error)}
        except RuntimeError as error:  # what XLA raises
            found[backend] = {"failed": (str(error).splitlines() or [type(error).__name__])[0][:300]}
        else:
            error = float(np.abs(given - wanted).max() / np.abs(wanted).max())
            if error <= TOLERANCE:
                found[backend] = {"error": error}
                programs[backend] = {"call": lambda _, run=compiled[backend], own=own: run(own)}
            else:
                found[backend] = {"failed": f"differs from the reference by {error:.1e} of the largest value"}
    seconds = in_turns(programs, None, num_turns=num_turns, calls=calls)
    for backend in programs:
        found[backend] |= _figures(cell, backend, compiled[backend], seconds[backend]["call"])
    return found


def _figures(cell: Cell, backend: str, compiled: Any, seconds: Sequence[float]) -> dict[str, Any]:
    import jax

    median, device = statistics.median(seconds), find(jax.devices()[0].device_kind)
    rate = num_bytes(cell, backend) / median
    return {
        "median_seconds": round(median, 7),
        "fastest_seconds": round(min(seconds), 7),
        "gigabytes_per_second": round(rate / 1e9, 2),
        "share_of_bandwidth": None if device is None else round(rate / device.memory_bandwidth, 4),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def not_run(cells: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Returns why back ends have no figures: reason -> cells and back ends."""
    found: dict[str, list[str]] = {}
    for name, figures in cells.items():
        for backend, each in figures.items():
            if "error" not in each:
                found.setdefault(next(iter(each.values())), []).append(f"{name}: {backend}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.decode_kernels", description=__doc__)
    parser.add_argument("--cells", default="", help="part of the names of the cells to run")
    parser.add_argument("--list", action="store_true", help="show the cells of this device and end")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--calls", type=int, default=5, help="calls of a turn")
    parser.add_argument("--output", type=Path, help="default: results/decode_kernels_DEVICE.json")
    args = parser.parse_args(arguments)
    import jax

    device = jax.devices()[0]
    known = GPU_CELLS if device.platform == "gpu" else CPU_CELLS
    cells = {name: cell for name, cell in known.items() if args.cells in name}
    if args.list or not cells:
        print("\n".join(known))
        return
    found = {}
    for name, cell in cells.items():
        found[name] = measure(cell, BACKENDS[type(cell)], num_turns=args.turns, calls=args.calls)
        print(name)
        for backend, each in found[name].items():
            print(f"  {backend:9} {_line(each)}", flush=True)
    peak = find(device.device_kind)
    result = {
        "what": "seconds of a call through `layers` layers, blocked, medians of interleaved turns",
        "formula": "share of bandwidth = bytes that must be read / median seconds / memory bandwidth of the data sheet",
        "memory_bandwidth": None if peak is None else peak.memory_bandwidth,
        **record.environment(),
        "cells": {name: {"cell": cells[name]._asdict(), "back_ends": each} for name, each in found.items()},
        "not_run": not_run(found),
    }
    slug = "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "_")
    record.write(args.output or record.RESULTS / f"decode_kernels_{slug}.json", result)


def _line(found: dict[str, Any]) -> str:
    if "error" not in found:
        return next(f"{status}: {why}" for status, why in found.items())
    share = found["share_of_bandwidth"]
    return (
        f"{found['median_seconds'] * 1e3:9.3f} ms {found['gigabytes_per_second']:9.2f} GB/s"
        f"{'' if share is None else f' ({share:.0%})'}  error {found['error']:.1e}"
    )


if __name__ == "__main__":
    main()
