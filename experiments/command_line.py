"""The command line of a config: fields as options, in a person's spelling and in that of W&B sweeps.

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
import contextlib
import dataclasses
import json
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from internjax.compile_cache import keep_programs
from internjax.host_memory import keep_freed
from internjax.train import processes

Config = TypeVar("Config")

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


def launch(run: Callable[[Config], Any], config: Config, args: Sequence[str] | None = None) -> Any:
    """Runs `run` on `config` as changed by the command line; `--help` lists every field.

    Alternatives (schedules, ...) are chosen by name: `schedule:linear --schedule.warmup-steps 10`. A boolean is set by
    --x, --no-x or --x=True. A mistake in the user's values ends with its message and exit code 1, without a traceback.
    """
    return guarded(run, parse(config, args))


def parse(config: Config, args: Sequence[str] | None = None) -> Config:
    """Returns `config` as changed by the command line (`args`, or this process's).

    Inside a W&B sweep the run's folder is RUN-ID, with the id that W&B gave the run.
    """
    import tyro

    # `python -m experiments.NAME`: its name and docstring, with the command to type, head the help.
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    is_ours = name.startswith("experiments.")
    told = {"prog": f"python -m {name}", "description": _paragraphs(main.__doc__ or "")} if is_ours else {}
    args = plain_flags(sys.argv[1:] if args is None else args, type(config))
    config = tyro.cli(type(config), default=config, args=args, config=(tyro.conf.CascadeSubcommandArgs,), **told)
    if hasattr(config, "run") and {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys():
        # The runs of a sweep differ in their configs, so that each needs a folder of its own.
        run = config.run or name.rpartition(".")[2]
        config = dataclasses.replace(config, run=f"{run}-{os.environ['WANDB_RUN_ID']}")
    return config


def typed(config: Any, default: Any) -> list[str]:
    """Returns the arguments that make `config` of `default`, quoted for a shell; `parse(default, ...)` reads them.

    Alternatives come first: their flags are known from their name on.
    """
    choices, flags = [], []
    for name, value in _differing(config, default):
        if dataclasses.is_dataclass(value) or (value is None and name.endswith(":")):
            choices.append(f"{name}{_kebab(type(value).__name__, [type(value)]) if value is not None else 'none'}")
        elif isinstance(value, bool):
            head, dot, last = name.rpartition(".")
            flags.append(f"--{head}{dot}{'' if value else 'no-'}{last}")
        elif isinstance(value, tuple):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return [shlex.quote(flag) for flag in (*choices, *flags)]


def _differing(config: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the flags' names and values of the fields that differ; "NAME:" and a dataclass or None: an alternative."""
    for field in dataclasses.fields(config):
        value, other = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if value == other:
            continue
        if dataclasses.is_dataclass(value):
            if type(value) is not type(other):
                yield f"{name}:", value
                other = type(value)()
            yield from _differing(value, other, f"{name}.")
        else:
            yield (f"{name}:" if dataclasses.is_dataclass(other) else name), value


def _paragraphs(text: str) -> str:
    """Returns a docstring with time and expected result as paragraphs: a help fills the lines of each."""
    return re.sub(r"\n(?=(Time|Expected result): )", "\n\n", text)


def guarded(run: Callable[[Config], Any], config: Config) -> Any:
    """Returns run(config); an error that a person can mend is printed as one message and ends the process with 1.

    What is compiled is kept for the next process (`internjax.compile_cache`), what a step on a CPU frees for the next
    step (`internjax.host_memory`).
    """
    keep_programs()
    keep_freed()
    # Outside: the job could not be joined. Inside: the others are told before this process ends.
    with _told(), processes.job(), _told():
        return run(config)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
