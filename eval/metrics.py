"""Numbers with intervals: accuracy (Wilson), means and ratios (bootstrap over items), exact match, bits per byte."""

import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """An estimate and its two-sided confidence interval."""

    value: float
    low: float
    high: float


def wilson(num_right: float, num: int, *, confidence: float = 0.95) -> Interval:
    """Returns a share and its Wilson score interval (Wilson 1927), which stays inside [0, 1] and is right at 0 and 1.

    centre = (p + z^2 / 2n) / (1 + z^2 / n); half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n).
    """
    if num < 1 or not 0 <= num_right <= num:
        raise ValueError(f"given {num_right} right of {num}; a share needs at least one item, and 0 <= right <= items")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_right / num
    scale = 1 + z * z / num
    centre = (share + z * z / (2 * num)) / scale
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num)) / scale
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap_mean(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Returns the mean of `values` and its percentile-bootstrap interval over items (deterministic in `seed`)."""
    return bootstrap_ratio(values, np.ones(len(values)), confidence=confidence, seed=seed)


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Returns sum(numerators) / sum(denominators) with items resampled together, as bits over bytes of documents."""
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    num = len(numerators)
    if num == 0 or len(denominators) != num or not np.isfinite(numerators).all() or not (denominators > 0).all():
        raise ValueError(f"given {num} values; wanted at least one, all finite, each with a denominator above 0")
    rng = np.random.default_rng(seed)
    samples = np.empty(NUM_RESAMPLES)
    for index in range(NUM_RESAMPLES):  # one resample at a time: memory stays at one array of items
        drawn = rng.integers(0, num, num)
        samples[index] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.quantile(samples, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(numerators.sum() / denominators.sum()), float(low), float(high))


def exact_match(given: str, wanted: str) -> float:
    """Returns 1.0 if both texts are equal but for white space, else 0.0. Case counts: these are names and code."""
    return float(_folded(given) == _folded(wanted))


def bits_per_byte(logprob: float, text: str) -> float:
    """Returns -log2 p(text) per UTF-8 byte, from a natural-log probability; independent of the tokenizer."""
    num_bytes = len(text.encode())
    if num_bytes == 0:
        raise ValueError("bits per byte of an empty text is undefined; leave empty documents out")
    return -logprob / math.log(2) / num_bytes


def _folded(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
