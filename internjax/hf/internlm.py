"""InternLM's first layout in Hugging Face: Llama's tensors, and biases on all four projections of attention."""

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
    flag,
    given,
    head_fields,
    read_head,
    without,
)
from internjax.hf.llama import rows
from internjax.hf.mapping import Family
from internjax.model.config import DynamicNTK, ModelConfig, NoScaling

_HEADS = {"InternLMForCausalLM": "lm"}
_NO_FIELD = frozenset({"num_key_value_heads", "rope_parameters", "rope_scaling", "rope_theta"})


def config_from_hf(values: Mapping[str, Any], *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the ModelConfig of an InternLM config.json.

    `rotary` is {"base", "type": "origin" | "dynamic", "scaling_factor"}: dynamic NTK of factor 1 is what was released.
    """
    check_fields(values, honoured=(DECODER_FIELDS - _NO_FIELD) | {"bias", "rotary"}, allow_unknown=allow_unknown)
    rotary = {"base": 10_000, "type": "dynamic"} | dict(given(values, "rotary", {}))
    unknown = sorted(set(rotary) - {"base", "type", "scaling_factor"})
    if unknown or rotary["type"] not in ("origin", "dynamic"):
        raise ValueError(
            f"config.json: rotary is {rotary}; supported are base, scaling_factor and the types 'origin' and 'dynamic'"
        )
    config = decoder_config(without(values, _NO_FIELD), head=read_head(values, _HEADS))
    dynamic = DynamicNTK(float(given(rotary, "scaling_factor", 1.0)))
    return dataclasses.replace(
        config,
        attention_bias="all" if flag(values, "bias", True) else "none",
        rope_theta=float(rotary["base"]),
        rope_scaling=dynamic if rotary["type"] == "dynamic" else NoScaling(),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model in InternLM's first layout."""
    check_layout(config, {"attention_bias": ("none", "all")}, layout="internlm")
    check_square(config, layout="internlm", grouped=False)
    match config.rope_scaling:
        case NoScaling():
            rotary = {"base": config.rope_theta, "type": "origin"}
        case DynamicNTK(factor=factor):
            rotary = {"base": config.rope_theta, "type": "dynamic", "scaling_factor": factor}
        case other:
            raise ValueError(f"layout 'internlm' has no place for {other}; use layout='llama'")
    values = {"model_type": "internlm", "bias": config.attention_bias == "all", "rotary": rotary}
    return values | head_fields(config, _HEADS, layout="internlm") | without(decoder_fields(config), _NO_FIELD)


INTERNLM = Family("internlm", config_from_hf, config_to_hf, rows, head="lm_head.weight")
