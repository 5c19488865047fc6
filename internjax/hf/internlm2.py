"""InternLM2's layout in Hugging Face: query, key and value of each key/value group fused in one matrix `wqkv`.

G key/value groups, n query heads per group, H head dim. The rows of wqkv are group-major; a group has its n query
heads, then its key head, then its value head: [G, n + 2, H].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from internjax.hf.fields import (
    DECODER_FIELDS,
    check_fields,
    check_layout,
    check_square,
    decoder_config,
    decoder_fields,
    flag,
    head_fields,
    read_head,
)
from internjax.hf.mapping import Family, Row, linear_rows
from internjax.model.config import Llama3Scaling, ModelConfig, YarnScaling

_HEADS = {"InternLM2ForCausalLM": "lm", "InternLM2ForRewardModel": "scalar"}


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of an InternLM2 or InternLM2.5 config.json (early ones say model_type "internlm")."""
    check_fields(values, honoured=DECODER_FIELDS | {"bias", "reward_token_id"}, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _HEADS))
    # The published configuration class has biases unless its config.json says otherwise.
    return dataclasses.replace(config, attention_bias="all" if flag(values, "bias", True) else "none")


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in InternLM2's layout."""
    check_layout(config, {"attention_bias": ("none", "all")}, layout="internlm2")
    check_square(config, layout="internlm2")
    if isinstance(config.rope_scaling, Llama3Scaling | YarnScaling):
        raise ValueError(f"layout 'internlm2' has no place for {config.rope_scaling}; use layout='llama'")
    values = {"model_type": "internlm2", "bias": config.attention_bias == "all"}
    return values | head_fields(config, _HEADS, layout="internlm2") | decoder_fields(config)


def split_wqkv(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    """Returns the fused rows `[(N + 2 G) H, ...]` as query, key and value rows; heads keep their order."""
    groups, dim = config.num_kv_heads, config.head_dim
    grouped = rows.reshape(groups, config.num_heads // groups + 2, dim, *rows.shape[1:])
    return [part.reshape(-1, *rows.shape[1:]) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]


def fuse_wqkv(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Returns query, key and value rows as one fused matrix: the inverse of `split_wqkv`."""
    groups, dim = config.num_kv_heads, config.head_dim
    grouped = [part.reshape(groups, -1, dim, *part.shape[1:]) for part in parts]
    return np.concatenate(grouped, axis=1).reshape(-1, *parts[0].shape[1:])


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Returns the table of InternLM2's tensors."""
    layer, attention, ffn = "model.layers.{layer}", "layers.attention", "layers.ffn"
    fused = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))
    head = "output.weight" if config.head == "lm" else "v_head.weight"
    return (
        Row("model.tok_embeddings.weight", ("embed.embedding",)),
        Row(f"{layer}.attention_norm.weight", ("layers.attention_norm.scale",)),
        *linear_rows(f"{layer}.attention.wqkv", fused, config, split=split_wqkv, fuse=fuse_wqkv),
        *linear_rows(f"{layer}.attention.wo", (f"{attention}.output",), config),
        Row(f"{layer}.ffn_norm.weight", ("layers.ffn_norm.scale",)),
        *linear_rows(f"{layer}.feed_forward.w1", (f"{ffn}.gate",), config),
        *linear_rows(f"{layer}.feed_forward.w3", (f"{ffn}.up",), config),
        *linear_rows(f"{layer}.feed_forward.w2", (f"{ffn}.down",), config),
        Row("model.norm.weight", ("norm.scale",)),
    ) + (() if config.tie_embeddings else (Row(head, ("head.kernel",)),))


INTERNLM2 = Family("internlm2", config_from_hf, config_to_hf, rows, head="output.weight")
