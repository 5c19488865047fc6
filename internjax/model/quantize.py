"""QuantArray: a quantised matrix that stands wherever a `kernel` leaf stands, and the product that accepts either.

I input features, O output features, g groups along I.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from internjax.kernels import quant_matmul as kernels
from internjax.kernels.quant_matmul import Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantArray:
    """A frozen matrix `[..., I, O]` in few bits; leading axes (layers) are on every field.

    values: int8 `[..., I, O]`, or uint8 `[..., I / 2, O]` with two 4-bit values per byte. scales and zeros:
    float32 `[..., I / group, O]`; zeros is None for the symmetric schemes int8 and nf4.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], self.in_features, self.out_features)

    @property
    def nbytes(self) -> int:
        fields = (self.values, self.scales, self.zeros)
        return sum(field.size * field.dtype.itemsize for field in fields if field is not None)


def fitting_group(in_features: int, *, largest: int = 128) -> int:
    """Returns the largest power of two up to `largest` that divides `in_features`."""
    return min(largest, in_features & -in_features)


@functools.partial(jax.jit, static_argnames=("scheme", "group"))
def quantize_array(kernel: jax.Array, *, scheme: Scheme, group: int = 128) -> QuantArray:
    """Returns `kernel` `[..., I, O]` rounded to nearest, one scale per `group` input rows and output column.

    int8: symmetric, scale = max|w| / 127. int4: asymmetric, scale = (max - min) / 15 over a range that holds zero.
    nf4: nearest NormalFloat level of w / max|w|. Raises ValueError when `group` does not divide I.
    """
    *lead, I, O = kernel.shape
    if I % group or (scheme != "int8" and group % 2):
        raise ValueError(
            f"a group of {group} rows does not divide the {I} input features of a kernel {kernel.shape}; "
            f"use group={fitting_group(I)}"
        )
    groups = kernel.astype(jnp.float32).reshape(*lead, I // group, group, O)
    zeros = None
    if scheme == "int8":
        scales = _nonzero(jnp.abs(groups).max(axis=-2) / 127.0)
        values = jnp.clip(jnp.round(groups / scales[..., None, :]), -127, 127).astype(jnp.int8)
    elif scheme == "int4":
        low, high = jnp.minimum(groups.min(axis=-2), 0.0), jnp.maximum(groups.max(axis=-2), 0.0)
        scales = _nonzero((high - low) / 15.0)
        zeros = jnp.round(-low / scales)
        values = jnp.clip(jnp.round(groups / scales[..., None, :]) + zeros[..., None, :], 0, 15)
    elif scheme == "nf4":
        scales = _nonzero(jnp.abs(groups).max(axis=-2))
        levels = jnp.array(kernels.NF4_LEVELS, jnp.float32)
        values = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, groups / scales[..., None, :])
    else:
        raise ValueError(f"unknown quantisation scheme {scheme!r}; known: int8, int4, nf4")
    values = values.reshape(*lead, I, O)
    values = values if scheme == "int8" else kernels.pack_nibbles(values)
    return QuantArray(values, scales, zeros, scheme, group, I, O, kernel.dtype.name)


def _nonzero(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, 1.0, scales)


def dequantize(array: QuantArray) -> jax.Array:
    """Returns the full matrix `[..., I, O]` in the dtype that was quantised."""
    return kernels.dequantize(
        array.values, array.scales, array.zeros, scheme=array.scheme, dtype=jnp.dtype(array.dtype)
    )


def quantize_params(params: dict, *, scheme: Scheme, group: int = 128, head: bool = True) -> dict:
    """Returns the parameters with every `kernel` quantised (naming law); norms and the embedding table stay.

    Each kernel uses `group`, or the largest power of two below it that divides its input features. With head=False the
    output head keeps its precision.
    """

    def leaf(path, value):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or (names[0] == "head" and not head):
            return value
        return quantize_array(value, scheme=scheme, group=fitting_group(value.shape[-2], largest=group))

    return jax.tree_util.tree_map_with_path(leaf, params)


def logical_axes(params: dict, params_axes: dict) -> dict:
    """Returns the axes tree for quantised `params`: every field of a QuantArray follows its kernel's (in, out) axes.

    Group rows shard with the input axis, so a mesh must divide in / group as well as in; `sharding.shardings` refuses
    one that does not.
    """

    def leaf(value, axes):
        if not isinstance(value, QuantArray):
            return axes
        return dataclasses.replace(value, values=axes, scales=axes, zeros=None if value.zeros is None else axes)

    return jax.tree.map(leaf, params, params_axes, is_leaf=lambda node: isinstance(node, QuantArray))


@jax.custom_vjp
def _quant_matmul(x: jax.Array, array: QuantArray) -> jax.Array:
    return kernels.quant_matmul(x, array.values, array.scales, array.zeros, scheme=array.scheme)


def _quant_matmul_forward(x, array):
    return _quant_matmul(x, array), array


def _quant_matmul_backward(array, grad):
    # The residual is the packed leaf: the matrix is restored again here, so at most one layer's is alive at a time.
    # The quantised matrix is frozen, hence no cotangent for it.
    weights = kernels.dequantize(array.values, array.scales, array.zeros, scheme=array.scheme, dtype=grad.dtype)
    return grad @ weights.T, None


_quant_matmul.defvjp(_quant_matmul_forward, _quant_matmul_backward)


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """Returns x `[..., I]` times a kernel `[I, O]`, an array or a QuantArray, in x's dtype."""
    if isinstance(kernel, QuantArray):
        return _quant_matmul(x, kernel)
    return x @ kernel.astype(x.dtype)
