"""Optimizers and learning-rate schedules as values, and the optax transformation that they stand for."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

DECAYED = ("kernel", "a", "b")
"""Leaf names that weight decay pulls to zero: matmul kernels and both adapter factors, not norms and embeddings."""


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101) after clipping by the global norm."""

    peak_lr: float = 3e-4
    """Learning rate at the end of the warm-up."""
    b1: float = 0.9
    """Decay of the running mean of gradients."""
    b2: float = 0.95
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Share of a decayed leaf that is subtracted per step, times the learning rate."""
    clip_norm: float | None = 1.0
    """Gradients of a larger global norm are scaled down to this one; None leaves them as they are."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of both moments; the arithmetic is float32 either way."""

    def __post_init__(self):
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1 and b2 are decay rates in [0, 1); given b1={self.b1}, b2={self.b2}")
        if self.peak_lr < 0 or self.weight_decay < 0 or self.eps <= 0:
            raise ValueError(
                f"peak_lr and weight_decay must not be negative and eps must be positive; given "
                f"peak_lr={self.peak_lr}, weight_decay={self.weight_decay}, eps={self.eps}"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive; given {self.clip_norm}. None turns clipping off.")
        if self.moment_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"moment_dtype must be float32 or bfloat16; given {self.moment_dtype!r}")


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from the peak down to `final_fraction` of it at the last step."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""
    final_fraction: float = 0.1
    """Rate of the last step as a share of the peak."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear warm-up, then a straight line from the peak down to `final_fraction` of it at the last step."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""
    final_fraction: float = 0.0
    """Rate of the last step as a share of the peak."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """Linear warm-up, then the peak for the rest of the run."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""


Optimizer = AdamW
Schedule = Cosine | Linear | Constant


class Moments(NamedTuple):
    """Adam's state: the number of updates, and the running means of gradients and of squared gradients."""

    count: jax.Array
    mean: Any
    square: Any


class LearningRate(NamedTuple):
    """The schedule's state: the number of updates, and the rate of the last one (for logging)."""

    count: jax.Array
    learning_rate: jax.Array


def learning_rate(schedule: Schedule, step: jax.Array | int, *, peak_lr: float, num_steps: int) -> jax.Array:
    """Returns the rate of the update that leads from `step` to `step + 1`, float32.

    The first update already has the rate peak / warmup_steps (not zero), update number `warmup_steps` has the peak, and
    update number `num_steps` ends exactly on the final fraction; after it the rate stays there.
    """
    warmup = schedule.warmup_steps
    done = jnp.asarray(step, jnp.float32) + 1
    rise = jnp.minimum(done / warmup, 1.0) if warmup else 1.0
    progress = jnp.clip((done - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
    match schedule:
        case Cosine(final_fraction=final):
            share = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        case Linear(final_fraction=final):
            share = 1 - (1 - final) * progress
        case Constant():
            share = jnp.ones_like(progress)
        case _:
            raise ValueError(f"unknown schedule {schedule!r}; known: Cosine, Linear, Constant")
    return jnp.asarray(peak_lr * rise * share, jnp.float32)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves together, accumulated in float32 whatever the leaves' dtypes."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans, True on the leaves that weight decay applies to (last path element in `DECAYED`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _last_name(path) in DECAYED, params)


def make_optimizer(optimizer: Optimizer, schedule: Schedule, num_steps: int) -> optax.GradientTransformation:
    """Returns the gradient transformation of `optimizer` with its rate following `schedule` over `num_steps` updates.

    update = -lr_t * (m̂ / (sqrt(v̂) + eps) + weight_decay * p), with m̂, v̂ bias-corrected and p only where `decay_mask`.
    The rate of the last update stands in the state under `learning_rate`.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; given {num_steps}")
    if not 0 <= schedule.warmup_steps <= num_steps:
        raise ValueError(
            f"the schedule warms up for {schedule.warmup_steps} of {num_steps} steps, so the peak would never be "
            f"reached. Set warmup_steps between 0 and {num_steps}, or num_steps higher."
        )
    match optimizer:
        case AdamW():
            stages = [
                optax.identity() if optimizer.clip_norm is None else _clip(optimizer.clip_norm),
                _adam(optimizer.b1, optimizer.b2, optimizer.eps, jnp.dtype(optimizer.moment_dtype)),
                optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
                _descend(schedule, peak_lr=optimizer.peak_lr, num_steps=num_steps),
            ]
        case _:
            raise ValueError(f"unknown optimizer {optimizer!r}; known: AdamW")
    return optax.chain(*stages)


def _last_name(path: tuple) -> str:
    key = path[-1] if path else None
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))


def _clip(max_norm: float) -> optax.GradientTransformation:
    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(global_norm(grads), 1e-30))
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _adam(b1: float, b2: float, eps: float, dtype: jnp.dtype) -> optax.GradientTransformation:
    """Returns Adam's direction in float32, with both moments stored as `dtype`."""

    def init(params):
        return Moments(
            jnp.zeros((), jnp.int32),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params),
            jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params),
        )

    def update(grads, state, params=None):
        del params
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        count = state.count + 1
        mean = jax.tree.map(lambda g, m: b1 * m.astype(jnp.float32) + (1 - b1) * g, grads, state.mean)
        square = jax.tree.map(lambda g, v: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, grads, state.square)
        mean_scale = 1 / (1 - b1 ** count.astype(jnp.float32))
        square_scale = 1 / (1 - b2 ** count.astype(jnp.float32))
        direction = jax.tree.map(lambda m, v: (m * mean_scale) / (jnp.sqrt(v * square_scale) + eps), mean, square)
        stored = Moments(count, *(jax.tree.map(lambda x: x.astype(dtype), tree) for tree in (mean, square)))
        return direction, stored

    return optax.GradientTransformation(init, update)


def _descend(schedule: Schedule, *, peak_lr: float, num_steps: int) -> optax.GradientTransformation:
    def init(params):
        del params
        return LearningRate(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(grads, state, params=None):
        del params
        rate = learning_rate(schedule, state.count, peak_lr=peak_lr, num_steps=num_steps)
        return jax.tree.map(lambda g: -rate * g, grads), LearningRate(state.count + 1, rate)

    return optax.GradientTransformation(init, update)
