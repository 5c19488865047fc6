"""Compiles training steps of published sizes for 64 fake devices; started by test_collectives.py, which sets them.

Prints one JSON line per step: its name, every collective as [operation, shapes, inside a loop], and what the compiler
has to complain about. Two layers stand for all: they are compiled once, as a loop. What was found of a program is kept
in the folder of compiled programs. What jax itself keeps there would not do: of a program that comes from it the
compiler says nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

from internjax import sharding
from internjax.model import decoder
from internjax.model.config import INTERNLM2_7B, INTERNLM2_20B
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import abstract_state, make_step

# Model, mesh, attention back end, rows, time. No time is a width of the model, so that shapes tell what is what.
STEPS = {
    "7B, fsdp 64": (INTERNLM2_7B, MeshConfig(fsdp=64), "chunked", 64, 3072),
    "7B, fsdp 32, sequence 2": (INTERNLM2_7B, MeshConfig(fsdp=32, sequence=2), "ring", 32, 20480),
    "7B, fsdp 8": (INTERNLM2_7B, MeshConfig(fsdp=8), "chunked", 8, 3072),
    "20B, fsdp 16, tensor 4": (INTERNLM2_20B, MeshConfig(fsdp=16, tensor=4), "chunked", 16, 2048),
    "20B, fsdp 8, sequence 2, tensor 4": (INTERNLM2_20B, MeshConfig(fsdp=8, sequence=2, tensor=4), "ring", 8, 20480),
}
_OPERATION = re.compile(r"= (\(?\w+\[.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\(")


def lowered(model, mesh_config, attention, rows, length) -> jax.stages.Lowered:
    model = dataclasses.replace(model, attention=attention, remat="full", num_layers=2)
    num_devices = mesh_config.fsdp * mesh_config.sequence * mesh_config.tensor
    mesh = sharding.make_mesh(mesh_config, jax.devices()[:num_devices])
    optimizer = make_optimizer(AdamW(), Cosine(), 1000)
    axes = decoder.logical_axes(model)
    state = abstract_state(decoder.abstract_params(model), optimizer, mesh=mesh, axes=axes)
    ids, weights = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding.batch_sharding(mesh))
        for dtype in (jnp.int32, jnp.float32)
    )
    step = make_step(next_token(model), optimizer, mesh=mesh)
    return step.lower(state, Batch(ids, ids, weights, ids, ids))


def looked_at(program: jax.stages.Lowered) -> dict:
    """Returns the collectives of a program and the complaints about it: of one compiled before, what was found then."""
    about = (jax.__version__, jaxlib.__version__, os.environ["XLA_FLAGS"], Path(__file__).read_text())
    # The text has no places in files, so that a line more above a function is no other program.
    key = hashlib.sha256("\0".join((*about, program.as_text())).encode()).hexdigest()
    folder = jax.config.jax_compilation_cache_dir
    kept = folder and Path(folder) / f"collectives-{key[:32]}.json"
    if kept and kept.is_file():
        return json.loads(kept.read_text())
    with standard_error() as said:
        text = program.compile().as_text()
        found = {"collectives": collectives(text), "complaints": said.read_text()}
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(found))
        new.replace(kept)
    return found


@contextlib.contextmanager
def standard_error() -> Iterator[Path]:
    """Sends what the process writes to stderr, the compiler's C++ included, to a file, whose path is given."""
    with tempfile.NamedTemporaryFile() as file:
        before = os.dup(2)
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield Path(file.name)
        finally:
            os.dup2(before, 2)
            os.close(before)


def collectives(text: str) -> list:
    found = []
    for line in text.splitlines():
        if operation := _OPERATION.search(line):
            parts = re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
            shapes = [[kind, *map(int, filter(None, dims.split(",")))] for kind, dims in parts]
            found.append([operation[2], shapes, "while/body" in line])
    return found


if __name__ == "__main__":
    for name, step in STEPS.items():
        print(json.dumps({"name": name, **looked_at(lowered(*step))}), flush=True)
