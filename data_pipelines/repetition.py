"""Compiled loops over hashed words: how much of a document repeats itself. As in `kernels.py`, 0 rows are accepted."""

import numpy as np

from data_pipelines import kernels
from data_pipelines.kernels import compiled

_combine, _enter = kernels._combine, kernels._enter

TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


@compiled
def duplicate_ngrams(hashes, lengths, starts, repeated, rows, table, alive, out):
    """Fills out[d, n - 5] for the documents `rows`: bytes of words inside n-grams met before over bytes of all words.

    The scan jumps n after a hit (arXiv:2112.11446, A1.1). Only n-grams all of whose 5-grams are `repeated` can have
    been met before or be met again; the others are passed over. Scratch space: table, a power of two, at least twice
    the words of any of the documents; alive, as many words.
    """
    for document in rows:
        start, end = starts[document], starts[document + 1]
        total, num_places = 0, end - start - 4
        for word in range(start, end):
            total += lengths[word]
        for i in range(num_places):
            alive[i] = repeated[start + i]
        for n in DUPLICATE_NGRAMS:
            looked = 0
            for i in range(end - start - n + 1):
                if n > 5:
                    alive[i] = alive[i] and alive[i + 1]
                looked += alive[i]
            size = 16
            while size < 2 * looked:
                size *= 2
            table[:size] = 0
            inside, i = 0, start
            while i + n <= end:
                if not alive[i - start]:
                    i += 1
                    continue
                value, gram_bytes = np.uint64(n), 0
                for k in range(n):
                    value = _combine(value, hashes[i + k])
                    gram_bytes += lengths[i + k]
                if _enter(table[:size], value):
                    inside += gram_bytes
                    i += n
                else:
                    i += 1
            out[document, n - 5] = inside / total if total > 0 else 0.0


@compiled
def _count_grams(hashes, lengths, start, end, n, alive, table, counts, slots):
    """(bytes of the most costly n-gram's occurrences, bytes of words inside n-grams met before) of one document.

    Looks at the n-grams whose place i has alive[i - start], and leaves there whether the n-gram is repeated.
    """
    looked = 0
    for i in range(start, end - n + 1):
        looked += alive[i - start]
    size = 16
    while size < 2 * looked:
        size *= 2
    table[:size] = 0
    mask, most, inside, covered = np.uint64(size - 1), 0, 0, start
    for i in range(start, end - n + 1):
        if not alive[i - start]:
            continue
        value, gram_bytes = np.uint64(n), 0
        for k in range(n):
            value = _combine(value, hashes[i + k])
            gram_bytes += lengths[i + k]
        value |= np.uint64(1)
        slot = (value ^ (value >> np.uint64(32))) & mask
        while table[slot] != 0 and table[slot] != value:
            slot = (slot + np.uint64(1)) & mask
        known = table[slot] == value
        table[slot] = value
        counts[slot] = counts[slot] + 1 if known else 1
        slots[i - start] = slot
        if known:
            most = max(most, counts[slot] * gram_bytes)
            for word in range(max(covered, i), i + n):
                inside += lengths[word]
            covered = i + n
    for i in range(start, end - n + 1):
        alive[i - start] = alive[i - start] and counts[slots[i - start]] > 1
    return most, inside


@compiled
def repetition(hashes, lengths, starts, table, counts, slots, alive, top, cover):
    """Fills top[d]: bytes of the most costly 2-, 3- and 4-gram's occurrences over bytes of all words (arXiv:2112.11446,
    A1.1); and cover[d]: no share of `duplicate_ngrams` from 5 on is larger.

    An n-gram can only be repeated where the (n - 1)-grams it begins and ends with are, so few are looked at. The words
    inside 5-grams met before hold those inside longer ones. alive[i] says at the end whether the five words from word i
    on stand elsewhere in its document as well (nothing, where fewer follow).
    Scratch space: table, counts: a power of two, at least twice the words of any document; slots: as many words.
    """
    for document in range(starts.shape[0] - 1):
        start, end = starts[document], starts[document + 1]
        total = 0
        for word in range(start, end):
            total += lengths[word]
        own = alive[start:end]
        own[:] = True
        for n in range(2, 6):
            most, inside = _count_grams(hashes, lengths, start, end, n, own, table, counts, slots)
            if n < 5:
                top[document, n - 2] = min(most / total, 1.0) if total > 0 else 0.0
                for i in range(end - start - n):
                    own[i] = own[i] and own[i + 1]
            else:
                cover[document] = inside / total if total > 0 else 0.0
