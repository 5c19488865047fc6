"""The KServe v2 protocol over gRPC, as Triton's clients speak it: `GrpcServer` answers GRPCInferenceService.

The calls are in `kserve.proto`, what a request may hold in `serve.kserve`. A call that is cancelled, lost or past its
deadline frees its slots and pages. Of a stream, requests are answered side by side; whoever does not read holds up
nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import grpc
from google.protobuf import json_format

from serve import kserve, tensors
from serve.kserve_answer import Response, answer
from serve.kserve_messages import Messages, messages
from serve.protocol import Refusal

MAX_CALLS = 1000  # at once, an open stream being one; more are refused with RESOURCE_EXHAUSTED
MAX_IN_STREAM = 64  # requests of one stream that are answered at once; the next one is read when one of them is over
_MAX_DETAILS = 2000  # bytes: gRPC sends them in a header, up to three times as long, and clients take 8 KiB of it
_START_SECONDS = 30.0

log = logging.getLogger("serve")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_NOT_DONE = {
    "ModelStatistics": kserve.NO_STATISTICS,
    "RepositoryModelLoad": "models are not loaded by this protocol; for adapters, POST /v1/load_lora_adapter",
    "RepositoryModelUnload": "models are not unloaded by this protocol; for adapters, POST /v1/unload_lora_adapter",
    "TraceSetting": "there are no traces",
    "LogSettings": "the log is set up where the server is started",
} | {
    f"{kind}SharedMemory{what}": "tensors come in the request; there is no shared memory"
    for kind in ("System", "Cuda")
    for what in ("Status", "Register", "Unregister")
}
_OPEN_TO_ALL = ("ServerLive", "ServerReady")  # probes have no key


class GrpcServer:
    """A running server with a thread and an event loop of its own. `close` it; the pipeline behind it stays open."""

    def __init__(self, served: kserve.Served, *, host: str, port: int, drain_seconds: float):
        """Answers at `address` when this returns. Raises ValueError where the port cannot be taken."""
        if not all(key.isascii() and key.isprintable() for key in served.api_keys):
            raise ValueError("an API key has characters that gRPC cannot carry; choose one of printable ASCII")
        self._served = served
        self._drain_seconds = drain_seconds
        self._loop = asyncio.new_event_loop()
        self._leaving = asyncio.Event()
        self._ready = threading.Event()
        self._fault: Exception | None = None
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_SECONDS):
            raise RuntimeError(f"the gRPC server at {self.address} did not start in {_START_SECONDS:g} s")
        if self._fault is not None:
            self._thread.join()
            raise ValueError(
                f"{self.address} cannot be taken for gRPC ({self._fault}); give another port"
            ) from self._fault

    def leave(self) -> None:
        """Takes no more requests; those under way have the drain time. Returns at once: `close` waits."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has left
            self._loop.call_soon_threadsafe(self._leaving.set)

    def close(self) -> None:
        """Takes no more requests, lets those under way finish for the drain time, and frees the port."""
        self.leave()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        limits = ("grpc.max_receive_message_length", kserve.MAX_BYTES), ("grpc.max_send_message_length", -1)
        # Else a second server might share the port with this one, and each get some of the requests.
        options = (*limits, ("grpc.so_reuseport", 0))
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_CALLS)
        server.add_generic_rpc_handlers((_handlers(self._served, self._leaving),))
        try:
            server.add_insecure_port(self.address)
            await server.start()
        except Exception as error:
            self._fault = error
            return
        finally:
            self._ready.set()
        await self._leaving.wait()
        await server.stop(self._drain_seconds)


def _handlers(served: kserve.Served, leaving: asyncio.Event) -> grpc.GenericRpcHandler:
    found = messages()
    methods: dict[str, Callable] = {
        "ServerLive": lambda request: {"live": True},
        "ServerReady": lambda request: {"ready": served.pipeline.fault() is None},
        "ModelReady": lambda request: {"ready": _model_ready(request, served)},
        "ServerMetadata": lambda request: kserve.server_metadata(),
        "ModelMetadata": lambda request: kserve.model_metadata(_name(request, served)),
        "ModelConfig": lambda request: {"config": kserve.model_config(_name(request, served))},
        "RepositoryIndex": lambda request: {"models": _index(request, served)},
    }
    handlers = {}
    for rpc in found.rpcs:
        serving = {
            "request_deserializer": rpc.request.FromString,
            "response_serializer": rpc.response.SerializeToString,
        }
        if rpc.name in methods:
            told = partial(_told, methods[rpc.name], rpc.response)
            handler = _unary(told, None if rpc.name in _OPEN_TO_ALL else served)
            handlers[rpc.name] = grpc.unary_unary_rpc_method_handler(handler, **serving)
        elif rpc.streams:
            handlers[rpc.name] = grpc.stream_stream_rpc_method_handler(_stream(served, found, leaving), **serving)
        else:
            handler = _unary(partial(_infer, served=served, found=found), served)
            handlers[rpc.name] = grpc.unary_unary_rpc_method_handler(handler, **serving)
    for name, why in _NOT_DONE.items():
        handlers[name] = grpc.unary_unary_rpc_method_handler(_not_done(f"{name} is not answered here: {why}"))
    return grpc.method_handlers_generic_handler(found.service, handlers)


def _unary(answered: Callable[[Any], Awaitable[Any]], served: kserve.Served | None) -> Callable:
    """The handler of a call with one request and one response. `served`: whose key is asked for, None: no key is."""

    async def handle(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            if served is not None:
                _check_key(context, served)
            return await answered(request)
        except Refusal as error:
            await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), _details(error.message))
        except Exception as error:
            log.exception("a call failed")
            await context.abort(grpc.StatusCode.INTERNAL, f"the server failed: {type(error).__name__}")

    return handle


def _not_done(why: str) -> Callable:
    async def handle(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)

    return handle


def _check_key(context: grpc.aio.ServicerContext, served: kserve.Served) -> None:
    given = dict(context.invocation_metadata() or ()).get("authorization", "")
    kserve.check_key(given if isinstance(given, bytes) else given.encode(), served)


def _details(message: str) -> str:
    """The message as gRPC can carry it, which takes no half characters that a client's JSON may have held."""
    return message.encode(errors="replace")[:_MAX_DETAILS].decode(errors="ignore")


async def _told(tell: Callable[[Any], Mapping], response: Any, request: Any) -> Any:
    return json_format.ParseDict(tell(request), response())


def _name(request: Any, served: kserve.Served) -> str:
    kserve.check_model(request.name, request.version, served)
    return request.name


def _model_ready(request: Any, served: kserve.Served) -> bool:
    """Of a model that is not there it is False, as Triton has it: who waits for an adapter asks again."""
    try:
        kserve.check_model(request.name, request.version, served)
    except Refusal:
        return False
    return served.pipeline.fault() is None


def _index(request: Any, served: kserve.Served) -> list[dict[str, str]]:
    if request.repository_name:
        raise Refusal(f"there is one repository, without a name; given {request.repository_name!r:.100}")
    return kserve.repository_index(served, only_ready=request.ready)


async def _infer(request: Any, *, served: kserve.Served, found: Messages) -> Any:
    message = _response(await answer(kserve.job_of(_request(request), served, may_stream=False)), found)
    message.parameters.clear()  # there is one response: nobody asks whether it is the last
    return message


def _stream(served: kserve.Served, found: Messages, leaving: asyncio.Event) -> Callable:
    """The handler of ModelStreamInfer: an error is a response, and the stream goes on."""
    envelope = found.types["ModelStreamInferResponse"]

    async def handle(requests: AsyncIterator, context: grpc.aio.ServicerContext) -> None:
        try:
            _check_key(context, served)
        except Refusal as error:
            await context.abort(_CODES[error.status], error.message)
        room, writing = asyncio.Semaphore(MAX_IN_STREAM), asyncio.Lock()

        async def write(message: Any) -> None:
            async with writing:
                try:
                    await context.write(message)
                except grpc.aio.BaseError as error:  # the client has gone, and this call is about to be cancelled
                    raise asyncio.CancelledError from error

        async def send(response: Response) -> None:
            await write(envelope(infer_response=_response(response, found)))

        async def respond(request: Any) -> None:
            try:
                await send(await answer(kserve.job_of(_request(request), served, may_stream=True), send=send))
            except Refusal as error:
                await fail(request, error.message)
            except Exception as error:
                log.exception("a request of a stream failed")
                await fail(request, f"the server failed: {type(error).__name__}")
            finally:
                room.release()

        async def fail(request: Any, why: str) -> None:
            message = _response(Response(request.model_name, request.id, [], is_last=True), found)
            await write(envelope(error_message=_details(why), infer_response=message))

        async with asyncio.TaskGroup() as responding:
            async for request in _until(leaving, requests):
                await room.acquire()
                responding.create_task(respond(request))

    return handle


async def _until(leaving: asyncio.Event, requests: AsyncIterator) -> AsyncIterator[Any]:
    """The requests of a stream, until it ends or the server leaves."""
    left = asyncio.ensure_future(leaving.wait())
    reading = None
    try:
        while True:
            reading = asyncio.ensure_future(anext(requests, None))
            await asyncio.wait({reading, left}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or (request := reading.result()) is None:
                return
            yield request
    finally:
        for task in (left, reading):
            task.cancel()
        await asyncio.gather(left, reading, return_exceptions=True)


def _request(message: Any) -> kserve.Request:
    """The request of a message. Raises Refusal where its tensors are not what they say."""
    raw = message.raw_input_contents
    if len(raw) not in (0, len(message.inputs)):
        raise Refusal(f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs; give one for each, or none")
    inputs = []
    for index, given in enumerate(message.inputs):
        if given.parameters:
            names = ", ".join(sorted(given.parameters))
            raise Refusal(f"the input {given.name!r:.100} has parameters ({names}); none is known", param=given.name)
        if raw and given.HasField("contents"):
            what = f"the input {given.name!r:.100} has contents beside raw_input_contents; give one of them"
            raise Refusal(what, param=given.name)
        if raw:
            inputs.append(tensors.from_raw(given.name, given.datatype, given.shape, raw[index]))
        else:
            inputs.append(tensors.from_values(given.name, given.datatype, given.shape, _contents(given)))
    for output in message.outputs:
        names = [name for name, value in output.parameters.items() if _parameter(value) not in (0, False)]
        if names:  # classification and shared memory; 0 and False ask for nothing
            what = f"the output {output.name!r:.100} has parameters ({', '.join(sorted(names))}); none is known"
            raise Refusal(what, param=output.name)
    parameters = {name: _parameter(value) for name, value in message.parameters.items()}
    outputs = [output.name for output in message.outputs]
    return kserve.Request(message.model_name, message.model_version, message.id, parameters, inputs, outputs)


_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


def _contents(given: Any) -> list:
    wanted = _CONTENTS.get(given.datatype)
    wrong = [field.name for field, _ in given.contents.ListFields() if field.name != wanted]
    if wrong:
        what = f"{given.name!r:.100} is {given.datatype!r:.50} and has {', '.join(wrong)}; {wanted or 'raw'} is wanted"
        raise Refusal(what, param=given.name)
    return [*getattr(given.contents, wanted)] if wanted else []


def _parameter(value: Any) -> bool | int | float | str | None:
    chosen = value.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(value, chosen)


def _response(response: Response, found: Messages) -> Any:
    message = found.types["ModelInferResponse"](
        model_name=response.model_name, model_version=kserve.VERSION, id=response.id
    )
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(tensors.raw_of(tensor))
    message.parameters["triton_final_response"].bool_param = response.is_last
    return message
