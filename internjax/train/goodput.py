"""Where the time of a run went, over all its starts: a pure function of the rows of RUN/timing.jsonl.

Every row has "at", the Unix time at which it was written. A start of the run leaves, in this order:

    start       step: it goes on from. seconds: from the first line of the program that asked for the time to the loop,
                reading back a checkpoint included
    restore     seconds of reading back that checkpoint (only where there is one)
    compile     the first step: tracing, compiling and running it
    (no event)  step, steps: steps since the row before. seconds: of these steps, of which input_wait waited for data
                while the device had nothing to do
    checkpoint  seconds for which the loop stood still to save;    callbacks  likewise for samples and evaluation
    end         reason: complete, preempted, or the name of an error. A process that was killed leaves none.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

EVENTS = {"compile": "compile", "checkpoint": "checkpoint", "restore": "restore", "callbacks": "callbacks"}


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Seconds of wall time by what they were spent on; they sum to `wall`."""

    compute: float = 0.0
    """Steps that count: those whose result is in the run."""
    input_wait: float = 0.0
    """The device waited for data."""
    checkpoint: float = 0.0
    """The loop stood still to save."""
    callbacks: float = 0.0
    """Samples and evaluation during training."""
    compile: float = 0.0
    """First step of every start: tracing, compiling and running it."""
    restore: float = 0.0
    """Reading a checkpoint back."""
    start_up: float = 0.0
    """From the start of the program to the loop, without reading a checkpoint back."""
    lost: float = 0.0
    """Steps that a later start did again, because they were not saved."""
    down: float = 0.0
    """Between the last sign of life of one start and the beginning of the next."""
    other: float = 0.0
    """All else: the host between steps, writing a trace, the end of a run."""
    wall: float = 0.0
    num_starts: int = 0
    num_lost_steps: int = 0

    @property
    def goodput(self) -> float:
        """Share of the wall time spent on steps that count."""
        return self.share("compute")

    def share(self, name: str) -> float:
        """Returns the share of the wall time that the field `name` took."""
        return getattr(self, name) / self.wall if self.wall else 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns goodput, wall seconds, starts, and seconds and share of every kind."""
        kinds = [field.name for field in dataclasses.fields(self) if field.name not in _TOTALS]
        return {
            "goodput": round(self.goodput, 4),
            "wall_seconds": round(self.wall, 3),
            "num_starts": self.num_starts,
            "num_lost_steps": self.num_lost_steps,
            "seconds": {name: round(getattr(self, name), 3) for name in kinds},
            "shares": {name: round(self.share(name), 4) for name in kinds},
        }


_TOTALS = ("wall", "num_starts", "num_lost_steps")


def goodput(rows: Iterable[Mapping[str, Any]]) -> Goodput:
    """Returns how the wall time from the first start to the last row was spent; empty for rows without a start."""
    starts = _starts(rows)
    sums = dict.fromkeys((field.name for field in dataclasses.fields(Goodput)), 0.0)
    num_lost = 0.0
    for index, attempt in enumerate(starts):
        redone_from = min((later[0]["step"] for later in starts[index + 1 :]), default=None)
        begin, end = _begin(attempt), attempt[-1]["at"]
        spent = dict.fromkeys(sums, 0.0)
        spent["start_up"] = attempt[0]["seconds"]
        for row in attempt[1:]:
            event = row.get("event")
            if event in EVENTS:
                spent[EVENTS[event]] += row["seconds"]
            elif event is None:
                redone = 0 if redone_from is None else min(row["steps"], max(0, row["step"] - redone_from))
                kept = 1 - redone / row["steps"]
                spent["compute"] += kept * (row["seconds"] - row["input_wait"])
                spent["input_wait"] += kept * row["input_wait"]
                spent["lost"] += (1 - kept) * row["seconds"]
                num_lost += redone
            if event == "compile" and redone_from is not None and row["step"] > redone_from:
                num_lost += 1  # its time is that of compilation
        spent["start_up"] -= spent["restore"]  # which lies within it
        spent["wall"] = end - begin
        spent["other"] = max(0.0, spent["wall"] - sum(spent[name] for name in spent if name not in _TOTALS))
        sums = {name: sums[name] + spent[name] for name in sums}
        if index + 1 < len(starts):
            sums["down"] += max(0.0, _begin(starts[index + 1]) - end)
    sums["wall"] += sums["down"]
    return Goodput(**sums | {"num_starts": len(starts), "num_lost_steps": round(num_lost)})


def _begin(attempt: Sequence[Mapping[str, Any]]) -> float:
    return attempt[0]["at"] - attempt[0]["seconds"]


def _starts(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Returns the rows of each start; rows before the first one are of no start and are left out."""
    found: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if row.get("event") == "start":
            found.append([row])
        elif found:
            found[-1].append(row)
    return found
