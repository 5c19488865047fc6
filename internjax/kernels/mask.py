"""Which keys a query may see; the one rule that every attention back end follows. B batch, T query time, S key time."""

import jax
import jax.numpy as jnp

# Large and finite: a row without any visible key stays finite, and its output is masked by whoever uses it.
MASKED = -1e30


def tied(
    q_BTNH: jax.Array, q_positions_BT: jax.Array, q_segments_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns the three as they are, but a mask that is made of them is not made before q is known.

    Positions and segments are the same in every layer. What depends on them alone jax computes ahead of a loop over
    layers and keeps for the backward pass: the masks of all chunks together, T * S bytes a row.
    """
    return jax.lax.optimization_barrier((q_BTNH, q_positions_BT, q_segments_BT))


def visible(
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """Returns the boolean mask `[B, T, S]` of the keys that each query may see; segment 0 is padding."""
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    mask_BTS = jnp.ones(distance_BTS.shape, bool)
    if causal:
        mask_BTS &= distance_BTS >= 0
    if window is not None:
        mask_BTS &= distance_BTS < window
    if k_segments_BS is not None:
        mask_BTS &= k_segments_BS[:, None, :] != 0
        if q_segments_BT is not None:
            mask_BTS &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return mask_BTS
