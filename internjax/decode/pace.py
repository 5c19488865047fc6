"""How long a block is: many turns of the model cost less each, and their tokens come together, after a longer pause."""


class Pace:
    """Chooses the turns of blocks from how long turns took. Used in the thread that serves."""

    def __init__(self, most: int, max_pause: float | None):
        """most: turns of a block at most. max_pause: seconds between tokens that are not to be exceeded where a block
        has more than one turn; None: blocks are as long as they may be."""
        self._most, self._max_pause = most, max_pause
        self._last: float | None = None
        self._seconds: float | None = None
        """Of a turn, with what else is done for a block; later blocks count more."""

    @property
    def turns(self) -> int:
        """Of the next block."""
        if self._max_pause is None or self._seconds is None:
            return self._most
        return max(1, min(self._most, int(self._max_pause / max(self._seconds, 1e-9))))

    def ended(self, now: float, *, turns: int, follows: bool) -> None:
        """Takes note of a block that has ended. follows: it was under way when the one before it ended, so that the
        time since then is its own."""
        if follows and turns and self._last is not None:
            seconds = (now - self._last) / turns
            self._seconds = seconds if self._seconds is None else 0.75 * self._seconds + 0.25 * seconds
        self._last = now
