"""Names for work: an interrupted run finds by them what it had finished.

Equal digests: the same settings, the same code of the stage and of this package, on whatever process or machine. What a
stage reads beyond that (globals, helpers of other modules, files) has to be named by its `version`.
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipelines.document import Stage


def digest(parts: Iterable[str]) -> str:
    """32 hex digits, the first 128 bits of a SHA-256 over the parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


@functools.cache
def code_digest() -> str:
    """SHA-256 over this package's sources: parts that other code wrote are not taken over."""
    whole = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        whole.update(path.name.encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()


def stage_digest(stage: Stage) -> str:
    """Digest of a stage: its name, version and settings, its own code and that of this package."""
    return digest([code_digest(), stage.name, stage.scope, stage.version, _described(stage.apply, stage.name)])


def _described(value: Any, stage: str) -> str:
    """A text that is equal for equal settings and functions, in every process."""
    if value is None or isinstance(value, (str, bytes, int, float, complex, Path)):
        return repr(value)
    again = functools.partial(_described, stage=stage)
    if isinstance(value, FunctionType):
        cells = [again(cell.cell_contents) for cell in value.__closure__ or ()]
        defaults = [again(value.__defaults__), again(value.__kwdefaults__)]
        return f"{value.__qualname__}{again(value.__code__)}{cells}{defaults}"
    if isinstance(value, CodeType):
        return f"{value.co_code.hex()}{[again(constant) for constant in value.co_consts]}{value.co_names}"
    if isinstance(value, functools.partial):
        return f"partial{again(value.func)}{again(value.args)}{again(value.keywords)}"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}{[(f.name, again(getattr(value, f.name))) for f in fields(value)]}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__qualname__}{[again(each) for each in value]}"
    if isinstance(value, (set, frozenset)):
        return f"set{sorted(again(each) for each in value)}"
    if isinstance(value, dict):
        return f"dict{sorted((again(key), again(each)) for key, each in value.items())}"
    if isinstance(value, np.ndarray):
        return f"array{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value)).hexdigest()}"
    if isinstance(value, pa.Array):
        whole = pa.record_batch([value], names=["values"]).serialize()
        return f"{value.type}{len(value)}{hashlib.sha256(whole).hexdigest()}"
    if hasattr(value, "pattern") and hasattr(value, "flags"):
        return f"pattern{value.pattern!r}{value.flags}"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if callable(value) and hasattr(value, "__wrapped__"):
        return again(value.__wrapped__)
    raise ValueError(
        f"stage {stage!r} holds a {type(value).__qualname__}, whose content cannot be told from another's; let the "
        "function hold plain settings and make the object in it, with what it reads named by Stage(..., version=...)"
    )
