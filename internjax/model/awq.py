"""Activation-aware weight quantisation (AWQ, arXiv:2306.00978): inputs that matter are scaled up before rounding.

The product stays the same: what scales a kernel's rows divides the columns of what computes its input, a norm or the
linear layer before it. The error of a kernel W that is rounded to Q is measured on the calibration inputs x, through
their second moments H = sum x x^T: sum |x (Q - W)|^2 = tr((Q - W)^T H (Q - W)).

I input features, O output features, g groups along I, G rows of a group, K key/value heads, H head dim.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from internjax.model import gptq
from internjax.model.calibrate import READERS, Statistics
from internjax.model.config import ModelConfig
from internjax.model.quantize import dequantize, quantize_array

NUM_SCALES = 20
"""Scales that are tried: mean |x| to the powers 0, 1/20 ... 19/20."""
NUM_CLIPS = 10
"""Ranges that are tried for a group: all of it, and down to 55 % in steps of 5 %."""


_HOW = {"scheme": "int4", "scale_dtype": "float16"}


def quantize_layer(
    layer: dict,
    statistics: dict[str, Statistics],
    *,
    config: ModelConfig,
    group: int,
    rounding: Literal["nearest", "gptq"] = "gptq",
) -> dict:
    """Returns one layer's parameters in int4 with zeros; norms, values and up projections take the scales over.

    group -1: one group of all input features. rounding, on the same scales: to the nearest value as in the paper, or
    row by row with the error passed on (`internjax.model.gptq`), which loses less.
    """
    attention, ffn = ({name: dict(part) for name, part in layer[half].items()} for half in ("attention", "ffn"))
    new = layer | {"attention": attention, "ffn": ffn}
    moments = {name: each.moment_II for name, each in statistics.items()}

    def search(name: str, **tied) -> jax.Array:
        kernels = [layer[half][linear]["kernel"].astype(jnp.float32) for half, linear in READERS[name]]
        return _search_scale(kernels, statistics[name], group=group, **tied)

    def scale_rows(name: str, scale_I: jax.Array) -> None:
        moments[name] = moments[name] / (scale_I[:, None] * scale_I)
        for half, linear in READERS[name]:
            new[half][linear]["kernel"] = new[half][linear]["kernel"].astype(jnp.float32) * scale_I[:, None]

    for name, norm in (("query", "attention_norm"), ("gate", "ffn_norm")):
        whole = layer[norm]["scale"]
        divided = (whole.astype(jnp.float32) / search(name)).astype(whole.dtype)
        # What the norm's dtype rounds off the kernels make up for; an input that the norm puts out stays as it is.
        scale_I = whole.astype(jnp.float32) / divided.astype(jnp.float32)
        usable_I = jnp.isfinite(scale_I) & (scale_I > 0)
        new[norm] = {"scale": jnp.where(usable_I, divided, whole)}
        scale_rows(name, jnp.where(usable_I, scale_I, 1.0))
    # Query heads that share a key/value head read the same values, so they share its scales.
    K, H = config.num_kv_heads, config.head_dim
    scale_I = search("output", shared=(K, config.num_heads // K, H))
    scale_rows("output", scale_I)
    _divide_columns(attention["value"], scale_I.reshape(K, -1, H)[:, 0].reshape(-1))
    scale_I = search("down")
    scale_rows("down", scale_I)
    _divide_columns(ffn["up"], scale_I)
    for name, readers in READERS.items():
        factor_II = gptq.inverse_factor(moments[name]) if rounding == "gptq" else None
        for half, linear in readers:
            kernel, dtype = new[half][linear]["kernel"], layer[half][linear]["kernel"].dtype
            # Queries and keys meet in a product, where errors that are small in each need not be: no clipping.
            clips = linear not in ("query", "key")
            shrink = _search_clip(kernel, moments[name], group=group) if clips else 1.0
            if factor_II is not None:
                grid, order_I = gptq.Grid(symmetric=False, **_HOW), jnp.arange(kernel.shape[0])
                how = {"group": _group(kernel, group), "grid": grid, "shrink": shrink}
                array = gptq.quantize_rows(kernel, factor_II, order_I, **how)
            else:
                array = quantize_array(kernel, group=_group(kernel, group), shrink=shrink, **_HOW)
            new[half][linear]["kernel"] = dataclasses.replace(array, dtype=dtype.name)
    return new


def _group(kernel: jax.Array, group: int) -> int:
    return kernel.shape[-2] if group == -1 else group


def _divide_columns(linear: dict, scale_O: jax.Array) -> None:
    linear["kernel"] = linear["kernel"].astype(jnp.float32) / scale_O
    if "bias" in linear:
        linear["bias"] = (linear["bias"].astype(jnp.float32) / scale_O).astype(linear["bias"].dtype)


@functools.partial(jax.jit, static_argnames=("group", "shared"))
def _search_scale(kernels, statistics: Statistics, *, group: int, shared=None) -> jax.Array:
    """Returns the scales `[I]` under which the rounded kernels lose least. shared: (K, n, H), one scale for each n."""
    magnitude_I = statistics.magnitude_I / statistics.count
    if shared is not None:
        mean = magnitude_I.reshape(shared).mean(axis=1, keepdims=True)
        magnitude_I = jnp.broadcast_to(mean, shared).reshape(-1)

    def scale_of(alpha):
        scale_I = jnp.maximum(magnitude_I**alpha, 1e-4)
        return scale_I / jnp.sqrt(scale_I.max() * scale_I.min())

    def loss(alpha):
        scale_I1 = scale_of(alpha)[:, None]
        total = 0.0
        for kernel in kernels:
            rounded = dequantize(quantize_array(kernel * scale_I1, group=_group(kernel, group), **_HOW))
            error = rounded / scale_I1 - kernel
            total += jnp.sum(error * jnp.matmul(statistics.moment_II, error, precision="highest"))
        return total

    alphas = jnp.arange(NUM_SCALES) / NUM_SCALES
    return scale_of(alphas[jnp.argmin(jax.lax.map(loss, alphas))])


@functools.partial(jax.jit, static_argnames="group")
def _search_clip(kernel: jax.Array, moment_II: jax.Array, *, group: int) -> jax.Array:
    """Returns the part `[g, O]` of each group's range outside of which values are clipped, with the least loss.

    Groups are taken for themselves: their inputs' moments with other groups' inputs are left out.
    """
    (I, O), G = kernel.shape, _group(kernel, group)
    g = I // G
    blocks_gGG = moment_II.reshape(g, G, g, G)[jnp.arange(g), :, jnp.arange(g)]
    parts = 1.0 - 0.05 * jnp.arange(NUM_CLIPS)

    def loss(part):
        error_gGO = (dequantize(quantize_array(kernel, group=G, shrink=part, **_HOW)) - kernel).reshape(g, G, O)
        return jnp.sum(error_gGO * jnp.matmul(blocks_gGG, error_gGO, precision="highest"), axis=1)

    return parts[jnp.argmin(jax.lax.map(loss, parts), axis=0)]
