"""Attention of queries over a paged key/value cache: arrays only; a jnp reference (`xla`) and a kernel (`mosaic`).

xla: gathers a row's pages, restores what has few bits, and attends; for many queries in a long row it does so block by
block, up to the last key that one of them may see. mosaic: reads pages where they are, on NVIDIA's Hopper
(kernels.mosaic_paged_attention).

B batch, T query time, N query heads, K key/value heads, H head dim, L layers, P pages, S slots of a page, M pages of a
row. A dense cache is the case M = 1: every row owns one page as long as the longest sequence.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from internjax.kernels import mosaic, mosaic_paged_attention
from internjax.kernels.attention import alibi_bias, attention, heads_first, time_first
from internjax.kernels.mask import MASKED, visible

Backend = Literal["xla", "mosaic"]

_MANY_QUERIES = 16
"""From so many on, blocks of keys are worth a loop: less would be read than the row might come to hold."""
_SMALLEST_BLOCK = 128
_FEW_PAGES = 16
"""So many are taken one by one: XLA gathers on a CPU element by element. For 64 tokens of a tiny model a block of keys
takes 190 microseconds with a gather and 125 without; more slices than these take too long to compile."""


def key_block(num_queries: int, num_positions: int) -> int:
    """Returns how many keys `xla` weighs at once for T queries in rows that can hold S positions."""
    block = max(_SMALLEST_BLOCK, 2 * num_queries)
    return block if num_queries >= _MANY_QUERIES and num_positions > 2 * block else num_positions


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


def _positions(
    pages_LPS: jax.Array, layer: jax.Array, page_table_BM: jax.Array, start: jax.Array, *, block: int
) -> jax.Array:
    """Returns the slots of `block` positions of every row, from a multiple of it on, `[B, block, ...]`; those of no
    mapped page read as 0."""
    (P, size), B = pages_LPS.shape[1:3], page_table_BM.shape[0]
    num = block // size
    if block % size or B * num > _FEW_PAGES:
        at_S = start + jnp.arange(block, dtype=jnp.int32)
        pages_BS = jnp.take(page_table_BM, at_S // size, axis=1, mode="fill", fill_value=P)
        return pages_LPS.at[layer, pages_BS, at_S % size].get(mode="fill", fill_value=0)
    table_BM = jnp.pad(page_table_BM, ((0, 0), (0, num)), constant_values=P)
    ids_BM = jax.lax.dynamic_slice_in_dim(table_BM, start // size, num, axis=1)

    def page(row: int, number: int) -> jax.Array:
        id_ = ids_BM[row, number]
        found = jax.lax.dynamic_slice(
            pages_LPS, (layer, id_, *[0] * (pages_LPS.ndim - 2)), (1, 1, *pages_LPS.shape[2:])
        )
        return jnp.where(id_ < P, found[0, 0], 0)

    return jnp.stack([jnp.concatenate([page(row, number) for number in range(num)]) for row in range(B)])


def _attend_in_blocks(
    q_BTNH: jax.Array,
    read: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    *,
    q_positions_BT: jax.Array,
    num_kv_heads: int,
    num_positions: int,
    block: int,
    window: int | None,
    alibi_slopes_N: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Returns what `attention` does, from blocks of keys in turn (online softmax, arXiv:1805.02867), in float32.

    read: returns the keys and values `[B, block, K, H]` from a position on. A block that a query may not see changes no
    bit of its output, so this does not depend on how far the other queries look, nor on what a row might come to hold.
    """
    B, T, N, H = q_BTNH.shape
    q_BKQH = heads_first(q_BTNH, num_kv_heads=num_kv_heads)
    first = 0 if window is None else jnp.maximum(q_positions_BT.min() - window + 1, 0) // block
    last = jnp.minimum(q_positions_BT.max() // block + 1, -(-num_positions // block))

    def add(index, carry):
        highest_BKQ1, total_BKQ1, out_BKQH = carry
        at_S = index * block + jnp.arange(block, dtype=jnp.int32)
        k_BSKH, v_BSKH = read(index * block)
        k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
        logits_BKQS = scale * jnp.einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
        at_BS = jnp.broadcast_to(at_S, (B, block))
        if alibi_slopes_N is not None:
            logits_BKQS += alibi_bias(alibi_slopes_N, q_positions_BT, at_BS).reshape(logits_BKQS.shape)
        mask_BTS = visible(
            q_positions_BT=q_positions_BT,
            k_positions_BS=at_BS,
            q_segments_BT=None,
            k_segments_BS=None,
            causal=True,
            window=window,
        )
        mask_BKQS = jnp.broadcast_to(mask_BTS[:, None], (B, N, T, block)).reshape(logits_BKQS.shape)
        logits_BKQS = jnp.where(mask_BKQS, logits_BKQS, MASKED)
        now_BKQ1 = jnp.maximum(highest_BKQ1, logits_BKQS.max(axis=-1, keepdims=True))
        # A query that has seen no key yet would take all that are masked for equally likely.
        weights_BKQS = jnp.where(mask_BKQS, jnp.exp(logits_BKQS - now_BKQ1), 0.0)
        kept_BKQ1 = jnp.exp(highest_BKQ1 - now_BKQ1)
        added = jnp.einsum(
            "bkqs,bksh->bkqh", weights_BKQS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
        )
        total_BKQ1 = kept_BKQ1 * total_BKQ1 + weights_BKQS.sum(axis=-1, keepdims=True)
        return now_BKQ1, total_BKQ1, kept_BKQ1 * out_BKQH + added

    rows = q_BKQH.shape[:3]
    start = jnp.full((*rows, 1), MASKED), jnp.zeros((*rows, 1)), jnp.zeros((*rows, H))
    _, total_BKQ1, out_BKQH = jax.lax.fori_loop(first, last, add, start)
    return time_first(out_BKQH / jnp.maximum(total_BKQ1, 1e-30), num_heads=N).astype(q_BTNH.dtype)


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

    def restored(fetch: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Keys and values from what `fetch` finds in each array of pages."""
        if k_scales is None:
            return fetch(k_LPSKH).astype(q_BTNH.dtype), fetch(v_LPSKH).astype(q_BTNH.dtype)
        stored = (k_LPSKH, k_scales, k_offsets), (v_LPSKH, v_scales, v_offsets)
        k_BSKH, v_BSKH = (dequantize_kv(*map(fetch, arrays), head_dim=H, dtype=q_BTNH.dtype) for arrays in stored)
        return k_BSKH, v_BSKH

    num_positions = page_table_BM.shape[1] * k_LPSKH.shape[2]
    block = key_block(q_BTNH.shape[1], num_positions)
    with jax.named_scope("paged_attention"):
        if block < num_positions:
            return _attend_in_blocks(
                q_BTNH,
                lambda start: restored(lambda pages: _positions(pages, layer, page_table_BM, start, block=block)),
                q_positions_BT=q_positions_BT,
                num_kv_heads=k_LPSKH.shape[3],
                num_positions=num_positions,
                block=block,
                window=window,
                alibi_slopes_N=alibi_slopes_N,
                scale=H**-0.5 if scale is None else scale,
            )
        k_BSKH, v_BSKH = restored(lambda pages: gather_pages(pages, layer, page_table_BM))
        k_positions_BS = jnp.broadcast_to(jnp.arange(num_positions, dtype=jnp.int32), k_BSKH.shape[:2])
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
