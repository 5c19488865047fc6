"""PPO reaches the optimum that theory gives in closed form, and planted bugs make it miss.

max E[R] - beta KL(pi || pi_ref) has the optimum pi* = pi_ref exp(R / beta) / Z and the value beta log Z. The policies
here are tables over few sequences, so pi* is enumerated; rewards, advantages and losses are those that train models.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from internjax.rlhf import objectives, ppo

BETA = 0.5


def total_variation(p, q) -> float:
    return 0.5 * float(np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum())


# ----------------------------------------------------------------------------------------------------------- bandit

ARMS = 8


def bandit():
    return tuple(np.random.default_rng(0).normal(size=(2, ARMS)).astype(np.float32))


@functools.cache
def gumbel(*shape, seed):
    """Noise with which argmax(logits + noise) is a draw. Made here: generators are the larger part of what compiles."""
    return np.random.default_rng(seed).gumbel(size=shape).astype(np.float32)


def reverse_optimum(reference, rewards):
    return scipy.special.softmax(reference + rewards / BETA)


def forward_optimum(reference, rewards):
    """max E_pi[R] - beta KL(pi_ref || pi): pi = beta pi_ref / (lambda - R), with lambda found by bisection."""
    reference, rewards = scipy.special.softmax(reference.astype(np.float64)), rewards.astype(np.float64)
    low, high = rewards.max() + 1e-12, rewards.max() + BETA
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * reference / (middle - rewards)).sum() > 1 else (low, middle)
    return BETA * reference / (high - rewards)


@functools.partial(jax.jit, static_argnames="kl")
def train_bandit(reference, rewards, noise, *, kl):
    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, len(noise)))
    ref_logprobs = jax.nn.log_softmax(reference)
    mask_t = jnp.ones((512, 1))

    def step(carry, noise):
        logits, opt_state = carry
        actions = jnp.argmax(logits + noise, axis=-1)[:, None]
        old_t, ref_t = jax.nn.log_softmax(logits)[actions], ref_logprobs[actions]
        coefficient = kl.coefficient if isinstance(kl, ppo.KLInReward) else 0.0
        rewards_t = objectives.token_rewards(rewards[actions[:, 0]], old_t, ref_t, mask_t, kl_coefficient=coefficient)
        adv_t = rewards_t - rewards_t.mean()

        def loss(logits):
            logprobs_t = jax.nn.log_softmax(logits)[actions]
            total = objectives.policy_loss(logprobs_t, old_t, adv_t, mask_t, clip=0.2).total
            if isinstance(kl, ppo.KLInLoss):
                total += kl.coefficient * objectives.kl_loss(logprobs_t, ref_t, mask_t, estimator=kl.estimator)
            return total / mask_t.sum()

        updates, opt_state = optimizer.update(jax.grad(loss)(logits), opt_state)
        return (optax.apply_updates(logits, updates), opt_state), None

    (logits, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), noise)
    return jax.nn.softmax(logits)


@pytest.mark.parametrize("kl", [ppo.KLInReward(BETA), ppo.KLInLoss(BETA, "k2"), ppo.KLInLoss(BETA, "k3")])
def test_where_the_kl_sits_decides_the_optimum(kl):
    reference, rewards = bandit()
    reverse, forward = reverse_optimum(reference, rewards), forward_optimum(reference, rewards)
    assert total_variation(reverse, forward) > 0.1 and abs(forward.sum() - 1) < 1e-9
    assert total_variation(scipy.special.softmax(reference), reverse) > 0.3
    found = train_bandit(reference, rewards, gumbel(1000, 512, ARMS, seed=1), kl=kl)
    wanted = forward if kl == ppo.KLInLoss(BETA, "k3") else reverse
    assert total_variation(found, wanted) <= 0.01


# -------------------------------------------------------------------------------------------- sequences with a critic
# Tokens 0 .. 3, 0 ends the sequence; at most 3 tokens after a prompt of one. State: index of the prefix.

VOCAB, LENGTH, PROMPT = 4, 3, 1
PREFIXES = [()] + [p for n in (1, 2) for p in itertools.product(range(1, VOCAB), repeat=n)]
SEQUENCES = (
    [(0,)]
    + [(a, 0) for a in range(1, VOCAB)]
    + [(a, b, c) for a, b in itertools.product(range(1, VOCAB), repeat=2) for c in range(VOCAB)]
)
# Where a token leads from a prefix; the end (index len(PREFIXES)) stays the end.
END = len(PREFIXES)
NEXT = np.full((END + 1, VOCAB), END)
for state, prefix in enumerate(PREFIXES):
    for token in range(1, VOCAB):
        if (*prefix, token) in PREFIXES:
            NEXT[state, token] = PREFIXES.index((*prefix, token))


class Problem(NamedTuple):
    reference: jax.Array  # logits [states, vocabulary]
    rewards: jax.Array  # [sequences]


def problem() -> Problem:
    rng = np.random.default_rng(3)
    return Problem(*(rng.normal(size=size).astype(np.float32) for size in ((END + 1, VOCAB), len(SEQUENCES))))


def sequence_probabilities(logits) -> np.ndarray:
    logprobs = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    return np.exp([sum(logprobs[PREFIXES.index(s[:i]), token] for i, token in enumerate(s)) for s in SEQUENCES])


# Index of a sequence by its tokens, -1 beyond its end.
CODE = np.full((VOCAB + 1,) * LENGTH, -1)
for index, sequence in enumerate(SEQUENCES):
    CODE[tuple(sequence) + (-1,) * (LENGTH - len(sequence))] = index


class Parts(NamedTuple):
    """What a planted bug may replace."""

    token_rewards: callable = objectives.token_rewards
    gae: callable = objectives.gae
    policy_loss: callable = objectives.policy_loss
    mask: callable = lambda mask_t, tokens_t: mask_t
    old_logprobs: callable = lambda old_t, ref_t: old_t


def draw(noise, logits):
    """Returns tokens `[B, 1 + LENGTH]`, the state that each was drawn in, and the mask of drawn tokens.

    noise: Gumbel's, `[LENGTH, B, VOCAB]`.
    """

    def one(state, noise):
        token = jnp.argmax(logits[state] + noise, axis=-1)
        alive = state != END
        return jnp.asarray(NEXT)[state, token], (jnp.where(alive, token, -1), state, alive)

    _, (tokens, states, alive) = jax.lax.scan(one, jnp.zeros(noise.shape[1], int), noise)

    def pad(x, value):
        return jnp.pad(x.T, ((0, 0), (PROMPT, 0)), constant_values=value)

    return pad(tokens, 0), pad(states, 0), pad(alive, False).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("parts", "gae_lambda"))
def train_table(problem: Problem, noise, *, parts=Parts(), gae_lambda=0.99):
    """Returns (policy logits, values) after PPO with 4 epochs per iteration on whole batches."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 4 * len(noise)))
    ref_logprobs = jax.nn.log_softmax(problem.reference)

    def logprobs_of(logits, states_t, tokens_t):
        return jax.nn.log_softmax(logits)[states_t, tokens_t]

    def iteration(carry, noise):
        (logits, values), opt_state = carry
        tokens_t, states_t, mask_t = draw(noise, logits)
        score = problem.rewards[jnp.asarray(CODE)[tuple(tokens_t[:, PROMPT:].T)]]
        mask_t = parts.mask(mask_t, tokens_t)
        old_t = logprobs_of(logits, states_t, tokens_t)
        ref_t = ref_logprobs[states_t, tokens_t]
        rewards_t = parts.token_rewards(score, old_t, ref_t, mask_t, kl_coefficient=BETA)
        adv = parts.gae(
            rewards_t, values[states_t], mask_t, jnp.zeros(noise.shape[1]), discount=1.0, gae_lambda=gae_lambda
        )
        old_t = parts.old_logprobs(old_t, ref_t)

        def loss(trained):
            logits, values = trained
            policy = parts.policy_loss(logprobs_of(logits, states_t, tokens_t), old_t, adv.adv_t, mask_t, clip=0.2)
            value = objectives.value_loss(values[states_t], adv.returns_t, mask_t)
            return policy.total / policy.weight + value.total / value.weight

        def epoch(carry, _):
            trained, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(trained), opt_state)
            return (optax.apply_updates(trained, updates), opt_state), None

        return jax.lax.scan(epoch, ((logits, values), opt_state), length=4)[0], None

    trained = problem.reference, jnp.zeros(END + 1)
    (trained, _), _ = jax.lax.scan(iteration, (trained, optimizer.init(trained)), noise)
    return trained


def optimum(problem: Problem) -> tuple[np.ndarray, float]:
    """Returns (pi*, V*) over all sequences."""
    weights = sequence_probabilities(problem.reference) * np.exp(np.asarray(problem.rewards, np.float64) / BETA)
    return weights / weights.sum(), BETA * np.log(weights.sum())


def distance(parts: Parts, **settings) -> tuple[float, float]:
    """Returns (TV of the trained policy to pi*, |V(prompt) - V*|)."""
    given = problem()
    best, value = optimum(given)
    logits, values = train_table(given, gumbel(150, LENGTH, 256, VOCAB, seed=2), parts=parts, **settings)
    return total_variation(sequence_probabilities(logits), best), abs(float(values[0]) - value)


def test_the_toy_problem_is_one():
    given = problem()
    probabilities = sequence_probabilities(given.reference)
    assert len(SEQUENCES) == 40 and abs(probabilities.sum() - 1) < 1e-6
    assert total_variation(probabilities, optimum(given)[0]) > 0.25
    tokens, states, mask = jax.jit(draw)(gumbel(LENGTH, 4000, VOCAB, seed=0), given.reference)
    counts = np.bincount(CODE[tuple(np.asarray(tokens)[:, PROMPT:].T)], minlength=40) / 4000
    assert total_variation(counts, probabilities) < 0.06
    assert np.all(np.asarray(mask)[:, 0] == 0) and set(np.asarray(mask).sum(axis=1)) == {1, 2, 3}


@pytest.mark.parametrize("gae_lambda", [0.99, 0.8])
def test_sequence_ppo_reaches_the_optimum(gae_lambda):
    policy, value = distance(Parts(), gae_lambda=gae_lambda)
    assert policy <= 0.003 and value <= 0.003


def end_token_masked(mask_t, tokens_t):
    return mask_t * (tokens_t != 0)


def kl_dropped_on_the_last_token(score, logprobs_t, ref_logprobs_t, mask_t, *, kl_coefficient):
    last_t = objectives.last_action(mask_t)
    ref_logprobs_t = jnp.where(last_t > 0, logprobs_t, ref_logprobs_t)
    return objectives.token_rewards(score, logprobs_t, ref_logprobs_t, mask_t, kl_coefficient=kl_coefficient)


def score_one_token_early(score, logprobs_t, ref_logprobs_t, mask_t, *, kl_coefficient):
    kl_t = objectives.token_rewards(0 * score, logprobs_t, ref_logprobs_t, mask_t, kl_coefficient=kl_coefficient)
    return kl_t + jnp.roll(objectives.last_action(mask_t), -1, axis=-1) * mask_t * score[:, None]


def score_one_token_late(score, logprobs_t, ref_logprobs_t, mask_t, *, kl_coefficient):
    kl_t = objectives.token_rewards(0 * score, logprobs_t, ref_logprobs_t, mask_t, kl_coefficient=kl_coefficient)
    return kl_t + jnp.roll(objectives.last_action(mask_t), 1, axis=-1) * mask_t * score[:, None]


def kl_of_the_wrong_sign(score, logprobs_t, ref_logprobs_t, mask_t, *, kl_coefficient):
    return objectives.token_rewards(score, logprobs_t, ref_logprobs_t, mask_t, kl_coefficient=-kl_coefficient)


def k3_in_the_reward(score, logprobs_t, ref_logprobs_t, mask_t, *, kl_coefficient):
    d_t = logprobs_t - ref_logprobs_t
    return objectives.last_action(mask_t) * score[:, None] - kl_coefficient * mask_t * (jnp.expm1(-d_t) + d_t)


def lambda_and_discount_swapped(*arrays, discount, gae_lambda):
    return objectives.gae(*arrays, discount=gae_lambda, gae_lambda=discount)


def value_read_beyond_the_end(rewards_t, values_t, mask_t, bootstrap, *, discount, gae_lambda):
    return objectives.gae(rewards_t, values_t, mask_t, bootstrap + 1.0, discount=discount, gae_lambda=gae_lambda)


def values_off_by_one(rewards_t, values_t, mask_t, bootstrap, *, discount, gae_lambda):
    shifted_t = jnp.roll(values_t, 1, axis=-1)
    return objectives.gae(rewards_t, shifted_t, mask_t, bootstrap, discount=discount, gae_lambda=gae_lambda)


def ratio_upside_down(logprobs_t, old_logprobs_t, adv_t, mask_t, *, clip):
    return objectives.policy_loss(old_logprobs_t, logprobs_t, adv_t, mask_t, clip=clip)


def old_logprobs_of_the_reference(old_t, ref_t):
    return ref_t


BUGS = {
    "the end token is masked": Parts(mask=end_token_masked),
    "no KL on the last token": Parts(token_rewards=kl_dropped_on_the_last_token),
    "score one token early": Parts(token_rewards=score_one_token_early),
    "score one token late": Parts(token_rewards=score_one_token_late),
    "KL of the wrong sign": Parts(token_rewards=kl_of_the_wrong_sign),
    "k3 inside the reward": Parts(token_rewards=k3_in_the_reward),
    "lambda and discount swapped": Parts(gae=lambda_and_discount_swapped),
    "a value beyond the true end": Parts(gae=value_read_beyond_the_end),
    "values off by one": Parts(gae=values_off_by_one),
    "ratio upside down": Parts(policy_loss=ratio_upside_down),
    "stale old log-probabilities": Parts(old_logprobs=old_logprobs_of_the_reference),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_miss_the_optimum(bug):
    policy, value = distance(BUGS[bug], gae_lambda=0.8)
    assert policy > 0.03 or value > 0.03
