"""Which family a config.json belongs to."""

from collections.abc import Mapping
from typing import Any, Literal

from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.llama import LLAMA
from internjax.hf.mapping import Family

Layout = Literal["llama", "internlm2"]


def family_of(values: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json; raises ValueError naming what is supported."""
    kind, architectures = values.get("model_type"), values.get("architectures") or []
    if kind == "llama":
        return LLAMA
    if kind == "internlm2" or (kind == "internlm" and any(name.startswith("InternLM2") for name in architectures)):
        return INTERNLM2
    what = f"model_type {kind!r}" + (f" ({', '.join(architectures)})" if architectures else "")
    raise ValueError(f"config.json has {what}; supported are llama and internlm2 (early: internlm with InternLM2*)")


def layout_family(layout: Layout) -> Family:
    """Returns the family that a checkpoint is written in."""
    match layout:
        case "llama":
            return LLAMA
        case "internlm2":
            return INTERNLM2
        case _:
            raise ValueError(f"layout is {layout!r}; give 'llama' or 'internlm2'")
