"""Compiled forms of the edits that `rules.py` and `dedup.py` define by regular expressions, for most texts.

Each writes the edited bytes of all documents end to end and gives up a document (hard[d] = True, nothing written) where
it holds a character that this file does not settle: one that NFC may change or join to its neighbours, a cased letter
beyond Latin-1, rare white space. The definitions then edit that document; a test compares both on every code point.
"""

import numpy as np

from data_pipelines.blocks import (
    HIGHS,
    ONES,
    TAIL_BYTES,
    between,
    block_at,
    compiled,
    folded_product,
    inlined,
    load64,
    lowest,
    put_piece,
    put_point,
    store64,
    trailing_zeros,
)
from data_pipelines.kernels import MIX, MIX_AGAIN, mixed

COPY, DROP, HARD = 0, 1, 2


@inlined
def _settled(data, at, end):
    """What becomes of the non-ASCII character at `at`: COPY (NFC leaves it, alone and beside others), DROP, or HARD."""
    byte = data[at]
    second = data[at + 1] if at + 1 < end else np.uint8(0)
    third = data[at + 2] if at + 2 < end else np.uint8(0)
    if 0xE4 <= byte <= 0xE9 or 0xC3 <= byte <= 0xCB or byte == 0xD0 or byte == 0xD1 or byte == 0xCF:
        return COPY
    if byte == 0xC2:  # controls but U+0085, and the soft hyphen
        return DROP if (second < 0xA0 and second != 0x85) or second == 0xAD else COPY
    if byte == 0xCE:
        return HARD if second == 0x87 else COPY
    if byte == 0xD2:  # Cyrillic beyond Russian, Armenian, Hebrew and Arabic: letters and digits, without marks
        return COPY if second >= 0x8A else HARD
    if 0xD3 <= byte <= 0xD5 or byte == 0xDA:
        return COPY
    if byte == 0xD7:
        return COPY if 0x90 <= second <= 0xAA else HARD
    if byte == 0xD8:
        return COPY if second >= 0xA0 else HARD
    if byte == 0xD9:
        return COPY if second <= 0x8A or 0xA0 <= second <= 0xA9 or second >= 0xB1 else HARD
    if byte == 0xDB:
        return COPY if second <= 0x95 else HARD
    if byte == 0xE2:
        if second == 0x80:
            if third <= 0x81:
                return HARD
            return DROP if 0x8B <= third <= 0x8F or 0xAA <= third <= 0xAE else COPY
        if second == 0x81:
            return DROP if 0xA0 <= third <= 0xA4 or 0xA6 <= third <= 0xA9 else COPY
        if second == 0x84:  # letter-like: ohm, kelvin and angstrom are other letters
            return HARD if third == 0xA6 or third == 0xAA or third == 0xAB else COPY
        if second == 0x82 or 0x85 <= second <= 0x8B or 0x8D <= second <= 0xAA:
            return COPY
        return HARD if second != 0x8C or third == 0xA9 or third == 0xAA else COPY
    if byte == 0xE3:
        if (second == 0x80 and 0xAA <= third <= 0xAF) or (second == 0x82 and (third == 0x99 or third == 0x9A)):
            return HARD
        return COPY
    if 0xEB <= byte <= 0xEC or (byte == 0xEA and second >= 0xB0) or (byte == 0xED and second < 0x9E):
        return COPY
    if byte == 0xEF:
        if second == 0xBB and third == 0xBF:
            return DROP
        selects = second == 0xB8 and third < 0x90  # variation selectors, which follow emoji
        return COPY if second >= 0xBC or second < 0xA4 or selects else HARD
    return COPY if byte == 0xF0 and second == 0x9F else HARD


@inlined
def _char_bytes(byte):
    return 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4


@inlined
def _without_trailing(out, start, stop):
    """End of out[start:stop] without spaces, tabs, U+00A0 and U+3000 at its end."""
    while stop > start:
        last = out[stop - 1]
        if last == 32 or last == 9:
            stop -= 1
        elif last == 0xA0 and stop - start >= 2 and out[stop - 2] == 0xC2:
            stop -= 2
        elif last == 0x80 and stop - start >= 3 and out[stop - 2] == 0x80 and out[stop - 3] == 0xE3:
            stop -= 3
        else:
            break
    return stop


@compiled
def normalise(data, offsets, out, out_offsets, hard):
    """`rules.normalise_text`; `out` must hold all bytes, one more per document, and 64."""
    tail = np.zeros(TAIL_BYTES, np.uint8)
    filled, block_start, block, stops = np.int64(0), np.int64(0), np.int64(0), np.uint64(0)
    out_offsets[0] = 0
    for document in range(offsets.shape[0] - 1):
        at, end = offsets[document], offsets[document + 1]
        first = line = filled
        newlines = 0
        hard[document] = False
        block_start = at - 64
        while at < end:
            if at >= block_start + 64:
                block, block_start = block_at(data, at, tail), at
                stops = between(block, 0, 8) | between(block, 10, 31) | between(block, 127, 255)
            known = at - block_start
            size = min(trailing_zeros(stops & ~lowest(known)) - known, end - at)
            put_piece(out, filled, block + known, size)
            filled += size
            at += size
            if at >= end or at >= block_start + 64:
                continue
            byte = data[at]
            if byte >= 0x80:
                what = _settled(data, at, end)
                if what == HARD:
                    hard[document] = True
                    break
                size = _char_bytes(byte)
                if what == COPY:
                    for i in range(at, at + size):
                        out[filled] = data[i]
                        filled += 1
                at += size
                continue
            at += 1
            if byte >= 32 and byte != 127 or byte == 9:
                out[filled] = byte
                filled += 1
            elif byte == 10 or byte == 13:
                if byte == 13 and at < end and data[at] == 10:
                    at += 1
                filled = _without_trailing(out, line, filled)
                newlines = newlines + 1 if filled == line else 1
                # None at the start of the text, and at most three running.
                if filled > first and newlines <= 3:
                    out[filled] = 10
                    filled += 1
                line = filled
        if hard[document]:
            filled = first
        else:
            filled = _without_trailing(out, line, filled)
            while filled > first and out[filled - 1] == 10:
                filled -= 1
            if filled > first:
                out[filled] = 10
                filled += 1
        out_offsets[document + 1] = filled
    tail[0] = 0  # it is in use up to here


@inlined
def _begins(data, at, end, text):
    """Whether data[at:end] begins with the text, in any case; the text is in lower case."""
    if end - at < text.shape[0]:
        return False
    for i in range(text.shape[0]):
        byte = data[at + i]
        if 65 <= byte <= 90:
            byte += np.uint8(32)
        if byte != text[i]:
            return False
    return True


@inlined
def _citation_bytes(data, at, end):
    """Bytes of the citation mark [12], [edit], [citation needed] at `at`; 0: none, -1: cannot be told."""
    i = at + 1
    while i < end and 48 <= data[i] <= 57:
        i += 1
    if i > at + 1 and i < end and data[i] == 93:
        return i + 1 - at
    if i < end and data[i] >= 0x80:  # a digit of another script?
        return -1
    if end - at >= 6 and data[at + 1] == 101 and data[at + 2] == 100 and data[at + 3] == 105 and data[at + 4] == 116:
        return 6 if data[at + 5] == 93 else 0
    mark = (99, 105, 116, 97, 116, 105, 111, 110, 32, 110, 101, 101, 100, 101, 100, 93)
    if end - at <= len(mark):
        return 0
    for k in range(len(mark)):
        if data[at + 1 + k] != mark[k]:
            return 0
    return len(mark) + 1


@inlined
def _may_change(text):
    """Whether `clean_lines` may change this text: it holds what every phrase holds (`rules.POLICY_PHRASES`), what may
    be a citation mark, or a letter that is another one in lower case. Written so that the compiler can take many bytes
    at a time.
    """
    found = False
    for i in range(text.shape[0] - 3):
        a, b, c, d = text[i] | 32, text[i + 1] | 32, text[i + 2] | 32, text[i + 3] | 32
        cook = (a == 99) & (b == 111) & (c == 111) & (d == 107)
        java = (a == 106) & (b == 97) & (c == 118) & (d == 97)
        policy = (a == 112) & (b == 111) & (c == 108) & (d == 105)
        of_use = (a == 32) & (b == 117) & (c == 115) & (d == 101)
        dotless = (a == 0xE4) & ((b == 0xB0) | (b == 0xB1)) & ((c == 112) | (c == 118) | (c == 99) | (c == 101))
        found |= cook | java | policy | of_use | dotless
    for i in range(text.shape[0] - 1):
        one, other = text[i], text[i + 1]
        mark = (one == 91) & (((other >= 48) & (other <= 57)) | (other == 101) | (other == 99) | (other >= 0x80))
        cased = ((one == 0xC5) & (other == 0xBF)) | ((one == 0x84) & (other == 0xAA))
        found |= mark | cased
    return found


@inlined
def _is_another_case(data, at, end):
    """Whether the character is a long s, the Kelvin sign, or an i with or without its dot before what follows i in the
    phrases: a regular expression that ignores case takes them for s, k and i.
    """
    byte = data[at]
    second = data[at + 1] if at + 1 < end else np.uint8(0)
    third = data[at + 2] if at + 2 < end else np.uint8(0)
    follows = third | 32
    if byte == 0xC4 and (second == 0xB0 or second == 0xB1):
        return follows == 112 or follows == 118 or follows == 99 or follows == 101
    return byte == 0xC5 and second == 0xBF or byte == 0xE2 and second == 0x84 and third == 0xAA


@compiled
def clean_lines(data, offsets, phrases, starts, out, out_offsets, hard):
    """`rules.clean_lines`: without lines that hold a phrase (in lower case, end to end, cut at `starts`), and without
    citation marks. `out` must hold all bytes.
    """
    firsts = np.zeros(256, np.bool_)
    for p in range(starts.shape[0] - 1):
        firsts[phrases[starts[p]]] = True
        firsts[phrases[starts[p]] - 32] = True
    filled = np.int64(0)
    out_offsets[0] = 0
    for document in range(offsets.shape[0] - 1):
        at, end = offsets[document], offsets[document + 1]
        first = filled
        is_first_line = True
        hard[document] = False
        if not _may_change(data[at:end]):
            out[filled : filled + end - at] = data[at:end]
            filled += end - at
            out_offsets[document + 1] = filled
            continue
        while at <= end and not hard[document]:
            line = filled
            keeps = True
            if not is_first_line:
                out[filled] = 10
                filled += 1
            while at < end and data[at] != 10:
                byte = data[at]
                if firsts[byte]:
                    for p in range(starts.shape[0] - 1):
                        if _begins(data, at, end, phrases[starts[p] : starts[p + 1]]):
                            keeps = False
                    if not keeps:
                        break
                elif byte == 91:
                    size = _citation_bytes(data, at, end)
                    if size < 0:
                        hard[document] = True
                        break
                    at += size
                    if size:
                        continue
                elif byte >= 0xC4 and _is_another_case(data, at, end):
                    hard[document] = True
                    break
                out[filled] = byte
                filled += 1
                at += 1
            if keeps:
                is_first_line = False
            else:
                filled = line
                while at < end and data[at] != 10:
                    at += 1
            at += 1
        if hard[document]:
            filled = first
        out_offsets[document + 1] = filled


def _plain_bytes():
    """ASCII byte -> what it is in plain text: lower case, white space a space."""
    table = np.arange(128).astype(np.uint8)
    table[65:91] += np.uint8(32)
    table[[9, 10, 11, 12, 13, 28, 29, 30, 31]] = 32
    return table


PLAIN = _plain_bytes()


@compiled
def plain(data, offsets, points, out, out_offsets, hard):
    """The text in lower case, each run of white space one space, none at the ends; `out` must hold all bytes.

    points: of every code point below 0x20000 what it becomes; 0 where the text has to be left to the definition.
    """
    filled = np.int64(0)
    out_offsets[0] = 0
    for document in range(offsets.shape[0] - 1):
        at, end = offsets[document], offsets[document + 1]
        first = filled
        space = True
        hard[document] = False
        while at < end:
            byte = data[at]
            if byte < 0x80:
                byte = PLAIN[byte]
                out[filled] = byte  # written over where it is the second space of a run
                is_space = byte == 32
                filled += not (space and is_space)
                space = is_space
                at += 1
                continue
            size = _char_bytes(byte)
            if byte < 0xF0 or byte == 0xF0 and data[at + 1] < 0xA0:
                point = _point(data, at, size)
                becomes = points[point]
                if becomes == 0:
                    hard[document] = True
                    break
                if becomes != point:
                    if becomes != 32:
                        filled = put_point(out, filled, becomes)
                        space = False
                    elif not space:
                        out[filled] = 32
                        filled += 1
                        space = True
                    at += size
                    continue
            for i in range(at, at + size):
                out[filled] = data[i]
                filled += 1
            space = False
            at += size
        if hard[document]:
            filled = first
        elif space and filled > first:
            filled -= 1
        out_offsets[document + 1] = filled


@inlined
def _point(data, at, size):
    """The code point of the character of two bytes or more at `at`."""
    point = np.int64(data[at]) & (0x7F >> size)
    for i in range(at + 1, at + size):
        point = point << 6 | np.int64(data[i]) & 0x3F
    return point


@compiled
def may_be_blank(data, offsets, out):
    """Fills out[d] with whether the first 64 bytes of the text hold no character of which it is plain that it is no
    white space.
    """
    for document in range(offsets.shape[0] - 1):
        begin = offsets[document]
        blank = True
        for i in range(begin, min(begin + 64, offsets[document + 1])):
            byte = data[i]
            if 32 < byte < 127 or 0xC2 < byte < 0xE1 or byte > 0xE3:
                blank = False
                break
        out[document] = blank


@inlined
def _put_collapsed(data, at, end, only_ascii, tail, out):
    """(number of bytes filled in, whether all of the text is ASCII): the text without white space at its ends, and with
    one byte of each run of it. only_ascii: it is given up at the first other character.
    """
    filled, after_white, highs = 0, np.uint64(1), np.uint64(0)
    while at < end:
        block, known = block_at(data, at, tail), lowest(min(end - at, 64))
        highs |= between(block, 128, 255) & known
        if only_ascii and highs != 0:
            return 0, False
        white = between(block, 9, 13) | between(block, 28, 32)
        stays = known & ~(white & (white << np.uint64(1) | after_white))
        after_white = white >> np.uint64(63)
        while stays != 0:
            first = trailing_zeros(stays)
            size = trailing_zeros(~(stays >> np.uint64(first)))
            put_piece(out, filled, block + first, size)
            filled += size
            stays &= ~lowest(first + size)
        at += 64
    filled -= filled > 0 and (9 <= out[filled - 1] <= 13 or 28 <= out[filled - 1] <= 32)
    return filled, highs == 0


@inlined
def _among(eight, first, last):
    """The highest bit of each of eight bytes that is ASCII and lies from `first` to `last`."""
    low = eight & ~HIGHS
    return ((low + ONES * np.uint64(128 - first)) ^ (low + ONES * np.uint64(127 - last))) & ~eight & HIGHS


@compiled
def plain_keys(data, offsets, only_ascii, plain, out, is_ascii):
    """Fills out[d], two numbers, with a key of 128 bits of the text, white space and the case of its letters aside, and
    is_ascii[d]. Where that is False, other characters are taken as they are, which is right if the text is plain
    already; with only_ascii there is no key then.

    `plain` is scratch space: the bytes of any document and 64. The key is no cryptographic one.
    """
    tail = np.zeros(TAIL_BYTES, np.uint8)
    for document in range(offsets.shape[0] - 1):
        size, is_ascii[document] = _put_collapsed(
            data, offsets[document], offsets[document + 1], only_ascii, tail, plain
        )
        plain[size : size + 16] = 0
        for at in range(0, size, 8):  # a loop of its own, so that the compiler takes several steps together
            eight = load64(plain, at)
            white = (_among(eight, 9, 13) | _among(eight, 28, 31)) >> np.uint64(7)
            eight = eight & ~(white * np.uint64(255)) | white << np.uint64(5)
            store64(plain, at, eight | _among(eight, 65, 90) >> np.uint64(2))
        one, other = np.uint64(size), ~np.uint64(size)
        for at in range(0, size, 16):
            first, second = load64(plain, at), load64(plain, at + 8)
            one = folded_product(one ^ first, second ^ np.uint64(MIX))
            other = folded_product(other ^ second, first ^ np.uint64(MIX_AGAIN))
        out[document, 0], out[document, 1] = mixed(one), mixed(other)
    tail[0] = 0  # it is in use up to here


@compiled
def are_ascii(data, offsets, out):
    """Fills out[d] with whether there is no byte above 127 in the text."""
    tail = np.zeros(TAIL_BYTES, np.uint8)
    for document in range(offsets.shape[0] - 1):
        at, end = offsets[document], offsets[document + 1]
        highs = np.uint64(0)
        while at < end and highs == 0:
            highs = between(block_at(data, at, tail), 128, 255) & lowest(min(end - at, 64))
            at += 64
        out[document] = highs == 0
    tail[0] = 0  # it is in use up to here
