"""PPO on tiny transformers: alignment, exact ratios, truncation, accumulation, and a reward that rises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig, init_lora
from internjax.rlhf import reward
from internjax.rlhf.config import ACTOR_OPTIMIZER, CRITIC_OPTIMIZER, Bootstrap, End, KLInLoss, KLInReward, PPOConfig
from internjax.rlhf.pairs import make_conditions
from internjax.rlhf.ppo import draw, experience, init, iteration, make_ppo, put_params
from internjax.rlhf.rollout import (
    Prompts,
    Rollout,
    Weights,
    evaluate,
    model_reward,
    response_mask,
    token_logprobs,
)
from internjax.train.batch import Batch
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from tests.weights import random_params

BOS, EOS, REWARD = 1, 2, 15
logits_of = jax.jit(decoder.logits, static_argnames="config")
logprobs_of = jax.jit(token_logprobs, static_argnames=("config", "temperature"))
CONFIG = ModelConfig(
    vocab_size=16,
    d_model=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=64,
    dtype="float32",
    rope_theta=1e4,
    initializer_range=0.1,
)
SETTINGS = PPOConfig(
    KLInReward(0.05), top_p=1.0, max_new_tokens=8, minibatch_size=16, pretrain_coefficient=0.0, truncation=End()
)
COOLER = dataclasses.replace(SETTINGS, temperature=0.7, top_p=0.9, accumulate=2, num_epochs=2, minibatch_size=32)
# What these tests share, so that few programs are compiled: 32 prompts, scored in blocks of 16 rows.


LORA = LoraConfig(rank=4, alpha=16.0, targets=("query", "value", "up", "down"), dropout=0.1)
CRITIC_LORA = LoraConfig(rank=4, alpha=16.0, targets=("query", "value", "up", "down", "head"))


def prompts(batch: int, seed: int = 0) -> Prompts:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 5, size=batch)
    tokens = np.where(np.arange(4) < lengths[:, None], rng.integers(3, 15, size=(batch, 4)), 0)
    tokens[:, 0] = BOS
    return Prompts(tokens, lengths, rng.integers(0, 2, size=batch))


@functools.cache
def base_params(seed=0):
    return random_params(CONFIG, seed)


@functools.cache
def program(settings=SETTINGS, actor_lora=None, critic_lora=None, actor_lr=3e-3, critic_lr=1e-2, mesh=None):
    """Shared between tests, as its training steps compile once per program."""
    return make_ppo(
        settings,
        CONFIG,
        reward.from_lm(base_params(), CONFIG)[1],
        stop_ids=(EOS,),
        actor_optimizer=make_optimizer(dataclasses.replace(ACTOR_OPTIMIZER, peak_lr=actor_lr), Constant(), 1000),
        critic_optimizer=make_optimizer(dataclasses.replace(CRITIC_OPTIMIZER, peak_lr=critic_lr), Constant(), 1000),
        actor_lora=actor_lora,
        critic_lora=critic_lora,
        seed=0,
        mesh=mesh,
    )


def make(settings=SETTINGS, *, mesh=None, **rates):
    """Returns (program, fresh state, reference) of full parameters."""
    ppo, params = program(settings, mesh=mesh, **rates), base_params()
    critic, _ = reward.from_lm(params, CONFIG)
    return ppo, init(ppo, params, critic), Weights(put_params(params, CONFIG, mesh))


def make_with_adapters(settings, **rates):
    """Returns the same with policy and critic as adapters over one base; the reference is that base."""
    ppo, params = program(settings, LORA, CRITIC_LORA, **rates), base_params()
    critic, _ = reward.from_lm(params, CONFIG)
    adapters = [
        jax.jit(functools.partial(init_lora, config))(base, jax.random.key(7))
        for config, base in ((LORA, params), (CRITIC_LORA, critic))
    ]
    return ppo, init(ppo, *adapters, actor_base=params, critic_base=critic), None


def share_of_five(drawn: Rollout) -> jax.Array:
    """Share of token 5 in a response; nothing unless it ends by itself."""
    mask = response_mask(drawn)
    share = ((drawn.tokens_BT == 5) * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)
    return share * drawn.ended_B


def evaluated(ppo, state, reference, drawn, *, block_rows=16):
    return evaluate(
        Weights(state.actor.trainable),
        reference,
        Weights(state.critic.trainable),
        drawn,
        config=CONFIG,
        critic_config=ppo.critic_config,
        block_rows=block_rows,
        temperature=ppo.config.temperature,
    )


def test_everything_stands_at_its_token():
    ppo, state, _ = make(COOLER)
    reference = Weights(base_params(5))
    critic, _ = reward.from_lm(state.critic.trainable, CONFIG, jax.random.key(3))
    state = state._replace(critic=dataclasses.replace(state.critic, trainable=critic))
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    found = evaluated(ppo, state, reference, drawn)
    mask = np.asarray(response_mask(drawn))
    tokens, lengths = np.asarray(drawn.tokens_BT), np.asarray(drawn.lengths_B)
    assert tokens.shape == (32, 12)
    ended = np.asarray(drawn.ended_B)
    assert 0 < ended.sum() < 32
    for b in range(32):
        start = int(drawn.prompt_lengths_B[b])
        assert mask[b].tolist() == [float(start <= t < lengths[b]) for t in range(12)]
        # The stop token is a token like any other: the last one of the response, inside the mask.
        assert (tokens[b, lengths[b] - 1] == EOS) == ended[b] and mask[b, lengths[b] - 1] == 1
        assert EOS not in tokens[b, start : lengths[b] - 1]
        assert ended[b] or lengths[b] == start + 8
    for model, got in ((Weights(state.actor.trainable), found.logprobs_BT), (reference, found.ref_logprobs_BT)):
        logits = logits_of(model.params, drawn.tokens_BT, config=CONFIG) / 0.7
        every = np.asarray(jax.nn.log_softmax(logits))
        wanted = np.take_along_axis(every[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
        np.testing.assert_allclose(np.asarray(got)[:, 1:] * mask[:, 1:], wanted * mask[:, 1:], atol=2e-5)
        if model is not reference:
            entropies = -(np.exp(every) * every).sum(axis=-1)[:, :-1]
            np.testing.assert_allclose(found.entropies_BT[:, 1:] * mask[:, 1:], entropies * mask[:, 1:], atol=2e-5)
    states = np.asarray(logits_of(critic, drawn.tokens_BT, config=ppo.critic_config))[..., 0]
    np.testing.assert_allclose(found.values_BT[:, 1:] * mask[:, 1:], states[:, :-1] * mask[:, 1:], atol=2e-5)
    np.testing.assert_allclose(found.after_B, states[np.arange(32), lengths - 1], atol=2e-5)


def test_a_block_of_another_shape_is_still_close():
    ppo, state, reference = make()
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    wide, narrow = (evaluated(ppo, state, reference, drawn, block_rows=rows) for rows in (16, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), wide, narrow)


def test_padding_changes_nothing():
    ppo, state, reference = make()
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    narrow = evaluated(ppo, state, reference, drawn).logprobs_BT
    padded = jnp.pad(drawn.tokens_BT, ((0, 0), (0, 5)), constant_values=9)
    model = Weights(state.actor.trainable)
    wide = logprobs_of(model, padded, drawn.lengths_B, config=CONFIG, temperature=1.0)
    mask = np.asarray(response_mask(drawn))
    np.testing.assert_allclose(np.asarray(wide)[:, :12] * mask, np.asarray(narrow) * mask, atol=2e-6)


def test_what_the_length_limit_means():
    ppo, state, reference = make()
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    ended = np.asarray(drawn.ended_B)
    found = evaluated(ppo, state, reference, drawn)._replace(after_B=jnp.full(32, 0.75))
    scores = jnp.full(32, 2.0)

    def last_returns(truncation):
        settings = dataclasses.replace(SETTINGS, kl=KLInReward(0.0), gae_lambda=1.0, truncation=truncation)
        learned, _ = experience(drawn, found, scores, config=settings)
        return np.asarray(learned.returns_BT)[np.arange(32), np.asarray(drawn.lengths_B) - 1]

    np.testing.assert_allclose(last_returns(Bootstrap()), np.where(ended, 2.0, 0.75), rtol=1e-6)
    np.testing.assert_allclose(last_returns(End()), 2.0, rtol=1e-6)
    np.testing.assert_allclose(last_returns(End(score=-1.0)), np.where(ended, 2.0, -1.0), rtol=1e-6)


def test_the_kl_pays_for_itself():
    ppo, state, _ = make()
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    reference = Weights(base_params(5))
    found = evaluated(ppo, state, reference, drawn)
    mask = np.asarray(response_mask(drawn))
    d = (np.asarray(found.logprobs_BT) - np.asarray(found.ref_logprobs_BT)) * mask
    for kl, coefficient in ((KLInReward(0.5), 0.5), (KLInLoss(0.5, "k2"), 0.0)):
        settings = dataclasses.replace(SETTINGS, kl=kl, gae_lambda=1.0)
        learned, metrics = experience(drawn, found, jnp.full(32, 3.0), config=settings)
        to_go = 3.0 - coefficient * np.cumsum(d[:, ::-1], axis=1)[:, ::-1]
        np.testing.assert_allclose(learned.returns_BT, to_go * mask, atol=2e-4)
        np.testing.assert_allclose(metrics["kl"], d.sum(axis=1).mean(), rtol=1e-5)
        np.testing.assert_allclose(metrics["token_kl"], ((np.exp(-d) - 1 + d) * mask).sum() / mask.sum(), rtol=1e-4)


def text_batches(position: int):
    while True:
        rng = np.random.default_rng((9, position))
        tokens = rng.integers(3, 15, size=(8, 11)).astype(np.int32)
        shape = (8, 10)
        yield Batch(
            tokens[:, :-1],
            tokens[:, 1:],
            (rng.random(shape) < 0.8).astype(np.float32),
            np.broadcast_to(np.arange(10, dtype=np.int32), shape),
            np.ones(shape, np.int32),
        )
        position += 1


def judged_iteration(mesh=None, accumulate=1):
    """One update of all rows against a reward model, with the KL in the loss and pre-training text mixed in."""
    settings = dataclasses.replace(
        SETTINGS, kl=KLInLoss(0.3, "k3"), accumulate=accumulate, pretrain_coefficient=0.5, minibatch_size=32
    )
    ppo, state, _ = make(settings, mesh=mesh)
    reference = Weights(put_params(base_params(5), CONFIG, mesh))
    scorer, config = reward.from_lm(base_params(6), CONFIG, jax.random.key(1))
    conditions = make_conditions({"first": [BOS, 7, 7], "second": [BOS, 9]}, bos_id=BOS)
    score = model_reward(Weights(put_params(scorer, config, mesh)), conditions, config=config, reward_token_id=REWARD)
    return iteration(ppo, state, prompts(32), score, reference=reference, pretrain=text_batches, place=(0, 0))


@pytest.mark.slow
def test_an_update_is_the_same_in_parts_and_on_a_mesh():
    parts = judged_iteration(accumulate=2)
    # On the first update the ratio is 1: the loss is -mean A + 0.3 mean k3 + 0.5 * the text's own mean loss.
    metrics = parts.metrics
    advantage = metrics["return"] - metrics["value"]
    wanted = -advantage + 0.3 * metrics["token_kl"] + 0.5 * metrics["pretrain_loss"]
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)
    assert 2.0 < metrics["pretrain_loss"] < 4.0 and np.std(parts.scores_B) > 0.01
    try:
        meshed = judged_iteration(sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2)))
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    np.testing.assert_array_equal(parts.drawn.tokens_BT, meshed.drawn.tokens_BT)
    np.testing.assert_allclose(parts.scores_B, meshed.scores_B, atol=1e-4)
    for name in ("loss", "grad_norm", "pretrain_loss", "critic_loss", "critic_grad_norm", "kl", "entropy"):
        np.testing.assert_allclose(metrics[name], meshed.metrics[name], rtol=2e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
        parts.state.critic.trainable,
        meshed.state.critic.trainable,
    )
    kernel = meshed.state.actor.trainable["layers"]["ffn"]["gate"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")


def test_value_warm_up_leaves_the_policy_alone():
    ppo, state, reference = make()
    before = jax.tree.map(np.asarray, state.actor.trainable)
    critic_before = jax.tree.map(np.asarray, state.critic.trainable)
    result = iteration(ppo, state, prompts(32), share_of_five, reference=reference, place=(0, 0), train_actor=False)
    jax.tree.map(np.testing.assert_array_equal, before, result.state.actor.trainable)
    assert int(result.state.actor.step) == 0 and int(result.state.critic.step) == 2
    assert np.any(critic_before["head"]["kernel"] != result.state.critic.trainable["head"]["kernel"])
    assert "loss" not in result.metrics and "critic_loss" in result.metrics


def test_an_iteration_depends_on_state_and_place_alone():
    ends = []
    for warm in (False, True):
        ppo, state, reference = make()
        if warm:  # an iteration elsewhere in between leaves no trace
            other = jax.tree.map(jnp.copy, state)
            iteration(ppo, other, prompts(32, 1), share_of_five, reference=reference, place=(0, 0))
        result = iteration(ppo, state, prompts(32), share_of_five, reference=reference, place=(1, 3))
        ends.append((np.asarray(result.drawn.tokens_BT), jax.tree.map(np.asarray, result.state.actor.trainable)))
    np.testing.assert_array_equal(ends[0][0], ends[1][0])
    jax.tree.map(np.testing.assert_array_equal, ends[0][1], ends[1][1])
    ppo, state, _ = make()
    drawn = [draw(ppo, state, prompts(32), place=place) for place in ((1, 3), (3, 1))]
    assert np.any(np.asarray(drawn[0].tokens_BT) != np.asarray(drawn[1].tokens_BT))


def test_the_reward_model_reads_what_its_condition_says():
    params, config = reward.from_lm(base_params(), CONFIG, jax.random.key(1))
    conditions = make_conditions({"first": [BOS, 7, 7], "second": [BOS, 9]}, bos_id=BOS)
    ppo, state, _ = make()
    drawn = draw(ppo, state, prompts(32), place=(0, 0))
    scores = model_reward(Weights(params), conditions, config=config, reward_token_id=REWARD)(drawn)
    rows = [
        [[BOS, 7, 7], [BOS, 9]][int(c)] + np.asarray(row)[1 : int(n)].tolist()
        for row, n, c in zip(drawn.tokens_BT, drawn.lengths_B, drawn.condition_B)
    ]
    wanted = reward.get_scores(params, rows, config=config, reward_token_id=REWARD)
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


@pytest.mark.parametrize("start, settings, actor_lr", [(make, SETTINGS, 3e-3), (make_with_adapters, COOLER, 2e-2)])
def test_the_reward_rises_while_sampler_and_trainer_agree(start, settings, actor_lr):
    """With all parameters at temperature 1, and with adapters at another, truncated and in micro-batches."""
    ppo, state, reference = start(settings, actor_lr=actor_lr)
    base = jax.tree.map(np.asarray, (state.actor.frozen, state.critic.frozen))
    scores, metrics = [], []
    for index in range(30):
        state, _, scores_B, figures = iteration(
            ppo,
            state,
            prompts(32, index),
            share_of_five,
            reference=reference,
            place=(0, index),
            train_actor=index >= 2,
        )
        scores.append(scores_B)
        metrics.append(figures)
        assert 0 < figures["logprob_difference"] <= 1e-5
        if index >= 2:
            assert figures["first_ratio_deviation"] == 0.0
            assert figures["ratio_deviation"] > 1e-4  # later updates of the iteration have moved on
    early, late = np.concatenate(scores[:3]), np.concatenate(scores[-3:])
    standard_error = np.sqrt(early.var() / early.size + late.var() / late.size)
    assert late.mean() - early.mean() > 5 * standard_error and late.mean() > 4 * early.mean()
    assert metrics[-1]["ended"] > metrics[0]["ended"]
    assert abs(metrics[0]["kl"]) < 1e-4 and metrics[-1]["kl"] > 0.5
    assert metrics[-1]["entropy"] < metrics[0]["entropy"]
    jax.tree.map(np.testing.assert_array_equal, base, (state.actor.frozen, state.critic.frozen))
    assert ppo.actor_step.num_traces == ppo.critic_step.num_traces == 1


def test_a_job_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr("internjax.train.processes.count", lambda: 4)
    with pytest.raises(ValueError, match="runs in one process.*job of 4 processes.*without JAX_NUM_PROCESSES"):
        program.__wrapped__()


def test_missing_parts_are_named():
    ppo, state, reference = make()
    with pytest.raises(ValueError, match="needs its reference"):
        iteration(ppo, state, prompts(32), share_of_five, place=(0, 0))
    with pytest.raises(ValueError, match="pretrain data is given"):
        iteration(ppo, state, prompts(32), share_of_five, reference=reference, pretrain=text_batches, place=(0, 0))
    with pytest.raises(ValueError, match="20 responses cannot be cut into minibatches of 16"):
        iteration(ppo, state, prompts(20), share_of_five, reference=reference, place=(0, 0))
    with pytest.raises(ValueError, match="actor_lora=None; give actor without actor_base"):
        init(ppo, {}, {}, actor_base={})
    optimizer = make_optimizer(AdamW(), Constant(), 1)
    keywords = {"actor_optimizer": optimizer, "critic_optimizer": optimizer, "seed": 0}
    with pytest.raises(ValueError, match="no stop ids"):
        make_ppo(SETTINGS, CONFIG, ppo.critic_config, stop_ids=(), **keywords)
    with pytest.raises(ValueError, match="leave its new head untrained"):
        make_ppo(SETTINGS, CONFIG, ppo.critic_config, stop_ids=(EOS,), critic_lora=LORA, **keywords)
    with pytest.raises(ValueError, match="head='scalar' is wanted"):
        make_ppo(SETTINGS, CONFIG, CONFIG, stop_ids=(EOS,), **keywords)


def test_the_published_recipe_is_the_default():
    config = PPOConfig()
    assert (config.kl, config.gae_lambda, config.top_p) == (KLInReward(0.01), 0.99, 0.9)
    assert config.pretrain_coefficient == 0.5
    assert (ACTOR_OPTIMIZER.peak_lr, CRITIC_OPTIMIZER.peak_lr) == (1e-6, 5e-6)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: KLInLoss(estimator="k1"), "k1 in the loss does nothing.*KLInReward"),
        (lambda: KLInLoss(estimator="k4"), "k2 or k3, given 'k4'"),
        (lambda: KLInReward(-0.1), "must not be negative"),
        (lambda: PPOConfig(clip=0.0, top_p=1.5), "clip=0.0, top_p=1.5"),
        (lambda: PPOConfig(minibatch_size=8, accumulate=3), "accumulate=3"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
