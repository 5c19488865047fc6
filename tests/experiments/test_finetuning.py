"""Fine-tuning by every method: what a run leaves opens as one and the same model, whole or as an adapter."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.conversations import Reading
from experiments import finetuning as stage
from experiments.callbacks import HeldOut
from experiments.finetuning import adapters_of, base_of, finetune
from internjax.hf.convert import convert
from internjax.hf.open import logits, open_model
from internjax.hf.quantized import Quantization
from internjax.hf.save import save_architecture, save_model
from internjax.model import decoder
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised, quantize_params
from internjax.sharding import MeshConfig
from internjax.text.tokenizer import load_tokenizer
from internjax.train import devices
from internjax.train.checkpoint import CheckpointConfig, open_checkpoints
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state
from internjax.train.tracking import read_rows
from tests.experiments.conftest import SMALL, finetuning

TOKENS = np.arange(3, 27).reshape(2, 12)


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """A model folder of random weights, large enough that adapters of a few steps are seen."""
    folder = tmp_path_factory.mktemp("base") / "model"
    tokenizer = load_tokenizer(corpus / "tokenizer")
    save_model(folder, config=SMALL, params=decoder.init(SMALL, jax.random.key(0)), tokenizer=tokenizer)
    return folder


def config_of(corpus, base, run, **fields):
    how = {"num_steps": 4, "optimizer": AdamW(peak_lr=2e-2, weight_decay=0.0), "checkpoint": CheckpointConfig(every=2)}
    # Groups of quantised weights are larger than an eighth of these kernels, so nothing is cut but rows.
    how |= {"mesh": MeshConfig(data=8, fsdp=1)}
    return finetuning(corpus, base, run, **how | fields)


def answers(model, **how):
    return np.asarray(logits(open_model(model, **how), TOKENS))


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("dora", {"neftune_alpha": 5.0}),
        ("pissa", {"lora": LoraConfig(rank=4, alpha=4.0, targets=("query", "value", "down"))}),
        ("qlora", {"optimizer": AdamW(peak_lr=2e-2, weight_decay=0.0, lora_plus_ratio=4.0)}),
        ("rslora", {"quantize": "int8", "dtype": "float16"}),
    ],
)
def test_a_method_leaves_one_model_in_every_form(method, fields, corpus, base, tmp_path):
    config = config_of(corpus, base, tmp_path / "run", method=method, **fields)
    done = finetune(config)
    assert ("num_overflows" in done.summary) == (config.dtype == "float16")  # a loss scale was there
    merged, start = answers(done.folder), answers(base)
    assert np.abs(merged - start).max() > 1e-2
    if base_of(config) is None:
        for form in (done.folder / "adapter", f"{base}+{done.folder / 'adapter'}", f"{done.folder}@4"):
            np.testing.assert_allclose(answers(form), merged, atol=2e-4, err_msg=str(form))
        return
    # Trained on the quantised base: that is what was merged, and what the adapter is to be used on.
    on_quantised = answers(done.folder / "adapter", quantize=base_of(config))
    np.testing.assert_allclose(on_quantised, merged, atol=2e-4)
    assert np.abs(answers(done.folder / "adapter") - merged).max() > 1e-3


def test_adapters_train_on_a_quantised_folder_as_it_is(corpus, base, tmp_path):
    tokenizer, packing = load_tokenizer(corpus / "tokenizer"), Quantization("awq", group=32)
    params = quantize_params(open_model(base).params, scheme="int4", group=32, head=False, scale_dtype="float16")
    folder = tmp_path / "awq"
    save_model(folder, config=SMALL, params=params, tokenizer=tokenizer, quantization=packing)
    # A group is as wide as the model: rows alone are cut.
    done = finetune(config_of(corpus, folder, tmp_path / "run", method="qlora"))
    merged, start = answers(done.folder), answers(folder)
    assert np.abs(merged - start).max() > 1e-2
    np.testing.assert_allclose(answers(done.folder / "adapter"), merged, atol=2e-4)
    assert open_model(done.folder / "adapter").quantization == packing
    assert open_model(done.folder).quantization is None
    for fields, said in (
        ({"method": "full"}, "method=full wants whole weights: use qlora"),
        ({"method": "pissa"}, "method=pissa wants whole weights"),
        ({"method": "qlora", "quantize": "int8"}, "quantised already.*leave quantize=int8 out"),
        ({"model": str(done.folder / "adapter")}, "an adapter on a quantised model"),
    ):
        with pytest.raises(ValueError, match=said):
            finetune(config_of(corpus, fields.pop("model", folder), tmp_path / "other", **fields))
    convert(done.folder / "adapter", tmp_path / "merged")
    np.testing.assert_allclose(answers(tmp_path / "merged"), merged, atol=2e-4)
    shutil.rmtree(done.folder / "model")  # as a run that was not merged: its checkpoint is the adapter
    with pytest.raises(ValueError, match="an adapter on a quantised model"):
        finetune(config_of(corpus, done.folder, tmp_path / "other", method="qlora"))


def test_a_gpu_without_bfloat16_computes_in_float16_and_says_so(corpus, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, dtype in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        monkeypatch.setattr(devices, "compute_capability", lambda device: capability)  # noqa: B023
        assert stage._whole_model(config_of(corpus, base, tmp_path), None).config.dtype == dtype
        said = (
            "(compute capability 7.5) has no bfloat16: computed in float16, with a loss scale"
            in capsys.readouterr().out
        )
        assert said == (dtype == "float16")


def test_what_a_name_of_a_method_means(corpus, base, tmp_path):
    named = {
        method: config_of(corpus, base, tmp_path, method=method) for method in ("lora", "rslora", "pissa", "qlora")
    }
    assert adapters_of(named["lora"]) == adapters_of(named["qlora"]) == LoraConfig()
    assert adapters_of(named["rslora"]).scaling == "rslora" and adapters_of(named["pissa"]).initialisation == "pissa"
    assert base_of(named["lora"]) is None and base_of(named["qlora"]) == Quantised("nf4", 64, double=True)
    assert base_of(config_of(corpus, base, tmp_path, method="qlora", quantize="int4")).scheme == "int4"
    for fields, said in (
        ({"method": "full", "quantize": "nf4"}, "method=full trains it: use qlora"),
        ({"method": "full", "lora": LoraConfig(rank=2)}, "trains no adapters"),
        ({"freeze": ("embed.*",)}, "under adapters the whole model is frozen"),
        ({"param_dtype": "bfloat16"}, "adapters are trained in float32"),
        ({"num_steps": 0}, "num_steps at least 1"),
        ({"num_epochs": 0.0}, "num_epochs must be above 0"),
        ({"neftune_alpha": -5.0}, "neftune_alpha not negative"),
        (
            {"held_out": HeldOut("tokens"), "reading": Reading(validation_share=0.1)},
            "neither learned nor measured; give one of them",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            config_of(corpus, base, tmp_path, **fields)


def test_frozen_parameters_stay_and_held_out_conversations_are_measured(corpus, base, tmp_path, capsys):
    before = open_model(base).params
    # What is trained further is a checkpoint, so that no folder has what is frozen but the one that the run writes.
    save_architecture(tmp_path / "first", config=SMALL, tokenizer=load_tokenizer(corpus / "tokenizer"))
    with open_checkpoints(tmp_path / "first" / "checkpoints") as checkpoints:
        checkpoints.save(init_state(jax.tree.map(jnp.copy, before), make_optimizer(AdamW(), Cosine(), 10)))
    config = config_of(
        corpus,
        f"{tmp_path / 'first'}@0",
        tmp_path / "run",
        method="full",
        freeze=("embed.*", "layers.ffn.*"),
        reading=Reading(validation_share=0.5, cache=str(tmp_path / ".tokens")),
        held_out=HeldOut(every=2, num_batches=1),
    )
    done = finetune(config)
    told = capsys.readouterr()
    after = open_model(done.folder).params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert same["embed"]["embedding"] and all(jax.tree.leaves(same["layers"]["ffn"]))
    assert not any(jax.tree.leaves(same["layers"]["attention"])) and not same["head"]["kernel"]
    shutil.rmtree(tmp_path / "first")
    jax.tree.map(np.testing.assert_array_equal, open_model(f"{done.folder}@4").params, after)
    assert f"+ what {done.folder / 'base'} has" in capsys.readouterr().out
    rows = read_rows(done.folder / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4]
    (counts,) = done.summary["files"].values()
    assert counts["num_validation"] > 0 and counts["num_trained"] + counts["num_validation"] == 64
    assert f"after step 4/4  eval/loss {rows[-1]['eval/loss']:.4f}" in told.err
    assert f"written: {done.folder / 'model'}; python -m serve {config.run} answers" in told.out
    page = (done.folder / "report.md").read_text()
    assert f"| validation | {counts['num_validation']} |" in page and "| bad rows | 0 |" in page
