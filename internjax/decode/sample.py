"""Drawing the next token: every row has its own settings, and its draw depends on its seed and position alone.

B batch, V vocabulary, C blocks of the vocabulary, W width of a block.
"""

import dataclasses
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
    repetition_penalty: float = 1.0
    """Logits of tokens already in the prompt or the answer: divided by it if positive, else multiplied; 1 is off."""
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
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a finite number > 0 (1 is off)"),
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


class Sampling(NamedTuple):
    """SamplingParams of every row as arrays `[B]`: data of the compiled step, so mixed settings cost no compilation."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array


_DTYPES = Sampling("float32", "int32", "float32", "float32", "float32", "uint32")


def stack(rows: Sequence[SamplingParams]) -> Sampling:
    """Returns the settings of `rows` as NumPy arrays `[B]`."""
    return Sampling(*(np.array([getattr(row, f) for row in rows], getattr(_DTYPES, f)) for f in Sampling._fields))


def make_sampling(
    batch: int,
    *,
    temperature: float | jax.Array = 1.0,
    top_k: int | jax.Array = 0,
    top_p: float | jax.Array = 1.0,
    min_p: float | jax.Array = 0.0,
    repetition_penalty: float | jax.Array = 1.0,
    seed: int | Sequence[int] | jax.Array = 0,
) -> Sampling:
    """Returns the settings of `batch` rows; each may be one value for all rows or one per row.

    One seed for all rows stands for different seeds, derived from (seed, row), so that equal prompts are answered
    differently; row b's seed does not depend on `batch`. Raises ValueError when a value is out of range; values that
    are traced cannot be checked.
    """
    if _is_int(seed):
        SamplingParams(seed=seed)
        seed = np.random.SeedSequence(int(seed)).generate_state(batch, np.uint32)
    values = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    for name, value in zip(Sampling._fields, values):
        if np.ndim(value) and np.shape(value) != (batch,):
            raise ValueError(f"{name} must be one value or {batch}, one per row; given shape {np.shape(value)}")
        if not isinstance(value, jax.core.Tracer):
            # tolist: Python numbers, as the range checks of a single row expect them.
            for number in np.unique(np.asarray(value)).tolist():
                SamplingParams(**{name: number})
    if not any(isinstance(value, jax.core.Tracer) for value in values):
        return Sampling(*(np.broadcast_to(np.asarray(v, d), batch) for v, d in zip(values, _DTYPES)))
    return Sampling(*(jnp.broadcast_to(jnp.asarray(v).astype(d), batch) for v, d in zip(values, _DTYPES)))


class Sampled(NamedTuple):
    """A token per row, with its log-probability under two distributions."""

    ids_B: jax.Array
    logprobs_B: jax.Array
    """Under the model at the row's temperature, before penalties and truncation: what a policy gradient needs.
    A greedy row's is taken at temperature 1."""
    processed_logprobs_B: jax.Array
    """Under the distribution that the token was really drawn from; 0 for a greedy row."""


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


def _keep_top(logits_BV: jax.Array, weigh: Callable, on_B: jax.Array) -> jax.Array:
    """Returns the logits with all below the row's threshold at -inf, in the rows of `on`; nothing runs if none is."""

    def cut(logits_BV):
        ordered_BV = _ordered(logits_BV)
        threshold_B = _threshold(ordered_BV, *weigh(logits_BV))
        keep_BV = (ordered_BV >= threshold_B[:, None]) | ~on_B[:, None]
        return jnp.where(keep_BV, logits_BV, -jnp.inf)

    return lax.cond(on_B.any(), cut, lambda logits_BV: logits_BV, logits_BV)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Returns the logits with those of seen tokens divided by the penalty if positive, else multiplied (CTRL)."""

    def apply(logits_BV):
        penalty_B1 = penalty_B[:, None]
        lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
        return jnp.where(seen_BV, lowered_BV, logits_BV)

    return lax.cond((penalty_B != 1).any(), apply, lambda logits_BV: logits_BV, logits_BV)


def truncate(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits with every token that cannot be drawn at -inf: top-k, then top-p of what is left, then min-p.

    Tokens as likely as the last one kept are kept too, so the set does not depend on their order.
    """
    V = logits_BV.shape[-1]

    def count(logits_BV):
        return jnp.ones_like(logits_BV), sampling.top_k.astype(jnp.float32)

    def mass(logits_BV):
        weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
        return weights_BV, sampling.top_p * weights_BV.sum(axis=-1)

    logits_BV = _keep_top(logits_BV, count, (sampling.top_k > 0) & (sampling.top_k < V))
    logits_BV = _keep_top(logits_BV, mass, sampling.top_p < 1)
    floor_B = logits_BV.max(axis=-1) + jnp.log(sampling.min_p)
    return jnp.where(logits_BV >= floor_B[:, None], logits_BV, -jnp.inf)


def _first_crossing(weights: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (i, s) along the last axis: the first positive weight at which the running sum exceeds `target`, and
    the sum before it. Rounding can leave the target unreached: then the last positive weight."""
    sums = jnp.cumsum(weights, axis=-1)
    index = first_true((sums > target[:, None]) & (weights > 0))
    index = jnp.where(index == weights.shape[-1], _last_true(weights > 0), index)
    before = jnp.take_along_axis(sums, index[:, None] - 1, axis=-1, mode="clip")[:, 0]
    return index, jnp.where(index == 0, 0.0, before)


def draw(logits_BV: jax.Array, *, seed_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Returns one token per row, distributed as softmax(logits): inverse of the cumulative distribution at u.

    u is uniform in [0, 1) under the key fold_in(key(seed), position). A token at -inf is never drawn.
    """
    B, V = logits_BV.shape
    uniform_B = jax.vmap(lambda s, p: jax.random.uniform(jax.random.fold_in(jax.random.key(s), p)))(seed_B, positions_B)
    weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    weights_BCW = jnp.pad(weights_BV, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    sums_BC = weights_BCW.sum(axis=-1)
    target_B = uniform_B * sums_BC.sum(axis=-1)
    block_B, before_B = _first_crossing(sums_BC, target_B)
    weights_BW = jnp.take_along_axis(weights_BCW, block_B[:, None, None], axis=1)[:, 0]
    within_B, _ = _first_crossing(weights_BW, target_B - before_B)
    return block_B * _BLOCK + within_B


def _logprob(logits_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def sample(logits_BV: jax.Array, sampling: Sampling, *, positions_B: jax.Array, seen_BV: jax.Array) -> Sampled:
    """Returns the next token of every row and its log-probabilities.

    `positions` are the absolute positions that the tokens will stand at; `seen` marks the tokens a repetition penalty
    lowers. Order: penalty, temperature, top-k, top-p, min-p. Work that no row asks for is skipped at run time.
    """
    with jax.named_scope("sample"):
        logits_BV = logits_BV.astype(jnp.float32)
        greedy_B = sampling.temperature == 0
        temperature_B1 = jnp.where(greedy_B, 1.0, sampling.temperature)[:, None]
        policy_BV = logits_BV / temperature_B1
        penalised_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)

        def drawn():
            kept_BV = truncate(penalised_BV / temperature_B1, sampling)
            drawn_B = draw(kept_BV, seed_B=sampling.seed, positions_B=positions_B)
            ids_B = jnp.where(greedy_B, greedy(penalised_BV), drawn_B)
            return ids_B, jnp.where(greedy_B, 0.0, _logprob(kept_BV, ids_B))

        def most_likely():
            return greedy(penalised_BV), jnp.zeros(greedy_B.shape, jnp.float32)

        ids_B, processed_logprobs_B = lax.cond(greedy_B.all(), most_likely, drawn)
        return Sampled(ids_B, _logprob(policy_BV, ids_B), processed_logprobs_B)
