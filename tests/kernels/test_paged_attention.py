"""Attention over pages, block by block: what one softmax over all positions gives, and no more of the pages is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import internjax.kernels.paged_attention as module
from internjax.kernels.attention import attention
from internjax.kernels.paged_attention import dequantize_kv, gather_pages, key_block, paged_attention
from internjax.model import alibi
from internjax.model.cache import _quantize

B, T, N, K, H = 2, 16, 4, 2, 8
PAGE, PAGES_PER_ROW = 8, 50
S = PAGE * PAGES_PER_ROW
BLOCK = key_block(T, S)
STARTS = (330, 5)
_paged = jax.jit(paged_attention, static_argnames=("window", "scale"))


def filled(*, bits=None, seed=0):
    """Queries, and the second of two layers of pages with their scales; rows own pages in no order."""
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, B * PAGES_PER_ROW, PAGE, K, H)), jnp.float32) for _ in range(2))
    table = jnp.asarray(rng.permutation(B * PAGES_PER_ROW).reshape(B, PAGES_PER_ROW), jnp.int32)
    pages = {"k_LPSKH": k, "v_LPSKH": v}
    if bits:
        few = {name[0]: _quantize(x, bits=bits) for name, x in pages.items()}
        pages = {f"{name}_LPSKH": x.values for name, x in few.items()}
        pages |= {f"{name}_{part}": getattr(x, part) for name, x in few.items() for part in ("scales", "offsets")}
    return q, pages, table


def positions(starts=STARTS):
    return jnp.asarray(np.array(starts)[:, None] + np.arange(T), jnp.int32)


def attended(q, pages, table, *, starts=STARTS, **how):
    pages = dict(pages)
    k, v = pages.pop("k_LPSKH"), pages.pop("v_LPSKH")
    how |= {"layer": 1, "page_table_BM": table, "q_positions_BT": positions(starts)}
    return np.asarray(_paged(q, k, v, **pages, **how))


@pytest.mark.parametrize(
    ("bits", "how"),
    [
        (None, {}),
        (None, {"scale": 0.7}),
        (None, {"window": 20}),
        (None, {"window": 170}),
        (None, {"alibi_slopes_N": jnp.asarray(alibi.slopes(N))}),
        (8, {}),
        (4, {"window": 150}),
    ],
    ids=["plain", "scale", "narrow window", "wide window", "alibi", "8 bits", "4 bits"],
)
def test_blocks_give_what_all_positions_at_once_give(bits, how):
    q, pages, table = filled(bits=bits)
    assert BLOCK == 128 < S

    def restored(name):
        values, *scaled = (
            gather_pages(pages[key], 1, table)
            for key in (f"{name}_LPSKH", f"{name}_scales", f"{name}_offsets")
            if key in pages
        )
        return dequantize_kv(values, *scaled, head_dim=H, dtype=jnp.float32) if scaled else values

    at_BS = jnp.broadcast_to(jnp.arange(S), (B, S))
    wanted = attention(
        q, restored("k"), restored("v"), q_positions_BT=positions(), k_positions_BS=at_BS, **how
    )  # fmt: skip
    np.testing.assert_allclose(attended(q, pages, table, **how), wanted, atol=2e-6)


def test_a_row_of_one_long_page_is_read_in_blocks_too():
    q, pages, table = filled()
    long = {name: gather_pages(x, 1, table)[None].repeat(2, axis=0) for name, x in pages.items()}
    np.testing.assert_array_equal(attended(q, long, jnp.arange(B)[:, None]), attended(q, pages, table), strict=True)


def test_neighbours_and_room_for_more_change_no_bit():
    q, pages, table = filled()
    both = attended(q, pages, table)
    near = attended(q, pages, table, starts=(20, STARTS[1]))
    np.testing.assert_array_equal(both[1], near[1])
    unmapped = jnp.full((B, 3 * PAGES_PER_ROW), B * PAGES_PER_ROW, jnp.int32)
    np.testing.assert_array_equal(attended(q, pages, jnp.concatenate([table, unmapped], axis=1)), both)


@pytest.mark.parametrize(
    ("starts", "window", "first", "end"),
    [((100, 5), None, 0, 128), ((100, 112), None, 0, 128), ((100, 113), None, 0, 256), ((300, 290), 30, 256, 384)],
    ids=["one block", "to its last position", "one more position", "behind a window"],
)
def test_only_the_blocks_that_a_query_may_see_are_read(starts, window, first, end):
    """What is read and not a number makes the output that, even where its weight is 0."""
    q, pages, table = filled()
    wanted = attended(q, pages, table, starts=starts, window=window)
    for spoilt, read in ((table[:, end // PAGE :], False), (table[:, end // PAGE - 1], True)):
        worse = {name: x.at[:, spoilt].set(jnp.nan) for name, x in pages.items()}
        assert np.isnan(attended(q, worse, table, starts=starts, window=window)).any() == read
    worse = {name: x.at[:, table[:, : first // PAGE]].set(jnp.nan) for name, x in pages.items()}
    np.testing.assert_array_equal(attended(q, worse, table, starts=starts, window=window), wanted)


def test_few_queries_and_short_rows_take_all_at_once():
    assert key_block(1, 4096) == key_block(15, 4096) == 4096
    assert key_block(16, 4096) == key_block(64, 4096) == 128 and key_block(512, 4096) == 1024
    assert key_block(64, 256) == 256 and key_block(64, 257) == 128


def test_few_pages_are_the_same_slots_taken_one_by_one(monkeypatch):
    rng = np.random.default_rng(3)
    pages = jnp.asarray(rng.normal(size=(2, 9, 16, K, H)), jnp.float32)
    table = jnp.asarray([[4, 0, 8, 7, 2], [1, 5, 9, 9, 9]], jnp.int32)  # 9: not mapped
    each = {}
    for few in (0, 8):
        monkeypatch.setattr(module, "_FEW_PAGES", few)
        each[few] = [
            np.asarray(module._positions(pages, jnp.int32(1), table, jnp.int32(start), block=64)) for start in (0, 64)
        ]
    for gathered, sliced in zip(each[0], each[8]):
        np.testing.assert_array_equal(gathered, sliced)
    np.testing.assert_array_equal(each[8][1][0, :16], pages[1, 2])
    assert not each[8][1][0, 16:].any() and not each[8][0][1, 32:].any() and not each[8][1][1].any()
