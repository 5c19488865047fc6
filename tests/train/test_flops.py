"""The FLOP formula against the products that a traced training gradient really holds, and peaks by device kind."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels.mask import visible
from internjax.model import decoder
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, INTERNLM2_20B, TINY
from internjax.model.lora import LoraConfig, apply_config, init_lora
from internjax.train import devices, flops
from internjax.train.batch import Batch
from internjax.train.freezing import join, split

SMALL = dataclasses.replace(TINY, vocab_size=96, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def batch_of(segments):
    segments = np.asarray(segments, np.int32)
    return Batch(segments, segments, segments.astype(np.float32), segments, segments)


def inner_jaxprs(value):
    for item in value if isinstance(value, tuple | list) else [value]:
        if isinstance(item, jax.extend.core.ClosedJaxpr):
            yield item.jaxpr
        elif isinstance(item, jax.extend.core.Jaxpr):
            yield item


def products(jaxpr, times=1):
    """Yields (FLOPs, has batch dimensions) of every dot_general, those in a loop as often as it runs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), (batch, _) = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            yield times * 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracting), bool(batch)
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in inner_jaxprs(value):
                yield from products(inner, times * length)


def counted(config, B, T, *, lora_config=None, freeze=()):
    """(FLOPs of products with parameters, FLOPs of attention) in the gradient of a plain cross-entropy, per token."""
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = decoder.abstract_params(config)
    adapters = None
    if lora_config is not None:
        adapters = jax.eval_shape(functools.partial(init_lora, lora_config, params), jax.random.key(0))

    def loss(trained, frozen, tokens_BT):
        weights, lora = (join(trained, frozen), None)
        if adapters is not None:
            weights, lora = frozen, apply_config(trained, lora_config)
        logits_BTV = decoder.logits(weights, tokens_BT, config=config, lora=lora)
        return -jax.nn.log_softmax(logits_BTV)[..., 0].sum()

    trained, frozen = split(params, freeze) if adapters is None else (adapters, params)
    jaxpr = jax.make_jaxpr(jax.grad(loss))(trained, frozen, tokens).jaxpr
    found = list(products(jaxpr))
    return tuple(sum(size for size, batched in found if batched == kind) / (B * T) for kind in (False, True))


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, num_kv_heads=4, num_layers=3), dataclasses.replace(SMALL, tie_embeddings=True)],
    ids=["grouped heads", "all heads, three layers", "tied head"],
)
def test_full_training_counts_the_products_of_the_gradient(config):
    B, T = 2, 24
    with_parameters, attention = counted(config, B, T)
    assert with_parameters == flops.matmul_flops(config)
    # The reference back end multiplies whole squares; the formula takes the causal half of them.
    assert attention / 2 * T == flops.attention_flops(config, T)
    assert flops.training_flops(config, seq_len=T) == with_parameters + attention / 2


@pytest.mark.parametrize("targets", [("query", "down"), LoraConfig().targets, (*LoraConfig().targets, "head")])
def test_adapters_count_frozen_products_four_times(targets):
    lora_config = LoraConfig(rank=4, targets=targets)
    dora = dataclasses.replace(lora_config, kind="dora")
    assert flops.matmul_flops(SMALL, lora_config=dora) == flops.matmul_flops(SMALL, lora_config=lora_config)
    B, T = 2, 24
    with_parameters, attention = counted(SMALL, B, T, lora_config=lora_config)
    # Nothing below the first adapter needs an activation gradient, but the layers are one loop body: it runs in all.
    assert with_parameters == flops.matmul_flops(SMALL, lora_config=lora_config)
    assert attention / 2 * T == flops.attention_flops(SMALL, T)


@pytest.mark.parametrize(
    ("freeze", "tied"),
    [
        (("embed.*", "layers.ffn.*"), False),
        (("layers.*",), True),
        (("embed.*", "layers.*kernel"), False),
        (("embed.*", "layers.*", "head.*"), False),
        (("embed.*", "layers.*"), True),
    ],
    ids=str,
)
def test_frozen_parameters_count_the_products_that_are_left(freeze, tied):
    B, T = 2, 24
    config = dataclasses.replace(SMALL, tie_embeddings=tied)
    with_parameters, attention = counted(config, B, T, freeze=freeze)
    assert with_parameters == flops.matmul_flops(config, freeze=freeze)
    assert attention / 2 * B * T == flops.attention_flops(config, [T] * B, freeze=freeze)
    per_token = flops.training_flops(config, seq_len=T, freeze=freeze)
    whole = batch_of(np.ones((B, T)))
    assert (
        flops.batch_flops(config, freeze=freeze)(whole)
        == B * T * per_token
        == B * T * (with_parameters + attention / 2)
    )


def test_a_window_counts_the_keys_that_are_seen():
    for window, length in ((1, 8), (3, 8), (7, 8), (8, 8), (20, 8)):
        positions = np.arange(length)[None]
        seen = visible(
            q_positions_BT=positions,
            k_positions_BS=positions,
            q_segments_BT=None,
            k_segments_BS=None,
            causal=True,
            window=window,
        )
        # Half of the diagonal is left out, as in the formula without a window.
        keys = int(seen.sum()) - min(window, length) / 2
        config = dataclasses.replace(SMALL, window=window)
        assert flops.attention_flops(config, length) == 12 * 2 * 32 * keys
    narrow, long = dataclasses.replace(SMALL, window=3), [[1, 1, 1, 1, 1, 2, 2, 0]]
    assert flops.batch_flops(narrow)(batch_of(long)) == 7 * flops.matmul_flops(SMALL) + 6 * 2 * 32 * (25 - 4 + 4)
    assert flops.training_flops(narrow, seq_len=8) == flops.matmul_flops(SMALL) + 6 * 2 * 32 * (2 * 3 - 9 / 8)
    assert "(6 - 3^2 / segment length; window 3)" in flops.formula(narrow)


def test_adapter_parameters_are_those_of_the_collection():
    for kind, targets in (("lora", ("query",)), ("dora", ("key", "gate")), ("dora", (*LoraConfig().targets, "head"))):
        config = LoraConfig(rank=3, targets=targets, kind=kind)
        weights = jax.eval_shape(
            functools.partial(init_lora, config, decoder.abstract_params(SMALL)), jax.random.key(0)
        )
        assert flops.lora_params(SMALL, config) == sum(leaf.size for leaf in jax.tree.leaves(weights))


@pytest.mark.parametrize(
    ("config", "per_token", "per_second"),
    [(INTERNLM2_1_8B, 1.1405e10, 43_359), (INTERNLM2_7B, 4.7372e10, 10_439), (INTERNLM2_20B, 1.2300e11, 4_020)],
    ids=["1.8B", "7B", "20B"],
)
def test_published_sizes_at_4096(config, per_token, per_second):
    """Derived by hand in the project's reference: FLOPs per token, and tokens/s at half of an H100's peak."""
    found = flops.training_flops(config, seq_len=4096)
    assert found == pytest.approx(per_token, rel=1e-4)
    assert 0.5 * flops.PEAK_FLOPS["h100"] / found == pytest.approx(per_second, rel=1e-4)
    assert flops.mfu(found * per_second, 1.0, 1, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5, rel=1e-4)


def test_a_batch_counts_its_true_segments():
    count = flops.batch_flops(SMALL)
    # By hand: segments of 3, 2 and 4, 1 tokens; four positions are padding.
    batch = batch_of([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 2, 0, 0]])
    tokens, squares = 10, 9 + 4 + 16 + 1
    assert count(batch) == 6 * flops.num_matmul_params(SMALL) * tokens + 6 * 2 * 32 * squares
    whole = batch_of(np.ones((3, 16)))
    assert count(whole) == 3 * 16 * flops.training_flops(SMALL, seq_len=16)
    assert count(batch_of(np.zeros((2, 4)))) == 0
    lora_config = LoraConfig(rank=2)
    assert flops.batch_flops(SMALL, lora_config=lora_config)(whole) == 48 * flops.training_flops(
        SMALL, seq_len=16, lora_config=lora_config
    )


def test_segments_of_equal_number_in_two_rows_are_two():
    assert sorted(flops.segment_lengths(np.array([[1, 1, 0], [1, 2, 2]]))) == [1, 2, 2]


def test_a_long_context_does_not_overflow():
    batch = batch_of(np.ones((1, 1 << 18)))
    assert flops.batch_flops(INTERNLM2_20B)(batch) == pytest.approx(
        (1 << 18) * flops.training_flops(INTERNLM2_20B, seq_len=1 << 18)
    )


KINDS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA L40S": 362e12,
    "a100-40": 312e12,
    "cpu": None,
    "Tesla T4": 65e12,
    "Tesla K80": None,
}


@pytest.mark.parametrize("kind", KINDS)
def test_peak_by_device_kind(kind):
    assert flops.peak_flops(kind) == KINDS[kind]
    assert flops.mfu(1e15, 2.0, 4, kind) == (None if KINDS[kind] is None else 1e15 / (8 * KINDS[kind]))


def test_devices_are_found_by_kind_and_by_name():
    found = {kind: devices.find(kind) for kind in KINDS}
    names = [device.name if device else None for device in found.values()]
    assert names == [
        "h100", "h100-pcie", "h200", "gh200", "a100-80", "a100-40", "a100-40", "4090", "l40s", "a100-40", None, "t4",
        None,
    ]  # fmt: skip
    assert devices.named("H200") is devices.find("NVIDIA H200")
    with pytest.raises(ValueError, match=r"unknown device 'h300'; known: b200, .*4090"):
        devices.named("h300")
    # Half of the sparse figures that data sheets print, and memory below the round name.
    assert all(device.peak_flops < 1000e12 for device in devices.DEVICES if device.name != "b200")
    assert {device.name: round(device.memory / devices.GIB) for device in devices.DEVICES}["h100"] == 80
