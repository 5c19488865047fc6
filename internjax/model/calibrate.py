"""Calibration: what comes into every linear layer, gathered layer by layer, and weights quantised by it.

    params = quantize_layers(params, rows, config=config, quantize_layer=functools.partial(awq.quantize_layer, ...))

A layer's inputs are those that the quantised layers before it produce. In memory, beside the parameters, are one
residual stream per calibration token and the statistics of one layer: the second moments of its four inputs.

B batch, T time, D embed, I input features, L layers.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.linear import Linear


class Statistics(NamedTuple):
    """Of the vectors x that came into a linear layer; float32."""

    moment_II: jax.Array
    """Sum of x x^T."""
    magnitude_I: jax.Array
    """Sum of |x|."""
    count: jax.Array
    """Number of vectors."""


READERS = {
    "query": (("attention", "query"), ("attention", "key"), ("attention", "value")),
    "output": (("attention", "output"),),
    "gate": (("ffn", "gate"), ("ffn", "up")),
    "down": (("ffn", "down"),),
}
"""The linear layers that read the same input, by the first of them."""

QuantizeLayer = Callable[[dict, dict[str, Statistics]], dict]
"""(one layer's parameters, the statistics of its inputs by READERS) -> the layer with QuantArrays as kernels."""


def quantize_layers(
    params: dict,
    rows: Sequence[jax.Array],
    *,
    config: ModelConfig,
    quantize_layer: QuantizeLayer,
    on_layer: Callable[[int], Any] = lambda layer: None,
) -> dict:
    """Returns the parameters with every layer as `quantize_layer` returns it; embedding, norm and head stay.

    rows: token ids `[B, T]`, all of one shape; without any there are no statistics (None). on_layer is told the number
    of each layer that is done, from 1.
    """
    streams, inputs = [], None
    for tokens_BT in rows:
        x_BTD, inputs = _begin({"embed": params["embed"]}, jnp.asarray(tokens_BT), config=config)
        streams.append(x_BTD)
    stack: dict | None = None
    for index in range(config.num_layers):
        whole = _take(params["layers"], index)
        statistics = None
        for x_BTD in streams:
            statistics = _observe(statistics, whole, x_BTD, inputs, config=config)
        quantized = quantize_layer(whole, statistics)
        del whole, statistics
        if stack is None:
            stack = jax.tree.map(lambda leaf: jnp.zeros((config.num_layers, *leaf.shape), leaf.dtype), quantized)
        stack = _put(stack, quantized, index)
        if index + 1 < config.num_layers:
            streams = [_pass(quantized, x_BTD, inputs, config=config) for x_BTD in streams]
        jax.block_until_ready(streams)
        on_layer(index + 1)
    return params | {"layers": stack}


def observed(params: dict, x_BTD: jax.Array, inputs: decoder.Inputs, *, config: ModelConfig) -> dict[str, jax.Array]:
    """Returns what comes into the linear layers of one layer, `[B, T, I]` by READERS."""
    seen: dict[str, jax.Array] = {}

    def look(call, arguments, keywords, context):
        if isinstance(context.module, Linear) and context.module.name in READERS:
            seen[context.module.name] = arguments[0]
        return call(*arguments, **keywords)

    with nn.intercept_methods(look):
        decoder.layer(params, x_BTD, inputs, config=config)
    return seen


@functools.partial(jax.jit, static_argnames="config")
def _begin(params, tokens_BT, *, config):
    return decoder.begin(params, tokens_BT, config=config)


_take = jax.jit(decoder.layer_of)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack, layer, index):
    return jax.tree.map(lambda leaf, own: leaf.at[index].set(own), stack, layer)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=1)
def _pass(params, x_BTD, inputs, *, config):
    return decoder.layer(params, x_BTD, inputs, config=config)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def _observe(statistics, params, x_BTD, inputs, *, config) -> dict[str, Statistics]:
    found = {}
    for name, x_BTI in observed(params, x_BTD, inputs, config=config).items():
        x_NI = x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32)
        moment_II = jnp.matmul(x_NI.T, x_NI, precision="highest")
        found[name] = Statistics(moment_II, jnp.abs(x_NI).sum(axis=0), jnp.float32(x_NI.shape[0]))
    return found if statistics is None else jax.tree.map(jnp.add, statistics, found)
