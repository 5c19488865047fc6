"""Compiled loops of `ngram_scorer.py`, which has the formulas: counts by key, and the losses of rows of tokens."""

from typing import NamedTuple

import numpy as np

from data_pipelines.blocks import compiled, inlined
from data_pipelines.kernels import MIX, probe
from data_pipelines.rules import power_of_two

BITS = np.uint64(18)
"""Of a token in a key."""


class Tables(NamedTuple):
    """The counts where they are looked up. slots: key + 1, 0 being free; what stands beside a slot belongs to it.

    unigram: p1 of every token. word_, context_: T and N after one token, and after two.
    """

    unigram: np.ndarray
    pair_slots: np.ndarray
    pair_counts: np.ndarray
    triple_slots: np.ndarray
    triple_counts: np.ndarray
    word_totals: np.ndarray
    word_different: np.ndarray
    context_slots: np.ndarray
    context_totals: np.ndarray
    context_different: np.ndarray
    discount: float
    cache_share: float
    decay: float
    word_smoothing: float
    recent_smoothing: float
    pair_smoothing: float


class Cache(NamedTuple):
    """Counts of the tokens, and of the pairs, that stand before a place in its row.

    recent: decayed counts, as they were when the token was last seen, at `seen`.
    """

    words: np.ndarray
    recent: np.ndarray
    seen: np.ndarray
    pair_slots: np.ndarray
    pair_counts: np.ndarray


def table(keys: np.ndarray, *columns: np.ndarray) -> list[np.ndarray]:
    """Returns slots of different keys, and each column beside them as float64."""
    slots = np.zeros(power_of_two(2 * len(keys)), np.uint64)
    places = np.empty(len(keys), np.int64)
    _enter_all(keys, slots, places)
    found = [slots]
    for column in columns:
        found.append(np.zeros(len(slots)))
        found[-1][places] = column
    return found


def empty_cache(length: int, vocabulary: int) -> Cache:
    """Returns a cache for rows of at most `length` tokens."""
    size = power_of_two(2 * length)
    words, recent, seen = np.zeros(vocabulary, np.int64), np.zeros(vocabulary), np.zeros(vocabulary, np.int64)
    return Cache(words, recent, seen, np.zeros(size, np.uint64), np.zeros(size, np.int64))


@inlined
def _slot(slots, key):
    """Where the key is in the table, or the free slot where it belongs."""
    return probe(slots, key * np.uint64(MIX), key + np.uint64(1))


@compiled
def _enter_all(keys, slots, places):
    for i in range(keys.shape[0]):
        at = _slot(slots, keys[i])
        slots[at] = keys[i] + np.uint64(1)
        places[i] = at


@inlined
def _count(slots, counts, key):
    at = _slot(slots, key)
    return counts[at] if slots[at] != 0 else 0.0


@inlined
def _probability(tables, cache, row, at, token):
    """p(token) at row[at], given row[:at], which the cache has counted."""
    p, d = tables.unigram[token], tables.discount
    if at == 0:
        return p
    cached = (cache.words[token] + tables.word_smoothing * p) / (at + tables.word_smoothing)
    recent = cache.recent[token] * tables.decay ** (at - 1 - cache.seen[token])
    total = (1.0 - tables.decay**at) / (1.0 - tables.decay)
    cached = (recent + tables.recent_smoothing * cached) / (total + tables.recent_smoothing)
    last = row[at - 1]
    key = (np.uint64(last) << BITS) | np.uint64(token)
    if tables.word_totals[last] > 0:
        found = max(_count(tables.pair_slots, tables.pair_counts, key) - d, 0.0)
        p = (found + d * tables.word_different[last] * p) / tables.word_totals[last]
    if at > 1:
        before = (np.uint64(row[at - 2]) << BITS) | np.uint64(last)
        context = _slot(tables.context_slots, before)
        if tables.context_slots[context] != 0:
            triple = (before << BITS) | np.uint64(token)
            found = max(_count(tables.triple_slots, tables.triple_counts, triple) - d, 0.0)
            p = (found + d * tables.context_different[context] * p) / tables.context_totals[context]
    # The last token itself has not been followed yet.
    followed = cache.words[last] - 1
    pairs = _count(cache.pair_slots, cache.pair_counts, key)
    cached = (pairs + tables.pair_smoothing * cached) / (followed + tables.pair_smoothing)
    return (1.0 - tables.cache_share) * p + tables.cache_share * cached


@inlined
def _remember(tables, cache, row, at):
    """Counts row[at], and the pair that it ends."""
    token = row[at]
    cache.words[token] += 1
    cache.recent[token] = cache.recent[token] * tables.decay ** (at - cache.seen[token]) + 1.0
    cache.seen[token] = at
    if at > 0:
        key = (np.uint64(row[at - 1]) << BITS) | np.uint64(token)
        slot = _slot(cache.pair_slots, key)
        cache.pair_slots[slot] = key + np.uint64(1)
        cache.pair_counts[slot] += 1


@inlined
def _forget(cache, row):
    for i in range(row.shape[0]):
        cache.words[row[i]], cache.recent[row[i]], cache.seen[row[i]] = 0, 0.0, 0
    cache.pair_slots[:] = 0
    cache.pair_counts[:] = 0


@compiled
def losses(tables, cache, tokens, starts, num_scored, out):
    """Fills out[r] with the mean -log p of the last `num_scored` tokens of the row tokens[starts[r]:starts[r + 1]].

    The cache must be empty, and is so afterwards.
    """
    for r in range(out.shape[0]):
        row = tokens[starts[r] : starts[r + 1]]
        first = row.shape[0] - num_scored
        total = 0.0
        for at in range(row.shape[0]):
            if at >= first:
                total -= np.log(_probability(tables, cache, row, at, row[at]))
            _remember(tables, cache, row, at)
        out[r] = total / num_scored
        _forget(cache, row)


@compiled
def distribution(tables, cache, row, out):
    """Fills out[token] with p(token) behind the whole row; the cache must be empty, and is so afterwards."""
    for at in range(row.shape[0]):
        _remember(tables, cache, row, at)
    for token in range(out.shape[0]):
        out[token] = _probability(tables, cache, row, row.shape[0], token)
    _forget(cache, row)
