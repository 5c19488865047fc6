"""The training loop: batches in, a trained state out; metrics, checkpoints and callbacks on the way.

    state = train(state, data, step, num_steps=1000, checkpoints=checkpoints, tracker=run)

The device is kept busy: while it works on one step, the host fetches the batch of the next and reads the metrics of
the one before. Nothing is saved before the metrics of the saved step were read and found finite.
"""

import contextlib
import dataclasses
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from internjax import sharding
from internjax.train.batch import Batch
from internjax.train.checkpoint import Checkpoints, latest
from internjax.train.step import STEP_METRICS, Step, TrainState, put_batch
from internjax.train.tracking import Progress, Run

EXIT_PREEMPTED = 75
"""Exit code after SIGTERM with the state saved (EX_TEMPFAIL of sysexits.h): run the same command again to go on."""

Data = Callable[[int], Iterator[Any]]
"""data(position) -> the batches from that absolute position on; the order depends on nothing but seed and position."""


class Every(NamedTuple):
    """A callback for every `steps` steps: call(state, step) -> metrics to log with that step, or None.

    The state is donated to the next step, so a callback must not keep its arrays. Metrics go to metrics.jsonl and
    should be deterministic.
    """

    steps: int
    call: Callable[[TrainState, int], dict[str, Any] | None]


class _Flight(NamedTuple):
    """A step that was given to the device and whose metrics were not read yet."""

    step: int
    position: int
    metrics: dict[str, jax.Array]
    num_tokens: int
    started: float
    input_wait: float
    compiles: bool


def train(
    state: TrainState,
    data: Data,
    step: Step,
    *,
    num_steps: int,
    checkpoints: Checkpoints | None = None,
    tracker: Run | None = None,
    callbacks: Sequence[Every] = (),
) -> TrainState:
    """Returns the state after `num_steps` updates, counted from step 0 of the run.

    With checkpoints it goes on from the newest good one (the given state then only says what is wanted, and its arrays
    are freed), saves every `checkpoints.config.every` steps and at the end, and on SIGTERM saves and exits with
    EXIT_PREEMPTED. Raises FloatingPointError naming step and batch when a loss or gradient is not finite: the update
    was left out, and checkpoints hold finite states only. Raises ValueError when the data ends early or a batch has
    other shapes than the first.
    """
    if any(callback.steps < 1 for callback in callbacks):
        raise ValueError(f"a callback runs every 1 or more steps; given {[callback.steps for callback in callbacks]}")
    watch = _Watch(tracker, num_steps)
    try:
        state = _resumed(state, checkpoints, tracker, watch)
        first_step = int(state.step)
        if first_step >= num_steps:
            return state
        watch.progress.start(first_step)
        with _sigterm_flag(enabled=checkpoints is not None) as preempted:
            state = _run(state, data, step, num_steps, checkpoints, callbacks, watch, preempted)
    except BaseException:
        # The error at hand is the one to show; a save under way may still end well, and one that does not was told.
        if checkpoints is not None:
            with contextlib.suppress(OSError):
                checkpoints.wait()
        raise
    finally:
        watch.end()
    return state


def _run(state, data, step, num_steps, checkpoints, callbacks, watch, preempted) -> TrainState:
    position = int(state.data_position)
    batches = _device_batches(data, position, step)
    flight: _Flight | None = None
    batch, num_tokens, input_wait = next(batches)
    for index in range(int(state.step) + 1, num_steps + 1):
        compiles = step.num_traces == 0
        if compiles:
            watch.progress.note("compiling the training step ...")
        started = time.perf_counter()
        # Whatever goes to the device was put there on purpose; tracing alone makes constants of its own.
        with contextlib.nullcontext() if compiles else jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        launched = _Flight(index, position, metrics, num_tokens, started, input_wait, compiles)
        position += 1
        if index < num_steps:
            batch, num_tokens, input_wait = next(batches)
        if flight is not None:
            watch.write(flight, watch.read(flight))
        flight = launched

        due = [callback for callback in callbacks if index % callback.steps == 0]
        asked_to_stop = preempted.is_set()
        stop = index == num_steps or asked_to_stop
        save = checkpoints is not None and (stop or index % checkpoints.config.every == 0)
        if due or stop or save:
            row = watch.read(flight)
            with contextlib.nullcontext() if step.mesh is None else sharding.use(step.mesh):
                for callback in due:
                    row |= callback.call(state, index) or {}
            watch.write(flight, row)
            flight = None
        if checkpoints is not None:
            checkpoints.check()
        if save:
            watch.save(checkpoints, state, index)
        if asked_to_stop and index < num_steps:
            checkpoints.wait()
            print(f"SIGTERM: step {index} is saved in {checkpoints.folder}; run again to go on", file=sys.stderr)
            raise SystemExit(EXIT_PREEMPTED)
    if checkpoints is not None:
        checkpoints.wait()
    return state


def _resumed(state: TrainState, checkpoints: Checkpoints | None, tracker: Run | None, watch: "_Watch") -> TrainState:
    """Returns the newest good checkpoint, or `state` where there is none; cuts the metrics to its step."""
    if checkpoints is not None and latest(checkpoints.folder) is not None:
        started = time.perf_counter()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        target = dataclasses.replace(target, frozen=state.frozen)
        # Two states would not fit where one hardly does: the given one goes before the other comes.
        jax.tree.map(lambda x: x.delete(), (state.trainable, state.opt_state))
        state = checkpoints.restore(target)
        seconds = time.perf_counter() - started
        watch.progress.note(f"resumed from step {int(state.step)} in {checkpoints.folder} ({seconds:.1f} s)")
        watch.time({"event": "restore", "step": int(state.step), "seconds": round(seconds, 3)})
    if tracker is not None:
        tracker.cut(int(state.step))
    return state


class _Watch:
    """Reads metrics off the device, judges and writes them, and keeps the times."""

    def __init__(self, tracker: Run | None, num_steps: int):
        self._tracker = tracker
        self._num_steps = num_steps
        self._ready = 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=50)
        self.progress = Progress(num_steps, tracker.tracking.progress if tracker else "auto")
        self._log_every = tracker.tracking.log_every if tracker else 1

    def end(self) -> None:
        self.progress.close()
        if self._tracker is not None:
            self._tracker.sync()

    def time(self, row: dict) -> None:
        if self._tracker is not None:
            self._tracker.time(row)

    def read(self, flight: _Flight) -> dict[str, Any]:
        """Returns the metrics of a step once the device has them; raises FloatingPointError for a step that failed."""
        metrics = jax.device_get(flight.metrics)
        ready = time.perf_counter()
        seconds = ready - max(self._ready, flight.started)
        self._ready = ready
        if not metrics.pop("finite"):
            raise FloatingPointError(_not_finite(flight, metrics))
        row = {"step": flight.step, "seconds": round(seconds, 6), "input_wait": round(flight.input_wait, 6)}
        if flight.compiles:
            # The first step is mostly compilation: it is shown by itself and never counted as throughput.
            self.progress.note(f"compiled and took the first step in {seconds:.1f} s")
            self.time({"event": "compile"} | row)
        else:
            self._recent.append((seconds, flight.num_tokens))
            if flight.num_tokens:
                row |= {"tokens": flight.num_tokens, "tokens_per_second": round(flight.num_tokens / seconds, 1)}
            if self._logged(flight.step):
                self.time(row)
        names = [name for name in STEP_METRICS if name in metrics]
        return {name: metrics[name].item() for name in [*names, *sorted(set(metrics) - set(names))]}

    def write(self, flight: _Flight, row: dict[str, Any]) -> None:
        """Writes the row of a step and moves the progress on."""
        if self._tracker is not None and self._logged(flight.step):
            self._tracker.log(flight.step, row)
        spent = sum(seconds for seconds, _ in self._recent)
        per_step = statistics.median(seconds for seconds, _ in self._recent) if self._recent else 0.0
        self.progress.update(
            flight.step,
            row,
            tokens_per_second=sum(tokens for _, tokens in self._recent) / spent if spent else 0.0,
            seconds_left=per_step * (self._num_steps - flight.step),
        )

    def save(self, checkpoints: Checkpoints, state: TrainState, step: int) -> None:
        """Starts a checkpoint; every metric row up to it is on disk before."""
        if self._tracker is not None:
            self._tracker.sync()
        started = time.perf_counter()
        checkpoints.save(state)
        self.time({"event": "checkpoint", "step": step, "seconds": round(time.perf_counter() - started, 6)})

    def _logged(self, step: int) -> bool:
        return step % self._log_every == 0 or step == self._num_steps


def _device_batches(data: Data, position: int, step: Step) -> Iterator[tuple[Any, int, float]]:
    """Yields (batch on the device, its tokens, seconds waited for the data), all of the shapes of the first."""
    batches, shapes = data(position), None
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"the data ended before the run: there is no batch at position {position}. "
                "Lower num_steps, or give data that goes on (more epochs)."
            )
        waited = time.perf_counter() - started
        given = jax.tree.map(lambda x: (np.shape(x), str(getattr(x, "dtype", type(x).__name__))), batch)
        if shapes is not None and given != shapes:
            raise ValueError(
                f"the batch at position {position} has the shapes {given}, the step was compiled for {shapes}. "
                "Give every batch one shape: pad or pack rows, and drop a last batch that is not full."
            )
        shapes = given
        num_tokens = int((batch.segments > 0).sum()) if isinstance(batch, Batch) else 0
        yield put_batch(batch, step.mesh), num_tokens, waited
        position += 1


def _not_finite(flight: _Flight, metrics: dict[str, Any]) -> str:
    values = ", ".join(f"{name} {metrics[name]}" for name in ("loss", "grad_norm", "weight"))
    if metrics["weight"] == 0:
        cause = "The batch has nothing to learn: its loss mask is zero everywhere. Look at the data and its masks."
    else:
        cause = "Look at the batch, lower the learning rate, warm up longer, or clip gradients."
    return (
        f"step {flight.step} is not finite ({values}) on the batch at data position {flight.position}. The update was "
        f"left out and nothing of it is saved. {cause}"
    )


@contextlib.contextmanager
def _sigterm_flag(*, enabled: bool) -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, for as long as the loop runs (signals reach the main thread only)."""
    asked = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
