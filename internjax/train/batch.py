"""What a training step eats: one batch of packed token rows.

Shape letters: B batch, T time.
"""

from typing import NamedTuple

import jax


class Batch(NamedTuple):
    """Packed rows, every field `[B, T]`.

    Several documents may lie in one row. They are told apart by `segments` (1, 2, ... in a row; 0 is padding, which is
    never attended and never learned) and each counts its own `positions` from 0. `targets` are already shifted: the
    target at t is the token that follows `tokens[t]` in the same document.
    """

    tokens: jax.Array  # int32
    targets: jax.Array  # int32
    loss_mask: jax.Array  # float32, the weight of each target in the loss; 0 on padding
    positions: jax.Array  # int32
    segments: jax.Array  # int32
