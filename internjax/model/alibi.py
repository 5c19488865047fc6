"""Attention with linear biases (ALiBi, arXiv:2108.12409): how fast each head's scores fall with the distance."""

import math

import numpy as np


def slopes(num_heads: int) -> np.ndarray:
    """Returns the slope of every head `[N]`, float32: a score loses slope x distance.

    For a power of two N, slope i is 2^(-8 (i + 1) / N). Otherwise the first P heads, P the largest power of two below
    N, have the slopes of P heads, and the rest every second slope of 2 P heads (the authors' published code).
    """
    powers = 2 ** int(math.log2(num_heads))
    exponents = [8 * (i + 1) / powers for i in range(powers)]
    exponents += [8 * (2 * i + 1) / (2 * powers) for i in range(num_heads - powers)]
    return np.array([2.0**-exponent for exponent in exponents], np.float32)
