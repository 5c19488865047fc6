"""Llama's layout in Hugging Face: what stock transformers, vLLM and others load without remote code."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from internjax.hf.fields import (
    DECODER_FIELDS,
    check_fields,
    check_layout,
    decoder_config,
    decoder_fields,
    flag,
    head_fields,
    read_head,
    stock_heads,
)
from internjax.hf.mapping import Family, Row, linear_rows
from internjax.model.config import ModelConfig

_HEADS = stock_heads("Llama")


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a Llama config.json."""
    honoured = DECODER_FIELDS | {"head_dim", "attention_bias", "mlp_bias"}
    check_fields(values, honoured=honoured, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _HEADS), head_dim=values.get("head_dim"))
    return dataclasses.replace(
        config,
        attention_bias="all" if flag(values, "attention_bias", False) else "none",
        ffn_bias=flag(values, "mlp_bias", False),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in Llama's layout."""
    check_layout(config, {"attention_bias": ("none", "all"), "ffn_bias": (False, True)}, layout="llama")
    return (
        {"model_type": "llama"}
        | head_fields(config, _HEADS, layout="llama")
        | stock_fields(config)
        | {"attention_bias": config.attention_bias == "all", "mlp_bias": config.ffn_bias}
    )


def stock_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json fields that Llama shares with its relatives in stock transformers."""
    values = decoder_fields(config) | {"head_dim": config.head_dim, "attention_dropout": 0.0}
    scaling = values["rope_scaling"]
    if scaling is not None:  # transformers before 4.43 read "type", later ones "rope_type"
        values["rope_scaling"] = scaling | {"rope_type": scaling["type"]}
    return values


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of Llama's tensors, with the biases and head norms of its relatives."""
    layer, attention, ffn = "model.layers.{layer}", "layers.attention", "layers.ffn"
    head = "lm_head.weight" if config.head == "lm" else "score.weight"
    table = (
        Row("model.embed_tokens.weight", ("embed.embedding",)),
        Row(f"{layer}.input_layernorm.weight", ("layers.attention_norm.scale",)),
        *linear_rows(f"{layer}.self_attn.q_proj", (f"{attention}.query",), config),
        *linear_rows(f"{layer}.self_attn.k_proj", (f"{attention}.key",), config),
        *linear_rows(f"{layer}.self_attn.v_proj", (f"{attention}.value",), config),
        *linear_rows(f"{layer}.self_attn.o_proj", (f"{attention}.output",), config),
        Row(f"{layer}.post_attention_layernorm.weight", ("layers.ffn_norm.scale",)),
        *linear_rows(f"{layer}.mlp.gate_proj", (f"{ffn}.gate",), config),
        *linear_rows(f"{layer}.mlp.up_proj", (f"{ffn}.up",), config),
        *linear_rows(f"{layer}.mlp.down_proj", (f"{ffn}.down",), config),
        Row("model.norm.weight", ("norm.scale",)),
    )
    if config.qk_norm:
        table += (
            Row(f"{layer}.self_attn.q_norm.weight", (f"{attention}.query_norm.scale",)),
            Row(f"{layer}.self_attn.k_norm.weight", (f"{attention}.key_norm.scale",)),
        )
    return table + (() if config.tie_embeddings else (Row(head, ("head.kernel",)),))


LLAMA = Family("llama", config_from_hf, config_to_hf, rows, head="lm_head.weight")
