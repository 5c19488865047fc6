"""The objectives of proximal policy optimisation as functions of arrays: rewards, advantages, losses.

Nothing here knows a model; the tests run these same functions on tabular policies whose optimum is known in closed
form.

Suffix _t: one entry per token along the last axis. What belongs to an action (a drawn token) stands at that token's
index: its log-probability, the value of the state it was drawn in, its reward. `mask_t` is 1 on actions and 0 on
prompts, tool outputs and padding. Leading axes are free; a per-sequence array has none of the last axis.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from internjax.train.losses import LossOutput


def last_action(mask_t: jax.Array) -> jax.Array:
    """Returns 1 at the last action of every sequence and 0 elsewhere, float32; all 0 where there is no action."""
    mask_t = mask_t > 0
    later_t = jnp.flip(jnp.cumsum(jnp.flip(mask_t, axis=-1), axis=-1), axis=-1) - mask_t
    return (mask_t & (later_t == 0)).astype(jnp.float32)


def token_rewards(
    score: jax.Array, logprobs_t: jax.Array, ref_logprobs_t: jax.Array, mask_t: jax.Array, *, kl_coefficient: float
) -> jax.Array:
    """Returns r_t = -beta (log pi_old(a_t) - log pi_ref(a_t)) on actions, plus the score on the last one.

    The last action is the stop token itself, if the response has one. arXiv:2203.02155, equation 2, token by token.
    """
    kl_t = jnp.where(mask_t > 0, logprobs_t - ref_logprobs_t, 0.0)
    return jax.lax.stop_gradient(last_action(mask_t) * score[..., None] - kl_coefficient * kl_t)


class Advantages(NamedTuple):
    """Of every action, 0 elsewhere."""

    adv_t: jax.Array
    returns_t: jax.Array
    """adv + value: what the critic learns to predict."""


def gae(
    rewards_t: jax.Array,
    values_t: jax.Array,
    mask_t: jax.Array,
    bootstrap: jax.Array,
    *,
    discount: float,
    gae_lambda: float,
) -> Advantages:
    """Returns generalised advantage estimates (arXiv:1506.02438) and returns, not differentiated, float32.

    A_t = sum_k (discount lambda)^k delta_{t+k},  delta_t = r_t + discount V_{t+1} - V_t over actions alone: what the
    mask leaves out is no time step, so t + 1 is the next action. After the last action V is `bootstrap`: 0 at a true
    end, the value of the state after it where the sequence was cut off.
    """

    def back(carry, now):
        next_value, next_adv = carry
        reward, value, mask = now
        adv = reward + discount * next_value - value + discount * gae_lambda * next_adv
        carry = jnp.where(mask, value, next_value), jnp.where(mask, adv, next_adv)
        return carry, jnp.where(mask, adv, 0.0)

    mask_t = mask_t > 0
    rewards_t, values_t = rewards_t.astype(jnp.float32), values_t.astype(jnp.float32)
    start = jnp.asarray(bootstrap, jnp.float32), jnp.zeros_like(bootstrap, jnp.float32)
    steps = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (rewards_t, values_t, mask_t))
    adv_t = jnp.moveaxis(jax.lax.scan(back, start, steps, reverse=True)[1], 0, -1)
    return Advantages(*jax.lax.stop_gradient((adv_t, jnp.where(mask_t, adv_t + values_t, 0.0))))


def masked_sum(x_t: jax.Array, mask_t: jax.Array) -> jax.Array:
    """Returns the sum over actions; what stands elsewhere may be anything, infinities included."""
    return jnp.sum(jnp.where(mask_t > 0, x_t, 0.0) * mask_t)


def policy_loss(
    logprobs_t: jax.Array, old_logprobs_t: jax.Array, adv_t: jax.Array, mask_t: jax.Array, *, clip: float
) -> LossOutput:
    """Returns the sum over actions of L_t = -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t), weight their number.

    rho_t = pi(a_t) / pi_old(a_t). arXiv:1707.06347, equation 7. Metrics: `ratio` (mean), `ratio_deviation` (mean of
    |rho - 1|: exactly 0 on the first update after a rollout), `clipped` (share of actions whose push was cut off) and
    `old_kl` (k3 estimate of KL(pi_old || pi)).
    """
    log_ratio_t = jnp.where(mask_t > 0, logprobs_t - old_logprobs_t, 0.0)
    ratio_t = jnp.exp(log_ratio_t)
    clipped_ratio_t = jnp.clip(ratio_t, 1.0 - clip, 1.0 + clip)
    objective_t = jnp.minimum(ratio_t * adv_t, clipped_ratio_t * adv_t)
    metrics_t = {
        "ratio": ratio_t,
        "ratio_deviation": jnp.abs(ratio_t - 1.0),
        "clipped": (clipped_ratio_t * adv_t < ratio_t * adv_t).astype(jnp.float32),
        "old_kl": ratio_t - 1.0 - log_ratio_t,
    }
    metrics = {name: masked_sum(x_t, mask_t) for name, x_t in metrics_t.items()}
    return LossOutput(-masked_sum(objective_t, mask_t), jnp.sum(mask_t), metrics)


def kl_loss(
    logprobs_t: jax.Array, ref_logprobs_t: jax.Array, mask_t: jax.Array, *, estimator: Literal["k2", "k3"]
) -> jax.Array:
    """Returns the sum over actions of the k2 or k3 estimator of d = log pi - log pi_ref, differentiable.

    k2 = d^2 / 2 has the gradient of KL(pi || pi_ref) on fresh samples. k3 = exp(-d) - 1 + d has the gradient of the
    forward KL(pi_ref || pi), another objective. k1 = d itself is not offered: its gradient is zero in expectation.
    """
    log_ratio_t = jnp.where(mask_t > 0, logprobs_t - ref_logprobs_t, 0.0)
    kl_t = jnp.square(log_ratio_t) / 2 if estimator == "k2" else jnp.expm1(-log_ratio_t) + log_ratio_t
    return masked_sum(kl_t, mask_t)


def value_loss(values_t: jax.Array, returns_t: jax.Array, mask_t: jax.Array) -> LossOutput:
    """Returns the sum over actions of (V_t - return_t)^2 / 2, weight their number. Not clipped (report).

    Policy and critic have their own parameters and optimizers, so the critic's loss needs no coefficient.
    """
    error_t = values_t.astype(jnp.float32) - returns_t
    metrics = {"value_bias": masked_sum(error_t, mask_t)}
    return LossOutput(masked_sum(jnp.square(error_t) / 2, mask_t), jnp.sum(mask_t), metrics)


def explained_variance(values_t: jax.Array, returns_t: jax.Array, mask_t: jax.Array) -> jax.Array:
    """Returns 1 - Var(return - V) / Var(return) over all actions: 1 for a perfect critic, 0 for a constant one."""
    weight = jnp.maximum(jnp.sum(mask_t), 1.0)

    def variance(x_t):
        mean = masked_sum(x_t, mask_t) / weight
        return masked_sum(jnp.square(x_t - mean), mask_t) / weight

    return 1.0 - variance(returns_t - values_t) / jnp.maximum(variance(returns_t), 1e-12)
