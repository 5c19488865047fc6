"""Which family a config.json belongs to, and which layouts hold a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from internjax.hf.baichuan import BAICHUAN
from internjax.hf.chatglm import CHATGLM, GLM
from internjax.hf.internlm import INTERNLM
from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.llama import LLAMA
from internjax.hf.mapping import Family
from internjax.hf.mistral import MISTRAL
from internjax.hf.qwen import QWEN2, QWEN3
from internjax.model.config import ModelConfig

# Order-dependent: where several layouts hold a model, the first is the one it is written in. Those that stock
# transformers loads without remote code come first.
Layout = Literal["llama", "mistral", "qwen2", "qwen3", "glm", "internlm2", "internlm", "baichuan", "chatglm"]

_FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GLM, INTERNLM2, INTERNLM, BAICHUAN, CHATGLM)
}

_REFUSED = {
    "qwen": "Qwen 1 scales scores with the logarithm of the length and changes its rotary base with it; take Qwen 1.5 "
    "or later",
    "internlm3": "InternLM 3 is not built here; take InternLM2.5",
    "glm4": "GLM-4-0414 has two more norms per layer; take GLM-4-9B (model_type glm or chatglm)",
    "mixtral": "Layers of several experts are not built here; take a dense model",
    "qwen2_moe": "Layers of several experts are not built here; take a dense model",
    "qwen3_moe": "Layers of several experts are not built here; take a dense model",
    "glm4_moe": "Layers of several experts are not built here; take a dense model",
    "qwen3_next": "linear attention is not built here; take Qwen 3",
}


def family_of(values: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json; raises ValueError naming what is supported, with the reason where known."""
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if kind == "internlm" and any(name.startswith("InternLM2") for name in architectures):
        return INTERNLM2  # its early releases
    if kind in _FAMILIES:
        return _FAMILIES[kind]
    what = f"model_type {kind!r}" + (f" ({', '.join(architectures)})" if architectures else "")
    reason = f". {_REFUSED[kind]}" if kind in _REFUSED else ""
    raise ValueError(f"config.json has {what}; supported are {', '.join(_FAMILIES)}{reason}")


def layout_family(layout: Layout) -> Family:
    """Returns the family that a checkpoint is written in."""
    if layout not in _FAMILIES:
        raise ValueError(f"layout is {layout!r}; give one of {', '.join(map(repr, get_args(Layout)))}")
    return _FAMILIES[layout]


def fitting_layout(config: ModelConfig) -> Layout:
    """Returns the first layout that holds a model; a normalised head may be written as normalised rows.

    Raises ValueError with every layout's reason where none does.
    """
    reasons = {layout: _why_not(layout, config) for layout in get_args(Layout)}
    for layout, reason in reasons.items():
        if reason is None:
            return layout
    raise ValueError("no layout holds this model: " + "; ".join(map(str, reasons.values())))


def holding_layouts(config: ModelConfig) -> list[Layout]:
    """Returns all layouts that hold a model, the one it is written in first."""
    return [layout for layout in get_args(Layout) if _why_not(layout, config) is None]


def _why_not(layout: Layout, config: ModelConfig) -> ValueError | None:
    """Returns what a layout has no place for, None where it holds the model."""
    family = _FAMILIES[layout]
    try:
        family.config_to_hf(config if family.norm_head else dataclasses.replace(config, norm_head=False))
    except ValueError as error:
        return error
    return None
