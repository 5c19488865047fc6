"""Exported folders: what is in them, the proof, and that a folder appears whole or not at all."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax.hf import save as saving
from internjax.hf.convert import check
from internjax.hf.folder import new_folder
from internjax.hf.generation import GenerationConfig, default_generation, generation_to_hf, read_generation
from internjax.hf.open import logits, open_model
from internjax.hf.save import proof_logits, proof_token_ids, save_architecture, save_model
from internjax.model import decoder
from internjax.model.config import NoScaling
from internjax.model.quantize import quantize_params
from internjax.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "internjax.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.mark.parametrize("layout", ["llama", "internlm2"])
def test_a_folder_holds_all_that_others_need(tmp_path, config, params, tokenizer, layout):
    provenance = {"data": "standard library", "steps": 600, "bits per byte": 1.79, "note": "a | b"}
    proof = save_model(
        tmp_path / "model", config=config, params=params, tokenizer=tokenizer, layout=layout, provenance=provenance
    )
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    assert proof.max_logit_difference == proof.max_logit_difference_to_source == 0.0
    values, generation, about = (
        json.loads((tmp_path / "model" / name).read_text())
        for name in ("config.json", "generation_config.json", "internjax.json")
    )
    end = tokenizer.special["<|im_end|>"]
    assert (tokenizer.bos_id, tokenizer.eos_id, end) == (1, 2, tokenizer.vocab_size - 2)
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, end], "pad_token_id": 2}
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, 2, 2)
    assert (values["model_type"], values["torch_dtype"]) == (layout, "float32")
    assert about["provenance"] == provenance and about["proof"]["token_ids"] == proof.token_ids
    assert set(about["files"]) == FILES - {"internjax.json"}
    assert load_tokenizer(tmp_path / "model").chat_template == tokenizer.chat_template
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| steps | 600 |" in card and "a \\| b" in card and f"{42_464:,}" in card
    assert check(tmp_path / "model").num_files == len(FILES) - 1


def test_the_proof_tells_what_the_saved_dtype_rounds_off(tmp_path, config, params):
    proof = save_model(tmp_path / "model", config=config, params=params, tokenizer=None, dtype="bfloat16")
    assert proof.max_logit_difference == 0.0
    back = open_model(tmp_path / "model")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(back.params)} == {"bfloat16"}
    wanted = np.abs(proof_logits(config, params) - proof_logits(config, back.params)).max()
    assert proof.max_logit_difference_to_source == pytest.approx(wanted, rel=1e-3) and wanted > 1e-3
    assert json.loads((tmp_path / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_recorded_logits_are_those_of_the_decoder(tmp_path, config, params):
    proof = save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    wanted = decoder.logits(params, jnp.array([proof_token_ids(config)]), config=config)[0, :, :8]
    np.testing.assert_allclose(proof.logits, wanted, atol=1e-5)
    assert len(set(proof.token_ids)) == 16 and max(proof.token_ids) < config.vocab_size


def test_a_normalised_head_is_written_as_normalised_rows(tmp_path, config, params):
    config = dataclasses.replace(config, norm_head=True)
    proof = save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    assert proof.max_logit_difference_to_source < 1e-5
    back = open_model(tmp_path / "model")
    assert not back.config.norm_head
    lengths = np.linalg.norm(np.asarray(back.params["head"]["kernel"]), axis=0)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-5)
    assert np.abs(np.linalg.norm(np.asarray(params["head"]["kernel"]), axis=0) - 1).max() > 0.05
    tokens = jnp.arange(12).reshape(1, 12)
    np.testing.assert_allclose(logits(back, tokens), decoder.logits(params, tokens, config=config), atol=1e-5)


def test_a_tied_model_stores_its_table_once(tmp_path, tied_config, make_params, read_folder):
    params = make_params(tied_config)
    save_model(tmp_path / "model", config=tied_config, params=params, tokenizer=None)
    assert "lm_head.weight" not in read_folder(tmp_path / "model")
    assert open_model(tmp_path / "model").config.tie_embeddings


def test_sharded_parameters_are_exported_and_read_back_sharded(tmp_path, config, params, read_folder):
    from internjax import sharding

    save_model(tmp_path / "alone", config=config, params=params, tokenizer=None)
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
        with sharding.use(mesh):
            axes = decoder.logical_axes(config)
        placed = jax.device_put(params, sharding.shardings(axes, params, mesh))
        save_model(tmp_path / "sharded", config=config, params=placed, tokenizer=None)
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    alone, sharded = read_folder(tmp_path / "alone"), read_folder(tmp_path / "sharded")
    assert all(alone[name].tobytes() == sharded[name].tobytes() for name in alone) and alone.keys() == sharded.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: quantize_params(p, scheme="int8"), r"quantised \(int8\).*dequantize"),
        (lambda p: p | {"norm": {}}, r"no norm.scale, the config wants one of shape \(32,\)"),
        (lambda p: p | {"head": {"kernel": p["head"]["kernel"][:, :9]}}, r"head.kernel has shape \(32, 9\)"),
        (lambda p: jax.tree.map(lambda x: x * jnp.nan, p), "differ by nan.*finite"),
    ],
    ids=["quantised", "missing", "shape", "nan"],
)
def test_parameters_that_cannot_be_exported(tmp_path, config, params, change, message):
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "model", config=config, params=change(params), tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_options_that_are_wrong(tmp_path, config, params):
    for options, message in (
        ({"layout": "gguf"}, "layout is 'gguf'"),
        ({"dtype": "int8"}, "weights are stored as float32, .*; given 'int8'"),
        ({"shard_size": "many"}, "a size is a positive number"),
        ({"provenance": {"when": object()}}, "provenance holds a value"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(tmp_path / "model", config=config, params=params, tokenizer=None, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "layout", "stock"),
    [
        (dict(attention_bias="qkv"), "qwen2", True),
        (dict(norm_head=True, num_kv_heads=4), "llama", True),
        (dict(norm_head=True, num_kv_heads=4, positions="alibi", rope_scaling=NoScaling()), "baichuan", False),
    ],
)
def test_the_layout_is_one_that_holds_the_model(tmp_path, config, make_params, tokenizer, fields, layout, stock):
    config = dataclasses.replace(config, **fields)
    params = make_params(config)
    proof = save_model(tmp_path / "model", config=config, params=params, tokenizer=tokenizer)
    about = json.loads((tmp_path / "model" / "internjax.json").read_text())
    assert about["layout"] == layout and proof.max_logit_difference_to_source < 1e-5
    assert ("AutoModelForCausalLM" in (tmp_path / "model" / "README.md").read_text()) == stock
    assert open_model(tmp_path / "model").config.norm_head == (layout == "baichuan")
    save_architecture(tmp_path / "run", config=config, tokenizer=tokenizer)
    assert json.loads((tmp_path / "run/architecture/config.json").read_text())["model_type"] == layout
    with pytest.raises(ValueError, match="layout"):
        save_model(tmp_path / "other", config=config, params=params, tokenizer=None, layout="qwen3")
    assert not (tmp_path / "other").exists()


def test_values_beyond_float16_are_refused_by_name(tmp_path, config, params):
    large = params | {"norm": {"scale": params["norm"]["scale"].at[3].set(-70_000.0)}}
    with pytest.raises(ValueError, match=r"model.norm.weight has values up to 7e\+04, float16 ends at 65504"):
        save_model(tmp_path / "model", config=config, params=large, tokenizer=None, dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layout", "head"), [("llama", "score.weight"), ("internlm2", "v_head.weight")])
def test_reward_models_are_written_and_read_back(tmp_path, config, make_params, tokenizer, read_folder, layout, head):
    scalar = dataclasses.replace(config, head="scalar")
    params = make_params(scalar)
    proof = save_model(tmp_path / "model", config=scalar, params=params, tokenizer=tokenizer, layout=layout)
    tensors = read_folder(tmp_path / "model")
    assert tensors[head].shape == (1, 32) and not {"lm_head.weight", "output.weight"} & set(tensors)
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {"llama": "LlamaForSequenceClassification", "internlm2": "InternLM2ForRewardModel"}
    assert values["architectures"] == [names[layout]] and np.shape(proof.logits) == (16, 1)
    back = open_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    card = (tmp_path / "model" / "README.md").read_text()
    assert ("AutoModelForSequenceClassification" in card) == (layout == "llama") and "AutoModelForCausalLM" not in card


def test_a_folder_that_reads_back_as_something_else_is_not_kept(tmp_path, config, params, monkeypatch):
    right = saving.layout_family("llama")
    wrong = right._replace(config_to_hf=lambda config: right.config_to_hf(config) | {"rms_norm_eps": 0.1})
    monkeypatch.setattr(saving, "layout_family", lambda layout: wrong)
    with pytest.raises(ValueError, match="another config .norm_eps: 0.1 read, 1e-05 written"):
        save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_tensors_written_wrong_are_noticed(tmp_path, config, params, monkeypatch):
    right = saving.plan_tensors

    def swapped(*args, **options):
        plans = right(*args, **options)
        name, other = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1))
        return plans | {name: plans[other], other: plans[name]}

    monkeypatch.setattr(saving, "plan_tensors", swapped)
    with pytest.raises(ValueError, match="reads back with logits that differ by"):
        save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_asked_and_only_if_it_is_a_model(tmp_path, config, params):
    options = {"config": config, "params": params, "tokenizer": None}
    save_model(tmp_path / "model", **options)
    before = (tmp_path / "model" / "model.safetensors").stat().st_ino
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        save_model(tmp_path / "model", **options)
    assert (tmp_path / "model" / "model.safetensors").stat().st_ino == before
    save_model(tmp_path / "model", **options, overwrite=True)
    assert (tmp_path / "model" / "model.safetensors").stat().st_ino != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"not empty and has no config.json \(chapter1.tex\)"):
        save_model(tmp_path / "thesis", **options, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_model(tmp_path / "file", **options)
    (tmp_path / "empty").mkdir()
    save_model(tmp_path / "empty", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "model", "thesis"]


def test_a_failure_while_overwriting_keeps_the_old_folder(tmp_path, config, params, monkeypatch):
    save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written: No space left on device. Nothing of it is left"):
        save_model(tmp_path / "model", config=config, params=params, tokenizer=None, overwrite=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    check(tmp_path / "model")


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), KeyboardInterrupt()])
def test_an_interruption_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    rename = Path.rename

    def interrupted(path, target):
        if ".new-" in path.name:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(type(error)):
        with new_folder(tmp_path / "model", overwrite=True, marker="config.json") as new:
            (new / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from internjax.hf.folder import new_folder

if sys.argv[2] == "between":
    rename = Path.rename
    Path.rename = lambda path, to: os.kill(os.getpid(), 9) if ".new-" in path.name else rename(path, to)
with new_folder(sys.argv[1], overwrite=True, marker="config.json") as new:
    (new / "config.json").write_text("half")
    if sys.argv[2] == "within":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    def write(text):
        with new_folder(tmp_path / "model", overwrite=True, marker="config.json") as new:
            (new / "config.json").write_text(text)

    def killed(where):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model"), where], cwd=ROOT)
        assert done.returncode == -signal.SIGKILL
        return sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir() if path.name.startswith("."))

    write("first")
    (tmp_path / ".model.new-of-mine").mkdir()
    (tmp_path / ".model2.new-12345678").mkdir()
    mine = {".model.new-of-mine", ".model2.new-12345678"}
    with new_folder(tmp_path / "model", overwrite=True, marker="config.json") as other:
        (other / "config.json").write_text("of another writer")
        assert killed("within").count(".model.new") == 2
        write("second")
        assert {path.name for path in tmp_path.iterdir()} == {"model", other.name, *mine}
        assert (tmp_path / "model" / "config.json").read_text() == "second"
    assert {path.name for path in tmp_path.iterdir()} == {"model", *mine}
    assert killed("between").count(".model.old") == 1
    (old,) = tmp_path.glob(".model.old-*")
    assert (old / "config.json").read_text() == "of another writer", "the only one there is stays until there is one"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model", overwrite=True, marker="config.json"):
        assert old.is_dir()
        raise RuntimeError("the next one fails as well")
    assert old.is_dir()
    write("third")
    assert {path.name for path in tmp_path.iterdir()} == {"model", *mine}
    assert (tmp_path / "model" / "config.json").read_text() == "third"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").open("r+b").truncate(4000), "model.safetensors has changed"),
        (lambda f: (f / "generation_config.json").write_text("{}"), "generation_config.json has changed"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "extra.txt").write_text("x"), "extra.txt was added"),
        (lambda f: (f / "internjax.json").unlink(), "a llama folder without internjax.json"),
        (lambda f: (f / "internjax.json").write_text("{}"), "internjax.json cannot be read"),
    ],
)
def test_check_names_what_changed(tmp_path, config, params, tokenizer, change, message):
    save_model(tmp_path / "model", config=config, params=params, tokenizer=tokenizer)
    change(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        check(tmp_path / "model")


def test_check_computes_the_recorded_logits_anew(tmp_path, config, params):
    save_model(tmp_path / "model", config=config, params=params, tokenizer=None)
    path = tmp_path / "model" / "internjax.json"
    about = json.loads(path.read_text())
    about["proof"]["logits"][3][2] += 0.01
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"the logits differ by 0\.00?[19]"):
        check(tmp_path / "model")


def test_generation_of_the_source_is_the_generation_of_the_export(tmp_path, config, params, tokenizer, capsys):
    save_model(tmp_path / "source", config=config, params=params, tokenizer=tokenizer)
    end = tokenizer.special["<|im_end|>"]
    source = {
        "bos_token_id": 1,
        "eos_token_id": [2, end],
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.8,
        "max_new_tokens": 1024,
        "num_beams": 4,
        "length_penalty": 1.0,
    }
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(source | {"transformers_version": "4.40.0"}))
    model = open_model(tmp_path / "source")
    assert "not applied by this decoder: num_beams=4" in capsys.readouterr().out
    assert (model.generation.temperature, model.generation.top_k, model.generation.eos_ids) == (0.8, 40, (2, end))
    save_model(
        tmp_path / "export",
        config=model.config,
        params=model.params,
        tokenizer=model.tokenizer,
        generation=model.generation,
    )
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == source


def test_where_generation_is_read_from(tmp_path, tokenizer):
    end = tokenizer.special["<|im_end|>"]
    # nothing but config.json: its ids, and its sampling fields, as old transformers kept them
    found = read_generation(tmp_path, {"eos_token_id": 7, "bos_token_id": 1, "temperature": 0.5}, None)
    assert (found.eos_ids, found.bos_id, found.temperature) == ((7,), 1, 0.5)
    assert read_generation(tmp_path, {"eos_token_id": 7}, tokenizer).eos_ids == tuple(sorted((2, 7, end)))
    # the file wins over config.json
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9], "do_sample": true}')
    found = read_generation(tmp_path, {"eos_token_id": 7, "temperature": 0.5}, None)
    assert (found.eos_ids, found.temperature, found.do_sample, found.top_k) == ((9,), 1.0, True, 50)
    (tmp_path / "generation_config.json").write_text("[1")
    with pytest.raises(ValueError, match="generation_config.json is not valid JSON"):
        read_generation(tmp_path, {}, None)


def test_sampling_from_all_tokens_is_written_out():
    # transformers would choose from 50 where a file that samples does not say
    written = generation_to_hf(GenerationConfig((2,), do_sample=True))
    assert written == {"eos_token_id": [2], "do_sample": True, "top_k": 0}


def test_default_generation_is_greedy_and_stops(tokenizer):
    generation = default_generation(tokenizer)
    assert not generation.do_sample and generation.eos_ids == (2, tokenizer.special["<|im_end|>"])
