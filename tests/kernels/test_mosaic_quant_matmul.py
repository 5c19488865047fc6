"""The 4-bit product in jax's interpreter against the reference, what refuses it, and its program for CUDA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels import mosaic
from internjax.kernels.mosaic import Run
from internjax.model import quantize

TOLERANCE = 6e-3
"""As a share of the largest output: outputs are rounded to bfloat16, 2^-9."""


product = jax.jit(quantize.matmul)


@functools.cache
def case(num_rows, in_features, out_features, scale_dtype="float32", symmetric=False):
    """Returns (x, a quantised matrix, their product in float32)."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((num_rows, in_features)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((in_features, out_features)) + 0.2, jnp.float32)
    array = quantize.quantize_array(kernel, scheme="int4", scale_dtype=scale_dtype, symmetric=symmetric)
    return x, array, np.asarray(x.astype(jnp.float32) @ quantize.dequantize(array))


@pytest.fixture
def interpreted(monkeypatch):
    """The back end as an NVIDIA GPU of the right kind would have it, interpreted."""
    monkeypatch.setattr(mosaic, "unsupported", dict)
    monkeypatch.setattr(mosaic, "COMPILED", Run(interpreted=True))


def error(given, wanted) -> float:
    assert given.dtype == jnp.bfloat16 and given.shape == wanted.shape
    return float(np.abs(np.asarray(given, np.float32) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(
    "how",
    [
        (9, 1280, 64, "float16"),  # a span and a part of one
        (64, 256, 128, "float32", True),
    ],
)
def test_the_kernel_is_the_reference(how, interpreted):
    x, array, wanted = case(*how)
    packed = quantize.packed_for(array, "mosaic")
    assert packed.values.dtype == jnp.int4 and packed.shape == array.shape
    assert error(product(x, packed), wanted) < TOLERANCE
    if how[-1] is True:
        assert not np.asarray(packed.zeros[:2]).any(), "symmetric codes need no correction"


def test_a_packed_matrix_is_the_same_matrix(interpreted):
    _, array, _ = case(9, 1280, 64, "float16")
    packed = quantize.packed_for(array, "mosaic")
    assert (quantize.dequantize(packed) == quantize.dequantize(array)).all()
    assert packed.nbytes - array.nbytes == (16 * 2 - 10 + 6 * 2) * 64, "zeros in 2 bytes, 16 groups instead of 10"
    assert quantize.packed_for(packed, "mosaic") is packed and quantize.packed_for(array, "xla") is array


def test_leading_axes_and_many_rows(interpreted):
    """More rows than the kernel takes go through the restored matrix; a layer of stacked matrices is one of them."""
    x, array, wanted = case(64, 256, 128, "float32", True)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf * 0, leaf]), array)
    packed = jax.tree.map(lambda leaf: leaf[1], quantize.packed_for(stacked, "mosaic"))
    given = quantize.matmul(jnp.concatenate([x, x]).reshape(2, 64, 256), packed)
    assert error(given[1], wanted) < 2 * TOLERANCE  # the matrix is rounded to bfloat16 too


@pytest.mark.parametrize("what", ["values", "scales", "zeros"])
def test_a_planted_fault_is_seen(what, interpreted):
    x, array, wanted = case(9, 1280, 64, "float16")
    wrong = dataclasses.replace(array, **{what: jnp.roll(getattr(array, what), 1, axis=-1)})
    assert error(product(x, quantize.packed_for(wrong, "mosaic")), wanted) > 5 * TOLERANCE


def test_a_row_does_not_depend_on_others(interpreted):
    x, array, _ = case(9, 1280, 64, "float16")
    packed = quantize.packed_for(array, "mosaic")
    found = [np.asarray(product(rows, packed), np.float32) for rows in (x, x.at[1:].multiply(3))]
    assert (found[0][0] == found[1][0]).all() and (found[0][1:] != found[1][1:]).any()


@pytest.mark.parametrize("num_rows", [1, 64])
def test_it_lowers_for_cuda(num_rows, interpreted, monkeypatch):
    monkeypatch.setattr(mosaic, "COMPILED", Run())
    apart = jax.jit(lambda x, packed: quantize.matmul(x, packed))  # the other keeps what it was traced for
    x, array, _ = case(64, 256, 128, "float32", True)
    packed = quantize.packed_for(array, "mosaic")
    lowered = apart.trace(x[:num_rows], packed).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu") == 1


def test_it_is_refused_by_name(interpreted):
    kernel = jnp.ones((192, 96))
    for scheme, group, reasons in (
        ("nf4", 64, ("scheme nf4", "a group of 64", "192 input features", "96 output features")),
        ("int8", 192, ("scheme int8", "a group of 192")),
    ):
        array = quantize.quantize_array(kernel, scheme=scheme, group=group)
        with pytest.raises(ValueError, match="Use quant_matmul='xla'") as raised:
            quantize.packed_for(array, "mosaic")
        assert all(reason in str(raised.value) for reason in reasons)
    x, array, _ = case(1, 128, 64)
    with pytest.raises(ValueError, match="takes bfloat16 or float16, given float32"):
        quantize.matmul(x.astype(jnp.float32), quantize.packed_for(array, "mosaic"))


def test_it_is_refused_where_there_is_no_gpu():
    with pytest.raises(ValueError, match="the cpu platform .*Use quant_matmul='xla'"):
        quantize.packed_for(case(1, 128, 64)[1], "mosaic")


@pytest.mark.gpu
@pytest.mark.parametrize("how", [(1, 4096, 14336, "float16"), (8, 14336, 4096), (64, 4096, 1024, "float16", True)])
def test_the_compiled_kernel_is_the_reference_on_a_gpu(how):
    x, array, wanted = case(*how)
    with jax.default_matmul_precision("highest"):
        assert error(jax.jit(quantize.matmul)(x, quantize.packed_for(array, "mosaic")), wanted) < TOLERANCE
