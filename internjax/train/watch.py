"""Reads a run's metrics off the device, has them judged, writes them, and keeps the times.

Time is told by when the device was done, not by when the host asked: a thread waits for each step and looks at the
clock. A step's `seconds` are those that the device worked on it and those that it stood still because the host waited
for the step's batch (`input_wait`). Standing still for anything else (saving, callbacks) has a row of its own.

A step that had ended before a busy host let the thread come to wait for it seems to have taken no time, and the one
before it too much: their sum is right, but of such a step no speed is told.
"""

import concurrent.futures
import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from internjax.train.goodput import goodput
from internjax.train.guard import Describe, Guard, Judge, sentence
from internjax.train.progress import Progress, memory_in_use
from internjax.train.step import STEP_METRICS
from internjax.train.tracking import GOODPUT, INCIDENTS, METRICS, TIMING, Run, is_primary, read_rows


class Fed(NamedTuple):
    """A batch on the device, and what is known of it."""

    batch: Any
    num_tokens: int
    """Tokens of the global batch that are not padding; 0 where the batch is no `Batch`."""
    flops: float
    """Floating-point operations of a step on it; 0 where nobody counts them."""
    wait: float
    """Seconds for which the host waited for it."""
    came: float
    """When it came, by `time.perf_counter`."""


class _Done(NamedTuple):
    """When the device was done with a step, and whether it may have been so before."""

    time: float
    late: bool


class Flight(NamedTuple):
    """A step that was given to the device and whose metrics were not read yet."""

    step: int
    position: int
    metrics: dict[str, jax.Array]
    num_tokens: int
    flops: float
    input_wait: float
    came: float
    started: float
    done: "concurrent.futures.Future[_Done]"
    compiles: bool


class _Sums(NamedTuple):
    """Of the steps since the last row of timing.jsonl."""

    steps: int = 0
    seconds: float = 0.0
    input_wait: float = 0.0
    tokens: int = 0
    flops: float = 0.0


class Watch:
    """What is seen of one start of a run, from `__init__` to `end`."""

    def __init__(
        self,
        tracker: Run | None,
        num_steps: int,
        *,
        guard: Guard = Guard(),
        describe: Describe | None = None,
        peak_flops: float | None = None,
    ):
        self._tracker = tracker
        self.num_steps = num_steps
        self._peak_flops = peak_flops
        self._log_every = tracker.tracking.log_every if tracker else 1
        self._judge = Judge(guard, log_every=self._log_every, describe=describe if is_primary() else None)
        self._clock = concurrent.futures.ThreadPoolExecutor(1, "clock")
        self._idle_since: float | None = None
        self._recent: deque[_Sums] = deque(maxlen=50)
        self._ends: deque[float] = deque(maxlen=200)
        self._sums, self._last_read = _Sums(), 0
        self._begun = tracker.take_begin() if tracker else time.time()
        self._started = False
        mode = tracker.tracking.progress if tracker else "auto"
        self.progress = Progress(num_steps, mode, shown=is_primary())

    def start(self, step: int, *, restore_seconds: float | None) -> None:
        """Cuts the rows after `step`, from which the run goes on, and puts the judge where it was then."""
        if self._tracker is not None:
            self._tracker.cut(step)
            folder = self._tracker.folder
            self._judge.resume(step, read_rows(folder / METRICS), read_rows(folder / INCIDENTS))
        self._started, self._last_read = True, step
        self.time({"event": "start", "step": step, "seconds": round(time.time() - self._begun, 3)})
        if restore_seconds is not None:
            self.time({"event": "restore", "step": step, "seconds": round(restore_seconds, 3)})
        self.progress.start(step)

    def end(self, error: BaseException | None = None) -> None:
        """Writes what is still to be told, and where the time went; `error` is what ended the run, if anything did."""
        self.progress.close()
        self._clock.shutdown(wait=error is None, cancel_futures=True)
        if self._tracker is None or not self._started:
            return
        self._write_times(self._last_read)
        reason = "complete" if error is None else "preempted" if isinstance(error, SystemExit) else type(error).__name__
        self.time({"event": "end", "reason": reason})
        self._tracker.sync()
        spent = goodput(read_rows(self._tracker.folder / TIMING)).to_json()
        self._tracker.write_json(GOODPUT, spent)
        self._tracker.summarise({"goodput": spent["goodput"]} | {f"goodput/{k}": v for k, v in spent["shares"].items()})

    def time(self, row: dict) -> None:
        """Writes a row of timing.jsonl."""
        if self._tracker is not None:
            self._tracker.time(row)

    @contextlib.contextmanager
    def timed(self, event: str, step: int) -> Iterator[None]:
        """Writes an event with the seconds that the block took, also of one that raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.time({"event": event, "step": step, "seconds": round(time.perf_counter() - started, 6)})

    def launched(self, step: int, position: int, metrics: dict, fed: Fed, *, started: float, compiles: bool) -> Flight:
        """Returns the flight of a step that was just given to the device."""
        done = self._clock.submit(_awaited, metrics)
        return Flight(step, position, metrics, fed.num_tokens, fed.flops, fed.wait, fed.came, started, done, compiles)

    def read(self, flight: Flight) -> dict[str, Any]:
        """Returns the row of a step once the device has it.

        Its loss is None when the step was skipped; raises FloatingPointError when it may not be.
        """
        metrics = {name: value.item() for name, value in jax.device_get(flight.metrics).items()}
        self._count(flight)
        finite = metrics.pop("finite")
        incident = self._judge.incident(flight.step, flight.position, metrics, finite=finite)
        metrics.pop("broken_layer", None)  # of a healthy step there is nothing to tell
        if incident is not None:
            self._report(incident)
        if self._judge.ends_the_run():
            raise FloatingPointError(_not_finite(incident, self._judge.num_skipped, self._tracker))
        if not finite:
            metrics["loss"] = metrics["grad_norm"] = None
        names = [name for name in STEP_METRICS if name in metrics]
        return {name: metrics[name] for name in [*names, *sorted(set(metrics) - set(names))]}

    def write(self, flight: Flight, row: dict[str, Any]) -> None:
        """Writes the row of a step and moves the progress on."""
        if self._tracker is not None and self._logged(flight.step):
            self._tracker.log(flight.step, row)
        spent = sum(each.seconds for each in self._recent)
        # Between the ends of steps lies all that a run does, saving and evaluation too.
        per_step = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else None
        self.progress.update(
            flight.step,
            row,
            tokens_per_second=sum(each.tokens for each in self._recent) / spent if spent else 0.0,
            seconds_left=None if per_step is None else per_step * (self.num_steps - flight.step),
            mfu=self._mfu(sum(each.flops for each in self._recent), spent),
        )

    def sync(self) -> None:
        """Returns when every row so far is on disk."""
        if self._tracker is not None:
            self._tracker.sync()

    def _count(self, flight: Flight) -> None:
        """Counts the time of a step, and writes it with that of the steps since the last row."""
        (done, late), before = flight.done.result(), self._idle_since
        self._idle_since, self._last_read = done, flight.step
        self._ends.append(done)
        if flight.compiles:
            # The first step is mostly compilation: it is shown by itself and never counted as throughput.
            seconds = done - flight.started
            self.progress.note(f"compiled and took the first step in {seconds:.1f} s")
            self.time({"event": "compile", "step": flight.step, "seconds": round(seconds, 6)})
            return
        # Of the wait for its batch counts what the device waited too: before, it worked on the step before.
        waited = 0.0 if before is None else min(flight.input_wait, max(0.0, flight.came - before))
        seconds = done - max(before or 0.0, flight.started) + waited
        step = _Sums(1, seconds, waited, flight.num_tokens, flight.flops)
        self._recent.append(step)
        self._sums = _Sums(*(total + new for total, new in zip(self._sums, step, strict=True)))
        if self._logged(flight.step):
            self._write_times(flight.step, timed=not (late and before is not None and before > flight.started))

    def _write_times(self, step: int, *, timed: bool = True) -> None:
        sums, self._sums = self._sums, _Sums()
        if not sums.steps:
            return
        row = {"step": step, "steps": sums.steps, "seconds": round(sums.seconds, 6)}
        row["input_wait"] = round(sums.input_wait, 6)
        row |= {"tokens": sums.tokens} if sums.tokens else {}
        if timed or sums.steps > 1:
            row |= {"tokens_per_second": round(sums.tokens / sums.seconds, 1)} if sums.tokens else {}
            mfu = self._mfu(sums.flops, sums.seconds)
            row |= {} if mfu is None else {"mfu": round(mfu, 5)}
        memory = memory_in_use()
        self.time(row | {f"{memory.where}_memory_bytes": memory.num_bytes})

    def _mfu(self, flops: float, seconds: float) -> float | None:
        return flops / seconds / self._peak_flops if flops and seconds and self._peak_flops else None

    def _report(self, incident: dict[str, Any]) -> None:
        where = ""
        if self._tracker is not None:
            self._tracker.report(incident)
            where = f" (see {self._tracker.folder / INCIDENTS})"
        if is_primary() and not self._judge.ends_the_run():
            skipped = " The batch is skipped." if incident["incident"] == "not_finite" else ""
            print(f"{sentence(incident)}.{skipped}{where}", file=sys.stderr, flush=True)

    def _logged(self, step: int) -> bool:
        return step % self._log_every == 0 or step == self.num_steps


def _awaited(metrics: dict[str, jax.Array]) -> _Done:
    late = all(value.is_ready() for value in metrics.values())
    jax.block_until_ready(metrics)
    return _Done(time.perf_counter(), late)


def _not_finite(incident: dict[str, Any], num_skipped: int, tracker: Run | None) -> str:
    if incident["weight"] == 0:
        cause = "The batch has nothing to learn: its loss mask is zero everywhere. Look at the data and its masks"
    else:
        cause = "Look at the batch, lower the learning rate, warm up longer, or clip gradients"
    if num_skipped > 1:
        remedy = f"{cause}. It is the {num_skipped}th step in a row that is not finite: more than guard.max_skipped."
    else:
        remedy = f"{cause}; guard.not_finite=skip leaves such a batch out and goes on."
    where = "" if tracker is None else f" All documents of the batch are in {tracker.folder / INCIDENTS}."
    named = where if incident.get("documents") else ""
    return f"{sentence(incident)}. The update was left out and nothing of it is saved. {remedy}{named}"
