"""The paged kernel in jax's interpreter against the reference, what refuses it, and its program for CUDA."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.kernels import mosaic
from internjax.kernels import mosaic_paged_attention as module
from internjax.kernels.mosaic import Run
from internjax.kernels.paged_attention import check, paged_attention

L, P, K = 2, 16, 2


class Case(NamedTuple):
    """What a call of the kernel is made of."""

    dtype: str = "bfloat16"
    """Of the cache."""
    page_size: int = 32
    last: tuple[int, ...] = (20,)
    """Position of each row's last query; -1: a row that owns no page."""
    num_queries: int = 1
    groups: int = 2
    """Query heads of a key/value head."""
    head_dim: int = 64
    width: int = 64
    """Slots of a row's table."""


class Call(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    table: jax.Array
    positions: jax.Array
    scales: tuple | None


def call_of(case: Case) -> Call:
    """Random queries and pages; only pages that a row needs are mapped."""
    rng, H, S = np.random.default_rng(0), case.head_dim, case.page_size
    B, M = len(case.last), case.width // S
    num_pages = max(P, B * M)
    q = rng.standard_normal((B, case.num_queries, K * case.groups, H))
    table = rng.permutation(num_pages)[: B * M].reshape(B, M)
    table[np.arange(M) * S > np.array(case.last)[:, None]] = num_pages
    positions = np.maximum(np.array(case.last)[:, None] - np.arange(case.num_queries)[::-1], 0)
    pages = (L, num_pages, S, K)
    if case.dtype == "bfloat16":
        k, v = (jnp.asarray(rng.standard_normal((*pages, H)), jnp.bfloat16) for _ in range(2))
        scales = None
    else:
        width = H if case.dtype == "int8" else H // 2
        k, v = (jnp.asarray(rng.integers(0, 256, (*pages, width)), jnp.uint8) for _ in range(2))
        step = 3.0 / (255 if case.dtype == "int8" else 15)
        numbers = (rng.uniform(step / 2, step, pages), rng.normal(-1.0, 0.3, pages)) * 2
        scales = tuple(jnp.asarray(x, jnp.float16) for x in numbers)
    return Call(jnp.asarray(q, jnp.bfloat16), k, v, jnp.asarray(table), jnp.asarray(positions, jnp.int32), scales)


@functools.partial(jax.jit, static_argnames=("run", "split"))
def kernel(call: Call, layer, *, run=Run(interpreted=True), split=128):
    return module.paged_attention(
        call.q,
        call.k,
        call.v,
        layer=jnp.asarray(layer),
        page_table_BM=call.table,
        q_positions_BT=call.positions,
        scales=call.scales,
        scale=call.q.shape[-1] ** -0.5,
        run=run,
        split=split,
    )


def interpret(call: Call, layer) -> jax.Array:
    """What the kernel gives, interpreted, when it is there.

    A CPU has 32 computations under way at most. Those that are dispatched behind the kernel wait for it, and it for a
    place among them: its copies and barriers are computations of their own.
    """
    return jax.block_until_ready(kernel(call, layer))


def reference(call: Call) -> np.ndarray:
    """The reference on the same numbers, in float32."""
    names = ("k_scales", "k_offsets", "v_scales", "v_offsets")
    scales = {} if call.scales is None else dict(zip(names, call.scales, strict=True))
    out = paged_attention(
        call.q.astype(jnp.float32),
        call.k,
        call.v,
        layer=1,
        page_table_BM=call.table,
        q_positions_BT=call.positions,
        **scales,
    )
    return np.asarray(out)


def error(given, wanted) -> float:
    assert given.dtype == jnp.bfloat16 and given.shape == wanted.shape
    return float(np.abs(np.asarray(given, np.float32) - wanted).max() / np.abs(wanted).max())


TOLERANCE = 1e-2
"""As a share of the largest output: weights and outputs are rounded to bfloat16, 2^-9 each."""

BORDERS = (-1, 15, 16, 63, 128)
"""Last positions at the ends and beginnings of pages, blocks and splits, and a row that is empty."""

CASES = {
    "bfloat16, borders": Case(page_size=16, last=BORDERS, width=144),
    "int8": Case("int8", page_size=64, last=(70, 20), width=128, groups=1),
    "int4, several queries of rows that begin": Case("int4", last=(2, 40), num_queries=3, head_dim=128),
    "pages of two blocks, more queries than a tile": Case(
        page_size=128, last=(150,), num_queries=23, groups=3, width=256
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_reference(name):
    call = call_of(CASES[name])
    given, wanted = interpret(call, 1), reference(call)
    assert error(given, wanted) < TOLERANCE
    empty = np.array(CASES[name].last) < 0
    assert not np.asarray(given, np.float32)[empty].any(), "a row without pages sees nothing"


def changed(call: Call, what: str) -> Call:
    """A call with one thing off, which the kernel is given in place of the call."""
    if what == "page":
        return call._replace(table=call.table.at[0, 1].set(call.table[1, 0]))
    if what == "position":
        return call._replace(positions=call.positions - 1)
    index = ("k scale", "k offset", "v scale", "v offset").index(what)
    scales = list(call.scales)
    scales[index] = scales[index].at[1, call.table[1, 0], 3, 1].add(10.0)
    return call._replace(scales=tuple(scales))


@pytest.mark.parametrize("what", ["page", "position", "k scale", "k offset", "v scale", "v offset", "layer"])
def test_a_planted_fault_is_seen(what):
    call = call_of(CASES["int8"])
    given = interpret(call, 0) if what == "layer" else interpret(changed(call, what), 1)
    assert error(given, reference(call)) > 3 * TOLERANCE


def test_bits_depend_neither_on_the_width_of_the_table_nor_on_other_rows():
    call = call_of(CASES["int8"])
    together = np.asarray(interpret(call, 1), np.float32)
    alone = Call(*(x[:1] if name in ("q", "table", "positions") else x for name, x in call._asdict().items()))
    wide = alone._replace(table=jnp.pad(alone.table, ((0, 0), (0, 4)), constant_values=P))
    assert (np.asarray(interpret(wide, 1), np.float32) == together[:1]).all()


def test_what_other_rows_wrote_is_not_read():
    """Slots beyond a row's last page hold another row's NaN: even weight zero would spread it."""
    call = call_of(Case())
    others = np.setdiff1d(np.arange(P), np.asarray(call.table[0, :2]))
    dirty = call._replace(k=call.k.at[:, others].set(jnp.nan), v=call.v.at[:, others].set(jnp.nan))
    assert error(interpret(dirty, 1), reference(call)) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_it_lowers_for_cuda(dtype):
    call = call_of(Case(dtype, head_dim=128, groups=4))
    text = kernel.trace(call, 1, run=Run(), split=module.SPLIT).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    # Of the cache nothing but scales is gathered: its pages go into the kernel as they are.
    pages = f"tensor<{'x'.join(map(str, call.k.shape))}x{'bf16' if dtype == 'bfloat16' else 'ui8'}>"
    gathers = [line for line in text.splitlines() if "stablehlo.gather" in line]
    assert pages in text and not any(pages in line for line in gathers)


def test_it_is_refused_by_name():
    how = {
        "dtype": jnp.float16,
        "cache_dtype": jnp.float32,
        "head_dim": 96,
        "page_size": 48,
        "alibi": True,
        "window": 7,
    }
    check("xla", **how)
    with pytest.raises(ValueError, match="cannot do .*the cpu platform") as raised:
        check("mosaic", **how)
    said = str(raised.value)
    assert "Use paged_attention='xla'" in said
    for reason in (
        "dtype float16",
        "a cache of float32",
        "head_dim 96",
        "pages of 48 slots",
        "ALiBi slopes",
        "a window of 7 tokens",
    ):
        assert reason in said
    with pytest.raises(ValueError, match="unknown back end 'triton'"):
        check("triton", **how)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_compiled_kernel_is_the_reference_on_a_gpu(dtype):
    call = call_of(
        Case(dtype, page_size=64, last=(37, -1, 1300, 4095), num_queries=2, groups=4, head_dim=128, width=4096)
    )
    assert error(kernel(call, 1, run=mosaic.COMPILED, split=module.SPLIT), reference(call)) < TOLERANCE
