"""The page of a run: RUN/report.html and RUN/report.md, from what stands in the run folder.

python -m internjax.train.page runs/NAME      # of a run that goes on, or was killed, as well
"""

import datetime
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internjax import report
from internjax.chart import Lines
from internjax.report import Code, Number, Numbers, Sample, Samples, Section, Table, Text
from internjax.train.goodput import Goodput, goodput
from internjax.train.step import STEP_METRICS
from internjax.train.tracking import EXPERIMENT, INCIDENTS, METRICS, TIMING, VERSIONS, completed, read_rows

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers", "internjax")
MEANINGS = {
    "compute": "steps that count",
    "input_wait": "the device waited for data",
    "checkpoint": "standing still to save",
    "callbacks": "samples and evaluation",
    "compile": "the first step of every start",
    "restore": "reading a checkpoint back",
    "start_up": "from the start of the program to the loop",
    "lost": "steps that a later start did again",
    "down": "between two starts",
    "other": "all else",
}
_MAX_INCIDENTS, _MAX_PROMPTS, _MAX_STEPS = 50, 8, 3

Points = list[tuple[float, float]]


class Record(NamedTuple):
    """All that a run folder tells."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    metrics: list[dict]
    """Rows of metrics.jsonl."""
    times: list[dict]
    """Rows of timing.jsonl, every start."""
    incidents: list[dict]
    samples: dict[int, list[dict]]
    """Step -> what the model wrote then."""
    summary: dict[str, Any] | None
    """What the run reported when it ended; None for one that has not."""
    spent: Goodput


def read_run(folder: str | Path) -> Record:
    """Returns what stands in a run folder; raises ValueError for a folder that is none."""
    folder = Path(folder)
    if not (folder / EXPERIMENT).is_file():
        if not folder.is_dir():
            found = "there is no such folder"
        else:
            runs = sorted(path.parent.name for path in folder.glob(f"*/{EXPERIMENT}"))
            found = f"in it are the runs {', '.join(runs)}" if runs else f"it has no {EXPERIMENT}"
        raise ValueError(f"{folder} is not a run folder: {found}. Give the folder of a run, such as runs/NAME.")
    versions = folder / VERSIONS
    samples = {int(p.stem): read_rows(p) for p in (folder / "samples").glob("*.jsonl") if p.stem.isdigit()}
    times = read_rows(folder / TIMING)
    return Record(
        folder,
        json.loads((folder / EXPERIMENT).read_text()),
        json.loads(versions.read_text()) if versions.is_file() else {},
        read_rows(folder / METRICS),
        times,
        read_rows(folder / INCIDENTS),
        dict(sorted(samples.items())),
        completed(folder),
        goodput(times),
    )


def write_page(folder: str | Path) -> Path:
    """Writes report.html and report.md into a run folder; returns the path of the former."""
    run = read_run(folder)
    parts = [
        _at_a_glance(run),
        _curves(run),
        _evaluation(run),
        _samples(run),
        _data(run),
        _incidents(run),
        _time(run),
        _config(run),
        _versions(run),
        _repeat(run),
    ]
    report.write(run.folder, run.folder.name, [part for part in parts if part.blocks], subtitle=_subtitle(run))
    return run.folder / "report.html"


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a JSON config by dotted name; a union's choice is the field itself: schedule = Cosine."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name == "type":
            fields |= {prefix.rstrip("."): value} if prefix else {}
        elif isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def curve(rows: Sequence[Mapping[str, Any]], name: str, *, scale: float = 1.0) -> Points:
    """Returns (step, value) of the rows that have a value; of several rows of a step (work done again) the last."""
    values = {row["step"]: row[name] for row in rows if "event" not in row and row.get(name) is not None}
    return sorted((step, value / scale) for step, value in values.items())


def charts(run: Record) -> dict[str, Points]:
    """Returns the curves that every run has by the titles of their charts; those without a point are left out."""
    memory = "device_memory_bytes" if any("device_memory_bytes" in row for row in run.times) else "host_memory_bytes"
    found = {
        "Loss": curve(run.metrics, "loss"),
        "Learning rate": curve(run.metrics, "learning_rate"),
        "Gradient norm": curve(run.metrics, "grad_norm"),
        "Tokens per second": curve(run.times, "tokens_per_second"),
        "MFU": curve(run.times, "mfu"),
        f"{memory.split('_')[0].capitalize()} memory": curve(run.times, memory, scale=1e9),
    }
    return {title: points for title, points in found.items() if points}


def is_log(title: str, curves: Iterable[Points]) -> bool:
    """Whether a chart is easier to read on a logarithmic axis: a spike, or the first steps, would flatten the rest."""
    values = [value for points in curves for _, value in points]
    return title in ("Loss", "Gradient norm") and 0 < 5 * min(values) < max(values)


LABELS = {
    "Loss": "nats per token",
    "Learning rate": "",
    "Gradient norm": "global norm, before clipping",
    "Tokens per second": "compilation left out",
    "MFU": "share of the peak",
    "Device memory": "GB, peak of the fullest device",
    "Host memory": "GB",
}


def evaluations(run: Record) -> dict[str, Points]:
    """Returns the curves of metrics that neither every step has nor the step itself reports."""
    names = dict.fromkeys(name for row in run.metrics for name in row if name not in ("step", *STEP_METRICS))
    return {name: points for name in names if (points := curve(run.metrics, name))}


def numbers(run: Record) -> dict[str, Any]:
    """Returns the numbers that sum a run up, by name; what was not measured is not there."""
    losses, speeds = curve(run.metrics, "loss"), curve(run.times, "tokens_per_second")
    mfu, memory = curve(run.times, "mfu"), [points for title, points in charts(run).items() if "memory" in title]
    found = {
        "steps": run.metrics[-1]["step"] if run.metrics else None,
        "final loss": losses[-1][1] if losses else None,
        "first loss": losses[0][1] if losses else None,
        "median tokens/s": statistics.median(value for _, value in speeds) if speeds else None,
        "median MFU": statistics.median(value for _, value in mfu) if mfu else None,
        "peak memory, GB": max(value for _, value in memory[0]) if memory else None,
        "wall time, s": round(run.spent.wall, 1) if run.spent.wall else None,
        "goodput": run.spent.goodput if run.spent.wall else None,
        "starts": run.spent.num_starts or None,
        "incidents": len(run.incidents),
    }
    found |= {name: points[-1][1] for name, points in evaluations(run).items()}
    return {name: value for name, value in found.items() if value is not None}


def _subtitle(run: Record) -> str:
    started = [_when(row["at"] - row["seconds"]) for row in run.times if row.get("event") == "start"]
    kind = run.config.get("type", "run")
    return " · ".join([kind, _state(run), *([f"started {started[0]}"] if started else [])])


def _state(run: Record) -> str:
    if run.summary is not None:
        return "complete"
    ends = [row["reason"] for row in run.times[-1:] if row.get("event") == "end"]
    return f"not complete (ended: {ends[0]})" if ends else "not complete (running, or killed)"


def _when(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _at_a_glance(run: Record) -> Section:
    found = numbers(run)
    tiles = []
    if "final loss" in found:
        tiles.append(Number("Final loss", found["final loss"], baseline=f"first {found['first loss']:.4g}"))
    tiles += [Number(name, points[-1][1], baseline=_best(points)) for name, points in evaluations(run).items()][:4]
    if "median tokens/s" in found:
        mfu = f"MFU {found['median MFU']:.1%}" if "median MFU" in found else "compilation left out"
        tiles.append(Number("Tokens per second, median", round(found["median tokens/s"]), baseline=mfu))
    if "goodput" in found:
        baseline = f"of {_duration(run.spent.wall)} in {_times(run.spent.num_starts, 'start')}"
        tiles.append(Number("Goodput", f"{found['goodput']:.0%}", baseline=baseline))
    if "peak memory, GB" in found:
        tiles.append(Number("Peak memory", f"{found['peak memory, GB']:.1f} GB"))
    if run.incidents:
        tiles.append(Number("Incidents", len(run.incidents), verdict="see below", outcome="bad"))
    return Section("At a glance", [Numbers(tiles)] if tiles else [])


def _best(points: Points) -> str:
    return f"first {points[0][1]:.4g}, at step {points[0][0]:,}" if points[1:] else f"at step {points[0][0]:,}"


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _curves(run: Record) -> Section:
    lines = []
    for title, points in charts(run).items():
        log_y = is_log(title, [points])
        lines.append(Lines(title, {title: points}, x_label="step", y_label=LABELS[title], log_y=log_y))
    return Section("Curves", lines)


def _evaluation(run: Record) -> Section:
    found = evaluations(run)
    lines = [
        Lines(name, {name: points}, x_label="step", y_label="") for name, points in found.items() if len(points) > 1
    ]
    steps = sorted({step for points in found.values() for step, _ in points})
    if len(steps) > 12:
        steps = [steps[round(index * (len(steps) - 1) / 11)] for index in range(12)]
    by_step = {name: dict(points) for name, points in found.items()}
    rows = [[int(step), *(by_step[name].get(step) for name in found)] for step in steps]
    return Section("Evaluation", [*lines, Table(["step", *found], rows)] if found else [])


def _samples(run: Record) -> Section:
    """The same prompts over the course of the run."""
    steps = list(run.samples)
    if len(steps) > _MAX_STEPS:
        steps = [steps[round(index * (len(steps) - 1) / (_MAX_STEPS - 1))] for index in range(_MAX_STEPS)]
    prompts = list(dict.fromkeys(row["prompt"] for step in steps for row in run.samples[step]))
    blocks = []
    for prompt in prompts[:_MAX_PROMPTS]:
        texts = [
            Sample(f"step {step:,}", row["text"])
            for step in steps
            for row in run.samples[step]
            if row["prompt"] == prompt
        ]
        blocks.append(Samples(texts, caption=f"Prompt: `{prompt}`" if "`" not in prompt else f"Prompt: {prompt}"))
    return Section("Samples", blocks)


def _data(run: Record) -> Section:
    """What was read of each file, where the run's summary tells it."""
    files = (run.summary or {}).get("files", {})
    rows = [
        [
            f"`{file}`",
            name.removeprefix("num_").replace("_", " "),
            ", ".join(value) if isinstance(value, list) else value,
        ]
        for file, counts in files.items()
        for name, value in counts.items()
        if value or name in ("num_trained", "num_bad_rows")
    ]
    return Section("Data", [Table(["file", "what", "found"], rows)] if rows else [])


def _incidents(run: Record) -> Section:
    rows = []
    for row in run.incidents[:_MAX_INCIDENTS]:
        documents = row.get("documents", [])
        more = row.get("num_documents", 0) - 3
        named = "; ".join(documents[:3]) + (f" and {more:,} more" if more > 0 else "")
        what = f"spike, {row['z']:.1f} deviations" if row["incident"] == "spike" else "not finite"
        what += f" from layer {row['layer']} on" if "layer" in row else ""
        rows.append([row["step"], what, _value(row["loss"]), row.get("median"), row["position"], named])
    columns = ["step", "what", "loss", "median before", "data position", "documents of the batch"]
    left = len(run.incidents) - len(rows)
    caption = f"All rows are in `{INCIDENTS}`" + (f"; {left:,} later ones are not shown here." if left else ".")
    return Section("Incidents", [Table(columns, rows, caption=caption)] if rows else [])


def _value(value: Any) -> str:
    return value if isinstance(value, str) else report.format_value(value)


def _time(run: Record) -> Section:
    if not run.spent.num_starts:
        return Section("Where the time went", [])
    spent = sorted(run.spent.to_json()["seconds"].items(), key=lambda item: -item[1])
    rows = [
        [name.replace("_", " "), seconds, f"{run.spent.share(name):.1%}", "█" * round(30 * run.spent.share(name)), what]
        for name, seconds in spent
        if seconds and (what := MEANINGS[name])
    ]
    lost = f", {_times(run.spent.num_lost_steps, 'step')} done twice" if run.spent.num_lost_steps else ""
    text = f"{_duration(run.spent.wall)} from the first start to the last sign of life{lost}."
    starts, reached = [], None
    for row in run.times:
        if row.get("event") == "start":
            starts.append([_when(row["at"] - row["seconds"]), row["step"], row["step"], "killed, or running"])
        elif starts and row.get("event") == "end":
            starts[-1][3] = row["reason"]
        elif starts and (reached := row.get("step")) is not None:
            starts[-1][2] = max(starts[-1][2], reached)
    return Section(
        "Where the time went",
        [
            Text(text),
            Table(["kind", "seconds", "share", "", "what it is"], rows),
            Table(["start", "from step", "to step", "ended"], starts),
        ],
    )


def _config(run: Record) -> Section:
    rows = [[f"`{name}`", _cell(value)] for name, value in flat(run.config).items()]
    return Section("Config", [Table(["field", "value"], rows, caption=f"As in `{EXPERIMENT}`.")])


def _cell(value: Any) -> str:
    """A value of a config as it was written: no rounding, no thousands separators."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _versions(run: Record) -> Section:
    told = run.versions
    if not told:
        return Section("Versions", [])
    rows = [["python", told.get("python")], ["platform", told.get("platform")]]
    rows += [[name, told["packages"][name]] for name in PACKAGES if name in told.get("packages", {})]
    changed = len([line for line in (told.get("git_diff") or "").splitlines() if line[:1] in "+-"])
    commit = told.get("git_commit")
    rows += [["git commit", commit + (f", and {changed} changed lines" if changed else "")]] if commit else []
    blocks: list[Any] = [Table(["what", "version"], rows, caption=f"All packages and the diff are in `{VERSIONS}`.")]
    later = [
        [number, name, _short(value)]
        for number, start in enumerate(told.get("resumed", []), 2)
        for name, value in (start | start.get("packages", {})).items()
        if name != "packages"
    ]
    if later:
        caption = "What later starts changed (only starts that changed something are counted)."
        blocks.append(Table(["start", "what", "now"], later, caption=caption))
    return Section("Versions", blocks)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"


def _repeat(run: Record) -> Section:
    command = run.versions.get("command")
    return Section("Repeat", [Code(command)] if command else [])


def main() -> None:
    folders = sys.argv[1:]
    if len(folders) != 1 or folders[0].startswith("-"):
        sys.exit("usage: python -m internjax.train.page RUN")
    try:
        print(write_page(folders[0]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
