"""Noise on the embeddings of tokens during fine-tuning (NEFTune, arXiv:2310.05914).

B batch, T time, D embed.
"""

import jax
import jax.numpy as jnp


def add_noise(x_BTD: jax.Array, segments_BT: jax.Array, key: jax.Array, *, alpha: float) -> jax.Array:
    """Returns embeddings with noise that is uniform in +-alpha / sqrt(length * D); padding (segment 0) has none.

    The length is that of the token's own segment, so documents that share a row are treated as if each had its own.
    """
    B, T, D = x_BTD.shape
    rows_B1 = jnp.arange(B)[:, None]
    counts = jnp.zeros((B, T + 1), jnp.int32).at[rows_B1, segments_BT].add(1)
    lengths_BT = jnp.take_along_axis(counts, segments_BT, axis=1)
    bounds_BT = jnp.where(segments_BT > 0, alpha * jax.lax.rsqrt(jnp.maximum(lengths_BT * D, 1).astype(jnp.float32)), 0)
    noise_BTD = jax.random.uniform(key, (B, T, D), jnp.float32, -1.0, 1.0) * bounds_BT[..., None]
    return x_BTD + noise_BTD.astype(x_BTD.dtype)
