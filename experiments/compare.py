"""Several runs on one page: curves overlaid, what their configs differ in, final numbers and goodput side by side.

    python -m experiments.compare RUN RUN [RUN ...] --output compare.html

Hardware: any
Time: seconds

RUN is a name under runs/ or the path of a run folder. An output that ends in .md is Markdown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.command_line import guarded
from experiments.training import run_path
from internjax import report
from internjax.chart import Lines
from internjax.report import Code, Section, Table, Text
from internjax.train.page import LABELS, MEANINGS, Points, Record, charts, evaluations, flat, is_log, numbers, read_run

_ABSENT = "–"
_SHARES = ("median MFU", "goodput")


def compare(runs: Mapping[str, Record]) -> list[Section]:
    """Returns the sections of a comparison of runs by name."""
    sections = [
        Section("Final numbers", [_table("number", {name: _final(run) for name, run in runs.items()})]),
        Section("Curves", _overlaid(runs)),
        Section("Differing config", _differing_config(runs)),
        Section("Where the time went", _spent(runs)),
        Section("Versions", _differing_versions(runs)),
        Section("Commands", [Code("\n".join(run.versions.get("command", "") for run in runs.values()))]),
    ]
    return [section for section in sections if section.blocks]


def names(folders: Sequence[Path]) -> list[str]:
    """Returns a short name for each folder: its own, with as many parents as it takes to tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        short = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(short)) == len(folders):
            return short
    raise ValueError(f"a run is compared with others, not with itself; given {', '.join(map(str, folders))}")


def _final(run: Record) -> dict[str, Any]:
    return {name: f"{value:.1%}" if name in _SHARES else value for name, value in numbers(run).items()}


def _overlaid(runs: Mapping[str, Record]) -> list[Lines]:
    per_run = {name: charts(run) | evaluations(run) for name, run in runs.items()}
    titles = dict.fromkeys(title for curves in per_run.values() for title in curves)
    lines = []
    for title in titles:
        series: dict[str, Points] = {name: curves[title] for name, curves in per_run.items() if title in curves}
        log_y = is_log(title, series.values())
        lines.append(Lines(title, series, x_label="step", y_label=LABELS.get(title, ""), log_y=log_y))
    return lines


def _differing_config(runs: Mapping[str, Record]) -> list[Any]:
    configs = {name: flat(run.config) for name, run in runs.items()}
    for name, run in runs.items():
        configs[name] = {"type": run.config.get("type", _ABSENT)} | configs[name]
        configs[name].pop("run", None)  # says where it lies, not what it is
    found = _differing(configs)
    if not found:
        return [Text("None: the runs have one config.")]
    return [
        _table(
            "field", {name: {field: configs[name].get(field, _ABSENT) for field in found} for name in runs}, code=True
        )
    ]


def _differing_versions(runs: Mapping[str, Record]) -> list[Any]:
    told = {
        name: {key: run.versions.get(key) for key in ("python", "platform", "git_commit")}
        | run.versions.get("packages", {})
        for name, run in runs.items()
    }
    found = _differing(told)
    if not found:
        return [Text("Equal: Python, platform, commit and all packages.")]
    return [_table("what", {name: {field: told[name].get(field) for field in found} for name in runs})]


def _differing(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the fields that do not have one value everywhere, in their order."""
    fields = dict.fromkeys(field for each in values.values() for field in each)
    missing = object()
    return [
        field
        for field in fields
        if any(each.get(field, missing) != next(iter(values.values())).get(field, missing) for each in values.values())
    ]


def _spent(runs: Mapping[str, Record]) -> list[Any]:
    shares = {
        name: {"goodput": f"{run.spent.goodput:.1%}", "wall time, s": round(run.spent.wall, 1)}
        | {kind.replace("_", " "): f"{run.spent.share(kind):.1%}" for kind in MEANINGS}
        | {"starts": run.spent.num_starts, "steps done twice": run.spent.num_lost_steps}
        for name, run in runs.items()
        if run.spent.num_starts
    }
    return [_table("share of the wall time", shares)] if shares else []


def _table(what: str, columns: Mapping[str, Mapping[str, Any]], *, code: bool = False) -> Table:
    """A table with a row for each key of the columns."""
    fields = dict.fromkeys(field for values in columns.values() for field in values)
    rows = [
        [f"`{field}`" if code else field, *(_shown(values.get(field), code=code) for values in columns.values())]
        for field in fields
    ]
    return Table([what, *columns], rows)


def _shown(value: Any, *, code: bool) -> str:
    """A cell as text, so that a column may hold numbers and words; a config's values are shown unrounded."""
    if code:
        return str(value)
    return report.format_value(value)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Which runs, and where the page goes."""

    runs: tuple[str, ...]
    """Names under runs/, or paths of run folders; at least two."""
    output: str = "compare.html"
    """File to write: .html, or .md for Markdown."""


def write(config: Compare) -> Path:
    """Writes the comparison and returns its path."""
    output = Path(config.output)
    if output.suffix not in (".html", ".md"):
        raise ValueError(f"output is {config.output}; give a name that ends in .html or .md")
    if len(config.runs) < 2:
        raise ValueError(f"a comparison needs at least two runs; given {', '.join(config.runs) or 'none'}")
    folders = [run_path(run) for run in config.runs]
    runs = dict(zip(names(folders), map(read_run, folders), strict=True))
    form = report.page if output.suffix == ".html" else report.markdown
    text = form(" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs", compare(runs), subtitle="Runs compared")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(output)
    return output


def main(args: Sequence[str] | None = None) -> None:
    import tyro

    guarded(write, tyro.cli(Compare, args=args, config=(tyro.conf.PositionalRequiredArgs,)))


if __name__ == "__main__":
    main()
