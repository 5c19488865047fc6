"""What a pre-training and a fine-tuning share: plan, preflight, the watched loop, the end of the run."""

import contextlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loading import Rows
from data_pipelines.mixing import Mixture
from experiments.callbacks import HeldOut, Prompts, held_out_loss, sample_prompts
from internjax import sharding
from internjax.sharding import MeshConfig
from internjax.text.tokenizer import Tokenizer
from internjax.train import devices, plan, preflight, preview, processes
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.flops import batch_flops
from internjax.train.guard import Guard
from internjax.train.loop import Data, Every, train
from internjax.train.memory import Job
from internjax.train.page import write_page
from internjax.train.preview import Report
from internjax.train.profile import ProfileConfig, Profiler
from internjax.train.step import TrainState
from internjax.train.tracking import Run, TrackingConfig, completed, open_run, read_rows

_NOT_THE_RUN = ("run", "fresh", "preflight", "dry_run", "profile", "push")
"""Fields of a config that may differ when a run is resumed: what is trained does not depend on them."""

_LONGEST_EXPORT = 6 * 3600.0
"""Seconds that the other processes wait while process 0 writes the model; one that dies ends the job at once."""


class Settings(Protocol):
    """The fields that the configs of both have in common."""

    run: str
    fresh: bool
    seed: int
    preflight: bool
    dry_run: bool
    checkpoint: CheckpointConfig
    guard: Guard
    tracking: TrackingConfig
    prompts: Prompts
    held_out: HeldOut
    profile: ProfileConfig


class Trained(NamedTuple):
    """Where a stage left its run, and what it reported."""

    folder: Path
    summary: dict[str, Any]


def run_path(run: str) -> Path:
    """Returns the folder of a run: a name lies under runs/, anything with a slash is a path."""
    return Path(run) if "/" in run or run.startswith(".") else Path("runs") / run


@contextlib.contextmanager
def mesh_of(config: MeshConfig) -> Iterator[Mesh | None]:
    """Gives the mesh over all devices, or None on a single one. What runs after it is on one device again."""
    if jax.device_count() == 1:
        yield None
        return
    try:
        yield sharding.make_mesh(config)
    finally:
        sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


class Task(NamedTuple):
    """What is trained on what: all that plan, preflight, loop and callbacks of a stage ask for."""

    job: Job
    tokenizer: Tokenizer | None
    num_steps: int
    rows: Rows | Mixture | None
    """None where the data is a function of the caller's."""
    data: Data
    mesh: Mesh | None
    conversations: bool


def plan_and_check(config: Settings, task: Task, folder: Path, *, base: dict | None) -> Report | None:
    """Prints the plan, and returns what the preflight found; raises ValueError where something would go wrong."""
    # Samples and a trace that cannot be had are refused before the run has a folder.
    _prompts(config, task, None)
    Profiler(config.profile, folder, first_step=0, num_steps=task.num_steps)
    device = devices.find(jax.devices()[0].device_kind)
    planned = plan.make_plan(task.job, num_devices=jax.device_count(), device=device)
    if processes.index() == 0:
        print(plan.describe(planned))
        if device is not None:  # of others it is not known what they hold
            print(plan.verdict(planned))
    if not config.preflight:
        return None
    subject = preflight.Subject(
        task.job,
        next(task.data(0)),
        mesh=task.mesh,
        tokenizer=task.tokenizer,
        manifests=_manifests(task.rows),
        conversations=task.conversations,
        checkpoints=folder / "checkpoints",
        params=base,
        seed=config.seed,
    )
    return preflight.run(subject, cache=Path("runs/.preflight"), colour=sys.stdout.isatty())


def _manifests(rows: Rows | Mixture | None) -> dict[str, Any]:
    """Returns the manifest of every token folder that is read."""
    read = rows.sources if isinstance(rows, Mixture) else () if rows is None else (rows,)
    return {str(each.folder.path): each.folder.manifest for each in read}


def held_out_callbacks(held_out: HeldOut, task: Task) -> list[Every]:
    """Returns the measurement on held-out text that is asked for, if any; raises ValueError where it cannot be read."""
    if not held_out.folder:
        return []
    if task.tokenizer is None:
        raise ValueError("held_out.folder needs data.tokenizer, which says what its ids mean; name it, or leave it out")
    measured = held_out_loss(
        held_out,
        task.job.model,
        task.tokenizer,
        # As many rows as the step itself holds at once.
        batch_size=task.job.batch_size // task.job.accumulate,
        seq_len=task.job.seq_len,
        mesh=task.mesh,
        lora_config=task.job.lora,
        packing="whole" if task.conversations else "concat",
    )
    return [measured]


def _prompts(config: Settings, task: Task, run: Run | None) -> list[Every]:
    """Returns the samples that the config asks for; raises ValueError where they cannot be made."""
    if not config.prompts.texts:
        return []
    if task.tokenizer is None:
        raise ValueError("prompts.texts needs data.tokenizer, to read and write text; name it, or leave them out")
    how = {"lora_config": task.job.lora, "chat": task.conversations}
    return [sample_prompts(config.prompts, task.job.model, task.tokenizer, run=run, **how)]


def run_training(config: Settings, task: Task, run: Run, state, step, callbacks: Sequence[Every]) -> TrainState:
    """Returns the state after the last step: the loop with everything that the config asks to watch."""
    job = task.job
    callbacks = [*callbacks, *_prompts(config, task, run)]
    describe = None if task.rows is None else lambda position: task.rows.documents(position, job.batch_size)
    with open_checkpoints(run.checkpoints, config.checkpoint) as checkpoints:
        return train(
            state,
            task.data,
            step,
            num_steps=task.num_steps,
            checkpoints=checkpoints,
            tracker=run,
            callbacks=callbacks,
            guard=config.guard,
            describe=describe,
            flops=None if task.rows is None else batch_flops(job.model, lora_config=job.lora, freeze=job.freeze),
            profile=config.profile,
        )


def exported(params: dict) -> dict | None:
    """Returns parameters that lie on other hosts' devices as arrays of this host's CPU, on process 0; elsewhere None.

    What comes after it is on that one device.
    """
    if processes.count() == 1:
        return params

    def whole(leaf):
        place = sharding.replicated(leaf.sharding.mesh)
        copy = jax.jit(lambda x: x, out_shardings=place)(leaf)
        return np.asarray(copy.addressable_data(0)) if processes.index() == 0 else None

    # One leaf after the other: a device never holds more than one of them whole.
    leaves, tree = jax.tree.flatten(params)
    arrays = [whole(leaf) for leaf in leaves]
    if processes.index() != 0:
        return None
    here = sharding.make_mesh(MeshConfig(fsdp=1), jax.local_devices(backend="cpu")[:1])
    return jax.device_put(jax.tree.unflatten(tree, arrays), sharding.replicated(here))


def opened(config: Settings, folder: Path, *, begun: float | None = None) -> Run:
    """Returns the run folder, open for writing; with `begun` the time since then is the run's, and `fresh` holds."""
    fresh = config.fresh and begun is not None
    return open_run(folder, config, fresh=fresh, tracking=config.tracking, ignore=_NOT_THE_RUN, begun=begun)


def ended(run: Run, values: dict[str, Any]) -> Trained:
    """Marks a run as complete, with its summary and `values`, and writes its page.

    Process 0 of a job does. The others wait for it: what is started next may read the run.
    """

    def complete() -> dict[str, Any]:
        summary = summary_of(run.folder) | values
        run.complete(summary)
        run.close()
        print(f"{write_page(run.folder)} shows the run")
        return completed(run.folder)

    return Trained(run.folder, processes.first("run ended", complete, timeout=_LONGEST_EXPORT))


def keep(checked: Report | None, folder: Path) -> None:
    """Writes what the preflight found into the run folder; process 0 of a job does."""
    if checked is not None and processes.index() == 0:
        preview.keep(checked, folder)


def dry(folder: Path) -> Trained:
    """Says that a dry run ends here."""
    print("dry run: nothing was trained, and no run folder was made")
    return Trained(folder, {"dry_run": True})


def finished(config: Settings, folder: Path) -> Trained | None:
    """Returns the run in `folder` if it has ended; raises ValueError where the folder holds something else."""
    if config.fresh or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    opened(config, folder).close()
    done = completed(folder)
    if done is None:
        return None
    print(f"{folder} is complete (--fresh runs it anew)")
    return Trained(folder, done)


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns first and last loss, median speed and goodput of a run."""
    metrics = read_rows(folder / "metrics.jsonl")
    losses = [row["loss"] for row in metrics if row["loss"] is not None]  # None: a step that was skipped
    speeds = [row["tokens_per_second"] for row in read_rows(folder / "timing.jsonl") if "tokens_per_second" in row]
    found: dict[str, Any] = {"num_steps": metrics[-1]["step"]}
    if "num_overflows" in metrics[-1]:
        found["num_overflows"] = metrics[-1]["num_overflows"]
    if losses:
        found |= {"loss": losses[-1], "first_loss": losses[0]}
    if speeds:
        found["tokens_per_second"] = statistics.median(speeds)
    return found
