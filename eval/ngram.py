"""Interpolated unigram and bigram models of token ids: the baselines that a language model has to beat.

V vocabulary, c(v, w) how often w followed v, N tokens seen.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Ngram(NamedTuple):
    """Counts of a corpus. Bigrams are kept sorted by v * V + w."""

    unigram_V: np.ndarray
    bigram_keys: np.ndarray
    bigram_counts: np.ndarray
    followers_V: np.ndarray
    """How often each token was followed by another."""
    kinds_V: np.ndarray
    """How many different tokens followed it."""


def fit(sequences: Iterable[np.ndarray], *, vocab_size: int) -> Ngram:
    """Returns the counts of token sequences `[T]`; no bigram reaches across two sequences."""
    unigram = np.zeros(vocab_size, np.int64)
    keys: list[np.ndarray] = []
    for sequence in sequences:
        sequence = np.asarray(sequence, np.int64)
        unigram += np.bincount(sequence, minlength=vocab_size)
        keys.append(sequence[:-1] * vocab_size + sequence[1:])
    if not unigram.sum():
        raise ValueError("an n-gram model needs at least one token; the sequences given are empty")
    bigram_keys, counts = np.unique(np.concatenate(keys), return_counts=True)
    contexts = bigram_keys // vocab_size
    followers = np.bincount(contexts, weights=counts, minlength=vocab_size)
    return Ngram(unigram, bigram_keys, counts, followers, np.bincount(contexts, minlength=vocab_size))


def unigram_logprobs(model: Ngram, tokens_T: np.ndarray) -> np.ndarray:
    """Returns ln p(w) `[T]`, p(w) = (c(w) + 1) / (N + V): add-one, so that nothing is impossible."""
    counts = model.unigram_V
    return np.log((counts[tokens_T] + 1) / (counts.sum() + len(counts)))


def bigram_logprobs(model: Ngram, previous_T: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """Returns ln p(w | v) `[T]`, interpolated with the unigram by Witten and Bell (1991).

    p(w | v) = (c(v, w) + t(v) p(w)) / (c(v) + t(v)), with t(v) the number of different followers of v.
    """
    previous_T, tokens_T = np.asarray(previous_T, np.int64), np.asarray(tokens_T, np.int64)
    keys = previous_T * len(model.unigram_V) + tokens_T
    at = np.minimum(np.searchsorted(model.bigram_keys, keys), len(model.bigram_keys) - 1)
    counts = np.where(model.bigram_keys[at] == keys, model.bigram_counts[at], 0)
    kinds, followers = model.kinds_V[previous_T], model.followers_V[previous_T]
    unigram = np.exp(unigram_logprobs(model, tokens_T))
    seen = followers > 0
    return np.log(np.where(seen, (counts + kinds * unigram) / np.maximum(followers + kinds, 1), unigram))


def bits_per_byte(logprobs: np.ndarray, num_bytes: int) -> float:
    """Returns -sum(log2 p) / bytes of the text that the tokens spell; `logprobs` are natural logarithms."""
    return float(-np.sum(logprobs) / np.log(2) / num_bytes)
