"""Token ids with a loss mask, shown: the text of a sample with what is learned marked, for terminals and pages."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from internjax.text.tokenizer import Tokenizer

_LEARNED, _READ, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


class Marked(NamedTuple):
    """Stretches of a sample's text, and whether they are learned."""

    parts: tuple[tuple[str, bool], ...]


def marked(ids: Sequence[int], learned: Sequence[bool | int], tokenizer: Tokenizer) -> Marked:
    """Returns the text of ids, markers included, cut where learned begins and ends. Control characters are shown."""
    from internjax.text.tokenizer import StreamDecoder

    decoder, parts = StreamDecoder(tokenizer, skip_special=False), []
    for token, learn in zip(ids, learned, strict=True):
        piece = _printable(decoder.push([int(token)]))
        if parts and parts[-1][1] == bool(learn):
            parts[-1] = (parts[-1][0] + piece, bool(learn))
        else:
            parts.append((piece, bool(learn)))
    if parts:
        parts.append((_printable(decoder.flush()), parts[-1][1]))
    return Marked(tuple(part for part in parts if part[0]))


def shortened(sample: Marked, *, max_chars: int) -> Marked:
    """Returns the sample with the middle of every stretch longer than `max_chars` left out, and said so."""

    def short(text: str) -> str:
        if len(text) <= max_chars:
            return text
        head, tail = max_chars - max_chars // 3, max_chars // 3
        return f"{text[:head]} […{len(text) - head - tail:,} characters…] {text[len(text) - tail :]}"

    return Marked(tuple((short(text), learned) for text, learned in sample.parts))


def _printable(text: str) -> str:
    """Returns the text without control characters: data must not steer the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def terminal(sample: Marked, *, colour: bool) -> str:
    """Returns the text with what is learned in green (the rest dim), or between brackets without colour."""
    if colour:
        return "".join(f"{_LEARNED if learned else _READ}{text}{_PLAIN}" for text, learned in sample.parts)
    return "".join(f"⟦{text}⟧" if learned else text for text, learned in sample.parts)


def as_html(sample: Marked) -> str:
    """Returns the text as HTML, escaped, with what is learned in `mark` elements."""
    return "".join(
        f"<mark>{html.escape(text)}</mark>" if learned else f"<span>{html.escape(text)}</span>"
        for text, learned in sample.parts
    )
