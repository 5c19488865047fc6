"""A tool: what a model is told about a function, and the check of what it sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (Mapping,),
    "null": (type(None),),
}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call with JSON arguments; its answer is text for the model to read.

    `parameters` is a JSON schema of type object; its `properties` are the keyword arguments of `function`.
    The name "interpreter" means InternLM2's code interpreter, which takes {"code": ...}.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., str]


def spec(tool: Tool) -> dict[str, Any]:
    """The tool as a model is told about it: {name, description, parameters}."""
    return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def call(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """What the tool answers. Raises ValueError, worded for the model that sent them, if the arguments do not fit."""
    faults = argument_faults(tool, arguments)
    if faults:
        raise ValueError(f"{tool.name} was not called: {'; '.join(faults)}. Wanted: {_wanted(tool)}")
    return str(tool.function(**arguments))


def argument_faults(tool: Tool, arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with `arguments`, empty if nothing: names, required ones, and the type and enum of each."""
    properties = tool.parameters.get("properties", {})
    faults = [f"unknown argument {name!r}" for name in arguments if name not in properties]
    faults += [f"{name!r} is missing" for name in tool.parameters.get("required", ()) if name not in arguments]
    for name, value in arguments.items():
        schema = properties.get(name, {})
        kinds = schema.get("type", ())
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if kinds and not any(_is_a(value, kind) for kind in kinds):
            faults.append(f"{name!r} is {value!r:.80}, not of type {' or '.join(kinds)}")
        elif "enum" in schema and value not in schema["enum"]:
            faults.append(f"{name!r} is {value!r:.80}, not one of {schema['enum']}")
    return faults


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":  # True is an int for Python, not for JSON
        return False
    return isinstance(value, _PYTHON_TYPES[kind])


def _wanted(tool: Tool) -> str:
    required = tool.parameters.get("required", ())
    described = (
        f"{name} ({schema.get('type', 'any')}{'' if name in required else ', optional'})"
        for name, schema in tool.parameters.get("properties", {}).items()
    )
    return ", ".join(described) or "no arguments"
