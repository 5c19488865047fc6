"""Products with quantised matrices: arrays only; a jnp reference (`xla`) and a kernel (`mosaic`).

xla: restores the matrix and multiplies. mosaic: multiplies few rows with 4 bits as they are, on NVIDIA's Hopper, from a
matrix that was packed for it (kernels.mosaic_quant_matmul).

I input features, O output features, g groups along I. 4-bit values lie two per byte along I: the even input row in the
low half, the odd one in the high half.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from internjax.kernels import mosaic, mosaic_quant_matmul

Scheme = Literal["int8", "int4", "nf4"]
Backend = Literal["xla", "mosaic"]

# The 16 levels of 4-bit NormalFloat (QLoRA, arXiv:2305.14314, appendix E).
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def pack_nibbles(values_IO: jax.Array) -> jax.Array:
    """Returns `[..., I / 2, O]` bytes of the 4-bit integers `[..., I, O]`, of NumPy or JAX arrays."""
    values_IO = values_IO.astype(np.uint8)
    return values_IO[..., 0::2, :] | (values_IO[..., 1::2, :] << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """Returns the 4-bit integers `[..., I, O]` of `[..., I / 2, O]` bytes."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-2)
    return pairs.reshape(*packed.shape[:-2], 2 * packed.shape[-2], packed.shape[-1])


def check(backend: Backend, *, scheme: Scheme, group: int, in_features: int, out_features: int) -> None:
    """Raises ValueError naming what `backend` cannot do; a back end never falls back to another silently."""
    if backend == "xla":
        return
    if backend != "mosaic":
        raise ValueError(f"unknown back end {backend!r} of products with quantised matrices; known: xla, mosaic")
    sizes = {"group": group, "in_features": in_features, "out_features": out_features}
    limits = mosaic.unsupported() | mosaic_quant_matmul.limits(scheme=scheme, **sizes)
    if found := [limit for limit, holds in limits.items() if holds]:
        raise ValueError(
            f"back end 'mosaic' of products with quantised matrices cannot do {'; '.join(found)}. Use "
            "quant_matmul='xla'."
        )


def dequantize(values, scales_gO, zeros_gO, *, scheme: Scheme, dtype: jnp.dtype, backend: Backend = "xla") -> jax.Array:
    """Returns the matrix `[..., I, O]`: (value - zero) * scale, or level[value] * scale for nf4, per group of rows.

    backend: whose packing the values have.
    """
    if backend == "mosaic":
        return mosaic_quant_matmul.unpack(mosaic_quant_matmul.Packed(values, scales_gO, zeros_gO), dtype=dtype)
    if scheme == "int8":
        integers = values.astype(jnp.float32)
    elif scheme == "int4":
        integers = unpack_nibbles(values).astype(jnp.float32)
    else:
        integers = jnp.take(jnp.array(NF4_LEVELS, jnp.float32), unpack_nibbles(values).astype(jnp.int32))
    *lead, I, O = integers.shape
    groups = scales_gO.shape[-2]
    integers = integers.reshape(*lead, groups, I // groups, O)
    if zeros_gO is not None:
        integers = integers - zeros_gO[..., :, None, :].astype(jnp.float32)
    return (integers * scales_gO[..., :, None, :].astype(jnp.float32)).reshape(*lead, I, O).astype(dtype)


def quant_matmul(x, values, scales_gO, zeros_gO, *, scheme: Scheme, backend: Backend = "xla") -> jax.Array:
    """Returns x `[..., I]` times the dequantised matrix, `[..., O]` in x's dtype.

    mosaic: the kernel takes up to 64 rows of bfloat16 or float16. More rows are bound by arithmetic and not by how fast
    weights arrive: for them the matrix is restored, as the reference does.
    """
    with jax.named_scope("quant_matmul"):
        num_rows = math.prod(x.shape[:-1])
        if backend == "mosaic" and num_rows <= mosaic_quant_matmul.MAX_ROWS:
            packed = mosaic_quant_matmul.Packed(values, scales_gO, zeros_gO)
            out = mosaic_quant_matmul.quant_matmul(x.reshape(num_rows, -1), packed, run=mosaic.COMPILED)
            return out.reshape(*x.shape[:-1], -1)
        return x @ dequantize(values, scales_gO, zeros_gO, scheme=scheme, dtype=x.dtype, backend=backend)
