"""Rotary position embeddings, half-split form; frequencies are data, so one compiled program serves every scaling.

A model that turns R of H dimensions has zeros as its last (H - R) / 2 frequencies: those pairs keep still. Checkpoints
that pair neighbours, or turn the first R dimensions, are permuted while they are read (internjax.hf).

B batch, T time, N heads, H head dim, R rotary dim, F = H / 2 frequencies.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internjax.model.config import DynamicNTK, LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def ntk_theta(theta: float, factor: float, length: int, max_position: int, head_dim: int) -> float:
    """Returns the rotary base theta' of dynamic NTK scaling for a sequence of `length`.

    theta' = theta * (factor * length / max_position - (factor - 1)) ** (H / (H - 2)) beyond max_position, else theta
    (InternLM2's published modelling code).
    """
    if length <= max_position:
        return theta
    return theta * (factor * length / max_position - (factor - 1)) ** (head_dim / (head_dim - 2))


def _llama3(inv_freq_F: jax.Array, scaling: Llama3Scaling) -> jax.Array:
    """Returns the frequencies of Llama 3.1: f / factor where f turns less than `low` times in the original length, f
    where it turns more than `high` times, and between them a blend that is linear in the number of turns."""
    turns_F = inv_freq_F * (scaling.original_max_position_embeddings / (2 * math.pi))
    kept_F = (turns_F - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept_F = jnp.clip(kept_F, 0.0, 1.0)
    return kept_F * inv_freq_F + (1.0 - kept_F) * inv_freq_F / scaling.factor


def _yarn(inv_freq_F: jax.Array, scaling: YarnScaling, theta: float) -> jax.Array:
    """Returns the frequencies of YaRN: f up to the pair that turns beta_fast times in the original length, f / factor
    from the one that turns beta_slow times on, and between them a blend that is linear in the pair's index."""
    R = 2 * len(inv_freq_F)

    def pair(turns):
        return R * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), R - 1)
    divided_F = jnp.clip((jnp.arange(R // 2, dtype=jnp.float32) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return (1.0 - divided_F) * inv_freq_F + divided_F * inv_freq_F / scaling.factor


def magnitude(config: ModelConfig) -> float:
    """Returns what queries and keys are multiplied by while they are turned; 1 but for YaRN."""
    match config.rope_scaling:
        case YarnScaling(attention_factor=None, factor=factor):
            return 0.1 * math.log(factor) + 1.0
        case YarnScaling(attention_factor=given):
            return given
    return 1.0


def inv_freq(config: ModelConfig, *, length: int | None = None) -> jax.Array:
    """Returns the inverse frequencies `[F]`, float32, for sequences declared to be at most `length` long.

    inv_freq_j = theta^(-2j / R) for the R / 2 pairs that turn, 0 for the others. `length` matters under dynamic NTK
    scaling alone; it is fixed when a sequence or session begins, because keys already cached keep the rotation they
    were written with.
    """
    rotary_dim = config.rotary_dim or config.head_dim
    theta, factor = config.rope_theta, 1.0
    match config.rope_scaling:
        case LinearScaling(factor=linear):
            factor = linear
        case DynamicNTK(factor=ntk):
            theta = ntk_theta(theta, ntk, length or 0, config.max_position_embeddings, rotary_dim)
    exponents = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    inv_freq_F = 1.0 / (theta**exponents) / factor
    match config.rope_scaling:
        case Llama3Scaling() as scaling:
            inv_freq_F = _llama3(inv_freq_F, scaling)
        case YarnScaling() as scaling:
            inv_freq_F = _yarn(inv_freq_F, scaling, theta)
    if rotary_dim < config.head_dim:
        inv_freq_F = jnp.pad(inv_freq_F, (0, (config.head_dim - rotary_dim) // 2))
    return inv_freq_F


class Rotation(NamedTuple):
    """Cosines and sines of every position and frequency."""

    cos_BTF: jax.Array
    sin_BTF: jax.Array


def rotation(positions_BT: jax.Array, inv_freq_BF: jax.Array, *, magnitude: float = 1.0) -> Rotation:
    """Returns the rotation of each position, float32, times `magnitude`; computed once and shared by all layers."""
    angles_BTF = positions_BT[:, :, None].astype(jnp.float32) * inv_freq_BF[:, None, :]
    cos_BTF, sin_BTF = jnp.cos(angles_BTF), jnp.sin(angles_BTF)
    return Rotation(cos_BTF, sin_BTF) if magnitude == 1.0 else Rotation(cos_BTF * magnitude, sin_BTF * magnitude)


def rotate(x_BTNH: jax.Array, by: Rotation) -> jax.Array:
    """Returns x with the pair (x_j, x_{j + H/2}) of every head turned by the angle of its position and frequency j."""
    cos, sin = by.cos_BTF[:, :, None, :], by.sin_BTF[:, :, None, :]
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
