"""Generation: one state, one step, and two drivers over it: `generate` (compiled loop) and `stream` (Python loop).

    generation = generate(params, prompts_BT, lengths_B, config=config, sampling=make_sampling(B), max_new_tokens=64)

The continuous-batching engine drives the same step. Prompts are right-padded; a row's tokens stand in one buffer, the
token at index i has absolute position i, and a row is done when it draws a stop token (kept, and counted) or is full.

B batch, T prompt time, S length of the buffer, C chunk, N new tokens, V vocabulary, F frequencies, I stop ids,
K most likely tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from internjax.decode.sample import Allowed, Sampling, Written, of_rows, sample
from internjax.model import decoder, rope
from internjax.model.cache import CacheDType, KVCache, dense_cache
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, with_gains
from internjax.model.quantize import QuantArray, packed_for

RUNNING, STOP, LENGTH, ERROR = range(4)
"""Codes in `finish`: not done; drew a stop token; reached its longest length; the model's logits are not finite."""

FINISH_NAMES = (None, "stop", "length", "error")

# Tokens that go through the model at once while prompts are read: bounds the memory of attention over long prompts.
PREFILL_TOKENS = 4096


class Top(NamedTuple):
    """The most likely tokens at each row's last step, best first, found while any active row asks for them."""

    asked_B: jax.Array
    ids_BK: jax.Array
    logprobs_BK: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that decoding knows of its rows; `step` maps it to the next one, and its buffers can be donated."""

    tokens_BS: jax.Array
    """Prompt and continuation."""
    lengths_B: jax.Array
    """Tokens in the row. The last one is not in the cache yet: the next step feeds it."""
    prompt_lengths_B: jax.Array
    max_lengths_B: jax.Array
    active_B: jax.Array
    finish_B: jax.Array
    logprobs_BS: jax.Array
    """Log-probability of every drawn token under the model at the row's temperature; 0 in the prompt."""
    seen_BV: jax.Array
    """Tokens of the row so far, for the repetition penalty."""
    stop_ids_BI: jax.Array
    """Tokens that end the row; -1 pads."""
    inv_freq_BF: jax.Array
    sampling: Sampling
    cache: KVCache
    counts_BV: jax.Array | None = None
    """How often each token stands in the answer, for presence and frequency penalties; None: no row may have them."""
    draft_cache: KVCache | None = None
    """Of the model that drafts, with the pages of `cache`."""
    top: Top | None = None
    """None: no row may ask for other tokens than those drawn."""


def stop_table(batch: int, stop_ids: Sequence[int] | jax.Array) -> jax.Array:
    """Returns stop ids `[B, I]` from those of all rows `[I]` or of each row `[B, I]`, padded with -1."""
    table = jnp.asarray(stop_ids, jnp.int32)
    if table.ndim == 2 and table.shape[0] != batch:
        raise ValueError(f"stop_ids must have one row of ids for each of the {batch} rows; given shape {table.shape}")
    return jnp.broadcast_to(table, (batch, table.shape[-1]))


def init_state(
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    max_new_tokens: int | jax.Array,
    length: int,
    stop_ids: Sequence[int] | jax.Array = (),
    inv_freq_BF: jax.Array | None = None,
    num_top: int = 0,
    cache: KVCache,
) -> DecodeState:
    """Returns the state before prefill: buffers `length` long that hold the prompts, and an empty cache.

    `max_new_tokens` is one number or one per row. `inv_freq` defaults to the frequencies of sequences declared to be at
    most `length` long. `num_top`: the most likely tokens that rows may ask for, up to the vocabulary.
    """
    B, T = prompts_BT.shape
    V, K = config.vocab_size, min(num_top, config.vocab_size)
    lengths_B = jnp.asarray(lengths_B, jnp.int32)
    tokens_BS = jnp.pad(prompts_BT.astype(jnp.int32), ((0, 0), (0, length - T)))
    in_prompt_BT = jnp.arange(T) < lengths_B[:, None]
    seen_ids_BT = jnp.where(in_prompt_BT, prompts_BT, V)
    counted = sampling.presence_penalty is not None or sampling.frequency_penalty is not None
    if inv_freq_BF is None:
        inv_freq_BF = rope.inv_freq(config, length=length)[None]
    return DecodeState(
        tokens_BS=tokens_BS,
        lengths_B=lengths_B,
        prompt_lengths_B=jnp.array(lengths_B),  # a buffer of its own: it is donated beside the other
        max_lengths_B=jnp.minimum(lengths_B + max_new_tokens, length),
        active_B=jnp.ones(B, bool),
        finish_B=jnp.full(B, RUNNING, jnp.int32),
        logprobs_BS=jnp.zeros((B, length), jnp.float32),
        seen_BV=jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], seen_ids_BT].set(True, mode="drop"),
        stop_ids_BI=stop_table(B, stop_ids),
        inv_freq_BF=jnp.broadcast_to(inv_freq_BF, (B, config.head_dim // 2)),
        sampling=jax.tree.map(jnp.asarray, sampling),
        cache=cache,
        counts_BV=jnp.zeros((B, V), jnp.int32) if counted else None,
        top=Top(jnp.zeros(B, bool), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K), jnp.float32)) if K else None,
    )


def prefill_chunk(
    params: dict,
    cache: KVCache,
    tokens_BC: jax.Array,
    *,
    start_B: jax.Array,
    end_B: jax.Array,
    inv_freq_BF: jax.Array,
    config: ModelConfig,
    lora: Lora | None = None,
) -> decoder.Forward:
    """Returns the hidden states of the tokens at positions start .. start + C - 1, and the cache with them in it.

    Those from `end` on are padding.
    """
    positions_BC = start_B[:, None] + jnp.arange(tokens_BC.shape[1], dtype=jnp.int32)
    segments_BC = (positions_BC < end_B[:, None]).astype(jnp.int32)
    return decoder.forward(
        params,
        tokens_BC,
        config=config,
        positions_BT=positions_BC,
        segments_BT=segments_BC,
        inv_freq_BF=inv_freq_BF,
        lora=lora,
        cache=cache,
    )


def prefill(
    params: dict, state: DecodeState, *, config: ModelConfig, prompt_length: int, lora: Lora | None = None
) -> DecodeState:
    """Returns the state with all but the last token of every prompt in the cache.

    `prompt_length` is the width of the padded prompts. They are read in chunks of about PREFILL_TOKENS tokens.
    """
    B, S = state.tokens_BS.shape
    T = prompt_length - 1
    C = min(T, max(PREFILL_TOKENS // B, 16))
    if T == 0:
        return state
    chunk_starts = jnp.arange(0, T, C, dtype=jnp.int32)
    padded_BS = jnp.pad(state.tokens_BS, ((0, 0), (0, C)))

    def chunk(cache, start):
        tokens_BC = lax.dynamic_slice_in_dim(padded_BS, start, C, axis=1)
        cache = prefill_chunk(
            params,
            cache,
            tokens_BC,
            start_B=jnp.full(B, start),
            end_B=state.lengths_B - 1,
            inv_freq_BF=state.inv_freq_BF,
            config=config,
            lora=lora,
        ).cache
        return cache, None

    with jax.named_scope("prefill"):
        cache, _ = lax.scan(chunk, state.cache, chunk_starts)
    return dataclasses.replace(state, cache=cache)


def next_logits(
    params: dict,
    state: DecodeState,
    drafts_Bk: jax.Array | None = None,
    *,
    config: ModelConfig,
    lora: Lora | None = None,
) -> tuple[jax.Array, KVCache]:
    """Returns the logits `[B, 1 + k, V]` after every row's last token and after each of the k drafts that may follow
    it, and the cache with them in it; what is cached for drafts that are not taken is written over later."""
    rows_B = jnp.arange(state.tokens_BS.shape[0])
    fed_BT = state.tokens_BS[rows_B, state.lengths_B - 1][:, None]
    if drafts_Bk is not None:
        fed_BT = jnp.concatenate([fed_BT, jnp.maximum(drafts_Bk, 0)], axis=1)
    T = fed_BT.shape[1]
    with jax.named_scope("decode_step"):
        hidden_BTD, cache, _ = decoder.forward(
            params,
            fed_BT,
            config=config,
            positions_BT=(state.lengths_B - 1)[:, None] + jnp.arange(T),
            segments_BT=jnp.broadcast_to(state.active_B.astype(jnp.int32)[:, None], fed_BT.shape),
            inv_freq_BF=state.inv_freq_BF,
            lora=lora,
            cache=state.cache,
        )
        return decoder.unembed(params, hidden_BTD, config=config, lora=lora), cache


def advance(
    state: DecodeState,
    logits_BV: jax.Array,
    *,
    on_B: jax.Array,
    forced_B: jax.Array | None = None,
    allowed: Allowed | None = None,
) -> DecodeState:
    """Returns the state with one more token, drawn from the logits, in every active row of `on`; the others stay.

    `allowed` are the tokens that guides let come next. `forced` are taken instead of those drawn: their
    log-probabilities are those of a draw, bit by bit.
    """
    S, V = state.tokens_BS.shape[1], logits_BV.shape[-1]
    rows_B, on_B = jnp.arange(on_B.shape[0]), on_B & state.active_B
    with jax.named_scope("draw"):
        written = Written(
            state.seen_BV, state.counts_BV, state.tokens_BS, state.prompt_lengths_B, state.stop_ids_BI, allowed
        )
        top = state.top
        drawn = sample(
            logits_BV,
            of_rows(state.sampling, on_B),
            written,
            positions_B=state.lengths_B,
            num_top=0 if top is None else top.ids_BK.shape[1],
            top_B=None if top is None else top.asked_B & on_B,
            forced_B=forced_B,
        )

    # The order is important: a row whose logits are broken draws nothing; a stop token in the last place is a stop.
    broken_B = on_B & ~jnp.isfinite(drawn.logprobs_B)
    drawn_B = on_B & ~broken_B
    stopped_B = (drawn.ids_B[:, None] == state.stop_ids_BI).any(axis=-1)
    lengths_B = state.lengths_B + drawn_B
    full_B = lengths_B >= state.max_lengths_B
    finish_B = jnp.where(broken_B, ERROR, jnp.where(stopped_B, STOP, jnp.where(full_B, LENGTH, RUNNING)))
    finish_B = jnp.where(on_B, finish_B, state.finish_B)

    at = (rows_B, jnp.where(drawn_B, state.lengths_B, S))
    new = (rows_B, jnp.where(drawn_B, drawn.ids_B, V))
    counts_BV = state.counts_BV
    return dataclasses.replace(
        state,
        tokens_BS=state.tokens_BS.at[at].set(drawn.ids_B, mode="drop"),
        logprobs_BS=state.logprobs_BS.at[at].set(drawn.logprobs_B, mode="drop"),
        seen_BV=state.seen_BV.at[new].set(True, mode="drop"),
        counts_BV=None if counts_BV is None else counts_BV.at[new].add(1, mode="drop"),
        top=None if top is None else Top(top.asked_B, drawn.top_ids_BK, drawn.top_logprobs_BK),
        lengths_B=lengths_B,
        active_B=state.active_B & (finish_B == RUNNING),
        finish_B=finish_B,
    )


def step(
    params: dict,
    state: DecodeState,
    *,
    config: ModelConfig,
    lora: Lora | None = None,
    forced_B: jax.Array | None = None,
    on_B: jax.Array | None = None,
    allowed: Allowed | None = None,
) -> DecodeState:
    """Returns the state with one more token in every active row (of `on`); rows that are done stay as they are."""
    logits_BTV, cache = next_logits(params, state, config=config, lora=lora)
    state = dataclasses.replace(state, cache=cache)
    on_B = state.active_B if on_B is None else on_B
    return advance(state, logits_BTV[:, 0], on_B=on_B, forced_B=forced_B, allowed=allowed)


def decoding_params(params: dict, config: ModelConfig) -> dict:
    """Returns the parameters in the computing dtype, so that a step reads no wider weights than it multiplies with.

    The results are the same: the model casts each of them on use. QuantArrays are packed for the config's back end, and
    stay otherwise; a head whose rows are normalised in float32 stays too. Who generates often with one model calls this
    once before.
    """
    dtype = jnp.dtype(config.dtype)

    def cast(leaf):
        return packed_for(leaf, config.quant_matmul) if isinstance(leaf, QuantArray) else leaf.astype(dtype)

    cast_params = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    return cast_params | {"head": params["head"]} if config.norm_head else cast_params


def _prepared(params: dict, lora: Lora | None) -> tuple[dict, Lora | None]:
    """Returns both as the programs take them: the layers where they are read fastest, adapters with their gains, which
    are those of a stack."""
    apart = decoder.with_layers_apart(params)
    return apart, lora if lora is None or apart is params else _with_gains(lora, params)


_with_gains = jax.jit(with_gains)


class Generation(NamedTuple):
    """What was generated, without the prompts; everything past a row's length is 0."""

    tokens_BN: jax.Array
    lengths_B: jax.Array
    """New tokens of each row, its stop token included."""
    logprobs_BN: jax.Array
    """Under the model at the row's temperature, before penalties and truncation."""
    finish_B: jax.Array
    """STOP, LENGTH or ERROR."""


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "cache_dtype"))
def _start(
    params, prompts_BT, lengths_B, sampling, stop_ids, inv_freq_BF, lora, *, config, max_new_tokens, cache_dtype
) -> DecodeState:
    """Returns the state in which every prompt is read and no token is drawn yet."""
    B, T = prompts_BT.shape
    length = T + max_new_tokens
    state = init_state(
        prompts_BT,
        lengths_B,
        config=config,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        length=length,
        stop_ids=stop_ids,
        inv_freq_BF=inv_freq_BF,
        cache=dense_cache(config, B, length, dtype=cache_dtype),
    )
    return prefill(params, state, config=config, prompt_length=T, lora=lora)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "cache_dtype"))
def _generate(
    params, prompts_BT, lengths_B, sampling, stop_ids, inv_freq_BF, lora, *, config, max_new_tokens, cache_dtype
) -> Generation:
    params = decoding_params(params, config)
    lora = None if lora is None else with_gains(lora, params)  # before the loop, not with every token
    state = _start(
        params,
        prompts_BT,
        lengths_B,
        sampling,
        stop_ids,
        inv_freq_BF,
        lora,
        config=config,
        max_new_tokens=max_new_tokens,
        cache_dtype=cache_dtype,
    )
    start_B, index_BN = state.lengths_B, jnp.arange(max_new_tokens)
    state = lax.while_loop(
        lambda state: state.active_B.any(), lambda state: step(params, state, config=config, lora=lora), state
    )
    new_B = state.lengths_B - start_B

    def new(buffer_BS):
        values_BN = jnp.take_along_axis(buffer_BS, start_B[:, None] + index_BN, axis=1)
        return jnp.where(index_BN < new_B[:, None], values_BN, 0)

    return Generation(new(state.tokens_BS), new_B, new(state.logprobs_BS), state.finish_B)


def _check(prompts_BT, lengths_B, config, max_new_tokens) -> None:
    if config.head != "lm":
        raise ValueError("a model with a scalar head scores and cannot generate; use one with head='lm'")
    if np.ndim(prompts_BT) != 2 or np.shape(lengths_B) != np.shape(prompts_BT)[:1]:
        raise ValueError(
            f"prompts must be [B, T] token ids and lengths [B]; given {np.shape(prompts_BT)} and {np.shape(lengths_B)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, given {max_new_tokens}")
    if isinstance(lengths_B, jax.core.Tracer):
        return
    T = np.shape(prompts_BT)[1]
    shortest, longest = np.min(lengths_B), np.max(lengths_B)
    if shortest < 1 or longest > T:
        raise ValueError(
            f"prompt lengths must be in 1..{T}, the width of the prompts; given {shortest}..{longest}. "
            "An empty prompt has nothing to continue: begin it with the tokenizer's first token."
        )


def generate(
    params: dict,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int] | jax.Array = (),
    lora: Lora | None = None,
    cache_dtype: CacheDType | None = None,
    inv_freq_BF: jax.Array | None = None,
) -> Generation:
    """Returns up to `max_new_tokens` new tokens after every right-padded prompt, in one compiled loop.

    It ends when every row is done. `stop_ids` are those of all rows, or `[B, I]`. `cache_dtype` defaults to the
    config's. The declared length of every row, which fixes dynamic NTK frequencies, is T + max_new_tokens. Compiles
    once per (B, T, max_new_tokens, number of stop ids). Raises ValueError for an empty prompt.
    """
    _check(prompts_BT, lengths_B, config, max_new_tokens)
    params, lora = _prepared(params, lora)
    return _generate(
        params,
        prompts_BT,
        lengths_B,
        sampling,
        jnp.asarray(stop_ids, jnp.int32),
        inv_freq_BF,
        lora,
        config=config,
        max_new_tokens=max_new_tokens,
        cache_dtype=cache_dtype or config.dtype,
    )


@functools.partial(jax.jit, static_argnames=("config", "cache_dtype"))
def _replay(
    params, prompts_BT, lengths_B, answers_BN, answer_lengths_B, sampling, inv_freq_BF, lora, *, config, cache_dtype
) -> jax.Array:
    N = answers_BN.shape[1]
    params = decoding_params(params, config)
    lora = None if lora is None else with_gains(lora, params)
    settings = {"config": config, "max_new_tokens": N, "cache_dtype": cache_dtype}
    nothing_I = jnp.zeros(0, jnp.int32)
    state = _start(params, prompts_BT, lengths_B, sampling, nothing_I, inv_freq_BF, lora, **settings)
    start_B = state.lengths_B
    state = dataclasses.replace(
        state, max_lengths_B=start_B + answer_lengths_B, active_B=state.active_B & (answer_lengths_B > 0)
    )

    def one_more(carry):
        index, state = carry
        forced_B = lax.dynamic_index_in_dim(answers_BN, index, axis=1, keepdims=False)
        return index + 1, step(params, state, config=config, lora=lora, forced_B=forced_B)

    _, state = lax.while_loop(lambda carry: carry[1].active_B.any(), one_more, (0, state))
    index_BN = jnp.arange(N)
    values_BN = jnp.take_along_axis(state.logprobs_BS, start_B[:, None] + index_BN, axis=1)
    return jnp.where(index_BN < answer_lengths_B[:, None], values_BN, 0)


def replay(
    params: dict,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    answers_BN: jax.Array,
    answer_lengths_B: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    lora: Lora | None = None,
    cache_dtype: CacheDType | None = None,
    inv_freq_BF: jax.Array | None = None,
) -> jax.Array:
    """Returns the log-probabilities `[B, N]` of given answers by the step that draws them; 0 past a row's length.

    For the answers of a `generate` with as many rows, prompts as wide and max_new_tokens = N they are its own, bit by
    bit. The forward pass of training agrees up to rounding (`decode.score.logprobs`). Raises ValueError for an empty
    prompt, and for answers longer than N or of another number of rows.
    """
    _check(prompts_BT, lengths_B, config, np.shape(answers_BN)[1])
    (B, _), (num_answers, N) = np.shape(prompts_BT), np.shape(answers_BN)
    traced = isinstance(answer_lengths_B, jax.core.Tracer)
    if num_answers != B or (not traced and not 0 <= np.min(answer_lengths_B) <= np.max(answer_lengths_B) <= N):
        raise ValueError(
            f"replay wants an answer for each of the {B} prompts, with lengths in 0..{N}, the width of the answers; "
            f"given {num_answers} answers" + ("" if traced else f" of lengths {np.asarray(answer_lengths_B).tolist()}")
        )
    params, lora = _prepared(params, lora)
    return _replay(
        params,
        prompts_BT,
        lengths_B,
        answers_BN,
        answer_lengths_B,
        sampling,
        inv_freq_BF,
        lora,
        config=config,
        cache_dtype=cache_dtype or config.dtype,
    )


class Streamed(NamedTuple):
    """What one step of `stream` brought, as NumPy arrays."""

    ids_B: np.ndarray
    """The token drawn; -1 in rows that drew none."""
    logprobs_B: np.ndarray
    finish_B: np.ndarray
    """RUNNING, or why the row is done."""


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _stream_step(params, state, lora, *, config) -> tuple[DecodeState, Streamed]:
    after = step(params, state, config=config, lora=lora)
    last = (jnp.arange(after.lengths_B.shape[0]), after.lengths_B - 1)
    ids_B = jnp.where(after.lengths_B > state.lengths_B, after.tokens_BS[last], -1)
    return after, Streamed(ids_B, after.logprobs_BS[last], after.finish_B)


def stream(
    params: dict,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    max_new_tokens: int,
    stop_ids: Sequence[int] | jax.Array = (),
    lora: Lora | None = None,
    cache_dtype: CacheDType | None = None,
    inv_freq_BF: jax.Array | None = None,
) -> Iterator[Streamed]:
    """Yields the tokens of `generate` one step at a time, as they are drawn. Arguments are those of `generate`."""
    _check(prompts_BT, lengths_B, config, max_new_tokens)
    params, lora = _prepared(decoding_params(params, config), lora)
    state = _start(
        params,
        prompts_BT,
        lengths_B,
        sampling,
        jnp.asarray(stop_ids, jnp.int32),
        inv_freq_BF,
        lora,
        config=config,
        max_new_tokens=max_new_tokens,
        cache_dtype=cache_dtype or config.dtype,
    )
    running = True
    while running:
        state, drawn = _stream_step(params, state, lora, config=config)
        drawn = Streamed(*jax.device_get(drawn))
        running = bool((drawn.finish_B == RUNNING).any())
        yield drawn
