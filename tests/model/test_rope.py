"""Rotary positions: the pinned bases of dynamic NTK scaling, hand-computed angles, and what rotation promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.model import rope
from internjax.model.config import INTERNLM2_7B, DynamicNTK, LinearScaling, NoScaling


@pytest.mark.parametrize(
    ("length", "factor", "theta"),
    [
        (32768, 2, 1_000_000.0),
        (40000, 2, 1_449_795.7),
        (65536, 2, 3_052_773.7),
        (65536, 3, 4_088_994.2),
        (131072, 2, 7_219_586.0),
        (200000, 1, 6_281_300.7),
        (200000, 2, 11_645_259.3),
        (200000, 3, 17_049_594.5),
        (262144, 2, 15_658_832.3),
    ],
)
def test_the_bases_of_dynamic_ntk(length, factor, theta):
    assert rope.ntk_theta(1e6, factor, length, 32768, 128) == pytest.approx(theta, abs=0.06)
    # and the frequencies are those of that base
    config = dataclasses.replace(INTERNLM2_7B, rope_scaling=DynamicNTK(float(factor)))
    wanted = theta ** (-np.arange(64) / 64)
    np.testing.assert_allclose(rope.inv_freq(config, length=length), wanted, rtol=2e-6)


def test_without_scaling_length_has_no_effect():
    config = dataclasses.replace(INTERNLM2_7B, rope_scaling=NoScaling())
    plain = rope.inv_freq(config)
    np.testing.assert_allclose(plain, 1e6 ** (-np.arange(64) / 64), rtol=2e-6)
    np.testing.assert_array_equal(rope.inv_freq(config, length=10**6), plain)
    np.testing.assert_array_equal(rope.inv_freq(INTERNLM2_7B), plain)
    np.testing.assert_array_equal(rope.inv_freq(INTERNLM2_7B, length=32768), plain)
    assert np.abs(rope.inv_freq(INTERNLM2_7B, length=32769) - plain).max() > 0


def test_linear_scaling_divides_every_frequency():
    config = dataclasses.replace(INTERNLM2_7B, rope_scaling=LinearScaling(4.0))
    plain = rope.inv_freq(dataclasses.replace(config, rope_scaling=NoScaling()))
    np.testing.assert_allclose(rope.inv_freq(config), plain / 4, rtol=1e-6)


def test_the_first_half_is_paired_with_the_second():
    # One head of 4: pairs (0, 2) with frequency 1 and (1, 3) with frequency 0.1, at position 2.
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    turned = rope.rotate(x, rope.rotation(jnp.array([[2]]), jnp.array([[1.0, 0.1]])))[0, 0, 0]
    c, s, c2, s2 = np.cos(2.0), np.sin(2.0), np.cos(0.2), np.sin(0.2)
    np.testing.assert_allclose(turned, [c - 3 * s, 2 * c2 - 4 * s2, 3 * c + s, 4 * c2 + 2 * s2], rtol=1e-6)


def test_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 128))
    inv_freq = rope.inv_freq(INTERNLM2_7B)[None]

    def score(q_position, k_position):
        turned = [
            rope.rotate(x, rope.rotation(jnp.array([[p]]), inv_freq)) for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-3)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_every_row_has_its_own_frequencies():
    x = jnp.ones((2, 1, 1, 4))
    rows = jnp.array([[1.0, 0.1], [0.5, 0.0]])
    turned = rope.rotate(x, rope.rotation(jnp.ones((2, 1), jnp.int32), rows))
    for row in range(2):
        alone = rope.rotate(x[row : row + 1], rope.rotation(jnp.ones((1, 1), jnp.int32), rows[row : row + 1]))
        np.testing.assert_array_equal(turned[row], alone[0])
    assert np.abs(turned[0] - turned[1]).max() > 0.1


def test_rotation_keeps_length_and_dtype_and_is_computed_in_float32():
    x = jax.random.normal(jax.random.key(1), (1, 3, 2, 128), jnp.bfloat16)
    turned = rope.rotate(x, rope.rotation(jnp.array([[0, 1000, 30000]]), rope.inv_freq(INTERNLM2_7B)[None]))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    lengths = [jnp.linalg.norm(array.astype(jnp.float32), axis=-1) for array in (turned, x)]
    np.testing.assert_allclose(lengths[0], lengths[1], rtol=5e-3)
