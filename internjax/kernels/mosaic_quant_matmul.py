"""Few rows times a 4-bit matrix as one kernel for Hopper: weights stay in 4 bits until they are in registers.

Each program takes _OUTPUTS output features and SPAN input features: it copies a group of weights at a time, the next
ones while it computes, widens them in registers and multiplies on the tensor cores. The product is transposed, weights
times rows, so that the 64 rows that a product of Hopper's tensor cores has at least are weights, and 1 row or 64 fit
beside them: one path for every batch, batch 1 included, whose 8 columns cost less than the weights take to arrive.

Order-dependent choices:
1. SPAN is a number of input features, and the spans' sums are added pairwise, neighbours first: a row's result depends
   neither on how many programs run at once nor on the other rows.
2. Codes less 8 go to the tensor cores as whole numbers, exact in bfloat16 and float16. Per group, sums in float32 are
   corrected by zero * sum of the group's inputs and multiplied by the scale: s (sum_i q_i x_i - z sum_i x_i). Symmetric
   codes have zero 0 there, and nothing is corrected.

M rows, I input features, O output features, g groups along I.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from internjax.kernels import mosaic
from internjax.kernels.mosaic import Run

GROUP = 128
SPAN = 1024
"""Input features of one program."""
MAX_ROWS = 64
_OUTPUTS = 64
_STAGES = 4
"""Groups under way."""
_GROUPS = SPAN // GROUP


class Packed(NamedTuple):
    """A 4-bit matrix as the kernel reads it, beside leading axes."""

    values: jax.Array
    """int4 `[O, I]`: codes less 8."""
    scales: jax.Array
    """`[g, O]`, g filled up to whole spans."""
    zeros: jax.Array
    """float16 `[g, O]` likewise: zeros less 8."""


def limits(*, scheme: str, group: int, in_features: int, out_features: int) -> dict[str, bool]:
    """Returns what the kernel cannot take of a matrix, each with whether it holds; see `mosaic.unsupported` besides."""
    return {
        f"scheme {scheme} (int4 only)": scheme != "int4",
        f"a group of {group} input features ({GROUP} only)": group != GROUP,
        f"{in_features} input features (a multiple of {GROUP} only)": in_features % GROUP != 0,
        f"{out_features} output features (a multiple of {_OUTPUTS} only)": out_features % _OUTPUTS != 0,
    }


def pack(codes: jax.Array, scales: jax.Array, zeros: jax.Array) -> Packed:
    """Returns the matrix of codes `[..., I, O]` from 0 to 15, scales and zeros `[..., g, O]` as the kernel reads it."""
    values = jnp.swapaxes(codes.astype(jnp.int8) - 8, -1, -2).astype(jnp.int4)
    filled = [(0, 0)] * (scales.ndim - 2) + [(0, -scales.shape[-2] % _GROUPS), (0, 0)]
    zeros = zeros.astype(jnp.float16) - 8
    return Packed(values, jnp.pad(scales, filled), jnp.pad(zeros, filled))


def unpack(packed: Packed, *, dtype: jnp.dtype) -> jax.Array:
    """Returns the matrix `[..., I, O]`."""
    integers = jnp.swapaxes(packed.values, -1, -2).astype(jnp.float32)
    *lead, I, O = integers.shape
    scales, zeros = (x[..., : I // GROUP, None, :].astype(jnp.float32) for x in (packed.scales, packed.zeros))
    return ((integers.reshape(*lead, -1, GROUP, O) - zeros) * scales).reshape(*lead, I, O).astype(dtype)


def quant_matmul(x_MI: jax.Array, packed: Packed, *, run: Run = mosaic.COMPILED) -> jax.Array:
    """Returns x times the matrix, `[M, O]` in x's dtype; M is at most MAX_ROWS, x bfloat16 or float16."""
    M, I = x_MI.shape
    if x_MI.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            "back end 'mosaic' of products with quantised matrices takes bfloat16 or float16, given "
            f"{x_MI.dtype.name}. Use quant_matmul='xla'."
        )
    O, plgpu = packed.values.shape[0], mosaic.modules().plgpu
    x_MI = jnp.pad(x_MI, ((0, -M % 8), (0, 0)))
    rows = x_MI.shape[0]
    num_spans = packed.scales.shape[0] // _GROUPS
    sums_gM = x_MI.reshape(rows, I // GROUP, GROUP).sum(axis=-1, dtype=jnp.float32).T
    sums_gM = jnp.pad(sums_gM, ((0, num_spans * _GROUPS - I // GROUP), (0, 0)))
    kernel = run.kernel(
        functools.partial(_kernel, run),
        out_type=jax.ShapeDtypeStruct((num_spans, O, rows), jnp.float32),
        grid=(num_spans, O // _OUTPUTS),
        grid_names=("spans", "outputs"),
        scratch_types=_Shared(
            values=plgpu.SMEM((_STAGES, _OUTPUTS, GROUP), jnp.int4, transforms=mosaic.tiles(GROUP, jnp.int4)),
            x=plgpu.SMEM((_STAGES, rows, GROUP), x_MI.dtype, transforms=mosaic.tiles(GROUP, x_MI.dtype)),
            scales=plgpu.SMEM((_GROUPS, _OUTPUTS), packed.scales.dtype),
            zeros=plgpu.SMEM((_GROUPS, _OUTPUTS), packed.zeros.dtype),
            sums=plgpu.SMEM((_GROUPS, rows), jnp.float32),
            out=plgpu.SMEM((_OUTPUTS, rows), jnp.float32, transforms=mosaic.tiles(rows, jnp.float32)),
            stages=plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            beside=plgpu.Barrier(num_arrivals=3),
        ),
    )
    out_UOM = kernel(x_MI, sums_gM, *packed)
    return mosaic.pairwise_sum(out_UOM, axis=0)[:, :M].T.astype(x_MI.dtype)


class _Shared(NamedTuple):
    """Shared memory of a program, and its barriers."""

    values: Any
    x: Any
    scales: Any
    zeros: Any
    sums: Any
    out: Any
    stages: Any
    beside: Any


def _kernel(run: Run, x, sums, values, scales, zeros, out, *shared):
    pl, plgpu = mosaic.modules()
    shared, layout = _Shared(*shared), plgpu.Layout
    span, tile = lax.axis_index("spans"), lax.axis_index("outputs")
    outputs, first = pl.ds(tile * _OUTPUTS, _OUTPUTS), span * _GROUPS
    num_groups = jnp.minimum(x.shape[1] // GROUP - first, _GROUPS)

    def fetch(group):
        stage = lax.rem(group, jnp.int32(_STAGES))
        inputs = pl.ds((first + group) * GROUP, GROUP)
        plgpu.copy_gmem_to_smem(values.at[outputs, inputs], shared.values.at[stage], shared.stages.at[stage])
        plgpu.copy_gmem_to_smem(x.at[:, inputs], shared.x.at[stage], shared.stages.at[stage])

    for group in range(_STAGES):
        pl.when(group < num_groups)(functools.partial(fetch, jnp.int32(group)))
    groups = pl.ds(first, _GROUPS)
    plgpu.copy_gmem_to_smem(scales.at[groups, outputs], shared.scales, shared.beside)
    plgpu.copy_gmem_to_smem(zeros.at[groups, outputs], shared.zeros, shared.beside)
    plgpu.copy_gmem_to_smem(sums.at[groups], shared.sums, shared.beside)
    plgpu.barrier_wait(shared.beside)

    def add(group, total):
        stage = lax.rem(group, jnp.int32(_STAGES))
        plgpu.barrier_wait(shared.stages.at[stage])
        packed = run.cast(run.cast(shared.values[stage], layout.WGMMA_UPCAST_4X), layout.WGMMA_UPCAST_2X)
        weights = run.cast(packed.astype(x.dtype), layout.WGMMA)
        found = run.product(weights, shared.x.at[stage], transposed=True)
        scale, zero = (
            lax.broadcast_in_dim(run.cast(ref[group], layout.WGMMA.reduce(1)).astype(jnp.float32), found.shape, (0,))
            for ref in (shared.scales, shared.zeros)
        )
        sums = lax.broadcast_in_dim(run.cast(shared.sums[group], layout.WGMMA.reduce(0)), found.shape, (1,))
        pl.when(group + _STAGES < num_groups)(lambda: fetch(group + _STAGES))
        return total + scale * (found - zero * sums)

    begin = run.cast(lax.full(shared.out.shape, 0.0, jnp.float32), layout.WGMMA)
    shared.out[...] = lax.fori_loop(0, num_groups, add, begin)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.out, out.at[span, outputs])
    plgpu.wait_smem_to_gmem(0)
