"""The published sizes, and configs that cannot be."""

import dataclasses
import json

import pytest

from internjax.model.config import (
    INTERNLM2_1_8B,
    INTERNLM2_7B,
    INTERNLM2_20B,
    TINY,
    DynamicNTK,
    LinearScaling,
    ModelConfig,
    from_json,
    num_matmul_params,
    num_params,
    to_json,
)

SMALL = ModelConfig(
    vocab_size=61, d_model=48, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)

SIZES = pytest.mark.parametrize(
    ("config", "total", "matmul", "per_layer", "reward"),
    [
        (INTERNLM2_1_8B, 1_889_110_016, 1_699_479_552, 62_918_656, 1_699_581_952),
        (INTERNLM2_7B, 7_737_708_544, 7_358_382_080, 218_112_000, 7_358_652_416),
        (INTERNLM2_20B, 19_861_149_696, 19_291_963_392, 390_082_560, 19_292_565_504),
    ],
    ids=["1.8b", "7b", "20b"],
)


@SIZES
def test_parameter_counts(config, total, matmul, per_layer, reward):
    assert num_params(config) == total
    assert num_matmul_params(config) == matmul
    table, deeper = config.vocab_size * config.d_model, dataclasses.replace(config, num_layers=config.num_layers + 1)
    assert num_params(deeper) - total == per_layer
    assert num_params(dataclasses.replace(config, head="scalar")) == reward
    assert num_params(dataclasses.replace(config, tie_embeddings=True)) == total - table


def test_the_published_numbers_of_the_three_sizes():
    # layers, width, query heads, key/value heads, feed-forward width
    shapes = [
        (c.num_layers, c.d_model, c.num_heads, c.num_kv_heads, c.ffn_dim)
        for c in (INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B)
    ]
    assert shapes == [(24, 2048, 16, 8, 8192), (32, 4096, 32, 8, 14336), (48, 6144, 48, 8, 16384)]
    for config in (INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B):
        assert (config.vocab_size, config.head_dim, config.max_position_embeddings) == (92544, 128, 32768)
        assert (config.rope_theta, config.norm_eps, config.initializer_range) == (1e6, 1e-5, 0.02)
        assert not config.tie_embeddings
    assert [c.rope_scaling.factor for c in (INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B)] == [2.0, 2.0, 3.0]


@pytest.mark.parametrize("config", [TINY, INTERNLM2_20B, dataclasses.replace(TINY, rope_scaling=LinearScaling(4.0))])
def test_json_is_the_inverse_of_itself(config):
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_json_with_unknown_and_missing_fields_names_them():
    values = to_json(TINY) | {"d_modle": 3}
    del values["ffn_dim"]
    with pytest.raises(ValueError, match=r"unknown fields \['d_modle'\] and lacks \['ffn_dim'\]"):
        from_json(values)
    with pytest.raises(ValueError, match="rope_scaling.type must be one of none, linear, dynamic"):
        from_json(to_json(TINY) | {"rope_scaling": {"type": "longrope"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "multiple of num_kv_heads 4"),
        ({"head_dim": 9}, "head_dim must be even"),
        ({"num_layers": 0}, "num_layers must be at least 1, given 0"),
        ({"unroll_layers": 5}, r"unroll_layers must be in 1\.\.4"),
        ({"tie_embeddings": True, "norm_head": True}, "tie_embeddings works with a plain lm head"),
        ({"head": "scalar", "norm_head": True}, "no meaning with head='scalar'"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("factor", [0.99, 0.0, -1.0, float("nan")])
def test_a_scaling_factor_below_one_is_refused(factor):
    for scaling in (LinearScaling, DynamicNTK):
        with pytest.raises(ValueError, match=">= 1.0"):
            scaling(factor)
