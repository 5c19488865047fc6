"""What an engine is asked and what it answers: token ids, no text."""

import dataclasses
import queue
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from internjax.decode.sample import SamplingParams

Finish = Literal["stop", "length", "aborted", "error"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be continued."""

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the answer; the one drawn is its last id."""
    logprobs: bool = False
    """Report the log-probability of every token under the model at the request's temperature."""
    adapter: str | None = None
    """Name of an adapter that the engine has loaded; None for the base model."""


class Event(NamedTuple):
    """New tokens of a request; the last event of a request has `finish`."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish | None
    error: str | None


class Result(NamedTuple):
    """All events of a request in one."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    error: str | None


class Handle:
    """A submitted request: read its events, or abort it, from any thread."""

    def __init__(self, request: Request, wake: Callable[[], None]):
        self.request = request
        self._wake = wake
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._read_to_end = self._finished = False
        self.aborted = False
        self.num_shared = 0
        """Prompt tokens that were in the cache already, known when the first event comes."""

    def events(self) -> Iterator[Event]:
        """Yields events as they come, until the one that has `finish`. Every event is delivered once."""
        while not self._read_to_end:
            event = self._events.get()
            self._read_to_end = event.finish is not None
            yield event

    def result(self) -> Result:
        """Returns the whole answer when it is done."""
        events = list(self.events())
        if not events:
            raise RuntimeError("the events of this request were read already, and each is delivered once")
        ids = tuple(token for event in events for token in event.ids)
        logprobs = tuple(value for event in events for value in event.logprobs or ()) if self.request.logprobs else None
        return Result(ids, logprobs, events[-1].finish, events[-1].error)

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
        self.deliver(Event((), () if self.request.logprobs else None, finish, error))


class Session:
    """A conversation: its tokens so far, and the frequencies that the longest it may become has fixed.

    It holds no pages: those of its tokens stay in the cache or in the host's memory until others need the room.
    """

    def __init__(self, max_length: int, inv_freq_F: np.ndarray, tokens: tuple[int, ...] = ()):
        self.max_length, self.inv_freq_F, self.tokens = max_length, inv_freq_F, tokens
        self._handle: Handle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request of it is not done."""
        return self._handle is not None

    def fork(self) -> "Session":
        """Returns another conversation that begins as this one; raises RuntimeError while it is busy."""
        self._check_idle()
        return Session(self.max_length, self.inv_freq_F, self.tokens)

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
            self.tokens = tuple(tokens)
        self._handle = None

    def _check_idle(self) -> None:
        if self.busy:
            raise RuntimeError("the last request of this session is not done: wait for it or abort it")
