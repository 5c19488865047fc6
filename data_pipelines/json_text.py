"""The long text of a JSON row, read by a compiled loop; the rest of the row by the standard library.

`parse` gives what `json.loads` gives. A row whose text the loop does not settle (a key with an escape, a lone
surrogate, broken UTF-8, bad JSON) is left to `json.loads` as a whole, so that values and messages are its own.
"""

import json
from typing import Any

import numpy as np

from data_pipelines.kernels import HIGHS, ONES, compiled, load64, store64

LEAST_BYTES = 2048
"""Shorter rows are faster without the loop."""
FIELDS = tuple(np.frombuffer(f'"{name}"'.encode(), np.uint8) for name in ("text", "content"))
QUOTES, BACKSLASHES = ONES * np.uint64(34), ONES * np.uint64(92)


def parse(raw: bytes) -> Any:
    """Returns the value of one line of JSON. Raises what `json.loads` raises."""
    if len(raw) < LEAST_BYTES:
        return json.loads(raw)
    data, out = np.frombuffer(raw, np.uint8), np.empty(len(raw), np.uint8)
    for field in FIELDS:
        start, stop, size = find_text(data, field, out)
        if start < 0:
            continue
        try:
            value = json.loads(b"".join((raw[:start], b'""', raw[stop:])))
            text = str(memoryview(out)[:size], "utf-8")
        except (ValueError, RecursionError):
            break
        value[field[1:-1].tobytes().decode()] = text
        return value
    return json.loads(raw)


@compiled
def find_text(data, field, out):
    """(start, stop, size): the string data[start:stop], quotes included, that the object's key `field` has, and the
    bytes of it without escapes, which are out[:size]. start is -1 where the row is none, has no such string, has two of
    them, or is not settled here. `out` must hold as many bytes as `data`.
    """
    start, stop, size, depth, at, end = -1, -1, 0, 0, 0, data.shape[0]
    is_key = False
    while at < end:
        byte = data[at]
        if byte == 34:
            close = at + 1
            while close < end and data[close] != 34:
                if data[close] == 92:
                    if is_key:
                        return -1, 0, 0
                    close += 1
                close += 1
            close += 1
            if close > end:
                return -1, 0, 0
            if is_key and _equal(data, at, close, field):
                value = _skip_space(data, close)
                if value >= end or data[value] != 58:
                    return -1, 0, 0
                value = _skip_space(data, value + 1)
                if value < end and data[value] == 34:
                    if start >= 0:
                        return -1, 0, 0
                    start = value
                    stop, size = _unescape(data, value + 1, out)
                    if stop < 0:
                        return -1, 0, 0
                    close = stop
                else:
                    return -1, 0, 0
            is_key = False
            at = close
            continue
        if byte == 123 or byte == 91:
            depth += 1
            if depth == 1 and byte == 91:
                return -1, 0, 0
            is_key = depth == 1
        elif byte == 125 or byte == 93:
            depth -= 1
            is_key = False
        elif byte == 44:
            is_key = depth == 1
        elif byte == 0:  # UTF-16 or UTF-32
            return -1, 0, 0
        at += 1
    return start, stop, size


@compiled
def _equal(data, start, stop, wanted):
    if stop - start != wanted.shape[0]:
        return False
    for i in range(wanted.shape[0]):
        if data[start + i] != wanted[i]:
            return False
    return True


@compiled
def _skip_space(data, at):
    while at < data.shape[0] and (data[at] == 32 or data[at] == 9):
        at += 1
    return at


@compiled
def _unescape(data, at, out):
    """(place behind the closing quote, bytes written) of the string whose first byte stands at `at`; (-1, 0) where it
    does not end, or holds a control character, an unknown escape or a lone surrogate.
    """
    end, filled = data.shape[0], 0
    while at < end:
        if at + 8 <= end:
            word = load64(data, at)
            quote, backslash = word ^ QUOTES, word ^ BACKSLASHES
            special = (
                ((quote - ONES) & ~quote) | ((backslash - ONES) & ~backslash) | ((word - ONES * np.uint64(32)) & ~word)
            ) & HIGHS
            if special == 0:
                store64(out, filled, word)
                at += 8
                filled += 8
                continue
        byte = data[at]
        if byte == 34:
            return at + 1, filled
        if byte < 32:
            return -1, 0
        if byte != 92:
            out[filled] = byte
            filled += 1
            at += 1
            continue
        if at + 1 >= end:
            return -1, 0
        mark = data[at + 1]
        at += 2
        if mark == 110:
            out[filled] = 10
        elif mark == 34 or mark == 92 or mark == 47:
            out[filled] = mark
        elif mark == 116:
            out[filled] = 9
        elif mark == 114:
            out[filled] = 13
        elif mark == 98:
            out[filled] = 8
        elif mark == 102:
            out[filled] = 12
        elif mark == 117:
            point = _four_digits(data, at)
            at += 4
            if 0xD800 <= point < 0xDC00 and at + 1 < end and data[at] == 92 and data[at + 1] == 117:
                low = _four_digits(data, at + 2)
                at += 6
                if low < 0xDC00 or low > 0xDFFF:
                    return -1, 0
                point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00)
            if point < 0 or 0xD800 <= point < 0xE000:
                return -1, 0
            filled = _put(out, filled, point)
            continue
        else:
            return -1, 0
        filled += 1
    return -1, 0


@compiled
def _four_digits(data, at):
    """The number that four hexadecimal digits write; -1 where there are none."""
    if at + 4 > data.shape[0]:
        return -1
    value = 0
    for i in range(at, at + 4):
        byte = np.int64(data[i])
        if 48 <= byte <= 57:
            value = value * 16 + byte - 48
        elif 97 <= byte | 32 <= 102:
            value = value * 16 + (byte | 32) - 87
        else:
            return -1
    return value


@compiled
def _put(out, at, point):
    """Writes a code point as UTF-8; gives the place behind it."""
    if point < 0x80:
        out[at] = point
        return at + 1
    if point < 0x800:
        out[at] = 0xC0 | point >> 6
    elif point < 0x10000:
        out[at] = 0xE0 | point >> 12
        at += 1
        out[at] = 0x80 | point >> 6 & 0x3F
    else:
        out[at] = 0xF0 | point >> 18
        out[at + 1] = 0x80 | point >> 12 & 0x3F
        at += 2
        out[at] = 0x80 | point >> 6 & 0x3F
    out[at + 1] = 0x80 | point & 0x3F
    return at + 2
