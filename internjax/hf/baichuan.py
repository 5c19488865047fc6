"""Baichuan 2's layout in Hugging Face: query, key and value in one matrix W_pack, and an output head whose rows are
normalised in the forward pass. 7B has rotary positions, 13B linear biases (ALiBi).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from internjax.hf.fields import (
    DECODER_FIELDS,
    check_fields,
    check_layout,
    check_square,
    decoder_config,
    decoder_fields,
    given,
    head_fields,
    read_head,
    without,
)
from internjax.hf.mapping import Family, Row, fuse_rows, linear_rows, split_rows
from internjax.model.config import ModelConfig, NoScaling

_HEADS = {"BaichuanForCausalLM": "lm"}
_NO_FIELD = frozenset({"num_key_value_heads", "rope_parameters", "rope_scaling", "rope_theta"})
_PUBLISHED = {4096: "rotary", 5120: "alibi"}
_BAICHUAN_1_VOCABULARY = 64000


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a Baichuan 2 config.json.

    7B and 13B have one model_type and one architecture; their config classes differ in max_position_embeddings, which
    only the one with rotary positions has.
    """
    if (
        "BaiChuanForCausalLM" in given(values, "architectures", [])
        or values.get("vocab_size") == _BAICHUAN_1_VOCABULARY
    ):
        raise ValueError(
            "config.json is of Baichuan 1 (architecture BaiChuanForCausalLM, or a vocabulary of "
            f"{_BAICHUAN_1_VOCABULARY}), whose head is not normalised; supported is Baichuan 2"
        )
    check_fields(
        values,
        honoured=(DECODER_FIELDS - _NO_FIELD) | {"model_max_length"},
        # Of training alone: memory, and a term of the loss that Baichuan's own code adds.
        fixed={"z_loss_weight": 0},
        ignored={"gradient_checkpointing", "_from_model_config"},
        allow_unknown=allow_unknown,
    )
    longest = given(values, "max_position_embeddings", None), given(values, "model_max_length", None)
    positions = "rotary" if longest[0] is not None else "alibi"
    if longest == (None, None) or _PUBLISHED.get(values.get("hidden_size"), positions) != positions:
        raise ValueError(
            f"config.json has max_position_embeddings {longest[0]} and model_max_length {longest[1]} at hidden_size "
            f"{values.get('hidden_size')}: the 7B has both or the first, the 13B (ALiBi) the second alone. Take the "
            "config.json that belongs to the weights"
        )
    values = without(values, _NO_FIELD) | {"max_position_embeddings": next(n for n in longest if n is not None)}
    config = decoder_config(values, head=read_head(values, _HEADS))
    return dataclasses.replace(config, norm_head=True, positions=positions)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in Baichuan 2's layout."""
    check_layout(config, {"norm_head": (True,), "positions": ("rotary", "alibi")}, layout="baichuan")
    check_square(config, layout="baichuan", grouped=False)
    theta = config.rope_theta if config.positions == "rotary" else 10_000.0
    if config.rope_scaling != NoScaling() or theta != 10_000.0:
        raise ValueError(f"layout 'baichuan' has the rotary base 10000, this model {theta:g} and {config.rope_scaling}")
    values = without(decoder_fields(config), _NO_FIELD) | {"model_max_length": config.max_position_embeddings}
    if config.positions == "alibi":
        del values["max_position_embeddings"]
    return {"model_type": "baichuan"} | head_fields(config, _HEADS, layout="baichuan") | values


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of Baichuan 2's tensors."""
    layer, attention, ffn = "model.layers.{layer}", "layers.attention", "layers.ffn"
    packed = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))
    return (
        Row("model.embed_tokens.weight", ("embed.embedding",)),
        Row(f"{layer}.input_layernorm.weight", ("layers.attention_norm.scale",)),
        *linear_rows(f"{layer}.self_attn.W_pack", packed, config, split=_split, fuse=fuse_rows),
        *linear_rows(f"{layer}.self_attn.o_proj", (f"{attention}.output",), config),
        Row(f"{layer}.post_attention_layernorm.weight", ("layers.ffn_norm.scale",)),
        *linear_rows(f"{layer}.mlp.gate_proj", (f"{ffn}.gate",), config),
        *linear_rows(f"{layer}.mlp.up_proj", (f"{ffn}.up",), config),
        *linear_rows(f"{layer}.mlp.down_proj", (f"{ffn}.down",), config),
        Row("model.norm.weight", ("norm.scale",)),
        Row("lm_head.weight", ("head.kernel",)),
    )


def _split(rows, config: ModelConfig):
    return split_rows(rows, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim)


BAICHUAN = Family("baichuan", config_from_hf, config_to_hf, rows, head="lm_head.weight", norm_head=True)
