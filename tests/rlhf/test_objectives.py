"""PPO's functions of arrays: advantages against the definition, rewards and losses by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.rlhf import objectives

gae = jax.jit(objectives.gae)
token_rewards = jax.jit(objectives.token_rewards)
policy_loss = jax.jit(objectives.policy_loss)
value_loss = jax.jit(objectives.value_loss)
kl_loss = jax.jit(objectives.kl_loss, static_argnames="estimator")
explained_variance = jax.jit(objectives.explained_variance)


def array(*values):
    return np.array(values, np.float32)


def advantages_by_definition(rewards, values, mask, bootstrap, discount, gae_lambda):
    """A_t = sum over later actions of (discount lambda)^k delta, one sequence, O(n^2), in float64."""
    actions = np.flatnonzero(mask)
    values_after = [*values[actions][1:], bootstrap]
    deltas = [rewards[t] + discount * after - values[t] for t, after in zip(actions, values_after)]
    result = np.zeros(len(rewards))
    for i, t in enumerate(actions):
        result[t] = sum((discount * gae_lambda) ** (k - i) * deltas[k] for k in range(i, len(actions)))
    return result


@pytest.mark.parametrize("discount, gae_lambda", list(itertools.product((1.0, 0.9), (0.0, 0.95, 0.99, 1.0))))
def test_gae_equals_its_definition_on_ragged_masks(discount, gae_lambda):
    rng = np.random.default_rng(0)
    B, T = 24, 13
    rewards, values = rng.normal(size=(2, B, T))
    bootstrap = np.where(rng.random(B) < 0.5, rng.normal(size=B), 0.0)
    mask = rng.random((B, T)) < 0.7  # gaps too: a tool's output between two turns
    mask[0], mask[1], mask[2] = False, True, np.arange(T) == 4
    got = gae(rewards, values, mask, bootstrap, discount=discount, gae_lambda=gae_lambda)
    wanted = np.stack(
        [advantages_by_definition(*row, discount, gae_lambda) for row in zip(rewards, values, mask, bootstrap)]
    )
    np.testing.assert_allclose(got.adv_t, wanted, atol=2e-5)
    np.testing.assert_allclose(got.returns_t, np.where(mask, wanted + values, 0.0), atol=2e-5)


def test_gae_by_hand_at_an_end_and_at_a_cut():
    rewards, values, mask = array(0, 1, 2, 9), array(0.5, 1.5, 1, 9), np.array([1, 1, 1, 0])
    ended = gae(rewards, values, mask, 0.0, discount=1.0, gae_lambda=0.5)
    # deltas 1.0, 0.5, 1.0 from right to left: 2 - 1; 1 + 1 - 1.5; 0 + 1.5 - 0.5.
    np.testing.assert_allclose(ended.adv_t, [1.5, 1.0, 1.0, 0.0])
    np.testing.assert_allclose(ended.returns_t, [2.0, 2.5, 2.0, 0.0])
    cut = gae(rewards, values, mask, 4.0, discount=1.0, gae_lambda=0.5)
    np.testing.assert_allclose(cut.adv_t, [2.5, 3.0, 5.0, 0.0])


def test_the_score_stands_on_the_last_action():
    mask = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 0]])
    logprobs = array(*[[7.0, 7, -1, -2, 7]] * 4)
    reference = array(*[[-7.0, np.inf, -2, -1.5, np.nan]] * 4)
    got = np.asarray(token_rewards(array(10, 0, 5, 3), logprobs, reference, mask, kl_coefficient=0.1))
    np.testing.assert_allclose(got[0], [0, 0, -0.1, 10.05, 0], rtol=1e-6)
    np.testing.assert_allclose(got[2], np.zeros(5))
    assert float(got[3, 3]) == pytest.approx(3.05) and float(got[3, 2]) == 0


def test_rewards_and_advantages_are_not_differentiated():
    def through(logprobs):
        rewards = objectives.token_rewards(
            jnp.ones(1), logprobs, jnp.zeros((1, 3)), jnp.ones((1, 3)), kl_coefficient=0.5
        )
        found = objectives.gae(rewards, logprobs, jnp.ones((1, 3)), logprobs[:, -1], discount=1.0, gae_lambda=0.9)
        return jnp.sum(rewards) + jnp.sum(found.adv_t) + jnp.sum(found.returns_t)

    assert not np.any(jax.jit(jax.grad(through))(np.ones((1, 3), np.float32)))


def test_policy_loss_by_hand():
    ratio, adv = array(1, 1.5, 1.5, 0.5, 0.5, 3), array(2, 1, -1, 1, -1, 5)
    mask, old = array(1, 1, 1, 1, 1, 0), np.full(6, -2.0, np.float32)

    def loss(logprobs):
        return policy_loss(logprobs, old, adv, mask, clip=0.2)

    got = loss(old + np.log(ratio))
    # -(2 + 1.2 - 1.5 + 0.5 - 0.8): a good token is not pushed beyond 1.2, a bad one not below 0.8.
    np.testing.assert_allclose(got.total, -1.4, rtol=1e-6)
    assert float(got.weight) == 5
    np.testing.assert_allclose(got.metrics["clipped"], 2)
    np.testing.assert_allclose(got.metrics["ratio"], 5.0, rtol=1e-6)
    np.testing.assert_allclose(got.metrics["ratio_deviation"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(got.metrics["old_kl"], -2 * np.log(1.5) - 2 * np.log(0.5), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda logprobs: loss(logprobs).total))(old + np.log(ratio))
    np.testing.assert_allclose(gradient, [-2.0, 0.0, 1.5, -0.5, 0.0, 0.0], rtol=1e-5)


def test_value_and_kl_losses_by_hand():
    values, returns, mask = array(1, 2, 50), array(3, 1, 0), array(1, 1, 0)
    got = value_loss(values, returns, mask)
    assert (float(got.total), float(got.weight), float(got.metrics["value_bias"])) == (2.5, 2.0, -1.0)
    # No clipping: the gradient is the error, however large.
    np.testing.assert_allclose(
        jax.jit(jax.grad(lambda v: value_loss(v, returns, mask).total))(values), [-2.0, 1.0, 0.0]
    )

    logprobs, reference = array(-1, -2, 3), array(-1.5, -1, np.nan)
    np.testing.assert_allclose(kl_loss(logprobs, reference, mask, estimator="k2"), 0.625)
    np.testing.assert_allclose(
        kl_loss(logprobs, reference, mask, estimator="k3"), np.exp(-0.5) - 0.5 + np.e - 2, rtol=1e-6
    )


def test_explained_variance():
    returns, mask = array([1, 2, 6, 99]), array([1, 1, 1, 0])
    assert float(explained_variance(returns, returns, mask)) == 1.0
    np.testing.assert_allclose(explained_variance(np.full((1, 4), 3.0, np.float32), returns, mask), 0.0, atol=1e-6)
    assert float(explained_variance(-returns, returns, mask)) < 0
