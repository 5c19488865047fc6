"""Compiled loops over raw UTF-8: words, MinHash signatures, verified near-duplicate groups.

Every kernel takes the bytes of all documents end to end (`data`, uint8) and where each starts (`offsets`, int64, one
more than there are documents), accepts 0 documents and documents of 0 bytes, and releases the interpreter lock.

Words: a run of ASCII letters, digits and underscores; each Han or kana character by itself; a run of other non-ASCII
characters. Everything else separates. So Chinese needs no segmenter and code needs no parser: spaces, tabs and depth of
indentation leave no trace in the words. Hashes are 64 bits; for one text they are equal on every machine.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

WORD_HAS_LETTER = np.uint8(1)
WORD_IS_HAN = np.uint8(2)

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3
MIX = 0x9E3779B97F4A7C15
ONES, HIGHS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
"""The lowest and the highest bit of eight bytes."""

compiled = numba.njit(cache=True, nogil=True)


def _place(context, builder, signature, arguments):
    """Where data[at] lies, as a pointer to eight bytes."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(64).as_pointer())


@intrinsic
def load64(typing, data, at):
    """data[at:at + 8] of contiguous bytes as one number, the first byte its lowest; the caller sees to the bounds."""

    def generate(context, builder, signature, arguments):
        return builder.load(_place(context, builder, signature, arguments), align=1)

    return numba.types.uint64(data, at), generate


@intrinsic
def store64(typing, data, at, value):
    """Makes data[at:at + 8] the bytes of a number, the lowest first; the caller sees to the bounds."""

    def generate(context, builder, signature, arguments):
        builder.store(arguments[2], _place(context, builder, signature, arguments), align=1)
        return context.get_dummy_value()

    return numba.types.void(data, at, numba.types.uint64), generate


@intrinsic
def trailing_zeros(typing, value):
    """The number of zeros below the lowest one of a 64-bit number that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return numba.types.int64(numba.types.uint64), generate


def fnv(text: str) -> int:
    """The 64-bit FNV-1a hash that the kernels give a word (in lower case)."""
    value = FNV_OFFSET
    for byte in text.encode():
        value = ((value ^ byte) * FNV_PRIME) & 0xFFFFFFFFFFFFFFFF
    return value


@compiled
def _is_word_byte(byte):
    return 48 <= byte <= 57 or 65 <= byte <= 90 or 97 <= byte <= 122 or byte == 95


@compiled
def _width(byte):
    """Bytes of the character that starts with this one; 1 for a stray continuation byte."""
    if byte < 0xC0:
        return 1
    if byte < 0xE0:
        return 2
    return 3 if byte < 0xF0 else 4


@compiled
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


def _word_bytes():
    """ASCII word byte -> its lower case; 0 for all other bytes."""
    table = np.zeros(256, np.uint8)
    for byte in b"0123456789_abcdefghijklmnopqrstuvwxyz":
        table[byte] = byte
        if byte >= 97:
            table[byte - 32] = byte
    return table


LOWER = _word_bytes()


@compiled
def words(data, offsets, hashes, lengths, flags, starts):
    """Number of words found; hash, bytes and flags of each; those of document d lie at starts[d]:starts[d + 1].

    The hash is FNV-1a over the bytes, ASCII letters in lower case. The three arrays must hold two values per three
    bytes of text, and one more.
    """
    filled = 0
    for document in range(offsets.shape[0] - 1):
        starts[document] = filled
        at, end = offsets[document], offsets[document + 1]
        while at < end:
            byte = data[at]
            value, begin = np.uint64(FNV_OFFSET), at
            lowered = LOWER[byte]
            if lowered != 0:
                flag = np.uint8(0)
                while lowered != 0:
                    value = (value ^ np.uint64(lowered)) * np.uint64(FNV_PRIME)
                    flag |= np.uint8(lowered >= 97)
                    at += 1
                    lowered = LOWER[data[at]] if at < end else np.uint8(0)
            elif byte < 0x80:
                at += 1
                continue
            else:
                kind = _kind(data, at, end)
                if kind == 0:
                    at += _width(byte)
                    continue
                while True:
                    stop = min(at + _width(data[at]), end)
                    while at < stop:
                        value = (value ^ np.uint64(data[at])) * np.uint64(FNV_PRIME)
                        at += 1
                    if kind == 2 or at >= end or _kind(data, at, end) != kind:
                        break
                flag = np.uint8(3) if kind == 2 else np.uint8(1)
            hashes[filled] = value
            lengths[filled] = at - begin
            flags[filled] = flag
            filled += 1
    starts[offsets.shape[0] - 1] = filled
    return filled


@compiled
def word_totals(hashes, lengths, flags, starts, wanted, out):
    """Fills out[d] with the bytes of the words of document d, its words with a letter, and how many of `wanted`, at
    most 64 hashes, it has.
    """
    for document in range(starts.shape[0] - 1):
        num_bytes, num_letters, seen = np.int64(0), np.int64(0), np.uint64(0)
        for i in range(starts[document], starts[document + 1]):
            num_bytes += lengths[i]
            num_letters += flags[i] & WORD_HAS_LETTER
            for w in range(wanted.shape[0]):
                seen |= np.uint64(hashes[i] == wanted[w]) << np.uint64(w)
        num_seen = 0
        while seen != 0:
            seen &= seen - np.uint64(1)
            num_seen += 1
        out[document, 0], out[document, 1], out[document, 2] = num_bytes, num_letters, num_seen


@compiled
def _combine(left, right):
    left = (left ^ (left >> np.uint64(31))) * np.uint64(MIX)
    return left + right


@compiled
def _enter(table, value):
    """Whether the value was in the open-addressed table (its size a power of two); it is in it afterwards."""
    mask = np.uint64(table.shape[0] - 1)
    value = value | np.uint64(1)  # 0 marks a free slot
    slot = (value ^ (value >> np.uint64(32))) & mask
    while table[slot] != 0 and table[slot] != value:
        slot = (slot + np.uint64(1)) & mask
    known = table[slot] == value
    table[slot] = value
    return known


@compiled
def _shingle(hashes, at, size):
    """Hash of `size` words running."""
    value = np.uint64(size)
    for i in range(at, at + size):
        value = (value ^ (value >> np.uint64(31))) * np.uint64(MIX) + hashes[i]
    return value


@compiled
def shingles(hashes, starts, size, values, out):
    """Number of shingles; those of document d lie at out[d]:out[d + 1] of values, repeated ones included.

    A shingle is `size` words running; a document of fewer words has one of them all.
    """
    filled = 0
    for document in range(starts.shape[0] - 1):
        out[document] = filled
        start, end = starts[document], starts[document + 1]
        for i in range(start, max(end - size + 1, min(start + 1, end))):
            values[filled] = _shingle(hashes, i, min(size, end - i))
            filled += 1
    out[starts.shape[0] - 1] = filled
    return filled


@compiled
def signatures(hashes, starts, size, multipliers, constants, table, values, sizes, out):
    """Fills sizes[d] with the distinct shingles of document d, and out[d, p] with the least value of permutation p over
    them; all ones where there are none.

    Scratch space: `table`, a power of two, at least twice the words of any document; `values`, at least as many words.
    """
    num_permutations = multipliers.shape[0]
    for document in range(starts.shape[0] - 1):
        start, end = starts[document], starts[document + 1]
        places = 16
        while places < 2 * (end - start):
            places *= 2
        own = table[:places]
        own[:] = 0
        found = 0
        for i in range(start, max(end - size + 1, min(start + 1, end))):
            value = _shingle(hashes, i, min(size, end - i))
            values[found] = value
            found += not _enter(own, value)
        sizes[document] = found
        row = out[document]
        row[:] = np.uint32(0xFFFFFFFF)
        for i in range(found):
            low = np.uint32(values[i] & np.uint64(0xFFFFFFFF))
            high = np.uint32(values[i] >> np.uint64(32))
            for p in range(num_permutations):
                value = np.uint32(low * multipliers[p]) ^ np.uint32(high + constants[p])
                value = np.uint32((value ^ (value >> np.uint32(15))) * np.uint32(0x2C1B3C6D))
                value = np.uint32((value ^ (value >> np.uint32(12))) * np.uint32(0x297A2D39))
                value ^= value >> np.uint32(15)
                row[p] = min(row[p], value)


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
    while a < stop_a and b < stop_b:
        if values[a] == values[b]:
            common += 1
            a += 1
            b += 1
        elif values[a] < values[b]:
            a += 1
        else:
            b += 1
    union = (stop_a - start_a) + (stop_b - start_b) - common
    return common / union if union > 0 else 0.0


@compiled
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
