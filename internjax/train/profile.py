"""A trace of chosen steps, written by jax.profiler into the run folder.

--profile.start 10 --profile.steps 3 traces the steps 10, 11 and 12.
"""

import dataclasses
import time
from pathlib import Path

import jax

FOLDER = "profile"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps of which a trace is written to RUN/profile/."""

    start: int | None = None
    """First step to trace (the first of a start of the run compiles); None traces nothing."""
    steps: int | None = None
    """Steps to trace; None: 3."""

    def __post_init__(self):
        if any(value is not None and value < 1 for value in (self.start, self.steps)):
            raise ValueError(f"profile.start and profile.steps must be at least 1; given {self.start}, {self.steps}")
        if self.start is None and self.steps is not None:
            raise ValueError(f"profile.steps={self.steps} traces nothing without profile.start; give it as well")

    @property
    def last(self) -> int:
        """The last step of the trace, 0 without one."""
        return 0 if self.start is None else self.start + (self.steps or 3) - 1


class Profiler:
    """Starts and stops the trace; `start(step)` before a step is launched, `stop(step)` after it has ended."""

    def __init__(self, config: ProfileConfig, folder: Path | None, *, first_step: int, num_steps: int):
        if config.start is not None and folder is None:
            raise ValueError(f"profile.start={config.start} needs a run folder to write to; give a tracker as well")
        if config.last > num_steps:
            raise ValueError(
                f"profile asks for the steps {config.start} to {config.last}, the run has {num_steps}; "
                "lower profile.start or profile.steps"
            )
        self.config = config
        self.missed = config.start is not None and config.start <= first_step
        """The trace lies (in part) before the step that a resumed run goes on from: nothing is traced."""
        self._folder = None if folder is None else folder / FOLDER
        self._running = False

    def start(self, step: int) -> None:
        """Begins the trace if it begins with `step`."""
        if step == self.config.start and not self.missed:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def due(self, step: int) -> bool:
        """Whether the trace ends with `step`, which must have ended on the device before `stop`."""
        return self._running and step == self.config.last

    def stop(self) -> str:
        """Ends the trace; returns where it is and how to look at it."""
        started = time.perf_counter()
        self._running = False
        jax.profiler.stop_trace()
        where = f"steps {self.config.start} to {self.config.last} are traced in {self._folder}"
        return (
            f"{where} (written in {time.perf_counter() - started:.1f} s). Look at it with: pip install xprof && xprof "
            f"--port 6006 {self._folder}   or open its perfetto_trace.json.gz at https://ui.perfetto.dev"
        )

    def close(self) -> None:
        """Ends a trace that an error or a signal cut short."""
        if self._running:
            self.stop()
