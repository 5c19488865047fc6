"""The KServe v2 protocol over gRPC, as Triton's clients speak it: `GrpcServer` answers GRPCInferenceService.

The calls are in `kserve.proto`, what a request may hold in `requests.py`. The event loop is that of the HTTP server,
and so are the doors: a request takes a place, those in a stream one each, or is refused as over HTTP. A call that is
cancelled, lost or past its deadline frees its slots and pages. Of a stream, requests are answered side by side; whoever
does not read holds up nobody else, and is given up.

All calls are served as streams of requests, those with one request too: gRPC would read its message before it asked us,
of any size, for as long as it takes. So nothing is read of a call without a key, of one that is refused, of a probe.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError

from serve.kserve import requests as kserve
from serve.kserve import tensors
from serve.kserve.answers import Response, answer
from serve.kserve.messages import Messages, Rpc, messages
from serve.operation.bodies import aside
from serve.operation.guards import MAY_PASS, RETRY_SECONDS, Limits, Operation
from serve.operation.health import Health, Starting
from serve.operation.refusal import Refusal
from serve.operation.request_log import MAX_PROMPT_BYTES, Facts, new_id, note, recorded, sane_id

MAX_CALLS = 1000  # at once beside those that the doors let in, such as open streams; more get RESOURCE_EXHAUSTED
MAX_IN_STREAM = 64  # requests of one stream that are answered at once; the next one is read when one of them is over
_MAX_DETAILS = 2000  # bytes: gRPC sends them in a header, up to three times as long, and clients take 8 KiB of it
_START_SECONDS = 30.0
_PING_SECONDS, _PONG_SECONDS = 60.0, 20.0
"""A client with an open call is pinged when it has said nothing for so long, and given up without an answer."""
_IDLE_SECONDS = 300.0
"""After so long without a call a connection is ended; clients connect again when they need to."""
_STOP_SECONDS = 1.0  # for responses that are complete to be sent

log = logging.getLogger("serve")

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
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
_PROBES = ("ServerLive", "ServerReady")  # they have no key
_BEFORE_MODEL = (*_PROBES, "ModelReady")  # what is answered while it is not there


class Front(NamedTuple):
    """What all calls share."""

    app: Callable[[], Any]
    """What answers over HTTP now: `Starting`, or an application of `serve.openai`, whose state the calls go by."""
    api_keys: tuple[str, ...]
    """One of them is needed; none: no key is."""
    operation: Operation

    def health(self) -> Health:
        """How the server is."""
        app = self.app()
        return app.health() if isinstance(app, Starting) else app.state.health()

    def state(self) -> Any:
        """With `served`, `doors` and `metrics`. Raises Refusal while the model is not there."""
        app = self.app()
        if isinstance(app, Starting):
            raise app.refusal()
        return app.state

    def on_end(self, facts: Facts) -> None:
        """Counts a request that is over, once there is somewhere to."""
        app = self.app()
        if not isinstance(app, Starting):
            app.state.metrics.called(facts)


class GrpcServer:
    """A server that answers in an event loop. `close` it while that runs; the pipeline behind it stays open."""

    def __init__(self, front: Front, *, loop: asyncio.AbstractEventLoop, host: str, port: int):
        """Answers at `address` when this returns; loop: runs, in another thread, and is the one of the doors.

        Raises ValueError where the port cannot be taken.
        """
        if not all(key.isascii() and key.isprintable() for key in front.api_keys):
            raise ValueError("an API key has characters that gRPC cannot carry; choose one of printable ASCII")
        self._front, self._loop, self._leaving = front, loop, asyncio.Event()
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self._server = asyncio.run_coroutine_threadsafe(self._started(), loop).result(_START_SECONDS)
        except TimeoutError as error:
            raise RuntimeError(f"the gRPC server at {self.address} did not start in {_START_SECONDS:g} s") from error
        except Exception as error:
            raise ValueError(f"{self.address} cannot be taken for gRPC ({error}); give another port") from error

    def leave(self) -> None:
        """Reads no more of the streams that are open: each ends when its requests are answered. Returns at once."""
        self._loop.call_soon_threadsafe(self._leaving.set)

    def close(self) -> None:
        """Ends what still runs, and frees the port."""
        stopped = asyncio.run_coroutine_threadsafe(self._server.stop(_STOP_SECONDS), self._loop)
        with contextlib.suppress(TimeoutError):
            stopped.result(_START_SECONDS)

    async def _started(self) -> grpc.aio.Server:
        limits = self._front.operation.limits
        sizes = ("grpc.max_receive_message_length", limits.body_bytes), ("grpc.max_send_message_length", -1)
        waits = {
            "grpc.keepalive_time_ms": _PING_SECONDS,
            "grpc.keepalive_timeout_ms": _PONG_SECONDS,
            "grpc.http2.ping_timeout_ms": _PONG_SECONDS,  # which is what gRPC goes by, in spite of the one above
            "grpc.max_connection_idle_ms": _IDLE_SECONDS,
        }
        times = [(name, int(seconds * 1000)) for name, seconds in waits.items()]
        # Else a second server might share the port with this one, and each get some of the requests.
        options = (*sizes, *times, ("grpc.so_reuseport", 0))
        most = MAX_CALLS + limits.max_running + limits.max_waiting
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=most)
        server.add_generic_rpc_handlers((_handlers(self._front, self._leaving),))
        server.add_insecure_port(self.address)
        await server.start()
        return server


def _handlers(front: Front, leaving: asyncio.Event) -> grpc.GenericRpcHandler:
    found = messages()
    methods: dict[str, Callable] = {
        "ServerLive": lambda request: {"live": front.health().is_live},
        "ServerReady": lambda request: {"ready": front.health().is_ready},
        "ModelReady": lambda request: {"ready": front.health().is_ready and _is_served(request, front.state().served)},
        "ServerMetadata": lambda request: kserve.server_metadata(),
        "ModelMetadata": lambda request: kserve.model_metadata(_name(request, front.state().served)),
        "ModelConfig": lambda request: {"config": kserve.model_config(_name(request, front.state().served))},
        "RepositoryIndex": lambda request: {"models": _index(request, front.state().served)},
    }
    handlers = {}
    for rpc in found.rpcs:
        sent = {"response_serializer": rpc.response.SerializeToString}
        if rpc.streams:
            handler = partial(_stream, rpc.name, front=front, found=found, leaving=leaving)
            read = {"request_deserializer": rpc.request.FromString}
            handlers[rpc.name] = grpc.stream_stream_rpc_method_handler(handler, **read, **sent)
            continue
        if rpc.name in _PROBES:
            answered = partial(_told_of_server, methods[rpc.name], rpc.response)
        elif rpc.name in methods:
            answered = partial(_told, methods[rpc.name], rpc)
        else:
            answered = partial(_infer, rpc, front=front, found=found)
        handlers[rpc.name] = grpc.stream_unary_rpc_method_handler(_one(rpc.name, answered, front), **sent)
    for name, why in _NOT_DONE.items():
        answered = partial(_not_done, f"{name} is not answered here: {why}")
        handlers[name] = grpc.stream_unary_rpc_method_handler(_one(name, answered, front))
    return grpc.method_handlers_generic_handler(found.service, handlers)


Read = Callable[[Rpc], Awaitable[Any]]
"""Reads the message of a call. Raises Refusal where none comes in time, or one that is none."""


def _one(name: str, answered: Callable[[Read], Awaitable[Any]], front: Front) -> Callable:
    """The handler of a call with one request and one response."""

    async def handle(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        facts = _facts(name, context)

        async def opened() -> Any:
            if name not in _PROBES:
                _check_key(context, front)
            if name not in _BEFORE_MODEL:
                front.state()
            return await answered(partial(_read, messages, limits=front.operation.limits))

        context.set_trailing_metadata((("x-request-id", facts.request),))
        with recorded(facts, front.on_end, is_polled=name in _PROBES):
            response, refusal = await _outcome(opened(), facts)
        if refusal is not None:
            await _abort(context, facts, refusal)
        return response

    return handle


async def _read(messages: AsyncIterator[bytes], rpc: Rpc, *, limits: Limits) -> Any:
    try:
        async with asyncio.timeout(limits.body_seconds):
            data = await anext(messages, None)
    except TimeoutError:
        what = f"the message did not come in within {limits.body_seconds:g} seconds; send it faster, or less"
        raise Refusal(what, status=408) from None
    if data is None:  # or the client has gone; of a message that is too large gRPC has told it
        note(outcome="no message")
        raise Refusal(f"{rpc.name} has no message, or one of more than {limits.body_bytes} bytes; send one")
    try:
        return rpc.request.FromString(data)
    except DecodeError as error:
        raise Refusal(f"the message of {len(data)} bytes is no {rpc.request.DESCRIPTOR.name}: {error}") from error


def _facts(name: str, context: grpc.aio.ServicerContext) -> Facts:
    given = _metadata(context).get("x-request-id", "")
    return Facts(sane_id(given if isinstance(given, str) else "") or new_id(), "gRPC", name)


def _metadata(context: grpc.aio.ServicerContext) -> dict[str, str | bytes]:
    return dict(context.invocation_metadata() or ())


async def _outcome(work: Awaitable[Any], facts: Facts) -> tuple[Any, Refusal | None]:
    """What comes of a request, or why it is refused; notes its code."""
    try:
        response = await work
    except Refusal as error:
        refusal = error
    except asyncio.CancelledError:
        facts.status, facts.outcome = grpc.StatusCode.CANCELLED.name, "client gone"
        raise
    except Exception as error:
        log.exception("a call failed")
        refusal = Refusal(f"the server failed: {type(error).__name__}", status=500)
    else:
        facts.status = grpc.StatusCode.OK.name
        return response, None
    facts.status = _code(refusal).name
    return None, refusal


def _code(refusal: Refusal) -> grpc.StatusCode:
    return _CODES.get(refusal.status, grpc.StatusCode.INTERNAL)


async def _abort(context: grpc.aio.ServicerContext, facts: Facts, refusal: Refusal) -> None:
    more = (("retry-after", str(RETRY_SECONDS)),) if refusal.status in MAY_PASS else ()
    await context.abort(_code(refusal), _details(refusal.message), (("x-request-id", facts.request), *more))


def _check_key(context: grpc.aio.ServicerContext, front: Front) -> None:
    given = _metadata(context).get("authorization", "")
    kserve.check_key(given if isinstance(given, bytes) else given.encode(), front.api_keys)


def _details(message: str) -> str:
    """The message as gRPC can carry it, which takes no half characters that a client's JSON may have held."""
    return message.encode(errors="replace")[:_MAX_DETAILS].decode(errors="ignore")


async def _told_of_server(tell: Callable[[None], Mapping], response: Any, read: Read) -> Any:
    return json_format.ParseDict(tell(None), response())


async def _told(tell: Callable[[Any], Mapping], rpc: Rpc, read: Read) -> Any:
    return json_format.ParseDict(tell(await read(rpc)), rpc.response())


async def _not_done(why: str, read: Read) -> None:
    raise Refusal(why, status=501)


def _name(request: Any, served: kserve.Served) -> str:
    kserve.check_model(request.name, request.version, served)
    return request.name


def _is_served(request: Any, served: kserve.Served) -> bool:
    """Of a model that is not there it is False, as Triton has it: who waits for an adapter asks again."""
    try:
        kserve.check_model(request.name, request.version, served)
    except Refusal:
        return False
    return True


def _index(request: Any, served: kserve.Served) -> list[dict[str, str]]:
    if request.repository_name:
        raise Refusal(f"there is one repository, without a name; given {request.repository_name!r:.100}")
    return kserve.repository_index(served, only_ready=request.ready)


def _note_prompt(request: Any, front: Front) -> None:
    if front.operation.log_prompts:
        note(text=str(request)[:MAX_PROMPT_BYTES])


async def _infer(rpc: Rpc, read: Read, *, front: Front, found: Messages) -> Any:
    state = front.state()
    with state.doors.inside():
        request = await read(rpc)
        _note_prompt(request, front)

        async def answered() -> Response:
            return await answer(await _job(request, state.served, may_stream=False))

        message = _response(await state.doors.placed(answered), found)
    message.parameters.clear()  # there is one response: nobody asks whether it is the last
    return message


async def _stream(
    name: str,
    requests: AsyncIterator,
    context: grpc.aio.ServicerContext,
    *,
    front: Front,
    found: Messages,
    leaving: asyncio.Event,
) -> None:
    """Answers ModelStreamInfer. What is counted and logged are its requests; the call itself, where it is refused."""
    facts = _facts(name, context)
    context.set_trailing_metadata((("x-request-id", facts.request),))
    try:
        _check_key(context, front)
        front.state()
    except Refusal as refusal:
        with recorded(facts, front.on_end, is_polled=False):
            facts.status = _code(refusal).name
        await _abort(context, facts, refusal)
    stream = _Stream(facts, context, front, found)
    await stream.answer(requests, leaving)
    if stream.is_stuck:
        seconds = front.operation.limits.send_seconds
        what = f"the client has not read for {seconds:g} seconds; read what is asked for, or ask for less at once"
        await _abort(context, facts, Refusal(what, status=504))


class _Stream:
    """An open stream: its requests are answered side by side, an error is a response, and the stream goes on."""

    def __init__(self, facts: Facts, context: grpc.aio.ServicerContext, front: Front, found: Messages):
        self._facts, self._context, self._front, self._found = facts, context, front, found
        self._state = front.state()
        self._room, self._writing = asyncio.Semaphore(MAX_IN_STREAM), asyncio.Lock()
        self._left = asyncio.Event()
        """When nobody reads any more."""
        self.is_stuck = False
        """Whether the client is there and does not read."""

    async def answer(self, requests: AsyncIterator, leaving: asyncio.Event) -> None:
        """Answers all requests until the stream ends, the server leaves or nobody reads."""
        async with asyncio.TaskGroup() as responding:
            async for request in _until(requests, leaving, self._left):
                await self._room.acquire()
                responding.create_task(self._respond(request))

    async def _respond(self, request: Any) -> None:
        facts = Facts(self._facts.request, self._facts.method, self._facts.route)

        async def answered() -> None:
            job = await _job(request, self._state.served, may_stream=True)
            await self._send(await answer(job, send=self._send))

        async def inside() -> None:
            with self._state.doors.inside():
                await self._state.doors.placed(answered)

        try:
            with recorded(facts, self._front.on_end, is_polled=False):
                _note_prompt(request, self._front)
                _, refusal = await _outcome(inside(), facts)
                if self._left.is_set():  # which is why it was refused, if it was
                    facts.status = grpc.StatusCode.CANCELLED.name
                    facts.outcome = "client does not read" if self.is_stuck else "client gone"
                elif refusal is not None:
                    failed = _response(Response(request.model_name, request.id, [], is_last=True), self._found)
                    envelope = self._found.types["ModelStreamInferResponse"]
                    await self._write(envelope(error_message=_details(refusal.message), infer_response=failed))
        finally:
            self._room.release()

    async def _send(self, response: Response) -> None:
        envelope = self._found.types["ModelStreamInferResponse"]
        await self._write(envelope(infer_response=_response(response, self._found)))

    async def _write(self, message: Any) -> None:
        """Sends a message. Cancels who sends where nobody reads it."""
        async with self._writing:
            if self._left.is_set():
                raise asyncio.CancelledError
            try:
                async with asyncio.timeout(self._front.operation.limits.send_seconds):
                    await self._context.write(message)
            except (TimeoutError, grpc.aio.BaseError) as error:
                # Else it has gone, and the call is about to be cancelled.
                self.is_stuck = isinstance(error, TimeoutError)
                self._left.set()
                raise asyncio.CancelledError from error


async def _until(requests: AsyncIterator, *ends: asyncio.Event) -> AsyncIterator[Any]:
    """The requests of a stream, until it ends or one of the events comes."""
    ended = [asyncio.ensure_future(event.wait()) for event in ends]
    reading = None
    try:
        while True:
            reading = asyncio.ensure_future(anext(requests, None))
            await asyncio.wait({reading, *ended}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done() or (request := reading.result()) is None:
                return
            yield request
    finally:
        for task in (*ended, reading):
            task.cancel()
        await asyncio.gather(*ended, reading, return_exceptions=True)


async def _job(message: Any, served: kserve.Served, *, may_stream: bool) -> kserve.Job:
    """What a message asks for. Raises Refusal for what is not honoured."""
    return await aside(message.ByteSize(), lambda: kserve.job_of(_request(message), served, may_stream=may_stream))


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
