"""Right-padded rows of token ids, put together inside a compiled program, and the seeds of random draws.

B rows, T time, X the width of one part.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rows(NamedTuple):
    """`tokens_BT` int32, of which row b's first `lengths_B[b]` are real and the rest is padding."""

    tokens_BT: jax.Array
    lengths_B: jax.Array


def segments(lengths_B: jax.Array, length: int) -> jax.Array:
    """Returns `[B, length]` int32: 1 on the first `lengths_B[b]` places of row b, 0 on padding."""
    return (jnp.arange(length) < lengths_B[:, None]).astype(jnp.int32)


def concatenate(parts: Sequence[Rows], *, length: int | None = None, pad_id: int = 0) -> Rows:
    """Returns the rows of all parts one after another without gaps, `[B, length]`.

    `length` defaults to the sum of the parts' widths, which always suffices; what does not fit a smaller one is cut off
    on the right. Every shape is static.
    """
    length = sum(part.tokens_BT.shape[1] for part in parts) if length is None else length
    rows_B1 = jnp.arange(parts[0].tokens_BT.shape[0])[:, None]
    tokens_BT = jnp.full((rows_B1.shape[0], length), pad_id, jnp.int32)
    offset_B = jnp.zeros(rows_B1.shape[0], jnp.int32)
    for part in parts:
        place_X = jnp.arange(part.tokens_BT.shape[1])
        # Padding is sent past the end, where the write is dropped.
        place_BX = jnp.where(place_X < part.lengths_B[:, None], offset_B[:, None] + place_X, length)
        tokens_BT = tokens_BT.at[rows_B1, place_BX].set(part.tokens_BT.astype(jnp.int32), mode="drop")
        offset_B += part.lengths_B.astype(jnp.int32)
    return Rows(tokens_BT, jnp.minimum(offset_B, length))


def drop_first(rows: Rows, drop_B: jax.Array) -> Rows:
    """Returns the rows without their first token where `drop_B` is true."""
    moved_BT = jnp.roll(rows.tokens_BT, -1, axis=1)
    tokens_BT = jnp.where(drop_B[:, None], moved_BT, rows.tokens_BT)
    return Rows(tokens_BT, rows.lengths_B - drop_B.astype(jnp.int32))


def sample_seeds(seed: int, *place: int, num_samples: int) -> np.ndarray:
    """Returns one uint32 seed per sample of one place in a run, e.g. `sample_seeds(seed, round, step, num_samples=B)`.

    Sample i's seed depends on (seed, place, i) alone, not on how many there are or what was drawn before: a resumed run
    draws what the unbroken run would have drawn.
    """
    return np.random.SeedSequence((seed, *place)).generate_state(num_samples, np.uint32)
