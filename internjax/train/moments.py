"""How an optimizer keeps its moments between updates: as float32, as bfloat16, or as 8-bit codes with block scales.

8 bits: 64 neighbours of the last axis share one float32 scale, their largest magnitude. A code counts steps of equal
ratio below it, down to 2^-16 of the scale: the ratio of first to second moment, which is what Adam uses, then has the
same relative error for small entries as for large ones (steps equally far apart would turn most of a block into zeros).

1. Rounding is random and unbiased. A running mean moves by a few hundredths of itself per update, less than half a
   step; rounded to the nearest code it would never move at all. The noise is a function of the update's number.
2. A squared gradient is stored by its root, and a root that is not 0 never gets the code 0 but at least the lowest
   step: with a zero there, the next update would divide by eps alone.
3. Leaves of under 4,096 entries, or of a last axis that 64 does not divide, stay float32: norms, biases, thin adapters.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

MomentDType = Literal["float32", "bfloat16", "int8"]

BLOCK = 64
_SMALLEST = 4096
_OCTAVES = 16


class Coded(NamedTuple):
    """A tree as 8-bit codes, and its scales: the last axis of a scale is 1/64 of the leaf's. Uncoded leaves are codes
    of dtype float32 with a scale that is not used."""

    codes: Any
    scales: Any


def zeros(params: Any, dtype: MomentDType, *, signed: bool = True) -> Any:
    """Returns zeros like `params` as they are stored."""
    if dtype != "int8":
        return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)
    kind = jnp.int8 if signed else jnp.uint8

    def scale(p):
        shape = (*p.shape[:-1], p.shape[-1] // BLOCK) if _is_coded(p) else (1,) * p.ndim
        return jnp.zeros(shape, jnp.float32)

    codes = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=kind if _is_coded(p) else jnp.float32), params)
    return Coded(codes, jax.tree.map(scale, params))


def load(stored: Any) -> Any:
    """Returns the moments in float32."""
    if not isinstance(stored, Coded):
        return jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    return jax.tree.map(_decode, stored.codes, stored.scales)


def store(moments: Any, dtype: MomentDType, *, count: jax.Array, signed: bool = True) -> Any:
    """Returns float32 `moments` as they are stored. `count` is the update's number, the source of the rounding.

    With `signed` False they are squares, none negative.
    """
    if dtype != "int8":
        return jax.tree.map(lambda x: x.astype(dtype), moments)
    leaves, tree = jax.tree.flatten(moments)
    coded = [_encode(x, _noise(x.shape, count, 2 * i + signed), signed=signed) for i, x in enumerate(leaves)]
    return Coded(*(jax.tree.unflatten(tree, part) for part in zip(*coded)))


def beside(moment: Any, placed: NamedSharding) -> NamedSharding:
    """Returns where a leaf of an optimizer's state lives whose parameter is `placed`: along with it.

    Both have the same rank. A dimension that the mesh does not divide stays whole (a factored moment has size 1 there).
    """
    spec = (*placed.spec, *[None] * (moment.ndim - len(placed.spec)))

    def parts(names) -> int:
        names = () if names is None else (names,) if isinstance(names, str) else names
        return math.prod(placed.mesh.shape[name] for name in names)

    kept = (names if size % parts(names) == 0 else None for names, size in zip(spec, moment.shape, strict=True))
    return NamedSharding(placed.mesh, PartitionSpec(*kept))


def _is_coded(leaf: Any) -> bool:
    return leaf.size >= _SMALLEST and leaf.shape[-1] % BLOCK == 0


def _level(code: jax.Array, num_levels: int) -> jax.Array:
    """Returns the share of the scale that a code stands for: 1 for the highest, 2^-16 for 1, 0 for 0."""
    return jnp.where(code > 0, jnp.exp2((code - num_levels) * (_OCTAVES / (num_levels - 1))), 0.0)


def _noise(shape: tuple[int, ...], count: jax.Array, salt: int) -> jax.Array:
    """Returns numbers in [0, 1), a function of place, count and salt: ten integer operations where threefry takes a
    hundred. The mixing constants are those of C. Wellons' hash "lowbias32"."""
    x = jnp.uint32(count) * jnp.uint32(0x9E3779B9) + jnp.uint32(salt * 0x85EBCA6B & 0xFFFFFFFF)
    stride = 1
    for axis in reversed(range(len(shape))):
        x = x + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return ((x ^ (x >> 16)) >> 8).astype(jnp.float32) / 2**24


def _encode(x: jax.Array, noise: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
    if not _is_coded(x):
        return x, jnp.zeros((1,) * x.ndim, jnp.float32)
    num_levels = 127 if signed else 255
    size = jnp.abs(x) if signed else jnp.sqrt(x)
    blocks = size.reshape(*x.shape[:-1], -1, BLOCK)
    scale = jnp.max(blocks, axis=-1)
    share = blocks / jnp.where(scale > 0, scale, 1.0)[..., None]
    below = jnp.floor(jnp.clip(num_levels + jnp.log2(share) * ((num_levels - 1) / _OCTAVES), 0, num_levels))
    low, high = _level(below, num_levels), _level(below + 1, num_levels)
    code = below + (share - low > noise.reshape(share.shape) * (high - low))
    if not signed:
        code = jnp.where(blocks > 0, jnp.maximum(code, 1.0), 0.0)
    code = code.reshape(x.shape)
    return (code * jnp.sign(x)).astype(jnp.int8) if signed else code.astype(jnp.uint8), scale


def _decode(codes: jax.Array, scale: jax.Array) -> jax.Array:
    if codes.dtype == jnp.float32:
        return codes
    signed = codes.dtype == jnp.int8
    code = codes.astype(jnp.float32)
    share = _level(jnp.abs(code), 127 if signed else 255)
    size = (share.reshape(*codes.shape[:-1], -1, BLOCK) * scale[..., None]).reshape(codes.shape)
    return jnp.sign(code) * size if signed else jnp.square(size)
