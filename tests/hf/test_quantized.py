"""Quantised folders: checkpoints of AWQ and GPTQ as others write them, packed here bit by bit from their layout."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from internjax import sharding
from internjax.hf import loading
from internjax.hf.convert import check, convert
from internjax.hf.families import family_of
from internjax.hf.loading import plan_tensors
from internjax.hf.open import logits, open_model
from internjax.hf.quantized import Quantization, quantization_to_hf, read_quantization
from internjax.hf.save import save_model
from internjax.model.quantize import QuantArray, dequantize, quantize_params
from tests.hf.test_fields import LLAMA_4

GROUP = 16
TOKENS = [[5, 17, 2, 44, 9, 9, 31, 60]]
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "torch_dtype": "float16"}
LLAMA = LLAMA_4 | SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_scaling": None}
INTERNLM2 = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "attention_bias", "mlp_bias")}
INTERNLM2 |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}

CASES = {
    "awq": (AWQ | {"modules_to_not_convert": ["lm_head"], "do_fuse": False}, {}),
    "awq of transformers 5": (AWQ | {"format": "gemm", "sym": True, "desc_act": False, "backend": "auto"}, {}),
    "awq, fused": (AWQ | {"version": "GEMM"}, {"fused": True}),
    "awq, ffn alone": (AWQ | {"modules_to_not_convert": ["self_attn"]}, {}),
    "gptq": (GPTQ | {"sym": True, "damp_percent": 0.01, "true_sequential": True}, {"middle": True}),
    "gptq, zeros less one": (GPTQ | {"checkpoint_format": "GPTQ"}, {}),
    "gptq, one group": (GPTQ | {"group_size": -1, "format": "gptq_v2", "meta": {"quantizer": ["x"]}}, {}),
    "gptq, act order": (GPTQ | {"desc_act": True, "checkpoint_format": "gptq_v2"}, {"shuffled": True}),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, {}),
    "gptq, 8 bits symmetric": (GPTQ | {"bits": 8, "sym": True, "lm_head": True}, {"middle": True}),
    "gptq, fused": (GPTQ | {"desc_act": True}, {"fused": True, "shuffled": True}),
}


def word(nibbles, bits: int) -> int:
    value = 0
    for place, nibble in enumerate(nibbles):
        value += int(nibble) << (bits * place)
    return value - (1 << 32) if value >= 1 << 31 else value


def words_along_output(codes, bits, order=None):
    per = 32 // bits
    order = order or range(per)
    return np.array(
        [[word([row[c + k] for k in order], bits) for c in range(0, len(row), per)] for row in codes], np.int32
    )


def packed(codes, zeros, scales, g_idx, values) -> dict[str, np.ndarray]:
    """The tensors of one module: codes [I, O], zeros and scales [g, O], the group of each input."""
    bits = values["bits"]
    if values["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        return {
            "qweight": words_along_output(codes, 4, order),
            "qzeros": words_along_output(zeros, 4, order),
            "scales": scales,
        }
    less = "gptq_v2" not in (values.get("checkpoint_format"), values.get("format"))
    return {
        "qweight": words_along_output(codes.T, bits).T.copy(),
        "qzeros": words_along_output((zeros - less) % (1 << bits), bits),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }


def checkpoint(values, *, fused=False, middle=False, shuffled=False, seed=0):
    """(config.json, its tensors, the same model's whole tensors in float32)."""
    random = np.random.default_rng(seed)
    base, bits = INTERNLM2 if fused else LLAMA, values["bits"]
    names = (
        {"attention.wqkv": (64, 32), "attention.wo": (32, 32)}
        | {"feed_forward.w1": (64, 32), "feed_forward.w3": (64, 32), "feed_forward.w2": (32, 64)}
        if fused
        else {f"self_attn.{n}_proj": (rows, 32) for n, rows in zip("qkvo", (32, 16, 16, 32), strict=True)}
        | {"mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64)}
    )
    embed, norms, head = (
        ("tok_embeddings", ("attention_norm", "ffn_norm"), "output")
        if fused
        else ("embed_tokens", ("input_layernorm", "post_attention_layernorm"), "lm_head")
    )
    plain = {f"model.{embed}.weight": (96, 32), "model.norm.weight": (32,), f"{head}.weight": (96, 32)}
    plain |= {f"model.layers.{layer}.{norm}.weight": (32,) for layer in range(2) for norm in norms}
    whole = {name: random.normal(1, 0.2, shape).astype(np.float16) for name, shape in plain.items()}
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in names.items()}
    if values.get("lm_head"):
        modules[head] = whole.pop(f"{head}.weight").shape
    left = values.get("modules_to_not_convert") or ()
    tensors = dict(whole)
    for name, (out, into) in modules.items():
        group = into if values["group_size"] == -1 else GROUP
        codes = random.integers(0, 1 << bits, (into, out))
        zeros = random.integers(0, 1 << bits, (into // group, out)) * (not middle) + middle * (1 << (bits - 1))
        scales = random.uniform(0.5, 1.5, zeros.shape).astype(np.float16) * np.float16(0.2 / (1 << bits))
        g_idx = np.arange(into) // group
        if shuffled:
            random.shuffle(g_idx)
        weight = (codes - zeros[g_idx]) * scales[g_idx].astype(np.float32)
        if any(part in name for part in left):
            whole[f"{name}.weight"] = tensors[f"{name}.weight"] = weight.T.astype(np.float16)
            continue
        whole[f"{name}.weight"] = weight.T.astype(np.float32)
        tensors |= {f"{name}.{part}": each for part, each in packed(codes, zeros, scales, g_idx, values).items()}
    return base | {"quantization_config": values}, tensors, whole


def restored(params):
    exact = lambda leaf: dequantize(dataclasses.replace(leaf, dtype="float32"))  # noqa: E731
    is_quantised = lambda leaf: isinstance(leaf, QuantArray)  # noqa: E731
    return jax.tree.map(lambda leaf: exact(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture
def open_both(make_folder):
    """Opens a case's checkpoint, and the same model whole."""

    def both(case):
        said, how = CASES[case]
        values, tensors, whole = checkpoint(said, **how)
        plain = {name: value for name, value in values.items() if name != "quantization_config"}
        return values, tensors, open_model(make_folder("packed", values, tensors)), make_folder("whole", plain, whole)

    return both


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_others_is_read_and_written_back(case, open_both):
    values, tensors, model, whole = open_both(case)
    assert_same(restored(model.params), open_model(whole).params)
    family = family_of(values)
    plans = plan_tensors(model.params, family, model.config, dtype=None, quantization=model.quantization)
    assert plans.keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = plans[name].fetch()
        assert plans[name].dtype == back.dtype == tensor.dtype and back.shape == tensor.shape, name
        assert back.tobytes() == tensor.tobytes(), name
    said = quantization_to_hf(model.quantization)
    assert read_quantization(json.loads(json.dumps({"quantization_config": said}))) == model.quantization


@pytest.mark.parametrize("case", ["awq, fused", "gptq, act order", "gptq, 8 bits"])
def test_a_quantised_model_computes_what_its_values_say(
    case, open_both, read_folder, make_folder, tmp_path, monkeypatch
):
    values, tensors, model, whole = open_both(case)
    np.testing.assert_allclose(logits(model, TOKENS), logits(open_model(whole), TOKENS), atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "HOST_STACK_BYTES", 0)  # as large tensors go: layer by layer, on the device
        assert_same(open_model(make_folder("shards", values, tensors, shard_size="2KB")).params, model.params)
    convert(tmp_path / "shards", tmp_path / "back", layout=values["model_type"])
    back = read_folder(tmp_path / "back")
    assert {name: back[name].tobytes() for name in back} == {name: tensors[name].tobytes() for name in tensors}
    assert check(tmp_path / "back").max_logit_difference == 0.0
    assert str(model.quantization) in (tmp_path / "back" / "README.md").read_text()


def test_on_a_mesh_words_are_cut_as_their_kernels_are(open_both, tmp_path, monkeypatch):
    _, _, model, _ = open_both("gptq, act order")
    try:
        mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2), devices=jax.devices()[:4])
        placed = open_model(tmp_path / "packed", mesh=mesh).params
        monkeypatch.setattr(loading, "HOST_STACK_BYTES", 0)
        streamed = open_model(tmp_path / "packed", mesh=mesh).params
    finally:
        sharding.make_mesh(devices=jax.devices()[:1])
    kernel = placed["layers"]["ffn"]["down"]["kernel"]
    assert kernel.values.sharding.spec == kernel.scales.sharding.spec == PartitionSpec(None, "tensor", "fsdp")
    assert kernel.order.sharding.is_fully_replicated
    for found in (placed, streamed):
        assert_same(jax.device_get(found), jax.device_get(model.params))
    same = lambda first, second: first.sharding.is_equivalent_to(second.sharding, first.ndim)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, placed, streamed)))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method 'fp8'; read are awq, gptq.*serve.quantize"),
        (AWQ | {"bits": 8}, "bits is 8, read is 4"),
        (AWQ | {"zero_point": False}, "zero_point is False, read is True"),
        (AWQ | {"version": "gemv"}, "version is 'gemv', read is 'gemm'"),
        (AWQ | {"backend": "llm-awq"}, "backend is 'llm-awq'"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (AWQ | {"group_size": 24}, "32 input features, which group_size 24 does not divide"),
        (AWQ | {"modules_to_not_convert": ["layers.1."]}, "whole in some layers and quantises it in others"),
        (GPTQ | {"bits": 3}, "bits is 3, read is 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, r"two formats, \['gptq', 'gptq_v2'\]"),
        (GPTQ | {"dynamic": {"-:down": {}}}, "dynamic is .*, read is {}"),
        (GPTQ | {"modules_in_block_to_quantize": [["mlp.w9"]]}, "names mlp.w9; known are self_attn.q_proj"),
        (GPTQ | {"sym": "yes"}, "sym is 'yes'; it must be true or false"),
        (GPTQ | {"pack_bits": 3}, r"pack_bits = 3 is not known here \(allow_unknown=\('quantization_config.pack_bits'"),
        ("awq", "it must be an object"),
    ],
)
def test_what_a_quantization_config_says_is_honoured_or_refused(said, message, make_folder):
    values, tensors, _ = checkpoint(AWQ)
    with pytest.raises(ValueError, match=message):
        open_model(make_folder("packed", values | {"quantization_config": said}, tensors))


def test_a_field_that_is_allowed_is_read_over():
    values = {"quantization_config": GPTQ | {"pack_bits": 3}}
    assert read_quantization(values, allow_unknown=["quantization_config.pack_bits"]).packing == "gptq"


def _spoilt(part, change):
    def spoil(tensors):
        name = f"model.layers.1.mlp.up_proj.{part}"
        return tensors | {name: change(tensors.get(name))}

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoilt("g_idx", lambda x: np.zeros_like(x)), "g_idx does not put 16 input features into each group"),
        (_spoilt("qzeros", lambda x: x + 1), "zeros other than 8, and config.json says sym: true"),
        (_spoilt("qweight", lambda x: x.astype(np.int64)), "holds I64 values; read are I32"),
        (_spoilt("qweight", lambda x: x[:2]), "wrong shape: model.layers.1.mlp.up_proj.qweight is"),
        (_spoilt("bias", lambda x: np.ones(64, np.float16)), "unexpected: model.layers.1.mlp.up_proj.bias"),
        (_spoilt("bias", lambda x: np.zeros(64, np.float16)), None),
    ],
    ids=["groups", "zeros", "type", "shape", "bias", "a bias of nothing"],
)
def test_tensors_that_are_not_what_they_should_be(spoil, message, make_folder):
    values, tensors, _ = checkpoint(GPTQ | {"sym": True}, middle=True)
    folder = make_folder("packed", values, spoil(tensors))
    if message is None:
        assert open_model(folder).quantization.symmetric
        return
    with pytest.raises(ValueError, match=message):
        open_model(folder)


def test_a_quantised_folder_is_not_quantised_again_and_a_plain_one_says_nothing(open_both):
    _, _, model, _ = open_both("awq")
    with pytest.raises(ValueError, match=r"already \(awq, 4 bits in groups of 16\); open it without"):
        open_model(model.source.folder, quantize="int8")
    assert read_quantization(LLAMA) is None


@pytest.mark.parametrize(
    ("how", "quantization", "message"),
    [
        ({"scheme": "int4", "head": False}, Quantization("awq", group=16), "scales that are not floats of 16 bits"),
        ({"scheme": "int4", "scale_dtype": "float16", "group": 8}, Quantization("awq", group=16), "has groups of 8"),
        ({"scheme": "int8", "scale_dtype": "float16"}, Quantization("awq", group=16), "is int8"),
        ({"scheme": "int4", "scale_dtype": "float16"}, Quantization("awq", group=16), "head.kernel is quantised"),
        (None, Quantization("awq", group=16), "layers.attention.query.kernel is not quantised"),
        (
            {"scheme": "int4", "scale_dtype": "float16", "head": False},
            Quantization("gptq", group=16, symmetric=True),
            "zeros of its own, and the folder would say sym: true",
        ),
    ],
    ids=["scales", "group", "scheme", "head", "whole", "zeros"],
)
def test_weights_that_a_packing_does_not_hold_are_refused(how, quantization, message, config, params, tmp_path):
    packed = params if how is None else jax.jit(lambda p: quantize_params(p, **({"group": 16} | how)))(params)
    how = {"quantization": quantization, "source_logits": np.zeros(1)}
    with pytest.raises(ValueError, match=message):
        save_model(tmp_path / "x", config=config, params=packed, tokenizer=None, **how)
    assert list(tmp_path.iterdir()) == []
