"""What `wandb agent` would run: every form of arguments it knows, against the parser of real configs."""

import dataclasses
import importlib
import itertools
import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from experiments import finetune, internlm2_7b
from experiments.command_line import parse, plain_flags
from internjax.model.config import DynamicNTK
from internjax.train.optimizer import Constant, Cosine, Linear

ROOT = Path(__file__).resolve().parent.parent.parent
SWEEPS = sorted((ROOT / "experiments" / "sweeps").glob("*.yaml"))
SEVEN = internlm2_7b.CONFIG


def agents_arguments(values: dict) -> dict[str, list[str]]:
    """The arguments by the macro that stands for them, as W&B 0.31 writes them (checked against it below)."""
    shown = {name: f"{name}={value}" for name, value in values.items()}
    flags = [
        f"--{name}" if value is True else f"--{shown[name]}" for name, value in values.items() if value is not False
    ]
    return {
        "args": [f"--{text}" for text in shown.values()],
        "args_no_equals": [part for name, value in values.items() for part in (f"--{name}", str(value))],
        "args_no_hyphens": list(shown.values()),
        "args_no_boolean_flags": flags,
        "args_json": [json.dumps(values)],
    }


VALUES = {
    "optimizer.peak_lr": 1e-05,
    "optimizer.clip_norm": None,
    "optimizer.b2": 0.99,
    "num_steps": 7,
    "init": "hf:internlm/internlm2-7b",
    "run": "trial run",
    "fresh": True,
    "data.folder": ["tokens/a b", "tokens/c"],
    "data.weight": [0.25, 0.75],
    "model.rope_theta": 20000.0,
    "schedule": "linear",
    "schedule.warmup_steps": 5,
    "model.rope_scaling": "DynamicNTK",
}


@pytest.mark.parametrize("form", agents_arguments({}))
def test_every_form_of_arguments_gives_the_same_config(form):
    config = parse(SEVEN, agents_arguments(VALUES)[form])
    assert config == dataclasses.replace(
        SEVEN,
        num_steps=7,
        init="hf:internlm/internlm2-7b",
        run="trial run",
        fresh=True,
        optimizer=dataclasses.replace(SEVEN.optimizer, peak_lr=1e-5, clip_norm=None, b2=0.99),
        data=dataclasses.replace(SEVEN.data, folder=("tokens/a b", "tokens/c"), weight=(0.25, 0.75)),
        model=dataclasses.replace(SEVEN.model, rope_theta=2e4, rope_scaling=DynamicNTK()),
        schedule=Linear(warmup_steps=5),
    )


@pytest.mark.parametrize(
    ("argument", "field", "wanted"),
    [
        ("--merge=False", "merge", False),
        ("--merge=false", "merge", False),
        ("--merge False", "merge", False),
        ("--merge True", "merge", True),
        ("--data=[]", "data", ()),
        ("--data=['a b.jsonl']", "data", ("a b.jsonl",)),
        ('--data=["a", "b"]', "data", ("a", "b")),
        ("--data ['a','b']", "data", ("a", "b")),
        ("--data=('a',)", "data", ("a",)),
        ("--data=a.jsonl", "data", ("a.jsonl",)),
        ("--num_steps=null", "num_steps", None),
        ("--num_steps null", "num_steps", None),
        ("--num-steps=None", "num_steps", None),
        ("--model=null", "model", "null"),  # a text may say so
        ("--schedule=Constant", "schedule", Constant()),
        ("--schedule={'type': 'linear', 'warmup_steps': 3}", "schedule", Linear(warmup_steps=3)),
        ("--schedule={'warmup_steps': 3}", "schedule", Cosine(warmup_steps=3)),
    ],
)
def test_values_of_every_kind(argument, field, wanted):
    name, space, value = argument.partition(" ") if not argument.split(" ")[0].count("=") else (argument, "", "")
    assert getattr(parse(finetune.CONFIG, [name, value] if space else [name]), field) == wanted


def test_nested_parameters_reach_their_fields():
    given = {"lora": {"rank": 4, "targets": ["query"]}, "mesh": {"fsdp": 2}, "checkpoint": {"every": 9}, "seed": 3}
    config = parse(finetune.CONFIG, agents_arguments(given)["args"])
    assert (config.lora.rank, config.lora.targets, config.mesh.fsdp) == (4, ("query",), 2)
    assert (config.checkpoint.every, config.seed) == (9, 3)


@pytest.mark.parametrize("args", [["--optimizer.peak_lrr=0.1"], ["--num_steps=many"], ["--schedule=zigzag"], ["{bad"]])
def test_what_no_field_takes_is_refused(args, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(finetune.CONFIG, args)
    assert ended.value.code == 2 and capsys.readouterr().err


def test_what_a_person_types_passes_unchanged():
    typed = "--data a=b.jsonl [c].jsonl --model hf:a/b schedule:linear --schedule.warmup-steps 3 --no-merge --fresh"
    assert plain_flags(shlex.split(typed), type(finetune.CONFIG)) == shlex.split(typed)


def test_each_run_of_a_sweep_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    assert parse(finetune.CONFIG, []).run == "finetune"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    assert parse(finetune.CONFIG, ["--run=mine"]).run == "mine-abc"


def test_the_forms_are_those_of_wandb():
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    values = VALUES | {"merge": False}
    theirs = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    ours = agents_arguments(values)
    assert {name: theirs[name] for name in ours} == ours


def settings(parameters: dict) -> list[dict]:
    """The corners of a sweep's space: every listed value, both ends of every range."""
    sides = {
        name: given["values"] if "values" in given else [given[k] for k in ("value", "min", "max") if k in given]
        for name, given in parameters.items()
    }
    return [dict(zip(sides, values, strict=True)) for values in itertools.product(*sides.values())]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_shipped_sweeps_run_as_they_are(path):
    yaml = pytest.importorskip("yaml")
    sweep = yaml.safe_load(path.read_text())
    env, interpreter, flag, module, args = sweep["command"]
    assert (env, interpreter, flag, args) == ("${env}", "${interpreter}", "-m", "${args}")
    assert (ROOT / sweep["program"]).is_file() and sweep["program"] == module.replace(".", "/") + ".py"
    config = importlib.import_module(module).CONFIG
    space = settings(sweep["parameters"])
    configs = [parse(config, agents_arguments(values)["args"]) for values in space[:: max(1, len(space) // 8)]]
    assert len(set(configs)) == len(configs) > 1  # every setting says something
    for name in sweep["parameters"]:
        head = name.split(".")[0]
        assert any(getattr(one, head) != getattr(config, head) for one in configs), name


def test_a_sweeps_command_reaches_the_program(tmp_path, monkeypatch, capsys):
    """The module as `-m` runs it, up to the first thing that it cannot find."""
    given = {"model": str(tmp_path / "no model"), "data": ["a.jsonl"], "merge": False, "optimizer.clip_norm": None}
    monkeypatch.setattr(sys, "argv", ["finetune", *agents_arguments(given)["args"]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("experiments.finetune", run_name="__main__", alter_sys=True)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("error: ") and "no model" in error
