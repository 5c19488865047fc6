"""Bytes foretold from shapes, beside those that the compiler asks for."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.decode.adapters import AdapterPlaces, places_bytes
from internjax.decode.embed import mean_embeddings, num_rows
from internjax.decode.programs import (
    PromptChunk,
    Weights,
    decode_block,
    empty_state,
    read_chunk,
    read_shapes,
    score_chunk,
)
from internjax.decode.sample import Allowed, Limits
from internjax.decode.sizing import (
    buckets_of,
    embedding_bytes,
    fitting_pages,
    host_pages,
    page_bytes,
    row_buckets_of,
    weight_bytes,
    work_bytes,
)
from internjax.decode.speculate import PromptLookup
from internjax.kernels.attention import QUERY_CHUNK
from internjax.model import decoder
from internjax.model.config import INTERNLM2_7B, TINY
from tests.weights import random_params

CONFIG = dataclasses.replace(TINY, dtype="float32", num_layers=3, vocab_size=512)


@pytest.mark.parametrize(
    ("dtype", "speculation"), [("float32", None), ("int4", None), ("float32", PromptLookup(num_drafts=4))]
)
def test_the_work_is_not_more_than_foretold(dtype, speculation):
    B, S, C, page_size = 4, 1024, 64, 16
    sizes = {"num_slots": B, "max_context": S}
    make = functools.partial(
        empty_state, config=CONFIG, num_pages=B * S // 16, page_size=16, cache_dtype=dtype, limits=Limits(), **sizes
    )
    state, params = jax.eval_shape(make), Weights(decoder.abstract_params(CONFIG))
    table = jax.ShapeDtypeStruct((B, S // page_size), jnp.int32)

    def chunk(R: int, C: int) -> PromptChunk:
        return PromptChunk(
            jax.ShapeDtypeStruct((R, C), jnp.int32),
            jax.ShapeDtypeStruct((R, S // page_size), jnp.int32),
            *[jax.ShapeDtypeStruct((R,), jnp.int32)] * 2,
            jax.ShapeDtypeStruct((R, CONFIG.head_dim // 2), jnp.float32),
        )

    block = jax.jit(
        lambda *args: decode_block(*args, None, config=CONFIG, num_turns=2, speculation=speculation), donate_argnums=1
    )
    score = jax.jit(lambda *args: score_chunk(*args, None, config=CONFIG, num_top=20), donate_argnums=1)
    read = jax.jit(lambda *args: read_chunk(*args, None, config=CONFIG), donate_argnums=1)
    words = jax.ShapeDtypeStruct((B, CONFIG.vocab_size // 32), jnp.uint32)
    turns = jax.ShapeDtypeStruct((B,), jnp.int32), Allowed(words, jax.ShapeDtypeStruct((B,), bool))
    scored = jax.ShapeDtypeStruct((1, C), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    lowered = block.lower(params, state, table, *turns), score.lower(params, state, chunk(1, C), *scored)
    most = max(read_shapes(C, num_slots=B, together=True))
    assert most == (4, C)
    lowered += tuple(read.lower(params, state, chunk(*shape)) for shape in ((1, C), most))
    temporaries = max(each.compile().memory_analysis().temp_size_in_bytes for each in lowered)
    num_drafts = 0 if speculation is None else speculation.num_drafts
    foretold = work_bytes(CONFIG, prefill_chunk=C, num_drafts=num_drafts, **sizes)
    assert temporaries <= foretold + (1 << 20)
    assert foretold < 4 * temporaries, "so much is kept free for nothing"


def test_shorter_contexts_have_programs_of_their_own():
    assert buckets_of(128) == () and buckets_of(129) == (128,) and buckets_of(1024) == (128, 512)
    assert buckets_of(200_000) == (128, 512, 2048, 8192, 32_768, 131_072)
    assert [row_buckets_of(num_slots) for num_slots in (1, 2, 3, 4, 6)] == [(), (), (), (1,), (1, 3)]
    assert [row_buckets_of(num_slots) for num_slots in (8, 12, 16)] == [(1, 4), (1, 6), (1, 4, 8)]
    assert [row_buckets_of(num_slots) for num_slots in (32, 64)] == [(1, 4, 16), (1, 4, 16, 32)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_take_no_more_than_foretold(dtype):
    """Temporaries and outputs of the widest rows, in chunks of queries."""
    config, B, T = dataclasses.replace(CONFIG, dtype=dtype), num_rows(1024), 1024
    tokens, lengths = jax.ShapeDtypeStruct((B, T), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)
    make = jax.jit(functools.partial(mean_embeddings, config=config))
    memory = make.lower(decoder.abstract_params(config), tokens, lengths, lengths).compile().memory_analysis()
    taken = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert T > QUERY_CHUNK and taken <= embedding_bytes(config, T) < 4 * taken


def test_what_stands_beside_pages_is_counted_where_it_lies_and_as_often():
    """In float32 and once more in bfloat16, the part of one device; and the places for adapters."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = random_params(config)
    whole = weight_bytes(params, config)
    assert whole == 6 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert weight_bytes(params, CONFIG) == whole * 4 // 6
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=1, tensor=2), devices=jax.devices()[:2])
    try:
        cut = jax.device_put(params, sharding.shardings(decoder.logical_axes(config), params, mesh))
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    assert 0.5 * whole < weight_bytes(cut, config) < 0.52 * whole  # the norms are on both
    sizes = {"num_places": 3, "rank": 8, "targets": ("query", "down"), "dtype": "bfloat16"}
    places = AdapterPlaces(params, **sizes)
    assert places_bytes(params, **sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(places.stacked))
    with pytest.raises(ValueError, match="the model has no bias that an adapter could change"):
        AdapterPlaces(params, **sizes | {"targets": ("bias",)})


def test_pages_fill_what_weights_and_work_leave():
    sizes = {"num_slots": 8, "max_context": 4096, "prefill_chunk": 512}
    find = functools.partial(fitting_pages, INTERNLM2_7B, weight_bytes=15 << 30, page_size=16, **sizes)
    work = work_bytes(INTERNLM2_7B, **sizes)
    assert page_bytes(INTERNLM2_7B, 16, "bfloat16") == 16 * 131_072  # 128 KiB a token
    assert find(memory_bytes=(15 << 30) + work + 1000 * 16 * 131_072, cache_dtype="bfloat16") == 1000
    assert np.isclose(
        find(memory_bytes=60 << 30, cache_dtype="int4") / find(memory_bytes=60 << 30, cache_dtype="bfloat16"),
        256 / 68,
        rtol=1e-3,
    )
    vectors = embedding_bytes(INTERNLM2_7B, 4096)
    free = find(memory_bytes=60 << 30, cache_dtype="bfloat16") * 16 * 131_072
    left = find(memory_bytes=60 << 30, cache_dtype="bfloat16", longest_embedding=4096) * 16 * 131_072
    assert abs(free - left - vectors) <= 16 * 131_072, "the widest vectors have their room beside the pages"
    with pytest.raises(ValueError, match=r"embeddings 1\.\d\d GiB.*shorter embeddings"):
        find(memory_bytes=17 << 30, cache_dtype="bfloat16", longest_embedding=4096)
    one, two = (find(memory_bytes=60 << 30, cache_dtype="int8", draft=draft) for draft in (None, INTERNLM2_7B))
    assert one // 2 == two, "a draft model as large halves the pages"
    assert find(memory_bytes=60 << 30, cache_dtype="int8", tensor=4) // 4 == one, "each device has a part of every page"
    with pytest.raises(
        ValueError, match=r"4096 tokens does not fit.*memory 15\.00 GiB, weights 15\.00 GiB.*shorter context"
    ):
        find(memory_bytes=15 << 30, cache_dtype="bfloat16")


def test_pages_on_the_host_share_its_memory():
    find = functools.partial(host_pages, page_bytes=1000)
    assert [find(size, num_engines=2) for size in (0, 2000, 7999)] == [0, 1, 3]
    with pytest.raises(ValueError, match="1,999 bytes of .* hold no page: one is 1,000 bytes for each of 2 replicas"):
        find(1999, num_engines=2)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert find(machine, num_engines=1) == machine // 1000
    with pytest.raises(ValueError, match=r"GiB of the host's memory are to hold pages, and it has [\d.,]+ GiB in all"):
        find(machine + 1, num_engines=1)
    with pytest.raises(ValueError, match="a page must hold at least one token, given a page_size of 0"):
        page_bytes(CONFIG, 0, "bfloat16")
