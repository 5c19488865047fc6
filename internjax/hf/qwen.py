"""Qwen's dense layouts in Hugging Face, with Llama's tensors: Qwen 1.5, 2 and 2.5 ("qwen2": query, key and value have
biases) and Qwen 3 ("qwen3": query and key heads are normalised instead).
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
    flag,
    given,
    head_fields,
    read_head,
    stock_heads,
    without,
)
from internjax.hf.llama import rows, stock_fields
from internjax.hf.mapping import Family
from internjax.model.config import ModelConfig

_HEADS_2, _HEADS_3 = stock_heads("Qwen2"), stock_heads("Qwen3")
# What the classes in transformers take where config.json is silent, and Llama's takes something else.
_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768}
_WINDOW = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_window(values: Mapping[str, Any], num_layers: int) -> int | None:
    """Returns the sliding window of all layers, None without one; raises ValueError where only some layers have it.

    use_sliding_window false turns the other fields off. Else layers from max_window_layers on have it (or those that
    layer_types names).
    """
    window = given(values, "sliding_window", 4096) if flag(values, "use_sliding_window", False) else None
    first = given(values, "max_window_layers", 28)
    default = [_SLIDING if window is not None and layer >= first else _FULL for layer in range(num_layers)]
    kinds = given(values, "layer_types", default)
    if len(kinds) != num_layers or set(kinds) - {_FULL, _SLIDING} or (window is None and _SLIDING in kinds):
        raise ValueError(
            f"config.json: layer_types {kinds} does not fit {num_layers} layers with use_sliding_window "
            f"{values.get('use_sliding_window')!r}; take the config.json that belongs to the weights"
        )
    num_sliding = kinds.count(_SLIDING)
    if num_sliding not in (0, num_layers):
        raise ValueError(
            f"config.json: {num_sliding} of {num_layers} layers have a sliding window (use_sliding_window, "
            f"max_window_layers, layer_types); it is supported in all layers or in none. For sequences of up to "
            f"sliding_window = {window} tokens it changes nothing: set use_sliding_window to false"
        )
    return window if num_sliding else None


def _window_fields(config: ModelConfig) -> dict[str, Any]:
    if config.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": config.window, "max_window_layers": 0}


def qwen2_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a config.json of Qwen 1.5, 2 or 2.5."""
    values = _DEFAULTS | dict(values)
    check_fields(values, honoured=DECODER_FIELDS | _WINDOW | {"head_dim"}, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _HEADS_2), head_dim=values.get("head_dim"))
    return dataclasses.replace(config, attention_bias="qkv", window=read_window(values, config.num_layers))


def qwen2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in the layout of Qwen 1.5, 2 and 2.5."""
    check_layout(config, {"window": (config.window,), "attention_bias": ("qkv",)}, layout="qwen2")
    check_square(config, layout="qwen2")
    head = head_fields(config, _HEADS_2, layout="qwen2")
    return {"model_type": "qwen2"} | head | without(stock_fields(config), {"head_dim"}) | _window_fields(config)


def qwen3_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a Qwen 3 config.json."""
    values = _DEFAULTS | {"head_dim": 128} | dict(values)
    honoured = DECODER_FIELDS | _WINDOW | {"head_dim", "attention_bias"}
    check_fields(values, honoured=honoured, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _HEADS_3), head_dim=values["head_dim"])
    return dataclasses.replace(
        config,
        qk_norm=True,
        attention_bias="all" if flag(values, "attention_bias", False) else "none",
        window=read_window(values, config.num_layers),
    )


def qwen3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in Qwen 3's layout."""
    allowed = {"window": (config.window,), "attention_bias": ("none", "all"), "qk_norm": (True,)}
    check_layout(config, allowed, layout="qwen3")
    head = head_fields(config, _HEADS_3, layout="qwen3")
    biased = {"attention_bias": config.attention_bias == "all"}
    return {"model_type": "qwen3"} | head | stock_fields(config) | biased | _window_fields(config)


QWEN2 = Family("qwen2", qwen2_from_hf, qwen2_to_hf, rows, head="lm_head.weight")
QWEN3 = Family("qwen3", qwen3_from_hf, qwen3_to_hf, rows, head="lm_head.weight")
