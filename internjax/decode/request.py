"""What an engine is asked and what it answers: token ids, no text."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from internjax.decode.programs import Block, Scores
from internjax.decode.sample import Limits, SamplingParams

Finish = Literal["stop", "length", "aborted", "error"]


class Guide(Protocol):
    """Follows one answer; called in the engine's thread, between its tokens."""

    def mask(self) -> np.ndarray:
        """Returns uint32 `[ceil(V / 32)]`: bit i % 32 of word i // 32 is set if token i may come next."""

    def take(self, token: int) -> None:
        """Goes on with the token that was drawn."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued.

    Log-probabilities, of the answer and of the prompt, are those of the model at the request's temperature (1 for a
    greedy one), before penalties, biases, bans and truncation.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one drawn is its last id."""
    logprobs: int | None = None
    """Report the log-probability of every token drawn, and so many of the most likely ones in its place."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, each given those before it."""
    adapter: str | None = None
    """Name of an adapter that the engine has loaded; None for the base model."""
    guide: Callable[[], Guide] | None = None
    """Makes what says, token by token, which may come next."""


class RequestError(ValueError):
    """A request that this engine cannot serve; `field` is the one at fault, of Request or of its sampling."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


ANY_NUMBER = Limits(*[2**31] * len(Limits._fields))
"""Of a program that is compiled for what one request asks."""


def check_options(request: Request, limits: Limits, *, vocab_size: int) -> None:
    """Raises RequestError where the options of a request pass the limits or name tokens that do not exist."""
    sampling = request.sampling
    sizes = {
        "stop_ids": (len(request.stop_ids), limits.stop_ids, "stop ids"),
        "logit_bias": (len(sampling.logit_bias), limits.logit_bias, "biased tokens"),
        "bad_words": (len(sampling.bad_words), limits.bad_words, "bad words"),
    }
    for field, (given, most, what) in sizes.items():
        if given > most:
            raise RequestError(field, f"{given} {what} given; this engine takes up to {most} (limits.{field})")
    longest = max(map(len, sampling.bad_words), default=0)
    if longest > limits.bad_word_length:
        most = f"{limits.bad_word_length} (limits.bad_word_length)"
        raise RequestError("bad_words", f"a bad word of {longest} tokens given; this engine takes up to {most}")
    for field in ("logprobs", "prompt_logprobs"):
        given = getattr(request, field)
        if given is not None and (isinstance(given, bool) or not 0 <= given <= limits.logprobs):
            most = f"0 (the tokens that are there) to {limits.logprobs} most likely ones (limits.logprobs), or None"
            raise RequestError(field, f"{field} must be {most}; given {given!r}")
    if request.guide is not None and (sampling.min_new_tokens or sampling.bad_words):
        field = "min_new_tokens" if sampling.min_new_tokens else "bad_words"
        raise RequestError(field, f"{field} and a guide may leave no token that can come next; ask for one of them")
    if sampling.min_new_tokens > request.max_new_tokens:
        given = f"{sampling.min_new_tokens} and {request.max_new_tokens}"
        raise RequestError("min_new_tokens", f"min_new_tokens must not pass max_new_tokens; given {given}")
    named = {
        "tokens": request.tokens,
        "stop_ids": request.stop_ids,
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "bad_words": [token for word in sampling.bad_words for token in word],
    }
    for field, tokens in named.items():
        foreign = [token for token in tokens if not 0 <= token < vocab_size]
        if foreign:
            what = f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary; given {foreign[:5]} ({field})"
            raise RequestError(field, what)
    if len({word[-1] for word in sampling.bad_words} | {*request.stop_ids}) >= vocab_size:
        raise RequestError("bad_words", "the bad words and stop ids leave no token of the vocabulary; give fewer")


Ranked = tuple[tuple[int, float], ...]
"""(token, log-probability) of the most likely tokens, best first."""


class PromptLogprobs(NamedTuple):
    """Log-probability of each token of the prompt, None for the first, and the most likely ones in its place."""

    logprobs: tuple[float | None, ...]
    top: tuple[Ranked, ...]


class Event(NamedTuple):
    """New tokens of a request; the last event of a request has `finish`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish | None
    error: str | None
    top_logprobs: tuple[Ranked, ...] | None = None
    prompt: PromptLogprobs | None = None
    """Once, before the first token, if the request asks for prompt_logprobs."""


class Result(NamedTuple):
    """All events of a request in one."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    error: str | None
    top_logprobs: tuple[Ranked, ...] | None = None
    prompt: PromptLogprobs | None = None


def tokens_event(request: Request, block: Block, row: int, finish: Finish | None) -> Event:
    """Returns the event with a row's tokens of a block, and what the request asks to be told of them."""
    count = int(block.counts_B[row])
    ids = tuple(block.ids_Bn[row, :count].tolist())
    if request.logprobs is None:
        return Event(ids, None, finish, None)
    top = _ranked(block.top_ids_BnK[row, :count], block.top_logprobs_BnK[row, :count], request.logprobs)
    return Event(ids, tuple(block.logprobs_Bn[row, :count].tolist()), finish, None, top)


def prompt_event(request: Request, chunks: Sequence[Scores]) -> Event:
    """Returns the event with the log-probabilities of a prompt; `chunks` are the scores of all but its first token."""
    logprobs = [value for chunk in chunks for value in chunk.logprobs_C.tolist()]
    top = [entry for c in chunks for entry in _ranked(c.top_ids_CK, c.top_logprobs_CK, request.prompt_logprobs)]
    prompt = PromptLogprobs((None, *logprobs), ((), *top))
    return Event((), None if request.logprobs is None else (), None, None, prompt=prompt)


def _ranked(ids_nK: np.ndarray, logprobs_nK: np.ndarray, count: int) -> tuple[Ranked, ...]:
    rows = zip(ids_nK[:, :count].tolist(), logprobs_nK[:, :count].tolist())
    return tuple(tuple(zip(ids, values)) for ids, values in rows)


class Handle:
    """A submitted request: read its events, or abort it, from any thread."""

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request = request
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._read_to_end = self._finished = False
        self._reading = threading.Lock()
        self.aborted = False
        self.is_enough = False
        """Set by who reads the answer where it is aborted for being complete: it counts as one that stopped."""
        self.num_shared = 0
        """Prompt tokens that were in the cache already, known when the first event comes."""

    def events(self) -> Iterator[Event]:
        """Yields events as they come, until the one that has `finish`. Every event is delivered once.

        Several threads may read: each event goes to one of them, and all of them come to an end.
        """
        while True:
            with self._reading:
                if self._read_to_end:
                    return
                event = self._events.get()
                self._read_to_end = event.finish is not None
            yield event

    def result(self) -> Result:
        """Returns the whole answer when it is done."""
        events = list(self.events())
        if not events:
            raise RuntimeError("the events of this request were read already, and each is delivered once")
        ids = tuple(token for event in events for token in event.ids)
        logprobs = top = None
        if self.request.logprobs is not None:
            logprobs = tuple(value for event in events for value in event.logprobs or ())
            top = tuple(ranked for event in events for ranked in event.top_logprobs or ())
        prompt = next((event.prompt for event in events if event.prompt is not None), None)
        return Result(ids, logprobs, events[-1].finish, events[-1].error, top, prompt)

    @property
    def finished(self) -> bool:
        """Whether the last event was delivered, read or not."""
        return self._finished

    def abort(self) -> None:
        """Ends the request soon, wherever it is; no effect on one that is done."""
        self.aborted = True
        self._wake()

    def deliver(self, event: Event) -> None:
        """Adds an event, the engine's part; the one with `finish` is the last."""
        self._finished = event.finish is not None
        self._events.put(event)

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Adds the last event of a request that ends without further tokens."""
        self.deliver(Event((), None if self.request.logprobs is None else (), finish, error))


class Session:
    """A conversation: its tokens so far, and the frequencies that the longest it may become has fixed.

    It holds no pages: those of its tokens stay in the cache or in the host's memory until others need the room.
    """

    def __init__(self, max_length: int, inv_freq_F: np.ndarray, tokens: tuple[int, ...] = ()):
        self.max_length, self.inv_freq_F, self.tokens = max_length, inv_freq_F, tokens
        self.is_forked = False
        """Whether another conversation has all of these tokens too."""
        self._handle: Handle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request of it is not done."""
        return self._handle is not None

    def fork(self) -> "Session":
        """Returns another conversation that begins as this one; raises RuntimeError while it is busy."""
        self._check_idle()
        other = Session(self.max_length, self.inv_freq_F, self.tokens)
        self.is_forked = other.is_forked = True
        return other

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens; raises RuntimeError while it is busy."""
        self._check_idle()
        if not 0 <= length <= len(self.tokens):
            raise ValueError(f"the session has {len(self.tokens)} tokens and cannot go back to its first {length}")
        self.tokens = self.tokens[:length]

    def lengthen(self, max_length: int, inv_freq_F: np.ndarray) -> bool:
        """Sets what the engine found for `max_length`; returns whether that changed the frequencies."""
        self._check_idle()
        changed = bool(self.tokens) and not np.array_equal(inv_freq_F, self.inv_freq_F)
        self.max_length, self.inv_freq_F = max_length, inv_freq_F
        return changed

    def take(self, handle: Handle) -> None:
        """Notes the request that is answered now, the engine's part."""
        self._check_idle()
        self._handle = handle

    def end(self, tokens: list[int] | None) -> None:
        """Notes the tokens that it has after its request, the engine's part; None leaves them as they were."""
        if tokens is not None:
            self.tokens, self.is_forked = tuple(tokens), False
        self._handle = None

    def _check_idle(self) -> None:
        if self.busy:
            raise RuntimeError("the last request of this session is not done: wait for it or abort it")
