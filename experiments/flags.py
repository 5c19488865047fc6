"""Command lines as W&B sweeps write them, turned into those that the parser of a config reads.

What `wandb agent` puts in place of ${args}, ${args_no_equals}, ${args_no_hyphens}, ${args_no_boolean_flags} and
${args_json}, with values in Python's or JSON's spelling:

    --optimizer.peak_lr=0.1              as it is
    --fresh=True  --fresh True           --fresh            (False: --no-fresh)
    --data=['a', 'b']                    --data a b
    --optimizer.clip_norm=null           --optimizer.clip_norm=None
    --optimizer={'peak_lr': 0.1}         --optimizer.peak_lr=0.1
    --schedule=linear                    schedule:linear    (also {'type': 'linear', 'warmup_steps': 5})
    seed=3                               --seed=3
    {"seed": 3, "fresh": true}           --seed=3 --fresh

Arguments that a person types pass through unchanged.
"""

import ast
import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

_NULL = ("null", "none")


def plain_flags(args: Sequence[str], config: type) -> list[str]:
    """Returns the arguments for the parser of the dataclass `config`; see the top of this file."""
    kinds = dict(_kinds(config, ""))
    choices: list[str] = []
    flags: list[str] = []
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.removeprefix("--").partition("=")
        path = name.replace("-", "_")
        if arg.startswith("{") and isinstance(given := _literal(arg), dict):
            rest = [f"--{key}={item}" for key, item in given.items()] + rest
        elif path in kinds and (equals or (arg.startswith("--") and rest and _is_special(rest[0], kinds[path]))):
            _translate(name, value if equals else rest.pop(0), kinds[path], flags, choices)
        else:
            flags.append(arg)
    # The flags of an alternative are known from its name on.
    return [*choices, *flags]


def _translate(name: str, value: str, kinds: tuple[Any, ...], flags: list[str], choices: list[str]) -> None:
    """Adds what one flag with a value becomes."""
    given = _literal(value)
    classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if bool in kinds and value.lower() in ("true", "false"):
        head, dot, last = name.rpartition(".")
        flags.append(f"--{head}{dot}{'' if value.lower() == 'true' else 'no-'}{last}")
    elif type(None) in kinds and value.lower() in _NULL:
        choices.append(f"{name}:none") if classes else flags.append(f"--{name}=None")
    elif classes and isinstance(given, dict):
        if len(classes) > 1 and "type" in given:
            choices.append(f"{name}:{_kebab(given['type'], classes)}")
        for key, item in given.items():
            kind = [hint for one in classes for path, hint in _kinds(one, "") if path == key.replace("-", "_")]
            if key != "type":
                _translate(f"{name}.{key}", str(item), kind[0] if kind else (), flags, choices)
    elif len(classes) > 1:
        choices.append(f"{name}:{_kebab(value, classes)}")
    elif isinstance(given, list | tuple) and any(typing.get_origin(kind) is tuple for kind in kinds):
        flags += [f"--{name}", *map(str, given)]
    else:
        flags.append(f"--{name}={value}")


def _is_special(value: str, kinds: tuple[Any, ...]) -> bool:
    """Whether a value that follows its flag (without =) is not what a person would have typed there."""
    if bool in kinds:
        return value.lower() in ("true", "false")
    if type(None) in kinds and value.lower() == "null":
        return True
    wanted = list | tuple | dict if value[:1] in ("[", "(", "{") else ()
    several = sum(dataclasses.is_dataclass(kind) for kind in kinds) > 1
    return isinstance(_literal(value), wanted) or (several and not value.startswith("-"))


def _literal(text: str) -> Any:
    """Returns the value that JSON or Python would read, or the text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    return text


def _kebab(name: str, classes: Sequence[type]) -> str:
    """Returns the name of an alternative as the parser spells it (dynamic-ntk for DynamicNTK), or what was given."""
    plain = name.replace("-", "").replace("_", "").lower()
    names = [one.__name__ for one in classes if one.__name__.lower() == plain]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", names[0]).lower() if names else name


def _kinds(config: type, prefix: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yields the dotted path of every field, with its type or the members of its union."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = typing.get_args(hint) if is_union else (hint,)
        yield prefix + field.name, kinds
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                yield from _kinds(kind, f"{prefix}{field.name}.")
