"""Calibrated quantisation: what is gathered, what is folded, and that rounding by it loses less where it counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import awq, calibrate, decoder, gptq
from internjax.model.calibrate import READERS, Statistics
from internjax.model.config import ModelConfig
from internjax.model.quantize import QuantArray, dequantize, quantize_array
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)
CONFIG = dataclasses.replace(SMALL, attention_bias="all", ffn_bias=True, qk_norm=True, initializer_range=0.15)
GROUP = 16
ROWS = np.random.default_rng(0).integers(0, 64, (3, 2, 24))


def correlated(num: int, features: int, seed: int = 0) -> np.ndarray:
    """Vectors whose features go together, a few of them much larger than the rest."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((num, 6)) @ random.standard_normal((6, features))
    x += 0.3 * random.standard_normal((num, features))
    return (x * np.where(np.arange(features) % 11 == 3, 12.0, 1.0)).astype(np.float32)


def statistics_of(x: np.ndarray) -> Statistics:
    return Statistics(jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0)), jnp.float32(len(x)))


def loss(x, kernel, array) -> float:
    return float(np.square(x @ (np.asarray(jax.jit(dequantize)(array)) - kernel)).sum())


def test_layers_see_what_the_quantised_layers_before_them_give():
    params = random_params(CONFIG)
    seen, done = [], []

    def halved(layer, statistics):
        seen.append(jax.device_get(statistics))
        return jax.tree.map(lambda leaf: leaf / 2, layer)

    got = calibrate.quantize_layers(params, ROWS, config=CONFIG, quantize_layer=halved, on_layer=done.append)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 2), got["layers"], params["layers"])
    assert got["head"] is params["head"] and done == [1, 2]
    # The reference: the first layer halved and the second as it was, looked at from outside.
    layers = jax.tree.map(lambda leaf: leaf.at[0].divide(2), params["layers"])
    hidden = []
    for tokens in ROWS:
        one = dataclasses.replace(CONFIG, num_layers=1)
        first = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], layers), "norm": {"scale": jnp.ones(32)}}
        x = decoder.forward(first, jnp.asarray(tokens), config=one).hidden_BTD
        hidden.append(np.asarray(x) * np.asarray(layers["attention_norm"]["scale"][1]))
    x = np.concatenate(hidden).reshape(-1, 32)
    found = seen[1]["query"]
    np.testing.assert_allclose(found.moment_II, x.T @ x, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.magnitude_I, np.abs(x).sum(0), rtol=1e-4)
    assert found.count == ROWS.size and {name: each.moment_II.shape[0] for name, each in seen[0].items()} == {
        "query": 32, "output": 32, "gate": 32, "down": 64
    }  # fmt: skip
    assert sum(len(readers) for readers in READERS.values()) == 7


def test_the_decoder_layer_by_layer_is_the_decoder():
    params = random_params(CONFIG)
    tokens = jnp.asarray(ROWS[0])
    x, inputs = decoder.begin(params, tokens, config=CONFIG)
    for index in range(CONFIG.num_layers):
        x = decoder.layer(jax.tree.map(lambda leaf: leaf[index], params["layers"]), x, inputs, config=CONFIG)  # noqa: B023
    whole = decoder.forward(params | {"norm": {"scale": jnp.ones(32)}}, tokens, config=CONFIG).hidden_BTD
    normed = np.asarray(x) / np.sqrt(np.square(x).mean(-1, keepdims=True) + CONFIG.norm_eps)
    np.testing.assert_allclose(normed, whole, atol=1e-5)


@pytest.mark.parametrize("norm_dtype", ["float32", "bfloat16"])
def test_awq_folds_its_scales_without_changing_the_model(norm_dtype, monkeypatch):
    """With nothing rounded, what AWQ leaves computes what it was given, biases and shared key/value heads included."""
    params = random_params(CONFIG)
    norms = {
        name: {"scale": params["layers"][name]["scale"].astype(norm_dtype)} for name in ("attention_norm", "ffn_norm")
    }
    params |= {"layers": params["layers"] | norms}

    def unrounded(kernel, *, group, shrink=1.0, **how):
        I, O = kernel.shape
        ones = jnp.ones((1, O), jnp.float32)
        return QuantArray(kernel, ones, None, "int8", I, I, O, "float32")

    moved = []

    def odd_scale(kernels, statistics, *, group, shared=None):
        size = len(statistics.magnitude_I)
        scale = jnp.exp(jnp.sin(jnp.arange(size, dtype=jnp.float32)))
        moved.append(size)
        return scale if shared is None else jnp.broadcast_to(scale.reshape(shared)[:, :1], shared).reshape(-1)

    monkeypatch.setattr(awq, "quantize_array", unrounded)
    monkeypatch.setattr(awq, "_search_scale", odd_scale)
    monkeypatch.setattr(awq, "_search_clip", lambda kernel, moment, *, group: 1.0)
    fold = functools.partial(awq.quantize_layer, config=CONFIG, group=GROUP, rounding="nearest")
    folded = calibrate.quantize_layers(params, ROWS[:1], config=CONFIG, quantize_layer=fold)
    assert moved == [32, 32, 32, 64] * 2
    before, after = params["layers"], folded["layers"]
    assert after["attention_norm"]["scale"].dtype == norm_dtype
    assert np.abs(np.asarray(after["attention_norm"]["scale"] - before["attention_norm"]["scale"])).max() > 0.1
    wanted = decoder.logits(params, ROWS[0], config=CONFIG)
    np.testing.assert_allclose(decoder.logits(folded, ROWS[0], config=CONFIG), wanted, atol=2e-4)


def test_scales_and_ranges_lose_less_on_inputs_that_differ():
    x = correlated(300, 64)
    kernel = 0.1 * np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32)
    stats = statistics_of(x)
    how = {"scheme": "int4", "scale_dtype": "float16", "group": 16}
    nearest = loss(x, kernel, quantize_array(kernel, **how))
    scale = np.asarray(jax.jit(functools.partial(awq._search_scale, group=16))([kernel], stats))
    assert scale.max() / scale.min() > 1.5
    scaled = quantize_array(kernel * scale[:, None], **how)
    lost = float(np.square(x @ (np.asarray(dequantize(scaled)) / scale[:, None] - kernel)).sum())
    assert lost < 0.8 * nearest
    shrink = jax.jit(functools.partial(awq._search_clip, group=16))(jnp.asarray(kernel), stats.moment_II)
    assert shrink.shape == (4, 24) and 0.54 < shrink.min() < shrink.max() == 1.0


@pytest.mark.parametrize(
    ("how", "limit"),
    [
        ({"group": 16}, 0.5),
        ({"group": 48, "act_order": True}, 0.5),
        ({"group": -1, "symmetric": False}, 0.5),
        ({"group": 16, "scheme": "int8", "symmetric": False}, 0.5),
    ],
)
def test_gptq_loses_less_than_nearest_and_says_what_it_computes(how, limit):
    x = correlated(400, 96)
    kernel = 0.1 * np.random.default_rng(1).standard_normal((96, 24)).astype(np.float32)
    names = {"attention": ("query", "key", "value", "output"), "ffn": ("gate", "up", "down")}
    layer = {half: {name: {"kernel": jnp.asarray(kernel)} for name in each} for half, each in names.items()}
    got = gptq.quantize_layer(layer, dict.fromkeys(READERS, statistics_of(x)), **how)
    array = got["ffn"]["down"]["kernel"]
    group = 96 if how["group"] == -1 else how["group"]
    assert (array.group, array.order, array.scales.dtype, array.scales.shape) == (
        group,
        None,
        "float16",
        (96 // group, 24),
    )
    scheme, symmetric = how.get("scheme", "int4"), how.get("symmetric", True)
    nearest = quantize_array(kernel, scheme=scheme, group=group, symmetric=symmetric, scale_dtype="float16")
    assert loss(x, kernel, array) < limit * loss(x, kernel, nearest)


def test_gptq_is_the_algorithm_of_the_paper():
    """Against it in NumPy, one row after the other, with the inverse by its definition and no blocks."""
    x = correlated(200, 32)
    kernel = np.random.default_rng(2).standard_normal((32, 5)).astype(np.float32)
    moment = (x.T @ x).astype(np.float64)
    damped = moment + gptq.DAMPING * np.diag(moment).mean() * np.eye(32)
    left, wanted = kernel.astype(np.float64), np.zeros((32, 5))
    for i in range(32):
        if i % 8 == 0:
            step = (2 * np.abs(left[i : i + 8]).max(0) / 15).astype(np.float16).astype(np.float64)
        wanted[i] = (np.clip(np.round(left[i] / step), -8, 7)) * step
        inverse = np.linalg.inv(damped[i:, i:])  # of the rows that are left
        left[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], left[i] - wanted[i])
    factor = gptq.inverse_factor(jnp.asarray(moment, jnp.float32))
    array = gptq.quantize_rows(
        jnp.asarray(kernel), factor, jnp.arange(32), group=8, grid=gptq.Grid("int4", True, "float16")
    )
    np.testing.assert_allclose(dequantize(array), wanted, atol=1e-5)


def test_moments_that_are_not_positive_are_damped_until_they_are():
    x = np.zeros((4, 8), np.float32)
    x[:, :3] = [1.0, 2.0, 3.0]  # one direction, and inputs that never came
    moment = jnp.asarray(x.T @ x) - 0.2 * jnp.diag(jnp.asarray(x[0] > 0, jnp.float32))
    factor = np.asarray(gptq.inverse_factor(moment))
    assert np.isfinite(factor).all() and np.allclose(factor, np.triu(factor)) and (np.diag(factor) > 0).all()


def test_awq_rounds_either_way_on_the_same_scales():
    x = correlated(400, 32)
    layer = jax.tree.map(lambda leaf: leaf[0], random_params(SMALL)["layers"])
    stats = dict.fromkeys(("query", "output", "gate"), statistics_of(x)) | {"down": statistics_of(correlated(400, 64))}
    kernel = layer["attention"]["key"]["kernel"]
    lost = []
    for rounding in ("nearest", "gptq"):
        got = awq.quantize_layer(layer, stats, config=SMALL, group=GROUP, rounding=rounding)
        norms = [np.asarray(each["attention_norm"]["scale"]) for each in (layer, got)]
        array = got["attention"]["key"]["kernel"]
        assert (array.shape, array.dtype, array.zeros.dtype) == ((32, 16), "float32", "uint8")
        lost.append(loss(x * (norms[1] / norms[0]), np.asarray(kernel) * (norms[0] / norms[1])[:, None], array))
    plain = loss(x, np.asarray(kernel), quantize_array(kernel, scheme="int4", group=GROUP))
    assert lost[1] < lost[0] < plain
