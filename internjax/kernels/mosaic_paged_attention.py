"""Attention over a paged cache as one kernel for Hopper: pages go from the cache to the tensor cores, nothing between.

Each program takes one row, one key/value head, up to 64 of its queries and SPLIT slots of the row (flash-decoding). It
copies BLOCK slots at a time through the page table, the next ones while it computes, and keeps a running softmax. What
the programs of a row found is put together afterwards.

Order-dependent choices:
1. SPLIT is a number of slots, not of programs, and what the splits found is added pairwise, neighbours first. A row's
   result then depends neither on how wide the page table is nor on the other rows: more splits add exact zeros.
2. Queries beyond 64 per key/value head (a prompt's chunk) are cut into tiles, which read the keys again. Then there are
   programs enough, and a split is the whole row: what splits find takes memory, queries x splits. A chunk and a step
   therefore add up in different orders.
3. Values of few bits go to the tensor cores as whole numbers, exact in bfloat16. Scales and
   offsets act on scores and weights in float32: sum_s w_s (o_s + c_s v_s) = sum_s (w_s c_s) v_s + sum_s w_s o_s. They
   are gathered ahead, 8 bytes per token and head beside 128 or 256 of values: rows of a page's scales are too short
   for the copy engine.

B batch, T query time, N query heads, K key/value heads, G = N / K, H head dim, L layers, P pages, S slots of a page, M
pages of a row, C slots of a row, R queries of a key/value head (T * G), U splits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from internjax.kernels import mosaic
from internjax.kernels.mask import MASKED
from internjax.kernels.mosaic import Run

BLOCK = 64
"""Slots that are multiplied at once."""
SPLIT = 512
"""Slots of one program where one tile holds all queries of a key/value head."""
_ROWS = 64
"""Queries of one program: the fewest rows that a product of Hopper's tensor cores has."""
_STAGES = 2
"""Blocks under way."""
_LOG2_E = math.log2(math.e)


def limits(
    *, dtype: jnp.dtype, cache_dtype: jnp.dtype, head_dim: int, page_size: int, alibi: bool, window: int | None
) -> dict[str, bool]:
    """Returns what the kernel cannot take of a call, each with whether it holds; see `mosaic.unsupported` besides."""
    # float16 beside few bits would lose weights times scales, which are small numbers.
    dtype, cache_dtype = jnp.dtype(dtype), jnp.dtype(cache_dtype)
    return {
        f"dtype {dtype.name} (bfloat16 only)": dtype != jnp.bfloat16,
        f"a cache of {cache_dtype.name} (bfloat16, int8 or int4 only)": cache_dtype not in (jnp.bfloat16, jnp.uint8),
        f"head_dim {head_dim} (64 or 128 only)": head_dim not in (64, 128),
        f"pages of {page_size} slots (8, 16, 32 or a multiple of 64 only)": page_size not in (8, 16, 32)
        and page_size % BLOCK != 0,
        "ALiBi slopes": alibi,
        f"a window of {window} tokens": window is not None,
    }


class _Call(NamedTuple):
    """What the compiled kernel depends on besides its arrays."""

    run: Run
    page_size: int
    scale: float
    bits: int
    """Of a stored value; 16: as they are."""
    head_dim: int
    split: int


def paged_attention(
    q_BTNH: jax.Array,
    k_LPSKH: jax.Array,
    v_LPSKH: jax.Array,
    *,
    layer: jax.Array,
    page_table_BM: jax.Array,
    q_positions_BT: jax.Array,
    scales: tuple[jax.Array, ...] | None,
    scale: float,
    run: Run = mosaic.COMPILED,
    split: int = SPLIT,
) -> jax.Array:
    """Returns causal attention outputs `[B, T, N, H]` over the slots of each row's pages.

    scales: (k scales, k offsets, v scales, v offsets), `[L, P, S, K]` each. Positions of a row go up. Slots of pages
    that are not mapped (id >= P) and all after them are not seen; a query that sees none gets 0.
    """
    B, T, N, H = q_BTNH.shape
    P, S, K = k_LPSKH.shape[1:4]
    R, M = T * N // K, page_table_BM.shape[1]
    split = split if R <= _ROWS else -(-M * S // BLOCK) * BLOCK
    call = _Call(run, S, scale, 16 if scales is None else 8 * k_LPSKH.shape[-1] // H, H, split)
    num_tiles, num_splits = -(-R // _ROWS), -(-M * S // split)
    # Fewer rows than a tile has are not written: of a step's outputs most would be empty.
    rows = -(-R // 8) * 8 if R <= _ROWS else num_tiles * _ROWS

    q_BKRH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, R, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, num_tiles * _ROWS - R), (0, 0)))
    positions_BR = jnp.repeat(q_positions_BT, N // K, axis=1).astype(jnp.int32)
    positions_BR = jnp.pad(positions_BR, ((0, 0), (0, num_tiles * _ROWS - R)), constant_values=-1)
    num_mapped_B = S * jnp.sum(jnp.cumprod(page_table_BM < P, axis=1), axis=1)
    lengths_B = jnp.minimum(num_mapped_B, q_positions_BT.max(axis=1) + 1).astype(jnp.int32)
    # A block that ends beyond the row reads the row's last page again: never what other rows may have written.
    last_B = jnp.maximum(num_mapped_B // S - 1, 0)
    wanted_BM = jnp.minimum(jnp.arange(M + -(-BLOCK // S)), last_B[:, None])
    table_BM = jnp.clip(jnp.take_along_axis(page_table_BM, wanted_BM, axis=1), 0, P - 1).astype(jnp.int32)
    more = () if scales is None else (_gathered(scales, layer, table_BM[:, :M], to=num_splits * split),)

    found = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = run.kernel(
        functools.partial(_kernel, call),
        out_type=(
            found((B, K, num_splits, rows, H)),
            found((B, K, num_splits, rows)),
            found((B, K, num_splits, rows)),
        ),
        grid=(num_splits * num_tiles, K, B),
        grid_names=("tiles", "heads", "rows"),
    )
    layer_1 = jnp.reshape(layer, (1,)).astype(jnp.int32)
    out = kernel(q_BKRH, positions_BR, table_BM, lengths_B, layer_1, k_LPSKH, v_LPSKH, *more)
    out_BKRH = _combined(*out, lengths_B=lengths_B, split=split)[:, :, :R]
    out_BTNH = out_BKRH.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
    return out_BTNH.astype(q_BTNH.dtype)


def _gathered(scales: tuple[jax.Array, ...], layer: jax.Array, table_BM: jax.Array, *, to: int) -> jax.Array:
    """Returns scales and offsets of keys and values along each row, `[B, K, 4, C]`, zeros from the last slot on."""
    rows = jnp.stack([x[layer, table_BM] for x in scales], axis=1)  # [B, 4, M, S, K]
    rows = rows.reshape(*rows.shape[:2], -1, rows.shape[-1]).transpose(0, 3, 1, 2)
    return jnp.pad(rows, ((0, 0),) * 3 + ((0, to - rows.shape[-1]),))


class _Shared(NamedTuple):
    """Shared memory of a program, and its barriers."""

    q: Any
    positions: Any
    k: Any
    v: Any
    scales: Any
    wide_k: Any
    wide_v: Any
    out: Any
    statistics: Any
    q_barrier: Any
    kv_barrier: Any


def _shared(call: _Call, dtype: jnp.dtype, stored: jnp.dtype) -> _Shared:
    """Returns what a program asks for; None where it needs nothing."""
    plgpu, H = mosaic.modules().plgpu, call.head_dim
    few_bits = call.bits < 16
    width = H // 2 if call.bits == 4 else H
    pages = plgpu.SMEM((_STAGES, BLOCK, width), stored, transforms=mosaic.tiles(width, stored))
    # Two 4-bit halves of a head are written one after the other; both factors of a product are laid out alike.
    wide = plgpu.SMEM((BLOCK, H), dtype, transforms=mosaic.tiles(width, dtype)) if few_bits else None
    copies = 2 * max(1, BLOCK // call.page_size) + few_bits
    return _Shared(
        q=plgpu.SMEM((_ROWS, H), dtype, transforms=mosaic.tiles(width, dtype)),
        positions=plgpu.SMEM((_ROWS,), jnp.int32),
        k=pages,
        v=pages,
        scales=plgpu.SMEM((_STAGES, 4, BLOCK), jnp.float16) if few_bits else None,
        wide_k=wide,
        wide_v=wide,
        out=plgpu.SMEM((_ROWS, H), jnp.float32, transforms=mosaic.tiles(H, jnp.float32)),
        statistics=plgpu.SMEM((2, _ROWS), jnp.float32),
        q_barrier=plgpu.Barrier(num_arrivals=2),
        kv_barrier=plgpu.Barrier(num_arrivals=copies, num_barriers=_STAGES),
    )


class _Program(NamedTuple):
    """Which part of the call a program computes."""

    row: Any
    head: Any
    layer: Any
    start: Any
    """First slot."""
    num_blocks: Any


class _Pages(NamedTuple):
    """References to the cache in the device's memory."""

    table: Any
    k: Any
    v: Any
    scales: Any


class _Softmax(NamedTuple):
    """What is known of each query's softmax so far, float32; exponents are of base 2."""

    out: Any
    high: Any
    total: Any


def _kernel(call: _Call, q, positions, table, lengths, layer, k, v, *refs):
    pl = mosaic.modules().pl
    *scales, out, high, total = refs
    pages = _Pages(table, k, v, scales[0] if scales else None)
    tile, head, row = (lax.axis_index(name) for name in ("tiles", "heads", "rows"))
    num_tiles = q.shape[2] // _ROWS
    split, tile = lax.div(tile, jnp.int32(num_tiles)), lax.rem(tile, jnp.int32(num_tiles))
    start, queries = split * call.split, pl.ds(tile * _ROWS, _ROWS)
    length = jnp.minimum(lengths[row] - start, call.split)
    program = _Program(row, head, layer[0], start, lax.div(length + (BLOCK - 1), jnp.int32(BLOCK)))

    @pl.when(length > 0)
    def _():
        def scoped(*refs):
            tile_q, tile_positions = q.at[row, head, queries], positions.at[row, queries]
            found = _attended(call, program, pages, _Shared(*refs), tile_q, tile_positions)
            rows = out.shape[3] if num_tiles == 1 else _ROWS
            at = (row, head, split, pl.ds(tile * _ROWS, rows))
            _written(found, _Shared(*refs), rows, out.at[at], high.at[at], total.at[at])

        pl.run_scoped(scoped, *_shared(call, q.dtype, k.dtype))


def _fetch(call: _Call, program: _Program, pages: _Pages, shared: _Shared, block) -> None:
    """Begins to copy a block's keys, values and scales."""
    pl, plgpu = mosaic.modules()
    stage = lax.rem(block, jnp.int32(_STAGES))
    barrier, S = shared.kv_barrier.at[stage], jnp.int32(call.page_size)
    piece = min(call.page_size, BLOCK)
    for index in range(BLOCK // piece):
        first = program.start + block * BLOCK + index * piece
        page = pages.table[program.row, lax.div(first, S)]
        source = (program.layer, page, pl.ds(lax.rem(first, S), piece), program.head)
        target = (stage, pl.ds(index * piece, piece))
        plgpu.copy_gmem_to_smem(pages.k.at[source], shared.k.at[target], barrier)
        plgpu.copy_gmem_to_smem(pages.v.at[source], shared.v.at[target], barrier)
    if pages.scales is not None:
        slots = pl.ds(program.start + block * BLOCK, BLOCK)
        source = pages.scales.at[program.row, program.head, :, slots]
        plgpu.copy_gmem_to_smem(source, shared.scales.at[stage], barrier)


def _attended(call: _Call, program: _Program, pages: _Pages, shared: _Shared, q, positions) -> _Softmax:
    """Returns the softmax of a tile of queries over the slots of a program."""
    pl, plgpu = mosaic.modules()
    run, layout = call.run, plgpu.Layout.WGMMA
    plgpu.copy_gmem_to_smem(q, shared.q, shared.q_barrier)
    plgpu.copy_gmem_to_smem(positions, shared.positions, shared.q_barrier)
    fetch = functools.partial(_fetch, call, program, pages, shared)
    for block in range(_STAGES):
        pl.when(block < program.num_blocks)(functools.partial(fetch, jnp.int32(block)))
    plgpu.barrier_wait(shared.q_barrier)
    positions_R = run.cast(shared.positions[...], layout.reduce(1))
    q_sums_R = None
    if call.bits < 16:
        q_sums_R = run.cast(shared.q[...], layout).astype(jnp.float32).sum(axis=1)

    def meet(block, softmax):
        stage = lax.rem(block, jnp.int32(_STAGES))
        plgpu.barrier_wait(shared.kv_barrier.at[stage])
        slots = run.column_index((_ROWS, BLOCK)) + (program.start + block * BLOCK)
        visible = slots <= _rows(positions_R, BLOCK)
        softmax = _Softmax(*softmax)
        softmax = _extended(call, shared, stage, visible, q_sums_R, softmax)
        pl.when(block + _STAGES < program.num_blocks)(lambda: fetch(block + _STAGES))
        return tuple(softmax)

    def full(value, shape, layout):
        return run.cast(lax.full(shape, value, jnp.float32), layout)

    begin = (
        full(0.0, (_ROWS, call.head_dim), layout),
        full(MASKED, (_ROWS,), layout.reduce(1)),
        full(0.0, (_ROWS,), layout.reduce(1)),
    )
    return _Softmax(*lax.fori_loop(0, program.num_blocks, meet, begin))


def _rows(x_R, columns: int):
    """Returns a number per query, repeated along the columns."""
    return lax.broadcast_in_dim(x_R, (x_R.shape[0], columns), (0,))


def _columns(x_C, rows: int):
    return lax.broadcast_in_dim(x_C, (rows, x_C.shape[0]), (1,))


def _extended(call: _Call, shared: _Shared, stage, visible, q_sums_R, softmax: _Softmax) -> _Softmax:
    """Returns the softmax with the block of a stage taken in."""
    plgpu, run, H = mosaic.modules().plgpu, call.run, call.head_dim
    k, v, scales = shared.k.at[stage], shared.v.at[stage], None
    if call.bits < 16:
        scales = _scales(call, shared, stage)
        _widen(call, k, shared.wide_k)
        _widen(call, v, shared.wide_v)
        plgpu.commit_smem()
        k, v = shared.wide_k, shared.wide_v
    scores = run.product(shared.q, k, transposed=True)
    if scales is not None:
        scores = scores * _columns(scales[0], _ROWS) + _rows(q_sums_R, BLOCK) * _columns(scales[1], _ROWS)
    scores = jnp.where(visible, scores * (call.scale * _LOG2_E), MASKED)
    high = jnp.maximum(softmax.high, scores.max(axis=1))
    weights = jnp.where(visible, jnp.exp2(scores - _rows(high, BLOCK)), 0.0)
    before = jnp.exp2(softmax.high - high)
    total = softmax.total * before + weights.sum(axis=1)
    out = softmax.out * _rows(before, H)
    if scales is not None:
        out = out + _rows((weights * _columns(scales[3], _ROWS)).sum(axis=1), H)
        weights = weights * _columns(scales[2], _ROWS)
    return _Softmax(out + run.product(weights.astype(shared.q.dtype), v), high, total)


def _scales(call: _Call, shared: _Shared, stage) -> list:
    """Returns key scales, key offsets, value scales and value offsets of a block's slots, float32."""
    layout = mosaic.modules().plgpu.Layout.WGMMA.reduce(0)
    return [call.run.cast(shared.scales[stage, index], layout).astype(jnp.float32) for index in range(4)]


def _widen(call: _Call, values, target) -> None:
    """Writes values of 8 or 4 bits as the whole numbers that they are, in the dtype of the tensor cores."""
    layout, H = mosaic.modules().plgpu.Layout, call.head_dim
    read = call.run.cast(values[...], layout.WGMMA_UPCAST_2X)

    def wide(read):
        return call.run.cast(read.astype(target.dtype), layout.WGMMA)

    if call.bits == 8:
        target[...] = wide(read)
    else:
        # Bytes can be masked in registers and not shifted; a sixteenth of the high half is exact.
        target[:, : H // 2] = wide(read & jnp.uint8(0x0F))
        target[:, H // 2 :] = wide(read & jnp.uint8(0xF0)) * jnp.asarray(0.0625, target.dtype)


def _written(found: _Softmax, shared: _Shared, rows: int, out, high, total) -> None:
    """Writes the first rows of what a program found."""
    pl, plgpu = mosaic.modules()
    shared.out[...] = found.out
    shared.statistics[0], shared.statistics[1] = found.high, found.total
    plgpu.commit_smem()
    rows = pl.ds(0, rows)
    plgpu.copy_smem_to_gmem(shared.out.at[rows], out)
    plgpu.copy_smem_to_gmem(shared.statistics.at[0, rows], high)
    plgpu.copy_smem_to_gmem(shared.statistics.at[1, rows], total)
    plgpu.wait_smem_to_gmem(0)


def _combined(out_BKURH, high_BKUR, total_BKUR, *, lengths_B, split: int) -> jax.Array:
    """Returns `[B, K, R, H]` of what the splits found; a split beyond its row's end was never written."""
    live_BU = jnp.arange(high_BKUR.shape[2]) * split < lengths_B[:, None]
    live = live_BU[:, None, :, None]
    high_BKUR = jnp.where(live, high_BKUR, MASKED)
    weights = jnp.where(live, jnp.exp2(high_BKUR - high_BKUR.max(axis=2, keepdims=True)), 0.0)
    total = mosaic.pairwise_sum(weights * jnp.where(live, total_BKUR, 0.0), axis=2)
    out = mosaic.pairwise_sum(weights[..., None] * jnp.where(live[..., None], out_BKURH, 0.0), axis=2)
    return out / jnp.where(total == 0.0, 1.0, total)[..., None]
