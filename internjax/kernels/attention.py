"""Attention over whole sequences: one signature, a jnp reference (`xla`) and faster back ends.

xla: every query against every key at once. chunked: queries in chunks, so that memory grows with T. ring: keys travel
over the mesh axis `sequence` (kernels.ring_attention). cudnn: NVIDIA's fused kernel with a mask of T * S. cudnn_packed:
the same kernel, told where documents begin and end (kernels.cudnn_attention). On a mesh that cuts time, xla and chunked
are right too: every device then gathers all keys.

B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, H head dim.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from internjax.kernels import cudnn_attention
from internjax.kernels.mask import MASKED, tied, visible
from internjax.kernels.ring_attention import ring_attention

Backend = Literal["xla", "chunked", "ring", "cudnn", "cudnn_packed"]

QUERY_CHUNK = 512


def check(backend: Backend, *, dtype: jnp.dtype, head_dim: int, alibi: bool = False, window: int | None = None) -> None:
    """Raises ValueError naming what `backend` cannot do; a back end never falls back to another silently.

    It looks at the mesh that is set and at the first device. Sizes that `ring` and `cudnn_packed` cannot take are
    refused when they are called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dtype = jnp.dtype(dtype)
    sequence = 1 if mesh.empty else mesh.shape["sequence"]
    fused = {
        f"dtype {dtype.name} (bfloat16 or float16 only)": dtype not in (jnp.bfloat16, jnp.float16),
        f"head_dim {head_dim} (a multiple of 8 up to 256 only)": bool(head_dim % 8) or head_dim > 256,
        "ALiBi slopes": alibi,
        f"a mesh that cuts time (sequence {sequence})": sequence > 1,
        f"the {jax.default_backend()} platform (NVIDIA GPUs only)": jax.default_backend() != "gpu",
    }
    limits: dict[Backend, dict[str, bool]] = {
        "xla": {},
        "chunked": {},
        "ring": {
            "attention without a mesh (run under `internjax.sharding.use(mesh)`)": mesh.empty,
            "ALiBi slopes": alibi,
        },
        "cudnn": fused,
        "cudnn_packed": fused | {"a sliding window": window is not None},
    }
    if backend not in limits:
        raise ValueError(f"unknown attention back end {backend!r}; known: {', '.join(limits)}")
    if backend == "cudnn_packed":
        limits[backend] |= cudnn_attention.unsupported()
    found = [limit for limit, holds in limits[backend].items() if holds]
    if found:
        others = "'chunked' or 'xla'" if sequence == 1 or backend == "ring" else "'ring', 'chunked' or 'xla'"
        raise ValueError(f"attention back end {backend!r} cannot do {'; '.join(found)}. Use attention={others}.")


def heads_first(q_BTNH: jax.Array, *, num_kv_heads: int) -> jax.Array:
    """Returns queries `[B, K, G * T, H]`, all that read one key/value head side by side, as one matrix."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H)
    return q_BTKGH.transpose(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, H)


def time_first(out_BKQH: jax.Array, *, num_heads: int) -> jax.Array:
    """Returns what `heads_first` was given, `[B, T, N, H]`."""
    B, K, Q, H = out_BKQH.shape
    out_BKGTH = out_BKQH.reshape(B, K, num_heads // K, Q * K // num_heads, H)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, num_heads, H)


def _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias_BNTS, scale):
    """softmax(scale * q k^T + bias) v as two batched matrix products per key/value head, softmax in float32."""
    B, T, N = q_BTNH.shape[:3]
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q_BKQH = heads_first(q_BTNH, num_kv_heads=K)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    logits = jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, K, G, T, S) * scale
    if bias_BNTS is not None:
        logits += bias_BNTS.reshape(B, K, G, T, S)
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype).reshape(B, K, G * T, S)
    return time_first(jnp.einsum("bkqs,bksh->bkqh", weights, v_BKSH), num_heads=N)


def alibi_bias(slopes_N: jax.Array, q_positions_BT: jax.Array, k_positions_BS: jax.Array) -> jax.Array:
    """Returns what is added to the logits, `[B, N, T, S]`: minus a head's slope times the distance."""
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    return -slopes_N[None, :, None, None] * distance_BTS[:, None].astype(jnp.float32)


def _segments(segments_BT: jax.Array | None, *, like: jax.Array) -> jax.Array:
    return jnp.ones(like.shape, jnp.int32) if segments_BT is None else segments_BT


def _chunked(attend, q_BTNH, q_positions_BT, q_segments_BT):
    """Runs `attend` on chunks of queries, recomputed in the backward pass: memory grows with T, not with T * S."""
    T = q_BTNH.shape[1]
    if T <= QUERY_CHUNK:
        return attend(q_BTNH, q_positions_BT, q_segments_BT)
    q_BTNH, q_positions_BT, q_segments_BT = tied(q_BTNH, q_positions_BT, q_segments_BT)
    padding = -T % QUERY_CHUNK

    def chunks(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, QUERY_CHUNK, *x.shape[2:]), 1, 0)

    rows = jax.tree.map(chunks, (q_BTNH, q_positions_BT, q_segments_BT))
    out = jax.lax.map(lambda row: jax.checkpoint(attend)(*row), rows)
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape[0], -1, *q_BTNH.shape[2:])[:, :T]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array | None = None,
    k_segments_BS: jax.Array | None = None,
    causal: bool = True,
    window: int | None = None,
    alibi_slopes_N: jax.Array | None = None,
    scale: float | None = None,
    backend: Backend = "xla",
) -> jax.Array:
    """Returns attention outputs `[B, T, N, H]`; query head n reads key/value head n // G.

    Positions are absolute within their segment. A key is visible to a query when it is not later (causal), nearer than
    `window`, and of the same non-zero segment. `scale` defaults to H^-0.5. What padding gets differs between back ends;
    it is finite. Raises ValueError when `backend` cannot serve the arguments; where it can find out only on the device
    (kernels.cudnn_attention), the outputs of that row are NaN.
    """
    assert q_BTNH.shape[2] % k_BSKH.shape[2] == 0, (q_BTNH.shape, k_BSKH.shape)
    alibi = alibi_slopes_N is not None
    check(backend, dtype=q_BTNH.dtype, head_dim=q_BTNH.shape[-1], alibi=alibi, window=window)
    scale = q_BTNH.shape[-1] ** -0.5 if scale is None else scale
    mask = functools.partial(
        visible, k_positions_BS=k_positions_BS, k_segments_BS=k_segments_BS, causal=causal, window=window
    )

    def attend(q_BTNH, q_positions_BT, q_segments_BT):
        mask_BTS = mask(q_positions_BT=q_positions_BT, q_segments_BT=q_segments_BT)
        bias = None if alibi_slopes_N is None else alibi_bias(alibi_slopes_N, q_positions_BT, k_positions_BS)
        return _attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS, bias, scale)

    if backend == "ring":
        return ring_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_positions_BT=q_positions_BT,
            k_positions_BS=k_positions_BS,
            q_segments_BT=_segments(q_segments_BT, like=q_positions_BT),
            k_segments_BS=_segments(k_segments_BS, like=k_positions_BS),
            causal=causal,
            window=window,
            scale=scale,
        )
    if backend == "cudnn_packed":
        return cudnn_attention.packed_attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_positions_BT=q_positions_BT,
            k_positions_BT=k_positions_BS,
            q_segments_BT=_segments(q_segments_BT, like=q_positions_BT),
            k_segments_BT=_segments(k_segments_BS, like=k_positions_BS),
            causal=causal,
            scale=scale,
        )
    with jax.named_scope("attention"):
        if backend == "xla":
            return attend(q_BTNH, q_positions_BT, q_segments_BT)
        if backend == "chunked":
            return _chunked(attend, q_BTNH, q_positions_BT, q_segments_BT)
        mask_BTS = mask(q_positions_BT=q_positions_BT, q_segments_BT=q_segments_BT)
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], scale=scale, implementation="cudnn"
        )
