"""Mistral's layout in Hugging Face: Llama's tensors; each token may see the last `sliding_window` ones only."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from internjax.hf.fields import (
    DECODER_FIELDS,
    check_fields,
    check_layout,
    decoder_config,
    head_fields,
    read_head,
    stock_heads,
)
from internjax.hf.llama import rows, stock_fields
from internjax.hf.mapping import Family
from internjax.model.config import ModelConfig

_HEADS = stock_heads("Mistral")
# What the class in transformers takes where config.json is silent, and Llama's takes something else.
_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of a Mistral config.json."""
    values = _DEFAULTS | dict(values)
    check_fields(values, honoured=DECODER_FIELDS | {"head_dim", "sliding_window"}, allow_unknown=allow_unknown)
    config = decoder_config(values, head=read_head(values, _HEADS), head_dim=values.get("head_dim"))
    return dataclasses.replace(config, window=values["sliding_window"])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in Mistral's layout."""
    check_layout(config, {"window": (config.window,)}, layout="mistral")
    head = head_fields(config, _HEADS, layout="mistral")
    return {"model_type": "mistral"} | head | stock_fields(config) | {"sliding_window": config.window}


MISTRAL = Family("mistral", config_from_hf, config_to_hf, rows, head="lm_head.weight")
