"""A model's calls as OpenAI has them: a function's name and its arguments, whole or in the pieces of a stream.

`function_of` says what a call is; `CallPieces` gives beginnings of just that while the call is generated, so that what
a stream adds up to is what a whole answer holds. Nothing that was sent can be taken back, so a piece is sent only
where it stands in the arguments whatever comes behind it.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from internjax.text.chat import CODE_OPEN
from internjax.text.message import Message, ToolCall, ToolName, to_openai

# The order in which the model is taught to write a call: only then the name is known before the arguments begin.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_.-]{1,64})"\s*,\s*"parameters"\s*:\s*(?=\{)')


class Function(NamedTuple):
    name: str
    arguments: str
    """JSON, of a call that can be run. What the model wrote, where that is none: it is handed on, not hidden."""


def function_of(call: ToolCall) -> Function:
    """A call's function. Arguments stand as the model wrote them; code is the argument `code` of "interpreter"."""
    head = None if call.name == "interpreter" else _HEAD.match(call.content)
    if head is None:
        try:
            (turn,) = to_openai([Message("assistant", "", call=call)])
        except RecursionError:  # brackets in brackets, thousands deep
            return Function("", call.content)
        return Function(**turn["tool_calls"][0]["function"])
    try:
        # Twice a key, or more behind the object: another call than its beginning says, and none that can be run.
        whole = json.loads(call.content, parse_constant=_refuse)
        value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(call.content, head.end())
        if (whole["name"], whole["parameters"]) == (head[1], value):
            return Function(head[1], call.content[head.end() : end])
    except (ValueError, RecursionError):
        pass
    return Function(head[1], call.content[head.end() :])


class Piece(NamedTuple):
    """More of a call."""

    name: str | None  # with the first of them that is not empty
    arguments: str


class CallPieces:
    """One call while it is generated: of all that it gives, joined, the name is given once and before any arguments."""

    def __init__(self, kind: ToolName):
        self._name = "interpreter" if kind == "interpreter" else None  # until it has been given
        self._is_code = kind == "interpreter"
        self._body = ""  # what has come and is not taken: until the arguments begin all of it, then what is held back
        self._is_open = self._is_closed = False  # whether the arguments have begun, and come to their last bracket
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self._num_sent = 0

    def push(self, text: str) -> Piece:
        """More of the call's body as generated; returns what is now certain."""
        self._body += text
        if self._is_code:
            return self._piece(self._code())
        if not self._is_closed and (self._is_open or self._begin()):
            return self._piece(self._values())
        return Piece(None, "")

    def close(self, call: ToolCall) -> Piece:
        """Returns what is missing of the call, which is now complete."""
        function = function_of(call)
        if not self._is_open and not self._is_code:
            self._name = function.name
        return self._piece(function.arguments[self._num_sent :])

    def _piece(self, arguments: str) -> Piece:
        name, self._name = self._name, None
        self._num_sent += len(arguments)
        return Piece(name, arguments)

    def _begin(self) -> bool:
        head = _HEAD.match(self._body)
        if head is not None:
            self._name, self._body, self._is_open = head[1], self._body[head.end() :], True
        return self._is_open

    def _values(self) -> str:
        """The text of the parameters up to their last bracket: behind it may come what makes it no call."""
        for index, char in enumerate(self._body):
            if self._in_string:
                self._in_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:  # what comes from here on is looked at once it is complete
                    self._is_closed = True
                    return self._body[:index]
        piece, self._body = self._body, ""
        return piece

    def _code(self) -> str:
        """A JSON string of the code, without what may be the end of its fence."""
        opening = ""
        if not self._is_open:
            if not self._body.startswith(CODE_OPEN):  # too early to say, or a fence that only the whole body tells
                return ""
            self._is_open, self._body, opening = True, self._body[len(CODE_OPEN) :], '{"code": "'
        kept = _num_before_fence(self._body)
        code, self._body = self._body[:kept], self._body[kept:]
        return opening + json.dumps(code, ensure_ascii=False)[1:-1]


def _num_before_fence(code: str) -> int:
    """Length of the code so far without what, at its end, may become its closing fence: a newline, spaces, ```."""
    closed = code.rstrip()
    if closed.endswith("```"):
        end = len(closed) - 3
    else:
        end = len(code.rstrip("`"))
    before = code[:end].rstrip(" \t")
    return len(before) - before.endswith("\n")


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON")
