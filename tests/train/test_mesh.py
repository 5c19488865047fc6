"""Training on 8 fake devices: the losses of one device, and shardings read off what comes out of the step."""

import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from internjax import sharding
from internjax.model import decoder, lora
from internjax.model.config import ModelConfig
from internjax.sharding import MeshConfig, make_mesh
from internjax.train import checkpoint_orbax
from internjax.train.batch import Batch
from internjax.train.checkpoint import CheckpointConfig, fingerprint, open_checkpoints
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import abstract_state, init_state, make_step, put_batch
from tests.conftest import QUICK_FLAGS
from tests.weights import random_params

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=64, dtype="float32"
)
OPTIMIZER = make_optimizer(AdamW(peak_lr=0.01), Cosine(warmup_steps=2), num_steps=10)
NUM_STEPS = 3
ROOT = Path(__file__).resolve().parents[2]

compilations: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compilations.append(event) if "backend_compile" in event else None
)


@functools.cache
def initial_params():
    return jax.device_get(random_params(CONFIG))


@pytest.fixture(autouse=True)
def no_mesh_afterwards():
    yield
    make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def batch_at(position: int, rows: int = 16, seq_len: int = 16) -> Batch:
    """Returns packed rows: three documents each, the last of them partly padding."""
    rng = np.random.default_rng([5, position])
    tokens = rng.integers(1, CONFIG.vocab_size, size=(rows, seq_len + 1)).astype(np.int32)
    cuts = np.sort(rng.integers(1, seq_len + 1, size=(rows, 3)), axis=1)
    index = np.arange(seq_len)
    segments = (1 + (index >= cuts[:, :1]) + (index >= cuts[:, 1:2])) * (index < cuts[:, 2:])
    begins = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:2]))
    positions = np.where(segments > 0, index - begins, 0).astype(np.int32)
    real = segments > 0
    return Batch(
        tokens[:, :-1] * real, tokens[:, 1:] * real, real.astype(np.float32), positions, segments.astype(np.int32)
    )


class Layout(NamedTuple):
    """How a run is laid out: its mesh over the first devices that fill it, and what else does not change the result."""

    mesh: MeshConfig | None
    attention: str = "xla"
    accumulate: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.mesh.data, self.mesh.fsdp, self.mesh.sequence, self.mesh.tensor


@functools.cache
def program(layout: Layout):
    """Returns (mesh, step) of a layout; the step is compiled once for all tests."""
    devices = jax.devices()[: 1 if layout.mesh is None else int(np.prod(layout.shape))]
    mesh = None if layout.mesh is None else make_mesh(layout.mesh, devices)
    loss = next_token(dataclasses.replace(CONFIG, attention=layout.attention), chunk_size=4)
    return mesh, make_step(loss, OPTIMIZER, accumulate=layout.accumulate, mesh=mesh)


def start(layout: Layout, seed: int = 0):
    mesh, _ = program(layout)
    sharding._configured_mesh = mesh
    axes, place = (
        (None, "as_parameters") if mesh is None else (decoder.logical_axes(CONFIG), layout.mesh.optimizer_state)
    )
    return init_state(initial_params(), OPTIMIZER, seed=seed, mesh=mesh, axes=axes, optimizer_state=place)


def trained(layout: Layout, state=None, num_steps: int = NUM_STEPS):
    """Returns (losses and gradient norms, final state) of updates of the tiny decoder, from step 0 or a state."""
    mesh, step = program(layout)
    state = start(layout) if state is None else state
    rows, first = [], int(state.step)
    for position in range(first, first + num_steps):
        before = len(compilations)
        state, metrics = step(state, put_batch(batch_at(position), mesh))
        assert position == first or len(compilations) == before, "only the first step compiles"
        rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert step.num_traces == 1
    return np.array(rows), state


# Every two axes meet in one of them, and every attention, accumulation and place of the optimizer's state is there.
ONE = Layout(None)
FSDP = Layout(MeshConfig(fsdp=8))
RING = Layout(MeshConfig(fsdp=2, sequence=2, tensor=2), "ring", accumulate=2)
SHARED_OUT = Layout(MeshConfig(data=2, fsdp=2, tensor=2, optimizer_state="over_data"))
ZERO = Layout(MeshConfig(data=8, fsdp=1, optimizer_state="over_data"), accumulate=2)
LAYOUTS = [
    FSDP,
    RING,
    SHARED_OUT,
    Layout(MeshConfig(data=2, fsdp=2), accumulate=2),
    Layout(MeshConfig(data=2, fsdp=1, sequence=2, tensor=2), "ring"),
    ZERO,
    Layout(MeshConfig(data=2, fsdp=1, sequence=4), "ring"),
    Layout(MeshConfig(fsdp=2, sequence=2), "chunked"),
]


def name_of(layout: Layout) -> str:
    sizes = " ".join(f"{axis} {size}" for axis, size in zip(sharding.MESH_AXES, layout.shape) if size > 1)
    return f"{sizes}, {layout.attention}, accumulate {layout.accumulate}, {layout.mesh.optimizer_state}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_mesh_trains_as_one_device(layout):
    wanted, single = trained(ONE)
    given, state = trained(layout)
    # Sums over devices are added in another order: float32 rounding, NUM_STEPS updates long.
    np.testing.assert_allclose(given, wanted, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.trainable, single.trainable)
    # A running mean of gradients is linear in them: this compares the gradients leaf by leaf.
    means = state.opt_state[1].mean, single.opt_state[1].mean
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4), *means)

    mesh, _ = program(layout)
    places = sharding.shardings(decoder.logical_axes(CONFIG), state.trainable, mesh)
    same = jax.tree.map(lambda leaf, place: leaf.sharding.is_equivalent_to(place, leaf.ndim), state.trainable, places)
    assert all(jax.tree.leaves(same)), same
    up = state.trainable["layers"]["ffn"]["up"]["kernel"]
    parts = layout.mesh.fsdp * layout.mesh.tensor
    assert up.addressable_shards[0].data.size * parts == up.size  # really cut, not only labelled
    if layout.mesh.optimizer_state == "over_data":
        parts *= layout.mesh.data
    for moment in (state.opt_state[1].mean, state.opt_state[1].square):
        up = moment["layers"]["ffn"]["up"]["kernel"]
        assert up.addressable_shards[0].data.size * parts == up.size


def test_zero_keeps_parameters_whole_and_shares_the_rest_out():
    _, state = trained(ZERO, num_steps=1)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.trainable))
    for moment in (state.opt_state[1].mean, state.opt_state[1].square):
        whole = sum(leaf.size for leaf in jax.tree.leaves(moment))
        for device in range(8):
            held = sum(leaf.addressable_shards[device].data.size for leaf in jax.tree.leaves(moment))
            assert held * 8 == whole  # every leaf of the tiny model divides by 8, norms included
    mesh, _ = program(ZERO)
    abstract = abstract_state(
        decoder.abstract_params(CONFIG),
        OPTIMIZER,
        mesh=mesh,
        axes=decoder.logical_axes(CONFIG),
        optimizer_state="over_data",
    )
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), abstract, state)
    assert all(jax.tree.leaves(same)), same


def test_adapters_train_over_a_sharded_frozen_base_that_is_not_copied():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    lora_config = lora.LoraConfig(rank=2, targets=("query", "value"))
    axes = decoder.logical_axes(CONFIG)
    base = initial_params()
    adapters = jax.jit(functools.partial(lora.init_lora, lora_config))(base, jax.random.key(1))
    state = init_state(
        adapters, OPTIMIZER, frozen=base, mesh=mesh, axes=lora.logical_axes(adapters, axes), frozen_axes=axes
    )
    frozen = state.frozen
    step = make_step(next_token(CONFIG, lora_config=lora_config), OPTIMIZER, mesh=mesh)
    for position in range(2):
        state, metrics = step(state, put_batch(batch_at(position), mesh))
    assert bool(metrics["finite"]) and step.num_traces == 1
    assert all(a is b for a, b in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(frozen)))
    assert state.frozen["layers"]["ffn"]["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert state.trainable["layers"]["attention"]["query"]["a"].sharding.spec == P(None, "fsdp", None)


def test_a_state_that_is_not_on_the_mesh_is_refused():
    mesh = make_mesh(MeshConfig(fsdp=8))
    state = init_state(initial_params(), OPTIMIZER)
    with pytest.raises(ValueError, match="Give init_state the same mesh"):
        make_step(next_token(CONFIG), OPTIMIZER, mesh=mesh)(state, batch_at(0))


def test_parameters_that_live_on_the_mesh_stay_where_they_are():
    mesh = make_mesh(MeshConfig(fsdp=8))
    placed = sharding.shardings(decoder.logical_axes(CONFIG), decoder.abstract_params(CONFIG), mesh)
    params = jax.device_put(initial_params(), placed)
    state = init_state(params, OPTIMIZER, mesh=mesh)
    assert all(a is b for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(params)))
    assert state.opt_state[1].mean["head"]["kernel"].sharding == placed["head"]["kernel"]


def test_batches_are_split_by_rows_and_time():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    assert sharding.process_rows(mesh, 8) == sharding.process_rows(None, 8) == tuple(range(8))
    placed = put_batch(
        {"tokens": np.zeros((8, 6), np.int32), "rewards": np.zeros(8), "images": np.zeros((4, 3, 5))}, mesh
    )
    assert placed["tokens"].sharding.spec == P(("data", "fsdp"), "sequence")
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 3)
    assert placed["rewards"].addressable_shards[0].data.shape == (2,)
    assert placed["images"].addressable_shards[0].data.shape == (1, 3, 5)


def test_what_the_mesh_does_not_divide_is_refused_and_not_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    with pytest.raises(ValueError, match="3 rows cannot be split evenly over data 2 x fsdp 2 = 4.*multiple of 4 rows"):
        put_batch({"odd": np.zeros((3, 6))}, mesh)
    with pytest.raises(ValueError, match="6 rows cannot be split"):
        sharding.process_rows(mesh, 6)
    with pytest.raises(ValueError, match="5 time steps, which sequence 2.*multiple of 2"):
        put_batch({"odd": np.zeros((4, 5))}, mesh)
    state = init_state(initial_params(), OPTIMIZER, mesh=mesh, axes=decoder.logical_axes(CONFIG))
    with pytest.raises(ValueError, match="8 rows cannot be cut into 4 equal micro-batches.*= 16"):
        make_step(next_token(CONFIG), OPTIMIZER, accumulate=4, mesh=mesh)(state, put_batch(batch_at(0, rows=8), mesh))


@pytest.mark.slow
def test_two_processes_place_their_own_rows():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    script = str(Path(__file__).with_name("placed_rows.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(process)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # The script stands in tests/, so the checkout is named; a path that is set already stays.
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {QUICK_FLAGS}",
            },
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all("placed 4 batches" in output for output in outputs)


@pytest.mark.parametrize(
    ("source", "part_bytes", "layout"),
    # ZERO's devices hold all parameters whole: written by one of them, or in parts as arrays of many megabytes are.
    [(FSDP, None, SHARED_OUT), (ZERO, 0, RING), (ZERO, None, FSDP), (FSDP, None, ZERO)],
    ids=lambda value: name_of(value) if isinstance(value, Layout) else str(value),
)
def test_a_checkpoint_goes_on_on_another_mesh(tmp_path, monkeypatch, source, part_bytes, layout):
    if part_bytes is not None:
        monkeypatch.setattr(checkpoint_orbax, "PART_BYTES", part_bytes)
    wanted, _ = trained(ONE, num_steps=5)
    _, state = trained(source, num_steps=2)
    saved = jax.device_get((state.trainable, state.opt_state))
    with open_checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state)
    other = start(layout, seed=1)
    with contextlib.closing(open_checkpoints(tmp_path)) as checkpoints:
        restored = checkpoints.restore(other)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((restored.trainable, restored.opt_state)), saved)
    assert int(restored.step) == 2 and jax.random.key_data(restored.rng).tolist() == [0, 0]
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, other)
    assert all(jax.tree.leaves(same))
    given, _ = trained(layout, restored, num_steps=3)
    np.testing.assert_allclose(given, wanted[2:], rtol=2e-5)


def test_the_fingerprint_does_not_depend_on_the_mesh():
    # A stack of matrices, a table and a vector: what there is of shapes.
    names = ("layers", "embed", "norm")
    params, axes = ({name: tree[name] for name in names} for tree in (initial_params(), decoder.logical_axes(CONFIG)))
    params["layers"], axes["layers"] = ({"ffn": tree["layers"]["ffn"]} for tree in (params, axes))
    alone = fingerprint(params)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    placed = sharding.shardings(axes, params, mesh)
    assert fingerprint(jax.device_put(params, placed)) == alone
    changed = params | {"norm": {"scale": params["norm"]["scale"].copy()}}
    changed["norm"]["scale"][3] *= np.float32(1 + 2**-23)
    assert fingerprint(changed) != alone
