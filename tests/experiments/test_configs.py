"""Experiments are values: their command line, their resolved configs, and that each fits the mesh it names."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from experiments import finetune, internlm2_1_8b, internlm2_7b, internlm2_20b, sft_lora_7b, tiny
from experiments.__main__ import entries
from experiments.stages import Finetune, Pretrain, guarded, launch, parse
from internjax import sharding
from internjax.model import decoder, lora
from internjax.model.config import INTERNLM2_7B, DynamicNTK
from internjax.model.lora import LoraConfig
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.losses import next_token
from internjax.train.optimizer import Constant, Cosine, Linear, make_optimizer
from internjax.train.step import TrainState, make_step
from tests.golden.configs import make

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = make.configs()
SEVEN = internlm2_7b.CONFIG

# --- command line ----------------------------------------------------------------------------------------------------


def changed(config, *args):
    """The fields in which the parsed config differs, by dotted name."""

    def differing(old, new, path):
        if type(old) is type(new) and dataclasses.is_dataclass(old):
            for field in dataclasses.fields(old):
                yield from differing(getattr(old, field.name), getattr(new, field.name), f"{path}.{field.name}")
        elif old != new:
            yield path[1:], new

    return dict(differing(config, parse(config, args), ""))


@pytest.mark.parametrize("module", CONFIGS)
def test_no_argument_changes_nothing(module):
    assert parse(CONFIGS[module], []) == CONFIGS[module]


def test_fields_of_every_depth():
    args = ("--optimizer.peak-lr", "1e-5", "--num-steps=7", "--model.rope-theta", "2e4", "--run", "trial")
    wanted = {"optimizer.peak_lr": 1e-5, "num_steps": 7, "model.rope_theta": 2e4, "run": "trial"}
    assert changed(SEVEN, *args) == wanted
    assert changed(SEVEN, *(arg.replace("-lr", "_lr").replace("m-s", "m_s") for arg in args)) == wanted  # as sweeps say


def test_none_is_a_value():
    assert changed(SEVEN, "--optimizer.clip-norm", "None") == {"optimizer.clip_norm": None}
    assert changed(SEVEN, "--optimizer.clip-norm", "2") == {"optimizer.clip_norm": 2.0}
    assert changed(SEVEN, "--init", "runs/a") == {"init": "runs/a"} and changed(SEVEN, "--init", "None") == {}


@pytest.mark.parametrize(
    ("arg", "wanted"),
    [
        ("--fresh", {"fresh": True}),
        ("--fresh=True", {"fresh": True}),
        ("--fresh=true", {"fresh": True}),
        ("--fresh=False", {}),
        ("--no-fresh", {}),
        ("--no-merge", {"merge": False}),
        ("--merge=False", {"merge": False}),
    ],
)
def test_booleans(arg, wanted):
    assert changed(finetune.CONFIG, arg) == wanted


@pytest.mark.parametrize(
    "arg", ["--model.tie-embeddings", "--model.tie-embeddings=True", "--model.tie_embeddings=True"]
)
def test_booleans_of_a_nested_field(arg):
    assert changed(SEVEN, arg) == {"model.tie_embeddings": True}
    off = internlm2_1_8b.CONFIG
    assert changed(off, "--model.no-norm-head") == changed(off, "--model.norm-head=False") == {"model.norm_head": False}


def test_unions_are_chosen_by_name():
    assert changed(SEVEN, "schedule:linear") == {"schedule": Linear()}
    args = ("--num-steps", "9", "schedule:linear", "--schedule.warmup-steps", "3", "--seed", "1")
    assert changed(SEVEN, *args) == {"num_steps": 9, "schedule": Linear(3), "seed": 1}  # in any order
    assert changed(SEVEN, "--schedule.warmup-steps", "3") == {"schedule.warmup_steps": 3}
    args = ("model.rope-scaling:dynamic-ntk", "--model.rope-scaling.factor", "2", "schedule:constant")
    assert changed(SEVEN, *args) == {"model.rope_scaling": DynamicNTK(2.0), "schedule": Constant()}


def test_tuples_take_several_values():
    args = ("--data", "a.jsonl", "b.json", "--model", "m", "--lora.targets", "query", "head")
    wanted = {"data": ("a.jsonl", "b.json"), "model": "m", "lora.targets": ("query", "head")}
    assert changed(finetune.CONFIG, *args) == wanted


MISTAKES = {
    "an unknown field": (SEVEN, ["--optimizer.lr", "1"], "--optimizer.lr"),
    "an unknown choice": (SEVEN, ["schedule:step"], "schedule:step"),
    "a wrong type": (SEVEN, ["--num-steps", "many"], "invalid literal for int() with base 10: 'many'"),
    "a value beyond its range": (SEVEN, ["--optimizer.b1", "2"], "given b1=2.0"),
    "a value that is none of the literals": (SEVEN, ["--model.dtype", "int8"], "'int8'"),
    "no value": (SEVEN, ["--num-steps"], "--num-steps"),
    "two fields that exclude each other": (finetune.CONFIG, ["--method", "full", "--lora.rank", "4"], "--method lora"),
    "nothing to keep": (finetune.CONFIG, ["--method", "full", "--no-merge"], "merge=False leaves"),
    "a boolean that is none": (SEVEN, ["--fresh=maybe"], "maybe"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_and_nothing_runs(name, capsys):
    config, args, said = MISTAKES[name]
    with pytest.raises(SystemExit) as ended:
        launch(lambda config: pytest.fail("ran"), config, args)
    assert ended.value.code not in (0, None)
    printed = capsys.readouterr()
    flat = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert said in flat and "Traceback" not in flat


@pytest.mark.parametrize("error", [ValueError, OSError, FloatingPointError])
def test_what_a_person_can_mend_ends_with_one_message(error, capsys):
    def run(config):
        raise error("given a, wanted b")

    with pytest.raises(SystemExit) as ended:
        guarded(run, SEVEN)
    assert ended.value.code == 1 and capsys.readouterr().err == "error: given a, wanted b\n"


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda config: 1 / 0, SEVEN)
    assert guarded(lambda config: config.run, SEVEN) == "internlm2_7b"


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(finetune.CONFIG, ["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Finetune) if field.name != "schedule"]
    assert [name for name in names if f"--{name}" not in printed] == [] and "schedule:" in printed


# --- resolved configs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", CONFIGS)
def test_resolved_config_is_the_golden_one(module):
    path = make.path_of(module)
    golden = path.read_text() if path.is_file() else None
    assert make.text_of(CONFIGS[module]) == golden, "if this change is meant: python -m tests.golden.configs.make"


def test_every_golden_has_its_experiment():
    assert {path.name for path in make.HERE.glob("*.json")} == {make.path_of(module).name for module in CONFIGS}


# --- meshes ----------------------------------------------------------------------------------------------------------


def abstract_mesh(config: MeshConfig, num_devices: int) -> AbstractMesh:
    return AbstractMesh(config.shape(num_devices), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def bytes_per_device(tree, places) -> int:
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(int(np.prod(place.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf, place in leaves)


def scalar(dtype=jnp.int32):
    return jax.ShapeDtypeStruct((), dtype)


def abstract_batch(num_rows: int, seq_len: int) -> Batch:
    ids = jax.ShapeDtypeStruct((num_rows, seq_len), jnp.int32)
    return Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), ids, ids)


def traced(loss, optimizer, trainable, frozen, batch, mesh, accumulate):
    """Traces one whole step under the mesh, every sharding constraint of the model included. Allocates nothing."""
    state = TrainState(
        scalar(),
        trainable,
        None,
        jax.eval_shape(optimizer.init, trainable),
        jax.eval_shape(jax.random.key, 0),
        scalar(),
    )
    step = make_step(loss, optimizer, accumulate=accumulate)
    with jax.sharding.use_abstract_mesh(mesh):
        new, metrics = jax.eval_shape(step._update, state, frozen, batch)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, new)
    assert all(jax.tree.leaves(same)) and metrics["loss"].shape == ()
    return state


@pytest.mark.parametrize(
    ("config", "num_devices", "mesh"),
    [
        (internlm2_1_8b.CONFIG, 8, None),
        (SEVEN, 64, None),
        (internlm2_20b.CONFIG, 64, None),
        (internlm2_20b.CONFIG, 64, MeshConfig(fsdp=16, tensor=4)),
        (internlm2_20b.CONFIG, 128, MeshConfig(data=2, fsdp=16, tensor=4)),
    ],
    ids=["1.8B on 8", "7B on 64", "20B on its mesh", "20B on fsdp 16 x tensor 4", "20B on two replicas"],
)
def test_pretraining_is_built_on_its_mesh(config: Pretrain, num_devices, mesh):
    mesh = abstract_mesh(mesh or config.mesh, num_devices)
    params, axes = decoder.abstract_params(config.model), decoder.logical_axes(config.model)
    places = sharding.shardings(axes, params, mesh)
    optimizer = make_optimizer(config.optimizer, config.schedule, config.num_steps)
    batch = abstract_batch(config.data.batch_size, config.data.seq_len)
    state = traced(next_token(config.model), optimizer, params, None, batch, mesh, config.accumulate)
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, place: place, state.opt_state, places, transform_non_params=lambda _: None
    )
    assert {place.spec for place in jax.tree.leaves(moments)} == {place.spec for place in jax.tree.leaves(places)}
    # Parameters and both moments are split over everything but replicas; norms stay whole.
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert bytes_per_device(params, places) < 1.001 * whole / shards + 2e6
    assert 3 * bytes_per_device(params, places) < 80e9
    # Rows and time of the batch are divided evenly.
    rows, time = sharding.batch_sharding(mesh).shard_shape(batch.tokens.shape)
    assert rows * mesh.shape["data"] * mesh.shape["fsdp"] == config.data.batch_size and time == config.data.seq_len


def test_adapters_of_7b_are_built_on_one_device_and_on_eight():
    config = sft_lora_7b.CONFIG
    model = dataclasses.replace(INTERNLM2_7B, param_dtype="bfloat16")
    params, axes = decoder.abstract_params(model), decoder.logical_axes(model)
    weights = jax.eval_shape(functools.partial(lora.init_lora, config.lora, params), jax.random.key(0))
    weights_axes = lora.logical_axes(weights, axes)
    optimizer = make_optimizer(config.optimizer, Cosine(10), 100)
    batch = abstract_batch(config.batch_size * 2, config.seq_len)
    for mesh in (MeshConfig(fsdp=1), MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4)):
        mesh = abstract_mesh(mesh, mesh.fsdp * mesh.tensor)
        sharding.shardings(weights_axes, weights, mesh)
        places = sharding.shardings(axes, params, mesh)
        loss = next_token(model, lora_config=config.lora)
        traced(loss, optimizer, weights, params, batch, mesh, config.accumulate)
        assert bytes_per_device(params, places) < 1.001 * 2 * 7_737_708_544 / mesh.size + 2e6
    assert sum(leaf.size for leaf in jax.tree.leaves(weights)) == 32 * 16 * sum(
        (4096 + 4096, 4096 + 1024, 4096 + 1024, 4096 + 4096, *[4096 + 14336] * 3)
    )


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_leaf():
    params, axes = decoder.abstract_params(SEVEN.model), decoder.logical_axes(SEVEN.model)
    with pytest.raises(ValueError, match=r"'embedding'.*mesh axis 'fsdp' of size 3 does not divide its dimension 1"):
        sharding.shardings(axes, params, abstract_mesh(MeshConfig(fsdp=3), 3))


# --- the list --------------------------------------------------------------------------------------------------------


def test_python_m_experiments_lists_every_experiment():
    listed = subprocess.run(
        [sys.executable, "-m", "experiments"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "experiments").glob("*.py")
        if "CONFIG = " in path.read_text() or "\nHardware: " in path.read_text()
    }
    assert files <= {entry.module for entry in entries()} and len(files) >= 6
    lines = listed.splitlines()
    for entry in entries():
        (line,) = [n for n, text in enumerate(lines) if text.startswith(f"{entry.module} ")]
        assert entry.title in lines[line] and lines[line + 1].strip() == f"{entry.hardware} · {entry.time}"


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.module)
def test_what_an_experiment_says_of_itself(entry):
    docstring = (ROOT / (entry.module.replace(".", "/") + ".py")).read_text()
    assert f"python -m {entry.module}" in docstring and entry.hardware and entry.time
    assert len(entry.title) < 120  # a line of the list


def test_variants_say_what_differs_from_their_parent():
    assert internlm2_20b.CONFIG == dataclasses.replace(
        SEVEN,
        run="internlm2_20b",
        model=internlm2_20b.CONFIG.model,
        data=dataclasses.replace(SEVEN.data, batch_size=1280),
        num_steps=400_000,
        accumulate=20,
        mesh=MeshConfig(fsdp=-1, tensor=4),
    )
    assert sft_lora_7b.CONFIG.lora == LoraConfig(rank=16, alpha=32.0)
    assert sft_lora_7b.CONFIG.batch_size * sft_lora_7b.CONFIG.accumulate == 16
    assert tiny.CONFIG.sft_lora.targets[-1] == "head"
