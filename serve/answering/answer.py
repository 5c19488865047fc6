"""One answer while it is generated: its events, and what they come to.

Stop strings watch the answer's text, not the body of a tool call. A tool call ends its answer, as in InternLM2's
protocol.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from internjax.decode.request import Event as EngineEvent
from internjax.decode.request import Handle, PromptLogprobs, Ranked, Request
from internjax.text.chat import CallDelta, CallEnd, CallStart
from internjax.text.message import Message, ToolCall
from internjax.text.tokenizer import StreamDecoder
from serve.answering.params import Params
from serve.answering.readers import Reader, text_of
from serve.answering.stops import StopStrings
from serve.guided import Following, GuideError


class Token(NamedTuple):
    """A token: `text` is what it added to the answer (or the prompt), from character `offset` on; nothing, if it only
    begins a character. The texts of all tokens joined are the whole, but for what no token completed: a character cut
    off at the answer's end, and a tool call that was not closed, which is shown as text."""

    id: int
    text: str
    logprob: float | None  # None for a prompt's first token, which nothing stands before
    offset: int
    top: tuple[Alternative, ...] = ()


class Alternative(NamedTuple):
    """One of the most likely tokens in a place, whether drawn there or not. `piece`: the bytes it adds to a text."""

    id: int
    piece: bytes
    logprob: float


class Prompt(NamedTuple):
    """The prompt's tokens with their log-probabilities, if `Params.prompt_logprobs`: the first event of an answer.

    Of a prompt that is a text, the token that begins every text is not one of them.
    """

    tokens: tuple[Token, ...]


class Delta(NamedTuple):
    """More of the answer's text, and the tokens that are now complete (empty unless `Params.logprobs`). What the engine
    drew together comes in one."""

    text: str
    tokens: tuple[Token, ...]


class Result(NamedTuple):
    """The whole answer. `ids` are all generated ids, the stop id included; `tokens` are those of the text."""

    text: str
    call: ToolCall | None
    finish: Literal["stop", "length", "tool_calls", "aborted"]
    stop: str | None  # the stop string that ended it
    num_prompt_tokens: int
    ids: tuple[int, ...]
    tokens: tuple[Token, ...]
    prompt: tuple[Token, ...] = ()  # with Params.prompt_logprobs
    num_cached_tokens: int = 0  # first tokens of the prompt that did not have to be read

    @property
    def message(self) -> Message:
        return Message("assistant", self.text, call=self.call)


Event = Prompt | Delta | CallStart | CallDelta | CallEnd | Result
"""A call that is cut off has no CallEnd: its text is a Delta at the end, as it is in the Result."""


class Answer:
    """One answer while it is generated: iterate it once, in one thread; `abort` may be called from any.

    However the iteration ends, the engine is told to drop the request.
    """

    def __init__(
        self,
        handle: Handle,
        reader: Reader,
        request: Request,
        *,
        prompt: Sequence[int],
        hidden: int,
        params: Params,
        following: Following | None = None,
    ):
        """`prompt`: all that stands before the answer; in a session the request holds the last of it. `hidden`: tokens
        at its beginning that are no part of its text. `following`: makes the request's guide."""
        self._handle = handle
        self._reader = reader
        self._prompt_ids = tuple(prompt)
        self._following = following
        self._hidden = hidden
        self._stop_ids = frozenset(request.stop_ids)
        self._params = params
        self._prompt: tuple[Token, ...] = ()
        self._stops = StopStrings(params.stop)
        self._text: list[str] = []
        self._num_shown = 0  # characters in _text
        self._num_read = 0  # characters that the reader has given, shown or held back
        self._pending: collections.deque[Token] = collections.deque()
        self._tokens: list[Token] = []
        self._ids: list[int] = []
        self._call: ToolCall | None = None
        self.last: Result | None = None  # once the answer is complete
        self.over = False  # whether its iteration has ended, with a Result or without

    def __iter__(self) -> Iterator[Event]:
        try:
            finish = yield from self._read()
            self.last = Result(
                "".join(self._text),
                self._call,
                finish,
                self._stops.hit,
                len(self._prompt_ids),
                tuple(self._ids),
                tuple(self._tokens),
                self._prompt,
                self._handle.num_shared,
            )
            yield self.last
        finally:
            self.over = True
            self._handle.abort()

    def abort(self) -> None:
        """Ends the answer where it stands; the iteration still gives its Result."""
        self._handle.abort()

    @property
    def aborted(self) -> bool:
        """Whether it was told to end."""
        return self._handle.aborted

    def wait(self) -> None:
        """Returns when the engine is done with an answer that is over or aborted."""
        for _ in self._handle.events():
            pass

    def result(self) -> Result:
        """The whole answer, when it is there."""
        for _ in self:
            pass
        return self.last

    def _read(self) -> Iterator[Event]:
        finish = "aborted"
        for event in self._handle.events():
            if event.error is not None:
                if self._following is not None and self._following.fault is not None:
                    raise GuideError(f"the answer cannot be guided any further: {self._following.fault}")
                raise RuntimeError(f"the engine failed: {event.error}")
            finish = event.finish or finish
            if event.prompt is not None:
                self._prompt = self._tokens_of_prompt(event.prompt)
                yield Prompt(self._prompt)
            if self._params.max_tokens == 0:
                continue  # the engine draws one token at least
            yield from _joined(self._drawn(event))
            if self._call is not None or self._stops.hit is not None:
                self._handle.is_enough = True
                return "stop" if self._call is None else "tool_calls"
        if self._params.max_tokens == 0:
            return "aborted" if finish == "aborted" else "length"
        for part in self._reader.close():
            yield from self._show(self._stops.push(text_of(part)))
        if self._stops.hit is not None:
            return "stop"
        yield from self._show(self._stops.flush())
        return finish

    def _drawn(self, event: EngineEvent) -> Iterator[Event]:
        nothing = (None,) * len(event.ids)
        for token_id, logprob, ranked in zip(event.ids, event.logprobs or nothing, event.top_logprobs or nothing):
            self._ids.append(token_id)
            if token_id in self._stop_ids:
                return
            yield from self._take(token_id, logprob, ranked or ())
            if self._call is not None or self._stops.hit is not None:
                return

    def _tokens_of_prompt(self, prompt: PromptLogprobs) -> tuple[Token, ...]:
        decoder, tokens, offset = StreamDecoder(self._reader.tokenizer), [], 0
        for token_id, logprob, ranked in list(zip(self._prompt_ids, *prompt))[self._hidden :]:
            text = decoder.push([token_id])
            tokens.append(Token(token_id, text, logprob, offset, self._alternatives(ranked)))
            offset += len(text)
        if tokens and (rest := decoder.flush()):
            tokens[-1] = tokens[-1]._replace(text=tokens[-1].text + rest)
        return tuple(tokens)

    def _alternatives(self, ranked: Ranked) -> tuple[Alternative, ...]:
        return tuple(Alternative(token_id, self._reader.tokenizer.bytes_of(token_id), p) for token_id, p in ranked)

    def _take(self, token_id: int, logprob: float | None, ranked: Ranked) -> Iterator[Event]:
        parts = self._reader.push([token_id])
        text = "".join(text_of(part) for part in parts)
        if self._params.logprobs is not None and self._reader.in_text:
            self._pending.append(Token(token_id, text, logprob, self._num_read, self._alternatives(ranked)))
        self._num_read += len(text)
        early = len(self._ids) <= self._params.min_tokens
        yield from self._show(text if early else self._stops.push(text))
        for part in parts:
            if self._stops.hit is not None:
                break
            if isinstance(part, CallEnd):
                yield from self._show(self._stops.flush())
                self._call = part.call
            if isinstance(part, CallStart | CallDelta | CallEnd):
                yield part

    def _show(self, text: str) -> Iterator[Delta]:
        self._text.append(text)
        self._num_shown += len(text)
        ready = []
        while self._pending and self._pending[0].offset + len(self._pending[0].text) <= self._num_shown:
            ready.append(self._pending.popleft())
        if self._stops.hit is not None:  # the tokens of the stop string are not part of the answer
            cut = self._num_shown
            ready += [
                token._replace(text=token.text[: cut - token.offset]) for token in self._pending if token.offset < cut
            ]
            self._pending.clear()
        self._tokens += ready
        if text or ready:
            yield Delta(text, tuple(ready))


def _joined(events: Iterable[Event]) -> Iterator[Event]:
    """What came together, with deltas that follow each other as one: sending costs far more than drawing a token."""
    for kind, group in itertools.groupby(events, key=type):
        if kind is Delta:
            texts, tokens = zip(*group)
            yield Delta("".join(texts), tuple(itertools.chain.from_iterable(tokens)))
        else:
            yield from group
