"""Compiled loops over raw UTF-8 that count: kinds of characters, lines, what repeats itself. As in `kernels.py`."""

import numpy as np

from data_pipelines import kernels
from data_pipelines.blocks import (
    TAIL_BYTES,
    address_of,
    between,
    block_at,
    compiled,
    eight_at,
    folded_product,
    inlined,
    lowest,
    num_ones,
    trailing_zeros,
)
from data_pipelines.kernels import MIX, MIX_AGAIN, mixed, table_size

_combine, _enter, _kind, _width = kernels._combine, kernels._enter, kernels._kind, kernels._width
_is_word_byte = kernels._is_word_byte

NUM_COUNTS = 24
(
    CHARACTERS, HAN, HASHES, ELLIPSES, LETTERS, DIGITS, PUNCTUATION, CONTROLS, REPLACEMENTS, BRACES, SENTENCES,
    NEWLINES, LINES, BLANK_LINES, BULLET_LINES, ELLIPSIS_LINES, TERMINAL_LINES, SHORT_LINES, LONGEST_LINE,
    DUPLICATE_LINES, DUPLICATE_LINE_BYTES, DUPLICATE_PARAGRAPHS, WORD_TAIL_BYTES, WORD_JOINS,
) = range(NUM_COUNTS)  # fmt: skip

# WORD_TAIL_BYTES: of non-ASCII characters in words, the bytes behind their first. WORD_JOINS: how often letters beyond
# ASCII and ASCII ones stand side by side, which are two words for `kernels.words` and one for a person ("größer": 2).

NOWHERE = -1


@compiled
def hold_lorem_ipsum(data, offsets):
    """1.0 for every document that holds "lorem ipsum" in any case (a long s counts as s), else 0.0."""
    out = np.zeros(offsets.shape[0] - 1)
    for document in range(offsets.shape[0] - 1):
        text = data[offsets[document] : offsets[document + 1]]
        may = False  # "m ip" is rare, and many bytes are looked at together
        for i in range(text.shape[0] - 3):
            may |= (text[i] | 32 == 109) & (text[i + 1] == 32) & (text[i + 2] | 32 == 105) & (text[i + 3] | 32 == 112)
        if not may:
            continue
        for i in range(5, text.shape[0] - 5):
            if text[i] != 32 or text[i - 1] | 32 != 109 or text[i + 1] | 32 != 105:
                continue
            long_s = text[i + 3] == 0xC5 and text[i + 4] == 0xBF
            after = i + 5 if long_s else i + 4
            if not long_s and text[i + 3] | 32 != 115 or after + 1 >= text.shape[0]:
                continue
            before = text[i - 5] | 32 == 108 and text[i - 4] | 32 == 111 and text[i - 3] | 32 == 114
            if before and text[i - 2] | 32 == 101 and text[i + 2] | 32 == 112:
                if text[after] | 32 == 117 and text[after + 1] | 32 == 109:
                    out[document] = 1.0
    return out


@inlined
def _is_terminal(data, at, end):
    """Whether the character ends a sentence: . ! ? " ' or the ellipsis, and their Chinese counterparts."""
    byte = data[at]
    if byte == 46 or byte == 33 or byte == 63 or byte == 34 or byte == 39:
        return True
    if byte < 0x80 or at + 2 >= end:
        return False
    second, third = data[at + 1], data[at + 2]
    if byte == 0xE2 and second == 0x80:  # U+2026 ellipsis, U+201D right quote
        return third == 0xA6 or third == 0x9D
    if byte == 0xE3 and second == 0x80:  # U+3002 full stop, U+300D corner bracket
        return third == 0x82 or third == 0x8D
    return byte == 0xEF and second == 0xBC and (third == 0x81 or third == 0x9F)  # full-width ! and ?


@compiled
def counts(data, offsets, out):
    """Fills out[d] (float64) with the counts named at the top of this file.

    DUPLICATE_LINES and _PARAGRAPHS are shares of their number, DUPLICATE_LINE_BYTES of their bytes.
    """
    tail, table = np.zeros(TAIL_BYTES, np.uint8), np.empty(1 << 12, np.uint64)
    for document in range(offsets.shape[0] - 1):
        row = out[document]
        row[:] = 0.0
        _count_characters(data, offsets[document], offsets[document + 1], tail, row)
        size = table_size(row[NEWLINES] + 2)  # of a table of lines, and of one of paragraphs
        if table.shape[0] < 2 * size:
            table = np.empty(2 * size, np.uint64)
        _count_lines(data, offsets[document], offsets[document + 1], table[:size], table[size : 2 * size], tail, row)
    tail[0] = 0  # it is in use up to here


@inlined
def _count_others(data, begin, at, end, row):
    """End of the non-ASCII characters from `at` on, which are counted; the document begins at `begin`."""
    kind = _kind(data, at, end)
    row[WORD_JOINS] += kind == 3 and at > begin and _is_word_byte(data[at - 1])
    while at < end and data[at] >= 0x80:
        byte, kind = data[at], _kind(data, at, end)
        row[CHARACTERS] += 1
        row[WORD_TAIL_BYTES] += (kind >= 2) * (min(_width(byte), end - at) - 1)
        row[HAN] += kind == 2
        row[LETTERS] += kind >= 2
        if kind == 0:
            second = data[at + 1] if at + 1 < end else np.uint8(0)
            third = data[at + 2] if at + 2 < end else np.uint8(0)
            if byte == 0xEF and second == 0xBF and third == 0xBD:
                row[REPLACEMENTS] += 1
            elif byte == 0xC2 and second < 0xA0:
                row[CONTROLS] += 1
            else:
                row[PUNCTUATION] += 1
                row[ELLIPSES] += byte == 0xE2 and second == 0x80 and third == 0xA6
                row[SENTENCES] += byte != 0xE2 and _is_terminal(data, at, end)
        at += _width(byte)
    row[WORD_JOINS] += kind == 3 and at < end and _is_word_byte(data[at])
    return at


@inlined
def _count_characters(data, begin, end, tail, row):
    letters, digits, newlines, white, controls, hashes, braces, known = 0, 0, 0, 0, 0, 0, 0, 0
    sentences, at = 0, begin
    while at < end:
        block = block_at(data, at, tail)
        size = min(trailing_zeros(between(block, 128, 255)), end - at)
        if size == 0:
            at = _count_others(data, begin, at, end, row)
            continue
        here = lowest(size)
        spaces = between(block, 9, 9) | between(block, 13, 13) | between(block, 32, 32)
        breaks = between(block, 10, 10)
        known += size
        letters += num_ones((between(block, 65, 90) | between(block, 97, 122)) & here)
        digits += num_ones(between(block, 48, 57) & here)
        newlines += num_ones(breaks & here)
        white += num_ones(spaces & here)
        controls += num_ones((between(block, 0, 31) | between(block, 127, 127)) & ~(spaces | breaks) & here)
        hashes += num_ones(between(block, 35, 35) & here)
        braces += num_ones(between(block, 123, 123) & here)
        stops = between(block, 46, 46) & here
        marks = stops | (between(block, 33, 33) | between(block, 63, 63)) & here
        # A sentence ends where its mark is followed by white space or a quotation mark, or by nothing.
        follows = between(block + 1, 9, 10) | between(block + 1, 32, 32)
        follows |= between(block + 1, 34, 34) | between(block + 1, 39, 39)
        if end - at <= 64:
            follows |= np.uint64(1) << np.uint64(end - at - 1)
        sentences += num_ones(marks & follows)
        stops &= between(block + 1, 46, 46)
        while stops != 0:
            stop = at + trailing_zeros(stops)
            stops &= stops - np.uint64(1)
            if stop + 2 < end and data[stop + 2] == 46:
                row[ELLIPSES] += stop == begin or data[stop - 1] != 46
        at += size
    row[CHARACTERS] += known
    row[LETTERS] += letters
    row[CONTROLS] += controls
    row[SENTENCES] += sentences
    row[DIGITS], row[NEWLINES], row[HASHES], row[BRACES] = digits, newlines, hashes, braces
    row[PUNCTUATION] += known - letters - digits - newlines - white - controls


@inlined
def _line_hash(address, size):
    """Hash of so many bytes, one at least. Up to eight bytes that differ have different hashes; of a longer line,
    sixteen bytes are one product. Eight bytes must be readable.
    """
    if size <= 8:
        return mixed(eight_at(address) & lowest(8 * size))
    value, end = np.uint64(size) * np.uint64(MIX_AGAIN), address + size
    while address + 16 < end:
        value = folded_product(value ^ eight_at(address), eight_at(address + 8) ^ np.uint64(MIX))
        address += 16
    first = eight_at(end - min(size, 16))
    return mixed(folded_product(value ^ first, eight_at(end - 8) ^ np.uint64(MIX)))


@inlined
def _is_bullet(data, start, stop):
    """Whether the line begins with a hyphen or a round dot, U+2022."""
    first = data[start]
    dot = first == 0xE2 and stop - start >= 3 and data[start + 1] == 0x80 and data[start + 2] == 0xA2
    return first == 45 or dot


@inlined
def _ends_in_ellipsis(data, start, stop):
    """Whether the line ends in three full stops or U+2026."""
    if stop - start < 3:
        return False
    one, two, three = data[stop - 3], data[stop - 2], data[stop - 1]
    return (one == 46 and two == 46 and three == 46) or (one == 0xE2 and two == 0x80 and three == 0xA6)


@inlined
def _count_lines(data, at, end, of_lines, of_paragraphs, tail, row):
    of_lines[:], of_paragraphs[:] = 0, 0
    lines, blank, short, bullets, terminal, ellipses, longest = 0, 0, 0, 0, 0, 0, 0
    paragraphs, repeated_paragraphs, repeated_lines, repeated_bytes, line_bytes = 0, 0, 0, 0, 0
    paragraph = np.uint64(0)
    begin, start, characters = at, NOWHERE, 0  # of the line: its first byte, its first shown one, what it has so far
    while at < end:
        block, known = block_at(data, at, tail), min(end - at, 64)
        breaks, shown = between(block, 10, 10) & lowest(known), between(block, 33, 255)
        firsts, rest = ~between(block, 0x80, 0xBF), lowest(known)  # of characters; of bytes not seen yet
        for _ in range(num_ones(breaks) + 1):
            stop = min(trailing_zeros(breaks), known)
            inside = rest & lowest(stop)
            characters += num_ones(firsts & inside)
            if start == NOWHERE and shown & inside != 0:
                start = at + trailing_zeros(shown & inside)
            rest &= ~lowest(min(stop + 1, 64))
            if breaks == 0 and (at + known < end or begin >= end):
                continue  # the line goes on, or there is none
            breaks &= breaks - np.uint64(1)
            stop += at
            longest = max(longest, characters)
            if start != NOWHERE:
                while data[stop - 1] <= 32:
                    stop -= 1
                last = stop - 1
                while last > start and (data[last] & 0xC0) == 0x80:
                    last -= 1
                place = block_at(data, start, tail) if stop - start <= 8 else address_of(data, start)
                value = _line_hash(place, stop - start)
                seen = _enter(of_lines, value)
                repeated_lines += seen
                repeated_bytes += seen * (stop - start)
                line_bytes += stop - start
                paragraph = _combine(paragraph, value)
                lines += 1
                short += characters <= 30
                bullets += _is_bullet(data, start, stop)
                terminal += _is_terminal(data, last, stop)
                ellipses += _ends_in_ellipsis(data, start, stop)
            else:
                blank += 1
            begin = at + known - num_ones(rest)
            if paragraph != 0 and (start == NOWHERE or begin >= end):
                paragraphs += 1
                repeated_paragraphs += _enter(of_paragraphs, paragraph)
                paragraph = np.uint64(0)
            start, characters = NOWHERE, 0
        at += known
    row[LINES], row[BLANK_LINES], row[SHORT_LINES], row[BULLET_LINES] = lines, blank, short, bullets
    row[TERMINAL_LINES], row[ELLIPSIS_LINES], row[LONGEST_LINE] = terminal, ellipses, longest
    if lines > 0:
        row[DUPLICATE_LINES] = repeated_lines / lines
        row[DUPLICATE_LINE_BYTES] = repeated_bytes / line_bytes
        row[DUPLICATE_PARAGRAPHS] = repeated_paragraphs / paragraphs
