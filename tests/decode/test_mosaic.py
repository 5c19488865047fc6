"""Decoding with the kernels for Hopper, interpreted: the back ends that a config names are those that run."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from internjax.decode.generate import decoding_params, generate
from internjax.decode.sample import make_sampling
from internjax.kernels import mosaic
from internjax.kernels.mosaic import Run
from internjax.model import decoder, quantize
from internjax.model.cache import dense_cache
from internjax.model.config import ModelConfig
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=128,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    ffn_dim=128,
    initializer_range=0.1,
)
PAGED = dataclasses.replace(CONFIG, paged_attention="mosaic")
TOKENS = np.random.default_rng(0).integers(3, 64, (2, 5), np.int32)


def step(params, cache, *, config):
    return decoder.forward(params, TOKENS, config=config, cache=cache).hidden_BTD


def test_a_model_reads_its_cache_with_the_kernel(monkeypatch):
    monkeypatch.setattr(mosaic, "unsupported", dict)
    monkeypatch.setattr(mosaic, "COMPILED", Run(interpreted=True))
    params, found = random_params(CONFIG, seed=1), {}
    for config in (CONFIG, PAGED):
        cache = dense_cache(config, 2, 5, dtype="int4")
        assert cache.page_size == (64 if config == PAGED else 5)
        found[config] = np.asarray(jax.jit(functools.partial(step, config=config))(params, cache), np.float32)
    # Both round to bfloat16, each in its places.
    np.testing.assert_allclose(found[PAGED], found[CONFIG], atol=0.06)


def test_a_step_of_a_model_in_4_bits_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(mosaic, "unsupported", dict)
    params = quantize.quantize_params(random_params(CONFIG, seed=1), scheme="int4", group=128)
    calls = {}
    for config in (CONFIG, dataclasses.replace(PAGED, quant_matmul="mosaic")):
        packed, cache = decoding_params(params, config), dense_cache(config, 2, 5, dtype="int8")
        traced = jax.jit(functools.partial(step, config=config)).trace(packed, cache)
        calls[config] = traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu")
    # Query, key, value, output, gate, up, down, and attention.
    assert list(calls.values()) == [0, 8]


def test_without_a_gpu_they_are_refused():
    params = random_params(CONFIG, seed=1)
    how = {"sampling": make_sampling(1), "max_new_tokens": 2}
    with pytest.raises(ValueError, match="paged attention cannot do .*the cpu platform .*Use paged_attention='xla'"):
        generate(params, np.ones((1, 2), np.int32), np.array([2]), config=PAGED, **how)
    with pytest.raises(ValueError, match="quantised matrices cannot do .*the cpu platform .*Use quant_matmul='xla'"):
        packed = quantize.quantize_params(params, scheme="int4")
        decoding_params(packed, dataclasses.replace(CONFIG, quant_matmul="mosaic"))
