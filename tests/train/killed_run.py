"""A small training run that dies where it is told to: what test_resume.py starts again and again.

run(RUN_FOLDER, HOW), with HOW one of
    end            run to the end
    step:N         SIGKILL between steps, once step N is done
    any:N          SIGKILL from another thread, some milliseconds after step N is done
    write:N        SIGKILL while the arrays of step N or a later one are being written
    seal:N         SIGKILL when its arrays are written and none of its records
    commit:N       SIGKILL when its records are written and COMMITTED is not
    remove:N       SIGKILL half-way through the removal of an old checkpoint, from step N on
    full:N         from step N on no file may grow beyond 20 kB, as on a disk that is full
    pace:S         S seconds for every batch
"""

import gc
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np

from internjax.model.config import ModelConfig
from internjax.train import checkpoint
from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.checkpoint_files import ABOUT, COMMITTED
from internjax.train.loop import Every, train
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run
from tests.weights import random_params

NUM_STEPS, EVERY = 45, 5
CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)


def data(order: Path, pace: float):
    """Returns batches that are written down by position: a batch must be the same whenever it is read."""

    def batches(position: int):
        while True:
            time.sleep(pace)
            tokens = np.random.default_rng([4, position]).integers(1, 64, size=(8, 17)).astype(np.int32)
            with open(order, "a") as file:
                file.write(f"{position} {hashlib.sha256(tokens.tobytes()).hexdigest()}\n")
            ones = np.ones((8, 16), np.int32)
            positions = np.broadcast_to(np.arange(16), (8, 16))
            yield Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), positions, ones)
            position += 1

    return batches


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_soon() -> None:
    """Dies from another thread, while this one goes on."""
    threading.Timer(random.uniform(0, 0.02), die).start()


def arrange(folder: Path, how: str, at: float) -> list[Every]:
    """Plants the death (or the full disk) and returns the callbacks that it needs."""
    seal, write, remove = checkpoint.Checkpoints._seal, checkpoint.write_durably, shutil.rmtree
    if how == "write":
        # Orbax writes in the background from here on.
        checkpoint.Checkpoints._seal = lambda self, step, about: (step >= at and die_soon(), seal(self, step, about))
    names = {"seal": ABOUT, "commit": COMMITTED}
    if how in names:
        checkpoint.write_durably = lambda path, text: (
            die() if path.name == names[how] and int(path.parent.name) >= at else write(path, text)
        )
    if how == "remove":

        def rmtree(path, **options):
            if os.path.basename(path).isdigit() and max(checkpoint.committed_steps(Path(path).parent), default=0) >= at:
                remove(os.path.join(path, "trainable"))
                die()
            remove(path, **options)

        shutil.rmtree = rmtree

    def at_step(state, step):
        if step < at:
            return
        if how == "step":
            die()
        if how == "any":
            die_soon()
        if how == "full" and step == at:
            while checkpoint.latest(folder / "checkpoints") is None:
                time.sleep(0.01)  # the checkpoint before is to be whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    return [Every(1, at_step)] if how in ("step", "any", "full") else []


def main(folder: Path, how: str) -> None:
    kind, at = (how + ":0").split(":")[:2]
    callbacks = arrange(folder, kind, float(at))
    optimizer = make_optimizer(AdamW(peak_lr=0.01), Cosine(warmup_steps=5), NUM_STEPS)
    state = init_state(random_params(CONFIG), optimizer, seed=1)
    tracking = TrackingConfig(wandb="disabled", progress="none")
    with (
        open_run(folder, {"steps": NUM_STEPS}, tracking=tracking) as run,
        open_checkpoints(run.checkpoints, CheckpointConfig(every=EVERY, max_to_keep=2)) as checkpoints,
    ):
        state = train(
            state,
            data(folder.parent / f"{folder.name}.order", float(at) if kind == "pace" else 0.002),
            make_step(next_token(CONFIG), optimizer, accumulate=2),
            num_steps=NUM_STEPS,
            checkpoints=checkpoints,
            tracker=run,
            callbacks=callbacks,
        )
        leaves = jax.tree_util.tree_leaves_with_path(
            (state.trainable, state.opt_state, state.step, state.data_position)
        )
        digests = {jax.tree_util.keystr(p): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for p, x in leaves}
        run.complete({})
        (run.folder / "end.json").write_text(json.dumps(digests))


def run(folder: str, how: str, said: str) -> None:
    """Runs it in this process, which ends with it; what it says goes to the file `said`."""
    gc.freeze()  # what the server has imported stays; to search it again and again took a tenth of a life
    os.environ["WANDB_MODE"] = "disabled"
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        main(Path(folder), how)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
