"""Compiled loops over lines of JSON: the text of each, out of its escapes. As in `kernels.py`, 0 lines are accepted."""

import numpy as np

from data_pipelines.blocks import (
    TAIL_BYTES,
    between,
    block_at,
    compiled,
    inlined,
    lowest,
    put_piece,
    put_point,
    trailing_zeros,
)

QUOTE, BACKSLASH, COLON, NEWLINE = 34, 92, 58, 10
BROKEN = -1


def _escaped_bytes():
    """What a letter behind a backslash stands for, if that is one byte; else 0."""
    table = np.zeros(256, np.uint8)
    for letter, byte in zip(b'nrtbf"\\/', b'\n\r\t\b\f"\\/'):
        table[letter] = byte
    return table


ESCAPED = _escaped_bytes()


@inlined
def _stops(block):
    """Which of 64 bytes end a run of what a string holds as it is: quotes, backslashes, control characters."""
    return between(block, QUOTE, QUOTE) | between(block, BACKSLASH, BACKSLASH) | between(block, 0, 31)


@inlined
def _after_white(data, at, end):
    """The first byte of the line that is no white space, or its end."""
    while at < end and (data[at] == 32 or data[at] == 9 or data[at] == 13):
        at += 1
    return at


@inlined
def _end_of_string(data, at, end, tail):
    """(place of the quote that ends the string which goes on at `at`, or BROKEN; whether there is an escape in it)."""
    escaped = False
    while at < end:
        stops = _stops(block_at(data, at, tail))
        if stops == 0:
            at += 64
            continue
        at += trailing_zeros(stops)
        if at < end and data[at] == QUOTE:
            return at, escaped
        if at + 1 >= end or data[at] != BACKSLASH or data[at + 1] == NEWLINE:
            return BROKEN, escaped
        escaped = True
        at += 2
    return BROKEN, escaped


@inlined
def _hex(data, at, end):
    """The number that four hexadecimal digits are, or BROKEN."""
    if at + 4 > end:
        return BROKEN
    value = 0
    for i in range(at, at + 4):
        byte = data[i]
        if 48 <= byte <= 57:
            digit = byte - 48
        elif 65 <= (byte & 0xDF) <= 70:
            digit = (byte & 0xDF) - 55
        else:
            return BROKEN
        value = 16 * value + digit
    return value


@inlined
def _put_escape(data, at, end, out, filled):
    """(end of the escape whose backslash is at `at`, or BROKEN; number of bytes filled in)."""
    if at + 1 >= end:
        return BROKEN, filled
    code = data[at + 1]
    if ESCAPED[code] != 0:
        out[filled] = ESCAPED[code]
        return at + 2, filled + 1
    if code != 117:
        return BROKEN, filled
    point = _hex(data, at + 2, end)
    at += 6
    if 0xD800 <= point < 0xE000:
        if point >= 0xDC00 or at + 1 >= end or data[at] != BACKSLASH or data[at + 1] != 117:
            return BROKEN, filled
        low = _hex(data, at + 2, end)
        if low < 0xDC00 or low >= 0xE000:
            return BROKEN, filled
        point = 0x10000 + ((point - 0xD800) << 10) + low - 0xDC00
        at += 6
    if point < 0:
        return BROKEN, filled
    return at, put_point(out, filled, point)


@inlined
def _put_string(data, at, end, tail, out, filled):
    """(place of the quote that ends the string which goes on at `at`, or BROKEN; number of bytes filled in)."""
    while at < end:
        block, known = block_at(data, at, tail), 0
        stops = _stops(block)
        while known < 64:  # of the block's bytes
            stop = trailing_zeros(stops)
            put_piece(out, filled, block + known, stop - known)
            filled += stop - known
            known = stop
            if stop == 64:
                break
            place = at + stop
            if place < end and data[place] == QUOTE:
                return place, filled
            if place >= end or data[place] != BACKSLASH:
                return BROKEN, filled
            place, filled = _put_escape(data, place, end, out, filled)
            if place < 0:
                return BROKEN, filled
            known = place - at
            stops &= ~lowest(min(known, 64))
        at += known
    return BROKEN, filled


@inlined
def _is_text_field(data, start, stop):
    """Whether the name is "text" or "content"."""
    if stop - start == 4:
        return data[start] == 116 and data[start + 1] == 101 and data[start + 2] == 120 and data[start + 3] == 116
    if stop - start != 7 or data[start] != 99 or data[start + 1] != 111 or data[start + 2] != 110:
        return False
    rest = data[start + 3] == 116 and data[start + 4] == 101 and data[start + 5] == 110
    return rest and data[start + 6] == 116


@inlined
def _put_text(data, at, end, tail, out, filled):
    """(start and stop of the text, end of the line, number of bytes filled in): of the line that begins at `at`; start
    is BROKEN where its text is not settled here. No string goes on in the next line: a newline breaks it.
    """
    start, stop, depth = BROKEN, BROKEN, 0
    while at < end and data[at] != NEWLINE:
        byte = data[at]
        at += 1
        if byte == 123 or byte == 91:
            depth += 1
        elif byte == 125 or byte == 93:
            depth -= 1
        elif byte == QUOTE:
            first = at
            last, escaped = _end_of_string(data, at, end, tail)
            if last < 0:
                return BROKEN, stop, at, filled
            at = _after_white(data, last + 1, end)
            if depth != 1 or at >= end or data[at] != COLON:
                continue
            if escaped:
                return BROKEN, stop, at, filled
            if _is_text_field(data, first, last):
                at = _after_white(data, at + 1, end)
                if start >= 0 or at >= end or data[at] != QUOTE:
                    return BROKEN, stop, at, filled
                start = at + 1
                stop, filled = _put_string(data, start, end, tail, out, filled)
                if stop < 0:
                    return BROKEN, stop, at, filled
                at = stop + 1
    return start, stop, min(at + 1, end), filled


@compiled
def put_texts(data, out, out_offsets, spans):
    """(number of texts, number of lines, where the next one begins): of the first lines, until there is a text for each
    of `spans`. A text is the one JSON string that is the field "text" or "content" of a line's object; where one cannot
    be read, their number is BROKEN. Blank lines have none.

    Fills `out` with their UTF-8 end to end, out_offsets[i] with where each starts, spans[i] with the number of its
    line, the first byte of that, the start and stop of the string, its quotes left out, and the end of the line. Of
    lines that are no JSON otherwise nothing is said, nor are bytes of the text looked at that are no UTF-8. `out` must
    hold all bytes and 64 more.
    """
    tail = np.zeros(TAIL_BYTES, np.uint8)
    at, end = 0, data.shape[0]
    found, number, filled = 0, 0, 0
    out_offsets[0] = 0
    while at < end and found < spans.shape[0]:
        begin = _after_white(data, at, end)
        if begin >= end or data[begin] == NEWLINE:
            at = min(begin + 1, end)
        else:
            start, stop, line_end, filled = _put_text(data, begin, end, tail, out, filled)
            if start < 0:
                return BROKEN, number, at
            spans[found, 0], spans[found, 1], spans[found, 2], spans[found, 3] = number, at, start, stop
            spans[found, 4] = at = line_end
            found += 1
            out_offsets[found] = filled
        number += 1
    tail[0] = 0  # it is in use up to here
    return found, number, at
