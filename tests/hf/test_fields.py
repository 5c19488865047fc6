"""config.json: each field is honoured, known to have no effect, or refused by name."""

import pytest

from internjax.hf.families import family_of
from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.llama import LLAMA
from internjax.model.config import DynamicNTK, LinearScaling, Llama3Scaling, NoScaling, YarnScaling

# Llama as stock transformers 5 writes it, and the same in the spelling of version 4.
LLAMA_5 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"factor": 2.0, "rope_theta": 500.0, "rope_type": "dynamic"},
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 64,
}
LLAMA_4 = {name: value for name, value in LLAMA_5.items() if name not in ("rope_parameters", "dtype")} | {
    "rope_theta": 500.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
}
# The released config.json of InternLM2 7B with reduced sizes.
INTERNLM2_JSON = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "internlm2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.35.2",
    "use_cache": True,
    "vocab_size": 64,
}

# As published with Llama 3.2.
LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}

# As Qwen 2.5 and 3 say to add for long texts.
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def test_both_spellings_of_rotary_scaling_are_one():
    config = LLAMA.config_from_hf(LLAMA_5)
    assert config == LLAMA.config_from_hf(LLAMA_4)
    assert (config.rope_theta, config.rope_scaling, config.head_dim) == (500.0, DynamicNTK(2.0), 16)


def test_a_released_internlm2_config_is_read_as_it_is():
    config = INTERNLM2.config_from_hf(INTERNLM2_JSON)
    assert (config.d_model, config.head_dim, config.num_kv_heads, config.norm_eps) == (32, 8, 2, 1e-5)
    assert (config.rope_theta, config.rope_scaling, config.tie_embeddings) == (1e6, DynamicNTK(2.0), False)


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [
        (None, NoScaling()),
        ({"rope_type": "default"}, NoScaling()),
        ({"type": "linear", "factor": 4}, LinearScaling(4.0)),
        ({"rope_type": "dynamic", "type": "dynamic", "factor": 3.0}, DynamicNTK(3.0)),
        (LLAMA3_SCALING, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        (YARN, YarnScaling(4.0, 32768)),
        (YARN | {"beta_fast": 16, "attention_factor": 1}, YarnScaling(4.0, 32768, 16.0, 1.0, 1.0)),
    ],
)
def test_scalings(scaling, wanted):
    assert LLAMA.config_from_hf(LLAMA_4 | {"rope_scaling": scaling}).rope_scaling == wanted


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "'llama3' has no low_freq_factor, high_freq_factor, original_max"),
        ({"type": "longrope", "factor": 8.0}, "'longrope'; supported are default, linear, dynamic, llama3, yarn"),
        ({"type": "yarn", "factor": 8.0}, "no original_max_position_embeddings"),
        (YARN | {"mscale": 0.7}, "mscale"),
        (YARN | {"beta_slow": 64}, "beta_slow < beta_fast"),
        ({"type": "linear"}, "no factor"),
        ({"type": "dynamic", "factor": 0.5}, ">= 1.0"),
        ({"type": "dynamic", "rope_type": "linear", "factor": 2.0}, "two rotary scalings"),
        ({"type": "dynamic", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_scalings_that_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        LLAMA.config_from_hf(LLAMA_4 | {"rope_scaling": scaling})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("partial_rotary_factor", 0.5),
        ("sliding_window", 4096),
        ("quantization_config", {"quant_method": "awq"}),
        ("use_sliding_window", True),
        ("logit_scale", 0.5),
    ],
)
def test_a_field_that_changes_the_computation_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}.*allow_unknown=\\('{field}',\\)"):
        LLAMA.config_from_hf(LLAMA_4 | {field: value})
    LLAMA.config_from_hf(LLAMA_4 | {field: value}, allow_unknown=[field])
    with pytest.raises(ValueError, match="rope_theta is known and honoured here, so it cannot be read as if it were"):
        LLAMA.config_from_hf(LLAMA_4 | {field: value}, allow_unknown=[field, "rope_theta"])


@pytest.mark.parametrize(
    "fields", [{"some_new_feature": None}, {"some_new_feature": False}, {"temperature": 0.7}, {"sliding_window": None}]
)
def test_absent_features_and_bookkeeping_pass(fields):
    assert LLAMA.config_from_hf(LLAMA_4 | fields) == LLAMA.config_from_hf(LLAMA_4)


def test_internlm2_has_biases_unless_it_says_otherwise():
    for values in ({**INTERNLM2_JSON, "bias": True}, {k: v for k, v in INTERNLM2_JSON.items() if k != "bias"}):
        assert INTERNLM2.config_from_hf(values).attention_bias == "all"
    assert INTERNLM2.config_from_hf(INTERNLM2_JSON).attention_bias == "none"


def test_biases_of_llama():
    config = LLAMA.config_from_hf(LLAMA_4 | {"attention_bias": True, "mlp_bias": True})
    assert (config.attention_bias, config.ffn_bias) == ("all", True)
    with pytest.raises(ValueError, match="attention_bias is 'no'; it must be true or false"):
        LLAMA.config_from_hf(LLAMA_4 | {"attention_bias": "no"})


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu'.*logit_scale = 2.*\('hidden_act', 'logit_scale',\)"):
        LLAMA.config_from_hf(LLAMA_4 | {"hidden_act": "gelu", "logit_scale": 2})


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_sizes_are_needed_and_are_whole_numbers(name):
    with pytest.raises(ValueError, match=f"has no {name}"):
        LLAMA.config_from_hf({key: value for key, value in LLAMA_4.items() if key != name})
    with pytest.raises(ValueError, match=f"{name} is '12'"):
        LLAMA.config_from_hf(LLAMA_4 | {name: "12"})


def test_what_a_llama_config_leaves_out_has_the_class_default():
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = LLAMA.config_from_hf({name: LLAMA_4[name] for name in needed})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (4, 8, 1e-6, 10_000.0)
    assert (config.max_position_embeddings, config.tie_embeddings) == (2048, False)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"model_type": "internlm2"}, "internlm2"),
        ({"model_type": "internlm", "architectures": ["InternLM2ForCausalLM"]}, "internlm2"),
        ({"model_type": "internlm", "architectures": ["InternLMForCausalLM"]}, "internlm"),
    ],
)
def test_families(values, name):
    assert family_of(values).name == name


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (None, "supported are llama, mistral"),
        ("gpt_neox", "supported are llama, mistral"),
        ("qwen", "Qwen 1 .* take Qwen 1.5"),
        ("qwen2_moe", "several experts"),
        ("qwen3_moe", "several experts"),
        ("mixtral", "several experts"),
        ("glm4", "two more norms per layer"),
    ],
)
def test_families_that_are_refused(kind, reason):
    with pytest.raises(ValueError, match=reason):
        family_of({} if kind is None else {"model_type": kind})


@pytest.mark.parametrize("family", [LLAMA, INTERNLM2], ids=["llama", "internlm2"])
def test_other_heads_are_refused(family):
    values = LLAMA_4 if family is LLAMA else INTERNLM2_JSON
    with pytest.raises(ValueError, match="'LlamaForTokenClassification'"):
        family.config_from_hf(values | {"architectures": ["LlamaForTokenClassification"]})


def test_a_classifier_of_several_labels_is_no_scalar_head():
    values = LLAMA_4 | {"architectures": ["LlamaForSequenceClassification"]}
    assert LLAMA.config_from_hf(values | {"id2label": {"0": "LABEL_0"}}).head == "scalar"
    with pytest.raises(ValueError, match="2 labels"):
        LLAMA.config_from_hf(values)
