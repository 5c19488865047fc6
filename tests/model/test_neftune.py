"""Noise on embeddings: its bound by the length of each document, none on padding, the same packed or alone."""

import jax
import numpy as np

from internjax.model.config import ModelConfig
from internjax.model.neftune import add_noise
from internjax.train.batch import Batch
from internjax.train.losses import next_token
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, dtype="float32"
)


def test_noise_fills_its_bounds_per_document_and_leaves_padding():
    segments = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    x = np.ones((2, 8, 2048), np.float32)

    @jax.jit
    def noise_of(key):
        return add_noise(x, segments, key, alpha=5.0) - x

    noise = np.asarray(noise_of(jax.random.key(0)))
    lengths = np.array([[4, 4, 4, 4, 2, 2, 0, 0], [8] * 8])
    bounds = np.where(lengths > 0, 5.0 / np.sqrt(np.maximum(lengths, 1) * 2048), 0.0)
    largest = np.abs(noise).max(axis=-1)
    np.testing.assert_allclose(largest, bounds, rtol=0.01)
    assert (largest <= bounds * 1.001).all() and (noise[0, 6:] == 0).all()
    np.testing.assert_allclose(noise.mean(axis=-1), 0, atol=4 * bounds.max() / np.sqrt(3 * 2048))
    np.testing.assert_array_equal(noise, noise_of(jax.random.key(0)))
    assert np.abs(noise - np.asarray(noise_of(jax.random.key(1)))).max() > 0.01


def test_training_draws_noise_from_the_step_s_key_and_nothing_else_does():
    params = random_params(SMALL)
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, tokens + 1, ones.astype(np.float32), np.arange(8, dtype=np.int32) * ones, ones)
    losses = {alpha: jax.jit(next_token(SMALL, neftune_alpha=alpha)) for alpha in (0.0, 5.0)}
    totals = {
        (alpha, seed): float(loss(params, None, batch, jax.random.key(seed)).total)
        for alpha, loss in losses.items()
        for seed in (0, 1)
    }
    assert totals[0.0, 0] == totals[0.0, 1]
    assert len({round(total, 4) for total in totals.values()}) == 3
    assert totals[5.0, 0] == float(losses[5.0](params, None, batch, jax.random.key(0)).total)
