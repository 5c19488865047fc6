"""A small training run that dies where it is told to: the program that test_resume.py starts again and again.

python killed_run.py RUN_FOLDER HOW, with HOW one of
    end            run to the end
    step:N         SIGKILL when step N is done
    write:N        SIGKILL as soon as the checkpoint of step N is being written in the background
    seal:N         SIGKILL when the arrays of step N are written and the step is not committed yet
    remove:N       SIGKILL half-way through the removal of the old checkpoint of step N
    full:N         from step N on no file may grow beyond 20 kB, as on a disk that is full
"""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time

import jax
import numpy as np

from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.train import checkpoint
from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.loop import Every, train
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run

NUM_STEPS = 40
CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)


def data(position: int):
    while True:
        time.sleep(0.01)  # so that a kill from outside meets the run in the middle
        tokens = np.random.default_rng([4, position]).integers(1, 64, size=(8, 17)).astype(np.int32)
        ones = np.ones((8, 16), np.int32)
        yield Batch(
            tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), np.broadcast_to(np.arange(16), (8, 16)), ones
        )
        position += 1


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def arrange(how: str, at: int) -> list[Every]:
    """Plants the death (or the full disk) and returns the callbacks that it needs."""
    if how == "write":
        seal = checkpoint.Checkpoints._seal
        checkpoint.Checkpoints._seal = lambda self, step, about: die() if step == at else seal(self, step, about)
    elif how == "seal":
        write = checkpoint._write_durably
        name = checkpoint.COMMITTED
        checkpoint._write_durably = lambda path, text: (
            die() if path.name == name and path.parent.name == str(at) else write(path, text)
        )
    elif how == "remove":
        remove = shutil.rmtree

        def rmtree(path, **how):
            if os.path.basename(path) == str(at):
                remove(os.path.join(path, "trainable"))
                die()
            remove(path, **how)

        shutil.rmtree = rmtree

    def at_step(state, step):
        if step == at and how == "step":
            die()
        if step == at and how == "full":
            while checkpoint.latest(os.path.join(sys.argv[1], "checkpoints")) is None:
                time.sleep(0.01)  # the checkpoint before is to be whole
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    return [Every(1, at_step)] if how in ("step", "full") else []


def main() -> None:
    folder, how = sys.argv[1:]
    callbacks = arrange(*[int(part) if part.isdigit() else part for part in (how + ":0").split(":")[:2]])
    optimizer = make_optimizer(AdamW(peak_lr=0.01), Cosine(warmup_steps=5), NUM_STEPS)
    state = init_state(jax.jit(lambda key: decoder.init(CONFIG, key))(jax.random.key(0)), optimizer, seed=1)
    tracking = TrackingConfig(wandb="disabled", progress="none")
    with (
        open_run(folder, {"steps": NUM_STEPS}, tracking=tracking) as run,
        open_checkpoints(run.checkpoints, CheckpointConfig(every=10, max_to_keep=2)) as checkpoints,
    ):
        step = make_step(next_token(CONFIG), optimizer, accumulate=2)
        state = train(state, data, step, num_steps=NUM_STEPS, checkpoints=checkpoints, tracker=run, callbacks=callbacks)
        leaves = jax.tree_util.tree_leaves_with_path(
            (state.trainable, state.opt_state, state.step, state.data_position)
        )
        digests = {jax.tree_util.keystr(p): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for p, x in leaves}
        run.complete({})
        (run.folder / "end.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
