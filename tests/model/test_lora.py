"""Adapters: identity at step 0, merge, targets, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import decoder, quantize
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, LoraConfig, apply_config, init_lora, logical_axes, merge

SMALL = ModelConfig(
    vocab_size=61, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32"
)
INPUTS = jnp.arange(18).reshape(2, 9)


@pytest.fixture(scope="module")
def params():
    return decoder.init(SMALL, jax.random.key(0))


def trained(weights):
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(7), leaf.shape), weights)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_fresh_adapters_are_exactly_the_identity(params, scheme):
    base = params if scheme is None else quantize.quantize_params(params, scheme=scheme, group=16)
    config = LoraConfig(rank=4)
    lora = apply_config(init_lora(config, base, jax.random.key(1)), config)
    want = decoder.logits(base, INPUTS, config=SMALL)
    np.testing.assert_array_equal(decoder.logits(base, INPUTS, config=SMALL, lora=lora), want)


@pytest.mark.parametrize("targets", [LoraConfig().targets, ("query", "head"), ("down",)])
def test_merged_parameters_equal_the_adapted_model(params, targets):
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    lora = apply_config(trained(init_lora(config, params, jax.random.key(1))), config)
    assert lora.scale == 2.0
    adapted = decoder.logits(params, INPUTS, config=SMALL, lora=lora)
    np.testing.assert_allclose(decoder.logits(merge(params, lora), INPUTS, config=SMALL), adapted, atol=1e-5)
    assert np.abs(adapted - decoder.logits(params, INPUTS, config=SMALL)).max() > 1e-2


def test_gradients_reach_every_adapter_of_a_quantised_base(params):
    base = quantize.quantize_params(params, scheme="int4", group=16)
    config = LoraConfig(rank=4)
    weights = trained(init_lora(config, base, jax.random.key(1)))

    def loss(weights):
        return decoder.logits(base, INPUTS, config=SMALL, lora=apply_config(weights, config))[..., 0].sum()

    assert all((np.abs(leaf).max(axis=(1, 2)) > 0).all() for leaf in jax.tree.leaves(jax.grad(loss)(weights)))


def test_dropout_acts_only_with_a_key(params):
    config = LoraConfig(rank=4, dropout=0.5)
    lora = apply_config(trained(init_lora(config, params, jax.random.key(1))), config)
    plain = Lora(lora.weights, lora.scale)
    want = decoder.logits(params, INPUTS, config=SMALL, lora=plain)
    np.testing.assert_array_equal(decoder.logits(params, INPUTS, config=SMALL, lora=lora), want)
    dropped = decoder.logits(params, INPUTS, config=SMALL, lora=lora, dropout_rng=jax.random.key(2))
    again = decoder.logits(params, INPUTS, config=SMALL, lora=lora, dropout_rng=jax.random.key(2))
    assert np.abs(dropped - want).max() > 1e-3
    np.testing.assert_array_equal(dropped, again)


def test_axes_follow_the_kernel(params):
    weights = init_lora(LoraConfig(rank=4, targets=("output",)), params, jax.random.key(0))
    axes = logical_axes(weights, decoder.logical_axes(SMALL))
    assert axes == {
        "layers": {"attention": {"output": {"a": ("layers", "heads", "rank"), "b": ("layers", "rank", "embed")}}}
    }


def test_an_adapter_of_another_base_is_refused(params):
    config = LoraConfig(rank=4, targets=("up",))
    wide = {"layers": {"ffn": {"up": {"a": jnp.ones((2, 64, 4)), "b": jnp.ones((2, 4, 48))}}}}
    with pytest.raises(ValueError, match="another base"):
        merge(params, apply_config(wide, config))
    with pytest.raises(ValueError, match="the base does not"):
        merge(params, apply_config({"layers": {"moe": {"up": {}}}}, config))


def test_unknown_targets_and_ranks_are_refused():
    with pytest.raises(ValueError, match="q_proj"):
        LoraConfig(targets=("q_proj",))
    with pytest.raises(ValueError, match="rank"):
        LoraConfig(rank=0)
