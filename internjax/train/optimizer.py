"""Optimizers and learning-rate schedules as values, and the optax transformation that they stand for."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from internjax.train import directions
from internjax.train.directions import last_name
from internjax.train.moments import MomentDType

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
    moment_dtype: MomentDType = "float32"
    """Storage of both moments; the arithmetic is float32 either way. int8: 2.1 bytes per parameter instead of 8."""
    lora_plus_ratio: float = 1.0
    """Rate of the adapters' factors b over that of all else (LoRA+, arXiv 2402.12354, which finds 16 good for Adam)."""

    def __post_init__(self):
        _check_optimizer(self, decays=("b1", "b2"))
        if self.lora_plus_ratio <= 0:
            raise ValueError(f"lora_plus_ratio must be positive; given {self.lora_plus_ratio}. 1 is plain LoRA.")


@dataclasses.dataclass(frozen=True)
class Muon:
    """Momentum made orthogonal per matrix (K. Jordan et al., 2024; scaling of Liu et al., arXiv 2502.16982).

    Matrices of the layers and adapter factors follow Muon; embeddings, the output head, norms and biases AdamW.
    """

    peak_lr: float = 3e-4
    """Learning rate of the matrices at the end of the warm-up."""
    adam_lr: float | None = None
    """The same of all leaves that AdamW updates; None: peak_lr."""
    b1: float = 0.95
    """Decay of the running mean of gradients of the matrices."""
    num_iterations: int = 5
    """Newton-Schulz iterations per update."""
    rms: float | None = 0.2
    """Root mean square of a square matrix's update before the rate: 0.2 is AdamW's, so its rates and decay fit.
    None: the first authors' scaling sqrt(max(1, out / in)), which wants a peak_lr near 0.02 and a smaller adam_lr."""
    adam_b1: float = 0.9
    """Decay of the running mean of gradients of the other leaves."""
    adam_b2: float = 0.95
    """Decay of the running mean of squared gradients of the other leaves."""
    eps: float = 1e-8
    """Added to the square root of the second moment of the other leaves."""
    weight_decay: float = 0.1
    """Share of a decayed leaf that is subtracted per step, times its learning rate."""
    clip_norm: float | None = 1.0
    """Gradients of a larger global norm are scaled down to this one; None leaves them as they are."""
    moment_dtype: MomentDType = "float32"
    """Storage of the moments; the arithmetic is float32 either way."""

    def __post_init__(self):
        _check_optimizer(self, decays=("b1", "adam_b1", "adam_b2"))
        if self.num_iterations < 1:
            raise ValueError(
                f"Muon needs at least 1 Newton-Schulz iteration; given num_iterations={self.num_iterations}"
            )
        if self.rms is not None and self.rms <= 0:
            raise ValueError(f"rms must be positive; given {self.rms}. None is the scaling by sqrt(max(1, out / in)).")
        if self.adam_lr is not None and (self.adam_lr < 0 or self.peak_lr == 0):
            raise ValueError(
                f"adam_lr is a rate beside a positive peak_lr; given adam_lr={self.adam_lr}, peak_lr={self.peak_lr}"
            )


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Second moments as one row and one column per matrix, no first moment (Shazeer and Stern, arXiv 1804.04235)."""

    peak_lr: float = 1e-2
    """Learning rate at the end of the warm-up: relative to the size of a matrix where parameter_scale is on."""
    parameter_scale: bool = True
    """Updates are multiplied by the root mean square of their matrix, at least 1e-3."""
    clip_rms: float | None = 1.0
    """Updates of a matrix with a larger root mean square are scaled down to this one; None leaves them as they are."""
    decay_exponent: float = 0.8
    """The running mean of squared gradients decays by 1 - t^-decay_exponent at update t."""
    min_factored: int = 128
    """A matrix with a smaller side keeps its whole second moment."""
    eps: float = 1e-30
    """Added to squared gradients."""
    weight_decay: float = 0.0
    """Share of a decayed leaf that is subtracted per step, times the learning rate."""
    clip_norm: float | None = 1.0
    """Gradients of a larger global norm are scaled down to this one; None leaves them as they are."""

    def __post_init__(self):
        _check_optimizer(self, decays=())
        if not 0 < self.decay_exponent <= 1:
            raise ValueError(f"decay_exponent must be in (0, 1]; given {self.decay_exponent}")
        if self.clip_rms is not None and self.clip_rms <= 0:
            raise ValueError(f"clip_rms must be positive; given {self.clip_rms}. None turns it off.")
        if self.min_factored < 2:
            raise ValueError(f"min_factored is the side of a matrix, at least 2; given {self.min_factored}")


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine from the peak down to `final_fraction` of it at the last step."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""
    final_fraction: float = 0.1
    """Rate of the last step as a share of the peak."""

    def __post_init__(self):
        _check_schedule(self)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear warm-up, then a straight line from the peak down to `final_fraction` of it at the last step."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""
    final_fraction: float = 0.0
    """Rate of the last step as a share of the peak."""

    def __post_init__(self):
        _check_schedule(self)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Linear warm-up, then the peak for the rest of the run."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""

    def __post_init__(self):
        _check_schedule(self)


@dataclasses.dataclass(frozen=True)
class WSD:
    """Warm-up, stable, decay: linear warm-up, the peak, then down to `final_fraction` of it in the last steps."""

    warmup_steps: int = 0
    """Steps in which the rate rises from peak / warmup_steps to the peak."""
    decay_steps: int | None = None
    """Steps in which the rate falls, the last ones of the run; None: decay_fraction of the run."""
    decay_fraction: float = 0.1
    """Share of the run in which the rate falls, where decay_steps is None."""
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """How it falls with the share x of the decay that is over: 1 - x, half a cosine, or 1 - sqrt(x)."""
    final_fraction: float = 0.0
    """Rate of the last step as a share of the peak."""

    def __post_init__(self):
        _check_schedule(self)
        if self.shape not in ("linear", "cosine", "sqrt"):
            raise ValueError(f"shape must be linear, cosine or sqrt; given {self.shape!r}")
        if not 0 < self.decay_fraction <= 1 or (self.decay_steps is not None and self.decay_steps < 1):
            raise ValueError(
                f"WSD decays for at least one step: decay_fraction in (0, 1] or decay_steps >= 1; given "
                f"decay_fraction={self.decay_fraction}, decay_steps={self.decay_steps}. Without a decay use Constant."
            )


Optimizer = AdamW | Muon | Adafactor
Schedule = Cosine | Linear | Constant | WSD


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
        case WSD(shape=shape, final_fraction=final):
            decay = decay_steps(schedule, num_steps)
            progress = jnp.clip((done - (num_steps - decay)) / decay, 0.0, 1.0)
            left = {
                "linear": 1 - progress,
                "cosine": 0.5 * (1 + jnp.cos(jnp.pi * progress)),
                "sqrt": 1 - jnp.sqrt(progress),
            }
            share = final + (1 - final) * left[shape]
        case _:
            raise ValueError(f"unknown schedule {schedule!r}; known: Cosine, Linear, Constant, WSD")
    return jnp.asarray(peak_lr * rise * share, jnp.float32)


def decay_steps(schedule: WSD, num_steps: int) -> int:
    """Returns the number of steps in which the rate falls, at the end of a run of `num_steps`."""
    return schedule.decay_steps or max(1, round(schedule.decay_fraction * num_steps))


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves together, accumulated in float32 whatever the leaves' dtypes."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def decay_mask(params: Any) -> Any:
    """Returns a tree of booleans, True on the leaves that weight decay applies to (last path element in `DECAYED`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: last_name(path) in DECAYED, params)


def matrix_mask(params: Any) -> Any:
    """Returns a tree of booleans, True on the leaves that Muon makes orthogonal: kernels and adapter factors, but not
    those of the output head, whose rows are a vocabulary's."""

    def is_matrix(path, leaf):
        names = [last_name(path[: depth + 1]) for depth in range(len(path))]
        return leaf.ndim >= 2 and names[-1] in DECAYED and "head" not in names

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def check_schedule(schedule: Schedule, num_steps: int) -> None:
    """Raises ValueError when the parts of a schedule are longer than the run."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; given {num_steps}")
    if schedule.warmup_steps > num_steps:
        raise ValueError(
            f"the schedule warms up for {schedule.warmup_steps} of {num_steps} steps, so the peak would never be "
            f"reached. Set warmup_steps between 0 and {num_steps}, or num_steps higher."
        )
    if isinstance(schedule, WSD) and schedule.warmup_steps + decay_steps(schedule, num_steps) > num_steps:
        raise ValueError(
            f"the schedule warms up for {schedule.warmup_steps} steps and decays for "
            f"{decay_steps(schedule, num_steps)}, together more than the run's {num_steps}. Shorten one of them."
        )


def make_optimizer(optimizer: Optimizer, schedule: Schedule, num_steps: int) -> optax.GradientTransformation:
    """Returns the gradient transformation of `optimizer` with its rate following `schedule` over `num_steps` updates.

    update = -lr_t * (direction + weight_decay * p), with p only where `decay_mask`; AdamW's direction is
    m̂ / (sqrt(v̂) + eps), bias-corrected. The rate of the last update stands in the state under `learning_rate`.
    """
    check_schedule(schedule, num_steps)
    scale = optax.identity()
    match optimizer:
        case AdamW():
            direction = directions.adam(optimizer.b1, optimizer.b2, optimizer.eps, optimizer.moment_dtype)
            if optimizer.lora_plus_ratio != 1.0:
                scale = _scale_others(_not_b, optimizer.lora_plus_ratio)
        case Muon():
            direction = directions.muon(
                matrix_mask,
                b1=optimizer.b1,
                num_iterations=optimizer.num_iterations,
                rms=optimizer.rms,
                adam_betas=(optimizer.adam_b1, optimizer.adam_b2),
                eps=optimizer.eps,
                dtype=optimizer.moment_dtype,
            )
            if optimizer.adam_lr is not None:
                scale = _scale_others(matrix_mask, optimizer.adam_lr / optimizer.peak_lr)
        case Adafactor():
            direction = directions.adafactor(
                decay_exponent=optimizer.decay_exponent,
                eps=optimizer.eps,
                clip_rms=optimizer.clip_rms,
                parameter_scale=optimizer.parameter_scale,
                min_factored=optimizer.min_factored,
            )
        case _:
            raise ValueError(f"unknown optimizer {optimizer!r}; known: AdamW, Muon, Adafactor")
    return optax.chain(
        optax.identity() if optimizer.clip_norm is None else _clip(optimizer.clip_norm),
        direction,
        optax.add_decayed_weights(optimizer.weight_decay, mask=decay_mask),
        _descend(schedule, peak_lr=optimizer.peak_lr, num_steps=num_steps),
        scale,
    )


def _check_optimizer(optimizer: Optimizer, *, decays: tuple[str, ...]) -> None:
    given = {name: getattr(optimizer, name) for name in decays}
    if not all(0 <= value < 1 for value in given.values()):
        names, values = " and ".join(given), ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(f"{names} are decay rates in [0, 1); given {values}")
    if optimizer.peak_lr < 0 or optimizer.weight_decay < 0 or optimizer.eps <= 0:
        raise ValueError(
            f"peak_lr and weight_decay must not be negative and eps must be positive; given "
            f"peak_lr={optimizer.peak_lr}, weight_decay={optimizer.weight_decay}, eps={optimizer.eps}"
        )
    if optimizer.clip_norm is not None and optimizer.clip_norm <= 0:
        raise ValueError(f"clip_norm must be positive; given {optimizer.clip_norm}. None turns clipping off.")
    known = get_args(MomentDType)
    if getattr(optimizer, "moment_dtype", "float32") not in known:
        raise ValueError(f"moment_dtype must be one of {', '.join(known)}; given {optimizer.moment_dtype!r}")


def _check_schedule(schedule: Schedule) -> None:
    if schedule.warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative; given {schedule.warmup_steps}")
    if not 0 <= getattr(schedule, "final_fraction", 0.0) <= 1:
        raise ValueError(f"final_fraction is a share of the peak, between 0 and 1; given {schedule.final_fraction}")


def _clip(max_norm: float) -> optax.GradientTransformation:
    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, max_norm / jnp.maximum(global_norm(grads), 1e-30))
        return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _not_b(params: Any) -> Any:
    """Returns a tree of booleans, False on the adapters' factors b; refuses a tree that has none."""
    kept = jax.tree_util.tree_map_with_path(lambda path, _: last_name(path) != "b", params)
    if all(jax.tree.leaves(kept)):
        raise ValueError(
            "lora_plus_ratio is the rate of adapters, and none are trained; set it to 1, or train adapters"
        )
    return kept


def _scale_others(mask, factor: float) -> optax.GradientTransformation:
    """Multiplies the updates of the leaves where `mask` is False."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda kept, u: u if kept else factor * u, mask(updates), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _descend(schedule: Schedule, *, peak_lr: float, num_steps: int) -> optax.GradientTransformation:
    def init(params):
        del params
        return LearningRate(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(grads, state, params=None):
        del params
        rate = learning_rate(schedule, state.count, peak_lr=peak_lr, num_steps=num_steps)
        return jax.tree.map(lambda g: -rate * g, grads), LearningRate(state.count + 1, rate)

    return optax.GradientTransformation(init, update)
