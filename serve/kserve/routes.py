"""The KServe v2 protocol over HTTP, with Triton's binary tensors: the routes under /v2, over `serve.kserve.requests`.

Errors are `{"error": "..."}`, as this protocol has it. Streams are gRPC's (`serve.kserve.grpc`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.kserve import requests as kserve
from serve.kserve import tensors
from serve.kserve.answers import answer
from serve.operation.bodies import aside
from serve.operation.refusal import Refusal

HEADER_LENGTH = "Inference-Header-Content-Length"  # how much of a body is JSON: raw tensors follow
_KEYS = {"id", "parameters", "inputs", "outputs"}
_INPUT_KEYS = {"name", "shape", "datatype", "parameters", "data"}

log = logging.getLogger("serve")


def add_kserve_routes(app: FastAPI, served: kserve.Served) -> None:
    """Adds all that begins with /v2. It needs the key, but for the health of the server."""
    model = "/v2/models/{name:path}"
    routes = [Route("/v2/health/live", _with(served, _live)), Route("/v2/health/ready", _with(served, _ready))]
    for path, endpoint, method in (
        ("/v2", _server, "GET"),
        ("/v2/repository/index", _index, "POST"),
        (f"{model}/versions/{{version}}/infer", _infer, "POST"),
        (f"{model}/infer", _infer, "POST"),
        (f"{model}/versions/{{version}}/ready", _model_ready, "GET"),
        (f"{model}/ready", _model_ready, "GET"),
        (f"{model}/versions/{{version}}/config", _config, "GET"),
        (f"{model}/config", _config, "GET"),
        (f"{model}/versions/{{version}}/stats", _statistics, "GET"),
        (f"{model}/stats", _statistics, "GET"),
        (f"{model}/versions/{{version}}", _model, "GET"),
        (model, _model, "GET"),
    ):
        routes.append(Route(path, _with(served, endpoint, needs_key=True), methods=[method]))
    handlers = {Refusal: _refused, HTTPException: _http_error, Exception: _failed}
    under_v2 = Starlette(routes=routes, exception_handlers=handlers)
    under_v2.state = app.state  # its requests are counted with all others
    app.router.routes.append(Route("/v2{rest:path}", under_v2))


Endpoint = Callable[[Request, kserve.Served], Awaitable[Response]]


def _with(served: kserve.Served, endpoint: Endpoint, *, needs_key: bool = False) -> Callable:
    async def handle(request: Request) -> Response:
        if needs_key:
            kserve.check_key(dict(request.scope["headers"]).get(b"authorization", b""), served.api_keys)
        return await endpoint(request, served)

    return handle


async def _live(request: Request, served: kserve.Served) -> Response:
    if not (health := served.health()).is_live:
        raise Refusal(health.why, status=503)
    return JSONResponse({"live": True})


async def _ready(request: Request, served: kserve.Served) -> Response:
    if not (health := served.health()).is_ready:
        raise Refusal(health.why, status=503)
    return JSONResponse({"ready": True})


async def _server(request: Request, served: kserve.Served) -> Response:
    return JSONResponse(kserve.server_metadata())


async def _index(request: Request, served: kserve.Served) -> Response:
    body = _parsed(await request.body() or b"{}", "the body", {"ready"})
    ready = body.get("ready", False)
    if not isinstance(ready, bool):
        raise Refusal(f"ready must be true or false, given {ready!r:.100}")
    return JSONResponse(kserve.repository_index(served, only_ready=ready))


async def _model_ready(request: Request, served: kserve.Served) -> Response:
    name = _name(request, served)
    await _ready(request, served)
    return JSONResponse({"name": name, "ready": True})


async def _model(request: Request, served: kserve.Served) -> Response:
    return JSONResponse(kserve.model_metadata(_name(request, served)))


async def _config(request: Request, served: kserve.Served) -> Response:
    return JSONResponse(kserve.model_config(_name(request, served)))


async def _statistics(request: Request, served: kserve.Served) -> Response:
    raise Refusal(f"statistics are not answered here: {kserve.NO_STATISTICS}", status=501)


def _name(request: Request, served: kserve.Served) -> str:
    name = request.path_params["name"]
    kserve.check_model(name, request.path_params.get("version", ""), served)
    return name


async def _infer(request: Request, served: kserve.Served) -> Response:
    _name(request, served)  # before anything is read
    data = await request.body()
    is_packed = request.headers.get("Content-Encoding", "identity") != "identity"  # then it may be large all the same
    num_bytes = served.max_bytes if is_packed else len(data)
    job, is_binary = await aside(num_bytes, lambda: _job(data, request, served))
    answering = asyncio.ensure_future(answer(job))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=499)  # nobody reads it
        return _response(answering.result(), is_binary)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


def _job(data: bytes, request: Request, served: kserve.Served) -> tuple[kserve.Job, Callable[[str], bool]]:
    """What a body asks for, and which of its outputs are to be raw bytes."""
    body, raw = _split(_decompressed(data, request.headers, served.max_bytes), request.headers)
    asked, is_binary = _request(body, raw, request)
    return kserve.job_of(asked, served, may_stream=False), is_binary


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _decompressed(body: bytes, headers: Mapping[str, str], max_bytes: int) -> bytes:
    encoding = headers.get("Content-Encoding", "identity")
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise Refusal(f"the Content-Encoding is {encoding!r:.50}; gzip, deflate or none is read", status=415)
    try:
        reader = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either, by its first bytes
        read = reader.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise Refusal(f"the body is no {encoding}: {error}") from error
    if len(read) > max_bytes:
        raise Refusal(f"the body has more than {max_bytes} bytes; send less", status=413)
    if not reader.eof:
        raise Refusal(f"the body ends inside its {encoding}; send all of it")
    return read


def _split(body: bytes, headers: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    """The JSON of a body, and the raw tensors behind it."""
    length = headers.get(HEADER_LENGTH, str(len(body)))
    if not (length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= len(body)):
        raise Refusal(f"{HEADER_LENGTH} is {length!r:.50}; a number up to the body's {len(body)} bytes is wanted")
    return _parsed(body[: int(length)], "the body", _KEYS), body[int(length) :]


def _parsed(data: bytes, what: str, known: set[str]) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{what} is not JSON: {error}") from error
    return _object(value, what, known)


def _object(value: Any, what: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refusal(f"{what} must be an object, given {value!r:.200}")
    if unknown := sorted(set(value) - known):
        raise Refusal(f"{what} has unknown fields {', '.join(unknown):.200}; known are {', '.join(sorted(known))}")
    return value


def _request(body: Mapping[str, Any], raw: bytes, request: Request) -> tuple[kserve.Request, Callable[[str], bool]]:
    """The request of a body, and which of its outputs are to be raw bytes."""
    wanted = {"id": str, "parameters": dict, "inputs": list, "outputs": list}
    for name, kind in wanted.items():
        if name in body and not isinstance(body[name], kind):
            raise Refusal(f"{name} must be a JSON {kind.__name__}, given {body[name]!r:.200}")
    parameters = dict(body.get("parameters", {}))
    all_binary = _flag(parameters, "binary_data_output", "the parameter", default=False)
    inputs, place = [], 0
    for given in body.get("inputs", []):
        tensor, place = _input(given, raw, place)
        inputs.append(tensor)
    if place != len(raw):
        raise Refusal(f"{len(raw)} bytes follow the JSON, and the inputs have {place} by their binary_data_size")
    binary: dict[str, bool] = {}
    for given in body.get("outputs", []):
        name, own = _named(given, "an output", {"name", "parameters"})
        binary[name] = _flag(own, "binary_data", f"the output {name!r:.100}", default=all_binary)
        if left := {key: value for key, value in own.items() if value not in (0, False)}:
            raise Refusal(f"the output {name!r:.100} has the parameters {', '.join(left):.200}; binary_data is known")
    version = request.path_params.get("version", "")
    outputs = [given["name"] for given in body.get("outputs", [])]
    asked = kserve.Request(request.path_params["name"], version, body.get("id", ""), parameters, inputs, outputs)
    return asked, lambda name: binary.get(name, all_binary)


def _input(given: Any, raw: bytes, place: int) -> tuple[tensors.Tensor, int]:
    """A tensor, and where in the raw bytes the next one begins."""
    name, own = _named(given, "an input", _INPUT_KEYS)
    datatype, shape, size = given.get("datatype"), given.get("shape"), own.pop("binary_data_size", None)
    if not isinstance(datatype, str):
        raise Refusal(f"{name:.100} needs a datatype, given {datatype!r:.100}", param=name)
    if not isinstance(shape, list) or not all(type(dimension) is int for dimension in shape):
        raise Refusal(f"{name:.100} needs a shape, a list of whole numbers, given {shape!r:.200}", param=name)
    if own:
        raise Refusal(f"{name:.100} has the parameters {', '.join(own):.200}; binary_data_size is known", param=name)
    if (size is None) == ("data" not in given):
        raise Refusal(f"{name:.100} needs either data or binary_data_size", param=name)
    if size is None:
        return tensors.from_values(name, datatype, shape, given["data"]), place
    if type(size) is not int or not 0 <= size <= len(raw) - place:
        what = (
            f"{name:.100} has the binary_data_size {size!r:.50}, and {len(raw) - place} bytes are left behind the JSON"
        )
        raise Refusal(what, param=name)
    return tensors.from_raw(name, datatype, shape, raw[place : place + size]), place + size


def _named(given: Any, what: str, known: set[str]) -> tuple[str, dict[str, Any]]:
    """The name of a tensor and its parameters."""
    given = _object(given, what, known)
    name, own = given.get("name"), given.get("parameters", {})
    if not isinstance(name, str):
        raise Refusal(f"{what} needs a name, given {name!r:.100}")
    if not isinstance(own, dict):
        raise Refusal(f"the parameters of {name:.100} must be an object, given {own!r:.200}")
    return name, dict(own)


def _flag(values: dict[str, Any], name: str, where: str, *, default: bool) -> bool:
    """A flag, taken out of the values."""
    value = values.pop(name, default)
    if not isinstance(value, bool):
        raise Refusal(f"{where}: {name} must be true or false, given {value!r:.100}")
    return value


def _response(response: Any, is_binary: Callable[[str], bool]) -> Response:
    outputs, parts = [], []
    for tensor in response.outputs:
        told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": [*tensor.shape]}
        if is_binary(tensor.name):
            parts.append(tensors.raw_of(tensor))
            told["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            told["data"] = [v.decode() for v in tensor.values] if tensor.datatype == "BYTES" else tensor.values
        outputs.append(told)
    body = {"model_name": response.model_name, "model_version": kserve.VERSION, "outputs": outputs}
    header = json.dumps(body | ({"id": response.id} if response.id else {})).encode()
    if not parts:
        return Response(header, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(header))}
    return Response(b"".join([header, *parts]), media_type="application/octet-stream", headers=headers)


def _error(message: str, status: int) -> Response:
    # In ASCII, because the message may quote what is no valid UTF-8.
    return Response(json.dumps({"error": message}), status_code=status, media_type="application/json")


async def _refused(request: Request, error: Refusal) -> Response:
    return _error(error.message, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    reason = {
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }
    return _error(reason.get(error.status_code, str(error.detail)), error.status_code)


async def _failed(request: Request, error: Exception) -> Response:
    log.exception("%s failed", request.url.path)
    return _error(f"the server failed: {type(error).__name__}", 500)
