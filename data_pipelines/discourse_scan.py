"""Compiled loops over one long text: its lines, its words' repetition, the phrases of a list that stand in it.

As in `kernels.py`, texts are UTF-8 bytes, words are what `kernels.words` finds, and the interpreter lock is released.
"""

import numpy as np

from data_pipelines import kernels
from data_pipelines.blocks import compiled, inlined
from data_pipelines.kernels import MIX

NUM_LINE_MEASURES = 11
(
    CHARACTERS, NEWLINES, COMMAS, SPACES, PIPES, LINES, MEAN_LINE, STD_LINE, MEDIAN_LINE, MAX_LINE, MIN_LINE
) = range(NUM_LINE_MEASURES)  # fmt: skip

LINE_LENGTHS = 1 << 16
"""Lines of at least so many characters are one length to the median."""
PIECE = 4096
"""Words among which different ones are counted."""
RUN = 8
"""Words of a run that is looked for again."""
LONGEST_PHRASE = 6
"""Words of a phrase."""
_combine, _enter, _shingle = kernels._combine, kernels._enter, kernels._shingle


@compiled
def line_measures(data, start, stop, lengths, out):
    """Fills `out` (float64) with the counts named at the top of this file, of data[start:stop].

    Lengths are in characters without the line end, of lines that hold more than white space. Commas are those of ASCII
    and the full-width one. `lengths` (int64, `LINE_LENGTHS`) is scratch space.
    """
    lengths[:] = 0
    characters, newlines, commas, spaces, pipes = 0, 0, 0, 0, 0
    lines, total, squares, longest, shortest = 0, 0.0, 0.0, 0, stop - start + 1
    length, blank = 0, True
    for at in range(start, stop + 1):
        if at == stop or data[at] == 10:
            if not blank:
                lines += 1
                total += length
                squares += float(length) * length
                longest, shortest = max(longest, length), min(shortest, length)
                lengths[min(length, LINE_LENGTHS - 1)] += 1
            if at < stop:
                newlines += 1
                characters += 1
            length, blank = 0, True
            continue
        byte = data[at]
        if (byte & 0xC0) == 0x80:
            continue
        characters += 1
        length += 1
        blank = blank and byte <= 32
        spaces += byte == 32
        pipes += byte == 124
        commas += byte == 44 or (byte == 0xEF and at + 2 < stop and data[at + 1] == 0xBC and data[at + 2] == 0x8C)
    out[:] = 0.0
    out[CHARACTERS], out[NEWLINES], out[COMMAS] = characters, newlines, commas
    out[SPACES], out[PIPES], out[LINES] = spaces, pipes, lines
    if lines == 0:
        return
    mean = total / lines
    out[MEAN_LINE], out[STD_LINE] = mean, np.sqrt(max(squares / lines - mean * mean, 0.0))
    out[MAX_LINE], out[MIN_LINE] = longest, shortest
    seen, lower = 0, -1
    for value in range(LINE_LENGTHS):
        seen += lengths[value]
        if lower < 0 and seen > (lines - 1) // 2:
            lower = value
        if seen > lines // 2:
            out[MEDIAN_LINE] = (lower + value) / 2
            return


@compiled
def distinct_words(hashes, table, totals):
    """Adds to totals the words of the whole pieces of `PIECE` words, and how many of each piece are different.

    Fewer words than a piece are one piece. `table` (uint64, a power of two above twice `PIECE`) is scratch space.
    """
    start, end = 0, hashes.shape[0]
    while start < end and (start + PIECE <= end or start == 0):
        stop = min(start + PIECE, end)
        table[:] = 0
        for i in range(start, stop):
            totals[1] += not _enter(table, hashes[i])
        totals[0] += stop - start
        start = stop


@compiled
def distinct_runs(hashes, level, table, totals):
    """Adds to totals the runs of `RUN` words, and those of them that were not in `table`; they are in it afterwards.

    Of a long text one run in 2^level is looked at, chosen by its hash: all its repetitions or none.
    """
    for i in range(hashes.shape[0] - RUN + 1):
        value = _shingle(hashes, i, RUN)
        value = (value ^ (value >> np.uint64(32))) * np.uint64(MIX)
        if level > 0 and value >> np.uint64(64 - level) != 0:
            continue
        totals[0] += 1
        totals[1] += not _enter(table, value)


@inlined
def _place(keys, value):
    """Slot of the value in the open-addressed table (its size a power of two), or -1."""
    mask = np.uint64(keys.shape[0] - 1)
    value |= np.uint64(1)
    slot = (value ^ (value >> np.uint64(32))) & mask
    while keys[slot] != 0 and keys[slot] != value:
        slot = (slot + np.uint64(1)) & mask
    return np.int64(slot) if keys[slot] == value else np.int64(-1)


@compiled
def enter_phrase(words, code, keys, codes):
    """Enters a phrase (hashes of its words) and all its beginnings; code: its list's number from 1 on."""
    value = np.uint64(0)
    for i in range(words.shape[0]):
        value = _combine(value, words[i])
        _enter(keys, value)
        if i == words.shape[0] - 1:
            codes[_place(keys, value)] = code


@compiled
def count_phrases(hashes, keys, codes, counts):
    """Adds to counts[list] the phrases of each list, and the words of them. Of two that overlap the first counts, of
    those that begin together the longest."""
    i, end = 0, hashes.shape[0]
    while i < end:
        value, found, length = np.uint64(0), 0, 1
        for k in range(min(LONGEST_PHRASE, end - i)):
            value = _combine(value, hashes[i + k])
            slot = _place(keys, value)
            if slot < 0:
                break
            if codes[slot] > 0:
                found, length = codes[slot], k + 1
        if found > 0:
            counts[found - 1, 0] += 1
            counts[found - 1, 1] += length
        i += length
