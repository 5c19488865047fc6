"""Drawing the next token: every row has its own settings, and its draw depends on its seed and position alone.

The order of processing, of which work that no row asks for is skipped at run time:
1. repetition penalty, 2. presence and frequency penalties, 3. logit bias, 4. bans (bad words, early stop tokens),
5. temperature, 6. top-k, 7. top-p of what is left, 8. min-p, 9. typical of what is left, 10. the draw.
The log-probabilities reported are the policy's: of logits / temperature, before all else (`Sampled`).

B batch, V vocabulary, C blocks of the vocabulary, W width of a block, S buffer of a row, I stop ids, J biased tokens,
N bad words, L ids of the longest bad word, K most likely tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A draw walks block sums first and one block after, so only B x (V / W + W) numbers are summed in order.
_BLOCK = 128
# Below it logits / temperature would overflow; nothing but the most likely token could be drawn anyway.
_MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request draws its tokens. The default is the model's own distribution."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token, always."""
    top_k: int = 0
    """Only the k most likely tokens (and ties with the k-th) can be drawn; 0 is off."""
    top_p: float = 1.0
    """Only the smallest set of most likely tokens whose probability reaches top_p can be drawn; 1 is off."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the most likely one can be drawn; 0 is off."""
    typical_p: float = 1.0
    """Only the smallest set of most typical tokens (whose -log p is nearest to the entropy) with at least this
    probability can be drawn; 1 is off. Locally typical sampling, arXiv:2202.00666."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in the prompt or the answer: divided by it if positive, else multiplied; 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that stand in the answer so far; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit as often as it stands in the answer so far; 0 is off."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number in -100 .. 100) pairs: the number is added to the token's logit."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids that the answer must not complete, be their beginning in the prompt or the answer."""
    min_new_tokens: int = 0
    """Before so many tokens are drawn, no stop token can be."""
    seed: int = 0
    """Same seed, prompt and settings: same tokens, whatever else runs beside."""

    def __post_init__(self):
        ranges = {
            "temperature": (
                self.temperature == 0 or _MIN_TEMPERATURE <= self.temperature < math.inf,
                f"0 (greedy) or a finite number >= {_MIN_TEMPERATURE}",
            ),
            "top_k": (_is_int(self.top_k) and 0 <= self.top_k < 2**31, "an integer >= 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "a number in (0, 1] (1 is off)"),
            "min_p": (0 <= self.min_p <= 1, "a number in [0, 1] (0 is off)"),
            "typical_p": (0 < self.typical_p <= 1, "a number in (0, 1] (1 is off)"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a finite number > 0 (1 is off)"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "a number in [-2, 2] (0 is off)"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "a number in [-2, 2] (0 is off)"),
            "logit_bias": (
                all(_is_id(token) and -100 <= bias <= 100 for token, bias in self.logit_bias)
                and len({token for token, _ in self.logit_bias}) == len(self.logit_bias),
                "pairs of a token id, each at most once, and a number in [-100, 100]",
            ),
            "bad_words": (
                all(word and all(map(_is_id, word)) for word in self.bad_words),
                "sequences of token ids, none empty",
            ),
            "min_new_tokens": (
                _is_int(self.min_new_tokens) and 0 <= self.min_new_tokens < 2**31,
                "an integer >= 0 (0 is off)",
            ),
            "seed": (_is_int(self.seed) and 0 <= self.seed < 2**32, "an integer in 0 .. 2^32 - 1"),
        }
        wrong = [
            f"{name} must be {wanted}, given {getattr(self, name)!r}"
            for name, (good, wanted) in ranges.items()
            if not good
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


def _is_int(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_id(value) -> bool:
    return _is_int(value) and 0 <= value < 2**31


class Limits(NamedTuple):
    """The most that one request may ask for, where the size is part of the compiled programs; 0 leaves it out."""

    stop_ids: int = 8
    logit_bias: int = 300
    """Biased tokens."""
    bad_words: int = 64
    bad_word_length: int = 16
    """Ids of one bad word."""
    logprobs: int = 20
    """Most likely tokens reported beside the one drawn."""


class Sampling(NamedTuple):
    """SamplingParams of every row as arrays `[B]`: data of the compiled step, so mixed settings cost no compilation.

    What is None is left out of the compiled program.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    typical_p: jax.Array | None = None
    presence_penalty: jax.Array | None = None
    frequency_penalty: jax.Array | None = None
    min_new_tokens: jax.Array | None = None
    bias_ids_BJ: jax.Array | None = None
    """Biased tokens; -1 pads."""
    bias_BJ: jax.Array | None = None
    bad_words_BNL: jax.Array | None = None
    """Ids of the bad words, ending at the right; -1 pads on the left."""


class _Field(NamedTuple):
    """The dtype of a field of Sampling, and the value that asks for nothing (the seed's: any)."""

    dtype: str
    off: float


_FIELDS = Sampling(
    temperature=_Field("float32", 0),  # greedy: the cheapest way to draw
    top_k=_Field("int32", 0),
    top_p=_Field("float32", 1),
    min_p=_Field("float32", 0),
    repetition_penalty=_Field("float32", 1),
    seed=_Field("uint32", 0),
    typical_p=_Field("float32", 1),
    presence_penalty=_Field("float32", 0),
    frequency_penalty=_Field("float32", 0),
    min_new_tokens=_Field("int32", 0),
    bias_ids_BJ=_Field("int32", -1),
    bias_BJ=_Field("float32", 0),
    bad_words_BNL=_Field("int32", -1),
)
_ALWAYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_SOMETIMES = ("typical_p", "presence_penalty", "frequency_penalty", "min_new_tokens")


def stack(rows: Sequence[SamplingParams], *, limits: Limits | None = None) -> Sampling:
    """Returns the settings of `rows` as NumPy arrays.

    With limits every field is there, at the same size for any rows that keep to them (`check_options`): the settings of
    an engine. Without, what no row uses is None, and lists are as long as the longest.
    """
    arrays = {
        name: np.array([getattr(row, name) for row in rows], getattr(_FIELDS, name).dtype)
        for name in _ALWAYS + _SOMETIMES
    }
    if limits is None:
        words = [word for row in rows for word in row.bad_words]
        limits = Limits(
            logit_bias=max((len(row.logit_bias) for row in rows), default=0),
            bad_words=max((len(row.bad_words) for row in rows), default=0),
            bad_word_length=max(map(len, words), default=0),
        )
        unused = [name for name in _SOMETIMES if (arrays[name] == getattr(_FIELDS, name).off).all()]
        arrays |= dict.fromkeys(unused)
    if limits.logit_bias:
        ids_BJ = np.full((len(rows), limits.logit_bias), -1, np.int32)
        bias_BJ = np.zeros((len(rows), limits.logit_bias), np.float32)
        for row, params in enumerate(rows):
            for place, (token, bias) in enumerate(params.logit_bias):
                ids_BJ[row, place], bias_BJ[row, place] = token, bias
        arrays |= {"bias_ids_BJ": ids_BJ, "bias_BJ": bias_BJ}
    if limits.bad_words and limits.bad_word_length:
        words_BNL = np.full((len(rows), limits.bad_words, limits.bad_word_length), -1, np.int32)
        for row, params in enumerate(rows):
            for place, word in enumerate(params.bad_words):
                words_BNL[row, place, -len(word) :] = word
        arrays["bad_words_BNL"] = words_BNL
    return Sampling(**arrays)


def make_sampling(
    batch: int,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
    min_p: float | jax.Array = 0.0,
    repetition_penalty: float | jax.Array = 1.0,
    seed: int | Sequence[int] | jax.Array = 0,
    typical_p: float | jax.Array | None = None,
    presence_penalty: float | jax.Array | None = None,
    frequency_penalty: float | jax.Array | None = None,
    min_new_tokens: int | jax.Array | None = None,
) -> Sampling:
    """Returns the settings of `batch` rows; each may be one value for all rows or one per row.

    What is None is left out of the compiled program; logit biases and bad words come through `stack`. One seed for all
    rows stands for different seeds, derived from (seed, row), so that equal prompts are answered differently; row b's
    seed does not depend on `batch`. Raises ValueError when a value is out of range; values that are traced cannot be
    checked.
    """
    if _is_int(seed):
        SamplingParams(seed=seed)
        seed = np.random.SeedSequence(int(seed)).generate_state(batch, np.uint32)
    always = (temperature, top_k, top_p, min_p, repetition_penalty, seed)
    sometimes = (typical_p, presence_penalty, frequency_penalty, min_new_tokens)
    named = dict(zip(_ALWAYS + _SOMETIMES, always + sometimes))
    values = {name: value for name, value in named.items() if value is not None}
    for name, value in values.items():
        if np.ndim(value) and np.shape(value) != (batch,):
            raise ValueError(f"{name} must be one value or {batch}, one per row; given shape {np.shape(value)}")
        if not isinstance(value, jax.core.Tracer):
            # tolist: Python numbers, as the range checks of a single row expect them.
            for number in np.unique(np.asarray(value)).tolist():
                SamplingParams(**{name: number})
    module = jnp if any(isinstance(value, jax.core.Tracer) for value in values.values()) else np
    dtypes = {name: getattr(_FIELDS, name).dtype for name in values}
    return Sampling(
        **{n: module.broadcast_to(module.asarray(value).astype(dtypes[n]), batch) for n, value in values.items()}
    )


def of_rows(sampling: Sampling, active_B: jax.Array) -> Sampling:
    """Returns the settings with those of inactive rows asking for nothing, so that no work is done for them."""

    def masked(values, field):
        if values is None:
            return None
        return jnp.where(active_B.reshape(-1, *(1,) * (values.ndim - 1)), values, jnp.array(field.off, field.dtype))

    return Sampling(*map(masked, sampling, _FIELDS))


class Sampled(NamedTuple):
    """A token per row, with its log-probability under two distributions."""

    ids_B: jax.Array
    logprobs_B: jax.Array
    """Under the model at the row's temperature, before penalties and truncation: what a policy gradient needs.
    A greedy row's is taken at temperature 1."""
    processed_logprobs_B: jax.Array
    """Under the distribution that the token was really drawn from; 0 for a greedy row."""
    top_ids_BK: jax.Array | None = None
    """The most likely tokens under the distribution of `logprobs_B`, best first; no meaning where no row asks."""
    top_logprobs_BK: jax.Array | None = None


class Allowed(NamedTuple):
    """Which tokens may come next: bit i % 32 of word i // 32 stands for token i. Rows without a guide allow all."""

    words_BW: jax.Array
    guided_B: jax.Array


class Written(NamedTuple):
    """What stands in the rows already, for penalties and bans."""

    seen_BV: jax.Array
    """Tokens of prompt and answer, which a repetition penalty lowers."""
    counts_BV: jax.Array | None = None
    """How often each token stands in the answer; needed with presence and frequency penalties."""
    tokens_BS: jax.Array | None = None
    """Prompt and answer; needed with bad words."""
    prompt_lengths_B: jax.Array | None = None
    """Needed with min_new_tokens."""
    stop_ids_BI: jax.Array | None = None
    allowed: Allowed | None = None
    """What may follow it, by a guide; None: everything, in all rows."""


def first_true(mask: jax.Array) -> jax.Array:
    """Returns the index of the first True along the last axis, or its length if there is none."""
    # Two plain reductions; XLA's argmax carries (value, index) pairs, which is several times slower on CPUs.
    size = mask.shape[-1]
    return jnp.where(mask, lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1), size).min(axis=-1)


def _last_true(mask: jax.Array) -> jax.Array:
    return jnp.where(mask, lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1), 0).max(axis=-1)


def greedy(logits_BV: jax.Array) -> jax.Array:
    """Returns the first of the most likely tokens `[B]`; 0 where the logits are not numbers."""
    ids_B = first_true(logits_BV == logits_BV.max(axis=-1, keepdims=True))
    return jnp.where(ids_B == logits_BV.shape[-1], 0, ids_B)


def _threshold(ordered_BV: jax.Array, weights_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """Returns per row the largest integer t for which the weights of {ordered >= t} sum to at least `wanted`.

    32 rounds, one per bit: exact like a sort, and several times cheaper for a whole vocabulary.
    """

    def bit(index, found_B):
        tried_B = found_B + (jnp.int32(1) << (31 - index))  # the sign bit wraps around from the smallest integer
        reached_B = jnp.where(ordered_BV >= tried_B[:, None], weights_BV, 0.0).sum(axis=-1)
        return jnp.where(reached_B >= wanted_B, tried_B, found_B)

    return lax.fori_loop(0, 32, bit, jnp.full(wanted_B.shape, jnp.iinfo(jnp.int32).min))


def _ordered(x: jax.Array) -> jax.Array:
    """Returns int32 keys in the order of the float32 values `x`."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Returns the logits with those of seen tokens divided by the penalty if positive, else multiplied (CTRL)."""
    penalty_B1 = penalty_B[:, None]
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lowered_BV, logits_BV)


def discount(logits_BV: jax.Array, counts_BV: jax.Array, presence_B: jax.Array, frequency_B: jax.Array) -> jax.Array:
    """Returns logits - [count > 0] * presence - count * frequency, as OpenAI defines the two penalties."""
    counts_BV = counts_BV.astype(jnp.float32)
    return logits_BV - jnp.where(counts_BV > 0, presence_B[:, None], 0.0) - counts_BV * frequency_B[:, None]


def bad_word_ends(bad_words_BNL: jax.Array, tokens_BS: jax.Array, lengths_B: jax.Array, *, none: int) -> jax.Array:
    """Returns `[B, N]` the last id of every bad word whose other ids are the row's last ones; `none` elsewhere."""
    before = bad_words_BNL.shape[-1] - 1
    at_BL = lengths_B[:, None] - before + jnp.arange(before)
    recent_BL = jnp.where(at_BL >= 0, jnp.take_along_axis(tokens_BS, jnp.maximum(at_BL, 0), axis=1), -2)
    begins_BNL = bad_words_BNL[..., :-1]
    matches_BN = ((begins_BNL == recent_BL[:, None]) | (begins_BNL < 0)).all(axis=-1)
    last_BN = bad_words_BNL[..., -1]
    return jnp.where(matches_BN & (last_BN >= 0), last_BN, none)


def adjust(logits_BV: jax.Array, sampling: Sampling, written: Written, *, positions_B: jax.Array) -> jax.Array:
    """Returns the logits after penalties, biases and bans, in the order of this file's first lines."""
    V = logits_BV.shape[-1]
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]

    def banned(logits_BV, ids_BX):
        return logits_BV.at[rows_B1, ids_BX].set(-jnp.inf, mode="drop")

    changes = [
        (sampling.repetition_penalty != 1, lambda x: penalise(x, written.seen_BV, sampling.repetition_penalty)),
    ]
    if written.counts_BV is not None:
        zeros_B = jnp.zeros(positions_B.shape, jnp.float32)
        presence_B = zeros_B if sampling.presence_penalty is None else sampling.presence_penalty
        frequency_B = zeros_B if sampling.frequency_penalty is None else sampling.frequency_penalty
        asked_B = (presence_B != 0) | (frequency_B != 0)
        changes.append((asked_B, lambda x: discount(x, written.counts_BV, presence_B, frequency_B)))
    if sampling.bias_ids_BJ is not None:
        biased_BJ = sampling.bias_ids_BJ >= 0
        ids_BJ = jnp.where(biased_BJ, sampling.bias_ids_BJ, V)
        changes.append((biased_BJ, lambda x: x.at[rows_B1, ids_BJ].add(sampling.bias_BJ, mode="drop")))
    if sampling.bad_words_BNL is not None:
        words_BNL = sampling.bad_words_BNL
        ends = functools.partial(bad_word_ends, words_BNL, written.tokens_BS, positions_B, none=V)
        changes.append((words_BNL[..., -1] >= 0, lambda x: banned(x, ends())))
    if sampling.min_new_tokens is not None:
        early_B = positions_B - written.prompt_lengths_B < sampling.min_new_tokens
        stops_BI = jnp.where(early_B[:, None] & (written.stop_ids_BI >= 0), written.stop_ids_BI, V)
        changes.append((early_B, lambda x: banned(x, stops_BI)))
    if written.allowed is not None:
        changes.append((written.allowed.guided_B, lambda x: jnp.where(_bits(written.allowed.words_BW, V), x, -jnp.inf)))
    return _changed(logits_BV, changes)


def _bits(words_BW: jax.Array, count: int) -> jax.Array:
    """Returns the first `count` bits of every row of words, `[B, count]`."""
    bits_BWb = (words_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BWb.reshape(words_BW.shape[0], -1)[:, :count] == 1


def _changed(logits_BV: jax.Array, changes: Sequence[tuple[jax.Array, Callable]]) -> jax.Array:
    """Returns the logits after every change that is asked for; a batch that asks for none takes one decision."""

    def each(logits_BV):
        for asked, change in changes:
            logits_BV = lax.cond(asked.any(), change, lambda logits_BV: logits_BV, logits_BV)
        return logits_BV

    if len(changes) == 1:
        return each(logits_BV)
    any_asked = functools.reduce(jnp.logical_or, [asked.any() for asked, _ in changes])
    return lax.cond(any_asked, each, lambda logits_BV: logits_BV, logits_BV)


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits with every token that cannot be drawn at -inf: top-k, top-p of what is left, min-p, typical.

    Tokens ranked equal to the last one kept are kept too, so the set does not depend on their order.
    """
    V = logits_BV.shape[-1]

    def above_floor(logits_BV):
        floor_B = logits_BV.max(axis=-1) + jnp.log(sampling.min_p)
        return jnp.where(logits_BV >= floor_B[:, None], logits_BV, -jnp.inf)

    # Each gives (keys, weights, wanted): the tokens of the highest keys that weigh at least `wanted` together are kept.
    def count(logits_BV):
        return logits_BV, jnp.ones_like(logits_BV), sampling.top_k.astype(jnp.float32)

    def mass(logits_BV):
        weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
        return logits_BV, weights_BV, sampling.top_p * weights_BV.sum(axis=-1)

    def typicality(logits_BV):
        logits_BV = above_floor(logits_BV)
        logprobs_BV = logits_BV - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
        probs_BV = jnp.exp(logprobs_BV)
        entropy_B = -jnp.where(probs_BV > 0, probs_BV * logprobs_BV, 0.0).sum(axis=-1)
        return -jnp.abs(logprobs_BV + entropy_B[:, None]), probs_BV, sampling.typical_p * probs_BV.sum(axis=-1)

    ranks, on = [count, mass], [(sampling.top_k > 0) & (sampling.top_k < V), sampling.top_p < 1]
    if sampling.typical_p is not None:
        ranks, on = [*ranks, typicality], [*on, sampling.typical_p < 1]
    on_RB = jnp.stack(on)

    def keep_highest(index, logits_BV):
        keys_BV, weights_BV, wanted_B = lax.switch(index, ranks, logits_BV)
        ordered_BV = _ordered(keys_BV)
        keep_BV = ordered_BV >= _threshold(ordered_BV, weights_BV, wanted_B)[:, None]
        return jnp.where(keep_BV | ~on_RB[index][:, None], logits_BV, -jnp.inf)

    def one_rule(index, logits_BV):  # a loop, so that the search for a threshold is compiled once
        return lax.cond(
            on_RB[index].any(), functools.partial(keep_highest, index), lambda logits_BV: logits_BV, logits_BV
        )

    return above_floor(lax.fori_loop(0, len(ranks), one_rule, logits_BV))


def _first_crossing(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (i, s) along the last axis: the first positive weight at which the running sum exceeds `target`, and
    the sum before it. Rounding can leave the target unreached: then the last positive weight."""
    sums = jnp.cumsum(weights, axis=-1)
    index = first_true((sums > target[:, None]) & (weights > 0))
    index = jnp.where(index == weights.shape[-1], _last_true(weights > 0), index)
    before = jnp.take_along_axis(sums, index[:, None] - 1, axis=-1, mode="clip")[:, 0]
    return index, jnp.where(index == 0, 0.0, before)


def uniforms(seed_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Returns u `[B]`, uniform in [0, 1), under every row's own key fold_in(key(seed), position)."""
    return jax.vmap(lambda s, p: jax.random.uniform(jax.random.fold_in(jax.random.key(s), p)))(seed_B, positions_B)


def draw(logits_BV: jax.Array, *, seed_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Returns one token per row, distributed as softmax(logits): inverse of the cumulative distribution at u.

    u are the `uniforms` of seeds and positions. A token at -inf is never drawn.
    """
    B, V = logits_BV.shape
    weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    weights_BCW = jnp.pad(weights_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums_BC = weights_BCW.sum(axis=-1)
    target_B = uniforms(seed_B, positions_B) * sums_BC.sum(axis=-1)
    block_B, before_B = _first_crossing(sums_BC, target_B)
    weights_BW = jnp.take_along_axis(weights_BCW, block_B[:, None, None], axis=1)[:, 0]
    within_B, _ = _first_crossing(weights_BW, target_B - before_B)
    return block_B * _BLOCK + within_B


def _logprob(logits_BV: jax.Array, ids_B: jax.Array, normaliser_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0] - normaliser_B


def most_likely(logits_BV: jax.Array, temperature_B: jax.Array, normaliser_B: jax.Array, *, count: int):
    """Returns ids and log-probabilities `[B, count]` of the most likely tokens under logits / temperature, best first.

    `normaliser_B` is the logsumexp of those: the same bits as in the log-probability of a token drawn.
    """
    values_BK, ids_BK = lax.top_k(logits_BV / temperature_B[:, None], count)
    return ids_BK, values_BK - normaliser_B[:, None]


def sample(
    logits_BV: jax.Array,
    sampling: Sampling,
    written: Written,
    *,
    positions_B: jax.Array,
    num_top: int = 0,
    top_B: jax.Array | None = None,
    forced_B: jax.Array | None = None,
) -> Sampled:
    """Returns the next token of every row and its log-probabilities.

    `positions` are the absolute positions that the tokens will stand at, and so the rows' lengths. The `num_top` most
    likely tokens are found while any row of `top_B` asks for them. `forced` tokens are taken instead of drawing; their
    processed log-probability is 0.
    """
    with jax.named_scope("sample"):
        logits_BV = logits_BV.astype(jnp.float32)
        greedy_B = sampling.temperature == 0
        temperature_B = jnp.where(greedy_B, 1.0, sampling.temperature)

        def drawn(adjusted_BV):
            kept_BV = truncate(adjusted_BV / temperature_B[:, None], sampling)
            drawn_B = draw(kept_BV, seed_B=sampling.seed, positions_B=positions_B)
            ids_B = jnp.where(greedy_B, greedy(adjusted_BV), drawn_B)
            logprobs_B = _logprob(kept_BV, ids_B, jax.nn.logsumexp(kept_BV, axis=-1))
            return ids_B, jnp.where(greedy_B, 0.0, logprobs_B)

        def best(adjusted_BV):
            return greedy(adjusted_BV), jnp.zeros(greedy_B.shape, jnp.float32)

        if forced_B is None:
            adjusted_BV = adjust(logits_BV, sampling, written, positions_B=positions_B)
            ids_B, processed_logprobs_B = lax.cond(greedy_B.all(), best, drawn, adjusted_BV)
        else:
            ids_B, processed_logprobs_B = forced_B, jnp.zeros(greedy_B.shape, jnp.float32)
        policy_BV = logits_BV / temperature_B[:, None]
        normaliser_B = jax.nn.logsumexp(policy_BV, axis=-1)
        found = Sampled(ids_B, _logprob(policy_BV, ids_B, normaliser_B), processed_logprobs_B)
        if not num_top:
            return found

        def nothing():
            shape = (logits_BV.shape[0], num_top)
            return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

        # From the logits, not from `policy_BV`: as an operand of the decision it would be written out at every step.
        top = functools.partial(most_likely, logits_BV, temperature_B, normaliser_B, count=num_top)
        return found._replace(**dict(zip(("top_ids_BK", "top_logprobs_BK"), lax.cond(top_B.any(), top, nothing))))
