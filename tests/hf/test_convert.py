"""python -m internjax.hf: conversions between layouts, dtypes and shard sizes, checks, and errors of one line."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from internjax.hf import hub
from internjax.hf.__main__ import main
from internjax.hf.adapter import save_adapter
from internjax.hf.open import logits, open_model
from internjax.hf.provenance import run_facts
from internjax.hf.save import save_architecture, save_model
from internjax.model.lora import LoraConfig, apply_config, init_lora, merge
from internjax.train.checkpoint import open_checkpoints
from internjax.train.optimizer import Adafactor, Constant, make_optimizer
from internjax.train.step import init_state

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS = [[1, 5, 9, 200]]


@pytest.fixture
def base(tmp_path, config, params, tokenizer):
    save_model(
        tmp_path / "base", config=config, params=params, tokenizer=tokenizer, provenance={"data": "a small corpus"}
    )
    return tmp_path / "base"


def test_the_command_line_converts_and_checks(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "base", "a b/new", "--layout", "internlm2", "--shard-size", "40KB"]) == 0
    assert "written and read back, largest logit difference 0 (to the source: 0)" in capsys.readouterr().out
    new = tmp_path / "a b" / "new"
    assert len(list(new.glob("model-*-of-*.safetensors"))) > 2 and (new / "model.safetensors.index.json").is_file()
    about = json.loads((new / "internjax.json").read_text())
    assert (
        about["provenance"] == {"data": "a small corpus", "converted from": "base"} and about["layout"] == "internlm2"
    )
    assert main(["check", "a b/new"]) == 0
    assert "files as written, largest logit difference 0" in capsys.readouterr().out
    shard = next(new.glob("model-00002*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    # As a process, once: the exit code and what goes to stderr are those of the command.
    result = subprocess.run(
        [sys.executable, "-m", "internjax.hf", "check", "a b/new"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: a b/new is not as it was written: model-00002-of-")
    assert "Traceback" not in result.stderr


def test_an_adapter_is_merged(base, tmp_path, config, params, capsys):
    lora = LoraConfig(rank=2, targets=("query", "down"))
    fresh = init_lora(lora, params, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: leaf + 0.1, fresh)
    save_adapter(tmp_path / "adapter", lora, weights, base, model_config=config)
    assert main(["convert", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert "adapters are merged" in capsys.readouterr().out
    merged, apart = open_model(tmp_path / "merged"), open_model(tmp_path / "adapter")
    assert merged.lora is None
    np.testing.assert_allclose(logits(merged, TOKENS), logits(apart, TOKENS), atol=2e-5)
    assert np.abs(logits(merged, TOKENS) - logits(open_model(base), TOKENS)).max() > 0.1


def test_adapters_are_merged_on_top_layer_by_layer(base, tmp_path, config, params, read_folder, capsys):
    lora = LoraConfig(rank=2, targets=("query", "down", "head"))
    weights = jax.tree.map(lambda leaf: leaf + 0.05, init_lora(lora, params, jax.random.key(0)))
    save_adapter(tmp_path / "one", lora, weights, base, model_config=config)
    command = ["convert", str(base), str(tmp_path / "merged"), "--merge-adapter", str(tmp_path / "one")]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    wanted = merge(params, apply_config(weights, lora))
    save_model(tmp_path / "wanted", config=config, params=wanted, tokenizer=None, dtype="bfloat16")
    found, wanted = read_folder(tmp_path / "merged"), read_folder(tmp_path / "wanted")
    for name, tensor in wanted.items():
        np.testing.assert_allclose(found[name].astype(np.float32), tensor.astype(np.float32), rtol=1e-2, atol=1e-6)
    about = json.loads((tmp_path / "merged" / "internjax.json").read_text())
    assert about["provenance"]["converted from"] == f"{base}+{tmp_path / 'one'}"
    # The saved dtype rounds, merging does not: the proof tells the two apart.
    assert about["proof"]["max_logit_difference"] == 0 < about["proof"]["max_logit_difference_to_source"] < 0.5


def test_a_step_of_a_run_carries_the_facts_of_its_training(tmp_path, config, params, tokenizer, monkeypatch):
    run = tmp_path / "runs" / "mine"
    save_architecture(run, config=config, tokenizer=tokenizer)
    with open_checkpoints(run / "checkpoints") as checkpoints:
        state = init_state(jax.tree.map(jnp.copy, params), make_optimizer(Adafactor(), Constant(), 10))
        checkpoints.save(dataclasses.replace(state, step=jnp.asarray(4, jnp.int32)))
    experiment = {"type": "Finetune", "run": "x", "data": ["a.jsonl"], "optimizer": {"type": "AdamW"}, "fresh": False}
    (run / "experiment.json").write_text(json.dumps(experiment))
    (run / "versions.json").write_text('{"git_commit": "abc"}')
    (run / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 3.5}\n{"step": 4, "loss": 2.5}\n{"step": 6, "loss": 1.5}\n{"st'
    )
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "mine@4", "new"]) == 0
    about = json.loads((tmp_path / "new" / "internjax.json").read_text())
    facts = {"run": "mine", "type": "Finetune", "data": ["a.jsonl"], "optimizer": {"type": "AdamW"}, "step": 4}
    facts |= {"metrics at step 4": {"loss": 2.5}, "git commit": "abc", "converted from": "mine@4"}
    assert about["provenance"] == facts
    card = (tmp_path / "new" / "README.md").read_text()
    assert '| metrics at step 4 | {"loss": 2.5} |' in card and "| git commit | abc |" in card
    assert run_facts(run)["step"] == 6 and run_facts(tmp_path) == {}


def test_a_folder_is_pushed_when_asked_and_only_then(base, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr(hub, "push", lambda folder, repo, *, private: pushed.append((folder, repo, private)) or "there")
    command = ["convert", str(base), str(tmp_path / "new"), "--overwrite"]
    assert main(command) == 0 and pushed == []
    assert main([*command, "--push", "lab/mine"]) == 0 and main([*command, "--push", "lab/mine", "--public"]) == 0
    assert pushed == [(str(tmp_path / "new"), "lab/mine", True), (str(tmp_path / "new"), "lab/mine", False)]
    assert "pushed to there" in capsys.readouterr().out
    # What could not be pushed is said before anything is written.
    for wrong, said in (
        (["--push", "mine"], "pushed to hf:ORG/NAME"),
        (["--public"], "is for a repository that --push"),
    ):
        assert main(["convert", str(base), str(tmp_path / "other"), *wrong]) == 1 and not (tmp_path / "other").exists()
        assert said in capsys.readouterr().err


def test_the_dtype_is_a_choice(base, tmp_path, read_folder, params):
    assert main(["convert", str(base), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    tensors, source = read_folder(tmp_path / "half"), read_folder(base)
    assert all(tensor.dtype == ml_dtypes.bfloat16 for tensor in tensors.values())
    for name, tensor in source.items():
        np.testing.assert_array_equal(tensors[name], tensor.astype(ml_dtypes.bfloat16))


def test_overwriting_is_a_choice(base, tmp_path, capsys):
    arguments = ["convert", str(base), str(tmp_path / "new")]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_unknown_fields_are_a_choice(base, tmp_path, capsys):
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"logit_scale": 0.5}))
    assert main(["convert", str(base), str(tmp_path / "new")]) == 1
    assert "allow_unknown=('logit_scale',)" in capsys.readouterr().err
    assert main(["convert", str(base), str(tmp_path / "new"), "--allow-unknown", "logit_scale"]) == 0


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").open("r+b").truncate(9000), "cut short"),
        (lambda f: change_header(f, b'"F32"', b'"I32"'), "holds I32 values; weights of F32, BF16, F16 are read"),
        (lambda f: change_header(f, b'"F32"', b'"F16"'), r"a tensor .* of F16 cannot have \d+ bytes"),
        (
            lambda f: change_header(f, b"model.norm", b"model.nrom"),
            "missing: model.norm.weight; unexpected: model.nrom",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "model_type 'gpt2'"),
        (lambda f: change_config(f, num_hidden_layers=4), "missing: model.layers.3.input_layernorm.weight"),
        (lambda f: change_config(f, num_hidden_layers=2), "unexpected: model.layers.2"),
        (lambda f: change_config(f, vocab_size=299), r"wrong shape: model.embed_tokens.weight is \(300, 32\)"),
        (lambda f: change_config(f, num_key_value_heads=3), "multiple of num_kv_heads 3"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "base"),
    ],
)
def test_broken_folders_are_one_line_on_stderr_and_leave_nothing(base, tmp_path, capsys, break_it, message):
    break_it(base)
    assert main(["convert", str(base), str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def change_header(folder, old, new):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.replace(old, new))


def change_config(folder, **fields):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


def test_check_of_something_else(tmp_path, capsys):
    assert main(["check", str(tmp_path / "nothing")]) == 1
    assert main(["check", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "is no folder" in error and "is no model folder: it has neither config.json nor internjax.json" in error


def test_arguments_that_are_wrong_exit_with_2(capsys):
    for arguments in ([], ["convert", "a"], ["convert", "a", "b", "--layout", "gguf"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
