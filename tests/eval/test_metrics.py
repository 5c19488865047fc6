"""Intervals and tests against hand-computed numbers and SciPy."""

import math

import numpy as np
import pytest
import scipy  # its parts are loaded when they are used
from hypothesis import given
from hypothesis import strategies as st

from eval import metrics, significance


def test_wilson_equals_scipy_and_a_number_computed_by_hand():
    # 8 of 10, z = 1.959964: centre (0.8 + 0.192073) / 1.384146, half width 1.959964 sqrt(0.016 + 0.0096036) / 1.384146
    value, low, high = metrics.wilson(8, 10)
    assert (value, round(low, 4), round(high, 4)) == (0.8, 0.4902, 0.9433)
    reference = scipy.stats.binomtest(37, 200).proportion_ci(0.99, method="wilson")
    assert metrics.wilson(37, 200, confidence=0.99)[1:] == pytest.approx((reference.low, reference.high), abs=1e-9)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_its_share_and_stays_in_bounds(num, data):
    interval = metrics.wilson(data.draw(st.integers(0, num)), num)
    assert 0 <= interval.low <= interval.value + 1e-12 and interval.value - 1e-12 <= interval.high <= 1
    assert interval.low < interval.high


@pytest.mark.parametrize("num_right, num", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(num_right, num):
    with pytest.raises(ValueError, match="at least one item"):
        metrics.wilson(num_right, num)


def test_bootstrap_is_close_to_the_normal_interval_and_deterministic():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    interval = metrics.bootstrap_mean(values)
    error = scipy.stats.sem(values)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error * 1.96)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error * 1.96)
    assert metrics.bootstrap_mean(values) == interval != metrics.bootstrap_mean(values, seed=1)


def test_a_ratio_weighs_by_its_denominators():
    assert metrics.bootstrap_ratio([8, 1], [4, 6]).value == pytest.approx(0.9)
    assert metrics.bootstrap_ratio([4, 6], [2, 3]) == pytest.approx((2, 2, 2))
    with pytest.raises(ValueError, match="denominator above 0"):
        metrics.bootstrap_ratio([1.0], [0])
    with pytest.raises(ValueError, match="finite"):
        metrics.bootstrap_mean([1.0, math.nan])


def test_bits_per_byte_counts_bytes_not_characters():
    # Probability 2^-12 over three bytes (one character of three bytes): four bits per byte.
    assert metrics.bits_per_byte(-12 * math.log(2), "語") == pytest.approx(4.0)
    with pytest.raises(ValueError, match="empty"):
        metrics.bits_per_byte(-1.0, "")


def test_exact_match_folds_white_space_only():
    assert metrics.exact_match(" a\n b", "a b") == 1.0
    assert metrics.exact_match("gcd", "Gcd") == metrics.exact_match("a b", "ab") == 0.0


def test_mcnemar_is_the_exact_binomial_test_of_discordant_items():
    first = [1] * 9 + [0] * 2 + [1] * 20 + [0] * 5
    second = [0] * 9 + [1] * 2 + [1] * 20 + [0] * 5
    result = significance.mcnemar(first, second)
    # 2 (C(11,0) + C(11,1) + C(11,2)) / 2^11 = 2 * 67 / 2048
    assert result == (9, 2, pytest.approx(134 / 2048))
    assert result.p_value == pytest.approx(scipy.stats.binomtest(2, 11).pvalue)
    assert significance.mcnemar(first, first).p_value == 1.0
    assert significance.mcnemar([1, 0], [0, 1]).p_value == 1.0


def test_mcnemar_refuses_values_that_are_not_right_or_wrong():
    with pytest.raises(ValueError, match="paired_bootstrap"):
        significance.mcnemar([0.5], [1])
    with pytest.raises(ValueError, match="same items"):
        significance.mcnemar([1], [1, 0])


def test_paired_bootstrap_sees_what_an_unpaired_one_cannot():
    rng = np.random.default_rng(0)
    first = rng.normal(0, 10, 300)
    difference = significance.paired_bootstrap(first, first + rng.normal(0.5, 0.5, 300))
    assert 0.4 < difference.low < difference.value < difference.high < 0.6


def test_holm_steps_down_and_stays_monotone():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04 -> monotone 0.04, 0.06, 0.06, 0.06
    assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
