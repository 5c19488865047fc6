"""InternLM2's layout in Hugging Face: query, key and value of each key/value group fused in one matrix `wqkv`.

G key/value groups, n query heads per group, H head dim. The rows of wqkv are group-major; a group has its n query
heads, then its key head, then its value head: [G, n + 2, H].
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from internjax.hf.fields import DECODER_FIELDS, check_fields, decoder_config, decoder_fields, given
from internjax.hf.mapping import Family, Row
from internjax.model.config import ModelConfig

_HEADS = {"InternLM2ForCausalLM": "lm", "InternLM2ForRewardModel": "scalar"}


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of an InternLM2 config.json (its early ones say model_type "internlm")."""
    # The published configuration class has biases unless its config.json says otherwise.
    values = {"bias": True} | dict(values)
    check_fields(values, honoured=DECODER_FIELDS | {"reward_token_id"}, allow_unknown=allow_unknown)
    architecture = given(values, "architectures", ["InternLM2ForCausalLM"])[0]
    if architecture not in _HEADS:
        raise ValueError(f"config.json names the architecture {architecture!r}; supported are {', '.join(_HEADS)}")
    return decoder_config(values, head=_HEADS[architecture])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in InternLM2's layout."""
    if config.head_dim * config.num_heads != config.d_model:
        raise ValueError(
            f"InternLM2's layout has no field for head_dim: it is d_model / num_heads = "
            f"{config.d_model / config.num_heads:g}, this model has {config.head_dim}. Use layout='llama'"
        )
    architecture = next(name for name, head in _HEADS.items() if head == config.head)
    return {"architectures": [architecture], "model_type": "internlm2", "bias": False} | decoder_fields(config)


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
    fused = tuple(f"{attention}.{name}.kernel" for name in ("query", "key", "value"))
    head = "output.weight" if config.head == "lm" else "v_head.weight"
    return (
        Row("model.tok_embeddings.weight", ("embed.embedding",)),
        Row(f"{layer}.attention_norm.weight", ("layers.attention_norm.scale",)),
        Row(f"{layer}.attention.wqkv.weight", fused, split_wqkv, fuse_wqkv),
        Row(f"{layer}.attention.wo.weight", (f"{attention}.output.kernel",)),
        Row(f"{layer}.ffn_norm.weight", ("layers.ffn_norm.scale",)),
        Row(f"{layer}.feed_forward.w1.weight", (f"{ffn}.gate.kernel",)),
        Row(f"{layer}.feed_forward.w3.weight", (f"{ffn}.up.kernel",)),
        Row(f"{layer}.feed_forward.w2.weight", (f"{ffn}.down.kernel",)),
        Row("model.norm.weight", ("norm.scale",)),
    ) + (() if config.tie_embeddings else (Row(head, ("head.kernel",)),))


INTERNLM2 = Family("internlm2", config_from_hf, config_to_hf, rows, head="output.weight")
