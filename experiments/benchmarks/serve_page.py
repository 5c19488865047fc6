"""The page of the servers' contest: its figures as charts over the clients, and tables beneath them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internjax.chart import Lines, Point
from internjax.report import Section, Table, Text

_COLUMNS = (
    "clients", "server", "tokens/s", "first token p50 (ms)", "p99 (ms)", "per token p50 (ms)", "p95 (ms)", "p99 (ms)",
    "pause p50 (ms)", "p99 (ms) ", "tokens per arrival", "CPU s / 1000 tokens",
)  # fmt: skip


def sections(result: Mapping[str, Any]) -> list[Section]:
    """Returns the page of a result of `experiments.benchmarks.serve`: only what was measured has a place on it."""
    rows = [
        (clients, who, each)
        for clients, by_name in result["contenders"].items()
        for who, each in by_name.items()
        if "failed" not in each
    ]
    blocks: list[Any] = [Text("\n\n".join(result["goals"]))]
    if rows:
        blocks += _charts(rows)
        blocks.append(Table(_COLUMNS, [_row(*row) for row in rows]))
    blocks += [Text(f"{who} failed: {why}") for who, why in result["failed"].items()]
    found = [Section("Clients at once", blocks)]
    if conversations := result["conversations"]["contenders"]:
        found.append(_conversations(conversations))
    versions = [(f"peer: {name}", version) for name, version in result["peer_packages"].items()]
    names = ("hardware", "devices", "load", "load_after", "python", "blocks", "requests_per_block")
    about = [(name, result[name]) for name in names] + [*result["packages"].items(), *versions]
    return [*found, Section("Machine and versions", [Table(("what", "value"), about)])]


def _charts(rows: Sequence[tuple[int, str, Mapping]]) -> list[Lines]:
    def series(value: Callable[[Mapping], float | None]) -> dict[str, list[Point]]:
        lines: dict[str, list[Point]] = {}
        for clients, who, each in sorted(rows, key=lambda row: row[0]):
            if (y := value(each)) is not None:
                lines.setdefault(who, []).append((clients, y))
        return lines

    def milliseconds(field: str, point: str) -> dict[str, list[Point]]:
        return series(lambda each: each[field] and 1e3 * each[field][point])

    charts = {
        ("Throughput", "tokens per second"): series(lambda each: each["tokens_per_second"]),
        ("First token, median", "milliseconds"): milliseconds("first_token", "p50"),
        ("Time per token, median", "milliseconds"): milliseconds("per_token", "p50"),
        ("Time per token, 99th percentile", "milliseconds"): milliseconds("per_token", "p99"),
        ("Pause between arrivals, 99th percentile", "milliseconds"): milliseconds("pause", "p99"),
    }
    return [Lines(title, lines, "clients", unit, log_x=True) for (title, unit), lines in charts.items() if lines]


def _row(clients: int, who: str, each: Mapping[str, Any]) -> tuple:
    def milliseconds(field: str, *points: str) -> list[float | None]:
        return [each[field] and 1e3 * each[field][point] for point in points]

    return (
        clients,
        who,
        each["tokens_per_second"],
        *milliseconds("first_token", "p50", "p99"),
        *milliseconds("per_token", "p50", "p95", "p99"),
        *milliseconds("pause", "p50", "p99"),
        each["tokens_per_arrival"],
        each["cpu_seconds_per_1000_tokens"],
    )


def _conversations(found: Mapping[str, Mapping]) -> Section:
    series = {
        who: [(turn, 1e3 * seconds) for turn, seconds in enumerate(each["first_token"], 1)]
        for who, each in found.items()
    }
    rows = [(who, *each["ratio"]) for who, each in found.items()]
    turns = range(1, max(len(each["ratio"]) for each in found.values()) + 1)
    return Section(
        "Conversations",
        [
            Lines("First token of a turn, median", series, "turn", "milliseconds"),
            Text("Seconds until the first token of a turn, over those of the first turn."),
            Table(("server", *(f"turn {turn}" for turn in turns)), rows),
        ],
    )
