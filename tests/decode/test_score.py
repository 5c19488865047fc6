"""Scores of given tokens against log-softmax written out, packed rows against rows alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from internjax.decode import score
from internjax.model import decoder
from internjax.model.config import DynamicNTK, ModelConfig
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=50,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position_embeddings=8,
    initializer_range=0.2,
    dtype="float32",
)
PARAMS = random_params(CONFIG)
TOKENS = np.random.default_rng(1).integers(0, 50, (3, 12)).astype(np.int32)
logits = jax.jit(decoder.logits, static_argnames="config")
logprobs = jax.jit(score.logprobs, static_argnames=("config", "chunk_size"))
last_scores = jax.jit(score.last_scores, static_argnames=("config", "chunk_size", "num_scored"))


def by_hand(tokens_BT, temperature, **inputs):
    logits_BTV = np.asarray(logits(PARAMS, tokens_BT, config=CONFIG, **inputs), np.float64) / temperature
    logits_BTV -= np.log(np.exp(logits_BTV).sum(axis=-1, keepdims=True))
    chosen_BT = np.take_along_axis(logits_BTV[:, :-1], np.asarray(tokens_BT)[:, 1:, None], axis=-1)[..., 0]
    return np.concatenate([np.zeros((len(tokens_BT), 1)), chosen_BT], axis=1)


def test_scores_equal_log_softmax():
    np.testing.assert_allclose(logprobs(PARAMS, TOKENS, config=CONFIG), by_hand(TOKENS, 1.0), atol=1e-5)
    rows = np.array([0.5, 1.0, 2.0], np.float32)
    scores = logprobs(PARAMS, TOKENS, config=CONFIG, temperature=rows)
    np.testing.assert_allclose(scores, by_hand(TOKENS, rows[:, None, None]), atol=1e-5)
    one = logprobs(PARAMS, TOKENS, config=CONFIG, temperature=2.0)
    np.testing.assert_allclose(one, by_hand(TOKENS, 2.0), atol=1e-5)


def test_scores_in_chunks_are_the_same():
    np.testing.assert_allclose(
        logprobs(PARAMS, TOKENS, config=CONFIG, chunk_size=4), logprobs(PARAMS, TOKENS, config=CONFIG), atol=1e-6
    )


def test_packed_rows_score_like_rows_alone():
    lengths = (5, 4)
    packed = np.concatenate([TOKENS[0, :5], TOKENS[1, :4], np.zeros(3, np.int32)])[None]
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]])
    scores = logprobs(PARAMS, packed, config=CONFIG, positions_BT=positions, segments_BT=segments)[0]
    wanted = by_hand(TOKENS, 1.0)  # of rows alone; what stands after a token does not matter
    np.testing.assert_allclose(scores[:5], wanted[0, :5], atol=1e-5)
    np.testing.assert_allclose(scores[5:9], wanted[1, :4], atol=1e-5)
    np.testing.assert_array_equal(scores[9:], 0.0)
    assert scores[5] == 0.0 and sum(lengths) == 9


def test_the_last_tokens_of_padded_rows():
    lengths = np.array([12, 7, 9])
    padded = np.where(np.arange(12) < lengths[:, None], TOKENS, 0)
    for chunk_size in (256, 2):
        scores = last_scores(PARAMS, padded, lengths, num_scored=5, config=CONFIG, chunk_size=chunk_size)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(
                scores.logprobs_BS[row], by_hand(TOKENS, 1.0)[row, length - 5 : length], atol=1e-5
            )
    top = np.asarray(logits(PARAMS, TOKENS, config=CONFIG)).argmax(axis=-1)
    greedy = np.concatenate([TOKENS[:, :11], top[:, 10:11]], axis=1)
    assert last_scores(PARAMS, greedy, lengths * 0 + 12, num_scored=1, config=CONFIG).is_top_BS.all()
    other = (greedy + np.arange(12) // 11) % 50  # the last token is another
    assert not last_scores(PARAMS, other, lengths * 0 + 12, num_scored=1, config=CONFIG).is_top_BS.any()


def test_adapters_and_frequencies_reach_the_model():
    lora_config = LoraConfig(rank=2)
    make = jax.jit(lambda key: jax.tree.map(lambda x: x + 0.2, init_lora(lora_config, PARAMS, key)))
    weights = make(jax.random.key(2))
    lora = apply_config(weights, lora_config)
    np.testing.assert_allclose(
        logprobs(PARAMS, TOKENS, config=CONFIG, lora=lora), by_hand(TOKENS, 1.0, lora=lora), atol=1e-5
    )
    frequencies = jnp.full((1, 4), 0.3)
    np.testing.assert_allclose(
        logprobs(PARAMS, TOKENS, config=CONFIG, inv_freq_BF=frequencies),
        by_hand(TOKENS, 1.0, inv_freq_BF=frequencies),
        atol=1e-5,
    )


def test_rows_longer_than_the_model_was_trained_for_are_scaled_by_their_length():
    scaled = logprobs(PARAMS, TOKENS, config=replace(CONFIG, rope_scaling=DynamicNTK(2.0)))
    assert np.abs(scaled - logprobs(PARAMS, TOKENS, config=CONFIG)).max() > 1e-3
    short = TOKENS[:, :8]
    np.testing.assert_array_equal(
        logprobs(PARAMS, short, config=replace(CONFIG, rope_scaling=DynamicNTK(2.0))),
        logprobs(PARAMS, short, config=CONFIG),
    )


def test_gradients_reach_every_parameter():
    grads = jax.jit(jax.grad(lambda p: score.logprobs(p, TOKENS, config=CONFIG).sum()))(PARAMS)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
