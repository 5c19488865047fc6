"""The language that a text is written in, without a network: CLD2, whose tables are compiled into pycld2.

The stage `identify_languages` enters "en", "zh", "de" ... where no language is known yet (ISO 639 codes). At most
1,536 bytes of a text are looked at, in six pieces from its beginning to its end (`SAMPLE`). Of an ASCII text four
pieces of 128 bytes come first (`FIRST_LOOK`), and suffice where they are in one language for sure: a passage in
another one that lies between them is not seen. Code is left alone; its language is the programming language.

A text in several languages has the one with the largest share. Where a second one has at least MIXED_SHARE, the text is
mixed, and meta has `languages` with all shares (of the bytes of letters in the sample, so that Chinese, with three
bytes to a character, and English weigh about as much as they say). A text of fewer than MIN_BYTES bytes of letters, or
one that CLD2 is not sure of, stays "und". Simplified and traditional Chinese are both "zh".
"""

import functools
import json
import re
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.code_languages import UNKNOWN
from data_pipelines.document import SCHEMA, Outcome, text_buffer

MIN_BYTES = 24
MIXED_SHARE = 0.1
CODES = {"zh-Hant": "zh", "iw": "he", "jw": "jv", "in": "id"}
"""Of CLD2's codes, those that are written in another way today."""
CONTROLS = bytes(byte for byte in (*range(32), 127) if chr(byte) not in "\t\n\r")
# What CLD2 takes for broken UTF-8 beyond these: C1 controls and code points that are no characters.
NOT_INTERCHANGED = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\ufdd0-\ufdef"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
    + "]"
)


class Pieces(NamedTuple):
    """A sample of a text: its bytes, and in how many pieces they are taken."""

    num_bytes: int
    number: int


SAMPLE, FIRST_LOOK = Pieces(1536, 6), Pieces(512, 4)


class Languages(NamedTuple):
    """language: the one with the largest share, or "und". shares: language -> share, of all that were found."""

    language: str
    shares: Mapping[str, float]

    @property
    def is_mixed(self) -> bool:
        return len(self.shares) > 1 and sorted(self.shares.values())[-2] >= MIXED_SHARE


NOT_KNOWN = Languages(UNKNOWN, types.MappingProxyType({}))


def identify_languages(batch: pa.RecordBatch) -> Outcome:
    """The stage that enters the language of every row that has none and is not code; nothing is dropped."""
    languages, domains = batch.column("language").to_pylist(), batch.column("domain").to_pylist()
    from data_pipelines import editing

    data, offsets = text_buffer(batch)
    content, bounds, mixed = memoryview(data), offsets.tolist(), {}
    is_ascii_D = np.empty(batch.num_rows, bool)
    editing.are_ascii(data, offsets, is_ascii_D)
    is_ascii = is_ascii_D.tolist()
    for row, (language, domain) in enumerate(zip(languages, domains, strict=True)):
        if language == UNKNOWN and domain != "code":
            found = _found(content[bounds[row] : bounds[row + 1]], is_ascii[row])
            languages[row] = found.language
            if found.is_mixed:
                mixed[row] = found.shares
    batch = _with_column(batch, "language", languages)
    if mixed:
        metas = batch.column("meta").to_pylist()
        for row, shares in mixed.items():
            metas[row] = _meta_with(metas[row], shares)
        batch = _with_column(batch, "meta", metas)
    nothing: list[str | None] = [None] * batch.num_rows
    return Outcome(batch, nothing, nothing)


def languages_of(raw: bytes) -> Languages:
    """The languages of a text, given as UTF-8. Control characters, which CLD2 refuses, are taken out."""
    import pycld2

    raw = raw.translate(None, CONTROLS)
    try:
        is_sure, num_bytes, found = pycld2.detect(raw, isPlainText=True)
    except pycld2.error:
        raw = NOT_INTERCHANGED.sub("", raw.decode("utf-8", "ignore")).encode()
        is_sure, num_bytes, found = pycld2.detect(raw, isPlainText=True)
    if not is_sure or num_bytes < MIN_BYTES:
        return NOT_KNOWN
    return _languages(tuple([(code, percent) for _, code, percent, _ in found]))


@functools.lru_cache(4096)  # few texts are not in one language as a whole
def _languages(found: tuple[tuple[str, int], ...]) -> Languages:
    """What CLD2's codes and percentages come to."""
    shares: dict[str, float] = {}
    for code, percent in found:
        if code != "un" and percent:
            code = CODES.get(code, code)
            shares[code] = round(shares.get(code, 0.0) + percent / 100, 2)
    if not shares:
        return NOT_KNOWN
    return Languages(max(shares, key=lambda code: (shares[code], code)), types.MappingProxyType(shares))


def _found(text: memoryview, is_ascii: bool) -> Languages:
    """The languages of a text, by a sample of it."""
    if len(text) > FIRST_LOOK.num_bytes and is_ascii:
        found = languages_of(_sample(text, FIRST_LOOK))
        if len(found.shares) == 1:
            return found
    return languages_of(_sample(text, SAMPLE))


def _sample(text: memoryview, pieces: Pieces) -> bytes:
    """The text, or pieces of a long one, cut between characters."""
    if len(text) <= pieces.num_bytes:
        return bytes(text)
    size = pieces.num_bytes // pieces.number
    gap = len(text) - size
    firsts = [gap * piece // (pieces.number - 1) for piece in range(pieces.number)]
    taken = [bytes(text[first : first + size]) for first in firsts]
    together = b"\n".join(taken)
    if together.isascii():
        return together
    return "\n".join([piece.decode("utf-8", "ignore") for piece in taken]).encode()


def _meta_with(meta: str, shares: Mapping[str, float]) -> str:
    fields: dict[str, Any] = json.loads(meta) | {"languages": dict(shares)}
    return json.dumps(fields, sort_keys=True, ensure_ascii=False)


def _with_column(batch: pa.RecordBatch, name: str, values: list[str]) -> pa.RecordBatch:
    place = SCHEMA.get_field_index(name)
    return batch.set_column(place, SCHEMA.field(name), pa.array(values, pa.string()))
