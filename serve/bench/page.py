"""The files of a benchmark: bench.json, bench.csv and load.csv with LMDeploy's columns, bench.html and bench.md."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from internjax.chart import Lines
from internjax.report import Code, Number, Numbers, Section, Table, Text, write
from serve.bench.runs import Cell, Latency, Load, PrefixHit, Turn

SESSION_GOAL = 1.2
"""Of the ratio of a later turn's first-token time to the first turn's."""

_FIRST = ("FTL(ave)(s)", "FTL(min)(s)", "FTL(max)(s)")
_PER_TOKEN = ("50%(s)", "75%(s)", "95%(s)", "99%(s)")
_FIRST_PERCENTILES = ("FTL(50%)(s)", "FTL(75%)(s)", "FTL(95%)(s)", "FTL(99%)(s)")
# The first twelve, and the first thirteen of the other table, are LMDeploy's, in its order.
CELL_COLUMNS = (
    "batch", "prompt_tokens", "completion_tokens", "throughput(out tok/s)", "mem(GB)", *_FIRST, *_PER_TOKEN,
    "decode(out tok/s)", *_FIRST_PERCENTILES, "step(GB)", "ceiling(out tok/s)", "fraction",
)  # fmt: skip
LOAD_COLUMNS = (
    "batch", "num_prompts", "RPS", "RPM", *_FIRST, *_PER_TOKEN, "throughput(out tok/s)", "throughput(total tok/s)",
    "rate(/s)", "prompt_tokens", "output_tokens", *_FIRST_PERCENTILES,
)  # fmt: skip

_NOTES = (
    "Prompts are random ids and no two begin alike: no cell profits from an earlier one. Requests have no stop ids, so "
    "every answer has the length that is asked for. The first round of every cell warms up and is not counted.\n\n"
    "FTL is the time until the first tokens of a request were there, its waiting included. Percentiles without a name "
    "are seconds per token after that: the time since the event before, divided by the tokens that came together. "
    "`throughput` counts from the first request to the last token; `decode` only the time in which all rows drew."
)
_CEILING = (
    "Ceiling = batch x copy bandwidth / bytes of a step; a step must read the weights (without the embedding table) "
    "and the keys and values of every row at the cell's mean context, prompt + completion / 2. The bandwidth is that "
    "of a large array's copy on this device, reads and writes counted. Replicas count as if all "
    "had the rows of the fullest, and their bandwidths add up. A model that fits into the processor's caches "
    "can pass it."
)


class Setup(NamedTuple):
    """What is measured, and with what."""

    about: Mapping[str, Any]
    """Of the model, the machine and the versions."""
    slots: int | None
    """Requests that are served at once; None where a server does not say it."""
    bandwidth: float | None
    """Bytes per second."""


@dataclass
class Results:
    """What was measured so far."""

    cells: list[Cell] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    prefixes: list[PrefixHit] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)


def write_files(folder: Path, setup: Setup, results: Results) -> None:
    """Writes all files of a benchmark into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**setup.about, "slots": setup.slots, "copy_bytes_per_second": setup.bandwidth}
    values |= {name: [_plain(each) for each in getattr(results, name)] for name in vars(results)}
    _replace(folder / "bench.json", json.dumps(values, indent=1) + "\n")
    _write_csv(folder / "bench.csv", CELL_COLUMNS, [cell_row(cell) for cell in results.cells])
    if results.loads:
        _write_csv(folder / "load.csv", LOAD_COLUMNS, [load_row(load, setup.slots) for load in results.loads])
    write(folder, "Speed of a model", sections(setup, results), subtitle=setup.about["what"], name="bench")


def cell_row(cell: Cell) -> tuple[Any, ...]:
    """Returns the values under CELL_COLUMNS; None where something was not measured."""
    ceiling = cell.ceiling
    return (
        cell.batch,
        cell.prompt,
        cell.completion,
        cell.throughput,
        None if cell.memory_bytes is None else cell.memory_bytes / 1e9,
        *cell.first_token[:3],
        *_percentiles(cell.per_token),
        cell.decode_throughput,
        *_percentiles(cell.first_token),
        *((None,) * 3 if ceiling is None else (ceiling.step_bytes / 1e9, ceiling.throughput, ceiling.fraction)),
    )


def load_row(load: Load, slots: int | None) -> tuple[Any, ...]:
    """Returns the values under LOAD_COLUMNS; `batch` are the slots of the engine."""
    return (
        slots,
        load.num_requests,
        load.requests_per_second,
        60 * load.requests_per_second,
        *load.first_token[:3],
        *_percentiles(load.per_token),
        load.output_throughput,
        load.total_throughput,
        load.rate,
        load.prompt_tokens,
        load.output_tokens,
        *_percentiles(load.first_token),
    )


def _percentiles(latency: Latency | None) -> tuple[float | None, ...]:
    return (None,) * 4 if latency is None else latency[3:]


def _plain(value: Any) -> Any:
    """A tree of NamedTuples as one of dicts."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return value


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([float(f"{x:.6g}") if isinstance(x, float) else x for x in row] for row in rows)
    os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --- the page --------------------------------------------------------------------------------------------------------


def sections(setup: Setup, results: Results) -> list[Section]:
    """Returns the page: only what was measured has a place on it."""
    parts = [
        (results.cells, lambda: _grid(results.cells, setup.bandwidth)),
        (results.loads, lambda: _loads(results.loads, setup.slots)),
        (results.prefixes, lambda: _prefixes(results.prefixes)),
        (results.turns, lambda: _sessions(results.turns)),
    ]
    return [*(section() for found, section in parts if found), _machine(setup)]


def _grid(cells: Sequence[Cell], bandwidth: float | None) -> Section:
    best = max(cells, key=lambda cell: cell.throughput)
    size = f"{best.prompt} + {best.completion} tokens, batch {best.batch}"
    numbers = [Number("Output tokens per second", best.throughput, baseline=size)]
    reached = [cell for cell in cells if cell.ceiling is not None and cell.ceiling.fraction is not None]
    if reached:
        cell = max(reached, key=lambda cell: cell.ceiling.fraction)
        size = f"batch {cell.batch}, {cell.prompt} + {cell.completion} tokens"
        numbers.append(Number("Of the memory's ceiling", f"{cell.ceiling.fraction:.0%}", baseline=size))
    if bandwidth is not None:
        numbers.append(Number("Copy bandwidth, GB/s", bandwidth / 1e9, baseline="measured on this device"))
    blocks: list[Any] = [Numbers(numbers), Table(CELL_COLUMNS, [cell_row(cell) for cell in cells]), Text(_NOTES)]
    if any(cell.ceiling is not None for cell in cells):
        blocks.append(Text(_CEILING))
    speed = _series(cells, lambda cell: cell.throughput)
    ceilings = _series(cells, lambda cell: cell.ceiling and cell.ceiling.throughput, name="ceiling ")
    tokens = _series(cells, lambda cell: cell.per_token and 1e3 * cell.per_token.p50)
    first = _series(cells, lambda cell: 1e3 * cell.first_token.p50)
    blocks.append(Lines("Throughput", speed, "batch", "output tokens per second", log_x=True, log_y=True))
    if ceilings:
        drawn = _series(cells, lambda cell: cell.decode_throughput, name="decode ")
        title = "Decoding and its ceiling"
        blocks.append(Lines(title, drawn | ceilings, "batch", "output tokens per second", log_x=True, log_y=True))
    if tokens:
        blocks.append(Lines("Time per token, median", tokens, "batch", "milliseconds", log_x=True))
    blocks.append(Lines("First token, median", first, "batch", "milliseconds", log_x=True, log_y=True))
    return Section("Static grid", blocks)


def _series(cells: Sequence[Cell], value, *, name: str = "") -> dict[str, list[tuple[float, float]]]:
    """A line over the batch for every size of prompt and answer."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell.batch):
        if (y := value(cell)) is not None:
            lines.setdefault(f"{name}{cell.prompt} + {cell.completion}", []).append((cell.batch, y))
    return lines


def _loads(loads: Sequence[Load], slots: int | None) -> Section:
    text = (
        "Lengths are log-normal like ShareGPT's conversations, scaled to the context. They arrive all at once, or at "
        "random moments, `rate(/s)` a second on average; a request's time counts from the moment that it is due."
    )
    return Section("Mixed lengths", [Table(LOAD_COLUMNS, [load_row(load, slots) for load in loads]), Text(text)])


def _prefixes(prefixes: Sequence[PrefixHit]) -> Section:
    columns = ("prefix tokens", "own tokens", "FTL cold (s)", "FTL warm (s)", "warm / cold", "tokens not read")
    text = "A prompt that nobody had before, and another one that begins with the same tokens. Answers of one token."
    blocks: list[Any] = [Table(columns, prefixes), Text(text)]
    series = {
        name: [(hit.prefix, 1e3 * getattr(hit, name)) for hit in sorted(prefixes, key=lambda hit: hit.prefix)]
        for name in ("cold", "warm")
    }
    blocks.append(Lines("First token behind a shared prefix", series, "prefix tokens", "milliseconds"))
    return Section("Prefix hits", blocks)


def _sessions(turns: Sequence[Turn]) -> Section:
    worst = max(turns, key=lambda turn: turn.ratio)
    good = worst.ratio <= SESSION_GOAL
    number = Number(
        "Slowest turn / first turn",
        worst.ratio,
        baseline=f"goal at most {SESSION_GOAL}; turn {worst.turn}",
        verdict="held" if good else "missed",
        outcome="good" if good else "bad",
    )
    columns = ("turn", "tokens before it", "FTL (s)", "to the first turn")
    series = {"first token": [(turn.history, 1e3 * turn.first_token) for turn in turns]}
    chart = Lines("First token of a turn", series, "tokens before it", "milliseconds")
    return Section("Sessions", [Numbers([number]), Table(columns, turns), chart])


def _machine(setup: Setup) -> Section:
    about = setup.about
    shown = [
        (name, value) for name, value in about.items() if name != "command" and isinstance(value, str | int | float)
    ]
    shown += sorted(about.get("packages", {}).items())
    return Section("Machine and versions", [Code(about["command"]), Table(("what", "value"), shown)])
