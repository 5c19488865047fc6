"""How long requests take, counted while they are served: histograms that one thread fills and any thread reads."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
"""From a batch of one on a fast GPU to a large model on a CPU."""
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Spread(NamedTuple):
    """A histogram at one moment: `counts[i]` are those up to `bounds[i]` seconds and over the bound before."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    """One more than bounds: the last counts what is over all of them."""
    total: float
    """Seconds of all together."""


class Timings(NamedTuple):
    """What the requests of an engine waited for, in seconds."""

    in_queue: Spread
    """From a request's arrival until it first gets a slot."""
    first_token: Spread
    """From its arrival until its first token."""
    each_token: Spread
    """Between tokens, of every token but those that came first; tokens that come together share their time."""
    whole: Spread
    """From arrival to the last token, of requests that were neither aborted nor failed."""


class Histogram:
    """Counts of seconds between fixed bounds."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Counts a time, `count` times; one of exactly a bound lies below it."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += count
        self._total += seconds * count

    def read(self) -> Spread:
        """Returns what it holds now."""
        return Spread(self._bounds, tuple(self._counts), self._total)


class Clock:
    """The histograms of an engine, filled in the thread that serves. Times are of `time.monotonic`."""

    def __init__(self):
        self._in_queue, self._first = Histogram(REQUEST_SECONDS), Histogram(REQUEST_SECONDS)
        self._each, self._whole = Histogram(TOKEN_SECONDS), Histogram(REQUEST_SECONDS)

    def seated(self, *, arrived: float, now: float) -> None:
        """Notes that a request got its first slot."""
        self._in_queue.add(now - arrived)

    def delivered(self, count: int, *, arrived: float, before: float | None, now: float) -> None:
        """Notes `count` tokens of a request that came together; `before`: when its last ones came, None: never."""
        if before is None:
            self._first.add(now - arrived)
        else:
            self._each.add((now - before) / count, count)

    def ended(self, *, arrived: float, now: float) -> None:
        """Notes that a request has all its tokens."""
        self._whole.add(now - arrived)

    def read(self) -> Timings:
        """Returns the histograms as they are now."""
        return Timings(self._in_queue.read(), self._first.read(), self._each.read(), self._whole.read())
