"""Tensors of the KServe v2 protocol: from raw bytes or lists to values in row-major order, and back.

Raw bytes are little-endian; a BYTES element stands behind its length in four bytes.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from serve.operation.refusal import Refusal

_NUMBERS = {
    "BOOL": np.dtype("?"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


class Tensor(NamedTuple):
    """`values` are Python's, row by row: bool, int, float, or bytes of BYTES."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list


def from_raw(name: str, datatype: str, shape: Sequence[int], data: bytes) -> Tensor:
    """The tensor of raw bytes. Raises Refusal where they are not what datatype and shape say."""
    if datatype == "BYTES":
        return _checked(Tensor(name, datatype, tuple(shape), list(_strings(name, data))))
    size = _number(name, datatype).itemsize
    if len(data) % size:
        raise Refusal(f"{name} has {len(data)} bytes; {datatype} has {size} for each element", param=name)
    return _checked(Tensor(name, datatype, tuple(shape), np.frombuffer(data, _number(name, datatype)).tolist()))


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence) -> Tensor:
    """The tensor of values, flat or nested, as JSON has them. Raises Refusal where they are not of the datatype."""
    flat = _flat(name, values)
    if datatype == "BYTES":
        return _checked(Tensor(name, datatype, tuple(shape), [_encoded(name, value) for value in flat]))
    number = _number(name, datatype)
    wanted = {"b": {bool}, "f": {int, float}}.get(number.kind, {int})
    if not {*map(type, flat)} <= wanted:
        wrong = next(value for value in flat if type(value) not in wanted)
        raise Refusal(f"{name} is {datatype} and holds {wrong!r:.200}", param=name)
    if number.kind in "iu" and flat:
        for value in (min(flat), max(flat)):
            if not np.iinfo(number).min <= value <= np.iinfo(number).max:
                raise Refusal(f"{name} is {datatype} and holds {value}, which that cannot hold", param=name)
    return _checked(Tensor(name, datatype, tuple(shape), flat))


def raw_of(tensor: Tensor) -> bytes:
    if tensor.datatype == "BYTES":
        return b"".join(part for value in tensor.values for part in (struct.pack("<I", len(value)), value))
    return np.array(tensor.values, _NUMBERS[tensor.datatype]).tobytes()


def _number(name: str, datatype: str) -> np.dtype:
    if datatype not in _NUMBERS:
        raise Refusal(f"{name} has the datatype {datatype!r:.50}; BYTES, {', '.join(_NUMBERS)} are read", param=name)
    return _NUMBERS[datatype]


def _checked(tensor: Tensor) -> Tensor:
    name, shape, num_values = tensor.name, tensor.shape, len(tensor.values)
    if min(shape, default=0) < 0 or math.prod(shape) != num_values:
        raise Refusal(f"{name} has the shape {list(shape)} and {num_values} elements; both must agree", param=name)
    return tensor


def _strings(name: str, data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        start = place + 4
        place = start + int.from_bytes(data[place:start], "little")
        if start > len(data) or place > len(data):
            what = f"{name} ends inside an element: BYTES is, for each, its length in four bytes and so many bytes"
            raise Refusal(what, param=name)
        yield data[start:place]


def _flat(name: str, values: Any) -> list[Any]:
    """Values of lists in lists, as deep as tensors go."""
    if not isinstance(values, list | tuple):
        raise Refusal(f"{name} must have its elements in a list, given {values!r:.200}", param=name)
    for _ in range(8):
        kinds = {*map(type, values)}
        if list not in kinds:
            return [*values]
        if kinds != {list}:
            raise Refusal(f"{name} has lists beside elements; give one list, or lists of equal depth", param=name)
        values = list(itertools.chain.from_iterable(values))
    raise Refusal(f"{name} has its elements in lists that are too deep; give one list", param=name)


def _encoded(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Refusal(f"{name} is BYTES and holds {value!r:.200}; strings are wanted", param=name)
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise Refusal(f"{name} holds what is no text: {error}", param=name) from error
