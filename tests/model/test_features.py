"""What only some families have: each is felt, decodes as it reads, and lives with adapters and quantised kernels."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from internjax.model import alibi, decoder, rope
from internjax.model.cache import paged_cache
from internjax.model.config import Llama3Scaling, ModelConfig, NoScaling, num_params
from internjax.model.lora import LoraConfig, apply_config, init_lora, merge
from internjax.model.quantize import QuantArray, dequantize_params, quantize_params
from tests.weights import random_params

PLAIN = ModelConfig(
    vocab_size=37,
    d_model=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=28,
    initializer_range=0.3,
    dtype="float32",
)
# As many features as go together, so that two programs check them all.
TURNED = dataclasses.replace(
    PLAIN,
    window=5,
    rotary_dim=4,
    attention_bias="all",
    ffn_bias=True,
    qk_norm=True,
    rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 64),
)
SLOPED = dataclasses.replace(PLAIN, positions="alibi", attention_bias="qkv", norm_head=True)
BOTH = pytest.mark.parametrize("config", [TURNED, SLOPED], ids=["turned", "sloped"])
T = 12


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(3, PLAIN.vocab_size, (2, T), np.int32)


@functools.partial(jax.jit, static_argnames="config")
def cached_step(params, tokens, positions, cache, *, config):
    out = decoder.forward(params, tokens, config=config, positions_BT=positions, cache=cache)
    return decoder.unembed(params, out.hidden_BTD, config=config), out.cache


@BOTH
def test_parameters_have_axes_and_are_counted(config):
    shapes, axes = decoder.abstract_params(config), decoder.logical_axes(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == num_params(config)
    jax.tree.map(lambda shape, names: np.testing.assert_equal(len(names), len(shape.shape)), shapes, axes)
    assert axes["layers"]["attention"]["key"]["bias"] == ("layers", "kv_heads")
    assert ("bias" in axes["layers"]["attention"]["output"]) == (config.attention_bias == "all")


def test_features_that_are_off_leave_no_parameters():
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(decoder.abstract_params(PLAIN))}
    assert names == {"kernel", "scale", "embedding"}


@BOTH
def test_decoding_with_a_cache_is_the_full_forward(tokens, config):
    params = random_params(config)
    cache = paged_cache(config, 9, 4, batch=2, pages_per_row=4, dtype="float32")
    cache = dataclasses.replace(cache, page_table_BM=np.array([[7, 1, 4, 9], [0, 8, 3, 9]], np.int32))
    got = []
    for start, stop in [(0, 8), *((t, t + 1) for t in range(8, T))]:
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, stop - start))
        logits, cache = cached_step(params, tokens[:, start:stop], positions, cache, config=config)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, axis=1), decoder.logits(params, tokens, config=config), atol=2e-5)


@BOTH
def test_packed_documents_are_the_separate_ones(tokens, config):
    params = random_params(config)
    positions = np.array([[*range(5), *range(7)]] * 2, np.int32)
    segments = np.array([[1] * 5 + [2] * 7] * 2, np.int32)
    packed = decoder.logits(params, tokens, config=config, positions_BT=positions, segments_BT=segments)
    first = np.asarray(decoder.logits(params, np.where(np.arange(T) < 5, tokens, 3), config=config))[:, :5]
    second = np.asarray(decoder.logits(params, np.roll(tokens, -5, axis=1), config=config))[:, :7]
    np.testing.assert_allclose(packed, np.concatenate([first, second], axis=1), atol=2e-5)


def test_a_window_is_felt_exactly_where_it_ends(tokens):
    """Two layers of a window of 5 reach 2 * 4 tokens back and no further."""
    params = random_params(TURNED)
    changed = np.where(np.arange(T) == 2, (tokens + 1) % PLAIN.vocab_size, tokens)
    logits, moved = (np.asarray(decoder.logits(params, given, config=TURNED)) for given in (tokens, changed))
    difference = np.abs(logits - moved).max(axis=(0, 2))
    assert (difference[:2] == 0).all() and (difference[2:11] > 1e-4).all() and difference[11] == 0


@BOTH
def test_adapters_and_quantised_kernels_stand_beside_biases(tokens, config):
    params = random_params(config)
    lora_config = LoraConfig(rank=2, alpha=4.0)
    weights = jax.device_get(init_lora(lora_config, params, jax.random.key(3)))
    lora = apply_config(jax.tree.map(lambda leaf: leaf + np.float32(0.05), weights), lora_config)
    want = decoder.logits(merge(params, lora), tokens, config=config)
    np.testing.assert_allclose(decoder.logits(params, tokens, config=config, lora=lora), want, atol=3e-5)
    packed = jax.jit(functools.partial(quantize_params, scheme="int8", group=8, double=True))(params)
    assert isinstance(packed["layers"]["attention"]["query"]["kernel"], QuantArray)
    assert not isinstance(packed["layers"]["attention"]["query"]["bias"], QuantArray)
    want = decoder.logits(
        jax.jit(dequantize_params)(packed), tokens, config=config
    )  # the head of `sloped` is normalised in few bits
    np.testing.assert_allclose(decoder.logits(packed, tokens, config=config), want, atol=3e-5)


def test_slopes_by_hand():
    np.testing.assert_allclose(alibi.slopes(4), [1 / 4, 1 / 16, 1 / 64, 1 / 256])
    np.testing.assert_allclose(alibi.slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8])
    forty = alibi.slopes(40)  # Baichuan2-13B
    np.testing.assert_allclose(forty[[0, 31, 32, 39]], 2.0 ** np.array([-1 / 4, -8, -1 / 8, -15 / 8]), rtol=1e-6)


def test_frequencies_of_llama_3_by_hand():
    # 128 dimensions, base 500000: kept above 4 turns in 8192 positions, an eighth below 1 turn, a blend between.
    sizes = {"head_dim": 128, "rope_theta": 500_000.0}
    config = dataclasses.replace(PLAIN, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192), **sizes)
    plain = np.asarray(rope.inv_freq(dataclasses.replace(config, rope_scaling=NoScaling())), np.float64)
    scaled = np.asarray(rope.inv_freq(config), np.float64)
    turns = plain * 8192 / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    share = (turns[between] - 1) / 3
    assert between.sum() == 6
    np.testing.assert_allclose(scaled[between], plain[between] * (share + (1 - share) / 8), rtol=1e-5)


def test_pairs_beyond_the_rotary_dimensions_keep_still():
    config = dataclasses.replace(PLAIN, rotary_dim=4, rope_theta=100.0)
    np.testing.assert_allclose(rope.inv_freq(config), [1.0, 0.1, 0.0, 0.0])
    x = np.random.default_rng(0).standard_normal((1, 1, 1, 8), np.float32)
    rotated = jax.jit(lambda x: rope.rotate(x, rope.rotation(np.array([[3]]), rope.inv_freq(config)[None])))
    turned, still = np.asarray(rotated(x)), np.array([2, 3, 6, 7])
    np.testing.assert_array_equal(turned[..., still], x[..., still])
    assert np.abs(turned - x)[..., np.array([0, 1, 4, 5])].min() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 10}, "in 2..8"),
        ({"rotary_dim": 3}, "must be even"),
        ({"window": 0}, "at least 1 token"),
        ({"positions": "alibi", "rotary_dim": 4}, "turns no heads"),
        ({"positions": "alibi", "rope_scaling": Llama3Scaling()}, "turns no heads"),
    ],
)
def test_features_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **fields)


def test_llama3_scaling_that_cannot_be():
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        Llama3Scaling(low_freq_factor=4.0, high_freq_factor=1.0)
