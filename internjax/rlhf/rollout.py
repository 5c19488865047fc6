"""Responses drawn from a policy, and what policy, reference and critic think of every token in them.

Alignment: what belongs to a drawn token stands at that token's index in the row (prompt ++ response): its
log-probability, and the value of the state it was drawn in (the tokens before it).

B batch, T time (prompt width + longest response), D embed, V vocabulary, C chunk of time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.decode import generate as decode
from internjax.decode.sample import make_sampling
from internjax.model import decoder, rope
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, LoraConfig, apply_config
from internjax.rlhf.pairs import Conditions
from internjax.rlhf.reward import score_responses
from internjax.rlhf.rows import Rows, concatenate, segments
from internjax.train.step import TrainState

# Time steps whose whole vocabulary is held at once when the entropy is taken.
ENTROPY_CHUNK = 512


class Weights(NamedTuple):
    """What a forward pass takes: parameters, and adapters if there are any."""

    params: dict
    lora: Lora | None = None


def weights(trainable: dict, frozen: dict | None, lora_config: LoraConfig | None) -> Weights:
    """Returns the weights behind the trainable and frozen parts of a train state."""
    if lora_config is None:
        return Weights(trainable)
    return Weights(frozen, apply_config(trainable, lora_config))


def state_weights(state: TrainState, lora_config: LoraConfig | None) -> Weights:
    """Returns the weights of a train state. They are donated to its next step: take copies of what must outlive it."""
    return weights(state.trainable, state.frozen, lora_config)


class Prompts(NamedTuple):
    """What to respond to: right-padded ids, and which condition the reward model judges each response under."""

    tokens_BT: jax.Array
    lengths_B: jax.Array
    condition_B: jax.Array


class Rollout(NamedTuple):
    """Prompts with their responses, right-padded; the stop token is part of a response."""

    tokens_BT: jax.Array
    lengths_B: jax.Array
    """Prompt and response."""
    prompt_lengths_B: jax.Array
    logprobs_BT: jax.Array
    """Of the response's tokens at the sampler's own numerics, 0 elsewhere."""
    ended_B: jax.Array
    """Whether the response ended by a stop token (and was not cut off at the longest length)."""
    condition_B: jax.Array


def response_mask(rollout: Rollout) -> jax.Array:
    """Returns `[B, T]` float32: 1 on the tokens of the response, its stop token included."""
    index_T = jnp.arange(rollout.tokens_BT.shape[1])
    inside_BT = (index_T >= rollout.prompt_lengths_B[:, None]) & (index_T < rollout.lengths_B[:, None])
    return inside_BT.astype(jnp.float32)


@jax.jit
def _join(prompts: Prompts, generation: decode.Generation) -> Rollout:
    prompt, response = Rows(prompts.tokens_BT, prompts.lengths_B), Rows(generation.tokens_BN, generation.lengths_B)
    rows = concatenate([prompt, response])
    index_BT = jnp.arange(rows.tokens_BT.shape[1]) - prompt.lengths_B[:, None]
    last = generation.logprobs_BN.shape[1] - 1
    logprobs_BT = jnp.take_along_axis(generation.logprobs_BN, jnp.clip(index_BT, 0, last), axis=1)
    inside_BT = (index_BT >= 0) & (index_BT < generation.lengths_B[:, None])
    return Rollout(
        *rows,
        prompt.lengths_B,
        jnp.where(inside_BT, logprobs_BT, 0.0),
        generation.finish_B == decode.STOP,
        prompts.condition_B,
    )


def rollout(
    policy: Weights,
    prompts: Prompts,
    seeds_B: np.ndarray,
    *,
    config: ModelConfig,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollout:
    """Returns one response per prompt, drawn from the policy; row b's draws depend on `seeds_B[b]` alone.

    Raises FloatingPointError when the policy's logits are not finite.
    """
    prompts = Prompts(*(jnp.asarray(field, jnp.int32) for field in prompts))
    generation = decode.generate(
        policy.params,
        prompts.tokens_BT,
        prompts.lengths_B,
        config=config,
        sampling=make_sampling(len(seeds_B), temperature=temperature, top_p=top_p, seed=seeds_B),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        lora=policy.lora,
    )
    broken = int((np.asarray(generation.finish_B) == decode.ERROR).sum())
    if broken:
        raise FloatingPointError(
            f"the policy's logits are not finite in {broken} of {len(seeds_B)} responses. Lower its learning rate, or "
            "go back to an earlier checkpoint."
        )
    return _join(prompts, generation)


def _hidden(model: Weights, tokens_BT, lengths_B, config: ModelConfig):
    """Returns hidden states at the frequencies the sampler used for rows of this width."""
    T = tokens_BT.shape[1]
    return decoder.forward(
        model.params,
        tokens_BT,
        config=config,
        segments_BT=segments(lengths_B, T),
        inv_freq_BF=rope.inv_freq(config, length=T)[None],
        lora=model.lora,
    ).hidden_BTD


def _target_logprobs(model: Weights, hidden_BTD, tokens_BT, config: ModelConfig, temperature: float):
    logprobs_BT = decoder.target_logprobs(
        model.params, hidden_BTD[:, :-1], tokens_BT[:, 1:], config=config, lora=model.lora, temperature=temperature
    )
    return jnp.pad(logprobs_BT, ((0, 0), (1, 0)))


def token_logprobs(
    model: Weights, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig, temperature: float
) -> jax.Array:
    """Returns log p(token | the tokens before it) `[B, T]`, float32; 0 at index 0, anything on padding.

    Rollouts are scored and the policy is trained by this one function: at equal block shapes the numbers are the same
    bit for bit, so the probability ratio of the first update is exactly 1.
    """
    hidden_BTD = _hidden(model, tokens_BT, lengths_B, config)
    return _target_logprobs(model, hidden_BTD, tokens_BT, config, temperature)


class Values(NamedTuple):
    """values_BT[b, t] is of the state that token t was drawn in; after_B of the state after the last token."""

    values_BT: jax.Array
    after_B: jax.Array


def token_values(model: Weights, tokens_BT: jax.Array, lengths_B: jax.Array, *, config: ModelConfig) -> Values:
    """Returns the critic's values, float32; 0 at index 0, anything on padding."""
    hidden_BTD = _hidden(model, tokens_BT, lengths_B, config)
    states_BT = decoder.unembed(model.params, hidden_BTD, config=config, lora=model.lora)[..., 0]
    after_B = jnp.take_along_axis(states_BT, lengths_B[:, None] - 1, axis=1)[:, 0]
    return Values(jnp.pad(states_BT[:, :-1], ((0, 0), (1, 0))), after_B)


def token_entropies(model: Weights, hidden_BTD: jax.Array, *, config: ModelConfig, temperature: float) -> jax.Array:
    """Returns the entropy in nats of the distribution that each token was drawn from `[B, T]`; 0 at index 0."""

    def entropies(hidden_BCD):
        logits_BCV = decoder.unembed(model.params, hidden_BCD, config=config, lora=model.lora) / temperature
        logprobs_BCV = jax.nn.log_softmax(logits_BCV)
        return -jnp.sum(jnp.exp(logprobs_BCV) * logprobs_BCV, axis=-1)

    T = hidden_BTD.shape[1]
    if T <= ENTROPY_CHUNK:
        entropies_BT = entropies(hidden_BTD)
    else:
        padded_BTD = jnp.pad(hidden_BTD, ((0, 0), (0, -T % ENTROPY_CHUNK), (0, 0)))
        chunks = padded_BTD.reshape(padded_BTD.shape[0], -1, ENTROPY_CHUNK, padded_BTD.shape[2]).swapaxes(0, 1)
        entropies_BT = jax.lax.map(entropies, chunks).swapaxes(0, 1).reshape(padded_BTD.shape[:2])
    return jnp.pad(entropies_BT[:, : T - 1], ((0, 0), (1, 0)))


class Evaluation(NamedTuple):
    """All of it `[B, T]` float32 at the tokens' indices, but for after_B; anything outside the responses."""

    logprobs_BT: jax.Array
    ref_logprobs_BT: jax.Array
    entropies_BT: jax.Array
    values_BT: jax.Array
    after_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "critic_config", "block_rows", "temperature"))
def evaluate(
    policy: Weights,
    reference: Weights,
    critic: Weights,
    drawn: Rollout,
    *,
    config: ModelConfig,
    critic_config: ModelConfig,
    block_rows: int,
    temperature: float,
) -> Evaluation:
    """Returns the log-probabilities under policy and reference, the policy's entropies and the critic's values.

    `block_rows` rows go through at once: give the rows of a training micro-batch, so that the numbers are those of
    training. B must be a multiple of it.
    """

    def block(rows):
        tokens_BT, lengths_B = rows
        hidden_BTD = _hidden(policy, tokens_BT, lengths_B, config)
        values = token_values(critic, tokens_BT, lengths_B, config=critic_config)
        return Evaluation(
            _target_logprobs(policy, hidden_BTD, tokens_BT, config, temperature),
            token_logprobs(reference, tokens_BT, lengths_B, config=config, temperature=temperature),
            token_entropies(policy, hidden_BTD, config=config, temperature=temperature),
            values.values_BT,
            values.after_B,
        )

    def split(x):
        return x.reshape(-1, block_rows, *x.shape[1:])

    parts = jax.lax.map(block, (split(drawn.tokens_BT), split(drawn.lengths_B)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


Reward = Callable[[Rollout], jax.Array]
"""rollout -> one score per response, `[B]`; `rollout.condition_B` says what each is judged by."""


def model_reward(model: Weights, conditions: Conditions, *, config: ModelConfig, reward_token_id: int) -> Reward:
    """Returns the reward of a conditional reward model. It alone sees the conditions."""

    def reward(drawn: Rollout) -> jax.Array:
        return score_responses(
            model.params,
            conditions,
            drawn.condition_B,
            Rows(drawn.tokens_BT, drawn.lengths_B),
            config=config,
            reward_token_id=reward_token_id,
            lora=model.lora,
        )

    return reward
