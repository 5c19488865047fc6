"""Initial weights: normal with 0.02, and 0.02 / sqrt(2 (i + 1)) for what writes into the residual stream at layer i."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import decoder
from internjax.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=512, d_model=128, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16, ffn_dim=256, dtype="float32"
)


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def std(array):
    return np.asarray(array, np.float64).std()


@pytest.mark.parametrize(("part", "name"), [("attention", "output"), ("ffn", "down")])
def test_projections_back_into_the_residual_shrink_with_depth(params, part, name):
    kernel = params["layers"][part][name]["kernel"]
    for layer in range(CONFIG.num_layers):
        assert std(kernel[layer]) == pytest.approx(0.02 / np.sqrt(2 * (layer + 1)), rel=0.02)


@pytest.mark.parametrize(
    ("part", "name"),
    [("attention", "query"), ("attention", "key"), ("attention", "value"), ("ffn", "gate"), ("ffn", "up")],
)
def test_all_other_matrices_have_the_plain_deviation_in_every_layer(params, part, name):
    kernel = params["layers"][part][name]["kernel"]
    for layer in range(CONFIG.num_layers):
        assert std(kernel[layer]) == pytest.approx(0.02, rel=0.03)
        assert abs(np.asarray(kernel[layer]).mean()) < 1e-3


def test_embedding_head_and_norms(params):
    assert std(params["embed"]["embedding"]) == pytest.approx(0.02, rel=0.02)
    assert std(params["head"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    for norm in (params["norm"], params["layers"]["attention_norm"], params["layers"]["ffn_norm"]):
        np.testing.assert_array_equal(norm["scale"], 1.0)


def test_the_deviation_and_the_stored_type_are_the_config_s():
    config = dataclasses.replace(CONFIG, initializer_range=0.1, param_dtype="bfloat16")
    params = decoder.init(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert std(params["embed"]["embedding"].astype(jnp.float32)) == pytest.approx(0.1, rel=0.02)
    assert std(params["layers"]["ffn"]["down"]["kernel"][3].astype(jnp.float32)) == pytest.approx(
        0.1 / np.sqrt(8), rel=0.02
    )


def test_layers_differ_and_seeds_repeat(params):
    kernel = params["layers"]["ffn"]["up"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01
    again = decoder.init(CONFIG, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    other = decoder.init(CONFIG, jax.random.key(1))
    assert np.abs(other["head"]["kernel"] - params["head"]["kernel"]).max() > 0.01
