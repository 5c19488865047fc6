"""QuantArray: rounding bounds, the product that accepts it, and what its backward pass keeps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.model import decoder, quantize
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=64, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=128, dtype="float32"
)
dequantize = jax.jit(quantize.dequantize)
quantize_params = jax.jit(quantize.quantize_params, static_argnames=("scheme", "group", "double"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_rounding_error_is_at_most_half_a_level(scheme):
    kernel = normal(3, 64, 10)
    array = quantize.quantize_array(kernel, scheme=scheme, group=16)
    assert array.shape == kernel.shape
    error = np.abs(dequantize(array) - kernel).reshape(3, 4, 16, 10)
    groups = kernel.reshape(3, 4, 16, 10)
    if scheme == "int8":
        step = np.abs(groups).max(axis=2) / 127
    elif scheme == "int4":
        step = (np.maximum(groups.max(axis=2), 0) - np.minimum(groups.min(axis=2), 0)) / 15
    else:
        step = np.abs(groups).max(axis=2) * 0.3039  # widest gap of the NormalFloat levels: -1 to -0.6962
    # An asymmetric zero point is itself rounded, so the end of the range may be off by one half more.
    slack = 1.0 if scheme == "int4" else 0.5
    assert (error <= slack * step[:, :, None] + 1e-6).all()
    assert error.max() > 1e-4


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_doubly_quantised_scales_cost_little_and_nearly_fit(scheme):
    """QLoRA: 8 bits per scale, and its step and offset for 256 of them; the values are rounded by what is read back."""
    kernel = np.float32(0.02) * normal(2, 128, 768)
    plain = quantize.quantize_array(kernel, scheme=scheme, group=64)
    double = quantize.quantize_array(kernel, scheme=scheme, group=64, double=True)
    scales = np.asarray(jax.jit(quantize.full_scales)(double))
    blocks = np.asarray(plain.scales).reshape(2, 2, 3, 256)
    bound = (blocks.max(-1) - blocks.min(-1))[..., None] / 510
    assert (np.abs(scales.reshape(blocks.shape) - blocks) <= bound * 1.01).all()
    assert np.abs(scales - plain.scales).max() > 0
    assert double.scales.dtype == jnp.uint8 and double.steps.shape == double.offsets.shape == (2, 2, 3)
    zeros = double.scales.size if scheme == "int4" else 0
    assert double.nbytes == double.values.nbytes + double.scales.size + zeros + 2 * 4 * 12
    if scheme == "nf4":
        assert 8 * (double.nbytes - double.values.nbytes) / kernel.size == pytest.approx(0.129, abs=5e-4)
    errors = [np.asarray(dequantize(array)) - kernel for array in (plain, double)]
    assert np.sqrt((errors[1] ** 2).mean()) < 1.01 * np.sqrt((errors[0] ** 2).mean())


def test_scales_of_an_odd_number_of_outputs_share_smaller_blocks():
    array = quantize.quantize_array(np.eye(8, 12, dtype=np.float32), scheme="nf4", group=8, double=True)
    assert array.steps.shape == (1, 3)
    np.testing.assert_allclose(dequantize(array), np.eye(8, 12), atol=1e-6)


def test_int4_by_hand():
    # One column, one group: range -1..2 gives scale 0.2, zero point 5.
    kernel = np.array([[-1.0], [0.0], [0.31], [2.0]], np.float32)
    array = quantize.quantize_array(kernel, scheme="int4", group=4)
    np.testing.assert_allclose(array.scales, [[0.2]], rtol=1e-6)
    np.testing.assert_array_equal(array.zeros, [[5.0]])
    np.testing.assert_array_equal(array.values, [[0 | 5 << 4], [7 | 15 << 4]])
    np.testing.assert_allclose(dequantize(array), [[-1.0], [0.0], [0.4], [2.0]], atol=1e-6)


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_model_with_quantised_leaves_is_the_model_with_their_values(scheme):
    params = random_params(SMALL)
    quantized = quantize_params(params, scheme=scheme, group=32)
    inputs = np.arange(20, dtype=np.int32).reshape(2, 10)
    got = decoder.logits(quantized, inputs, config=SMALL)
    full = jax.jit(quantize.dequantize_params)(quantized)
    np.testing.assert_allclose(got, decoder.logits(full, inputs, config=SMALL), atol=1e-5)
    bits = {"int8": 8, "int4": 4, "nf4": 4}[scheme]
    kernel = quantized["layers"]["ffn"]["up"]["kernel"]
    extra = (5 if scheme == "int4" else 4) * kernel.scales.size
    assert kernel.nbytes == params["layers"]["ffn"]["up"]["kernel"].size * bits // 8 + extra
    assert isinstance(quantized["norm"]["scale"], jax.Array) and isinstance(quantized["embed"]["embedding"], jax.Array)


def test_gradient_through_a_quantised_product():
    kernel = quantize.quantize_array(normal(32, 8), scheme="int4", group=16)
    x = normal(5, 32, seed=1)
    got = jax.jit(jax.grad(lambda x: (quantize.matmul(x, kernel) ** 2).sum()))(x)
    full = np.asarray(dequantize(kernel))
    want = 2 * x @ full @ full.T
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("remat", "scheme", "kind"),
    [("none", "int4", "lora"), ("dots", "int4", "lora"), ("full", "int4", "lora"), ("full", "nf4", "dora")],
)
def test_adapter_gradients_hold_fewer_than_two_dequantised_layers(remat, scheme, kind):
    config = dataclasses.replace(SMALL, d_model=256, ffn_dim=1024, num_layers=6, remat=remat)
    how = dict(scheme=scheme, double=scheme == "nf4")
    params = jax.eval_shape(functools.partial(quantize.quantize_params, **how), decoder.abstract_params(config))
    # The backward pass multiplies by every kernel of a layer, with an adapter or without; DoRA reads those it has.
    lora = LoraConfig(rank=2, kind=kind) if kind == "dora" else LoraConfig(rank=2, targets=("query", "down"))
    weights = jax.eval_shape(lambda: init_lora(lora, params, jax.random.key(1)))
    inputs = np.zeros((1, 8), np.int32)

    def loss(weights, params):
        hidden = decoder.forward(params, inputs, config=config, lora=apply_config(weights, lora)).hidden_BTD
        return -decoder.target_logprobs(params, hidden, inputs, config=config, lora=None).sum()

    memory = jax.jit(jax.grad(loss)).lower(weights, params).compile().memory_analysis()
    one_layer = 4 * sum(
        leaf["kernel"].in_features * leaf["kernel"].out_features
        for part in ("attention", "ffn")
        for leaf in params["layers"][part].values()
    )
    assert memory.temp_size_in_bytes < 2 * one_layer


def test_a_group_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="use group=32"):
        quantize.quantize_array(jnp.ones((96, 4)), scheme="int4", group=64)


def test_fields_follow_the_axes_of_their_kernel(monkeypatch):
    monkeypatch.setattr(sharding, "_configured_mesh", None)
    shapes = decoder.abstract_params(SMALL)
    params = jax.eval_shape(functools.partial(quantize.quantize_params, scheme="int4", group=32), shapes)
    axes = quantize.logical_axes(params, decoder.logical_axes(SMALL))
    kernel = axes["layers"]["ffn"]["down"]["kernel"]
    assert kernel.values == kernel.scales == kernel.zeros == ("layers", "ffn", "embed")
    assert kernel.steps is None
    how = dict(scheme="nf4", group=32, double=True)
    double = jax.eval_shape(functools.partial(quantize.quantize_params, **how), shapes)
    axes = quantize.logical_axes(double, decoder.logical_axes(SMALL))
    kernel = axes["layers"]["ffn"]["down"]["kernel"]
    assert kernel.values == kernel.scales == kernel.steps == kernel.offsets == ("layers", "ffn", "embed")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2))
    with pytest.raises(ValueError, match=r"output.*steps.*does not divide its dimension 2"):
        sharding.shardings(axes, double, mesh)


def test_gradients_of_a_plain_product_and_what_they_keep():
    x, kernel = jnp.asarray(normal(2, 3, 8)), jnp.asarray(normal(8, 4, seed=1))

    def loss(product, x, kernel):
        return jnp.sum(jnp.sin(product(x, kernel)))

    for argument in (1, 2):
        gradient = jax.jit(jax.grad(loss, argument), static_argnums=0)
        given, wanted = (gradient(product, x, kernel) for product in (quantize.matmul, jnp.matmul))
        np.testing.assert_allclose(given, wanted, rtol=1e-5)

    def kept(loss_of, at):
        _, backward = jax.vjp(loss_of, at)
        return [leaf.shape for leaf in jax.tree.leaves(backward)]

    # What is not differentiated by leaves nothing behind: with a frozen kernel, no activations.
    assert kept(lambda x: quantize.matmul(x, kernel), x) == [kernel.shape]
    assert kept(lambda kernel: quantize.matmul(x, kernel), kernel) == [x.shape]
