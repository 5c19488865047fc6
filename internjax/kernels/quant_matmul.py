"""Products with quantised matrices: arrays only, jnp reference.

I input features, O output features, g groups along I. 4-bit values lie two per byte along I: the even input row in the
low half, the odd one in the high half.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Scheme = Literal["int8", "int4", "nf4"]

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


def dequantize(values, scales_gO, zeros_gO, *, scheme: Scheme, dtype: jnp.dtype) -> jax.Array:
    """Returns the matrix `[..., I, O]`: (value - zero) * scale, or level[value] * scale for nf4, per group of rows."""
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


def quant_matmul(x, values, scales_gO, zeros_gO, *, scheme: Scheme) -> jax.Array:
    """Returns x `[..., I]` times the dequantised matrix, `[..., O]` in x's dtype."""
    with jax.named_scope("quant_matmul"):
        return x @ dequantize(values, scales_gO, zeros_gO, scheme=scheme, dtype=x.dtype)
