"""The engine's serving loop: rounds of admission, prompt reading and drawing, all in the thread that serves.

Other threads add rows to the queue and look at the rows, under the lock of `wake`; whatever they look at is changed
under it here.

B slots, M pages of a row.
"""

import collections
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from internjax.decode.device import Device, Newcomer, Part
from internjax.decode.generate import FINISH_NAMES
from internjax.decode.pace import Pace
from internjax.decode.programs import unpack, unpack_scores
from internjax.decode.request import Finish, prompt_event, tokens_event
from internjax.decode.seats import Row, Seats
from internjax.decode.timing import Clock


class _Sent(NamedTuple):
    """A block that was dispatched and not read yet."""

    packed: jax.Array
    rows: dict[int, tuple[Row, int]]
    """Those in its slots, with the turn of each."""
    follows: bool
    """Whether another one was under way when it was dispatched."""


class Rounds:
    """A queue of rows, the seats of those that are served, and the blocks that are under way."""

    def __init__(
        self,
        device: Device,
        empty_seats: Callable[[], Seats],
        *,
        page_size: int,
        most_read: int,
        max_pause: float | None = None,
    ):
        """empty_seats: returns the host's books of a device that holds nothing. most_read: prompt tokens that are read
        in a round while answers are drawn, which wait for that. max_pause: see Pace."""
        self._device, self._empty_seats, self._page_size = device, empty_seats, page_size
        self._most_read, self._pace = most_read, Pace(device.turns_per_block, max_pause)
        self.wake = threading.Condition()
        self.queue: collections.deque[Row] = collections.deque()
        self.closed: str | None = None
        """Why no more rows are taken, or None if they are."""
        self.num_prompt_tokens = self.num_shared_tokens = self.num_preempted = 0
        self.num_drawn_tokens = self.num_turns = 0
        self.num_ended: collections.Counter[Finish] = collections.Counter()
        self.clock = Clock()
        self._beat = time.monotonic()
        self._forget_all()

    def _forget_all(self) -> None:
        """Begins with empty slots and pages, as far as the host is concerned."""
        self._in_flight: collections.deque[_Sent] = collections.deque()
        self.seats = self._empty_seats()

    @property
    def busy(self) -> bool:
        """Whether a round would have anything to do."""
        return bool(self.queue or self._in_flight or any(self.seats.rows))

    # From any thread.

    def add(self, row: Row) -> None:
        """Lets a row wait for a slot."""
        with self.wake:
            if not self.busy:
                self._beat = row.arrived
            self.queue.append(row)
            self.wake.notify_all()

    def silent_seconds(self) -> float:
        """Returns for how long there has been work and no round has begun or ended; 0 where there is none."""
        return time.monotonic() - self._beat if self.busy else 0.0

    @property
    def rows(self) -> list[Row]:
        """All that are not done, to be looked at under the lock."""
        return [*self.seats.taken.values(), *self.queue]

    def notify(self) -> None:
        """Wakes the thread that serves, to look for what has changed."""
        with self.wake:
            self.wake.notify_all()

    def close(self, reason: str) -> None:
        """Lets `run` return after the round that it does."""
        with self.wake:
            self.closed = self.closed or reason
            self.wake.notify_all()

    # In the thread that serves.

    def run(self) -> None:
        """Does rounds whenever there is anything to do, until it is closed."""
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.closed or self.busy)
                if self.closed:
                    return
            self.tick()

    def tick(self) -> bool:
        """Does one round of admission, prompt reading and drawing; returns whether there was anything to do."""
        self._beat = time.monotonic()
        try:
            self._drop_aborted()
            self._admit_waiting()
            self._read_prompts()
            # The next block is dispatched before the last one is read, so the device never waits for the host.
            dispatched = self._dispatch()
            if self._in_flight and (len(self._in_flight) > 1 or not dispatched):
                self._deliver(self._in_flight.popleft())
        except Exception as error:
            self._recover(error)
        self._beat = time.monotonic()
        return self.busy

    def _drop_aborted(self) -> None:
        for index, row in self.seats.taken.items():
            if row.handle.aborted:
                self._leave(index, whole_pages=True)
                self._end(row, "aborted")
        with self.wake:
            aborted = [row for row in self.queue if row.handle.aborted]
            for row in aborted:
                self.queue.remove(row)
        for row in aborted:
            self._end(row, "aborted")

    def _admit_waiting(self) -> None:
        for row in list(self.queue):
            if None not in self.seats.rows:
                return
            if self.seats.is_read_elsewhere(row):
                continue  # soon it need not be read; whoever came later may go first
            if not self.seats.has_pages_for(row):
                return  # in order: a small request does not overtake a large one for ever
            with self.wake:  # whoever looks from another thread sees the row in one of both
                self.queue.remove(row)
                index = self.seats.seat(row)
            self._guarded(index, row, self._place)

    def _guarded(self, index: int, row: Row, work: Callable[[int, Row], None]) -> None:
        """Runs the work of one request; if it fails, that request ends and the others go on."""
        try:
            work(index, row)
        except Exception as error:
            if self._device.lost:
                raise
            self._fail(index, f"{type(error).__name__}: {error}")

    def _place(self, index: int, row: Row) -> None:
        """Gives a row its pages."""
        self.seats.give_pages(index)
        if row.num_turns == 1:
            row.handle.num_shared = row.num_read
            self.clock.seated(arrived=row.arrived, now=time.monotonic())
            self.num_prompt_tokens += row.num_prompt
            self.num_shared_tokens += row.num_read

    def _together(self, rows: Mapping[int, Row], work: Callable[[Mapping[int, Row]], None]) -> None:
        """Does the work of several requests at once; if that fails, of each by itself, so that one alone ends."""
        if len(rows) > 1:
            try:
                work(rows)
                return
            except Exception:  # whose it is shows below, and ends that request with its message
                if self._device.lost:
                    raise
        for index, row in rows.items():
            self._guarded(index, row, lambda index, row: work({index: row}))

    def _read_prompts(self) -> None:
        """Reads the next chunk of what rows begin with that do not draw yet; after its last one a row draws."""
        reading = self._to_read()
        self._together({index: row for index, row in reading.items() if row.scored}, self._read)
        for index, row in reading.items():
            if not row.scored:
                self._guarded(index, row, self._score)
        read = {index: row for index, row in reading.items() if row.num_read == len(row.tokens) - 1}
        self._together({index: row for index, row in read.items() if self.seats.rows[index] is row}, self._start)

    def _to_read(self) -> dict[int, Row]:
        """Returns the rows whose turn it is to be read, by slot: the first that came, where others draw."""
        found, left = {}, self._most_read
        others_draw = any(row.drawing for row in self.seats.taken.values())
        for index in self.seats.oldest_first():
            row = self.seats.rows[index]
            if not row.drawing and (left > 0 or not others_draw):
                found[index] = row
                left -= len(self._next_part(index, row).tokens)
        return found

    def _next_part(self, index: int, row: Row) -> Part:
        """Returns what is to be read next, which may be nothing."""
        end = min(row.num_read + self._device.chunks[-1], len(row.tokens) - 1)
        tokens, pages_M = row.tokens[row.num_read : end], self.seats.page_table_BM[index]
        return Part(tokens, pages_M, row.num_read, row.inv_freq_F, row.adapter.index)

    def _read(self, rows: Mapping[int, Row]) -> None:
        parts = {index: self._next_part(index, row) for index, row in rows.items()}
        self._device.read([part for part in parts.values() if part.tokens])
        for index, row in rows.items():
            row.num_read += len(parts[index].tokens)

    def _score(self, index: int, row: Row) -> None:
        """Reads the next chunk of a prompt whose log-probabilities are wanted."""
        part = self._next_part(index, row)
        if part.tokens:
            following = row.tokens[part.start + 1 : part.start + 1 + len(part.tokens)]
            scores = self._device.score(part, following, temperature=row.handle.request.sampling.temperature)
            row.scores.append((len(part.tokens), scores))
            row.num_read += len(part.tokens)

    def _start(self, rows: Mapping[int, Row]) -> None:
        """Lets rows draw whose beginning is read."""
        for index in rows:
            self.seats.keep(index, whole_pages=True)
        self._device.admit([_newcomer(index, row) for index, row in rows.items()])
        for row in rows.values():
            row.drawing, row.longest, row.num_in_flight = True, len(row.tokens), 0

    def _dispatch(self) -> bool:
        """Sends off one block for all slots that draw; returns whether there were any."""
        self._grow()
        drawing = {index: row for index, row in self.seats.taken.items() if row.drawing}
        # What is under way may be all that a row needs; and a guide has to see a token before it knows the next.
        going = {index: row for index, row in drawing.items() if self.seats.longest_next(row) > row.longest}
        masks = self._masks(going)
        going = {index: row for index, row in going.items() if self.seats.rows[index] is row}
        if not going:
            return False
        turns_B = np.full(len(self.seats.rows), -1, np.int32)
        turns_B[[*drawing]] = 0
        # A first token is not kept back for those behind it, unless more rows would lose by that than win.
        num_first = sum(not (row.num_in_flight or row.delivered) for row in going.values())
        is_short = 2 * num_first > len(going)
        for index, row in going.items():
            turns_B[index] = 1 if is_short or row.guide is not None else self._pace.turns
            row.longest = self.seats.longest_next(row)
            row.num_in_flight += 1
        width = self._device.width(max(row.longest for row in drawing.values()))
        adapters = [-1 if row is None else row.adapter.index for row in self.seats.rows]
        packed = self._device.block(self.seats.page_table_BM[:, :width], turns_B, adapters=adapters, masks=masks)
        rows = {index: (row, row.num_turns) for index, row in going.items()}
        self._in_flight.append(_Sent(packed, rows, follows=bool(self._in_flight)))
        return True

    def _masks(self, rows: dict[int, Row]) -> dict[int, np.ndarray]:
        """Returns what guides allow next; a row whose guide fails ends."""
        masks = {}

        def ask(index: int, row: Row) -> None:
            words_W, wanted = np.asarray(row.guide.mask()), -(-self._device.config.vocab_size // 32)
            if words_W.shape != (wanted,) or words_W.dtype != np.uint32:
                raise ValueError(
                    f"a guide's mask must be {wanted} words of uint32, given {words_W.dtype}{words_W.shape}"
                )
            masks[index] = words_W

        for index, row in rows.items():
            if row.guide is not None:
                self._guarded(index, row, ask)
        return masks

    def _grow(self) -> None:
        """Gives every row that draws the pages of its next block, the oldest first; the youngest may have to leave."""
        for index in self.seats.oldest_first():
            if (row := self.seats.rows[index]) is not None and row.drawing:
                self._guarded(index, row, self._make_room)

    def _make_room(self, index: int, row: Row) -> None:
        while self.seats.rows[index] is row and not self.seats.grow(index):
            self._preempt(self.seats.oldest_first()[-1])

    def _preempt(self, index: int) -> None:
        row = self.seats.rows[index]
        with self.wake:
            self._leave(index, whole_pages=True)
            self.queue.appendleft(row)
        row.num_read, row.num_judged, row.drawing, row.scores = 0, 0, False, []
        self.num_preempted += 1

    def _deliver(self, sent: "_Sent") -> None:
        """Hands out the tokens of a block, and frees the slots of rows that are done."""
        block = unpack(np.asarray(sent.packed), num_tokens=self._device.tokens_per_block)
        now = time.monotonic()
        self._pace.ended(now, turns=int(block.turns_B.max()), follows=sent.follows)
        for index, (row, turn) in sent.rows.items():
            if self.seats.rows[index] is not row or row.num_turns != turn:
                continue  # done, aborted or preempted before this block was read
            finish = FINISH_NAMES[block.finish_B[index]]
            event = tokens_event(row.handle.request, block, index, None if finish == "error" else finish)
            row.tokens += event.ids
            row.num_in_flight -= 1
            # Where drafts did not come true it is shorter than it could have been.
            most = 1 if row.guide is not None else self._device.tokens_per_block
            row.longest = min(len(row.tokens) + row.num_in_flight * most, row.total)
            self.num_drawn_tokens += len(event.ids)
            self.num_turns += int(block.turns_B[index])
            if event.ids:
                judged = row.num_cached // self._page_size
                self._device.judge(row.pages[row.num_judged : judged])
                row.num_judged = judged
                self._deliver_scores(row)
                self.clock.delivered(len(event.ids), arrived=row.arrived, before=row.delivered, now=now)
                row.delivered = now
            if finish and finish != "error":
                self._count(row, finish)
                self._device.judge(row.pages)
                self._leave(index, whole_pages=False)
                if row.session is not None:
                    row.session.end(row.tokens)
            if event.ids:
                row.handle.deliver(event)
            if finish == "error":
                self._fail(index, "the model's logits are not finite (NaN or infinite)")
            elif not finish and row.guide is not None:
                self._guarded(index, row, functools.partial(_guide_on, event.ids))

    def _deliver_scores(self, row: Row) -> None:
        """Hands out the scores of a prompt, before its first token."""
        if not row.scored:
            chunks = [unpack_scores(np.asarray(scores)[:count]) for count, scores in row.scores]
            row.handle.deliver(prompt_event(row.handle.request, chunks))
            row.scored, row.scores = True, []

    def _leave(self, index: int, *, whole_pages: bool) -> None:
        """Frees a slot; what its row did so far stays until the pages are needed."""
        self.seats.keep(index, whole_pages=whole_pages)
        self.seats.release(index)

    def _end(self, row: Row, finish: Finish, error: str | None = None) -> None:
        """Ends a request without further tokens. An aborted turn of a session counts as far as it was delivered."""
        if row.session is not None:
            row.session.end(row.tokens if finish == "aborted" and len(row.tokens) > row.num_prompt else None)
        self._count(row, "stop" if finish == "aborted" and row.handle.is_enough else finish)
        row.handle.end(finish, error)

    def _count(self, row: Row, finish: Finish) -> None:
        self.num_ended[finish] += 1
        if finish in ("stop", "length"):
            self.clock.ended(arrived=row.arrived, now=row.delivered or time.monotonic())

    def _fail(self, index: int, error: str) -> None:
        """Ends a request that failed; nobody is to begin with what it left unjudged."""
        row = self.seats.rows[index]
        self.seats.tree.forget(self._device.unjudged(row.pages))
        self.seats.release(index)
        self._end(row, "error", error)

    def _recover(self, error: Exception) -> None:
        """The device state is lost: requests in slots end with the error, those that wait are served afresh."""
        message = f"{type(error).__name__}: {error}"
        rows = list(self.seats.taken.values())
        try:
            self._device.reset()
        except Exception as again:
            with self.wake:
                self.closed = f"the engine stopped: its state could not be made anew: {again} (after {message})"
        self._forget_all()
        for row in rows:
            self._end(row, "error", message)
        if self.closed:
            self.end_all("error", self.closed)

    def end_all(self, finish: Finish, error: str | None) -> None:
        """Ends every request that is not done."""
        for index, row in self.seats.taken.items():
            self.seats.release(index)
            self._end(row, finish, error)
        self._in_flight.clear()
        while self.queue:
            self._end(self.queue.popleft(), finish, error)


def _newcomer(index: int, row: Row) -> Newcomer:
    request = row.handle.request
    return Newcomer(
        slot=index,
        tokens=row.tokens,
        num_prompt=row.num_prompt,
        total=row.total,
        stop_ids=request.stop_ids,
        inv_freq_F=row.inv_freq_F,
        sampling=request.sampling,
        wants_top=bool(request.logprobs),
    )


def _guide_on(ids: Sequence[int], index: int, row: Row) -> None:
    for token in ids:
        row.guide.take(token)
