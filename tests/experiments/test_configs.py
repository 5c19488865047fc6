"""Experiments are values: their command line, their resolved configs, and that each fits the mesh it names."""

import ast
import dataclasses
import functools
import inspect
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from data_pipelines.conversations import Reading
from experiments import (
    continue_7b,
    finetune,
    internlm2_1_8b,
    internlm2_1_8b_32k,
    internlm2_1_8b_enhance,
    internlm2_7b,
    internlm2_7b_32k,
    internlm2_7b_enhance,
    internlm2_20b,
    internlm2_20b_32k,
    internlm2_20b_enhance,
    long_context,
    sft_lora_7b,
    tiny,
)
from experiments.__main__ import entries
from experiments.command_line import guarded, launch, parse, typed
from experiments.finetuning import Finetune
from experiments.jobs import job_of
from experiments.plan_recipes import with_known_model
from experiments.pretraining import Pretrain, pretrain
from internjax import sharding
from internjax.model import decoder, lora
from internjax.model.config import INTERNLM2_7B, DynamicNTK
from internjax.model.lora import LoraConfig
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.checks import check_run
from internjax.train.flops import PEAK_FLOPS, training_flops
from internjax.train.losses import next_token
from internjax.train.memory import Job, estimate
from internjax.train.optimizer import WSD, Adafactor, AdamW, Constant, Cosine, Linear, Muon, make_optimizer
from internjax.train.step import TrainState, make_step
from tests.experiments.conftest import SMALL, pretraining
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


def test_optimizers_are_chosen_by_name():
    args = ("optimizer:muon", "--optimizer.peak-lr", "0.02", "--optimizer.rms", "None")
    assert changed(SEVEN, *args) == {"optimizer": Muon(peak_lr=0.02, rms=None)}
    args = ("optimizer:adafactor", "--optimizer.parameter-scale=False", "schedule:wsd", "--schedule.shape", "sqrt")
    wanted = {"optimizer": Adafactor(parameter_scale=False), "schedule": WSD(shape="sqrt")}
    assert changed(SEVEN, *args) == wanted
    assert changed(SEVEN, "--optimizer.moment-dtype", "int8") == {"optimizer.moment_dtype": "int8"}
    assert changed(finetune.CONFIG, "optimizer:muon") == {"optimizer": Muon()}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"seed": 3, "run": "with spaces", "fresh": True, "num_steps": 7},
        {"optimizer": Muon(rms=None), "schedule": Linear(warmup_steps=3), "model": "a 'quoted' folder"},
        {"data": ("a b.jsonl", "c.jsonl"), "lora": LoraConfig(rank=3, targets=("query", "value"))},
        {"optimizer": AdamW(peak_lr=0.5), "reading": Reading(cache="", bad_rows="skip", max_samples=(3, 4))},
    ],
)
def test_typed_arguments_make_the_config(fields):
    config = dataclasses.replace(finetune.CONFIG, **fields)
    args = typed(config, finetune.CONFIG)
    assert parse(finetune.CONFIG, shlex.split(" ".join(args))) == config and bool(args) == bool(fields)


def test_typed_arguments_choose_alternatives_and_none():
    model = dataclasses.replace(SEVEN.model, rope_scaling=DynamicNTK(2.0))
    config = dataclasses.replace(SEVEN, model=model, schedule=Constant())
    args = typed(config, SEVEN)
    assert args == ["model.rope-scaling:dynamic-ntk", "schedule:constant", "--model.rope-scaling.factor=2.0"]
    assert parse(SEVEN, args) == config and parse(config, typed(SEVEN, config)) == SEVEN


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


def test_help_lists_every_field(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", finetune)  # as under `python -m`
    with pytest.raises(SystemExit) as ended:
        parse(finetune.CONFIG, ["--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Finetune) if field.name != "schedule"]
    assert [name for name in names if f"--{name}" not in printed] == [] and "schedule:" in printed
    assert printed.startswith("usage: python -m experiments.finetune ") and "\n\nTime: depends on" in printed


def dataclasses_of(kind: type, found: list) -> list:
    if kind not in found:
        found.append(kind)
        for hint in typing.get_type_hints(kind).values():
            for part in (hint, *typing.get_args(hint)):
                if dataclasses.is_dataclass(part):
                    dataclasses_of(part, found)
    return found


@pytest.mark.parametrize("kind", dataclasses_of(Finetune, dataclasses_of(Pretrain, [])), ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_means(kind):
    """`--help` shows the docstring below a field; a nested config shows the one of its class."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    told = {
        field.target.id for field, text in zip(body, body[1:]) if isinstance(field, ast.AnnAssign) and is_text(text)
    }
    hints = typing.get_type_hints(kind)
    parts = {name: (hint, *typing.get_args(hint)) for name, hint in hints.items()}
    plain = {name for name in hints if not any(map(dataclasses.is_dataclass, parts[name]))}
    assert sorted(plain - told) == [] and kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


def is_text(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


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


GPUS = re.compile(r"(\d+) GPUs of 80 GB")


def meshes_to_build() -> list:
    """Every pre-training on the devices that its docstring names, and the 20B on more."""
    known = [(CONFIGS.get(entry.module), GPUS.match(entry.hardware)) for entry in entries()]
    known = [(config, int(gpus[1])) for config, gpus in known if isinstance(config, Pretrain) and gpus]
    return [
        *(pytest.param(config, num_devices, config.mesh, id=config.run) for config, num_devices in known),
        pytest.param(internlm2_20b.CONFIG, 128, MeshConfig(data=2, fsdp=16, tensor=4), id="20B on two replicas"),
    ]


@pytest.mark.parametrize(("config", "num_devices", "mesh"), meshes_to_build())
def test_pretraining_is_built_on_its_mesh(config: Pretrain, num_devices, mesh):
    check_run(
        config.model,
        mesh=mesh,
        num_devices=num_devices,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        accumulate=config.accumulate,
        schedule=config.schedule,
        num_steps=config.num_steps,
    )
    mesh = abstract_mesh(mesh, num_devices)
    params, axes = decoder.abstract_params(config.model), decoder.logical_axes(config.model)
    places = sharding.shardings(axes, params, mesh)
    optimizer = make_optimizer(config.optimizer, config.schedule, config.num_steps)
    batch = abstract_batch(config.data.batch_size, config.data.seq_len)
    state = traced(next_token(config.model), optimizer, params, None, batch, mesh, config.accumulate)
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, place: place, state.opt_state, places, transform_non_params=lambda _: None
    )
    assert {place.spec for place in jax.tree.leaves(moments)} == {place.spec for place in jax.tree.leaves(places)}
    # Parameters and both moments are split over everything but replicas and time; norms stay whole.
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    assert bytes_per_device(params, places) < 1.001 * whole / shards + 2e6
    # Rows and time of the batch are divided evenly, and the rows of a shard into its micro-batches.
    rows, time = sharding.batch_sharding(mesh).shard_shape(batch.tokens.shape)
    assert rows * mesh.shape["data"] * mesh.shape["fsdp"] == config.data.batch_size and rows % config.accumulate == 0
    assert time * mesh.shape["sequence"] == config.data.seq_len


@pytest.mark.parametrize(("config", "num_devices", "mesh"), meshes_to_build())
def test_pretraining_fits_the_devices_it_names(config: Pretrain, num_devices, mesh):
    job = Job(
        config.model,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        mesh=mesh,
        accumulate=config.accumulate,
        optimizer=config.optimizer,
    )
    # Estimates, so with room: an 80 GB card gives a job about 77 GB.
    assert estimate(job, mesh.shape(num_devices)).total < 0.8 * 77e9


ON_CARDS = re.compile(r"(\d+|one) GPUs? of (\d+) GB")


@pytest.mark.parametrize("module", [name for name, config in CONFIGS.items() if isinstance(config, Finetune)])
def test_a_fine_tuning_fits_the_devices_it_names(module):
    config = with_known_model(CONFIGS[module])
    (hardware,) = (entry.hardware for entry in entries() if entry.module == module)
    if not config.model:
        assert hardware.startswith("anything")
        return
    number, gigabytes = ON_CARDS.match(hardware).groups()
    job, num_devices = job_of(config), 1 if number == "one" else int(number)
    rows = {"batch_size": job.batch_size, "seq_len": job.seq_len, "accumulate": job.accumulate}
    # As published; the experiment that stands for it is the first phase of its pre-training, of 4k tokens.
    published = dataclasses.replace(job.model, max_position_embeddings=32_768)
    check_run(published, mesh=job.mesh, num_devices=num_devices, **rows)
    assert estimate(job, job.mesh.shape(num_devices)).total < 0.9 * float(gigabytes) * 1e9


DERIVED = re.compile(r"derived: ([\d,]+) H100 hours at an assumed (\d+) % MFU")


@pytest.mark.parametrize("entry", [e for e in entries() if DERIVED.search(e.time)], ids=lambda entry: entry.module)
def test_derived_hours_are_the_formula(entry):
    hours, mfu = DERIVED.search(entry.time).groups()
    config = CONFIGS[entry.module]
    tokens = config.num_steps * config.data.batch_size * config.data.seq_len
    flops = tokens * training_flops(config.model, seq_len=config.data.seq_len)
    derived = flops / (PEAK_FLOPS["h100"] * int(mfu) / 100) / 3600
    assert f"{float(f'{derived:.2g}'):,.0f}" == hours


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
        for path in (ROOT / "experiments").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    # The list itself, and what others of the list start.
    started = {"experiments.__main__", "experiments.plan_compile", "experiments.benchmarks.data_peers"}
    assert files - started == {entry.module for entry in entries()} and started <= files
    lines = listed.splitlines()
    for entry in entries():
        (line,) = [n for n, text in enumerate(lines) if text.startswith(f"{entry.module} ")]
        assert entry.title in lines[line] and lines[line + 1].strip() == f"{entry.hardware} · {entry.time}"


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.module)
def test_what_an_experiment_says_of_itself(entry):
    docstring = (ROOT / (entry.module.replace(".", "/") + ".py")).read_text()
    assert f"python -m {entry.module}" in docstring and entry.hardware and entry.time
    assert len(entry.title) < 120  # a line of the list


PHASES = {
    "1.8B": (internlm2_1_8b, internlm2_1_8b_32k, internlm2_1_8b_enhance, 4),
    "7B": (internlm2_7b, internlm2_7b_32k, internlm2_7b_enhance, 4),
    "20B": (internlm2_20b, internlm2_20b_32k, internlm2_20b_enhance, 5),
}


@pytest.mark.parametrize("size", PHASES)
def test_three_phases_of_the_report(size):
    *modules, millions = PHASES[size]
    first, second, third = (module.CONFIG for module in modules)

    def tokens(config):
        return config.data.batch_size * config.data.seq_len

    # Table 3 and section 3.2.2.
    assert first.optimizer == AdamW(peak_lr=3e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    assert first.schedule.final_fraction == 0.1 and tokens(first) == millions * 2**20
    # Section 3.3: lengths, rotary bases, 90 % and 9 % of the steps, 2.0-2.6T tokens, half of the data short.
    assert [config.data.seq_len for config in (first, second, third)] == [4096, 32768, 32768]
    assert [config.model.rope_theta for config in (first, second, third)] == [5e4, 1e6, 1e6]
    assert second.num_steps * 10 == first.num_steps and tokens(second) == tokens(first)
    total = sum(config.num_steps * tokens(config) for config in (first, second, third))
    assert 2.0e12 < total < 2.6e12 and 0.89 < first.num_steps * tokens(first) / total < 0.91
    data = second.data
    assert (data.weight, data.min_tokens, data.max_tokens) == ((0.5, 0.5), (0, 4097), (4096, 0))
    # Section 3.3.3: 24.40B tokens in three parts, smaller rate and batch.
    assert third.num_steps * tokens(third) == pytest.approx(24.40e9, rel=2e-4)
    assert sum(third.data.weight) == pytest.approx(24.40) and not third.data.min_tokens and not third.data.max_tokens
    assert tokens(third) < tokens(second) and third.optimizer.peak_lr < second.optimizer.peak_lr < 3e-4
    # Each goes on from the last step of the one before, in the same architecture.
    assert first.init is None
    for before, after in ((first, second), (second, third)):
        assert after.init == f"{before.run}@{before.num_steps}"
        free = ("rope_theta", "rope_scaling", "max_position_embeddings", "remat", "attention")
        same = {name: getattr(before.model, name) for name in free}
        assert dataclasses.replace(after.model, **same) == before.model


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
    assert sft_lora_7b.CONFIG.batch_size == 16
    assert tiny.CONFIG.sft_lora.targets[-1] == "head"


# --- continuation ----------------------------------------------------------------------------------------------------


def test_the_architecture_of_a_continuation_is_the_checkpoints(corpus, tmp_path):
    trained = pretrain(pretraining(corpus, tmp_path / "trained", num_steps=2))
    default = continue_7b.CONFIG
    config = dataclasses.replace(default, init=str(trained.folder))
    given = continue_7b.with_architecture(config, default=default.model).model
    how = {name: getattr(default.model, name) for name in continue_7b.HOW}
    assert given == dataclasses.replace(SMALL, **how)
    at_step = dataclasses.replace(config, init=f"{trained.folder}@2")
    assert continue_7b.with_architecture(at_step, default=default.model).model == given

    longer = long_context.stretched(given, 1024)
    # max_position 256, no factor named: 10,000 x (2 x 4 - 1)^(8/6).
    assert longer.rope_theta == pytest.approx(10_000 * 7 ** (8 / 6)) and longer.max_position_embeddings == 1024
    assert long_context.stretched(given, 256) == given
    assert long_context.CONFIG.model.rope_theta == pytest.approx(11_954_579.76)

    tokens = dataclasses.replace(default.data, folder=(str(corpus / "tokens"),), tokenizer=str(corpus / "tokenizer"))
    short = dataclasses.replace(
        config,
        run=str(tmp_path / "continued"),
        data=dataclasses.replace(tokens, weight=(1.0,), batch_size=16, seq_len=32),
        num_steps=2,
        schedule=WSD(warmup_steps=1, decay_steps=1),
        accumulate=2,
    )
    done = continue_7b.run(short)
    # It begins where the checkpoint ended, not where a fresh model does.
    assert done.summary["first_loss"] < trained.summary["first_loss"] - 0.5

    other = dataclasses.replace(config, model=dataclasses.replace(default.model, num_layers=3, remat="none"))
    with pytest.raises(ValueError, match=r"comes from .*, but the command sets model.num_layers 3\. Leave that out"):
        continue_7b.with_architecture(other, default=default.model)
    with pytest.raises(ValueError, match="name one: --init MODEL"):
        continue_7b.run(dataclasses.replace(default, init=None))
