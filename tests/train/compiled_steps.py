"""Compiles training steps of published sizes for 64 fake devices; started by test_collectives.py, which sets them.

Prints one JSON line per step: its name, seconds, and every collective as [operation, shapes, inside a loop]. What the
compiler has to complain about goes to stderr. Two layers stand for all: they are compiled once, as a loop.
"""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp

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


def compiled(model, mesh_config, attention, rows, length) -> str:
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
    return step.lower(state, Batch(ids, ids, weights, ids, ids)).compile().as_text()


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
        started = time.perf_counter()
        text = compiled(*step)
        row = {"name": name, "seconds": time.perf_counter() - started, "collectives": collectives(text)}
        print(json.dumps(row), flush=True)
