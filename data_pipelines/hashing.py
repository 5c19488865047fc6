"""Compiled loops over hashed text. As in `kernels.py`, 0 rows are accepted and the interpreter lock is released.

`data` holds the UTF-8 of all rows end to end, row i at data[offsets[i]:offsets[i + 1]].
"""

import numpy as np

from data_pipelines.blocks import compiled, inlined
from data_pipelines.kernels import MIX

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3


@compiled
def row_hashes(data, offsets, out):
    """Fills out[i] with the 64-bit FNV-1a hash of row i."""
    for row in range(offsets.shape[0] - 1):
        value = np.uint64(FNV_OFFSET)
        for at in range(offsets[row], offsets[row + 1]):
            value = (value ^ np.uint64(data[at])) * np.uint64(FNV_PRIME)
        out[row] = value


@compiled
def windows(data, offsets, size, bounds, rows):
    """Number of windows: every row cut into pieces of about `size` bytes, one at least, at a space or a character.

    Window w is data[bounds[w]:bounds[w + 1]] and belongs to rows[w]. `bounds` must hold 2 + rows + bytes / size values.
    """
    found = 0
    for row in range(offsets.shape[0] - 1):
        start, stop = offsets[row], offsets[row + 1]
        pieces = max((stop - start + size // 2) // size, 1)
        for piece in range(pieces):
            cut = start + (stop - start) * piece // pieces
            least = max(cut - 32, bounds[found - 1] + 1) if piece > 0 else cut
            at = cut
            while at > least and data[at - 1] > 32:
                at -= 1
            if at == least:
                at = cut
                while at > least and (data[at] & 0xC0) == 0x80:
                    at -= 1
            bounds[found] = at
            rows[found] = row
            found += 1
    bounds[found] = offsets[offsets.shape[0] - 1]
    return found


@inlined
def _bucket(value, shift):
    """The upper bits of a product: Knuth's multiplicative hashing."""
    return (value * np.uint64(0xFF51AFD7ED558CCD)) >> shift


@inlined
def _shift(num_buckets):
    """What a 64-bit product is shifted by to give one of so many buckets, a power of two."""
    shift = 64
    while num_buckets > 1:
        num_buckets //= 2
        shift -= 1
    return np.uint64(shift)


@inlined
def _features(data, start, stop, words, first, last, shift, out):
    """Number of hashed n-grams of data[start:stop], whose words are words[first:last]; fills out with their buckets.

    Words alone and in pairs; characters in threes and fours, letters in lower case, digits as 0, white space as one
    space. `out` must hold 4 values per byte.
    """
    found = 0
    for i in range(first, last):
        out[found] = _bucket(words[i] + np.uint64(1), shift)
        found += 1
        if i > first:
            out[found] = _bucket(words[i - 1] * np.uint64(MIX) + words[i], shift)
            found += 1
    one, two, three = np.uint64(0), np.uint64(0), np.uint64(0)
    at = start
    while at < stop:
        byte = data[at]
        at += 1
        if byte < 0x80:
            if 65 <= byte <= 90:
                byte += np.uint8(32)
            elif 48 <= byte <= 57:
                byte = np.uint8(48)
            elif byte <= 32:
                byte = np.uint8(32)
                if one == np.uint64(32):
                    continue
            four = np.uint64(byte)
        else:
            four = np.uint64(byte)
            while at < stop and (data[at] & 0xC0) == 0x80:
                four = (four << np.uint64(8)) | np.uint64(data[at])
                at += 1
        triple = ((two * np.uint64(MIX)) ^ one) * np.uint64(MIX) ^ four
        if two != 0:
            out[found] = _bucket(triple, shift)
            found += 1
        if three != 0:
            out[found] = _bucket(triple + three * np.uint64(FNV_PRIME), shift)
            found += 1
        three, two, one = two, one, four
    return found


@compiled
def margins(data, bounds, words, starts, weights, bias, scratch, out):
    """Fills out[w] with the linear score of window w: bias + sum of the weights of its n-grams / sqrt(their number).

    NaN where a window has no word. words: hashes, those of window w at starts[w]:starts[w + 1].
    """
    shift = _shift(weights.shape[0])
    for window in range(bounds.shape[0] - 1):
        first, last = starts[window], starts[window + 1]
        out[window] = np.nan
        if first < last:
            found = _features(data, bounds[window], bounds[window + 1], words, first, last, shift, scratch)
            total = 0.0
            for i in range(found):
                total += weights[scratch[i]]
            out[window] = bias + total / np.sqrt(found)


@compiled
def learn(data, bounds, words, starts, labels, shares, order, weights, squares, bias, rate, decay, scratch):
    """Mean log loss of one pass of AdaGrad over the windows in `order`, before each of its steps.

    labels 0 or 1 and shares (how much a window counts) per window. Changes weights, squares (sums of squared gradients)
    and bias (its value, its sum of squares).
    """
    shift = _shift(weights.shape[0])
    loss, total_share = 0.0, 0.0
    for window in order:
        first, last = starts[window], starts[window + 1]
        if first == last:
            continue
        found = _features(data, bounds[window], bounds[window + 1], words, first, last, shift, scratch)
        scale = 1.0 / np.sqrt(found)
        total = 0.0
        for i in range(found):
            total += weights[scratch[i]]
        margin = bias[0] + total * scale
        sign = 1.0 if labels[window] > 0 else -1.0
        loss += shares[window] * np.log1p(np.exp(-min(max(sign * margin, -500.0), 500.0)))
        total_share += shares[window]
        slope = -sign / (1.0 + np.exp(min(max(sign * margin, -500.0), 500.0))) * shares[window]
        for i in range(found):
            bucket = scratch[i]
            gradient = slope * scale + decay * weights[bucket]
            squares[bucket] += gradient * gradient
            weights[bucket] -= rate * gradient / np.sqrt(squares[bucket] + 1e-8)
        bias[1] += slope * slope
        bias[0] -= rate * slope / np.sqrt(bias[1] + 1e-8)
    return loss / max(total_share, 1e-12)
