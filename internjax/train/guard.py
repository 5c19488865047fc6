"""The guard over a run's losses: what is done with a step that is not finite, which losses are reported as spikes.

The step itself leaves a non-finite update out (`train.step`); here it is decided whether the run goes on. Every
incident is one row of RUN/incidents.jsonl. What is decided depends on rows of the run folder alone (losses of logged
steps, incidents before), so that a resumed run reports exactly what the run that was not stopped reports.
"""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

NOT_FINITE, SPIKE = "not_finite", "spike"
QUIET_STEPS = 10
"""Steps after a reported spike in which only a higher loss is reported again."""
MAX_DOCUMENTS = 256
"""Documents that an incident names; how many there were is told as well."""
_SIGMAS_PER_DEVIATION = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_LEAST_SCALE = 0.01  # of the median: where losses hardly vary, a spike rises by at least spike_z hundredths

Describe = Callable[[int], Sequence[str]]
"""describe(position) -> the documents of the batch at that data position."""


@dataclasses.dataclass(frozen=True)
class Guard:
    """What a run does when a loss or gradient is not finite, and which losses it reports as spikes."""

    not_finite: Literal["stop", "skip"] = "stop"
    """End the run, or leave the batch out and go on; either way it is reported with the documents of its batch."""
    max_skipped: int = 10
    """Steps in a row that may be skipped; one more ends the run."""
    spike_z: float | None = 8.0
    """Robust deviations above the median of recent losses from which a loss is reported; None reports none."""
    spike_window: int = 64
    """Logged losses that a loss is compared with; from half of them on it is judged."""

    def __post_init__(self):
        if self.max_skipped < 0 or self.spike_window < 4 or (self.spike_z is not None and self.spike_z <= 0):
            raise ValueError(
                "guard.max_skipped must be at least 0, guard.spike_window at least 4 and guard.spike_z above 0 (or "
                f"None, which reports no spike); given {self}"
            )


class Rise(NamedTuple):
    """How far a loss lies above the losses before it."""

    median: float
    z: float


def rise(loss: float, losses: Sequence[float]) -> Rise:
    """Returns z = (loss - median) / max(1.4826 MAD, 0.01 |median|), MAD the median of |loss_i - median|."""
    median = statistics.median(losses)
    deviation = statistics.median(abs(value - median) for value in losses)
    scale = max(_SIGMAS_PER_DEVIATION * deviation, _LEAST_SCALE * abs(median))
    return Rise(median, (loss - median) / scale if scale else 0.0)


class Judge:
    """Judges the steps of a run in their order; `resume` puts it where it was after a step."""

    def __init__(self, guard: Guard, *, log_every: int = 1, describe: Describe | None = None):
        self.num_skipped = 0
        """Steps in a row that were not finite, up to now."""
        self._guard = guard
        self._log_every = log_every
        self._describe = describe
        self._losses: deque[float] = deque(maxlen=guard.spike_window)
        self._last_spike: tuple[int, float] | None = None

    def resume(self, step: int, metrics: Iterable[Mapping], incidents: Iterable[Mapping]) -> None:
        """Takes the state that it had after `step` from the rows of the run folder."""
        rows = [row for row in metrics if row["step"] <= step and row["step"] % self._log_every == 0]
        self._losses.extend(row["loss"] for row in rows if row.get("loss") is not None)
        skipped = set()
        for row in incidents:
            if row["step"] <= step and row["incident"] == SPIKE:
                self._last_spike = row["step"], row["loss"]
            elif row["step"] <= step:
                skipped.add(row["step"])
        self.num_skipped = next(count for count in range(len(skipped) + 1) if step - count not in skipped)

    def incident(self, step: int, position: int, metrics: Mapping[str, Any], *, finite: bool) -> dict | None:
        """Returns the row of what went wrong in a step, or None when nothing did."""
        self.num_skipped = 0 if finite else self.num_skipped + 1
        row = None
        if not finite:
            layer = metrics.get("broken_layer", -1)
            row = {"step": step, "incident": NOT_FINITE, "position": position} | _told(metrics)
            row |= {"layer": layer} if layer >= 0 else {}
        if finite:
            row = self._spike(step, position, metrics)
            if step % self._log_every == 0:
                self._losses.append(metrics["loss"])
        if row is not None and self._describe is not None:
            documents = list(self._describe(position))
            row |= {"num_documents": len(documents), "documents": documents[:MAX_DOCUMENTS]}
        return row

    def ends_the_run(self) -> bool:
        """Whether the last step was not finite and may not be skipped."""
        allowed = 0 if self._guard.not_finite == "stop" else self._guard.max_skipped
        return self.num_skipped > allowed

    def _spike(self, step: int, position: int, metrics: Mapping[str, Any]) -> dict | None:
        if self._guard.spike_z is None or len(self._losses) < self._guard.spike_window / 2:
            return None
        loss, found = metrics["loss"], rise(metrics["loss"], self._losses)
        if found.z < self._guard.spike_z:
            return None
        if self._last_spike is not None:
            last, highest = self._last_spike
            if step - last <= QUIET_STEPS and loss <= highest:
                return None
        self._last_spike = step, loss
        told = {"median": found.median, "z": round(found.z, 3)}
        return {"step": step, "incident": SPIKE, "position": position} | _told(metrics) | told


def sentence(row: Mapping[str, Any]) -> str:
    """Returns an incident in words, for a person."""
    if row["incident"] == SPIKE:
        above = f"{row['z']:.1f} robust deviations above the median {row['median']:.4g}"
        what = f"has a loss spike: {row['loss']:.4g} is {above}"
    else:
        what = f"is not finite ({', '.join(f'{name} {row[name]}' for name in ('loss', 'grad_norm', 'weight'))})"
        what += f", from the output of layer {row['layer']} on (counted from 0)," if "layer" in row else ""
    documents = row.get("documents", [])
    more = row.get("num_documents", 0) - 3
    named = f": {'; '.join(documents[:3])}{f' and {more} more' if more > 0 else ''}" if documents else ""
    return f"step {row['step']} {what} on the batch at data position {row['position']}{named}"


def _told(metrics: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no word for what is not finite, so that it is written as text.
    values = {name: metrics[name] for name in ("loss", "grad_norm", "weight")}
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
