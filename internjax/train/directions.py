"""What each optimizer turns gradients into, before decay and learning rate: Adam, Muon and Adafactor as optax stages.

A state holds trees like the parameters' whose leaves have the rank of their parameter, with 1 (or a divisor) in place
of a dimension that is summed away: so each leaf goes where its parameter goes (`moments.beside`). The layer axis is
stacked in front of a leaf; whatever looks at a whole matrix looks at the last two axes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from internjax.sharding import axis_size
from internjax.train import moments
from internjax.train.moments import MomentDType

VECTORS = ("scale", "bias", "magnitude")
"""Leaf names that are one vector per layer; all others are one matrix per layer."""


class Moments(NamedTuple):
    """The number of updates, and the running means of gradients and of squared gradients (`moments.store`).

    Where Muon keeps no second moment, a single zero stands in its place.
    """

    count: jax.Array
    mean: Any
    square: Any


class Factored(NamedTuple):
    """The number of updates, and the running means of squared gradients: over the columns (`row`) and over the rows
    (`column`) of a large matrix, in full for all else; a single zero stands for what a leaf does not have."""

    count: jax.Array
    row: Any
    column: Any
    square: Any


def adam(b1: float, b2: float, eps: float, dtype: MomentDType) -> optax.GradientTransformation:
    """Returns Adam's direction in float32, with both moments stored as `dtype`."""

    def init(params):
        count = jnp.zeros((), jnp.int32)
        return Moments(count, moments.zeros(params, dtype), moments.zeros(params, dtype, signed=False))

    def update(grads, state, params=None):
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        count = state.count + 1
        mean = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, moments.load(state.mean))
        square = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, moments.load(state.square))
        mean_scale = 1 / (1 - b1 ** count.astype(jnp.float32))
        square_scale = 1 / (1 - b2 ** count.astype(jnp.float32))
        direction = jax.tree.map(lambda m, v: (m * mean_scale) / (jnp.sqrt(v * square_scale) + eps), mean, square)
        stored = moments.store(mean, dtype, count=count), moments.store(square, dtype, count=count, signed=False)
        return direction, Moments(count, *stored)

    return optax.GradientTransformation(init, update)


def muon(
    is_matrix: Any,
    *,
    b1: float,
    num_iterations: int,
    rms: float | None,
    adam_betas: tuple[float, float],
    eps: float,
    dtype: MomentDType,
) -> optax.GradientTransformation:
    """Returns Muon's direction on the leaves where `is_matrix(params)` is True, and Adam's on the others.

    Of a matrix: the running mean of gradients with Nesterov's look-ahead, bias-corrected, made orthogonal by
    Newton-Schulz iterations layer by layer, times rms * sqrt(max(in, out)), or times sqrt(max(1, out / in)) where rms
    is None.
    """
    adam_b1, adam_b2 = adam_betas

    def init(params):
        rooted = jax.tree.map(
            lambda matrix, p: jnp.zeros((1,) * p.ndim if matrix else p.shape, p.dtype), is_matrix(params), params
        )
        count = jnp.zeros((), jnp.int32)
        return Moments(count, moments.zeros(params, dtype), moments.zeros(rooted, dtype, signed=False))

    def update(grads, state, params=None):
        del params
        chosen = is_matrix(grads)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        count = state.count + 1
        t = count.astype(jnp.float32)

        def averaged(matrix, g, m):
            decay = b1 if matrix else adam_b1
            return decay * m + (1 - decay) * g

        def squared(matrix, g, v):
            return v if matrix else adam_b2 * v + (1 - adam_b2) * g * g

        def direction(matrix, g, m, v):
            if not matrix:
                return (m / (1 - adam_b1**t)) / (jnp.sqrt(v / (1 - adam_b2**t)) + eps)
            ahead = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            rows, columns = g.shape[-2:]
            scale = max(1, columns / rows) ** 0.5 if rms is None else rms * max(rows, columns) ** 0.5
            return scale * orthogonal(ahead, num_iterations)

        mean = jax.tree.map(averaged, chosen, grads, moments.load(state.mean))
        square = jax.tree.map(squared, chosen, grads, moments.load(state.square))
        stored = moments.store(mean, dtype, count=count), moments.store(square, dtype, count=count, signed=False)
        return jax.tree.map(direction, chosen, grads, mean, square), Moments(count, *stored)

    return optax.GradientTransformation(init, update)


def orthogonal(x: jax.Array, num_iterations: int) -> jax.Array:
    """Returns every matrix `[..., in, out]` with its singular values pushed towards 1 and its directions kept.

    x <- 3.4445 x - 4.7750 (x x') x + 2.0315 (x x')^2 x, from x divided by its Frobenius norm: the coefficients of K.
    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), which end between 0.7 and 1.2.
    """
    if x.ndim > 2:
        return _by_layer(lambda layer: orthogonal(layer, num_iterations), x)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(num_iterations):
        product = x @ x.T
        x = 3.4445 * x + (-4.7750 * product + 2.0315 * product @ product) @ x
    return x.T if tall else x


def _by_layer(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Returns function(layer) of every layer of a stack `[L, in, out]`, one at a time.

    On a mesh each device takes whole layers, ceil(L / (fsdp x tensor)) of them: the stack is exchanged for them and
    back, and no device holds more of it. Products of matrices that are cut over devices would send every factor around
    in every iteration (one feed-forward kernel of the 7B, fsdp 16 x tensor 4: 30 GB a device and step, now 0.9 GB).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return jax.lax.map(function, x)
    num_layers, free = x.shape[0], (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    by_layer = PartitionSpec(("fsdp", "tensor"))
    # One axis after the other: the compiler knows no way to exchange two at once, and would gather the stack.
    steps = PartitionSpec(None, *free), PartitionSpec("fsdp", *free)
    x = jnp.pad(x, ((0, -num_layers % axis_size(mesh, by_layer[0])), *((0, 0),) * (x.ndim - 1)))
    for step in steps:
        x = jax.lax.with_sharding_constraint(x, step)
    x = jax.shard_map(lambda own: jax.lax.map(function, own), mesh=mesh, in_specs=by_layer, out_specs=by_layer)(x)
    for step in reversed(steps):
        x = jax.lax.with_sharding_constraint(x, step)
    return x[:num_layers]


def adafactor(
    *, decay_exponent: float, eps: float, clip_rms: float | None, parameter_scale: bool, min_factored: int
) -> optax.GradientTransformation:
    """Returns Adafactor's direction (Shazeer and Stern, arXiv 1804.04235, algorithm 4), matrix by matrix."""

    def init(params):
        def sizes(path, p):
            none = (1,) * p.ndim
            if _is_factored(path, p, min_factored):
                return (*p.shape[:-1], 1), (*p.shape[:-2], 1, p.shape[-1]), none
            return none, none, p.shape

        def part(index):
            return jax.tree_util.tree_map_with_path(lambda path, p: jnp.zeros(sizes(path, p)[index]), params)

        return Factored(jnp.zeros((), jnp.int32), part(0), part(1), part(2))

    def update(grads, state, params=None):
        count = state.count + 1
        decay = 1 - count.astype(jnp.float32) ** -decay_exponent

        def one(path, g, row, column, square, p):
            g = g.astype(jnp.float32)
            power = g * g + eps
            if _is_factored(path, g, min_factored):
                row = decay * row + (1 - decay) * jnp.mean(power, axis=-1, keepdims=True)
                column = decay * column + (1 - decay) * jnp.mean(power, axis=-2, keepdims=True)
                direction = g * jax.lax.rsqrt(row / jnp.mean(row, axis=-2, keepdims=True)) * jax.lax.rsqrt(column)
            else:
                square = decay * square + (1 - decay) * power
                direction = g * jax.lax.rsqrt(square)
            if clip_rms is not None:
                direction = direction / jnp.maximum(1.0, _rms(path, direction) / clip_rms)
            if parameter_scale:
                direction = direction * jnp.maximum(_rms(path, p.astype(jnp.float32)), 1e-3)
            return direction, row, column, square

        done = jax.tree_util.tree_map_with_path(one, grads, state.row, state.column, state.square, params)
        direction, *stored = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0, 0)), done)
        return direction, Factored(count, *stored)

    return optax.GradientTransformation(init, update)


def last_name(path: tuple) -> str:
    """Returns the name of a leaf: the last element of its path."""
    key = path[-1] if path else None
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))


def _is_factored(path: tuple, leaf: Any, min_factored: int) -> bool:
    return leaf.ndim >= 2 and last_name(path) not in VECTORS and min(leaf.shape[-2:]) >= min_factored


def _rms(path: tuple, x: jax.Array) -> jax.Array:
    """Returns the root mean square of every matrix (of every vector of a stacked norm), ready to broadcast."""
    axes = tuple(range(x.ndim))[-1 if last_name(path) in VECTORS else -2 :]
    return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))
