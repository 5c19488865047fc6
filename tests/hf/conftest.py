"""A small model, its tokenizer, and folders written from them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from internjax.hf.weights import Plan, list_tensors, read_tensor, write_model
from internjax.model.config import DynamicNTK, ModelConfig
from internjax.text.tokenizer import train_tokenizer
from tests.weights import random_params

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hf"

SMALL = ModelConfig(
    vocab_size=300,
    d_model=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_dim=48,
    max_position_embeddings=16,
    rope_theta=10_000.0,
    rope_scaling=DynamicNTK(2.0),
    initializer_range=0.2,
    dtype="float32",
)


@pytest.fixture(scope="session")
def config():
    return SMALL


@pytest.fixture(scope="session")
def params(config):
    return random_params(config)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 4], vocab_size=280)


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture
def make_folder(tmp_path):
    """Writes a folder as others would: config.json and tensors by name, nothing else."""

    def make(name, values, tensors, *, shard_size="5GB"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        plans = {key: Plan(array.shape, array.dtype, lambda array=array: array) for key, array in tensors.items()}
        write_model(folder, plans, shard_size=shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def golden():
    """Weights, tokens and logits of stock transformers' Llama, and the config.json of each case."""
    outputs = {name: read_tensor(info) for name, info in list_tensors_of(GOLDEN / "llama_logits.safetensors").items()}
    weights = {name: read_tensor(info) for name, info in list_tensors_of(GOLDEN / "llama_weights.safetensors").items()}
    return {
        "tokens": outputs.pop("tokens"),
        "logits": outputs,
        "weights": weights,
        "configs": json.loads((GOLDEN / "llama_configs.json").read_text()),
    }


def list_tensors_of(file: Path):
    from internjax.hf.weights import read_header

    return read_header(file)


@pytest.fixture(scope="session")
def read_folder():
    """Reads every tensor of a folder."""
    return lambda folder: {name: read_tensor(info) for name, info in list_tensors(folder).items()}


@pytest.fixture(scope="session")
def internlm2_checkpoint():
    """Random tensors under InternLM2's published names, with their config.json: (values, tensors)."""

    def make(seed=0, *, reward=False, dtype=np.float32, **fields):
        values = {
            "architectures": ["InternLM2ForRewardModel" if reward else "InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            "vocab_size": 96,
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        } | fields
        random = np.random.default_rng(seed)
        d, f, v = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
        rows = (values["num_attention_heads"] + 2 * values["num_key_value_heads"]) * 8
        shapes = {"model.tok_embeddings.weight": (v, d), "model.norm.weight": (d,)}
        if reward:
            shapes["v_head.weight"] = (1, d)
        elif not values["tie_word_embeddings"]:
            shapes["output.weight"] = (v, d)
        for layer in range(values["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            shapes |= {
                prefix + "attention_norm.weight": (d,),
                prefix + "attention.wqkv.weight": (rows, d),
                prefix + "attention.wo.weight": (d, d),
                prefix + "ffn_norm.weight": (d,),
                prefix + "feed_forward.w1.weight": (f, d),
                prefix + "feed_forward.w3.weight": (f, d),
                prefix + "feed_forward.w2.weight": (d, f),
            }
        tensors = {
            name: (random.uniform(0.5, 1.5, shape) if len(shape) == 1 else random.normal(0, 0.2, shape)).astype(dtype)
            for name, shape in shapes.items()
        }
        return values, tensors

    return make


@pytest.fixture(scope="session")
def tied_config(config):
    return dataclasses.replace(config, tie_embeddings=True)
