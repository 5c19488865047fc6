"""What an engine is asked and what it answers: token ids, no text."""

import dataclasses
import queue
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

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
        self._read_to_end = False
        self.aborted = False

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

    def abort(self) -> None:
        """Ends the request soon, wherever it is; no effect on one that is done."""
        self.aborted = True
        self._wake()

    def deliver(self, event: Event) -> None:
        """Adds an event, the engine's part; the one with `finish` is the last."""
        self._events.put(event)

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Adds the last event of a request that ends without further tokens."""
        self.deliver(Event((), () if self.request.logprobs else None, finish, error))
