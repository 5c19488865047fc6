"""Compiled loops over raw UTF-8: words, MinHash signatures, verified near-duplicate groups.

Every kernel takes the bytes of all documents end to end (`data`, uint8) and where each starts (`offsets`, int64, one
more than there are documents), accepts 0 documents and documents of 0 bytes, and releases the interpreter lock.

Words: a run of ASCII letters, digits and underscores; each Han or kana character by itself; a run of other non-ASCII
characters. Everything else separates. So Chinese needs no segmenter and code needs no parser: spaces, tabs and depth of
indentation leave no trace in the words. Hashes are 64 bits; for one text they are equal on every machine.
"""

import numpy as np

from data_pipelines.blocks import (
    TAIL_BYTES,
    address_of,
    between,
    block_at,
    compiled,
    eight_at,
    inlined,
    lowest,
    num_ones,
    trailing_zeros,
)

WORD_HAS_LETTER = np.uint8(1)
WORD_IS_HAN = np.uint8(2)
SHINGLE_WORDS = 5
"""Words running that are a shingle."""

MIX = 0x9E3779B97F4A7C15
MIX_AGAIN = 0xD6E8FEB86659FD93
LOWER_CASE = np.uint64(0x2020202020202020)
"""Makes the letters among eight word bytes lower case; of word bytes, only the underscore becomes another byte as well,
one that is no word byte."""


@inlined
def _is_word_byte(byte):
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte == 95


@inlined
def _width(byte):
    """Bytes of the character that starts with this one; 1 for a stray continuation byte."""
    if byte < 0xC0:
        return 1
    if byte < 0xE0:
        return 2
    return 3 if byte < 0xF0 else 4


@inlined
def _kind(data, at, end):
    """Of the character at `at`: 0 separator, 1 ASCII word, 2 Han or kana (a word by itself), 3 other letters."""
    byte = data[at]
    if byte < 0x80:
        return 1 if _is_word_byte(byte) else 0
    second = data[at + 1] if at + 1 < end else np.uint8(0)
    if byte == 0xC2:  # U+0080-00BF: controls, signs
        return 0
    if byte == 0xE2 and (second == 0x80 or second == 0x81):  # U+2000-207F: general punctuation
        return 0
    if byte == 0xE3 and second == 0x80:  # U+3000-303F: CJK punctuation
        return 0
    if byte == 0xEF and second >= 0xBC:  # U+FF00-FFFF: full-width forms, U+FFFD
        return 0
    if 0xE3 <= byte <= 0xE9:
        return 2
    return 3


@inlined
def mixed(value):
    """Another number for every number, each bit of it depending on all others: one product alone leaves what the upper
    bytes say in the upper bytes, where those of the next eight characters may undo it.
    """
    value = (value ^ (value >> np.uint64(32))) * np.uint64(MIX)
    value = (value ^ (value >> np.uint64(29))) * np.uint64(MIX_AGAIN)
    return value ^ (value >> np.uint64(32))


@inlined
def hash_bytes(address, size, case):
    """Hash of so many bytes, one at least, each eight of them with the bits of `case` set.

    Up to eight bytes that differ have different hashes. Eight bytes must be readable.
    """
    if size <= 8:
        return mixed((eight_at(address) | case) & lowest(8 * size))
    value, at = np.uint64(size) * np.uint64(MIX), 0
    while at + 8 < size:
        value = mixed(value ^ (eight_at(address + at) | case))
        at += 8
    return mixed(value ^ (eight_at(address + size - 8) | case))


@compiled
def words(data, offsets, hashes, lengths, flags, starts):
    """Number of words found; hash, bytes and flags of each; those of document d lie at starts[d]:starts[d + 1].

    The hash is `hash_bytes` of the bytes, ASCII letters in lower case. The three arrays must hold two values per three
    bytes of text, and one more.
    """
    filled = 0
    tail = np.zeros(TAIL_BYTES, np.uint8)
    for document in range(offsets.shape[0] - 1):
        starts[document] = filled
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            block = block_at(data, at, tail)
            size = min(trailing_zeros(between(block, 128, 255)), end - at)
            if size == 0:
                at, filled = _other_words(data, at, end, tail, hashes, lengths, flags, filled)
                continue
            known = lowest(size)
            letters = (between(block, 65, 90) | between(block, 97, 122)) & known
            inside = letters | (between(block, 48, 57) | between(block, 95, 95)) & known
            begins, ends = inside & ~(inside << np.uint64(1)), ~inside & (inside << np.uint64(1))
            for _ in range(num_ones(ends)):
                first = trailing_zeros(begins)
                length = trailing_zeros(ends) - first
                begins &= begins - np.uint64(1)
                ends &= ends - np.uint64(1)
                hashes[filled] = hash_bytes(block + first, length, LOWER_CASE)
                lengths[filled] = length
                flags[filled] = (letters >> np.uint64(first)) & lowest(length) != 0
                filled += 1
            if begins == 0:
                at += size
            elif trailing_zeros(begins) > 0:  # a word that may go on: the next block begins with it
                at += trailing_zeros(begins)
            else:
                begin, flag = at, np.uint8(0)
                while at < end and _is_word_byte(data[at]):
                    flag |= np.uint8(data[at] >= 65 and data[at] != 95)
                    at += 1
                hashes[filled] = hash_bytes(address_of(data, begin), at - begin, LOWER_CASE)
                lengths[filled] = at - begin
                flags[filled] = flag
                filled += 1
    starts[offsets.shape[0] - 1] = filled
    tail[0] = 0  # it is in use up to here
    return filled


@inlined
def _other_words(data, at, end, tail, hashes, lengths, flags, filled):
    """(end of the non-ASCII characters from `at` on, number of words filled in): enters the words among them."""
    while at < end and data[at] >= 0x80:
        kind, begin = _kind(data, at, end), at
        at = min(at + _width(data[at]), end)
        if kind == 0:
            continue
        while kind == 3 and at < end and data[at] >= 0x80 and _kind(data, at, end) == 3:
            at = min(at + _width(data[at]), end)
        place = block_at(data, begin, tail) if at - begin <= 8 else address_of(data, begin)
        hashes[filled] = hash_bytes(place, at - begin, np.uint64(0))
        lengths[filled] = at - begin
        flags[filled] = WORD_HAS_LETTER | WORD_IS_HAN if kind == 2 else WORD_HAS_LETTER
        filled += 1
    return at, filled


def word_hashes(text: str) -> np.ndarray:
    """The hash that `words` gives each word of a text, in order."""
    data = np.frombuffer(text.encode(), np.uint8)
    hashes, lengths, flags = (np.empty(len(data) + 1, kind) for kind in (np.uint64, np.int32, np.uint8))
    offsets = np.array([0, len(data)], np.int64)
    return hashes[: words(data, offsets, hashes, lengths, flags, np.empty(2, np.int64))]


@compiled
def word_totals(hashes, lengths, flags, starts, wanted, out):
    """Fills out[d] with the bytes of the words of document d, its words with a letter, and how many of `wanted`, at
    most 64 hashes, it has.
    """
    sieve, every = np.uint64(0), lowest(wanted.shape[0])  # most words are told from all of them by six bits
    for w in range(wanted.shape[0]):
        sieve |= np.uint64(1) << (wanted[w] & np.uint64(63))
    for document in range(starts.shape[0] - 1):
        start, end = starts[document], starts[document + 1]
        num_bytes, num_letters, seen = np.int64(0), np.int64(0), np.uint64(0)
        for i in range(start, end):
            num_bytes += lengths[i]
            num_letters += flags[i] & WORD_HAS_LETTER
        while start < end and seen != every:
            if (sieve >> (hashes[start] & np.uint64(63))) & np.uint64(1):
                for w in range(wanted.shape[0]):
                    seen |= np.uint64(hashes[start] == wanted[w]) << np.uint64(w)
            start += 1
        out[document, 0], out[document, 1], out[document, 2] = num_bytes, num_letters, num_ones(seen)


@inlined
def _combine(left, right):
    left = (left ^ (left >> np.uint64(31))) * np.uint64(MIX)
    return left + right


@inlined
def table_size(num_values):
    """A power of two: at least two slots of an open-addressed table for every value."""
    size = 16
    while size < 2 * num_values:
        size *= 2
    return size


@inlined
def probe(table, spread, value):
    """The slot of an open-addressed table (its size a power of two) that has the value or, being 0, may take it; the
    search begins where `spread`, which says where the value belongs, points to.
    """
    mask = np.uint64(table.shape[0] - 1)
    slot = (spread ^ (spread >> np.uint64(32))) & mask
    while table[slot] != 0 and table[slot] != value:
        slot = (slot + np.uint64(1)) & mask
    return slot


@inlined
def _enter(table, value):
    """Whether the value was in the open-addressed table (its size a power of two); it is in it afterwards."""
    value = value | np.uint64(1)  # 0 marks a free slot
    slot = probe(table, value, value)
    known = table[slot] == value
    table[slot] = value
    return known


@inlined
def _shingle(hashes, at, size):
    """Hash of `size` words running."""
    value = np.uint64(size)
    for i in range(at, at + size):
        value = (value ^ (value >> np.uint64(31))) * np.uint64(MIX) + hashes[i]
    return value


@inlined
def _put_shingles(hashes, start, end, values, filled):
    """How many values are filled after the shingles of a document, repeated ones included: of `SHINGLE_WORDS` words
    running each; a document of fewer words has one of them all.
    """
    for i in range(start, end - SHINGLE_WORDS + 1):
        values[filled] = _shingle(hashes, i, SHINGLE_WORDS)
        filled += 1
    if start < end < start + SHINGLE_WORDS:
        values[filled] = _shingle(hashes, start, end - start)
        filled += 1
    return filled


@compiled
def shingles(hashes, starts, stops, values, out):
    """Number of shingles; those of document d, whose words are starts[d]:stops[d], lie at out[d]:out[d + 1] of values,
    repeated ones included.
    """
    filled = 0
    for document in range(starts.shape[0]):
        out[document] = filled
        filled = _put_shingles(hashes, starts[document], stops[document], values, filled)
    out[starts.shape[0]] = filled
    return filled


@compiled
def distinct(values, starts):
    """Leaves each value once in every run values[starts[d]:starts[d + 1]], sorted, and moves the runs together;
    `starts` says afterwards where they lie.
    """
    filled = start = 0
    for document in range(starts.shape[0] - 1):
        first, stop = filled, starts[document + 1]
        for i in range(start, stop):
            value = values[i]
            if filled == first or values[filled - 1] != value:
                values[filled] = value
                filled += 1
        start, starts[document + 1] = stop, filled


@inlined
def _num_distinct(values, num_values, seen, slots, table):
    """How many different values there are; scratch space as `signatures` has it.

    Those alone in their slot of `seen`, where 1 stands for one value and 2 for more, are met once.
    """
    size = 16
    while size < 4 * num_values:
        size *= 2
    seen[:size] = 0
    mask = np.uint64(size - 1)
    for i in range(num_values):
        slot = np.int64((values[i] ^ (values[i] >> np.uint64(32))) & mask)
        slots[i] = slot
        seen[slot] += seen[slot] < 2
    shared = 0
    for i in range(num_values):
        shared += seen[slots[i]] > 1
    own, repeats = table[: table_size(shared)], 0
    own[:] = 0
    for i in range(num_values):
        if seen[slots[i]] > 1:
            repeats += _enter(own, values[i])
    return num_values - repeats


@inlined
def _halves(value):
    return np.uint32(value & np.uint64(0xFFFFFFFF)), np.uint32(value >> np.uint64(32))


@inlined
def _least(values, num_values, multipliers, constants, row):
    """Fills row[p] with the least value of permutation p over the values, whose number is a multiple of four."""
    row[:] = np.uint32(0xFFFFFFFF)
    for i in range(0, num_values, 4):  # four at a time, so that a permutation is loaded once for them
        low_a, high_a = _halves(values[i])
        low_b, high_b = _halves(values[i + 1])
        low_c, high_c = _halves(values[i + 2])
        low_d, high_d = _halves(values[i + 3])
        for p in range(multipliers.shape[0]):
            multiplier, constant = multipliers[p], constants[p]
            a = np.uint32(low_a * multiplier) ^ np.uint32(high_a + constant)
            b = np.uint32(low_b * multiplier) ^ np.uint32(high_b + constant)
            c = np.uint32(low_c * multiplier) ^ np.uint32(high_c + constant)
            d = np.uint32(low_d * multiplier) ^ np.uint32(high_d + constant)
            row[p] = min(min(row[p], min(a, b)), min(c, d))


@compiled
def signatures(hashes, starts, stops, multipliers, constants, table, seen, slots, values, sizes, out):
    """Fills sizes[d] with the distinct shingles of document d, whose words are starts[d]:stops[d], and out[d, p] with
    the least value of permutation p over them; all ones where there are none.

    A permutation is a product with an odd number, for which the lower half of a shingle's hash is random enough, and
    the upper half in it. Scratch space: `table` (uint64) and `seen` (uint8), powers of two, at least twice and four
    times the words of any document; `slots` and `values`, at least as many words and three.
    """
    for document in range(starts.shape[0]):
        found = _put_shingles(hashes, starts[document], stops[document], values, 0)
        sizes[document] = _num_distinct(values, found, seen, slots, table)
        while found % 4 != 0:
            values[found] = values[found - 1]
            found += 1
        _least(values, found, multipliers, constants, out[document])


@compiled
def band_keys(signature, members, band, rows, out):
    """Fills out[i] with the key of a band of the signature of members[i]: equal where all rows of the band are."""
    for i in range(members.shape[0]):
        key = np.uint64(band + 1)
        for column in range(band * rows, (band + 1) * rows):
            key = (key ^ (key >> np.uint64(31))) * np.uint64(MIX) + np.uint64(signature[members[i], column])
        out[i] = key


@compiled
def jaccard(values, start_a, stop_a, start_b, stop_b):
    """|A and B| / |A or B| of two sorted runs of distinct values; 0 where both are empty."""
    common = 0
    a, b = start_a, start_b
    while a < stop_a and b < stop_b:  # without branches: which of both is less cannot be foreseen
        one, other = values[a], values[b]
        common += one == other
        a += one <= other
        b += other <= one
    union = (stop_a - start_a) + (stop_b - start_b) - common
    return common / union if union > 0 else 0.0


@inlined
def _root(parents, node):
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@compiled
def candidates(keys, members, sizes, signature, threshold, least_agreement, neighbours, parents, start, out):
    """(number of pairs put into out, where to go on): walks `members`, sorted by band key, from `start`.

    Each member is compared with at most `neighbours` members before it in its bucket, so giant buckets stay linear.
    A pair counts if it is not yet in one group, its sizes allow the threshold and its signatures agree in
    `least_agreement` hashes. Stops while `out` still has room for the neighbours of one more member.
    """
    found, i = 0, start
    while i < keys.shape[0] and found + neighbours <= out.shape[0]:
        j = i - 1
        while j >= 0 and keys[j] == keys[i] and i - j <= neighbours:
            a, b = members[i], members[j]
            j -= 1
            if min(sizes[a], sizes[b]) < threshold * max(sizes[a], sizes[b]):
                continue
            if _root(parents, a) == _root(parents, b):
                continue
            agree = 0
            for p in range(signature.shape[1]):
                agree += signature[a, p] == signature[b, p]
            if agree >= least_agreement:
                out[found, 0], out[found, 1] = a, b
                found += 1
        i += 1
    return found, i


@compiled
def apart(pairs, parents):
    """Which pairs are not in one group."""
    out = np.empty(pairs.shape[0], np.bool_)
    for i in range(pairs.shape[0]):
        out[i] = _root(parents, pairs[i, 0]) != _root(parents, pairs[i, 1])
    return out


@compiled
def end_of_block(pairs, sizes, start, most, seen, number):
    """End of the pairs from `start` on whose documents have at most `most` shingles together; at least one pair.

    seen: the block that last held a document; this one is `number`.
    """
    total, end = 0, start
    while end < pairs.shape[0]:
        for side in range(2):
            document = pairs[end, side]
            if seen[document] != number:
                seen[document] = number
                total += sizes[document]
        if total > most and end > start:
            return end
        end += 1
    return end


@compiled
def unite(pairs, local, values, starts, threshold, parents, partner, similarity):
    """Number of pairs with a true Jaccard of at least `threshold`; they are united.

    local: where the shingles of each of a pair lie: values[starts[local]:starts[local + 1]]. The root of a group is its
    least member. partner, similarity: a document's closest pair.
    """
    verified = 0
    for i in range(pairs.shape[0]):
        a, b = pairs[i, 0], pairs[i, 1]
        root_a, root_b = _root(parents, a), _root(parents, b)
        if root_a == root_b:
            continue
        place_a, place_b = local[i, 0], local[i, 1]
        value = jaccard(values, starts[place_a], starts[place_a + 1], starts[place_b], starts[place_b + 1])
        if value < threshold:
            continue
        verified += 1
        parents[max(root_a, root_b)] = min(root_a, root_b)
        for one, other in ((a, b), (b, a)):
            if value > similarity[one]:
                similarity[one] = value
                partner[one] = other
    return verified
