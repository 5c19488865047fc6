"""Compiled loops over the n-grams of words: their hashes, which of them a filter may hold, where their bytes lie.

An n-gram is `num_words` words of which at most half are Han or kana characters, or `num_han` words of which more than
half are. Its hash is a polynomial of the words' hashes modulo 2^64, mixed: a step costs two products.
"""

from typing import NamedTuple

import numpy as np

from data_pipelines import kernels
from data_pipelines.blocks import compiled
from data_pipelines.words import Words

FACTOR = 0x9E3779B97F4A7C15
_kind, _width = kernels._kind, kernels._width


class Found(NamedTuple):
    """First word of each n-gram (among all words of the batch), how many words it has, its hash."""

    words: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray


@compiled
def _scan(hashes, flags, starts, n, mostly_han, bits, firsts, out):
    """Number of n-grams of this kind whose bit is set; fills the first word and the hash of each."""
    factor = np.uint64(FACTOR)
    leading = np.uint64(1)
    for _ in range(n):
        leading *= factor
    mask = np.uint64(bits.shape[0] * 8 - 1)
    found = 0
    for row in range(starts.shape[0] - 1):
        start, end = starts[row], starts[row + 1]
        value, num_han = np.uint64(0), 0
        for i in range(start, end):
            value = value * factor + hashes[i]
            num_han += (flags[i] & 2) >> 1
            if i - start >= n:
                value -= leading * hashes[i - n]
                num_han -= (flags[i - n] & 2) >> 1
            if i - start + 1 < n or (2 * num_han > n) != mostly_han:
                continue
            mixed = (value ^ (value >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(32)
            place = mixed & mask
            if bits[place >> np.uint64(3)] >> np.uint8(place & np.uint64(7)) & np.uint8(1):
                firsts[found] = i - n + 1
                out[found] = mixed
                found += 1
    return found


def find_ngrams(words: Words, num_words: int, num_han: int, bits: np.ndarray) -> Found:
    """Returns the n-grams whose bit is set (hash modulo the number of bits, a power of two), those of words first."""
    parts = []
    for n, mostly_han in ((num_words, False), (num_han, True)):
        if mostly_han and not np.any(words.flags & kernels.WORD_IS_HAN):
            continue
        firsts, hashes = np.empty(len(words.hashes), np.int64), np.empty(len(words.hashes), np.uint64)
        found = _scan(words.hashes, words.flags, words.starts, n, mostly_han, bits, firsts, hashes)
        parts.append(Found(firsts[:found], np.full(found, n, np.int64), hashes[:found]))
    return Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def ngram_hashes(words: Words, num_words: int, num_han: int) -> np.ndarray:
    """Returns [n-gram, 2] uint64: the hash of every n-gram and the row that it lies in."""
    found = find_ngrams(words, num_words, num_han, np.full(1, 255, np.uint8))
    rows = np.searchsorted(words.starts, found.words, side="right") - 1
    return np.column_stack([found.hashes, rows.astype(np.uint64)])


@compiled
def _word_bytes(data, begin, end, first_words, last_words, out):
    """Fills out[k] with the byte where word first_words[k] of the text begins and the one after word last_words[k]."""
    begins, ends = np.empty(end - begin, np.int64), np.empty(end - begin, np.int64)
    count, at = 0, begin
    while at < end:
        kind = _kind(data, at, end)
        if kind == 0:
            at += _width(data[at])
            continue
        begins[count] = at
        while True:
            at = min(at + _width(data[at]), end)
            if kind == 2 or at >= end or _kind(data, at, end) != kind:
                break
        ends[count] = at
        count += 1
    for k in range(first_words.shape[0]):
        out[k, 0] = begins[first_words[k]]
        out[k, 1] = ends[last_words[k]]


def span_bytes(data: np.ndarray, begin: int, end: int, firsts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns [span, 2]: first byte and the byte after the last of each run of words of the text data[begin:end]."""
    out = np.empty((len(firsts), 2), np.int64)
    _word_bytes(data, begin, end, firsts, firsts + lengths - 1, out)
    return out
