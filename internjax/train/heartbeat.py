"""Signs of life between the processes of a job: a peer that died, stopped or hangs ends the job with a message.

Each process publishes what it does, every few seconds, and reads the others'. Four things end it, with `os._exit`,
because its main thread may wait in a collective for ever:

1. A peer left with an error: the same exit code, and the peer's message.
2. The coordinator (process 0) does not answer for `silence` seconds: EXIT_PEER_LOST.
3. A peer has given no sign of life for `silence` seconds (killed, stopped, unreachable): EXIT_PEER_LOST.
4. No step has ended for `step_deadline` seconds: EXIT_PEER_LOST; the message names who is behind, and at what.

Clocks of different machines are never compared: a sign of life is a counter that moves, and a process says itself for
how long it has been at what it does. The same exchange carries the agreement on the step to stop after.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

EXIT_PREEMPTED = 75
"""Exit code after SIGTERM with the state saved (EX_TEMPFAIL of sysexits.h): run the same command again to go on."""
EXIT_PEER_LOST = 76
"""Exit code when a peer died or hangs: run the same command again to go on from the newest checkpoint."""
JOB = "INTERNJAX_JOB"
"""Variable that names a job over all its starts; launchers that start a command again set it."""

_ORDERLY = (0, EXIT_PREEMPTED)


class Beat(NamedTuple):
    """What a process tells the others."""

    count: int
    """Grows with every beat."""
    doing: str
    """In words, for people."""
    step: int | None
    """Batches had, while there is a deadline for the next one."""
    seconds: float
    """For how long it has been at it."""
    granted: int | None = None
    """The last step that it may begin before all have agreed where to stop; None: no stop was asked for."""
    code: int | None = None
    """Its exit code, once it leaves."""
    message: str = ""
    """Why it leaves."""


class Seen(NamedTuple):
    """The last beat of a peer and when (on this clock) its counter moved."""

    beat: Beat
    time: float


class Verdict(NamedTuple):
    """Why this process has to end, and with which exit code."""

    code: int
    message: str


def judge(
    seen: Mapping[int, Seen],
    own: Beat,
    *,
    index: int,
    now: float,
    answered: float,
    silence: float,
    step_deadline: float,
) -> Verdict | None:
    """Returns why the job is lost, or None while it lives. `answered`: when the coordinator answered last."""
    for peer, (beat, _) in sorted(seen.items()):
        if beat.code is not None and beat.code not in _ORDERLY:
            why = f": {beat.message}" if beat.message else ""
            return Verdict(beat.code, f"process {peer} ended with exit code {beat.code}{why}")
    if index and now - answered > silence:
        return Verdict(
            EXIT_PEER_LOST, f"process 0, which coordinates the job, has not answered for {now - answered:.0f} s"
        )
    for peer, (beat, last) in sorted(seen.items()):
        if beat.code is None and now - last > silence:
            return Verdict(
                EXIT_PEER_LOST,
                f"process {peer} has given no sign of life for {now - last:.0f} s (killed, stopped or unreachable); "
                f"the last thing it did: {beat.doing}",
            )
    beats = {index: own} | {peer: beat for peer, (beat, _) in seen.items() if beat.code is None}
    training = {peer: beat for peer, beat in sorted(beats.items()) if beat.step is not None}
    if not training or max(beat.seconds for beat in training.values()) <= step_deadline:
        return None
    least = min(beat.step for beat in training.values())
    late = [peer for peer, beat in training.items() if beat.step == least]
    told = "; ".join(f"process {peer}: {beat.doing}, for {beat.seconds:.0f} s" for peer, beat in training.items())
    behind = "all are equally far" if len(late) == len(training) else f"behind: process {', '.join(map(str, late))}"
    return Verdict(EXIT_PEER_LOST, f"no step has ended for {step_deadline:g} s ({behind}). {told}")


class Heartbeat:
    """The beats of this process and the watch over the others; two daemon threads from `start` to `end`.

    `publish(text)` makes a text readable for all peers, and `read() -> {process: text}` returns what each published
    last; both may block for ever when the coordinator hangs, which is why another thread judges.
    """

    def __init__(
        self,
        publish: Callable[[str], None],
        read: Callable[[], Mapping[int, str]],
        *,
        index: int,
        num_processes: int,
        silence: float,
        step_deadline: float,
    ):
        self._publish, self._read = publish, read
        self._index, self._num = index, num_processes
        self._silence, self._step_deadline = silence, step_deadline
        self._interval = min(2.0, max(0.1, silence / 10))
        self._own = Beat(0, "starting", None, 0.0)
        self._begun = self._answered = time.monotonic()
        self._seen: dict[int, Seen] = {}
        self._granted: int | None = None
        self._asked = self._frozen = False
        self._published = 0
        self._changed = threading.Condition()
        self._wake, self._over = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=target, name="heartbeat", daemon=True) for target in (self._exchange, self._watch)
        ]

    @property
    def seconds_to_judge(self) -> float:
        """How long it may take until a peer that died now is found dead."""
        return self._silence + 3 * self._interval + 1

    def start(self) -> None:
        """Begins to beat and to watch."""
        for thread in self._threads:
            thread.start()

    def doing(self, what: str, step: int | None) -> None:
        """Says what this process does from now on; with a step number, the next must come before the deadline."""
        with self._changed:
            if step is None:
                self._granted = None
            self._own = self._own._replace(doing=what, step=step)
            self._begun = time.monotonic()

    def stop_after(self, step: int, asked: bool) -> bool:
        """Returns whether every process stops after `step`, which this one has begun. Call it after each step.

        Once a process was asked to stop, each tells the last step that it may have begun, and all go on to the highest
        of them: collectives of a step that one process has begun are met by all. Until someone asks nothing waits.
        """
        with self._changed:
            self._asked = self._asked or asked
            if self._asked:
                self._frozen = True
            if not self._frozen:
                self._granted = step + 1
                return False
            if self._granted is None:
                self._granted = step
            if step < self._granted:
                return False
            self._wake.set()
            while True:
                told = [beat.granted for beat, _ in self._seen.values()]
                if len(told) == self._num - 1 and None not in told:
                    return step >= max([self._granted, *told])
                self._changed.wait(1.0)

    def leave(self, code: int, message: str = "") -> None:
        """Tells the others that this process ends. Returns when all end in order too, or at once after an error.

        The coordinator is the last to leave: without it, the others could not even say goodbye.
        """
        with self._changed:
            self._own = self._own._replace(code=code, message=message[:2000], step=None)
            target = self._own.count + 1
            self._wake.set()
            orderly = code in _ORDERLY
            deadline = time.monotonic() + (3.0 if self._index else 5.0 + 3 * self._interval)
            while orderly or time.monotonic() < deadline:
                now = time.monotonic()
                # After an error, a peer that waits to end in order has yet to hear of it; and the other way round.
                gone = [
                    (orderly == (beat.code in _ORDERLY) and beat.code is not None)
                    or (not orderly and now - last > self._silence)
                    for beat, last in self._seen.values()
                ]
                if self._published >= target and ((self._index and not orderly) or sum(gone) == self._num - 1):
                    break
                self._changed.wait(0.1)
        if orderly:
            self._over.set()
            self._wake.set()
            for thread in self._threads:
                thread.join(2 * self._interval)

    def _exchange(self) -> None:
        while not self._over.is_set():
            with self._changed:
                seconds = time.monotonic() - self._begun
                granted = self._granted if self._frozen else None
                self._own = self._own._replace(count=self._own.count + 1, seconds=round(seconds, 1), granted=granted)
                own = self._own
            try:
                self._publish(json.dumps(own))
                texts = self._read()
            except Exception as error:  # the coordinator does not answer: the watch counts for how long
                print(f"heartbeat: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            else:
                self._note(own.count, {peer: Beat(*json.loads(text)) for peer, text in texts.items()})
            self._wake.wait(self._interval)
            self._wake.clear()

    def _note(self, count: int, beats: Mapping[int, Beat]) -> None:
        with self._changed:
            now = self._answered = time.monotonic()
            self._published = count
            for peer, beat in beats.items():
                before = self._seen.get(peer)
                if peer != self._index and (before is None or before.beat.count != beat.count):
                    self._seen[peer] = Seen(beat, now)
            if any(beat.granted is not None for beat, _ in self._seen.values()) and not self._frozen:
                self._frozen = True
                self._wake.set()  # the others wait for this process's word
            self._changed.notify_all()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._interval):
            with self._changed:
                now = time.monotonic()
                if now - looked > self._silence / 2:
                    # This very process was stopped and goes on: the others get their time anew.
                    self._seen = {peer: Seen(beat, now) for peer, (beat, _) in self._seen.items()}
                    self._answered = self._begun = now
                looked = now
                if self._own.code not in (None, *_ORDERLY):
                    continue  # this process is ending; that the others follow is no news
                verdict = judge(
                    self._seen,
                    self._own._replace(seconds=now - self._begun),
                    index=self._index,
                    now=now,
                    answered=self._answered,
                    silence=self._silence,
                    step_deadline=self._step_deadline,
                )
            if verdict is not None:
                self.end_now(verdict.code, verdict.message)

    def end_now(self, code: int, message: str) -> NoReturn:
        """Ends this process at once with a message, which the others are told too."""
        print(f"process {self._index} ends: {message}", file=sys.stderr, flush=True)
        self.leave(code, message)
        sys.stdout.flush()
        os._exit(code)
