"""What an agent hands back: the answer, and everything that led to it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from internjax.text.message import Message


class Step(NamedTuple):
    """One turn of the model. `tool` is None where it called none; `error` says why a turn could not be used."""

    text: str  # what the model said besides the call
    tool: str | None = None
    arguments: str | None = None  # as the model wrote them
    observation: str | None = None
    error: str | None = None


class Trace(NamedTuple):
    """`answer` is None where the turns ran out before the model gave one. `messages` is the whole conversation."""

    answer: str | None
    finish: Literal["answer", "max_turns"]
    messages: tuple[Message, ...]
    steps: tuple[Step, ...]
