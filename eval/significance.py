"""Is B really better than A? Paired tests on the same items, and Holm's correction over several tasks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.metrics import NUM_RESAMPLES, Interval


class McNemar(NamedTuple):
    """Items that only one of the two got right, and the two-sided exact p-value of "both are equally good"."""

    num_only_first: int
    num_only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Returns the exact McNemar test of two lists of right (1) or wrong (0) on the same items.

    Under equality the discordant items are fair coins: p = min(1, 2 P[Binomial(b + c, 1/2) <= min(b, c)]).
    """
    first, second = _paired(first, second)
    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise ValueError("McNemar's test wants 1 (right) or 0 (wrong) per item; for other values use paired_bootstrap")
    only_first = int(((first == 1) & (second == 0)).sum())
    only_second = int(((first == 0) & (second == 1)).sum())
    num = only_first + only_second
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**num))


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Returns mean(second - first) and its percentile-bootstrap interval, resampling items in pairs."""
    first, second = _paired(first, second)
    difference = second - first
    rng = np.random.default_rng(seed)
    samples = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(samples, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(difference.mean()), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for looking at all of them (Holm 1979): step k of m times m - k, kept monotone."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - step) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"given {len(first)} and {len(second)} items; a paired test wants the same items in both")
    return np.asarray(first, np.float64), np.asarray(second, np.float64)
