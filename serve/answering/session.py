"""A conversation that is sent turn by turn: what was said before is not read again.

    with pipeline.session([Message("system", "Be brief.")], max_length=2048) as session:
        for event in session.chat(Message("user", "hello")):
            ...
        session.chat(Message("user", "and now?")).result()

The ids of a new turn are what `render` adds to the conversation that is held. Where a template writes earlier turns
anew, the conversation is read again from there, and `notice` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from internjax.decode import request
from internjax.decode.engine import Engine
from internjax.decode.router import Router
from internjax.text import chat as protocol
from internjax.text.message import Message
from internjax.text.tokenizer import Tokenizer
from serve.answering.answer import Answer, Result
from serve.answering.params import Params
from serve.answering.readers import MARKER_OF

log = logging.getLogger("serve")


class Answering(NamedTuple):
    """What a session needs of its pipeline."""

    engine: Engine | Router
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    answer_to: Callable[..., Answer]
    """`Pipeline.answer_to`."""
    refuse_long: Callable[[Iterable[str]], None]
    """`Pipeline.refuse_long`."""


class Session:
    """One conversation; `Pipeline.session` opens it. Not to be used from several threads at once."""

    def __init__(self, answering: Answering, held: request.Session, messages: Sequence[Message]):
        """`held`: the engine's part of it. `messages`: what stands before the first turn."""
        self._answering = answering
        self._held = held
        self._messages = list(messages)
        self._closed: list[int] = []  # the conversation as `render` has it,
        self._ids: list[int] = []  # and with the answers as they were drawn: a text may be several sequences of ids
        self._turn: _Turn | None = None
        self.notice: str | None = None  # why the last turn was not all that was read

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is under way. What the conversation left in the cache goes when others need the room."""
        if self._turn is not None:
            self._turn.answer.abort()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the last answer that was read to its end; what was left in the midst is not in it."""
        turn = self._turn
        if turn is None or turn.dropped or turn.answer.last is None:
            return tuple(self._messages)
        return (*self._messages, *turn.messages, turn.answer.last.message)

    def drop(self) -> None:
        """Ends the last answer if it is under way, and forgets its turn. Does not wait: the next turn does."""
        if self._turn is not None:
            self._turn.answer.abort()
            self._turn = self._turn._replace(dropped=True)

    @property
    def may_call(self) -> bool:
        """Whether tools are declared."""
        return any(message.role == "system" and message.name in MARKER_OF for message in self._messages)

    @property
    def num_tokens(self) -> int:
        """How much of `max_length` is taken."""
        return len(self._ids if self._turn is not None and self._turn.dropped else self._held.tokens)

    @property
    def max_length(self) -> int:
        return self._held.max_length

    def lengthen(self, max_length: int) -> bool:
        """Lets it become longer; returns whether all of it will be read once more, for other rotary frequencies."""
        self.settle()
        return self._answering.engine.lengthen(self._held, max_length)

    def fork(self) -> Session:
        """Another conversation that begins as this one."""
        self.settle()
        other = Session(self._answering, self._held.fork(), self._messages)
        other._closed, other._ids = self._closed, self._ids
        return other

    def chat(self, turn: Message | Sequence[Message], params: Params | None = None) -> Answer:
        """The assistant's answer to the new turn (or turns: what tools gave back). Raises RuntimeError while the last
        answer is read, and ContextTooLong where the session has no room."""
        self.settle()
        messages = [turn] if isinstance(turn, Message) else list(turn)
        whole = [*self._messages, *messages]
        self._answering.refuse_long(text for message in whole for text in message.texts)
        rendered = self._rendered(messages, add_generation_prompt=True)
        as_held = rendered[: len(self._closed)] == self._closed
        ids = [*self._ids, *rendered[len(self._closed) :]] if as_held else rendered
        kept = _num_common(ids[:-1], self._held.tokens)
        self.notice = None
        if not as_held:
            self.notice = (
                f"the chat template wrote earlier turns anew: {len(ids) - kept} of {len(ids)} tokens are read again"
            )
            log.warning("%s", self.notice)
        answer = self._answering.answer_to(whole, ids, params or Params(), session=self._held, kept=kept)
        self._turn = _Turn(messages, ids, rendered, answer)
        return answer

    def settle(self) -> None:
        """Waits for the engine to be done with an answer, and makes it part of the conversation if it was read.

        The next turn does so too, and begins sooner where it was done before.
        """
        turn = self._turn
        if turn is None:
            return
        if not (turn.answer.over or turn.answer.aborted or turn.answer.last is not None):
            raise RuntimeError("the last answer of this session is not read to its end; read it, or abort it")
        turn.answer.wait()
        if turn.answer.last is not None and not turn.dropped:
            messages = list(self.messages)
            self._closed = self._rendered(messages[len(self._messages) :])
            self._messages = messages
            self._ids = self._as_drawn(turn, turn.answer.last)
        else:
            self._held.rewind(_num_common(self._ids, self._held.tokens))
        self._turn = None

    def _rendered(self, more: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """The conversation's ids with these messages behind it, as `render` has them."""
        tokenizer = self._answering.tokenizer
        return protocol.render_on(
            self._closed, self._messages, more, tokenizer, add_generation_prompt=add_generation_prompt
        )

    def _as_drawn(self, turn: _Turn, result: Result) -> list[int]:
        """The conversation's ids with the answer as the model drew it, up to the end of its turn.

        As `render` has it where a stop string cut the answer, so that what is left is its text alone, or where the
        template closes a turn with no end that is known.
        """
        closed, start, ends = self._closed, len(turn.rendered), self._answering.stop_ids
        at = next((i for i in range(len(closed) - 1, start - 1, -1) if closed[i] in ends), None)
        if result.stop is not None or at is None or closed[:start] != turn.rendered:
            return closed
        drawn = result.ids[:-1] if result.finish == "stop" else result.ids
        return [*turn.ids, *drawn, *closed[at:]]


class _Turn(NamedTuple):
    """What is answered now: the new messages, the ids before the answer as they are read and as `render` has them."""

    messages: list[Message]
    ids: list[int]
    rendered: list[int]
    answer: Answer
    dropped: bool = False


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
