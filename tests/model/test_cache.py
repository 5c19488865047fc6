"""Caches of few bits: what is read back, and how much smaller they are."""

import dataclasses

import jax
import numpy as np
import pytest

from internjax.kernels.paged_attention import dequantize_kv
from internjax.model.cache import dense_cache, write
from internjax.model.config import INTERNLM2_7B, TINY

H = 16
CONFIG = dataclasses.replace(TINY, num_layers=2, num_kv_heads=2, head_dim=H)


def written(x_TH, dtype):
    """What a cache gives back for keys `x`, of one head of the second layer."""
    T = len(x_TH)
    x_BTKH = np.stack([x_TH, np.zeros_like(x_TH)], axis=1)[None]
    cache = dense_cache(CONFIG, 1, T, dtype=dtype)
    cache = write(cache, 1, x_BTKH, -x_BTKH, positions_BT=np.arange(T)[None], valid_BT=np.ones((1, T), bool))
    assert not np.asarray(cache.k_LPSKH[0]).any()
    fields = [(cache.k_LPSKH, cache.k_scales_LPSK, cache.k_offsets_LPSK)]
    fields += [(cache.v_LPSKH, cache.v_scales_LPSK, cache.v_offsets_LPSK)]
    k, v = (dequantize_kv(*(x[1, 0, :, 0] for x in each), head_dim=H, dtype=np.float32) for each in fields)
    np.testing.assert_allclose(k, -v, atol=(k.max() - k.min()) / (15 if dtype == "int4" else 255))
    return np.asarray(k)


@pytest.mark.parametrize(("dtype", "levels"), [("int8", 255), ("int4", 15)])
def test_the_error_is_half_a_step_of_each_token(dtype, levels):
    rng = np.random.default_rng(0)
    scales = np.array([1e-4, 0.1, 1.0, 30.0, 1000.0], np.float32)[:, None]
    x_TH = (rng.normal(size=(5, H)) * scales + np.array([[0], [5], [-3], [0], [100]])).astype(np.float32)
    steps_T1 = (x_TH.max(axis=1) - x_TH.min(axis=1))[:, None] / levels
    # Half precision of offset and scale adds to the half step: 2^-11 of either's size.
    bound_T1 = 0.5 * steps_T1 + 2.0**-11 * (np.abs(x_TH.min(axis=1))[:, None] + levels * steps_T1) + 2.0**-24
    error_TH = np.abs(written(x_TH, dtype) - x_TH)
    assert (error_TH <= bound_T1).all()
    assert (error_TH.max(axis=1) > 0.2 * steps_T1[:, 0]).all(), "nothing was rounded"


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_constant_tokens_come_back(dtype):
    x_TH = np.repeat(np.array([[0.0], [2.5], [-7.0], [1e-7]], np.float32), H, axis=1)
    np.testing.assert_allclose(written(x_TH, dtype), x_TH, atol=2.0**-23)


def test_sizes_are_those_of_the_bits_and_two_halves_per_head():
    def nbytes(dtype):
        cache = jax.eval_shape(lambda: dense_cache(INTERNLM2_7B, 1, 1024, dtype=dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache) if leaf.ndim > 2)

    heads = 2 * INTERNLM2_7B.num_layers * INTERNLM2_7B.num_kv_heads * 1024
    assert (
        nbytes("bfloat16") == heads * 256 and nbytes("int8") == heads * (128 + 4) and nbytes("int4") == heads * (64 + 4)
    )
