"""QuantArray: a quantised matrix that stands wherever a `kernel` leaf stands, and the product that accepts either.

I input features, O output features, g groups along I.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internjax.kernels import mosaic_quant_matmul
from internjax.kernels import quant_matmul as kernels
from internjax.kernels.quant_matmul import Scheme


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantArray:
    """A frozen matrix `[..., I, O]` in few bits; leading axes (layers) are on every field.

    values: int8 `[..., I, O]`, or uint8 `[..., I / 2, O]` with two 4-bit values per byte. scales: floats
    `[..., I / group, O]`. zeros: integers likewise, uint8 beside 4-bit values and int8 beside 8-bit ones; None for nf4
    and where 8-bit values are symmetric. Doubly quantised, scales are uint8, and a scale is offset + step * code with
    float32 steps and offsets `[..., I / group, O / block]`. order: int32 `[..., I]`, the input feature of every row of
    values, where rows that share a scale are not neighbours in the matrix (GPTQ's act order); None: row i is input i.
    """

    values: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    in_features: int = dataclasses.field(metadata={"static": True})
    out_features: int = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    steps: jax.Array | None = None
    offsets: jax.Array | None = None
    order: jax.Array | None = None
    packing: kernels.Backend = dataclasses.field(default="xla", metadata={"static": True})
    """Whose packing the values have (`packed_for`); all said above is that of xla."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-2], self.in_features, self.out_features)

    @property
    def nbytes(self) -> int:
        return sum(num_bytes(field) for field in jax.tree.leaves(self))


def num_bytes(array: Any) -> int:
    """Returns the bytes of an array, two 4-bit integers to a byte."""
    return array.size // 2 if array.dtype == jnp.int4 else array.size * array.dtype.itemsize


def fitting_group(in_features: int, *, largest: int = 128) -> int:
    """Returns the largest power of two up to `largest` that divides `in_features`."""
    return min(largest, in_features & -in_features)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """How the kernels of a frozen model are held; the default is QLoRA's (arXiv:2305.14314)."""

    scheme: Scheme = "nf4"
    group: int = 64
    """Input rows that share a scale."""
    double: bool = True
    """Scales are quantised as well."""
    head: bool = True
    """The output head is quantised too."""


SCALE_BLOCK = 256
"""Scales that share a step and an offset where they are quantised themselves: neighbours along the output features."""


@functools.partial(jax.jit, static_argnames=("scheme", "group", "double", "symmetric", "scale_dtype"))
def quantize_array(
    kernel: jax.Array,
    *,
    scheme: Scheme,
    group: int = 128,
    double: bool = False,
    symmetric: bool | None = None,
    scale_dtype: str = "float32",
    shrink: jax.Array | float = 1.0,
) -> QuantArray:
    """Returns `kernel` `[..., I, O]` rounded to nearest, one scale per `group` input rows and output column.

    int8 (symmetric): scale = max|w| / 127. int4 (asymmetric): scale = (max - min) / 15 over a range that holds zero.
    symmetric: the other kind of either; see `step_of`. nf4: nearest NormalFloat level of w / max|w|. scale_dtype: of
    the stored scales; values are rounded by what is stored. shrink, broadcast to `[..., I / group, O]`: what is beyond
    this part of each group's range is clipped. Raises ValueError when `group` does not divide I.

    double: scales take 8 bits, per block of 256 (the largest power of two up to it that divides O) between its least
    and its largest. With nf4 and group=64 that is QLoRA's double quantisation (arXiv:2305.14314, section 3), which
    rounds the blocks' scales to an 8-bit float around their mean instead; its cost, .127 bits per weight, becomes .129.
    """
    *lead, I, O = kernel.shape
    if I % group or (scheme != "int8" and group % 2):
        raise ValueError(
            f"a group of {group} rows does not divide the {I} input features of a kernel {kernel.shape}; "
            f"use group={fitting_group(I)}"
        )
    symmetric = scheme != "int4" if symmetric is None else symmetric
    groups = kernel.astype(jnp.float32).reshape(*lead, I // group, group, O)
    low, high = (shrink * edge for edge in range_of(groups, axis=-2))
    # Values are rounded by the scale that will be read back.
    zeros = None
    if scheme == "nf4":
        stored = _store_scales(_nonzero(jnp.maximum(-low, high)), double=double, dtype=scale_dtype)
        levels = jnp.array(kernels.NF4_LEVELS, jnp.float32)
        units = groups / _read_scales(stored).astype(jnp.float32)[..., None, :]
        values = kernels.pack_nibbles(jnp.searchsorted((levels[1:] + levels[:-1]) / 2, units).reshape(*lead, I, O))
    else:
        step = step_of(low, high, scheme=scheme, symmetric=symmetric)
        stored = _store_scales(step, double=double, dtype=scale_dtype)
        scales = _read_scales(stored).astype(jnp.float32)
        zeros = zero_of(low, scales, scheme=scheme, symmetric=symmetric)
        codes = codes_of(groups, scales[..., None, :], zeros[..., None, :], scheme=scheme, symmetric=symmetric)
        values, zeros = stored_codes(codes.reshape(*lead, I, O), zeros, scheme=scheme, symmetric=symmetric)
    return QuantArray(values, stored.codes, zeros, scheme, group, I, O, kernel.dtype.name, stored.steps, stored.offsets)


# --- integer grids: value = (code - zero) * step ---------------------------------------------------------------------

_CODES: dict[str, tuple[int, int]] = {"int4": (0, 15), "int8": (-128, 127)}


def range_of(values: jax.Array, *, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest value along an axis; the range holds zero."""
    return jnp.minimum(values.min(axis=axis), 0.0), jnp.maximum(values.max(axis=axis), 0.0)


def step_of(low: jax.Array, high: jax.Array, *, scheme: Scheme, symmetric: bool) -> jax.Array:
    """Returns the step of a grid over low .. high, never 0.

    Asymmetric: the range over its number of steps, 15 or 255. Symmetric, m being max(-low, high): m / 127 with 8 bits,
    2 m / 15 with 4, which reaches from -8 to 7 steps around zero: the largest value is clipped by half a step (GPTQ's
    grid).
    """
    first, last = _codes_of(scheme)
    largest = jnp.maximum(-low, high)
    if symmetric:
        return _nonzero(largest / 127.0 if scheme == "int8" else 2.0 * largest / 15.0)
    return _nonzero((high - low) / (last - first))


def zero_of(low: jax.Array, steps: jax.Array, *, scheme: Scheme, symmetric: bool) -> jax.Array:
    """Returns the code of zero, float32."""
    first, last = _codes_of(scheme)
    if symmetric:
        return jnp.full(steps.shape, (first + last + 1) // 2, jnp.float32)
    return jnp.clip(first - jnp.round(low / steps), first, last)


def codes_of(values: jax.Array, steps: jax.Array, zeros: jax.Array, *, scheme: Scheme, symmetric: bool) -> jax.Array:
    """Returns the nearest codes, float32. Symmetric ones of 8 bits end at -127."""
    first, last = _codes_of(scheme)
    first += symmetric and scheme == "int8"
    return jnp.clip(jnp.round(values / steps) + zeros, first, last)


def stored_codes(codes: jax.Array, zeros: jax.Array, *, scheme: Scheme, symmetric: bool) -> tuple:
    """Returns codes `[..., I, O]` and zeros as a QuantArray has them."""
    if scheme == "int8":
        return codes.astype(jnp.int8), None if symmetric else zeros.astype(jnp.int8)
    return kernels.pack_nibbles(codes), zeros.astype(jnp.uint8)


def _codes_of(scheme: Scheme) -> tuple[int, int]:
    if scheme not in _CODES:
        raise ValueError(f"unknown quantisation scheme {scheme!r}; known: int8, int4, nf4")
    return _CODES[scheme]


class _Scales(NamedTuple):
    """Scales as they are kept: themselves, or uint8 codes with the step and the offset of every block along O."""

    codes: jax.Array
    steps: jax.Array | None
    offsets: jax.Array | None


def _store_scales(scales: jax.Array, *, double: bool, dtype: str) -> _Scales:
    if not double:
        # What is too small for float16 becomes 0, and everything beside it rounds to 0 then.
        return _Scales(_nonzero(scales.astype(dtype)), None, None)
    *lead, O = scales.shape
    blocks = scales.reshape(*lead, -1, fitting_group(O, largest=SCALE_BLOCK))
    offsets = blocks.min(axis=-1)
    steps = (blocks.max(axis=-1) - offsets) / 255.0
    codes = jnp.round((blocks - offsets[..., None]) / _nonzero(steps)[..., None])
    return _Scales(codes.reshape(scales.shape).astype(jnp.uint8), steps, offsets)


def _read_scales(stored: _Scales) -> jax.Array:
    codes, steps, offsets = stored
    if steps is None:
        return codes
    blocks = codes.reshape(*steps.shape, -1).astype(jnp.float32)
    return (offsets[..., None] + steps[..., None] * blocks).reshape(codes.shape)


def full_scales(array: QuantArray) -> jax.Array:
    """Returns the scales `[..., I / group, O]` that the values are multiplied by, floats."""
    return _read_scales(_Scales(array.scales, array.steps, array.offsets))


def _nonzero(scales: jax.Array) -> jax.Array:
    return jnp.where(scales == 0, jnp.ones((), scales.dtype), scales)


def dequantize(array: QuantArray) -> jax.Array:
    """Returns the full matrix `[..., I, O]` in the dtype that was quantised."""
    return _restored(array, jnp.dtype(array.dtype))


def dequantize_params(params: dict) -> dict:
    """Returns the parameters with every QuantArray as the full matrix."""
    is_quantised = lambda leaf: isinstance(leaf, QuantArray)  # noqa: E731
    return jax.tree.map(lambda leaf: dequantize(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised)


def _restored(array: QuantArray, dtype: jnp.dtype) -> jax.Array:
    how = {"scheme": array.scheme, "dtype": dtype, "backend": array.packing}
    rows = kernels.dequantize(array.values, full_scales(array), array.zeros, **how)
    if array.order is None:
        return rows
    return jnp.take_along_axis(rows, jnp.argsort(array.order, axis=-1)[..., None], axis=-2)


def packed_for(array: QuantArray, backend: kernels.Backend) -> QuantArray:
    """Returns the matrix as `backend` reads it; that of xla, and what is packed already, as it is.

    mosaic: int4 values `[..., O, I]` less 8, scales and float16 zeros less 8 beside them, their groups filled up.
    Raises ValueError naming what the back end cannot do.
    """
    if array.packing == backend:
        return array
    assert array.packing == "xla", array.packing
    *_, I, O = array.shape
    kernels.check(backend, scheme=array.scheme, group=array.group, in_features=I, out_features=O)
    packed = mosaic_quant_matmul.pack(kernels.unpack_nibbles(array.values), full_scales(array), array.zeros)
    return dataclasses.replace(array, **packed._asdict(), steps=None, offsets=None, packing=backend)


def column_squares(kernel: Any) -> jax.Array:
    """Returns the sum of squares of every column `[..., O]` of a kernel, an array or a QuantArray, in float32."""
    kernel = _restored(kernel, jnp.float32) if isinstance(kernel, QuantArray) else kernel
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=-2)


def quantize_params(
    params: dict,
    *,
    scheme: Scheme,
    group: int = 128,
    double: bool = False,
    head: bool = True,
    symmetric: bool | None = None,
    scale_dtype: str = "float32",
) -> dict:
    """Returns the parameters with every `kernel` quantised (naming law); norms and the embedding table stay.

    Each kernel uses `group`, or the largest power of two below it that divides its input features. double, symmetric,
    scale_dtype: see `quantize_array`. With head=False the output head keeps its precision. What is quantised already
    stays as it is.
    """
    how = {"scheme": scheme, "double": double, "symmetric": symmetric, "scale_dtype": scale_dtype}

    def leaf(path, value):
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or (names[0] == "head" and not head) or isinstance(value, QuantArray):
            return value
        return quantize_array(value, group=fitting_group(value.shape[-2], largest=group), **how)

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=lambda node: isinstance(node, QuantArray))


def logical_axes(params: dict, params_axes: dict) -> dict:
    """Returns the axes tree for quantised `params`: every field of a QuantArray follows its kernel's (in, out) axes.

    Group rows shard with the input axis, so a mesh must divide in / group as well as in, and with doubly quantised
    scales out / block as well as out; `sharding.shardings` refuses one that does not. The order of input rows is on
    every device.
    """

    def leaf(value, axes):
        if not isinstance(value, QuantArray):
            return axes
        fields = {name: getattr(value, name) for name in ("values", "scales", "zeros", "steps", "offsets")}
        order = None if value.order is None else (*axes[:-2], None)
        placed = {name: None if x is None else axes for name, x in fields.items()}
        return dataclasses.replace(value, **placed, order=order)

    return jax.tree.map(leaf, params, params_axes, is_leaf=lambda node: isinstance(node, QuantArray))


@jax.custom_vjp
def _quant_matmul(x: jax.Array, array: QuantArray) -> jax.Array:
    x = x if array.order is None else jnp.take(x, array.order, axis=-1)
    how = {"scheme": array.scheme, "backend": array.packing}
    return kernels.quant_matmul(x, array.values, full_scales(array), array.zeros, **how)


def _quant_matmul_forward(x, array):
    return _quant_matmul(x, array), array


def _quant_matmul_backward(array, grad):
    # The residual is the packed leaf: the matrix is restored again here, so at most one layer's is alive at a time.
    # The quantised matrix is frozen, hence no cotangent for it.
    return grad @ _restored(array, grad.dtype).T, None


_quant_matmul.defvjp(_quant_matmul_forward, _quant_matmul_backward)


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _product_forward(x, kernel):
    # Nothing is kept for what is not differentiated: the product with a frozen kernel saves no activations.
    saved = x.value if kernel.perturbed else None, kernel.value if x.perturbed else None
    return x.value @ kernel.value, saved


def _product_backward(saved, grad):
    x, kernel = saved
    return None if kernel is None else grad @ kernel.T, None if x is None else _kernel_gradient(x, grad)


def _kernel_gradient(x: jax.Array, grad: jax.Array) -> jax.Array:
    """Returns the gradient `[I, O]` of a kernel, summed over all rows.

    On one device the rows are made one axis first: over several of them XLA's CPU compiler writes both factors out
    transposed and multiplies slowly (a quarter of a small model's step). On a mesh the rows keep their axes, which may
    be cut over different axes of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        x, grad = (rows.reshape(-1, rows.shape[-1]) for rows in (x, grad))
    lead = tuple(range(x.ndim - 1))
    return jnp.tensordot(x, grad, (lead, lead))


# A rule of its own, and not rows made one axis in the forward pass: there every product of one x would save its own.
_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def matmul(x: jax.Array, kernel: Any) -> jax.Array:
    """Returns x `[..., I]` times a kernel `[I, O]`, an array or a QuantArray, in x's dtype."""
    if isinstance(kernel, QuantArray):
        return _quant_matmul(x, kernel)
    return _product(x, kernel.astype(x.dtype))
