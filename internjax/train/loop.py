"""The training loop: batches in, a trained state out; metrics, checkpoints and callbacks on the way.

    state = train(state, data, step, num_steps=1000, checkpoints=checkpoints, tracker=run)

The device is kept busy: while it works on one step, the host fetches the batch of the next and reads the metrics of
the one before. Nothing is saved before the metrics of the saved step were read and judged.
"""

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from internjax import sharding
from internjax.train import flops as flops_table
from internjax.train import processes
from internjax.train.batch import Batch
from internjax.train.checkpoint import Checkpoints, latest
from internjax.train.guard import Describe, Guard
from internjax.train.heartbeat import EXIT_PREEMPTED
from internjax.train.profile import ProfileConfig, Profiler
from internjax.train.step import Step, TrainState, put_batch
from internjax.train.tracking import Run
from internjax.train.watch import Fed, Flight, Watch

_WANDB_ID = "wandb_run_id"  # in what a checkpoint holds besides the state

Data = Callable[[int], Iterator[Any]]
"""data(position) -> the batches from that absolute position on; the order depends on nothing but seed and position."""


class Every(NamedTuple):
    """A callback for every `steps` steps and the last one: call(state, step) -> metrics to log with that step, or None.

    The state is donated to the next step, so a callback must not keep its arrays. Metrics go to metrics.jsonl and
    should be deterministic.
    """

    steps: int
    call: Callable[[TrainState, int], dict[str, Any] | None]


def train(
    state: TrainState,
    data: Data,
    step: Step,
    *,
    num_steps: int,
    checkpoints: Checkpoints | None = None,
    tracker: Run | None = None,
    callbacks: Sequence[Every] = (),
    guard: Guard = Guard(),
    describe: Describe | None = None,
    flops: Callable[[Any], float] | None = None,
    peak_flops: float | None = None,
    profile: ProfileConfig = ProfileConfig(),
) -> TrainState:
    """Returns the state after `num_steps` updates, counted from step 0 of the run.

    With checkpoints it goes on from the newest good one (the given state then only says what is wanted, and its arrays
    are freed), saves every `checkpoints.config.every` steps and at the end, and on SIGTERM saves and exits with
    EXIT_PREEMPTED.

    `guard` says what becomes of a step that is not finite (its update is left out in any case, so checkpoints hold
    finite states only) and which losses are reported; `describe(position)` names the documents of a batch for these
    reports. `flops(batch)` counts the operations of a step on the batch that this process reads, `peak_flops` those
    that all devices together can do in a second (by the table of known devices if None): with both, MFU is shown and
    logged.

    Raises FloatingPointError naming step and batch when a loss or gradient is not finite and may not be skipped.
    Raises ValueError when the data ends early or a batch has other shapes than the first.
    """
    if any(callback.steps < 1 for callback in callbacks):
        raise ValueError(f"a callback runs every 1 or more steps; given {[callback.steps for callback in callbacks]}")
    peak_flops = _peak_flops(step) if peak_flops is None else peak_flops
    watch = Watch(tracker, num_steps, guard=guard, describe=describe, peak_flops=peak_flops)
    try:
        state = _resumed(state, checkpoints, tracker, watch)
        first_step = int(state.step)
        profiler = Profiler(profile, tracker and tracker.folder, first_step=first_step, num_steps=num_steps)
        if first_step < num_steps:
            with _sigterm_flag(enabled=checkpoints is not None) as preempted, contextlib.closing(profiler):
                state = _run(
                    state, data, step, num_steps, checkpoints, callbacks, tracker, watch, profiler, flops, preempted
                )
    except BaseException as error:
        # The error at hand is the one to show; a save under way may still end well, and one that does not was told.
        if checkpoints is not None:
            with contextlib.suppress(OSError):
                checkpoints.wait()
        watch.end(error)
        raise
    watch.end()
    return state


def _run(
    state, data, step, num_steps, checkpoints, callbacks, tracker, watch, profiler, flops, preempted
) -> TrainState:
    position = int(state.data_position)
    batches = _device_batches(processes.watched(data), position, step, flops)
    flight: Flight | None = None
    fed = next(batches)
    if profiler.missed:
        watch.progress.note(f"nothing is traced: the run goes on from step {int(state.step)}, after profile.start")
    for index in range(int(state.step) + 1, num_steps + 1):
        compiles = step.num_traces == 0
        profiler.start(index)
        started = time.perf_counter()
        # Whatever goes to the device was put there on purpose; tracing alone makes constants of its own.
        guarded = contextlib.nullcontext() if compiles else jax.transfer_guard("disallow")
        shown = watch.progress.during("compiling the training step") if compiles else contextlib.nullcontext()
        with guarded, shown, jax.profiler.StepTraceAnnotation("train", step_num=index):
            state, metrics = step(state, fed.batch)
        launched = watch.launched(index, position, metrics, fed, started=started, compiles=compiles)
        position += 1
        if index < num_steps:
            fed = next(batches)
        if flight is not None:
            watch.write(flight, watch.read(flight))
        flight = launched

        due = [callback for callback in callbacks if index % callback.steps == 0 or index == num_steps]
        # A signal reaches the processes of a job at different steps; they agree on one.
        asked_to_stop = processes.stop_after(index, preempted.is_set())
        stop = index == num_steps or asked_to_stop
        save = checkpoints is not None and (stop or index % checkpoints.config.every == 0)
        if due or stop or save or profiler.due(index):
            row = watch.read(flight)
            if profiler.due(index):
                watch.progress.note(profiler.stop())
            if due:
                row |= _called(due, state, index, step, watch)
            watch.write(flight, row)
            flight = None
        if checkpoints is not None:
            checkpoints.check()
        if save:
            _save(checkpoints, state, index, tracker, watch)
        if asked_to_stop and index < num_steps:
            with watch.timed("checkpoint", index):
                checkpoints.wait()
            print(f"SIGTERM: step {index} is saved in {checkpoints.folder}; run again to go on", file=sys.stderr)
            raise SystemExit(EXIT_PREEMPTED)
    if checkpoints is not None:
        with watch.timed("checkpoint", num_steps):
            checkpoints.wait()
    return state


def _called(due: Sequence[Every], state: TrainState, index: int, step: Step, watch: Watch) -> dict[str, Any]:
    """Returns the metrics of the callbacks, which run under the mesh."""
    row: dict[str, Any] = {}
    with watch.timed("callbacks", index), contextlib.nullcontext() if step.mesh is None else sharding.use(step.mesh):
        for callback in due:
            row |= callback.call(state, index) or {}
    measured = "  ".join(f"{name} {float(value):.4f}" for name, value in row.items() if name.startswith("eval/"))
    if measured:
        watch.progress.note(f"after step {index}/{watch.num_steps}  {measured}")
    return row


def _resumed(state: TrainState, checkpoints: Checkpoints | None, tracker: Run | None, watch: Watch) -> TrainState:
    """Returns the newest good checkpoint, or `state` where there is none; cuts the metrics to its step."""
    seconds = None
    if checkpoints is not None and processes.first("newest", lambda: latest(checkpoints.folder)) is not None:
        started = time.perf_counter()
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        target = dataclasses.replace(target, frozen=state.frozen)
        # Two states would not fit where one hardly does: the given one goes before the other comes.
        jax.tree.map(lambda x: x.delete(), (state.trainable, state.opt_state))
        state = checkpoints.restore(target)
        seconds = time.perf_counter() - started
        watch.progress.note(f"resumed from step {int(state.step)} in {checkpoints.folder} ({seconds:.1f} s)")
        if tracker is not None:
            tracker.adopt_wandb_id(checkpoints.extra.get(_WANDB_ID))
    watch.start(int(state.step), restore_seconds=seconds)
    return state


def _save(checkpoints: Checkpoints, state: TrainState, index: int, tracker: Run | None, watch: Watch) -> None:
    """Starts a checkpoint; every row up to it is on disk before."""
    watch.sync()
    if tracker is not None and tracker.wandb_id is not None:
        checkpoints.extra[_WANDB_ID] = tracker.wandb_id
    with watch.timed("checkpoint", index):
        checkpoints.save(state)


def _peak_flops(step: Step) -> float | None:
    """Returns the peak of all devices that the step runs on, None where the table has no such device."""
    devices = jax.devices()[:1] if step.mesh is None else list(step.mesh.devices.flat)
    peak = flops_table.peak_flops(devices[0].device_kind)
    return None if peak is None else peak * len(devices)


def _device_batches(data: Data, position: int, step: Step, flops: Callable[[Any], float] | None) -> Iterator[Fed]:
    """Yields the batches on the device, all of the shapes of the first."""
    batches, shapes = data(position), None
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise ValueError(
                f"the data ended before the run: there is no batch at position {position}. "
                "Lower num_steps, or give data that goes on (more epochs)."
            )
        came = time.perf_counter()
        given = jax.tree.map(lambda x: (np.shape(x), str(getattr(x, "dtype", type(x).__name__))), batch)
        if shapes is not None and given != shapes:
            raise ValueError(
                f"the batch at position {position} has the shapes {given}, the step was compiled for {shapes}. "
                "Give every batch one shape: pad or pack rows, and drop a last batch that is not full."
            )
        shapes = given
        placed = put_batch(batch, step.mesh)
        # A process reads its share of the global batch and counts for all.
        share = jax.tree.leaves(placed)[0].size / jax.tree.leaves(batch)[0].size
        num_tokens = round(share * int((batch.segments > 0).sum())) if isinstance(batch, Batch) else 0
        yield Fed(placed, num_tokens, share * flops(batch) if flops else 0.0, came - started, came)
        position += 1


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
