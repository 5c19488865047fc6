"""The reward model: golden values, gradients outside the barrier, inputs by hand, conditions that separate."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig, apply_config, init_lora
from internjax.rlhf import pairs, reward
from internjax.rlhf.pairs import Pair, make_conditions, preference_batch, preference_batches
from internjax.rlhf.rows import Rows, concatenate, sample_seeds
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step
from tests.weights import random_params

BOS, EOS, REWARD = 1, 2, 15
score_pairs = jax.jit(reward.score_pairs, static_argnames="config")
score = jax.jit(reward.score, static_argnames="config")
joined = jax.jit(concatenate, static_argnames=("length", "pad_id"))
focal = jax.jit(reward.focal_ranking_loss)
barrier = jax.jit(functools.partial(reward.log_barrier, bound=5.0, limit=4.9))
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


@functools.cache
def reward_model():
    params = random_params(CONFIG)
    return reward.from_lm(params, CONFIG, jax.random.key(1))


OPTIMIZER = make_optimizer(AdamW(peak_lr=1e-2, weight_decay=0.01), Constant(), 1000)


@functools.cache
def ranking_step(lora_config=None):
    """Shared between tests, as it is compiled once: for batches of 32 pairs, 14 tokens long."""
    return make_step(reward.ranking(reward_model()[1], lora_config=lora_config), OPTIMIZER)


# Derived from the formulas of arXiv:2403.17297 section 4.2.1 with gamma 2 and bound 5.
FOCAL = {
    -4: 4.0181499,
    -1: 1.3132617,
    0: 0.6931472,
    0.5: 0.2702940,
    1: 0.0906322,
    2: 0.0072143,
    3: 4.37133e-4,
    4: 2.34863e-5,
}
BARRIER = {0: -3.218876, 1: -3.178054, 3: -2.772589, 4: -2.197225, 4.9: 0.010050}


@pytest.mark.parametrize("margin, wanted", FOCAL.items())
def test_focal_ranking_loss_golden_values(margin, wanted):
    got = focal(np.float32(margin), gamma=2.0)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("x, wanted", BARRIER.items())
def test_log_barrier_golden_values(x, wanted):
    for sign in (1, -1):
        np.testing.assert_allclose(barrier(np.float32(sign * x)), wanted, rtol=2e-6, atol=5e-6)


def test_the_focal_factor_is_differentiated():
    # d/dm of -(2 - 2 P)^2 log P at m = 1: 8 P (1 - P)^2 log P - 4 (1 - P)^3.
    p = 1 / (1 + np.exp(-1.0))
    wanted = 8 * p * (1 - p) ** 2 * np.log(p) - 4 * (1 - p) ** 3
    got = jax.jit(jax.grad(reward.focal_ranking_loss))(1.0, gamma=2.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    stopped = -4 * (1 - p) ** 3
    assert abs(float(got) - stopped) > 0.05


def test_gamma_zero_is_bradley_terry_and_wide_margins_have_finite_gradients():
    margins = np.linspace(-60.0, 200.0, 27, dtype=np.float32)
    np.testing.assert_allclose(focal(margins, gamma=0.0), np.logaddexp(0, -margins), rtol=1e-5, atol=1e-30)
    slopes_of = jax.jit(jax.vmap(jax.grad(lambda m, gamma: reward.focal_ranking_loss(m, gamma=gamma)), (0, None)))
    for gamma in (0.0, 0.5, 2.0):
        slopes = slopes_of(margins, gamma)
        assert np.all(np.isfinite(slopes)) and np.all(slopes <= 0)


def test_the_barrier_pulls_escaped_scores_back():
    compiled = jax.jit(jax.vmap(jax.grad(barrier)))

    def slope(*scores):  # of one shape
        return np.asarray(compiled(np.resize(np.array(scores, np.float32), 5)))[: len(scores)]

    np.testing.assert_allclose(slope(4.5, 4.9, -4.9), [1.894737, 9.898990, -9.898990], rtol=1e-4)
    # Continuous with its slope at the limit, and of full strength however far outside.
    np.testing.assert_allclose(slope(4.8999, 4.9001, 5.0, 7.0, -100.0), [9.89, 9.9, 9.9, 9.9, -9.9], rtol=2e-3)
    x = 7.0
    for _ in range(20):
        x -= 0.1 * slope(x)[0]
    assert abs(x) < 4.5
    np.testing.assert_allclose(barrier(np.float32(6.9)), 0.010050 + 2 * 9.898990, rtol=1e-5)


def test_from_lm_replaces_the_head_by_one_number():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    params = {name: leaf for name, leaf in reward_model()[0].items() if name != "head"}
    model, config = reward.from_lm(params, tied)
    assert config.head == "scalar" and not config.tie_embeddings
    assert model["head"]["kernel"].shape == (32, 1) and set(model["head"]) == {"kernel"}
    assert model["embed"]["embedding"] is params["embed"]["embedding"]
    rows, lengths = np.ones((2, 5), np.int32), np.array([3, 5])
    assert np.all(score(model, rows, lengths, config=config) == 0)
    with pytest.raises(ValueError, match="head='scalar' is wanted"):
        score(params, rows, lengths, config=tied)
    with pytest.raises(ValueError, match="head='scalar' is wanted"):
        reward.ranking(tied)


def test_the_score_is_read_at_the_last_real_token():
    params, config = reward_model()
    lengths = np.arange(1, 10)
    rows = np.broadcast_to(np.random.default_rng(5).integers(0, 16, 9, np.int32), (9, 9))
    every = np.asarray(decoder.logits(params, rows[:1], config=config))[0, :, 0]
    np.testing.assert_allclose(score(params, rows, lengths, config=config), every, atol=1e-5)
    # What stands in the padding changes nothing.
    garbage = np.where(np.arange(9) < lengths[:, None], rows, np.int32(7))
    np.testing.assert_array_equal(
        score(params, garbage, lengths, config=config), score(params, rows, lengths, config=config)
    )


def test_rows_are_joined_without_gaps():
    first = Rows(np.array([[5, 6, 0], [7, 0, 0]]), np.array([2, 1]))
    second = Rows(np.array([[8, 9], [3, 4]]), np.array([0, 2]))
    got = joined([first, second, first])
    assert got.tokens_BT.tolist() == [[5, 6, 5, 6, 0, 0, 0, 0], [7, 3, 4, 7, 0, 0, 0, 0]]
    assert got.lengths_B.tolist() == [4, 4]
    cut = joined([first, second], length=2, pad_id=-1)
    assert cut.tokens_BT.tolist() == [[5, 6], [7, 3]] and cut.lengths_B.tolist() == [2, 2]


def test_the_reward_token_is_appended_unless_it_is_there():
    rows = Rows(np.array([[4, 5, 0], [4, REWARD, 0], [4, 5, 6]]), np.array([2, 2, 3]))
    got = jax.jit(functools.partial(pairs.with_reward_token, reward_token_id=REWARD))(rows)
    assert got.tokens_BT.tolist() == [[4, 5, REWARD, 0], [4, REWARD, 0, 0], [4, 5, 6, REWARD]]
    assert got.lengths_B.tolist() == [3, 2, 4]


def test_condition_prompt_response_reward_token():
    conditions = make_conditions({"long": [BOS, 8, 9], "short": [BOS, 7]}, bos_id=BOS)
    rows = Rows(np.array([[BOS, 4, 5, EOS], [BOS, 4, 0, 0], [6, 6, 0, 0]]), np.array([4, 2, 2]))
    index = np.array([conditions.index(name) for name in ("long", "short", "short")])
    got = jax.jit(functools.partial(pairs.with_condition, conditions, reward_token_id=REWARD))(index, rows)
    wanted = [[BOS, 8, 9, 4, 5, EOS, REWARD, 0], [BOS, 7, 4, REWARD, 0, 0, 0, 0], [BOS, 7, 6, 6, REWARD, 0, 0, 0]]
    assert got.tokens_BT.tolist() == wanted
    assert got.lengths_B.tolist() == [7, 4, 5]
    # The training side writes the same rows.
    batch = preference_batch(
        [Pair([BOS, 4], [5, EOS], [], "long"), Pair([BOS], [4], [4, 6], "short")],
        conditions,
        length=8,
        batch_size=3,
        reward_token_id=REWARD,
    )
    assert batch.chosen.tolist()[:2] == wanted[:2] and batch.chosen_lengths.tolist() == [7, 4, 1]
    assert batch.weight.tolist() == [1, 1, 0]
    # And scoring rollouts equals scoring the finished rows.
    params, config = reward_model()
    np.testing.assert_allclose(
        reward.score_responses(params, conditions, index, rows, config=config, reward_token_id=REWARD),
        reward.get_scores(
            params, [row[:n] for row, n in zip(wanted, (7, 4, 5))], config=config, reward_token_id=REWARD
        ),
        atol=1e-6,
    )


def test_what_is_wrong_with_conditions_and_pairs_is_said():
    conditions = make_conditions({"a": [BOS]}, bos_id=BOS)
    with pytest.raises(ValueError, match="must begin with BOS"):
        make_conditions({"a": [4, 5]}, bos_id=BOS)
    with pytest.raises(ValueError, match="at least one condition"):
        make_conditions({}, bos_id=BOS)
    with pytest.raises(ValueError, match="unknown condition 'b'; known: a"):
        conditions.index("b")
    with pytest.raises(ValueError, match="rejected side of pair 0 has 6 tokens"):
        preference_batch([Pair([BOS, 4], [5], [5, 6, 7], "a")], conditions, length=5, reward_token_id=REWARD)
    with pytest.raises(ValueError, match="no preference pairs"):
        preference_batches([], conditions, batch_size=4, length=5, reward_token_id=REWARD, seed=0)
    with pytest.raises(ValueError, match="barrier_limit must lie"):
        reward.RankingConfig(barrier_limit=5.0)
    _, config = reward_model()
    with pytest.raises(ValueError, match="add 'head' to the targets"):
        reward.ranking(config, lora_config=LoraConfig())


def test_get_scores_compare_and_rank():
    params, config = reward_model()
    chats = [[BOS, 4, 5, 6], [BOS, 9], [BOS, 4, 5, 6, REWARD], [BOS, 12, 3, 3, 3, 3]]
    keywords = {"config": config, "reward_token_id": REWARD}
    scores = reward.get_scores(params, chats, batch_size=3, **keywords)
    assert scores[0] == scores[2] and len(set(scores.tolist())) == 3
    np.testing.assert_allclose(scores[1], reward.get_score(params, chats[1], **keywords), atol=1e-6)
    order = np.argsort(-scores, kind="stable")
    assert [reward.rank(params, chats, **keywords)[i] for i in order] == [0, 1, 2, 3]
    assert reward.compare(params, chats[order[0]], chats[order[3]], **keywords)
    assert not reward.compare(params, chats[0], chats[2], **keywords)
    assert reward.get_scores(params, [], **keywords).shape == (0,)


def test_seeds_depend_on_their_place_alone():
    few, many = (sample_seeds(3, 1, 4, num_samples=n) for n in (4, 9))
    assert np.array_equal(few, many[:4]) and len(set(many.tolist())) == 9
    assert not np.array_equal(few, sample_seeds(3, 4, 1, num_samples=4))


FAVOURED = (5, 6)


def opposite_preferences(num_pairs: int, seed: int, names: tuple[str, str]) -> list[Pair]:
    """Pairs of a response rich in token 5 and one rich in token 6, each judged both ways."""
    rng = np.random.default_rng(seed)

    def response(token):
        fillers = rng.integers(8, 14, size=6)
        return np.where(rng.random(6) < 0.6, token, fillers).tolist()

    result = []
    while len(result) < 2 * num_pairs:
        five, six = response(5), response(6)
        if five.count(5) and six.count(6):
            prompt = [BOS, int(rng.integers(8, 14))]
            result += [Pair(prompt, five, six, names[0]), Pair(prompt, six, five, names[1])]
    return result


def train_reward_model(conditions, names, *, num_steps=60, lora_config=None):
    params, config = reward_model()
    step, state = ranking_step(lora_config), init_state(jax.tree.map(jnp.copy, params), OPTIMIZER)
    if lora_config is not None:
        lora = jax.jit(functools.partial(init_lora, lora_config))(params, jax.random.key(9))
        state = init_state(lora, OPTIMIZER, frozen=params)
    data = preference_batches(
        opposite_preferences(96, 0, names), conditions, batch_size=32, length=14, reward_token_id=REWARD, seed=0
    )(0)
    for _ in range(num_steps):
        state, metrics = step(state, next(data))
    assert step.num_traces == 1
    held_out = opposite_preferences(100, 1, names)
    adapters = None if lora_config is None else apply_config(state.trainable, lora_config)
    trained = state.trainable if lora_config is None else state.frozen
    right = {name: [] for name in names}
    for name in dict.fromkeys(names):
        batch = preference_batch(
            [pair for pair in held_out if pair.condition == name], conditions, length=14, reward_token_id=REWARD
        )
        chosen, rejected = jax.device_get(score_pairs(trained, batch, config=config, lora=adapters))
        assert np.max(np.abs(np.stack([chosen, rejected]))) < 5.5
        right[name] = chosen > rejected
    return right, metrics


@pytest.mark.parametrize("lora_config", [None, LoraConfig(rank=4, targets=("query", "value", "up", "head"))])
def test_conditions_separate_opposite_preferences(lora_config):
    conditions = make_conditions({"five": [BOS, 3, 3], "six": [BOS, 4, 4]}, bos_id=BOS)
    right, metrics = train_reward_model(conditions, ("five", "six"), num_steps=100, lora_config=lora_config)
    assert min(right["five"].mean(), right["six"].mean()) >= 0.95
    assert float(metrics["accuracy"]) >= 0.9


def test_without_conditions_opposite_preferences_cancel():
    conditions = make_conditions({"any": [BOS]}, bos_id=BOS)
    right, _ = train_reward_model(conditions, ("any", "any"))
    assert 0.4 <= right["any"].mean() <= 0.6
    # Every pair is there both ways, so exactly half (ties are wrong) is right.
    assert right["any"].sum() <= 100


def test_the_loss_is_the_same_however_the_batch_is_cut():
    conditions = make_conditions({"five": [BOS, 3], "six": [BOS, 4]}, bos_id=BOS)
    params, config = reward_model()
    batch = preference_batch(
        opposite_preferences(6, 2, ("five", "six")), conditions, length=14, batch_size=32, reward_token_id=REWARD
    )
    results = []
    for step in (ranking_step(), make_step(reward.ranking(config), OPTIMIZER, accumulate=4)):
        results.append(step(init_state(jax.tree.map(jnp.copy, params), OPTIMIZER), batch)[1])
    for name in ("loss", "ranking", "accuracy", "margin", "score", "grad_norm"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=2e-5, atol=1e-6)
    chosen, rejected = (np.asarray(side)[:12] for side in score_pairs(params, batch, config=config))
    by_hand = focal(chosen - rejected, gamma=2.0) + 0.01 * (barrier(chosen) + barrier(rejected))
    np.testing.assert_allclose(results[0]["loss"], np.mean(by_hand), rtol=1e-5)
