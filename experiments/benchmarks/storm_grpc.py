"""Calls of gRPC for `experiments.benchmarks.storm`: KServe's ModelInfer and ModelStreamInfer, ended or cancelled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc

from experiments.benchmarks.storm_client import Exchange
from serve.kserve.messages import messages

_DECLARED = (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_FIELDS = {"BYTES": "bytes_contents", "INT32": "int_contents", "FP32": "fp32_contents"}


def open_channel(address: str) -> Any:
    return grpc.aio.insecure_channel(address)


async def call(asked: Exchange, channel: Any, *, seconds: float) -> str:
    """How a call ended: "ok", "busy", "cancelled", "hung", or "fault: ..."."""
    found = messages()
    (rpc,) = (each for each in found.rpcs if each.name == asked.path)
    body = json.loads(asked.body)
    request = found.types["ModelInferRequest"](model_name=body["model"])
    for name, datatype, values in body["inputs"]:
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[len(values)])
        given = [value.encode() for value in values] if datatype == "BYTES" else values
        getattr(tensor.contents, _FIELDS[datatype]).extend(given)
    path = f"/{found.service}/{rpc.name}"
    how = {"request_serializer": type(request).SerializeToString, "response_deserializer": rpc.response.FromString}
    if rpc.streams:
        started = channel.stream_stream(path, **how)(iter([request]))
    else:
        started = channel.unary_unary(path, **how)(request)
    try:
        async with asyncio.timeout(seconds):
            if asked.leaves is not None:
                await asyncio.sleep(0.1 * asked.when if asked.leaves != "head" else 0)
                started.cancel()
            if not rpc.streams:
                answer = await started
                return "ok" if answer.outputs else "fault: an answer without outputs"
            count = 0
            async for response in started:
                if response.error_message:
                    is_busy = response.error_message.startswith("the server is busy")
                    return "busy" if is_busy else f"fault: {response.error_message:.200}"
                count += 1
            return "ok" if count else "fault: a stream without an answer"
    except TimeoutError:
        started.cancel()
        return "hung"
    except asyncio.CancelledError:
        if asked.leaves is None:
            raise
        return "cancelled"
    except grpc.RpcError as error:
        code = error.code()
        if code is grpc.StatusCode.CANCELLED and asked.leaves is not None:
            return "cancelled"
        return "busy" if code in _DECLARED else f"fault: {code.name}: {error.details()!r:.200}"
