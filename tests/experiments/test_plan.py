"""`python -m experiments.plan`: figures of shipped experiments, verdicts as exit codes, mistakes as messages."""

import dataclasses
import json
import re
import sys
import time

import jax
import pytest

from experiments import jobs, plan
from internjax.hf.save import save_model
from internjax.model import decoder
from internjax.model.config import INTERNLM2_7B, TINY
from internjax.text.tokenizer import train_tokenizer

NAMES = jobs.names()
TWENTY = ("internlm2_20b", "--devices", "64", "--device", "h100", "--mesh.fsdp", "16", "--mesh.tensor", "4")


def test_the_20b_on_64_devices_is_planned_within_a_minute_and_nothing_is_allocated(capsys, tmp_path):
    before = sum(array.nbytes for array in jax.live_arrays())
    started = time.perf_counter()
    assert plan.main([*TWENTY, "--json", str(tmp_path / "plan.json")]) == 0
    assert time.perf_counter() - started < 60
    assert sum(array.nbytes for array in jax.live_arrays()) - before < 10_000
    printed = capsys.readouterr().out
    assert "19,861,149,696 parameters, full, 64 x h100 (fsdp 16 x tensor 4)" in printed
    assert "meshes worth trying" in printed and "2.1e+12 tokens: " in printed
    assert printed.splitlines()[-1].startswith("fits: ")
    values = json.loads((tmp_path / "plan.json").read_text())
    exact = sum(role["bytes"] for role in values["roles"] if role["exact"])
    assert exact / 2**30 == pytest.approx(3.49, abs=0.01)  # 3.47 GiB of arguments (training.md 9.2) and two batches
    assert values["flops_per_step"] == pytest.approx(1280 * 4096 * 1.2300e11, rel=1e-4)
    assert values["device_hours"] == pytest.approx(
        values["tokens"] / (1280 * 4096) * values["step_seconds"] * 64 / 3600
    )
    assert len(values["meshes"]) == 5 and values["fits"] is True and values["job"]["accumulate"] == 20


def test_what_does_not_fit_ends_with_1_and_a_remedy(capsys):
    assert plan.main([*TWENTY, "--accumulate", "1", "--meshes", "0"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("does not fit: ") and "Fits with remat=full, accumulate=" in last


def test_without_a_device_only_bytes_and_flops(capsys):
    assert plan.main(["internlm2_1_8b"]) == 0
    printed = capsys.readouterr().out
    assert "8 x unnamed device" in printed and "tokens/s" not in printed and "meshes" not in printed


MISTAKES = {
    "no such experiment": (["internlm2_9b"], "there are: "),
    "another kind of experiment": (["tiny"], "plans are made of Pretrain and Finetune"),
    "no such device": (["internlm2_7b", "--device", "h300"], "unknown device 'h300'; known: b200"),
    "a mesh that does not fit": (["internlm2_7b", "--devices", "8", "--mesh.fsdp", "3"], "does not fit 8 devices"),
    "rows that the mesh does not divide": (
        ["internlm2_7b", "--devices", "8", "--data.batch-size", "12"],
        "a batch of 12 rows cannot be cut",
    ),
    "quantised parameters that are trained": (["internlm2_7b", "--quantise", "nf4"], "give lora as well"),
    "a model that is far away": (["sft_lora_7b"], "name its size instead: --model internlm2_7b"),
    "no model": (["finetune"], "no model given"),
    "options that PPO's plan does not read": (
        ["internlm2_7b", "--rlhf", "--tokens", "1e9", "--compile"],
        "--rlhf reads no --tokens, --compile",
    ),
    "options that the table of recipes does not read": (
        ["--recipes", "--device", "t4", "--json", "plan.json"],
        "--recipes reads no --json",
    ),
    "a quantised PPO": (["sft_qlora_7b", "--model", "internlm2_7b", "--rlhf"], "planned whole and unquantised"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_2_and_its_message(name, capsys):
    arguments, said = MISTAKES[name]
    assert plan.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(SystemExit) as ended:
        plan.main(["internlm2_7b", "--mesh.fdsp", "8"])
    assert ended.value.code not in (0, None)


def test_adapters_over_four_bits_by_the_name_of_a_size(capsys, tmp_path):
    arguments = "--model internlm2_7b --device 4090 --devices 1 --batch-size 1 --accumulate 1 --seq-len 2048 --meshes 0"
    path = tmp_path / "plan.json"
    assert plan.main(["sft_lora_7b", *arguments.split(), "--quantise", "nf4", "--json", str(path)]) == 0
    roles = {role["name"]: role["bytes"] for role in json.loads(path.read_text())["roles"]}
    kernels = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 92544
    rest = 4096 * 92544 + 65 * 4096
    # Half a byte per weight and a float32 scale per 64 of them; embedding and norms in bfloat16.
    # A byte for a scale, 8 for the step and offset of 256 of them; the head's 92,544 columns make blocks of 128.
    scales = kernels // 64 + kernels // 64 // 256 * 8 + 92_544 * 4096 // 64 // 256 * 8
    assert roles["frozen parameters, quantised"] == kernels // 2 + scales + 2 * rest
    assert "qlora (nf4, 41,943,040 trained), 1 x 4090" in capsys.readouterr().out
    assert plan.main(["sft_lora_7b", *arguments.split(), "--method", "full"]) == 1


def test_a_card_without_bfloat16_computes_in_float16(capsys):
    arguments = "--model internlm2_7b --device t4 --devices 1 --batch-size 1 --accumulate 1 --seq-len 512 --meshes 0"
    plan.main(["sft_lora_7b", *arguments.split(), "--quantise", "nf4"])
    printed = capsys.readouterr().out
    assert printed.startswith("t4 (compute capability 7.5) has no bfloat16: computed in float16, with a loss scale\n")
    assert "float16, remat full" in printed


def test_recipes_are_held_against_a_card(capsys, monkeypatch):
    shipped = ("internlm2_1_8b", "sft_lora_7b", "sft_qlora_7b", "tiny", "finetune")
    monkeypatch.setattr(jobs, "names", lambda: shipped if sys._getframe(1).f_code.co_name == "rows" else NAMES)
    assert plan.main(["--recipes", "--device", "t4", "--memory-share", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "1 x t4: 15.0 GiB, 15.0 of them for jax; compute capability 7.5, float16, 65 TFLOP/s" in printed
    table = {line.split()[0]: line for line in printed.splitlines() if line.startswith(shipped)}
    assert set(table) == {"internlm2_1_8b", "sft_lora_7b", "sft_qlora_7b"}  # the others have no model of their own
    assert table["sft_lora_7b"].split()[1:3] == ["lora", "no"] and "method qlora" in table["sft_lora_7b"]
    assert table["internlm2_1_8b"].split()[1:3] == ["full", "no"]
    assert plan.main(["--recipes", "--device", "3090"]) == 0
    assert re.search(r"sft_qlora_7b +qlora +yes", capsys.readouterr().out)
    assert plan.main(["--recipes"]) == 2 and "--recipes goes with a --device" in capsys.readouterr().err


def test_a_folder_is_read_without_its_weights(tmp_path, capsys):
    tokenizer = train_tokenizer(["a tree in the park\n"] * 9, vocab_size=300)
    params = decoder.init(TINY, jax.random.key(0))
    save_model(tmp_path / "model", config=TINY, params=params, tokenizer=tokenizer)
    found = jobs.architecture(str(tmp_path / "model"))
    assert (found.d_model, found.num_layers, found.param_dtype, found.dtype) == (128, 3, "float32", "bfloat16")
    assert plan.main(["finetune", "--model", str(tmp_path / "model"), "--device", "l4", "--meshes", "0"]) == 0
    # The headers say what is stored; the numbers behind them are not looked at.
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff" * 4)
    assert jobs.architecture(str(tmp_path / "model")) == found
    by_name = jobs.architecture("internlm2_7b")
    assert by_name.param_dtype == "bfloat16" and by_name.ffn_dim == INTERNLM2_7B.ffn_dim
    for asked, computed in (("auto", "bfloat16"), ("float32", "float32")):
        config = dataclasses.replace(jobs.module("finetune").CONFIG, model="internlm2_7b", dtype=asked)
        assert jobs.job_of(config).model.dtype == computed


def test_the_four_models_of_ppo(capsys):
    assert plan.main(["internlm2_7b", "--devices", "16", "--rlhf", "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    for role in ("actor: parameters", "actor: optimizer state", "reference", "critic: parameters", "reward model"):
        assert f"\n  {role} " in printed
    assert plan.main(["internlm2_7b", "--devices", "2", "--rlhf", "--device", "h100"]) == 1
    arguments = ["sft_lora_7b", "--model", "internlm2_7b", "--devices", "8", "--rlhf", "--device", "h100"]
    assert plan.main(arguments) == 0
    assert "the actor's base, without its adapters" in capsys.readouterr().out


@pytest.mark.slow
def test_the_compilers_arguments_are_the_exact_bytes(capsys, tmp_path):
    """The one check that a compiler makes of the exact figures: 8 fake devices in another process."""
    small = "--model.d-model 64 --model.num-layers 2 --model.num-heads 4 --model.num-kv-heads 2 --model.head-dim 16"
    small += " --model.ffn-dim 128 --model.vocab-size 256 --data.batch-size 8 --data.seq-len 32 --accumulate 1"
    path = tmp_path / "plan.json"
    arguments = ["internlm2_7b", *small.split(), "--mesh.tensor", "2", "--compile", "--json", str(path)]
    assert plan.main(arguments) == 0
    values = json.loads(path.read_text())
    roles = {role["name"]: role["bytes"] for role in values["roles"]}
    exact = roles["parameters"] + roles["optimizer state"] + roles["batch"] // 2
    assert values["compiled"]["argument"] == pytest.approx(exact, abs=64)  # key and counters are left out
    assert values["compiled"]["temp"] > 0 and "not a GPU's" in capsys.readouterr().out


def test_measured_errors_are_said_where_there_are_any(tmp_path):
    path = tmp_path / "plan_error.json"
    assert plan.measured_error(path).startswith("not compared with a GPU yet")
    cells = [{"planned_bytes": 104, "peak_bytes": 100}, {"planned_bytes": 90, "peak_bytes": 100}, {"peak_bytes": None}]
    path.write_text(json.dumps({"device": "NVIDIA H200", "cells": cells}))
    assert plan.measured_error(path) == (
        "measured on NVIDIA H200: 1 of 2 cells within 5 % of the peak, worst -10.0% (plan_error.json)"
    )


def test_help_names_the_experiments(capsys):
    assert plan.main([]) == 2
    assert "internlm2_20b" in capsys.readouterr().out
