"""Compiled loops over hashed words: how much of a document repeats itself. As in `kernels.py`, 0 rows are accepted."""

import numpy as np

from data_pipelines import kernels
from data_pipelines.blocks import compiled, inlined

_combine, _enter, table_size, probe = kernels._combine, kernels._enter, kernels.table_size, kernels.probe

TOP_NGRAMS = (2, 3, 4)
DUPLICATE_NGRAMS = (5, 6, 7, 8, 9, 10)


@compiled
def duplicate_ngrams(hashes, lengths, starts, repeated, rows, table, values, places, ends, out):
    """Fills out[d, n - 5] for the documents `rows`: bytes of words inside n-grams met before over bytes of all words.

    The scan jumps n after a hit (arXiv:2112.11446, A1.1). Only n-grams all of whose 5-grams are `repeated` can have
    been met before or be met again; the others are passed over. Scratch space: table, a power of two, at least twice
    the words of any of the documents; values, places, ends, as many words and one.
    """
    for document in rows:
        start, num_words = starts[document], starts[document + 1] - starts[document]
        ends[0] = 0  # bytes of the words before each
        left = 0
        for i in range(num_words):
            ends[i + 1] = ends[i] + lengths[start + i]
        for i in range(num_words - 4):
            if repeated[start + i]:
                values[left], places[left] = kernels._shingle(hashes, start + i, 5), i
                left += 1
        for n in DUPLICATE_NGRAMS:
            if n > 5:
                both = 0  # the (n - 1)-grams here and one word on are left
                for i in range(left - 1):
                    if places[i + 1] == places[i] + 1:
                        place = places[i]
                        values[both] = _combine(values[i], hashes[start + place + n - 1])
                        places[both] = place
                        both += 1
                left = both
            own, inside, after = table[: table_size(left)], 0, 0
            own[:] = 0
            for i in range(left):
                place = places[i]
                if place >= after and _enter(own, values[i]):
                    after = place + n
                    inside += ends[after] - ends[place]
            out[document, n - 5] = inside / ends[num_words] if ends[num_words] > 0 else 0.0


@inlined
def _most_costly(values, gram_bytes, costs, num_values, table, counts):
    """Bytes of the most costly repeated n-gram's occurrences; `costs` bound them from above.

    That with the largest bound is counted first. If others may still be more costly, which is rare, these are counted.
    """
    bound, top, count = 0, 0, 0
    for i in range(num_values):
        bound = max(bound, costs[i])
    if bound == 0:
        return 0
    while costs[top] != bound:
        top += 1
    for i in range(num_values):
        count += values[i] == values[top]
    least = count * gram_bytes[top] if count > 1 else 0
    looked = 0
    for i in range(num_values):
        looked += costs[i] > least
    if looked == 0:
        return least
    own, most = table[: table_size(looked)], least
    own[:] = 0
    for i in range(num_values):
        if costs[i] > least:
            value = values[i] | np.uint64(1)
            slot = probe(own, value, value)
            counts[slot] = 1 if own[slot] == 0 else counts[slot] + 1
            own[slot] = value
            if counts[slot] > 1:
                most = max(most, counts[slot] * gram_bytes[i])
    return most


@inlined
def _covered_again(values, places, num_values, ends, n, table, counts, repeated):
    """Bytes of words inside n-grams met before; repeated[places[i]] is told whether n-gram i stands elsewhere too."""
    own, inside, covered = table[: table_size(num_values)], 0, 0
    own[:] = 0
    for i in range(num_values):
        value, first = values[i] | np.uint64(1), places[i]
        slot = probe(own, value, value)
        if own[slot] == 0:
            own[slot], counts[slot] = value, first
        else:
            repeated[first] = repeated[counts[slot]] = True
            inside += ends[first + n] - ends[max(covered, first)]
            covered = first + n
    return inside


@compiled
def repetition(
    hashes, lengths, starts, table, counts, slots, places, gram_bytes, costs, values, ends, repeated, top, cover
):
    """Fills top[d]: bytes of the most costly 2-, 3- and 4-gram's occurrences over bytes of all words (arXiv:2112.11446,
    A1.1); and cover[d]: no share of `duplicate_ngrams` from 5 on is larger.

    An n-gram can only be repeated where the (n - 1)-grams it begins and ends with are, so few are looked at. The words
    inside 5-grams met before hold those inside longer ones. repeated[i] says at the end whether the five words from
    word i on stand elsewhere in its document as well (nothing, where fewer follow).
    Scratch space: table, counts: powers of two, at least twice and four times the words of any document; slots, places,
    gram_bytes, costs, values, ends: as many words and one.
    """
    for document in range(starts.shape[0] - 1):
        start, num_words = starts[document], starts[document + 1] - starts[document]
        own = repeated[start : start + num_words]
        own[:] = False
        ends[0] = 0  # bytes of the words before each
        for i in range(num_words):
            ends[i + 1] = ends[i] + lengths[start + i]
            values[i], places[i] = hashes[start + i], i
        total, left = max(ends[num_words], 1), max(num_words - 1, 0)
        for n in range(2, 5):
            size = 16
            while size < 4 * left:
                size *= 2
            counts[:size] = 0  # how many n-grams share a slot: those alone in theirs are met once
            for i in range(left):
                value = _combine(values[i], hashes[start + places[i] + n - 1])
                slot = (value ^ (value >> np.uint64(32))) & np.uint64(size - 1)
                values[i], slots[i] = value, slot
                counts[slot] += 1
            several = 0
            for i in range(left):
                count, place = counts[slots[i]], places[i]
                values[several], places[several] = values[i], place
                gram_bytes[several] = ends[place + n] - ends[place]
                costs[several] = count * gram_bytes[several]
                several += count > 1
            most = _most_costly(values, gram_bytes, costs, several, table, counts)
            top[document, n - 2] = min(most / total, 1.0)
            left = 0
            for i in range(several - 1):
                values[left], places[left] = values[i], places[i]
                left += places[i + 1] == places[i] + 1
        for i in range(left):
            values[i] = _combine(values[i], hashes[start + places[i] + 4])
        cover[document] = _covered_again(values, places, left, ends, 5, table, counts, own) / total
