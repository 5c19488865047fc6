"""One process of a training run on 8 devices: the program that test_processes.py starts, alone or twice.

python process_run.py RUN_FOLDER[:RUN_FOLDER ...] HOW [HOW ...] runs them one after the other (what is complete is
passed over), with HOW one of
    end              run to the end
    step:N:P         process P is killed when step N is done
    write:N:P        process P is killed while the checkpoint of step N is written
    commit:N:P       process P is killed when the arrays of step N are whole and the step is not committed yet
    term:N:P         process P gets SIGTERM when step N is done
    stop:N:P         process P is stopped (SIGSTOP) when step N is done
    hang:N:P         the data of process P never comes after step N
    raise:N:P        process P raises ValueError after step N
    full:N:P         from step N on process P cannot write files beyond 2 kB
Each happens once, however often the run is started again, in the run folder that a fourth part names (term:1:0:broken),
or in all. The environment says where this process stands in the job
(internjax.train.processes), and how many devices it has.
"""

import functools
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from internjax import sharding
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.sharding import MeshConfig
from internjax.train import checkpoint, processes
from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.loop import Every, train
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, completed, open_run
from tests.weights import random_params

NUM_STEPS, BATCH_SIZE = 6, 8
_SIGNALS = {"step": signal.SIGKILL, "term": signal.SIGTERM, "stop": signal.SIGSTOP}
CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)


def data(rows: tuple[int, ...], hang: int | None, order: Path):
    """Returns batches of the rows of this process; what each row held is written down, by position and row."""

    def batches(position: int):
        while True:
            if position == hang:
                time.sleep(1000)
            tokens = np.random.default_rng([4, position]).integers(1, 64, size=(BATCH_SIZE, 17)).astype(np.int32)
            for row in rows:
                (order / f"{position}-{row}").write_text(hashlib.sha256(tokens[row].tobytes()).hexdigest())
            tokens = tokens[list(rows)]
            ones = np.ones((len(rows), 16), np.int32)
            positions = np.broadcast_to(np.arange(16), (len(rows), 16))
            yield Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)
            position += 1

    return batches


def arrange(folder: Path, how: str, at: int) -> list[Every]:
    """Plants what is to happen to this process once; returns the callbacks that it needs."""
    mark = folder.parent / f"{folder.name}.{how}.{at}"
    if how == "end" or mark.exists():
        return []
    seal, own_files = checkpoint.Checkpoints._seal, checkpoint.own_files

    def now(number: int = signal.SIGKILL):
        mark.write_text("")
        os.kill(os.getpid(), number)

    if how == "write":
        checkpoint.Checkpoints._seal = lambda self, step, about: now() if step == at else seal(self, step, about)
    if how == "commit":
        checkpoint.own_files = lambda path: now() if path.name == str(at) else own_files(path)

    def at_step(state, step):
        if step != at:
            return
        if how == "raise":
            raise ValueError("planted")
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
        elif how in _SIGNALS:
            now(_SIGNALS[how])

    return [Every(1, at_step)]


@functools.cache
def program():
    """Returns (mesh, optimizer, step), which are the same for all runs."""
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    optimizer = make_optimizer(AdamW(peak_lr=0.01), Cosine(warmup_steps=2), NUM_STEPS)
    return mesh, optimizer, make_step(next_token(CONFIG), optimizer, mesh=mesh)


def run(folder: Path, plans: list[tuple[str, int]]) -> None:
    mesh, optimizer, step = program()
    axes, shapes = decoder.logical_axes(CONFIG), decoder.abstract_params(CONFIG)
    whole = jax.device_get(random_params(CONFIG))
    params = jax.tree.map(
        lambda leaf, place: jax.make_array_from_callback(leaf.shape, place, leaf.__getitem__),
        whole,
        sharding.shardings(axes, shapes, mesh),
    )
    state = init_state(params, optimizer, seed=1, mesh=mesh, axes=axes)
    tracking = TrackingConfig(wandb="disabled", progress="lines")
    order = folder.parent / f"order-{folder.name}"
    order.mkdir(exist_ok=True, parents=True)
    with (
        open_run(folder, {"steps": NUM_STEPS}, tracking=tracking) as tracker,
        open_checkpoints(tracker.checkpoints, CheckpointConfig(every=2, max_to_keep=2)) as checkpoints,
    ):
        rows = sharding.process_rows(mesh, BATCH_SIZE)
        state = train(
            state,
            data(rows, dict(plans).get("hang"), order),
            step,
            num_steps=NUM_STEPS,
            checkpoints=checkpoints,
            tracker=tracker,
            callbacks=[callback for how, at in plans for callback in arrange(folder, how, at)],
        )
        end = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.trainable, state.opt_state, state.step)):
            for shard in leaf.addressable_shards:
                name = f"{jax.tree_util.keystr(path)} {shard.index} {shard.device.id}"
                end[name] = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
        found = processes.gather("end", json.dumps(end))
        if processes.index() == 0:
            (folder / "end.json").write_text(json.dumps({k: v for one in found for k, v in json.loads(one).items()}))
        tracker.complete({})


def main() -> None:
    folders = [folder for folder in map(Path, sys.argv[1].split(os.pathsep)) if completed(folder) is None]
    plans = [(f"{how}:0:0" if how == "end" else how).split(":") for how in sys.argv[2:]]
    with processes.job():
        own = [(how, int(at), where) for how, at, who, *where in plans if int(who) == processes.index()]
        try:
            for folder in folders:
                run(folder, [(how, at) for how, at, where in own if where in ([], [folder.name])])
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error


if __name__ == "__main__":
    main()
