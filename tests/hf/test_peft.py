"""Live, with torch and the PEFT library: adapters of every kind go both ways and compute the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from internjax.hf.adapter import save_adapter
from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.mapping import get_leaf, tensor_names
from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from internjax.model.config import NoScaling
from internjax.model.lora import LoraConfig, apply_config, initialise, merge, of_original_base

pytestmark = pytest.mark.parity

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
KINDS = {
    "lora": LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down", "head")),
    "rslora": LoraConfig(rank=3, alpha=6.0, targets=TARGETS, scaling="rslora"),
    "dora": LoraConfig(rank=3, alpha=6.0, targets=TARGETS, kind="dora"),
    "pissa": LoraConfig(rank=3, alpha=6.0, targets=TARGETS, initialisation="pissa"),
    "pissa, rslora": LoraConfig(rank=3, alpha=6.0, targets=TARGETS, scaling="rslora", initialisation="pissa"),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 280, (2, 12))


@pytest.fixture(scope="module")
def base(tmp_path_factory, config, make_params, tokenizer):
    """A folder that both sides open, and what was written into it."""
    config = dataclasses.replace(config, rope_scaling=NoScaling(), initializer_range=0.12)
    folder = tmp_path_factory.mktemp("peft") / "base"
    params = make_params(config)
    save_model(folder, config=config, params=params, tokenizer=tokenizer)
    return folder, config, params


def stock(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def logits_of(torch, model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_made_here_compute_the_same_in_peft_and_come_back(torch, peft, tmp_path, base, tokens, kind):
    folder, config, params = base
    lora = KINDS[kind]
    start = initialise(lora, params, jax.random.key(0))
    noise = jax.random.split(jax.random.key(1), 50)
    weights = jax.tree.map(
        lambda leaf, keys=iter(noise): leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), start.weights
    )
    if lora.initialisation == "pissa":
        lora, weights = of_original_base(lora, weights, start.weights)
    save_adapter(tmp_path / "adapter", lora, weights, folder, model_config=config)
    theirs = peft.PeftModel.from_pretrained(stock(folder), tmp_path / "adapter")
    ours = open_model(tmp_path / "adapter")
    got = logits(ours, tokens)
    np.testing.assert_allclose(got, logits_of(torch, theirs, tokens), rtol=0, atol=1e-5)
    assert np.abs(got - logits(open_model(folder), tokens)).max() > 0.1
    theirs.save_pretrained(tmp_path / "back")
    back = open_model(f"{folder}+{tmp_path / 'back'}")
    assert back.lora.scale == ours.lora.scale
    jax.tree.map(np.testing.assert_array_equal, back.lora.weights, ours.lora.weights)


def randomised(torch, model):
    """Stands for training: every tensor of the adapter moves."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=4, lora_alpha=8, target_modules="all-linear"),
        dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_rslora=True, use_dora=True),
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "down_proj"],
            rank_pattern={"q_proj": 2, r"layers\.[12]\.mlp\.down_proj": 6},
            alpha_pattern={"k_proj": 3},
        ),
    ],
    ids=["all linear", "dora and rslora", "patterns"],
)
def test_adapters_made_by_peft_compute_the_same_here(torch, peft, tmp_path, base, tokens, fields):
    folder, _, _ = base
    model = peft.get_peft_model(stock(folder), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    randomised(torch, model).save_pretrained(tmp_path / "theirs")
    ours = open_model(f"{folder}+{tmp_path / 'theirs'}")
    want = logits_of(torch, model, tokens)
    np.testing.assert_allclose(logits(ours, tokens), want, rtol=0, atol=1e-5)
    assert np.abs(want - logits_of(torch, stock(folder), tokens)).max() > 0.1


def test_pissa_trained_and_converted_by_peft_computes_the_same_here(torch, peft, tmp_path, base, tokens):
    folder, _, _ = base
    fields = dict(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["v_proj", "gate_proj"])
    model = peft.get_peft_model(stock(folder), peft.LoraConfig(init_lora_weights="pissa", **fields))
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide to PiSSA saves the start
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    randomised(torch, model)
    model.save_pretrained(tmp_path / "trained", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "trained" / "adapter_config.json").read_text())["r"] == 6
    ours = open_model(f"{folder}+{tmp_path / 'trained'}")
    np.testing.assert_allclose(logits(ours, tokens), logits_of(torch, model, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_of_fused_modules_is_the_same_in_peft(torch, peft, tmp_path, base, kind):
    """PEFT merges it into matrices with InternLM2's names; cut apart, they are those that are merged here."""
    _, config, params = base
    lora = dataclasses.replace(KINDS[kind], targets=TARGETS)
    fresh = initialise(lora, params, jax.random.key(0)).weights
    weights = jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), fresh)
    save_adapter(tmp_path / "adapter", lora, weights, "base", model_config=config, layout="internlm2")
    table = [row for row in INTERNLM2.rows(config) if row.leaves[0].endswith(".kernel")]

    def tensors(params):
        for row in table:
            for layer, name in enumerate(tensor_names(row, config)):
                leaves = [np.asarray(get_leaf(params, leaf)) for leaf in row.leaves]
                yield name, row.fuse([(leaf[layer] if row.per_layer else leaf).T for leaf in leaves], config)

    model = torch.nn.Module()
    model.config, model.prepare_inputs_for_generation = {"model_type": "internlm2"}, None
    for name, array in tensors(params):
        *parents, last = name.removesuffix(".weight").split(".")
        node = model
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, torch.nn.Module())
            node = getattr(node, parent)
        linear = torch.nn.Linear(*array.shape[::-1], bias=False)
        linear.weight.data = torch.from_numpy(array.copy())
        node.add_module(last, linear)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    for name, want in tensors(merge(params, apply_config(weights, lora))):
        np.testing.assert_allclose(merged[name].numpy(), want, rtol=0, atol=1e-5)
