"""From the ids of an answer to its text and calls: a completion's, or an assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence

from internjax.text import chat as protocol
from internjax.text.chat import CallBroken, CallDelta, CallEnd, CallStart, TextDelta
from internjax.text.tokenizer import ACTION_END, ACTION_START, INTERPRETER, PLUGIN, StreamDecoder, Tokenizer

MARKER_OF = {"interpreter": INTERPRETER, "plugin": PLUGIN}


class PlainReader:
    """Text of ids; special tokens are invisible."""

    in_text = True  # whether the ids read last are part of the text

    def __init__(self, tokenizer: Tokenizer, *, behind_text: bool = False):
        """behind_text: something stands before, so that a space in front of the first word is one."""
        self.tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer, behind_text=behind_text)

    def push(self, ids: Sequence[int]) -> list[protocol.Event]:
        return [TextDelta(self._decoder.push(ids))]

    def close(self) -> list[protocol.Event]:
        return [TextDelta(self._decoder.flush())]


class ChatReader:
    """Events of an assistant's turn; calls become text where nobody declared tools."""

    def __init__(self, tokenizer: Tokenizer, *, may_call: bool):
        self.tokenizer = tokenizer
        self._parser = protocol.ToolParser(tokenizer)
        self._may_call = may_call
        self._opening = tokenizer.special.get(ACTION_START)
        self._in_call = False
        self.in_text = True

    def push(self, ids: Sequence[int]) -> list[protocol.Event]:
        parts = self._parser.push(ids)
        if not self._may_call:
            return [_as_text(part) for part in parts]
        closed = False
        for part in parts:
            if isinstance(part, CallStart | CallEnd):
                self._in_call = isinstance(part, CallStart)
                closed = not self._in_call
        self.in_text = not (self._in_call or closed or ids[-1] == self._opening)
        return parts

    def close(self) -> list[protocol.Event]:
        # A call that is not closed is text as a whole, with the end of its body that comes only now. If calls are text
        # already, the rest of it has been shown as it came.
        known = CallDelta if self._may_call else CallBroken
        return [_as_text(part) for part in self._parser.close() if not isinstance(part, known)]


Reader = PlainReader | ChatReader


def text_of(part: protocol.Event) -> str:
    return part.text if isinstance(part, TextDelta) else ""


def _as_text(part: protocol.Event) -> TextDelta:
    """The text that stands for a part of a turn when calls are nothing but text."""
    match part:
        case CallStart(name):
            return TextDelta(ACTION_START + MARKER_OF[name])
        case CallDelta(text):
            return TextDelta(text)
        case CallEnd():
            return TextDelta(ACTION_END)
        case CallBroken(name, text):
            return TextDelta(ACTION_START + MARKER_OF[name] + text)
        case _:
            return part
