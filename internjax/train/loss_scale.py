"""Dynamic loss scaling: a computation in float16 whose gradients neither vanish nor overflow.

float16 ends at 65504 and loses digits below 6e-5, where gradients of a mean loss lie. So the loss is multiplied by a
scale S before it is differentiated, and the float32 gradients are divided by it (Micikevicius et al., "Mixed precision
training", arXiv 1710.03740, section 3.2). Where a gradient of S x loss overflows, the update is left out and S halved;
after some good updates in a row S is doubled. The scale is a power of two: neither way changes a digit.

    optimizer = scaled(make_optimizer(AdamW(), Cosine(), num_steps), LossScale())

The scale and its counters are part of the optimizer's state: they are saved, restored and placed with it, and the step
finds them there. Without a scale (bfloat16, float32) there is nothing of this in the compiled step.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class LossScale:
    """How the scale of a float16 computation is found."""

    initial: float = 2.0**15
    """Scale of the first step; a power of two, as the other two are."""
    growth_interval: int = 2000
    """Good updates in a row after which the scale is doubled."""
    minimum: float = 1.0
    """The scale is not halved below this one: a gradient that overflows even there is not finite at any scale."""
    maximum: float = 2.0**24
    """The scale is not doubled beyond this one."""

    def __post_init__(self):
        given = (self.minimum, self.initial, self.maximum)
        powers = all(value > 0 and math.frexp(value)[0] == 0.5 for value in given)
        if not powers or not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                "minimum <= initial <= maximum are powers of two, so that scaling changes no digit; given "
                f"minimum={self.minimum}, initial={self.initial}, maximum={self.maximum}"
            )
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval is a number of updates, at least 1; given {self.growth_interval}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
    """An optimizer's state with the loss scale beside it."""

    scale: jax.Array
    """Of the next step, float32."""
    good_steps: jax.Array
    """Updates since the scale last changed, int32."""
    num_overflows: jax.Array
    """Steps of the run whose update was left out because a scaled gradient overflowed, int32."""
    inner: Any
    """State of the optimizer itself."""
    config: LossScale = dataclasses.field(metadata={"static": True})


def scaled(optimizer: optax.GradientTransformation, config: LossScale | None) -> optax.GradientTransformation:
    """Returns `optimizer` with a loss scale in its state, for a computation in float16; `optimizer` itself for None.

    Its gradients come unscaled, as those of any optimizer: scaling is the step's.
    """
    if config is None:
        return optimizer

    def init(params):
        # An array of its own each: the step donates them, and no buffer can be given away twice.
        good_steps, num_overflows = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return Scaled(
            jnp.asarray(config.initial, jnp.float32), good_steps, num_overflows, optimizer.init(params), config
        )

    def update(gradients, state, params=None):
        updates, inner = optimizer.update(gradients, state.inner, params)
        return updates, dataclasses.replace(state, inner=inner)

    return optax.GradientTransformation(init, update)


def scale_of(opt_state: Any) -> jax.Array | None:
    """Returns the scale that a step with this optimizer state uses, None where it uses none."""
    return opt_state.scale if isinstance(opt_state, Scaled) else None


def overflowed(opt_state: Any, loss: jax.Array, grad_norm: jax.Array) -> jax.Array | bool:
    """Returns whether a smaller scale is the remedy: the loss is finite, a gradient is not, and the scale can shrink.

    A loss that is not finite overflowed in the forward pass, which no scale changes.
    """
    if not isinstance(opt_state, Scaled):
        return False
    return jnp.isfinite(loss) & ~jnp.isfinite(grad_norm) & (opt_state.scale > opt_state.config.minimum)


def adjusted(opt_state: Any, *, updated: jax.Array, overflow: jax.Array | bool) -> Any:
    """Returns the optimizer state with the scale of the next step: halved on overflow, doubled when it is time.

    A step that was neither updated nor an overflow (a loss that is not finite) changes nothing.
    """
    if not isinstance(opt_state, Scaled):
        return opt_state
    config, scale = opt_state.config, opt_state.scale
    good_steps = jnp.where(overflow, 0, opt_state.good_steps + updated)
    grows = good_steps >= config.growth_interval
    larger = jnp.where(grows, jnp.minimum(2 * scale, config.maximum), scale)
    return dataclasses.replace(
        opt_state,
        scale=jnp.where(overflow, jnp.maximum(scale / 2, config.minimum), larger),
        good_steps=jnp.where(grows, 0, good_steps).astype(jnp.int32),
        num_overflows=(opt_state.num_overflows + overflow).astype(jnp.int32),
    )


def metrics(before: Any, after: Any) -> dict[str, jax.Array]:
    """Returns what a step reports: the scale it used, and the overflowed steps so far; nothing without a scale."""
    if not isinstance(before, Scaled):
        return {}
    return {"loss_scale": before.scale, "num_overflows": after.num_overflows}
