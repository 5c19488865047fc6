"""ChatGLM3's and GLM-4's layouts in Hugging Face: "chatglm" (their own code) and "glm" (stock transformers).

Both turn the first half of every head, and pair neighbouring dimensions: (0, 1), (2, 3) ... The tree pairs dimension j
with j + H / 2 and keeps still the pairs whose frequency is 0, so query and key rows of each head are reordered while
they are read: even ones first, odd ones after them. Nothing else changes, and writing undoes it.

H head dim.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from internjax.hf.fields import (
    DECODER_FIELDS,
    check_fields,
    check_layout,
    decoder_config,
    decoder_fields,
    flag,
    given,
    head_fields,
    read_head,
    required,
    stock_heads,
    without,
)
from internjax.hf.llama import stock_fields
from internjax.hf.mapping import Family, Row, fuse_rows, linear_rows, split_rows
from internjax.model.config import ModelConfig, NoScaling

_THETA = 10_000.0
_CHAT_HEADS = {"ChatGLMModel": "lm", "ChatGLMForConditionalGeneration": "lm"}
_GLM_HEADS = stock_heads("Glm")
# ChatGLM's names of what other families call otherwise.
_NAMES = {
    "padded_vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "initializer_range": "initializer_range",
}
_CHAT_HONOURED = set(_NAMES) | {
    "add_bias_linear",
    "add_qkv_bias",
    "kv_channels",
    "multi_query_attention",
    "multi_query_group_num",
    "rope_ratio",
}
# Other values compute something else. Absent means these, which are also those of the class.
_CHAT_FIXED = {
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "post_layer_norm": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "rmsnorm": True,
    "tie_word_embeddings": False,
}
# How the original code computes, not what: scores are divided before the product and multiplied after it, and so on.
_CHAT_IGNORED = {
    "apply_query_key_layer_scaling",
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "classifier_dropout",
    "original_rope",
    "vocab_size",
}


def chatglm_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a ChatGLM3 or GLM-4 config.json (ChatGLM2's without rope_ratio is the same model)."""
    ratio = given(values, "rope_ratio", 1)
    name = str(values.get("_name_or_path", "")).lower()
    if "position_encoding_2d" in values or "max_sequence_length" in values:
        raise ValueError(
            "config.json is of the first ChatGLM (two-dimensional positions, attention to the whole prompt); supported "
            "are ChatGLM3 and GLM-4"
        )
    if "chatglm2" in name and ratio != 1:
        raise ValueError(
            f"config.json is of ChatGLM2 ({name}) with rope_ratio {ratio}: there it divides positions, and the "
            "rotary base is multiplied by it in ChatGLM3; supported are ChatGLM3, GLM-4 and ChatGLM2 without rope_ratio"
        )
    fixed = _CHAT_FIXED | {"num_hidden_layers": values.get("num_layers")}  # later releases repeat it under this name
    check_fields(values, honoured=_CHAT_HONOURED, fixed=fixed, ignored=_CHAT_IGNORED, allow_unknown=allow_unknown)
    required(values, "padded_vocab_size", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
    shared = {_NAMES[name]: value for name, value in values.items() if name in _NAMES}
    if flag(values, "multi_query_attention", False):
        shared["num_key_value_heads"] = given(values, "multi_query_group_num", 1)
    shared |= {"rms_norm_eps": given(values, "layernorm_epsilon", 1e-5), "rope_theta": _THETA * ratio}
    config = decoder_config(shared, head=read_head(values, _CHAT_HEADS), head_dim=given(values, "kv_channels", 128))
    biased = flag(values, "add_bias_linear", False)
    return dataclasses.replace(
        config,
        rotary_dim=_rotary_dim(config.head_dim, 0.5),
        attention_bias="all" if biased else "qkv" if flag(values, "add_qkv_bias", False) else "none",
        ffn_bias=biased,
    )


def chatglm_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in the layout of ChatGLM3's and GLM-4's own code."""
    biases = {"attention_bias": ("all",) if config.ffn_bias else ("none", "qkv"), "ffn_bias": (False, True)}
    check_layout(config, biases | {"rotary_dim": (config.head_dim // 2,)}, layout="chatglm")
    if config.rope_scaling != NoScaling() or config.tie_embeddings:
        raise ValueError(
            f"layout 'chatglm' has no rotary scaling and no tied embeddings; this model has {config.rope_scaling} and "
            f"tie_embeddings={config.tie_embeddings}. Use layout='glm'"
        )
    ratio = config.rope_theta / _THETA
    shared = decoder_fields(config)
    head = head_fields(config, {"ChatGLMForConditionalGeneration": "lm"}, layout="chatglm")
    return (
        {"model_type": "chatglm"}
        | head
        | {name: shared[ours] for name, ours in _NAMES.items()}
        | {"vocab_size": config.vocab_size, "kv_channels": config.head_dim}
        | {"multi_query_attention": True, "multi_query_group_num": config.num_kv_heads}
        | {"rope_ratio": int(ratio) if ratio.is_integer() else ratio, "original_rope": True}
        | {"add_qkv_bias": config.attention_bias != "none", "add_bias_linear": config.ffn_bias}
        | {"attention_dropout": 0.0, "use_cache": True}
        | _CHAT_FIXED
    )


def glm_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a GLM-4-9B config.json of stock transformers (model_type "glm")."""
    # What the class takes where config.json is silent, and Llama's takes something else.
    defaults = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "max_position_embeddings": 131072}
    values = defaults | dict(values)
    partial = given(values, "partial_rotary_factor", 0.5)
    for name in ("rope_parameters", "rope_scaling"):
        inner = dict(given(values, name, {}))
        partial = given(inner, "partial_rotary_factor", partial)
        values[name] = without(inner, {"partial_rotary_factor"})
    honoured = DECODER_FIELDS | {"head_dim", "attention_bias", "partial_rotary_factor"}
    check_fields(values, honoured=honoured, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _GLM_HEADS), head_dim=values["head_dim"])
    biased = flag(values, "attention_bias", True)
    return dataclasses.replace(
        config,
        rotary_dim=_rotary_dim(config.head_dim, partial),
        attention_bias="qkv" if biased else "none",
    )


def glm_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in the layout of GLM-4-9B in stock transformers."""
    allowed = {"rotary_dim": (config.rotary_dim,), "attention_bias": ("none", "qkv")}
    check_layout(config, allowed, layout="glm")
    return (
        {"model_type": "glm"}
        | head_fields(config, _GLM_HEADS, layout="glm")
        | stock_fields(config)
        | {"attention_bias": config.attention_bias == "qkv"}
        | {"partial_rotary_factor": (config.rotary_dim or config.head_dim) / config.head_dim}
        | {"pad_token_id": None}  # absent means one of the released vocabulary, which a smaller table does not have
    )


def _rotary_dim(head_dim: int, partial: float) -> int | None:
    rotary_dim = int(head_dim * partial)
    return None if rotary_dim == head_dim else rotary_dim


def even_first(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns the rows of heads with the even ones of each head before the odd ones."""
    pairs = rows.reshape(-1, config.head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def neighbours(rows: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Returns the rows of heads with the two of each pair side by side: the inverse of `even_first`."""
    pairs = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _split_qkv(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    query, key, value = split_rows(rows, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)
    return [even_first(query, config), even_first(key, config), value]


def _fuse_qkv(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    query, key, value = parts
    return np.concatenate([neighbours(query, config), neighbours(key, config), value])


def _split_halves(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    del config
    return np.split(rows, 2)


def _split_heads(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    return [even_first(rows, config)]


def _fuse_heads(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    return neighbours(parts[0], config)


def chatglm_rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of the tensors of ChatGLM3's and GLM-4's own code."""
    layer, attention, ffn = "transformer.encoder.layers.{layer}", "layers.attention", "layers.ffn"
    fused = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))
    gated = (f"{ffn}.gate", f"{ffn}.up")
    return (
        Row("transformer.embedding.word_embeddings.weight", ("embed.embedding",)),
        Row(f"{layer}.input_layernorm.weight", ("layers.attention_norm.scale",)),
        *linear_rows(f"{layer}.self_attention.query_key_value", fused, config, split=_split_qkv, fuse=_fuse_qkv),
        *linear_rows(f"{layer}.self_attention.dense", (f"{attention}.output",), config),
        Row(f"{layer}.post_attention_layernorm.weight", ("layers.ffn_norm.scale",)),
        *linear_rows(f"{layer}.mlp.dense_h_to_4h", gated, config, split=_split_halves, fuse=fuse_rows),
        *linear_rows(f"{layer}.mlp.dense_4h_to_h", (f"{ffn}.down",), config),
        Row("transformer.encoder.final_layernorm.weight", ("norm.scale",)),
        Row("transformer.output_layer.weight", ("head.kernel",)),
    )


def glm_rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of GLM-4-9B's tensors in stock transformers."""
    layer, attention, ffn = "model.layers.{layer}", "layers.attention", "layers.ffn"
    head = "lm_head.weight" if config.head == "lm" else "score.weight"
    turned = {"split": _split_heads, "fuse": _fuse_heads}
    gated = (f"{ffn}.gate", f"{ffn}.up")
    return (
        Row("model.embed_tokens.weight", ("embed.embedding",)),
        Row(f"{layer}.input_layernorm.weight", ("layers.attention_norm.scale",)),
        *linear_rows(f"{layer}.self_attn.q_proj", (f"{attention}.query",), config, **turned),
        *linear_rows(f"{layer}.self_attn.k_proj", (f"{attention}.key",), config, **turned),
        *linear_rows(f"{layer}.self_attn.v_proj", (f"{attention}.value",), config),
        *linear_rows(f"{layer}.self_attn.o_proj", (f"{attention}.output",), config),
        Row(f"{layer}.post_attention_layernorm.weight", ("layers.ffn_norm.scale",)),
        *linear_rows(f"{layer}.mlp.gate_up_proj", gated, config, split=_split_halves, fuse=fuse_rows),
        *linear_rows(f"{layer}.mlp.down_proj", (f"{ffn}.down",), config),
        Row("model.norm.weight", ("norm.scale",)),
    ) + (() if config.tie_embeddings else (Row(head, ("head.kernel",)),))


CHATGLM = Family("chatglm", chatglm_from_hf, chatglm_to_hf, chatglm_rows, head="transformer.output_layer.weight")
GLM = Family("glm", glm_from_hf, glm_to_hf, glm_rows, head="lm_head.weight")
