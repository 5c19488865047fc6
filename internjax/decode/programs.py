"""The compiled programs of the engine: pure functions on the DecodeState of all slots, shapes fixed by its settings.

B slots, R rows that are read or admitted together, S longest context, M pages of a row, C prompt chunk, n tokens of a
block, V vocabulary, F frequencies, I stop ids, K most likely tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from internjax.decode.adapters import RowAdapters, lora_of
from internjax.decode.generate import RUNNING, DecodeState, init_state, prefill_chunk, step
from internjax.decode.sample import Allowed, Limits, Sampling, SamplingParams, most_likely, stack
from internjax.decode.speculate import DraftModel, Speculation, draw_drafts, look_up, verify
from internjax.model import decoder, rope
from internjax.model.cache import CacheDType, KVCache, paged_cache
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora

ROWS_TOGETHER = 4
"""Rows that begin in the same round are read and admitted by so many."""


def empty_state(
    *,
    config: ModelConfig,
    num_slots: int,
    max_context: int,
    num_pages: int,
    page_size: int,
    cache_dtype: CacheDType,
    limits: Limits,
    draft: DraftModel | None = None,
) -> DecodeState:
    """Returns the state in which no slot draws and no page is owned."""
    pages_per_row = -(-max_context // page_size)
    cache = paged_cache(config, num_pages, page_size, batch=num_slots, pages_per_row=pages_per_row, dtype=cache_dtype)
    state = init_state(
        jnp.zeros((num_slots, 1), jnp.int32),
        jnp.ones(num_slots, jnp.int32),
        config=config,
        sampling=stack([SamplingParams()] * num_slots, limits=limits),
        max_new_tokens=1,
        length=max_context,
        stop_ids=jnp.full(limits.stop_ids, -1),
        num_top=limits.logprobs,
        cache=cache,
    )
    state = dataclasses.replace(state, active_B=jnp.zeros(num_slots, bool))
    if draft is None:
        return state
    like = draft.config
    cache = paged_cache(like, num_pages, page_size, batch=num_slots, pages_per_row=pages_per_row, dtype=cache_dtype)
    return dataclasses.replace(state, draft_cache=cache)


class Weights(NamedTuple):
    """Parameters of the model, and of the one that drafts for it."""

    model: dict
    draft: dict | None = None


def _with_table(state: DecodeState, page_table_BM) -> DecodeState:
    """Returns the state whose caches are read and written through another page table."""
    cache, draft_cache = (
        None if cache is None else dataclasses.replace(cache, page_table_BM=page_table_BM) for cache in _caches(state)
    )
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache)


def _with_own_tables(state: DecodeState, before: DecodeState) -> DecodeState:
    """Returns the state with the page tables of `before`: what a program is given is not part of the state."""
    cache, draft_cache = (
        None if now is None else dataclasses.replace(now, page_table_BM=then.page_table_BM)
        for now, then in zip(_caches(state), _caches(before))
    )
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache)


def _first_rows(state: DecodeState, num_rows: int) -> DecodeState:
    """Returns the state of the first rows alone, over the same pages."""
    bare = dataclasses.replace(state, cache=None, draft_cache=None)
    first = jax.tree.map(lambda rows: rows[:num_rows], bare)
    return dataclasses.replace(first, cache=state.cache, draft_cache=state.draft_cache)


def _with_first_rows(state: DecodeState, first: DecodeState) -> DecodeState:
    """Returns the state with its first rows, and the pages, from `first`."""
    bare, new = (dataclasses.replace(each, cache=None, draft_cache=None) for each in (state, first))
    rows = jax.tree.map(lambda rows, first: rows.at[: first.shape[0]].set(first), bare, new)
    return dataclasses.replace(rows, cache=first.cache, draft_cache=first.draft_cache)


def _draft_reads(weights: Weights, state: DecodeState, chunk: "PromptChunk", draft: DraftModel | None) -> DecodeState:
    """Returns the state with a chunk in the cache of the draft model too, if there is one."""
    if draft is None:
        return state
    cache = prefill_chunk(
        weights.draft,
        state.draft_cache,
        chunk.tokens_RC,
        start_B=chunk.start_R,
        end_B=chunk.end_R,
        inv_freq_BF=rope.inv_freq(draft.config)[None],
        config=draft.config,
    ).cache
    return dataclasses.replace(state, draft_cache=cache)


_SMALLEST_CHUNK = 16
_TOKENS_TOGETHER = 256
"""Parts of prompts that have so many tokens together, or no more than the longest chunk, are worth one program."""


class ReadShape(NamedTuple):
    """Rows that are read together, and tokens of each."""

    num_rows: int
    size: int


def read_shapes(prefill_chunk: int, *, num_slots: int, together: bool) -> list[ReadShape]:
    """Returns what `read_chunk` is compiled for: chunks of one prompt, and short ones of several."""
    sizes = [*(size for size in (_SMALLEST_CHUNK << i for i in range(20)) if size < prefill_chunk), prefill_chunk]
    found, num_rows = [ReadShape(1, size) for size in sizes], ROWS_TOGETHER
    if together and num_slots >= num_rows:
        most = max(prefill_chunk, _TOKENS_TOGETHER) // num_rows
        found += [ReadShape(num_rows, size) for size in sizes if size <= most]
    return found


class PromptChunk(NamedTuple):
    """Parts of prompts on their way into the pages of their rows."""

    tokens_RC: np.ndarray
    page_table_RM: np.ndarray
    start_R: np.ndarray
    end_R: np.ndarray
    """Position after the last one to be written; the rest of the chunk is padding."""
    inv_freq_RF: np.ndarray


class Admission(NamedTuple):
    """Rows of requests whose tokens are in the cache, up to the last one of each."""

    slot_R: np.ndarray
    """Beyond the last slot: nobody."""
    tokens_RS: np.ndarray
    length_R: np.ndarray
    prompt_length_R: np.ndarray
    """Tokens from here on are the answer's."""
    max_length_R: np.ndarray
    stop_ids_RI: np.ndarray
    inv_freq_RF: np.ndarray
    sampling_R: Sampling
    top_asked_R: np.ndarray


def read_chunk(
    weights: Weights,
    state: DecodeState,
    chunk: PromptChunk,
    adapters: Lora | RowAdapters | None,
    *,
    config: ModelConfig,
    draft: DraftModel | None = None,
) -> DecodeState:
    """Returns the state with one chunk of every prompt in the pages that its table names."""
    placed = _draft_reads(weights, _with_table(state, chunk.page_table_RM), chunk, draft)
    cache = prefill_chunk(
        weights.model,
        placed.cache,
        chunk.tokens_RC,
        start_B=chunk.start_R,
        end_B=chunk.end_R,
        inv_freq_BF=chunk.inv_freq_RF,
        config=config,
        lora=lora_of(adapters),
    ).cache
    return _with_own_tables(dataclasses.replace(placed, cache=cache), state)


# Positions whose logits are held at once while a prompt is scored: 24 MB an array for a vocabulary of 92,544.
SCORED_AT_ONCE = 64


class Scores(NamedTuple):
    """Log-probabilities of the tokens after those of a chunk, and the most likely ones in their places, best first."""

    logprobs_C: np.ndarray
    top_ids_CK: np.ndarray
    top_logprobs_CK: np.ndarray


def score_chunk(
    weights: Weights,
    state: DecodeState,
    chunk: PromptChunk,
    next_1C,
    temperature_1,
    adapters: Lora | RowAdapters | None,
    *,
    config: ModelConfig,
    num_top: int,
    draft: DraftModel | None = None,
) -> tuple[DecodeState, jax.Array]:
    """Returns what `read_chunk` does of one row, and the Scores of the tokens that follow, packed into int32
    `[C, 1 + 2 K]`.

    `next` are those tokens; the log-probabilities are of logits / temperature.
    """
    params, lora = weights.model, lora_of(adapters)
    placed = _draft_reads(weights, _with_table(state, chunk.page_table_RM), chunk, draft)
    hidden_1CD, cache, _ = prefill_chunk(
        params,
        placed.cache,
        chunk.tokens_RC,
        start_B=chunk.start_R,
        end_B=chunk.end_R,
        inv_freq_BF=chunk.inv_freq_RF,
        config=config,
        lora=lora,
    )
    after = _with_own_tables(dataclasses.replace(placed, cache=cache), state)
    K, C = min(num_top, config.vocab_size), chunk.tokens_RC.shape[1]
    R = min(C, SCORED_AT_ONCE)

    def cut(x_C):
        return jnp.pad(x_C, ((0, -C % R), *((0, 0),) * (x_C.ndim - 1))).reshape(-1, R, *x_C.shape[1:])

    def score(inputs):
        hidden_RD, next_R = inputs
        logits_RV = decoder.unembed(params, hidden_RD[None], config=config, lora=lora)[0]
        temperature_R = jnp.broadcast_to(temperature_1, R)
        policy_RV = logits_RV / temperature_R[:, None]
        # Behind a barrier: a token drawn and the same one among the most likely get the same bits.
        normaliser_R = lax.optimization_barrier(jax.nn.logsumexp(policy_RV, axis=-1))
        logprobs_R = jnp.take_along_axis(policy_RV, next_R[:, None], axis=-1)[:, 0] - normaliser_R
        ids_RK, top_RK = most_likely(logits_RV, temperature_R, normaliser_R, count=K)
        bits = lax.bitcast_convert_type(jnp.concatenate([logprobs_R[:, None], top_RK], axis=1), jnp.int32)
        return jnp.concatenate([bits, ids_RK], axis=1)

    with jax.named_scope("score_prompt"):
        inputs = (cut(hidden_1CD[0]), cut(next_1C[0]))
        packed = lax.map(score, inputs) if C > R else score(jax.tree.map(lambda x: x[0], inputs))
    return after, packed.reshape(-1, 1 + 2 * K)[:C]


def unpack_scores(packed: np.ndarray) -> Scores:
    """Returns the Scores that `score_chunk` packed."""
    K = packed.shape[1] // 2
    values = packed[:, : 1 + K].view(np.float32)
    return Scores(values[:, 0], packed[:, 1 + K :], values[:, 1:])


def admit(state: DecodeState, new: Admission) -> DecodeState:
    """Returns the state in which slots draw for new requests; nothing of their last ones is left."""
    R, S, V = *new.tokens_RS.shape, state.seen_BV.shape[1]
    index_S, index_R1 = jnp.arange(S), jnp.arange(R)[:, None]
    written_RS = jnp.where(index_S < new.length_R[:, None], new.tokens_RS, V)
    answer_RS = jnp.where(index_S >= new.prompt_length_R[:, None], written_RS, V)
    rows = {
        "tokens_BS": new.tokens_RS,
        "lengths_B": new.length_R,
        "prompt_lengths_B": new.prompt_length_R,
        "max_lengths_B": new.max_length_R,
        "active_B": True,
        "finish_B": RUNNING,
        "logprobs_BS": 0.0,
        "seen_BV": jnp.zeros((R, V), bool).at[index_R1, written_RS].set(True, mode="drop"),
        "stop_ids_BI": new.stop_ids_RI,
        "inv_freq_BF": new.inv_freq_RF,
    }

    def put(all_B, new_R):
        return all_B.at[new.slot_R].set(new_R, mode="drop")

    sampling = jax.tree.map(put, state.sampling, new.sampling_R)
    if state.counts_BV is not None:
        rows["counts_BV"] = jnp.zeros((R, V), jnp.int32).at[index_R1, answer_RS].add(1, mode="drop")
    rows = {name: put(getattr(state, name), row) for name, row in rows.items()}
    if state.top is not None:
        rows["top"] = state.top._replace(asked_B=put(state.top.asked_B, new.top_asked_R))
    return dataclasses.replace(state, sampling=sampling, **rows)


class Block(NamedTuple):
    """What one dispatch drew: per slot its new tokens, how many they are, and why the row is done (0: it is not)."""

    ids_Bn: np.ndarray
    logprobs_Bn: np.ndarray
    counts_B: np.ndarray
    finish_B: np.ndarray
    turns_B: np.ndarray
    """How often the model was asked; less than `counts` where drafts came true."""
    top_ids_BnK: np.ndarray
    top_logprobs_BnK: np.ndarray
    """Of rows that asked, at each of their new tokens: the most likely ones, best first."""


def block_tokens(num_turns: int, speculation: Speculation | None) -> int:
    """Returns the most tokens n that a block of `num_turns` turns gives a row."""
    return num_turns * (1 if speculation is None else 1 + speculation.num_drafts)


def decode_block(
    weights: Weights,
    state: DecodeState,
    page_table_BM,
    turns_B,
    allowed: Allowed,
    adapters: Lora | RowAdapters | None,
    *,
    config: ModelConfig,
    num_turns: int,
    speculation: Speculation | None = None,
) -> tuple[DecodeState, jax.Array]:
    """Returns the state after up to `num_turns` turns, and the Block packed into one int32 array
    `[B, 2 n + 3 + 2 n K]`.

    B rows of the page table and of what follows it are the first of the state, which may have more: those stay.
    turns: how many of them each slot takes part in; 0 lets it wait, -1 says that it is empty. allowed: which tokens a
    guide lets a row begin with. One array, because every copy to the host has its own latency.
    """
    before, lora, n = state, lora_of(adapters), block_tokens(num_turns, speculation)
    state = _first_rows(state, page_table_BM.shape[0])
    state = _with_table(dataclasses.replace(state, active_B=state.active_B & (turns_B >= 0)), page_table_BM)
    start_B, top = state.lengths_B, state.top
    rows_B = jnp.arange(start_B.shape[0])
    tops = () if top is None else (top.ids_BK, top.logprobs_BK)
    tops = [jnp.zeros((x.shape[0], n, x.shape[1]), x.dtype) for x in tops]

    def note(before: DecodeState, after: DecodeState, tops):
        if after.top is None:
            return tops
        place_B = jnp.where(after.lengths_B > before.lengths_B, before.lengths_B - start_B, n)
        return [all_.at[rows_B, place_B].set(new, mode="drop") for all_, new in zip(tops, after.top[1:])]

    def one_turn(carry):
        index, state, taken_B, tops = carry
        on_B = state.active_B & (index < turns_B)
        taken_B += on_B
        if speculation is None:
            after = step(weights.model, state, config=config, lora=lora, on_B=on_B, allowed=allowed)
            return index + 1, after, taken_B, note(state, after, tops)
        if isinstance(speculation, DraftModel):
            drafts_Bk, state = draw_drafts(weights.draft, state, draft=speculation)
        else:
            drafts_Bk = look_up(state.tokens_BS, state.lengths_B, lookup=speculation)
        after, tops = verify(
            weights.model,
            state,
            drafts_Bk,
            tops,
            note=note,
            on_B=on_B,
            allowed=allowed,
            config=config,
            lora=lora,
        )
        return index + 1, after, taken_B, tops

    _, state, taken_B, tops = lax.while_loop(
        lambda carry: (carry[0] < num_turns) & (carry[1].active_B & (carry[0] < turns_B)).any(),
        one_turn,
        (0, state, jnp.zeros_like(start_B), tops),
    )
    at_Bn = jnp.minimum(start_B[:, None] + jnp.arange(n), state.tokens_BS.shape[1] - 1)
    logprobs_Bn = jnp.take_along_axis(state.logprobs_BS, at_Bn, axis=1)
    packed = [
        jnp.take_along_axis(state.tokens_BS, at_Bn, axis=1),
        lax.bitcast_convert_type(logprobs_Bn, jnp.int32),
        jnp.stack([state.lengths_B - start_B, state.finish_B, taken_B], axis=1),
        *(lax.bitcast_convert_type(x, jnp.int32).reshape(x.shape[0], -1) for x in tops),
    ]
    return _with_own_tables(_with_first_rows(before, state), before), jnp.concatenate(packed, axis=1)


def unpack(packed: np.ndarray, *, num_tokens: int) -> Block:
    """Returns the Block that `decode_block` packed; `num_tokens` is its n (`block_tokens`)."""
    B, n = packed.shape[0], num_tokens
    ids_Bn, logprobs_Bn, ends_B3, tops = np.split(packed, [n, 2 * n, 2 * n + 3], axis=1)
    top_ids, top_logprobs = (half.reshape(B, n, -1) for half in np.split(tops, 2, axis=1))
    return Block(ids_Bn, logprobs_Bn.view(np.float32), *ends_B3.T, top_ids, top_logprobs.view(np.float32))


def _caches(state: DecodeState) -> tuple[KVCache, KVCache | None]:
    return state.cache, state.draft_cache


def _on_pages(state: DecodeState, change) -> DecodeState:
    """Returns the state with `change` applied to every array of the caches that is laid out by pages, `[L, P, ...]`."""
    cache, draft_cache = jax.tree.map(lambda pages: change(pages) if pages.ndim > 2 else pages, _caches(state))
    return dataclasses.replace(state, cache=cache, draft_cache=draft_cache)


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
    """Returns the arrays of the caches that are laid out by pages, `[L, P, ...]`."""
    return [leaf for leaf in jax.tree.leaves(_caches(state)) if leaf.ndim > 2]


def save_pages(state: DecodeState, pages_W: jax.Array) -> list[jax.Array]:
    """Returns the contents of `pages`, `[W, L, ...]` of each array of the cache; what is no page is all zeros."""
    return [jnp.moveaxis(x.at[:, pages_W].get(mode="fill", fill_value=0), 1, 0) for x in page_arrays(state)]


def load_pages(state: DecodeState, pages_W: jax.Array, contents: list[jax.Array]) -> DecodeState:
    """Returns the state with the contents that `save_pages` returned in `pages`; what is no page is dropped."""
    left = iter(contents)
    return _on_pages(state, lambda x: x.at[:, pages_W].set(jnp.moveaxis(next(left), 0, 1), mode="drop"))
