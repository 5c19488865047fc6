"""Every family: logits of stock transformers or of a plain NumPy reference, and every byte on the way back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from internjax import sharding
from internjax.hf import loading
from internjax.hf.adapter import WEIGHTS, load_adapter, save_adapter
from internjax.hf.families import family_of, fitting_layout, holding_layouts
from internjax.hf.loading import plan_tensors
from internjax.hf.mapping import leaf_shapes
from internjax.hf.open import logits, open_model
from internjax.hf.weights import read_header, read_tensor
from internjax.model import decoder
from internjax.model.config import ModelConfig, num_params
from internjax.model.lora import LoraConfig, apply_config, init_lora
from tests.hf import family_reference
from tests.hf.conftest import GOLDEN
from tests.hf.family_weights import tensors_of

STOCK = json.loads((GOLDEN / "families.json").read_text())

# The released config.json of each family, as far as it says how to compute, with reduced sizes.
INTERNLM = {
    "architectures": ["InternLMForCausalLM"],
    "model_type": "internlm",
    "bias": True,
    "hidden_act": "silu",
    "hidden_size": 24,
    "intermediate_size": 28,
    "max_position_embeddings": 8,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "rotary": {"base": 10000, "type": "dynamic"},
    "tie_word_embeddings": False,
    "vocab_size": 37,
}
BAICHUAN_7B = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "_from_model_config": True,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 28,
    "max_position_embeddings": 8,
    "model_max_length": 8,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vocab_size": 37,
    "z_loss_weight": 0,
}
BAICHUAN_13B = {name: value for name, value in BAICHUAN_7B.items() if name != "max_position_embeddings"}
CHATGLM3 = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 28,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 24,
    "kv_channels": 8,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 2,
    "original_rope": True,
    "padded_vocab_size": 37,
    "post_layer_norm": True,
    "rmsnorm": True,
    "rope_ratio": 50,
    "seq_length": 8,
    "tie_word_embeddings": False,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
}
OTHERS = {
    "internlm": (INTERNLM, family_reference.internlm),
    "baichuan2 7B": (BAICHUAN_7B, family_reference.baichuan2),
    "baichuan2 13B": (BAICHUAN_13B, family_reference.baichuan2),
    "chatglm3": (CHATGLM3, family_reference.chatglm3),
}
TOKENS = [5, 17, 2, 34, 9, 9, 31, 36, 3, 25, 12, 7]  # more than the 8 positions


@pytest.fixture(scope="module")
def stock_outputs():
    return {name: read_tensor(info) for name, info in read_header(GOLDEN / "family_logits.safetensors").items()}


def shapes_of(values):
    """The tensors that the family's table wants, by name."""
    family = family_of(values)
    config = family.config_from_hf(values)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), decoder.abstract_params(config))
    return {name: plan.shape for name, plan in plan_tensors(zeros, family, config, dtype=None).items()}


def check_round_trip(model, values, tensors):
    """What was read is written again, byte for byte, and config.json says the same again."""
    family = family_of(values)
    plans = plan_tensors(jax.tree.map(np.asarray, model.params), family, model.config, dtype=None)
    assert sorted(plans) == sorted(tensors)
    for name, plan in plans.items():
        assert np.asarray(plan.fetch()).tobytes() == tensors[name].tobytes(), name
    wanted = family.config_from_hf(values)
    written = json.loads(json.dumps(family.config_to_hf(wanted)))
    assert family_of(written) is family
    assert family.config_from_hf(written) == wanted


@pytest.mark.parametrize("case", STOCK)
def test_logits_are_those_of_stock_transformers(stock_outputs, make_folder, case):
    values, tensors = STOCK[case]["config"], tensors_of(STOCK[case]["shapes"])
    model = open_model(make_folder("stock", values, tensors))
    got = logits(model, stock_outputs["tokens"])
    np.testing.assert_allclose(got, stock_outputs[case], rtol=0, atol=1e-5)
    check_round_trip(model, values, tensors)


@pytest.mark.parametrize("case", OTHERS)
def test_logits_are_those_of_the_numpy_reference(make_folder, case):
    values, reference = OTHERS[case]
    tensors = tensors_of(shapes_of(values))
    model = open_model(make_folder("other", values, tensors))
    wanted = reference(TOKENS, {name: tensor.astype(np.float64) for name, tensor in tensors.items()}, values)
    np.testing.assert_allclose(logits(model, [TOKENS])[0], wanted, rtol=0, atol=1e-5)
    check_round_trip(model, values, tensors)


def test_on_a_mesh_biases_and_windows_are_the_same(make_folder, monkeypatch):
    values = STOCK["qwen2 tied"]["config"] | {"vocab_size": 40, "tie_word_embeddings": False}
    folder = make_folder("stock", values, tensors_of(shapes_of(values)))
    alone = logits(open_model(folder), [TOKENS] * 4)
    monkeypatch.setattr(sharding, "_configured_mesh", None)  # put back at the end
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    monkeypatch.setattr(loading, "HOST_STACK_BYTES", 0)
    model = open_model(folder, mesh=mesh)
    bias = model.params["layers"]["attention"]["query"]["bias"]
    assert bias.sharding.spec == jax.sharding.PartitionSpec(None, "tensor")
    np.testing.assert_allclose(logits(model, [TOKENS] * 4), alone, atol=1e-5)


def test_the_names_of_chatglm3_and_baichuan2_are_the_published_ones():
    names = {name: tuple(shape) for name, shape in shapes_of(CHATGLM3).items()}
    layer = "transformer.encoder.layers.1."
    assert names[layer + "self_attention.query_key_value.bias"] == ((4 + 2 * 2) * 8,)
    assert names[layer + "mlp.dense_h_to_4h.weight"] == (2 * 28, 24)
    assert layer + "self_attention.dense.bias" not in names and "transformer.output_layer.weight" in names
    names = {name: tuple(shape) for name, shape in shapes_of(BAICHUAN_13B).items()}
    assert names["model.layers.1.self_attn.W_pack.weight"] == (3 * 24, 24)


# Full sizes: the numbers of each released config.json that decide the size, and the parameters of the released
# safetensors (those of ChatGLM3 and GLM-4 without the buffer of rotary frequencies).
LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
LLAMA_3_1 |= {"original_max_position_embeddings": 8192}
# vocabulary, width, layers, query heads, key/value heads, feed-forward width
RELEASED = {
    "Llama 3.1 8B": (8_030_261_248, "llama", (128256, 4096, 32, 32, 8, 14336), {"rope_scaling": LLAMA_3_1}),
    "Llama 3.2 1B": (
        1_235_814_400,
        "llama",
        (128256, 2048, 16, 32, 8, 8192),
        {"tie_word_embeddings": True, "head_dim": 64, "rope_scaling": LLAMA_3_1 | {"factor": 32.0}},
    ),
    "Llama 3.2 3B": (
        3_212_749_824,
        "llama",
        (128256, 3072, 28, 24, 8, 8192),
        {"tie_word_embeddings": True, "head_dim": 128, "rope_scaling": LLAMA_3_1 | {"factor": 32.0}},
    ),
    "Qwen2.5 7B": (
        7_615_616_512,
        "qwen2",
        (152064, 3584, 28, 28, 4, 18944),
        {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "rope_theta": 1000000.0},
    ),
    "Qwen3 8B": (
        8_190_735_360,
        "qwen3",
        (151936, 4096, 36, 32, 8, 12288),
        {"head_dim": 128, "attention_bias": False, "max_window_layers": 36, "sliding_window": None},
    ),
    "Mistral 7B v0.1": (7_241_732_096, "mistral", (32000, 4096, 32, 32, 8, 14336), {"sliding_window": 4096}),
    "InternLM2.5 7B": (7_737_708_544, "internlm2", (92544, 4096, 32, 32, 8, 14336), {"bias": False}),
    "Baichuan2 7B": (
        7_505_973_248,
        "baichuan",
        (125696, 4096, 32, 32, None, 11008),
        {"max_position_embeddings": 4096, "model_max_length": 4096, "z_loss_weight": 0},
    ),
    "Baichuan2 13B": (13_896_668_160, "baichuan", (125696, 5120, 40, 40, None, 13696), {"model_max_length": 4096}),
}
_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SHARED += ("intermediate_size",)
_CHAT = {name: CHATGLM3[name] for name in CHATGLM3 if name not in ("architectures", "rope_ratio", "seq_length")}


def released(name):
    """The published number of parameters of a model, and its config.json."""
    chat = {"hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128, "ffn_hidden_size": 13696}
    if name == "ChatGLM3 6B":
        return 6_243_584_000, _CHAT | chat | {"num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192}
    if name == "GLM-4 9B":
        sizes = {
            "num_layers": 40,
            "num_hidden_layers": 40,
            "padded_vocab_size": 151552,
            "vocab_size": 151552,
            "seq_length": 131072,
        }
        return 9_399_951_360, _CHAT | chat | sizes | {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}
    total, kind, sizes, more = RELEASED[name]
    sizes = {field: size for field, size in zip(_SHARED, sizes, strict=True) if size is not None}
    return total, {"model_type": kind, "hidden_act": "silu"} | sizes | more


@pytest.mark.parametrize("name", [*RELEASED, "ChatGLM3 6B", "GLM-4 9B"])
def test_released_models_have_the_published_number_of_parameters(name):
    total, values = released(name)
    config = family_of(values).config_from_hf(values)
    assert num_params(config) == total
    layers = {path: np.prod(shape, dtype=int) for path, shape in leaf_shapes(config).items()}
    assert sum(n * (config.num_layers if path.startswith("layers.") else 1) for path, n in layers.items()) == total


def test_released_configs_say_how_to_compute():
    configs = {name: family_of(values).config_from_hf(values) for name in RELEASED for _, values in [released(name)]}
    assert configs["Llama 3.2 1B"].rope_scaling.factor == 32.0 and configs["Llama 3.2 1B"].tie_embeddings
    assert (configs["Mistral 7B v0.1"].window, configs["Qwen2.5 7B"].window) == (4096, None)
    assert (configs["Baichuan2 7B"].positions, configs["Baichuan2 13B"].positions) == ("rotary", "alibi")
    assert configs["Baichuan2 13B"].norm_head and configs["Qwen3 8B"].qk_norm
    glm = family_of(_CHAT).config_from_hf(released("GLM-4 9B")[1])
    assert (glm.rope_theta, glm.rotary_dim, glm.num_kv_heads) == (5_000_000.0, 64, 2)


QWEN2 = STOCK["qwen2"]["config"] | {"layer_types": None}


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention"] * 2}, 5),
    ],
)
def test_windows_of_qwen(fields, window):
    values = QWEN2 | fields
    assert family_of(values).config_from_hf(values).window == window


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, "1 of 2 layers have a sliding window"),
        (QWEN2 | {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "does not fit 2 layers"),
        (QWEN2 | {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'; supported are default"),
        (BAICHUAN_7B | {"vocab_size": 64000}, "Baichuan 1"),
        (BAICHUAN_7B | {"architectures": ["BaiChuanForCausalLM"]}, "Baichuan 1"),
        (BAICHUAN_7B | {"hidden_size": 5120}, "ALiBi"),
        (BAICHUAN_7B | {"z_loss_weight": 1e-4}, "z_loss_weight is 0.0001, supported is 0"),
        (CHATGLM3 | {"_name_or_path": "THUDM/chatglm2-6b-32k"}, "ChatGLM2.*rope_ratio 50"),
        (CHATGLM3 | {"position_encoding_2d": True}, "first ChatGLM"),
        (CHATGLM3 | {"num_hidden_layers": 3}, "num_hidden_layers is 3, supported is 2"),
        (CHATGLM3 | {"rmsnorm": False}, "rmsnorm is False, supported is True"),
        (CHATGLM3 | {"quantization_bit": 4}, "quantization_bit is 4"),
        (INTERNLM | {"rotary": {"type": "ntk"}}, "types 'origin' and 'dynamic'"),
        (INTERNLM | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .* is not known here"),
        (CHATGLM3 | {"new_feature": 1}, r"new_feature = 1.*--allow-unknown new_feature"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        family_of(values).config_from_hf(values)


PLAIN = ModelConfig(vocab_size=37, d_model=24, num_layers=2, num_heads=3, num_kv_heads=3, head_dim=8, ffn_dim=28)


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({}, "llama"),
        ({"attention_bias": "all", "ffn_bias": True, "head_dim": 16}, "llama"),
        ({"norm_head": True}, "llama"),
        ({"window": 5}, "mistral"),
        ({"attention_bias": "qkv"}, "qwen2"),
        ({"qk_norm": True, "window": 5}, "qwen3"),
        ({"attention_bias": "qkv", "rotary_dim": 4}, "glm"),
        ({"positions": "alibi", "norm_head": True, "rope_theta": 10_000.0}, "baichuan"),
        ({"attention_bias": "all", "ffn_bias": True, "rotary_dim": 4}, "chatglm"),
    ],
)
def test_a_model_is_written_in_the_first_layout_that_holds_it(fields, layout):
    assert fitting_layout(dataclasses.replace(PLAIN, **fields)) == layout


def test_all_layouts_that_hold_a_model():
    assert holding_layouts(PLAIN) == ["llama", "mistral", "glm", "internlm2", "internlm"]
    half = dataclasses.replace(PLAIN, rotary_dim=4, attention_bias="qkv")
    assert holding_layouts(half) == ["glm", "chatglm"]


def test_a_model_that_no_layout_holds_is_told_why():
    config = dataclasses.replace(PLAIN, qk_norm=True, attention_bias="qkv")
    with pytest.raises(ValueError, match="'llama' has no place for attention_bias='qkv'.*'qwen3'.*qkv"):
        fitting_layout(config)


@pytest.mark.parametrize("case", ["glm", "chatglm3"])
def test_an_adapter_of_turned_heads_acts_in_their_own_order(make_folder, tmp_path, case):
    """What PEFT adds to q_proj is B A x in the checkpoint's order of rows."""
    values = STOCK["glm"]["config"] if case == "glm" else CHATGLM3
    tensors = tensors_of(shapes_of(values))
    folder = make_folder("base", values, tensors)
    model = open_model(folder)
    lora_config = LoraConfig(rank=2, alpha=2.0, targets=("query",))
    weights = init_lora(lora_config, model.params, jax.random.key(0))
    weights = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(1), leaf.shape), weights)
    save_adapter(tmp_path / "adapter", lora_config, weights, folder, model_config=model.config)
    written = {name: read_tensor(info) for name, info in read_header(tmp_path / "adapter" / WEIGHTS).items()}
    for name, a in written.items():
        if "lora_A" in name:
            base = name.removeprefix("base_model.model.").replace("lora_A.", "")
            tensors[base] = tensors[base] + written[name.replace("lora_A", "lora_B")] @ a
    merged = logits(open_model(make_folder("merged", values, tensors)), [TOKENS])
    assert np.abs(merged - logits(model, [TOKENS])).max() > 1e-2
    back = load_adapter(tmp_path / "adapter", model_config=model.config)
    np.testing.assert_allclose(
        back.weights["layers"]["attention"]["query"]["b"][:, :2],
        weights["layers"]["attention"]["query"]["b"],
        atol=1e-6,
    )
    adapted = decoder.logits(
        model.params, np.array([TOKENS]), config=model.config, lora=apply_config(weights, lora_config)
    )
    np.testing.assert_allclose(adapted, merged, atol=1e-5)
