"""Freezing by pattern: what is frozen stays, has no moments, and the rest learns as it would alone."""

import functools

import jax
import numpy as np
import pytest

from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.train.batch import Batch
from internjax.train.freezing import join, joined, split
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=24, dtype="float32"
)
PATTERNS = ("embed.*", "layers.attention.*", "*norm.scale")


def test_two_parts_make_the_whole():
    params = decoder.abstract_params(SMALL)
    trainable, frozen = split(params, PATTERNS)
    assert set(trainable) == {"layers", "head"} and set(trainable["layers"]) == {"ffn"}
    assert set(frozen["layers"]) == {"attention", "attention_norm", "ffn_norm"}
    whole = join(trainable, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True))
    assert join(params, None) is params
    axes = split(decoder.logical_axes(SMALL), PATTERNS)
    assert axes.frozen["embed"]["embedding"] == ("vocab", "embed") and "embed" not in axes.trainable


def test_what_cannot_be_meant_is_refused():
    params = {"embed": {"embedding": 0}, "norm": {"scale": 1}}
    with pytest.raises(
        ValueError, match=r"\['layers.0.\*'\] matches no parameter; the model has embed.embedding, norm"
    ):
        split(params, ("embed.*", "layers.0.*"))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        split(params, ("*",))
    with pytest.raises(ValueError, match="both trees have a leaf 'scale'"):
        join(params, {"norm": {"scale": 2}})


def test_frozen_leaves_stay_and_have_no_moments():
    params = jax.device_get(random_params(SMALL))
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12) % 31
    ones = np.ones_like(tokens)
    positions = np.arange(12, dtype=np.int32) * ones
    batch = Batch(tokens, (tokens + 1) % 31, ones.astype(np.float32), positions, ones)
    optimizer = make_optimizer(AdamW(peak_lr=0.01, clip_norm=None), Constant(), 3)
    trainable, frozen = split(params, PATTERNS)
    state = init_state(trainable, optimizer, frozen=frozen, seed=0)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) < 2.01 * sum(
        leaf.size for leaf in jax.tree.leaves(trainable)
    )
    loss = next_token(SMALL)
    step = make_step(joined(loss), optimizer)
    losses, updated = [], []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        updated.append(jax.device_get(state.trainable))
    assert losses[2] < losses[0]
    after = join(state.trainable, state.frozen)
    moved = split(jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), after, params), PATTERNS)
    assert not any(jax.tree.leaves(moved.frozen)) and all(jax.tree.leaves(moved.trainable))
    # The first update is that of full training, where nothing but the choice of leaves differs.
    whole = make_step(loss, optimizer)(init_state(params, optimizer, seed=0), batch)[0]
    # The two are compiled apart.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    jax.tree.map(close, updated[0], split(whole.trainable, PATTERNS).trainable)
