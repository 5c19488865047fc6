"""The messages of `kserve.proto` as classes, in a descriptor pool of their own.

`tritonclient` registers messages of the same names in protobuf's default pool, where a second definition would be an
error: a process may hold both because these stand elsewhere.
"""

from __future__ import annotations

import collections
import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FILE = Path(__file__).with_name("kserve.proto")
_TOKENS = re.compile(r'//[^\n]*|\s+|"[^"\n]*"|[\w.]+|[{}()<>=;,]|.')
_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


class Rpc(NamedTuple):
    """A call of the service: the classes of its request and response; whether both are streams of them."""

    name: str
    request: Any
    response: Any
    streams: bool


class Messages(NamedTuple):
    service: str
    rpcs: tuple[Rpc, ...]
    types: dict[str, Any]  # by the message's name, without the package's


@functools.cache
def messages() -> Messages:
    """The service and the message classes of `kserve.proto`."""
    file = read_proto(_FILE.read_text("utf-8"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    types = {
        message.name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{message.name}"))
        for message in file.message_type
    }
    (service,) = file.service
    rpcs = [
        Rpc(method.name, types[method.input_type], types[method.output_type], method.server_streaming)
        for method in service.method
    ]
    return Messages(f"{file.package}.{service.name}", tuple(rpcs), types)


def read_proto(text: str) -> descriptor_pb2.FileDescriptorProto:
    """What a proto3 file defines. Raises ValueError for anything that `kserve.proto` does not use."""
    words = (match.group() for match in _TOKENS.finditer(text))
    tokens = collections.deque(word for word in words if not (word.isspace() or word.startswith("//")))
    _take(tokens, "syntax", "=", '"proto3"', ";", "package")
    file = descriptor_pb2.FileDescriptorProto(name="kserve.proto", syntax="proto3", package=tokens.popleft())
    _take(tokens, ";")
    while tokens:
        kind, name = tokens.popleft(), tokens.popleft()
        _take(tokens, "{")
        if kind == "message":
            _read_fields(tokens, file.message_type.add(name=name))
        elif kind == "enum":
            _read_values(tokens, file.enum_type.add(name=name))
        elif kind == "service":
            _read_rpcs(tokens, file.service.add(name=name))
        else:
            raise ValueError(f"kserve.proto: {kind} {name} is not read; message, enum and service are")
    return file


def _take(tokens: collections.deque[str], *wanted: str) -> None:
    for word in wanted:
        if (found := tokens.popleft()) != word:
            raise ValueError(f"kserve.proto: {word!r} wanted, found {found!r} before {' '.join([*tokens][:5])!r}")


def _read_fields(tokens: collections.deque[str], message: descriptor_pb2.DescriptorProto) -> None:
    while tokens[0] != "}":
        if tokens[0] == "message":
            tokens.popleft()
            nested = message.nested_type.add(name=tokens.popleft())
            _take(tokens, "{")
            _read_fields(tokens, nested)
        elif tokens[0] == "oneof":
            tokens.popleft()
            index = len(message.oneof_decl)
            message.oneof_decl.add(name=tokens.popleft())
            _take(tokens, "{")
            while tokens[0] != "}":
                _read_field(tokens, message).oneof_index = index
            _take(tokens, "}")
        else:
            _read_field(tokens, message)
    _take(tokens, "}")


def _read_field(tokens: collections.deque[str], message: descriptor_pb2.DescriptorProto) -> _Field:
    field = message.field.add(label=_Field.LABEL_OPTIONAL)
    kind = tokens.popleft()
    if kind == "repeated":
        field.label, kind = _Field.LABEL_REPEATED, tokens.popleft()
    if kind == "map":
        _take(tokens, "<", "string", ",")
        value = tokens.popleft()
        _take(tokens, ">")
        entry = f"{tokens[0].title().replace('_', '')}Entry"
        nested = message.nested_type.add(name=entry, options=descriptor_pb2.MessageOptions(map_entry=True))
        nested.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_SCALARS["string"])
        nested.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL, type_name=value)
        field.label, kind = _Field.LABEL_REPEATED, entry
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type_name = kind  # of a message or an enum: the pool finds out which
    field.name = tokens.popleft()
    _take(tokens, "=")
    field.number = int(tokens.popleft())
    _take(tokens, ";")
    return field


def _read_values(tokens: collections.deque[str], enum: descriptor_pb2.EnumDescriptorProto) -> None:
    while tokens[0] != "}":
        value = enum.value.add(name=tokens.popleft())
        _take(tokens, "=")
        value.number = int(tokens.popleft())
        _take(tokens, ";")
    _take(tokens, "}")


def _read_rpcs(tokens: collections.deque[str], service: descriptor_pb2.ServiceDescriptorProto) -> None:
    while tokens[0] != "}":
        _take(tokens, "rpc")
        rpc = service.method.add(name=tokens.popleft())
        rpc.client_streaming, rpc.input_type = _read_type(tokens)
        _take(tokens, "returns")
        rpc.server_streaming, rpc.output_type = _read_type(tokens)
        _take(tokens, "{", "}")
    _take(tokens, "}")


def _read_type(tokens: collections.deque[str]) -> tuple[bool, str]:
    """Whether it is a stream, and the name of its message."""
    _take(tokens, "(")
    is_stream = tokens[0] == "stream"
    if is_stream:
        tokens.popleft()
    name = tokens.popleft()
    _take(tokens, ")")
    return is_stream, name
