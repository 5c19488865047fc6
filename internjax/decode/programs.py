"""The compiled programs of the engine: pure functions on the DecodeState of all slots, shapes fixed by its settings.

B slots, S longest context, M pages of a row, C prompt chunk, n tokens of a block, V vocabulary, F frequencies,
I stop ids.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from internjax.decode.adapters import RowAdapters, lora_of
from internjax.decode.generate import RUNNING, DecodeState, init_state, prefill_chunk, step
from internjax.decode.sample import Sampling, make_sampling
from internjax.model.cache import CacheDType, paged_cache
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora


def empty_state(
    *,
    config: ModelConfig,
    num_slots: int,
    max_context: int,
    num_pages: int,
    page_size: int,
    cache_dtype: CacheDType,
    max_stop_ids: int,
) -> DecodeState:
    """Returns the state in which no slot draws and no page is owned."""
    pages_per_row = -(-max_context // page_size)
    cache = paged_cache(config, num_pages, page_size, batch=num_slots, pages_per_row=pages_per_row, dtype=cache_dtype)
    state = init_state(
        jnp.zeros((num_slots, 1), jnp.int32),
        jnp.ones(num_slots, jnp.int32),
        config=config,
        sampling=make_sampling(num_slots),
        max_new_tokens=1,
        length=max_context,
        stop_ids=jnp.full(max_stop_ids, -1),
        cache=cache,
    )
    return dataclasses.replace(state, active_B=jnp.zeros(num_slots, bool))


class PromptChunk(NamedTuple):
    """Part of one prompt on its way into the pages of its row."""

    tokens_1C: np.ndarray
    page_table_1M: np.ndarray
    start_1: np.ndarray
    end_1: np.ndarray
    """Position after the last one to be written; the rest of the chunk is padding."""
    inv_freq_1F: np.ndarray


class Admission(NamedTuple):
    """The row of a request whose prompt is in the cache, up to its last token."""

    slot: np.ndarray
    tokens_S: np.ndarray
    length: np.ndarray
    max_length: np.ndarray
    stop_ids_I: np.ndarray
    inv_freq_F: np.ndarray
    sampling_1: Sampling


def read_chunk(
    params, state: DecodeState, chunk: PromptChunk, adapters: Lora | RowAdapters | None, *, config: ModelConfig
) -> DecodeState:
    """Returns the state with one chunk of one prompt in the pages that its table names."""
    cache = prefill_chunk(
        params,
        dataclasses.replace(state.cache, page_table_BM=chunk.page_table_1M),
        chunk.tokens_1C,
        start_B=chunk.start_1,
        end_B=chunk.end_1,
        inv_freq_BF=chunk.inv_freq_1F,
        config=config,
        lora=lora_of(adapters),
    )
    return dataclasses.replace(state, cache=dataclasses.replace(cache, page_table_BM=state.cache.page_table_BM))


def admit(state: DecodeState, new: Admission) -> DecodeState:
    """Returns the state in which the slot draws for a new request; nothing of its last one is left."""
    S, V = state.tokens_BS.shape[1], state.seen_BV.shape[1]
    prompt_S = jnp.where(jnp.arange(S) < new.length, new.tokens_S, V)
    rows = {
        "tokens_BS": new.tokens_S,
        "lengths_B": new.length,
        "max_lengths_B": new.max_length,
        "active_B": True,
        "finish_B": RUNNING,
        "logprobs_BS": 0.0,
        "seen_BV": jnp.zeros(V, bool).at[prompt_S].set(True, mode="drop"),
        "stop_ids_BI": new.stop_ids_I,
        "inv_freq_BF": new.inv_freq_F,
    }
    sampling = jax.tree.map(lambda all_B, new_1: all_B.at[new.slot].set(new_1[0]), state.sampling, new.sampling_1)
    rows = {name: getattr(state, name).at[new.slot].set(row) for name, row in rows.items()}
    return dataclasses.replace(state, sampling=sampling, **rows)


class Block(NamedTuple):
    """What one dispatch drew: per slot its new tokens, how many they are, and why the row is done (0: it is not)."""

    ids_Bn: np.ndarray
    logprobs_Bn: np.ndarray
    counts_B: np.ndarray
    finish_B: np.ndarray


def decode_block(
    params,
    state: DecodeState,
    page_table_BM,
    keep_B,
    adapters: Lora | RowAdapters | None,
    *,
    config: ModelConfig,
    num_tokens: int,
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after up to `num_tokens` steps, and the Block packed into one int32 array `[B, 2 n + 2]`.

    Slots outside `keep` draw nothing: the host knows them to be empty. One array, because every copy to the host has
    its own latency.
    """
    own_table = state.cache.page_table_BM
    cache = dataclasses.replace(state.cache, page_table_BM=page_table_BM)
    state = dataclasses.replace(state, active_B=state.active_B & keep_B, cache=cache)
    start_B, lora = state.lengths_B, lora_of(adapters)
    _, state = lax.while_loop(
        lambda carry: (carry[0] < num_tokens) & carry[1].active_B.any(),
        lambda carry: (carry[0] + 1, step(params, carry[1], config=config, lora=lora)),
        (0, state),
    )
    at_Bn = jnp.minimum(start_B[:, None] + jnp.arange(num_tokens), state.tokens_BS.shape[1] - 1)
    logprobs_Bn = jnp.take_along_axis(state.logprobs_BS, at_Bn, axis=1)
    packed = [
        jnp.take_along_axis(state.tokens_BS, at_Bn, axis=1),
        lax.bitcast_convert_type(logprobs_Bn, jnp.int32),
        (state.lengths_B - start_B)[:, None],
        state.finish_B[:, None],
    ]
    cache = dataclasses.replace(state.cache, page_table_BM=own_table)
    return dataclasses.replace(state, cache=cache), jnp.concatenate(packed, axis=1)


def unpack(packed: np.ndarray) -> Block:
    """Returns the Block that `decode_block` packed."""
    n = (packed.shape[1] - 2) // 2
    return Block(packed[:, :n], packed[:, n : 2 * n].view(np.float32), packed[:, -2], packed[:, -1])


def _on_pages(state: DecodeState, change) -> DecodeState:
    """Returns the state with `change` applied to every array of the cache that is laid out by pages, `[L, P, ...]`."""
    cache = jax.tree.map(lambda pages: change(pages) if pages.ndim > 2 else pages, state.cache)
    return dataclasses.replace(state, cache=cache)


def clear_pages(state: DecodeState, pages_M: jax.Array) -> DecodeState:
    """Returns the state with zeros in `pages`: attention weighs a slot not written yet by 0, and 0 * NaN is NaN."""
    return _on_pages(state, lambda pages: pages.at[:, pages_M].set(0, mode="drop"))


def copy_page(state: DecodeState, source: jax.Array, target: jax.Array, count: jax.Array) -> DecodeState:
    """Returns the state in which page `target` holds the first `count` slots of `source`, and zeros."""

    def copied(pages):
        page = pages[:, source]
        kept_S = (jnp.arange(page.shape[1]) < count).reshape(-1, *[1] * (page.ndim - 2))
        return pages.at[:, target].set(jnp.where(kept_S, page, 0), mode="drop")

    return _on_pages(state, copied)


def page_arrays(state: DecodeState) -> list[jax.Array]:
    """Returns the arrays of the cache that are laid out by pages, `[L, P, ...]`."""
    return [leaf for leaf in jax.tree.leaves(state.cache) if leaf.ndim > 2]


def save_pages(state: DecodeState, pages_W: jax.Array) -> list[jax.Array]:
    """Returns the contents of `pages`, `[W, L, ...]` of each array of the cache; what is no page is all zeros."""
    return [jnp.moveaxis(x.at[:, pages_W].get(mode="fill", fill_value=0), 1, 0) for x in page_arrays(state)]


def load_pages(state: DecodeState, pages_W: jax.Array, contents: list[jax.Array]) -> DecodeState:
    """Returns the state with the contents that `save_pages` returned in `pages`; what is no page is dropped."""
    left = iter(contents)
    return _on_pages(state, lambda x: x.at[:, pages_W].set(jnp.moveaxis(next(left), 0, 1), mode="drop"))
