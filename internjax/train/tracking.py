"""The run folder: what a run was asked, what it ran on, and what it measured.

RUN/experiment.json   the resolved config; a union's choice is told by "type", the name of its dataclass
RUN/versions.json     command, job, packages, python, git commit and diff; under "resumed" what later starts changed
RUN/metrics.jsonl     one row per logged step, deterministic fields only: equal for equal runs, byte by byte
RUN/incidents.jsonl   steps that were not finite and losses that were spikes, with the documents of their batches; as
                      deterministic as the metrics, and only there when there is something to tell
RUN/timing.jsonl      seconds and tokens per second of the same steps, and events; see `train.goodput`
RUN/goodput.json      where the time went, over all starts of the run
RUN/checkpoints/      RUN/samples/STEP.jsonl      RUN/profile/      RUN/model/      RUN/report.html      RUN/report.md
RUN/complete.json     written when the run has ended; a run without it is resumed by the same command
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from internjax.train.heartbeat import JOB

EXPERIMENT, VERSIONS, COMPLETE = "experiment.json", "versions.json", "complete.json"
METRICS, TIMING, INCIDENTS, GOODPUT = "metrics.jsonl", "timing.jsonl", "incidents.jsonl", "goodput.json"
WANDB_ID = "wandb_id.txt"
_MAX_DIFF_CHARACTERS = 1_000_000


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers of a run go besides the run folder."""

    log_every: int = 1
    """Steps between rows of metrics.jsonl; the last step is always logged."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases; the variables WANDB_MODE and WANDB_PROJECT win, and inside a sweep the mode is online."""
    wandb_project: str = "internjax"
    """Project that the run belongs to there."""
    progress: Literal["auto", "bar", "lines", "none"] = "auto"
    """A bar on a terminal and a line every ten seconds elsewhere (auto), or one of them, or nothing."""

    def __post_init__(self):
        if self.log_every < 1:
            raise ValueError(f"tracking.log_every must be at least 1; given {self.log_every}")


def to_json(config: Any) -> Any:
    """Returns a config as JSON values: a dataclass is an object whose "type" is its name, a tuple is a list."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: to_json(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return {"type": type(config).__name__, **fields}
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(value) for value in config]
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ValueError(
        f"a config holds scalars, text, paths, tuples, mappings and dataclasses; given {config!r} of type "
        f"{type(config).__name__}. Pass functions to functions, not through configs."
    )


def differing_fields(given: Any, wanted: Any, path: str = "") -> list[str]:
    """Returns "optimizer.peak_lr: 0.1 here, 0.2 there" for each field in which two JSON configs differ."""
    if isinstance(given, dict) and isinstance(wanted, dict) and given.get("type") == wanted.get("type"):
        names = given | wanted
        return [
            line
            for name in names
            for line in differing_fields(
                given.get(name, "(absent)"), wanted.get(name, "(absent)"), f"{path}.{name}".lstrip(".")
            )
        ]
    return [] if given == wanted else [f"{path}: {_short(given)} now, {_short(wanted)} in the folder"]


def completed(path: str | Path) -> dict | None:
    """Returns what the run in `path` reported when it ended, or None when it has not (or is not there)."""
    marker = Path(path) / COMPLETE
    return json.loads(marker.read_text()) if marker.is_file() else None


def read_rows(path: str | Path) -> list[dict]:
    """Returns the rows of a metrics.jsonl or timing.jsonl; a last row that a kill cut short is left out."""
    path = Path(path)
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def open_run(
    path: str | Path,
    config: Any,
    *,
    fresh: bool = False,
    tracking: TrackingConfig = TrackingConfig(),
    ignore: tuple[str, ...] = ("run", "fresh"),
    begun: float | None = None,
) -> "Run":
    """Returns the run folder at `path`, made for `config` or continued by it.

    A folder that was made for another config is refused with ValueError that names the differing fields; fields in
    `ignore` (those that say where a run lies, not what it is) may differ. `fresh` removes an existing run folder first,
    and refuses to remove anything else; one that an earlier start of the same job has made (INTERNJAX_JOB) it keeps:
    launchers repeat the command. `begun` is the Unix time from which on the run's time counts (now if None):
    what a program does before it opens the run is start-up too.
    """
    path = Path(path)
    begun = time.time() if begun is None else begun
    if not is_primary():
        return Run(path, to_json(config), tracking, writes=False, begun=begun)
    if fresh and path.exists() and not _made_by_this_job(path):
        _remove_run(path)
    wanted = to_json(config)
    if (path / EXPERIMENT).is_file():
        found = json.loads((path / EXPERIMENT).read_text())
        drop = [{name: value for name, value in side.items() if name not in ignore} for side in (wanted, found)]
        lines = differing_fields(*drop)
        if lines:
            raise ValueError(
                f"{path} holds a run with another config:\n  " + "\n  ".join(lines) + "\nUse the config that it was "
                "made with to resume it, another --run NAME to keep both, or --fresh to remove it and start anew."
            )
        _record_resumption(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a run folder (it has no {EXPERIMENT}). Choose another --run NAME.")
    else:
        # The folder appears with both files in it or not at all.
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
        new.mkdir()
        (new / EXPERIMENT).write_text(json.dumps(wanted, indent=1) + "\n")
        (new / VERSIONS).write_text(json.dumps(versions(), indent=1) + "\n")
        new.rename(path)
    return Run(path, wanted, tracking, writes=True, begun=begun)


class Run:
    """An open run folder: appends rows, keeps W&B beside them. Close it (or use `with`).

    In a job of several processes only the first one writes; the others may call everything to no effect.
    """

    def __init__(self, folder: Path, config: dict, tracking: TrackingConfig, *, writes: bool, begun: float):
        self.folder = folder
        self.config = config
        self.tracking = tracking
        self._writes = writes
        self._begun: float | None = begun
        self._files: dict[str, Any] = {}
        self._wandb: Any = None
        self._wandb_tried = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, one per step."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """Folder of what the model wrote during the run."""
        return self.folder / "samples"

    @property
    def model(self) -> Path:
        """Folder of the final model in Hugging Face form."""
        return self.folder / "model"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def take_begin(self) -> float:
        """Returns the Unix time from which on the first training in this run counts; that of a later one is now."""
        begun, self._begun = self._begun, None
        return time.time() if begun is None else begun

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics of one step. They must be deterministic: no times, no host names.

        A number that is not finite is written as null.
        """
        row = {"step": step} | {name: _finite(_scalar(value)) for name, value in metrics.items()}
        self._append(METRICS, row)
        wandb_run = self._start_wandb()
        if wandb_run is not None:
            shown = {name: value for name, value in row.items() if name != "step" and value is not None}
            wandb_run.log(shown, step=step)

    def report(self, incident: Mapping[str, Any]) -> None:
        """Appends a row to incidents.jsonl; it names its step and is deterministic."""
        self._append(INCIDENTS, dict(incident))

    def time(self, row: Mapping[str, Any]) -> None:
        """Appends a row of measured times: of steps, or of an event. The time of writing is added as "at"."""
        row = {name: _scalar(value) for name, value in row.items()}
        self._append(TIMING, row | {"at": round(time.time(), 3)})
        if self._wandb is not None and "step" in row and "event" not in row:
            times = {f"timing/{name}": value for name, value in row.items() if name != "step"}
            self._wandb.log(times, step=row["step"])

    def sample(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes what the model wrote at a step to samples/STEP.jsonl, and as a table to W&B."""
        if not self._writes or not rows:
            return
        self.samples.mkdir(exist_ok=True)
        new = self.samples / f".{step}.jsonl.tmp"
        new.write_text("".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        new.rename(self.samples / f"{step}.jsonl")
        wandb_run = self._start_wandb()
        if wandb_run is not None:
            import wandb

            columns = list(rows[0])
            table = wandb.Table(columns=columns, data=[[row[name] for name in columns] for row in rows])
            wandb_run.log({"samples": table}, step=step)

    def summarise(self, numbers: Mapping[str, Any]) -> None:
        """Puts numbers that sum up the run into the summary of its W&B run, where there is one."""
        if self._wandb is not None:
            self._wandb.summary.update({name: _scalar(value) for name, value in numbers.items()})

    def cut(self, step: int) -> None:
        """Drops what was written about steps after `step`, so that a resumed run writes it once.

        Rows go by an atomic rename. Times stay: work that is done again was still time spent.
        """
        if not self._writes:
            return
        self._close_files()
        for name, last in ((METRICS, step), (INCIDENTS, step), (TIMING, None)):
            path = self.folder / name
            if path.is_file():
                rows = [row for row in read_rows(path) if last is None or row["step"] <= last]
                new = path.with_name(f".{name}.tmp")
                with open(new, "w") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                    file.flush()
                    os.fsync(file.fileno())
                new.rename(path)
        incidents = self.folder / INCIDENTS
        if incidents.is_file() and not incidents.stat().st_size:
            incidents.unlink()
        for path in self.samples.glob("*.jsonl"):
            if path.stem.isdigit() and int(path.stem) > step:
                path.unlink()

    def sync(self) -> None:
        """Returns when every row so far is on disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def complete(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as ended, with the numbers that sum it up."""
        self.sync()
        self.write_json(COMPLETE, {name: _scalar(value) for name, value in summary.items()})

    def write_json(self, name: str, values: Any) -> None:
        """Writes a JSON file into the run folder, whole or not at all."""
        if self._writes:
            new = self.folder / f".{name}.tmp"
            new.write_text(json.dumps(values, indent=1) + "\n")
            new.rename(self.folder / name)

    def close(self) -> None:
        """Closes the files and the W&B run, and prints how to upload the latter."""
        self._close_files()
        if self._wandb is not None:
            folder, offline = Path(self._wandb.dir).parent.parent, self._wandb.settings.mode == "offline"
            name = self._wandb.id
            self._wandb.finish()
            self._wandb, self._wandb_tried = None, False
            if offline:
                # Every start of the run left a folder of its own under the one id; they are uploaded together.
                print(f"W&B kept this run offline; upload it with:  wandb sync {shlex.quote(str(folder))}/*-{name}")

    def _append(self, name: str, row: dict) -> None:
        if not self._writes:
            return
        if name not in self._files:
            self._files[name] = open(self.folder / name, "a")
        self._files[name].write(json.dumps(row) + "\n")
        self._files[name].flush()

    def _close_files(self) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}

    @property
    def wandb_id(self) -> str | None:
        """The id under which W&B knows the run, or None while it has none."""
        path = self.folder / WANDB_ID
        return os.environ.get("WANDB_RUN_ID") or (path.read_text().strip() if path.is_file() else None)

    def adopt_wandb_id(self, wandb_id: str | None) -> None:
        """Takes the id that a checkpoint holds where the folder has lost its own."""
        if self._writes and wandb_id and self.wandb_id is None:
            (self.folder / WANDB_ID).write_text(wandb_id)

    def _start_wandb(self) -> Any:
        """Returns the W&B run, started by the first row that there is to log, or None when it is off."""
        if self._wandb_tried or not self._writes:
            return self._wandb
        self._wandb_tried = True
        mode = os.environ.get("WANDB_MODE") or ("online" if "WANDB_SWEEP_ID" in os.environ else self.tracking.wandb)
        if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
            return None
        try:
            import wandb
        except ImportError:
            print("wandb is not installed: metrics go to metrics.jsonl alone (pip install wandb)", file=sys.stderr)
            return None
        # The id stays with the folder and its checkpoints, so that a resumed run continues its curves.
        if self.wandb_id is None:
            (self.folder / WANDB_ID).write_text(uuid.uuid4().hex[:8])
        self._wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", self.tracking.wandb_project),
            name=os.environ.get("WANDB_NAME", self.folder.name),
            id=self.wandb_id,
            dir=os.environ.get("WANDB_DIR", str(self.folder)),
            config=self.config,
            mode=mode,
            resume="allow" if mode == "online" else None,
        )
        return self._wandb


def versions() -> dict:
    """Returns command, python, platform, installed packages, and the git commit and diff of the working folder."""
    commit = _git("rev-parse", "HEAD")
    diff = None if commit is None else _git("diff", "HEAD")
    return {
        "command": _command(),
        "job": os.environ.get(JOB),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_diff": diff and diff[:_MAX_DIFF_CHARACTERS],
        "packages": dict(_packages()),
    }


@functools.cache
def _packages() -> dict[str, str]:
    # Two lines of each package's metadata; `dist.version` parses all of it, which takes a second for 260 packages.
    found = {}
    for dist in importlib.metadata.distributions():
        text = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
        fields = re.findall(r"^(Name|Version): *(.*?)\s*$", text[:4096], re.MULTILINE)
        name, version = (dict(reversed(fields)).get(field) for field in ("Name", "Version"))
        if not (name and version):
            name, version = dist.name, dist.version
        if name and version:
            found.setdefault(name, version)  # the first on the path is the one that is imported
    return dict(sorted(found.items()))


def python() -> str:
    """Returns this interpreter as one types it in a shell in the working directory, for commands that are told."""
    here = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and os.path.abspath(found) == os.path.abspath(here):
        return "python"
    return shlex.quote(str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here))


def _command() -> str:
    """Returns what was typed, as far as it can be known: `python -m MODULE` is told from the path of a file."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    named = [sys.argv[0]] if module is None else ["-m", module.name.removesuffix(".__main__")]
    return f"{python()} {shlex.join([*named, *sys.argv[1:]])}"


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _record_resumption(path: Path) -> None:
    """Adds to versions.json what this start has that the ones before had not, and says so."""
    try:
        before = json.loads((path / VERSIONS).read_text())
    except (OSError, ValueError):
        before = {"packages": {}}
    now, last = versions(), before.copy()
    for earlier in before.get("resumed", []):
        last |= {name: value for name, value in earlier.items() if name != "packages"}
        last["packages"] = last["packages"] | earlier.get("packages", {})
    changed = {name: value for name, value in now.items() if name != "packages" and last.get(name) != value}
    packages = {name: value for name, value in now["packages"].items() if last["packages"].get(name) != value}
    if packages:
        changed["packages"] = packages
        shown = ", ".join(f"{name} {value}" for name, value in list(packages.items())[:5])
        print(f"{path}: packages changed since the run was started: {shown}", file=sys.stderr)
    if changed:
        before.setdefault("resumed", []).append(changed)
        new = path / f".{VERSIONS}.tmp"
        new.write_text(json.dumps(before, indent=1) + "\n")
        new.rename(path / VERSIONS)


def _made_by_this_job(path: Path) -> bool:
    job = os.environ.get(JOB)
    return (
        job is not None and (path / VERSIONS).is_file() and json.loads((path / VERSIONS).read_text()).get("job") == job
    )


def _remove_run(path: Path) -> None:
    if not (path / EXPERIMENT).is_file():
        if path.is_dir() and not any(path.iterdir()):
            return
        raise ValueError(
            f"--fresh would remove {path}, which is not a run folder (it has no {EXPERIMENT}). "
            "Remove it by hand if it may go, or choose another --run NAME."
        )
    aside = path.with_name(f".{path.name}.removed-{uuid.uuid4().hex[:8]}")
    path.rename(aside)  # it is gone at once, however long the removal takes
    shutil.rmtree(aside)


def is_primary() -> bool:
    """Returns whether this process is the one that writes and speaks for the job."""
    # Asking for the process index starts the devices, which a stage that only writes files does not need.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _scalar(value: Any) -> Any:
    """Returns a number as JSON writes it; device and NumPy scalars become Python's."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."
