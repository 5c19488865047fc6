"""Reads, converts and restores a model while the process may take only so much more memory; run by test_memory.

The limit is RLIMIT_DATA: every private writable page that is reserved counts, whether it is touched or not. Programs
are compiled before it is set, because a compiler's memory is not the model's.
"""

import contextlib
import dataclasses
import gc
import json
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from internjax.hf.convert import convert
from internjax.hf.families import layout_family
from internjax.hf.loading import load_params
from internjax.hf.mapping import tensor_names, tensor_shape
from internjax.hf.open import open_model
from internjax.hf.save import save_architecture
from internjax.hf.weights import Plan, list_tensors, write_model
from internjax.model.config import ModelConfig
from internjax.train.checkpoint import open_checkpoints
from internjax.train.optimizer import Adafactor, Constant, make_optimizer
from internjax.train.step import init_state

# 115 MB in 75 tensors of at most 4 MiB: a second copy of the model, or of a stacked leaf (34 MB), does not fit.
CONFIG = ModelConfig(
    vocab_size=4096,
    d_model=256,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=4096,
    max_position_embeddings=64,
    dtype="float32",
)
LARGEST = 4096 * 256 * 4
# Threads, their arenas and Python's own growth.
SLACK = 12 << 20


def data_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


@contextlib.contextmanager
def at_most(more: int):
    """Lets the process take `more` bytes than it has; proves that this binds."""
    gc.collect()
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes() + more, resource.RLIM_INFINITY))
    try:
        try:
            np.empty(more + (1 << 20), np.uint8)
        except MemoryError:
            yield
        else:
            raise AssertionError("the limit does not bind")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write_folder(folder: Path) -> int:
    """Writes a sharded model without ever holding it; returns its bytes."""
    family = layout_family("llama")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family.config_to_hf(CONFIG)))
    plans = {}
    for row in family.rows(CONFIG):
        for name in tensor_names(row, CONFIG):
            shape = tensor_shape(row, CONFIG)
            fetch = lambda shape=shape: np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)  # noqa: E731
            plans[name] = Plan(shape, np.dtype(np.float32), fetch)
    write_model(folder, plans, shard_size="30MB")
    return sum(plan.nbytes for plan in plans.values())


def main(place: Path) -> None:
    # A program that runs beside the interpreter lets go of its arguments some time after its result is there; on a busy
    # machine that is late enough for a deleted model and the one that is read back to be in memory together.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    target = write_folder(place / "model")
    load = lambda: load_params(  # noqa: E731
        list_tensors(place / "model"), layout_family("llama"), CONFIG, where="model"
    )
    jax.block_until_ready(load())
    with at_most(target + 2 * LARGEST + SLACK):
        params = jax.block_until_ready(load())
    print("read")
    save_architecture(place / "run", config=CONFIG, tokenizer=None)
    with open_checkpoints(place / "run" / "checkpoints") as checkpoints:
        checkpoints.save(
            dataclasses.replace(
                init_state(params, make_optimizer(Adafactor(), Constant(), 1)), step=jnp.asarray(1, jnp.int32)
            )
        )
    del params
    convert(place / "model", place / "warm")
    with at_most(target + 2 * LARGEST + SLACK):
        convert(place / "model", place / "copy", shard_size="30MB")
    print("converted")
    # A checkpoint of one device holds a leaf as one block, here a third of the model; it is held compressed, unpacked
    # and whole. All leaves at once, as Orbax reads them, would be three models.
    stacked = CONFIG.num_layers * LARGEST
    jax.block_until_ready(open_model(place / "run").params)
    with at_most(target + 3 * stacked + 3 * SLACK):
        jax.block_until_ready(open_model(place / "run").params)
    print("restored")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
