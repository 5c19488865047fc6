"""How far an attention back end is from the reference, measured on packed rows of random numbers on the device at hand.

The probe has the run's head size, dtype, window and slopes, three documents of uneven lengths that cross the chunks,
and padding. Values, gradients and the wall between documents are compared.

B batch, T time, N query heads, K key/value heads, H head dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from internjax.kernels.attention import QUERY_CHUNK, attention
from internjax.model import alibi
from internjax.model.config import ModelConfig

_LONGEST_WINDOW = 100  # shorter than every document of the probe: a longer one would hide nothing of them


class _Probe(NamedTuple):
    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    weights_BTNH: jax.Array
    """Of each output in the scalar whose gradient is taken: 0 on padding."""
    slopes_N: jax.Array | None
    """Of ALiBi, where the model has it."""


def window_of(config: ModelConfig) -> int | None:
    """Returns the sliding window that a model's attention is tried with, None without one."""
    return None if config.window is None else min(config.window, _LONGEST_WINDOW)


def relative_difference(given: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference as a share of the largest wanted value."""
    return float(np.max(np.abs(given - wanted), initial=0.0) / (np.max(np.abs(wanted), initial=0.0) + 1e-30))


def differences(
    config: ModelConfig, shape: tuple[int, int, int, int], *, place: NamedSharding | None
) -> dict[str, float]:
    """Returns the relative difference of outputs, of each gradient, and of what other documents notice of the first.

    `shape` are the sizes of the mesh that is set, `place` where inputs and results live: on all of its devices, so that
    every process can read them (None without a mesh).
    """
    probe, positions_BT, segments_BT = _probe(config, shape)
    exact = probe._replace(
        **{name: getattr(probe, name).astype(jnp.float32) for name in ("q_BTNH", "k_BTKH", "v_BTKH")}
    )
    # Keys and values of the first document, moved far away: no other document may notice.
    first = jnp.asarray(segments_BT == 1)[:, :, None, None]
    moved = probe._replace(k_BTKH=jnp.where(first, 3.0, probe.k_BTKH), v_BTKH=jnp.where(first, -3.0, probe.v_BTKH))
    moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, probe)
    reference, chosen = (
        # A fresh function each: jax remembers what it traced, and this check is about what is there now.
        jax.jit(functools.partial(_attend, window=window_of(config), backend=backend), out_shardings=place)
        for backend in ("xla", config.attention)
    )
    exact, probe, moved, positions_BT, segments_BT = jax.device_put(
        (exact, probe, moved, positions_BT, segments_BT), place
    )
    wanted = jax.device_get(reference(exact, positions_BT, segments_BT))
    given = jax.device_get(chosen(probe, positions_BT, segments_BT))
    unmoved = jax.device_get(chosen(moved, positions_BT, segments_BT))[0]
    found = {
        name: relative_difference(a, b) for name, a, b in zip(("output", "dq", "dk", "dv"), given, wanted, strict=True)
    }
    others = np.broadcast_to((np.asarray(segments_BT) > 1)[:, :, None, None], unmoved.shape)
    return found | {"other documents": relative_difference(unmoved[others], given[0][others])}


def _probe(config: ModelConfig, shape: tuple[int, int, int, int]) -> tuple[_Probe, np.ndarray, np.ndarray]:
    """Returns inputs of the model's head size and dtype, with their positions and segments."""
    data, fsdp, sequence, tensor = shape
    group = config.num_heads // config.num_kv_heads
    K = tensor * min(2, max(1, config.num_kv_heads // tensor))
    # The ring cuts rows as well as time; for the others one row is enough.
    B, T, H = data * fsdp if sequence > 1 else 1, QUERY_CHUNK + 128, config.head_dim
    rng = np.random.default_rng(0)
    shapes = ((B, T, K * group, H), (B, T, K, H), (B, T, K, H), (B, T, K * group, H))
    q, k, v, weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ends = (T // 5 + 3, T // 2 + 1, T - 37)
    segments_T = 1 + np.searchsorted(ends, np.arange(T), side="right").astype(np.int32)
    segments_T[segments_T > 3] = 0
    positions_T = np.concatenate([np.arange(count) for count in np.diff([0, *ends, T])]).astype(np.int32)
    weights *= (segments_T > 0)[None, :, None, None]
    dtype = jnp.dtype(config.dtype)
    slopes_N = jnp.asarray(alibi.slopes(config.num_heads)[: K * group]) if config.positions == "alibi" else None
    probe = _Probe(*(jnp.asarray(x, dtype) for x in (q, k, v)), jnp.asarray(weights), slopes_N)
    return probe, np.broadcast_to(positions_T, (B, T)), np.broadcast_to(segments_T, (B, T))


def _attend(probe: _Probe, positions_BT, segments_BT, *, window: int | None, backend: str):
    """Returns outputs and the gradients of their weighted sum, float32."""

    def total(q, k, v):
        out = attention(
            q,
            k,
            v,
            q_positions_BT=positions_BT,
            k_positions_BS=positions_BT,
            q_segments_BT=segments_BT,
            k_segments_BS=segments_BT,
            window=window,
            alibi_slopes_N=probe.slopes_N,
            backend=backend,
        ).astype(jnp.float32)
        return jnp.sum(out * probe.weights_BTNH), out

    inputs = (probe.q_BTNH, probe.k_BTKH, probe.v_BTKH)
    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*inputs)
    return [out * (segments_BT > 0)[:, :, None, None], *(grad.astype(jnp.float32) for grad in grads)]
