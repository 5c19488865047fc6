"""Attention of queries over a paged key/value cache: arrays only; a jnp reference (`xla`) and a kernel (`mosaic`).

xla: gathers a row's pages, restores what has few bits, and attends. mosaic: reads pages where they are, on NVIDIA's
Hopper (kernels.mosaic_paged_attention).

B batch, T query time, N query heads, K key/value heads, H head dim, L layers, P pages, S slots of a page, M pages of a
row. A dense cache is the case M = 1: every row owns one page as long as the longest sequence.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from internjax.kernels import mosaic, mosaic_paged_attention
from internjax.kernels.attention import attention

Backend = Literal["xla", "mosaic"]


def check(
    backend: Backend,
    *,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    head_dim: int,
    page_size: int,
    alibi: bool = False,
    window: int | None = None,
) -> None:
    """Raises ValueError naming what `backend` cannot do; a back end never falls back to another silently.

    cache_dtype: of the pages, uint8 where they hold few bits.
    """
    if backend == "xla":
        return
    if backend != "mosaic":
        raise ValueError(f"unknown back end {backend!r} of paged attention; known: xla, mosaic")
    how = {"cache_dtype": cache_dtype, "head_dim": head_dim, "page_size": page_size, "alibi": alibi, "window": window}
    limits = mosaic.unsupported() | mosaic_paged_attention.limits(dtype=dtype, **how)
    if found := [limit for limit, holds in limits.items() if holds]:
        raise ValueError(
            f"back end 'mosaic' of paged attention cannot do {'; '.join(found)}. Use paged_attention='xla'."
        )


def gather_pages(pages_LPS: jax.Array, layer: jax.Array, page_table_BM: jax.Array) -> jax.Array:
    """Returns the slots of every row's pages in one layer, `[B, M * S, ...]`; unmapped pages (id >= P) read as 0."""
    rows = pages_LPS.at[layer, page_table_BM].get(mode="fill", fill_value=0)
    B, M, S = rows.shape[:3]
    return rows.reshape(B, M * S, *rows.shape[3:])


def dequantize_kv(values, scales, offsets, *, head_dim: int, dtype: jnp.dtype) -> jax.Array:
    """Returns offset + scale * value per token and head, `[..., H]`, from 8-bit values `[..., H]` or 4-bit (H / 2).

    scales and offsets are `[...]`. 4-bit values: the first half of the heads in the low bits, the second in the high.
    """
    if values.shape[-1] != head_dim:
        values = jnp.concatenate([values & 0xF, values >> 4], axis=-1)
    scales, offsets = (x.astype(jnp.float32)[..., None] for x in (scales, offsets))
    return (offsets + scales * values.astype(jnp.float32)).astype(dtype)


def paged_attention(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKH: jax.Array,
    *,
    layer: jax.Array,
    page_table_BM: jax.Array,
    q_positions_BT: jax.Array,
    k_scales: jax.Array | None = None,
    k_offsets: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    v_offsets: jax.Array | None = None,
    window: int | None = None,
    alibi_slopes_N: jax.Array | None = None,
    scale: float | None = None,
    backend: Backend = "xla",
) -> jax.Array:
    """Returns causal attention outputs `[B, T, N, H]` over the slots of each row's pages, the last `window` if given.

    Slot i of a row (page i // S of its table, slot i % S) holds the key of absolute position i, so causality alone
    hides what was not written yet. With scales and offsets `[L, P, S, K]` the pages hold 8-bit values, or 4-bit ones
    where they are half as wide as a head. Raises ValueError when `backend` cannot serve the arguments.

    mosaic: positions of a row go up, and a row ends at its first unmapped page. What is stored in few bits is not
    rounded to q's dtype first.
    """
    H, how = q_BTNH.shape[-1], {"alibi": alibi_slopes_N is not None, "window": window}
    check(backend, dtype=q_BTNH.dtype, cache_dtype=k_LPSKH.dtype, head_dim=H, page_size=k_LPSKH.shape[2], **how)
    if backend == "mosaic":
        with jax.named_scope("paged_attention"):
            return mosaic_paged_attention.paged_attention(
                q_BTNH,
                k_LPSKH,
                v_LPSKH,
                layer=layer,
                page_table_BM=page_table_BM,
                q_positions_BT=q_positions_BT,
                scales=None if k_scales is None else (k_scales, k_offsets, v_scales, v_offsets),
                scale=H**-0.5 if scale is None else scale,
                run=mosaic.COMPILED,
            )

    def read(pages, scales, offsets):
        values = gather_pages(pages, layer, page_table_BM)
        if scales is None:
            return values.astype(q_BTNH.dtype)
        scales, offsets = (gather_pages(x, layer, page_table_BM) for x in (scales, offsets))
        return dequantize_kv(values, scales, offsets, head_dim=q_BTNH.shape[-1], dtype=q_BTNH.dtype)

    with jax.named_scope("paged_attention"):
        k_BSKH, v_BSKH = read(k_LPSKH, k_scales, k_offsets), read(v_LPSKH, v_scales, v_offsets)
        k_positions_BS = jnp.broadcast_to(jnp.arange(k_BSKH.shape[1], dtype=jnp.int32), k_BSKH.shape[:2])
        return attention(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_positions_BT=q_positions_BT,
            k_positions_BS=k_positions_BS,
            window=window,
            alibi_slopes_N=alibi_slopes_N,
            scale=scale,
        )
