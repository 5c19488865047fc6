"""Proximal policy optimisation of a language model: settings, losses over models, and one iteration.

Recipe of COOL RLHF: InternLM2 technical report (arXiv:2403.17297), section 4.2.3: policy and reference from the
fine-tuned model, critic from the reward model, no value clipping, no advantage normalisation, and the pre-training loss
mixed in. What the report leaves open (where the KL sits, the clip, epochs, ...) is marked as our choice in `PPOConfig`.

    ppo = make_ppo(PPOConfig(), model_config, critic_config, stop_ids=stop_ids(tokenizer), actor_optimizer=...,
                   critic_optimizer=..., seed=0)
    state = init(ppo, params, critic_params)
    for index in range(num_iterations):
        state, drawn, scores_B, metrics = iteration(ppo, state, prompts, reward, place=(round_index, index), ...)

B batch, T time.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from internjax import sharding
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig
from internjax.model.lora import logical_axes as lora_axes
from internjax.rlhf import objectives
from internjax.rlhf.config import Bootstrap, End, KLInLoss, KLInReward, PPOConfig
from internjax.rlhf.reward import check_scalar
from internjax.rlhf.rollout import (
    Evaluation,
    Prompts,
    Reward,
    Rollout,
    Weights,
    evaluate,
    response_mask,
    rollout,
    state_weights,
    token_logprobs,
    token_values,
    weights,
)
from internjax.rlhf.rows import sample_seeds
from internjax.train import processes
from internjax.train.batch import Batch
from internjax.train.losses import Loss, LossOutput, next_token
from internjax.train.step import Step, TrainState, init_state, make_step, put_batch


class Experience(NamedTuple):
    """What an update learns from; every `[B, T]` array is aligned to the tokens, 0 outside the responses."""

    tokens_BT: jax.Array
    lengths_B: jax.Array
    mask_BT: jax.Array
    logprobs_BT: jax.Array
    ref_logprobs_BT: jax.Array
    adv_BT: jax.Array
    returns_BT: jax.Array


class ActorBatch(NamedTuple):
    """One update of the policy: responses, and the pre-training text mixed in (None without)."""

    experience: Experience
    pretrain: Batch | None


def _outcome(
    scores_B: jax.Array, ended_B: jax.Array, after_B: jax.Array, truncation: Bootstrap | End
) -> tuple[jax.Array, jax.Array]:
    """Returns (score on the last action, value of what follows it) of every response."""
    match truncation:
        case Bootstrap():
            return jnp.where(ended_B, scores_B, 0.0), jnp.where(ended_B, 0.0, after_B)
        case End(score=None):
            return scores_B, jnp.zeros_like(after_B)
        case End(score=fixed):
            return jnp.where(ended_B, scores_B, fixed), jnp.zeros_like(after_B)
    raise ValueError(f"truncation must be Bootstrap or End, given {truncation!r}")


@functools.partial(jax.jit, static_argnames=("config",))
def experience(
    drawn: Rollout, evaluation: Evaluation, scores_B: jax.Array, *, config: PPOConfig
) -> tuple[Experience, dict[str, jax.Array]]:
    """Returns what to learn from the rollout, and its figures.

    score, length, ended: means over responses. kl: mean of sum_t log pi - log pi_ref (k1). token_kl: mean over tokens
    of its k3 estimate. entropy: mean over tokens, from the distributions. value, return, advantage_deviation,
    explained_variance: of the critic before the update. logprob_difference: largest |sampler - trainer|.
    """
    mask_BT = response_mask(drawn)
    inside_BT = mask_BT > 0
    logprobs_BT = jnp.where(inside_BT, evaluation.logprobs_BT, 0.0)
    ref_logprobs_BT = jnp.where(inside_BT, evaluation.ref_logprobs_BT, 0.0)
    values_BT = jnp.where(inside_BT, evaluation.values_BT, 0.0)

    score_B, bootstrap_B = _outcome(scores_B, drawn.ended_B, evaluation.after_B, config.truncation)
    coefficient = config.kl.coefficient if isinstance(config.kl, KLInReward) else 0.0
    rewards_BT = objectives.token_rewards(score_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coefficient=coefficient)
    found = objectives.gae(
        rewards_BT, values_BT, mask_BT, bootstrap_B, discount=config.discount, gae_lambda=config.gae_lambda
    )

    num_tokens = jnp.maximum(mask_BT.sum(), 1.0)

    def token_mean(x_BT):
        return objectives.masked_sum(x_BT, mask_BT) / num_tokens

    metrics = {
        "score": scores_B.mean(),
        "length": (drawn.lengths_B - drawn.prompt_lengths_B).mean(),
        "ended": drawn.ended_B.mean(),
        "kl": (logprobs_BT - ref_logprobs_BT).sum(axis=1).mean(),
        "token_kl": objectives.kl_loss(logprobs_BT, ref_logprobs_BT, mask_BT, estimator="k3") / num_tokens,
        "entropy": token_mean(evaluation.entropies_BT),
        "value": token_mean(values_BT),
        "return": token_mean(found.returns_t),
        "advantage_deviation": jnp.sqrt(token_mean(jnp.square(found.adv_t - token_mean(found.adv_t)))),
        "explained_variance": objectives.explained_variance(values_BT, found.returns_t, mask_BT),
        "logprob_difference": jnp.max(jnp.abs(jnp.where(inside_BT, drawn.logprobs_BT - logprobs_BT, 0.0))),
    }
    learned = Experience(
        drawn.tokens_BT, drawn.lengths_B, mask_BT, logprobs_BT, ref_logprobs_BT, found.adv_t, found.returns_t
    )
    return learned, metrics


def policy(model_config: ModelConfig, config: PPOConfig, *, lora_config: LoraConfig | None = None) -> Loss:
    """Returns the policy's loss on an `ActorBatch`: a mean over the responses' tokens of the global batch.

    The clipped objective, plus the KL's coefficient times its estimator if it sits in the loss, plus
    pretrain_coefficient times the next-token loss. Metrics: those of `objectives.policy_loss`, and `pretrain_loss` in
    nats per token.
    """
    pretrain_loss = next_token(model_config, lora_config=lora_config)

    def loss(trainable, frozen, batch, rng) -> LossOutput:
        learned = batch.experience
        logprobs_BT = token_logprobs(
            weights(trainable, frozen, lora_config),
            learned.tokens_BT,
            learned.lengths_B,
            config=model_config,
            temperature=config.temperature,
        )
        out = objectives.policy_loss(
            logprobs_BT, learned.logprobs_BT, learned.adv_BT, learned.mask_BT, clip=config.clip
        )
        total, metrics = out.total, out.metrics
        if isinstance(config.kl, KLInLoss):
            total += config.kl.coefficient * objectives.kl_loss(
                logprobs_BT, learned.ref_logprobs_BT, learned.mask_BT, estimator=config.kl.estimator
            )
        if batch.pretrain is not None:
            text = pretrain_loss(trainable, frozen, batch.pretrain, rng)
            total += config.pretrain_coefficient * text.total
            metrics = metrics | {"pretrain_loss": text.total}
        return LossOutput(total, out.weight, metrics)

    return loss


def value(critic_config: ModelConfig, *, lora_config: LoraConfig | None = None) -> Loss:
    """Returns the critic's loss on an `Experience`: (V - return)^2 / 2, a mean over the responses' tokens."""
    check_scalar(critic_config)

    def loss(trainable, frozen, batch, rng) -> LossOutput:
        del rng
        model = weights(trainable, frozen, lora_config)
        values_BT = token_values(model, batch.tokens_BT, batch.lengths_B, config=critic_config).values_BT
        return objectives.value_loss(values_BT, batch.returns_BT, batch.mask_BT)

    return loss


class PPO(NamedTuple):
    """What stays the same over a run: settings, and the two compiled training steps."""

    config: PPOConfig
    model_config: ModelConfig
    critic_config: ModelConfig
    stop_ids: tuple[int, ...]
    actor_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    actor_step: Step
    critic_step: Step
    actor_lora: LoraConfig | None
    critic_lora: LoraConfig | None
    seed: int
    mesh: Mesh | None


class PPOState(NamedTuple):
    """What changes: policy and critic, each with its optimizer. One pytree, one checkpoint."""

    actor: TrainState
    critic: TrainState


def make_ppo(
    config: PPOConfig,
    model_config: ModelConfig,
    critic_config: ModelConfig,
    *,
    stop_ids: tuple[int, ...],
    actor_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation,
    actor_lora: LoraConfig | None = None,
    critic_lora: LoraConfig | None = None,
    seed: int,
    mesh: Mesh | None = None,
) -> PPO:
    """Returns a run's fixed part. Make it once: each call makes new training steps, compiled anew.

    With `actor_lora` the policy is the base with adapters, and its reference the base without them. Dropout of adapters
    is off in all of reinforcement learning. With a mesh every stage runs on it, rows split over data and fsdp; put the
    weights of reference and reward model there too (`put_params`). Raises ValueError in a job of several processes:
    responses, scores and samples are read whole by the process that drew them.
    """
    if processes.count() > 1:
        raise ValueError(
            f"reinforcement learning runs in one process, with a mesh over all devices that it sees; given a job of "
            f"{processes.count()} processes. Start one process per machine: without the launcher, and without "
            "JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS."
        )
    if not stop_ids:
        raise ValueError("no stop ids are given: no response could end. Give the tokenizer's, text.chat.stop_ids")
    actor_lora, critic_lora = (
        None if lora is None else dataclasses.replace(lora, dropout=0.0) for lora in (actor_lora, critic_lora)
    )
    if critic_lora is not None and "head" not in critic_lora.targets:
        raise ValueError(f"the critic's adapters on {critic_lora.targets} leave its new head untrained; add 'head'")
    steps = [
        make_step(loss, optimizer, accumulate=config.accumulate, mesh=mesh)
        for loss, optimizer in (
            (policy(model_config, config, lora_config=actor_lora), actor_optimizer),
            (value(critic_config, lora_config=critic_lora), critic_optimizer),
        )
    ]
    return PPO(
        config,
        model_config,
        critic_config,
        tuple(stop_ids),
        actor_optimizer,
        critic_optimizer,
        *steps,
        actor_lora,
        critic_lora,
        seed,
        mesh,
    )


def init(
    ppo: PPO, actor: dict, critic: dict, *, actor_base: dict | None = None, critic_base: dict | None = None
) -> PPOState:
    """Returns the state before the first iteration. The given arrays stay valid: what is trained is a copy.

    `actor` and `critic` are parameters, or adapter collections over the given bases where the run uses adapters. The
    critic is the reward model with a new head (`reward.from_lm` of its parameters), as in the report.
    """
    return PPOState(_actor_state(ppo, actor, actor_base), _critic_state(ppo, critic, critic_base))


def replace_critic(ppo: PPO, state: PPOState, critic: dict, *, critic_base: dict | None = None) -> PPOState:
    """Returns the state with a fresh critic, made from the reward model of a new round, and a fresh optimizer of it."""
    return state._replace(critic=_critic_state(ppo, critic, critic_base))


def put_params(params: dict, config: ModelConfig, mesh: Mesh | None) -> dict:
    """Returns the parameters on the mesh, each leaf split as its logical axes say."""
    if mesh is None:
        return params
    return jax.device_put(params, sharding.shardings(decoder.logical_axes(config), params, mesh))


def _actor_state(ppo: PPO, actor: dict, base: dict | None) -> TrainState:
    return _train_state(actor, base, ppo.actor_lora, ppo.actor_optimizer, ppo.model_config, ppo.mesh, "actor")


def _critic_state(ppo: PPO, critic: dict, base: dict | None) -> TrainState:
    return _train_state(critic, base, ppo.critic_lora, ppo.critic_optimizer, ppo.critic_config, ppo.mesh, "critic")


def _train_state(trainable, base, lora_config, optimizer, config: ModelConfig, mesh, name: str) -> TrainState:
    if (lora_config is None) != (base is None):
        wanted = f"{name} without {name}_base" if lora_config is None else f"the adapters and {name}_base"
        raise ValueError(f"the run was made with {name}_lora={lora_config}; give {wanted}")
    trainable = jax.tree.map(jnp.copy, trainable)
    if mesh is None:
        return init_state(trainable, optimizer, frozen=base)
    axes = decoder.logical_axes(config)
    if base is None:
        return init_state(trainable, optimizer, mesh=mesh, axes=axes)
    own_axes = lora_axes(trainable, axes)
    return init_state(trainable, optimizer, frozen=base, mesh=mesh, axes=own_axes, frozen_axes=axes)


def on(mesh: Mesh | None):
    """Returns the context in which a stage runs on the mesh; one that does nothing without."""
    return contextlib.nullcontext() if mesh is None else sharding.use(mesh)


@jax.jit
def _minibatch(learned: Experience, rows: jax.Array, pretrain: Batch | None) -> ActorBatch:
    """Returns the given rows, with the pre-training text weighted so that its loss is a mean over its own tokens."""
    learned = jax.tree.map(lambda x: x[rows], learned)
    if pretrain is None:
        return ActorBatch(learned, None)
    # The step divides all sums by the number of response tokens; this puts the text's own number in its place.
    loss_mask = pretrain.loss_mask.astype(jnp.float32)
    scale = learned.mask_BT.sum() / jnp.maximum(loss_mask.sum(), 1.0)
    return ActorBatch(learned, pretrain._replace(loss_mask=loss_mask * scale))


def _check_rows(num_rows: int, config: PPOConfig) -> None:
    if num_rows % config.minibatch_size:
        raise ValueError(
            f"{num_rows} responses cannot be cut into minibatches of {config.minibatch_size}. "
            "Give as many prompts per iteration as a multiple of minibatch_size."
        )


class Update(NamedTuple):
    """The state after an iteration's updates, and the means of their metrics."""

    state: PPOState
    metrics: dict[str, float]


def update(
    ppo: PPO,
    state: PPOState,
    learned: Experience,
    *,
    pretrain: Iterator[Batch] | None,
    place: tuple[int, ...],
    train_actor: bool = True,
) -> Update:
    """Returns the state after `num_epochs` passes over the experience in minibatches, shuffled by (seed, place, epoch).

    Metrics of the policy carry its losses' names, those of the critic the prefix `critic_`. `first_ratio_deviation` is
    mean |pi / pi_old - 1| at the first update, 0 unless the trainer's numbers differ from the scorer's.
    """
    config, num_rows = ppo.config, learned.tokens_BT.shape[0]
    _check_rows(num_rows, config)
    actor, critic = state
    actor_metrics, critic_metrics = [], []
    for epoch in range(config.num_epochs):
        order = np.random.default_rng((ppo.seed, *place, epoch)).permutation(num_rows).astype(np.int32)
        for rows in order.reshape(-1, config.minibatch_size):
            text = next(pretrain) if pretrain is not None and train_actor else None
            batch = put_batch(_minibatch(learned, rows, text), ppo.mesh)
            if train_actor:
                actor, metrics = ppo.actor_step(actor, batch)
                actor_metrics.append(metrics)
            critic, metrics = ppo.critic_step(critic, batch.experience)
            critic_metrics.append(metrics)
    actor_metrics, critic_metrics = jax.device_get((actor_metrics, critic_metrics))
    for name, rows in (("policy", actor_metrics), ("critic", critic_metrics)):
        if not all(row["finite"] for row in rows):
            raise FloatingPointError(
                f"an update of the {name} at {place} is not finite and was left out. Lower its learning rate, or look "
                "at the rewards of this iteration."
            )
    metrics = _means(actor_metrics) | {f"critic_{name}": mean for name, mean in _means(critic_metrics).items()}
    if actor_metrics:
        metrics["first_ratio_deviation"] = float(actor_metrics[0]["ratio_deviation"])
    return Update(PPOState(actor, critic), metrics)


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = [name for name in rows[0] if name not in ("finite", "weight")] if rows else []
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


class Iteration(NamedTuple):
    """The state after one iteration, the responses it was learned from, their scores, and all figures."""

    state: PPOState
    drawn: Rollout
    scores_B: np.ndarray
    metrics: dict[str, float]


def draw(ppo: PPO, state: PPOState, prompts: Prompts, *, place: tuple[int, ...]) -> Rollout:
    """Returns one response of the present policy per prompt; the draws depend on (seed, place, row) alone."""
    with on(ppo.mesh):
        return rollout(
            state_weights(state.actor, ppo.actor_lora),
            put_batch(prompts, ppo.mesh),
            sample_seeds(ppo.seed, *place, num_samples=len(prompts.lengths_B)),
            config=ppo.model_config,
            max_new_tokens=ppo.config.max_new_tokens,
            stop_ids=ppo.stop_ids,
            temperature=ppo.config.temperature,
            top_p=ppo.config.top_p,
        )


def iteration(
    ppo: PPO,
    state: PPOState,
    prompts: Prompts,
    reward: Reward,
    *,
    reference: Weights | None = None,
    pretrain: Callable[[int], Iterator[Batch]] | None = None,
    place: tuple[int, ...],
    train_actor: bool = True,
) -> Iteration:
    """Returns the state after one iteration: draw, score, evaluate, update.

    `place` says where in the run this is, e.g. (round, index); with the seed it decides every draw. `reference` may be
    left out for a policy of adapters: it is their base. `pretrain(position)` gives pre-training batches; the position
    is that of the policy's updates, so a resumed run mixes in what the unbroken one would. With `train_actor` False
    only the critic learns (the report's 50 iterations of value pre-training). `state` is donated: use the new one.
    """
    config = ppo.config
    _check_rows(len(prompts.lengths_B), config)
    if reference is None:
        if ppo.actor_lora is None:
            raise ValueError("a policy without adapters needs its reference: Weights(params) of the fine-tuned model")
        reference = Weights(state.actor.frozen)
    if train_actor and (config.pretrain_coefficient > 0) != (pretrain is not None):
        raise ValueError(
            f"pretrain_coefficient is {config.pretrain_coefficient}, and pretrain data is "
            f"{'missing' if pretrain is None else 'given'}. Give data, or set the coefficient to 0 and give none."
        )
    drawn = draw(ppo, state, prompts, place=place)
    with on(ppo.mesh):
        scores_B = np.asarray(reward(drawn), np.float32)
        evaluation = evaluate(
            state_weights(state.actor, ppo.actor_lora),
            reference,
            state_weights(state.critic, ppo.critic_lora),
            drawn,
            config=ppo.model_config,
            critic_config=ppo.critic_config,
            block_rows=config.minibatch_size // config.accumulate,
            temperature=config.temperature,
        )
        learned, metrics = experience(drawn, evaluation, scores_B, config=config)
    batches = None if pretrain is None or not train_actor else pretrain(int(state.actor.data_position))
    state, update_metrics = update(ppo, state, learned, pretrain=batches, place=place, train_actor=train_actor)
    figures = {name: float(figure) for name, figure in jax.device_get(metrics).items()}
    return Iteration(state, drawn, scores_B, figures | update_metrics)
