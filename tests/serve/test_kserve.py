"""The KServe v2 protocol, asked by Triton's own clients over real sockets; the engine answers from a script."""

import asyncio
import contextlib
import gzip
import itertools
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor, serialize_byte_tensor

from internjax.decode.device import Compiled
from internjax.text.chat import render
from internjax.text.message import Message
from serve import __main__ as command
from serve import server as serving
from serve.kserve import grpc as front
from serve.kserve.messages import messages, read_proto
from serve.kserve.requests import INPUTS, ONLY_IF_ASKED, OUTPUTS, SAMPLING
from serve.kserve.routes import HEADER_LENGTH
from serve.kserve.tensors import Tensor, from_raw, from_values, raw_of
from serve.openai import create_app
from serve.operation.guards import Limits, Operation
from serve.operation.health import Starting
from serve.operation.refusal import Refusal
from serve.operation.request_log import JSONLines
from serve.pipeline import Pipeline
from serve.server import start_server, take_grpc_port, take_port
from tests.serve.conftest import ScriptedEngine

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = "The answer is 6, héllo 你好."
CALL = '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1}}<|action_end|><|im_end|>'
USER = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
DTYPES = {"BYTES": object, "BOOL": "?", "INT32": "i4", "INT64": "i8", "FP32": "f4", "FP64": "f8"}


@pytest.fixture(scope="module")
def running(tokenizer):
    """A server with both fronts, over an engine whose script each test may change."""
    pipeline = Pipeline.over(ScriptedEngine(None), tokenizer)
    with start_server(pipeline, model_name="tiny", grpc_port=0, drain_seconds=1) as server:
        yield server, pipeline


@pytest.fixture
def engine(running, tokenizer):
    """The engine of the server, saying TEXT."""
    engine = running[1].engine
    engine.__init__(lambda request: [*tokenizer.encode(TEXT), tokenizer.eos_id])
    engine.adapters = ("terse/1",)
    yield engine
    engine.__init__(None)


@pytest.fixture(scope="module")
def over_grpc(running):
    with tritonclient.grpc.InferenceServerClient(running[0].grpc_address) as client:
        yield client


@pytest.fixture(scope="module")
def over_http(running):
    with tritonclient.http.InferenceServerClient(running[0].url.removeprefix("http://")) as client:
        yield client


@pytest.fixture(params=["grpc", "http"])
def client(request):
    return request.getfixturevalue(f"over_{request.param}")


def package_of(client):
    return tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc


def inputs_of(client, asked: dict, **how) -> list:
    """Inputs by name: a list, of the datatype that the model tells, or (list, datatype)."""
    found = []
    for name, given_ in asked.items():
        values, datatype = given_ if isinstance(given_, tuple) else (given_, INPUTS[name].datatype)
        array = np.array(values, DTYPES[datatype])
        found.append(package_of(client).InferInput(name, [*array.shape], datatype))
        found[-1].set_data_from_numpy(array, **how)
    return found


def ask(client, asked: dict, *outputs: str, model="tiny", **how) -> dict:
    """The outputs by name, as nested lists."""
    wanted = [package_of(client).InferRequestedOutput(name) for name in outputs] or None
    result = client.infer(model, inputs_of(client, asked), outputs=wanted, **how)
    response = result.get_response()
    told = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [each["name"] if isinstance(each, dict) else each.name for each in told]
    return {name: result.as_numpy(name).tolist() for name in names}


def status_of(error: InferenceServerException) -> str:
    return error.status().removeprefix("StatusCode.")


def test_the_messages_are_those_of_triton():
    """Every message, field, number and type; both definitions live in one process, whichever came first."""

    def check(ours, theirs):
        for field in ours.fields:
            other = theirs.fields_by_number[field.number]
            for what in ("name", "type", "is_repeated", "json_name"):
                assert getattr(field, what) == getattr(other, what), field.full_name
            names = [each.containing_oneof and each.containing_oneof.name for each in (field, other)]
            assert names[0] == names[1], field.full_name
            if field.message_type:
                assert field.message_type.GetOptions().map_entry == other.message_type.GetOptions().map_entry
                check(field.message_type, other.message_type)
            for value in field.enum_type.values if field.enum_type else ():
                assert other.enum_type.values_by_name[value.name].number == value.number

    found = messages()
    for name, own in found.types.items():
        check(own.DESCRIPTOR, getattr(service_pb2 if hasattr(service_pb2, name) else model_config_pb2, name).DESCRIPTOR)
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert service.full_name == found.service
    for rpc in found.rpcs:
        theirs = service.methods_by_name[rpc.name]
        assert (rpc.request.DESCRIPTOR.full_name, rpc.response.DESCRIPTOR.full_name) == (
            theirs.input_type.full_name,
            theirs.output_type.full_name,
        )
        assert rpc.streams == theirs.client_streaming == theirs.server_streaming
    assert found.types["ModelInferRequest"].DESCRIPTOR is not service_pb2.ModelInferRequest.DESCRIPTOR
    ours_first = "from serve.kserve.messages import messages; messages(); from tritonclient.grpc import service_pb2"
    subprocess.run([sys.executable, "-c", ours_first], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    "text",
    [
        'syntax = "proto2"; package a;',
        'syntax = "proto3"; package a; extend B { int32 c = 1; }',
        'syntax = "proto3"; package a; message B { required int32 c = 1; }',
        'syntax = "proto3"; package a; message B { map<int32, C> c = 1; }',
        'syntax = "proto3"; package a; message B { int32 c = 1 [deprecated = true]; }',
    ],
)
def test_what_the_reader_of_messages_does_not_know_is_refused(text):
    with pytest.raises(ValueError, match="kserve.proto"):
        read_proto(text)


def test_what_is_served(engine, over_grpc, over_http):
    for client in (over_grpc, over_http):
        assert client.is_server_live() and client.is_server_ready()
        known = [client.is_model_ready(name) for name in ("tiny", "terse/1", "other")]
        assert known == [True, True, False] and client.is_model_ready("tiny", "1")
        assert not client.is_model_ready("tiny", "2")
    told = over_grpc.get_server_metadata(as_json=True)
    assert told == over_http.get_server_metadata() and told["name"] == "internjax"
    metadata = over_http.get_model_metadata("tiny")
    assert metadata == over_http.get_model_metadata("tiny", "1")
    for part, kinds in (("inputs", INPUTS), ("outputs", OUTPUTS)):
        assert {each["name"]: (each["datatype"], tuple(each["shape"])) for each in metadata[part]} == {
            name: (kind.datatype, kind.shape) for name, kind in kinds.items()
        }
    over = over_grpc.get_model_metadata("terse/1")
    assert [(t.name, t.datatype, [*t.shape]) for t in over.inputs] == [(*t.values(),) for t in metadata["inputs"]]
    config, over = over_http.get_model_config("tiny"), over_grpc.get_model_config("tiny").config
    assert config["model_transaction_policy"]["decoupled"] and over.model_transaction_policy.decoupled
    assert {n: p["string_value"] for n, p in config["parameters"].items()} == {
        n: p.string_value for n, p in over.parameters.items()
    }
    assert {*config["parameters"]} == {*INPUTS, *OUTPUTS} and all(each["optional"] for each in config["input"])
    assert [m["name"] for m in over_http.get_model_repository_index()] == ["tiny", "terse/1"]
    assert [m.state for m in over_grpc.get_model_repository_index().models] == ["READY"] * 2


def test_an_engine_that_failed_or_hangs_is_neither_ready_nor_live(engine, client, running):
    """As /ready and /live have it."""

    def told() -> list[bool]:
        over_rest = [httpx.get(f"{running[0].url}/{path}").status_code == 200 for path in ("ready", "live")]
        assert over_rest == [client.is_server_ready(), client.is_server_live()]
        assert over_rest[0] == client.is_model_ready("tiny")
        return over_rest

    def state() -> str:
        index = client.get_model_repository_index()
        return str(index[0] if isinstance(index, list) else index.models[0])

    assert told() == [True, True]
    engine.silent = 1000.0
    assert told() == [False, False] and "not gone on with it for 1000 seconds" in state()
    engine.silent, engine.fault = 0.0, "out of memory"
    assert told() == [False, False] and "out of memory" in state()
    with pytest.raises(InferenceServerException, match="out of memory") as caught:
        ask(client, {"text_input": ["x"]})
    assert status_of(caught.value) in ("UNAVAILABLE", "503")


def test_one_text(engine, client, tokenizer):
    answer = ask(client, {"text_input": ["say"], "max_tokens": [99]}, request_id="a")
    ids = tokenizer.encode(TEXT)
    counts = {"num_prompt_tokens": [1 + len(tokenizer.encode("say"))], "num_generated_tokens": [len(ids) + 1]}
    words = {"text_output": [TEXT.encode()], "finish_reason": [b"stop"], "tool_calls": [b"[]"]}
    assert answer == words | counts and {*answer} == {*OUTPUTS} - {*ONLY_IF_ASKED}
    ask(client, {"text_input": ["say"]})
    assert [request.max_new_tokens for request in engine.requests] == [99, 16]


def test_many_texts_each_with_its_own_sampling(engine, client, tokenizer):
    asked = {"text_input": [["one"], ["two"], ["3"]], "max_tokens": [2, 99, 3], "temperature": [0.5], "seed": [[7]]}
    answer = ask(client, asked, "num_generated_tokens", "text_output", "output_ids", "logprobs")
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    assert [*answer] == ["num_generated_tokens", "text_output", "output_ids", "logprobs"]
    assert answer["num_generated_tokens"] == [[2], [len(ids)], [3]]  # the shape of the prompts
    assert answer["text_output"][1] == [TEXT.encode()]
    assert answer["output_ids"] == [(ids[:n] + [-1] * len(ids))[: len(ids)] for n in (2, len(ids), 3)]
    (logprobs,) = answer["logprobs"][2]
    assert json.loads(logprobs)["token_logprobs"] == pytest.approx([-token_id / 1000 for token_id in ids[:3]])
    sampling = [request.sampling for request in engine.requests]
    assert [(each.temperature, each.seed) for each in sampling] == [(0.5, 7)] * 3
    assert {request.tokens for request in engine.requests} == {
        (1, *tokenizer.encode(text)) for text in ("one", "two", "3")
    }


def test_token_ids(engine, client):
    for datatype, more in (("INT64", {}), ("INT32", {"input_lengths": [1, 3]})):
        ask(client, {"input_ids": ([[5, 6, 7], [8, 9, 10]], datatype)} | more)
    found = [sorted(request.tokens for request in pair) for pair in (engine.requests[:2], engine.requests[2:])]
    assert found == [[(5, 6, 7), (8, 9, 10)], [(5,), (8, 9, 10)]]


def test_a_conversation_with_a_tool_call(engine, client, tokenizer):
    engine.script = lambda request: tokenizer.encode(CALL, allow_special=True)
    asked = {"messages": [json.dumps(USER)], "tools": [json.dumps([ADD])]}
    answers = [ask(client, asked) for _ in range(2)]
    calls, others = (json.loads(answer["tool_calls"][0]) for answer in answers)
    assert answers[0]["finish_reason"] == [b"tool_calls"] and calls[0]["id"] != others[0]["id"]
    assert calls[0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    ask(client, {"messages": [json.dumps(USER)], "max_tokens": [3]}, "logprobs")
    last = engine.requests[-1]
    assert [*last.tokens] == render([Message("user", "hi")], tokenizer, add_generation_prompt=True).ids
    assert (last.logprobs, last.max_new_tokens) == (0, 3)


def test_every_sampling_input_reaches_the_engine(engine, client):
    asked = {"min_p": 0.25, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": -0.5}
    asked |= {"top_p": 0.5, "top_k": 4, "min_tokens": 2, "temperature": 0.5, "seed": 9}
    other = {"max_tokens": [8], "ignore_eos": [True], "stop": ["zz", "yy"]}
    assert {*asked, *other} - {"stop"} == {*SAMPLING}
    ask(client, {"text_input": ["x"]} | {name: [value] for name, value in asked.items()} | other)
    ask(client, {"text_input": ["x"], "sampling_parameters": [json.dumps(asked)]} | other)
    ask(client, {"text_input": ["x"]} | other, parameters=asked)
    names = {"min_tokens": "min_new_tokens"}
    for request in engine.requests:
        assert {name: getattr(request.sampling, names.get(name, name)) for name in asked} == asked
        assert (request.max_new_tokens, request.stop_ids) == (8, ())
    assert engine.requests[0] == engine.requests[1] == engine.requests[2]


def test_stop_strings_and_the_prompt_before_the_answer(engine, client):
    asked = {"text_input": ["say: "], "stop": [" is 6, h"], "exclude_input_in_output": [False]}
    assert ask(client, asked)["text_output"] == [b"say: The answer"]
    assert not engine.active


def test_an_adapter_is_a_model(engine, client):
    ask(client, {"text_input": ["x"]}, model="terse/1", model_version="1")
    ask(client, {"text_input": ["x"]})
    assert [request.adapter for request in engine.requests] == ["terse/1", None]


BAD = {
    "no prompt": ({"max_tokens": [1]}, "text_input, input_ids and messages none"),
    "two prompts": ({"input_ids": [[1]]}, "text_input and input_ids are given"),
    "no text": ({"text_input": np.zeros((0,))}, "shape [0]"),
    "a cube of texts": ({"text_input": [[["x"]]]}, "shape [1, 1, 1]; [n] or [n, 1]"),
    "texts in rows": ({"text_input": [["x", "y"]]}, "shape [1, 2]"),
    "ids in a row": ({"text_input": None, "input_ids": [1, 2]}, "shape [2]; [prompts, tokens]"),
    "an id that is none": ({"text_input": None, "input_ids": [[1, 340]]}, "token id 340 does not exist"),
    "a negative id": ({"text_input": None, "input_ids": [[-1]]}, "-1"),
    "lengths of nothing": ({"input_lengths": [1]}, "input_lengths is given without input_ids"),
    "wrong lengths": ({"text_input": None, "input_ids": [[1]], "input_lengths": [2]}, "in 1..1 for each of 1 rows"),
    "tools for a text": ({"tools": ["[]"]}, "tools is given without messages"),
    "too many prompts": ({"text_input": ["x"] * 513}, "more than 512"),
    "a number as text": ({"text_input": ([1.0], "FP32")}, "datatype FP32; BYTES is wanted"),
    "a float as a count": ({"max_tokens": ([1.0], "FP32")}, "FP32; INT32 or INT64 or UINT32 or UINT64 is wanted"),
    "a count too many": ({"max_tokens": [1, 2]}, "shape [2]; [1] is wanted"),
    "no count": ({"max_tokens": np.zeros((0,))}, "max_tokens has the shape [0]"),
    "a count out of range": ({"max_tokens": [-1]}, "max_tokens: Input should be greater than or equal to 0; given -1"),
    "no token": ({"max_tokens": [0]}, "max_tokens is 0"),
    "a temperature out of range": ({"temperature": [-0.5]}, "given -0.5"),
    "no number": ({"temperature": [float("nan")]}, "temperature"),
    "an empty stop string": ({"stop": [""]}, "stop"),
    "bytes that are no text": ({"text_input": [b"\xff"]}, "no UTF-8"),
    "several streams": ({"stream": [True, False]}, "stream has the shape [2]; one value"),
    "a prompt before the turn": (
        {"text_input": None, "messages": [json.dumps(USER)], "exclude_input_in_output": [False]},
        "exclude_input_in_output is false with messages",
    ),
    "no JSON": ({"sampling_parameters": ["{"]}, "sampling_parameters is not JSON"),
    "deep JSON": ({"text_input": None, "messages": ["[" * 100_000]}, "messages is not JSON"),
    "a list of parameters": ({"sampling_parameters": ["[]"]}, "must be an object in JSON, given '[]'"),
    "an unknown parameter": ({"sampling_parameters": ['{"colour": 1}']}, "no sampling parameter 'colour'; there are"),
    "a prompt as parameter": ({"sampling_parameters": ['{"n": 2}']}, "n cannot be a sampling parameter"),
    "the same twice": ({"max_tokens": [1], "sampling_parameters": ['{"max_tokens": 1}']}, "max_tokens is given twice"),
    "log-probabilities that are not told": ({"sampling_parameters": ['{"logprobs": 1}']}, "logprobs is not asked for"),
    "too many stop ids": (
        {"sampling_parameters": [json.dumps({"stop_token_ids": [*range(9, 30)]})]},
        "stop_token_ids: 23 stop ids given",
    ),
    "a message that is none": ({"text_input": None, "messages": ["[5]"]}, "messages.0"),
    "half a character": (
        {"text_input": None, "messages": ['[{"role": "robot", "content": "\\ud800"}]']},
        "messages.0.role",
    ),
    "an image": (
        {"text_input": None, "messages": ['[{"role": "user", "content": [{"type": "image_url"}]}]']},
        "only text parts can",
    ),
    "longer than the context": (
        {"text_input": None, "input_ids": [[5] * 1020], "max_tokens": [5]},
        "holds 1024 tokens; the prompt has 1020 and 5 are asked for",
    ),
}


@pytest.fixture
def refusing(engine):
    """The engine, which no request may be left in: most do not reach it."""
    from internjax.decode.request import check_options

    submit = engine.submit

    def checked(request):
        check_options(request, engine.limits, vocab_size=340)
        return submit(request)

    engine.submit = checked
    yield engine
    del engine.submit
    assert not engine.active


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused(refusing, client, case):
    asked, said = BAD[case]
    asked = {"text_input": ["x"]} | asked if case != "no prompt" else asked
    with pytest.raises(InferenceServerException) as caught:
        ask(client, {name: value for name, value in asked.items() if value is not None})
    assert status_of(caught.value) in ("INVALID_ARGUMENT", "400")
    assert said in caught.value.message()
    assert refusing.requests == []


def test_names_and_parameters_that_are_not_known_are_refused(refusing, client):
    package = package_of(client)
    named = package.InferInput("text", [1], "BYTES")
    named.set_data_from_numpy(np.array(["x"], object))
    prompt = inputs_of(client, {"text_input": ["x"]})
    shared = package.InferInput("text_input", [1], "BYTES")
    shared.set_shared_memory("region", 8)
    classes = [package.InferRequestedOutput("text_output", class_count=2)]
    outputs = [package.InferRequestedOutput(name) for name in ("text", "text_output", "text_output")]
    for inputs, how, said in (
        ([named], {}, "there is no input 'text'; there are text_input"),
        (prompt * 2, {}, "text_input is given twice"),
        ([shared], {}, "shared_memory_byte_size"),
        (prompt, {"outputs": outputs[:1]}, "there is no output 'text'; there are text_output"),
        (prompt, {"outputs": outputs[1:]}, "text_output is asked for twice"),
        (prompt, {"outputs": classes}, "classification"),
        (prompt, {"sequence_id": 5}, "sequence_id is refused"),
        (prompt, {"priority": 1}, "priority is refused"),
        (prompt, {"timeout": -1}, "timeout"),
        (prompt, {"parameters": {"colour": 1}}, "no sampling parameter 'colour'"),
        (inputs_of(client, {"text_input": ["x"], "stream": [True]}), {}, "only ModelStreamInfer"),
    ):
        with pytest.raises(InferenceServerException) as caught:
            client.infer("tiny", inputs, **how)
        assert status_of(caught.value) in ("INVALID_ARGUMENT", "400")
        assert said in caught.value.message()
    for model, version in (("other", ""), ("tiny", "2")):
        with pytest.raises(InferenceServerException, match="is not") as caught:
            client.infer(model, prompt, model_version=version)
        assert status_of(caught.value) in ("NOT_FOUND", "404")
    with pytest.raises(InferenceServerException, match="the server's log") as caught:
        client.get_inference_statistics("tiny")
    assert status_of(caught.value) in ("UNIMPLEMENTED", "501")
    assert refusing.requests == []


BAD_BODIES = {
    "no JSON": (b"{", {}, "the body is not JSON"),
    "no object": (b"[]", {}, "must be an object"),
    "an unknown field": (b'{"input": []}', {}, "unknown fields input; known are"),
    "inputs in no list": (b'{"inputs": {}}', {}, "inputs must be a JSON list"),
    "no name": (b'{"inputs": [{"shape": [1]}]}', {}, "needs a name"),
    "no shape": (b'{"inputs": [{"name": "a", "datatype": "BYTES", "data": []}]}', {}, "needs a shape"),
    "no datatype": (b'{"inputs": [{"name": "a", "shape": [1]}]}', {}, "needs a datatype"),
    "a datatype that is none": (b'{"inputs": [{"name": "a", "shape": [1], "datatype": "X", "data": [1]}]}', {}, "'X'"),
    "no data": (b'{"inputs": [{"name": "a", "shape": [1], "datatype": "BOOL"}]}', {}, "either data or binary"),
    "a size past the end": (
        b'{"inputs": [{"name": "a", "shape": [1], "datatype": "BOOL", "parameters": {"binary_data_size": 1}}]}',
        {},
        "0 bytes are left",
    ),
    "bytes of no input": (b"{}xx", {HEADER_LENGTH: "2"}, "2 bytes follow the JSON"),
    "a header past the end": (b"{}", {HEADER_LENGTH: "3"}, "a number up to the body's 2 bytes"),
    "a header that is no number": (b"{}", {HEADER_LENGTH: "-1"}, "is '-1'"),
    "a header of a long number": (b"{}", {HEADER_LENGTH: "9" * 5000}, "a number up to the body's 2 bytes"),
    "no gzip": (b"{}", {"Content-Encoding": "gzip"}, "is no gzip"),
    "half a gzip": (gzip.compress(b'{"inputs": []}')[:-4], {"Content-Encoding": "gzip"}, "ends inside"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_bodies_are_refused(running, case):
    content, headers, said = BAD_BODIES[case]
    response = httpx.post(f"{running[0].url}/v2/models/tiny/infer", content=content, headers=headers)
    assert response.status_code == 400 and [*response.json()] == ["error"]
    assert said in response.json()["error"]


def test_other_paths_and_bodies_that_are_too_large(running, over_grpc):
    url = f"{running[0].url}/v2"
    for method, path, status in (("GET", "/nowhere", 404), ("GET", "/repository/index", 405), ("GET", "x", 404)):
        response = httpx.request(method, url + path)
        assert response.status_code == status and path in response.json()["error"]
    post = f"{url}/models/tiny/infer"
    assert httpx.post(post, content=b"{}", headers={"Content-Encoding": "br"}).status_code == 415
    packed = gzip.compress(b" " * (17 << 20))
    for content, headers in ((b" " * (17 << 20), {}), (packed, {"Content-Encoding": "gzip"})):
        response = httpx.post(post, content=content, headers=headers)
        assert response.status_code == 413 and "more than 16777216 bytes" in response.json()["error"]
    with pytest.raises(InferenceServerException) as caught:
        ask(over_grpc, {"text_input": ["x" * (17 << 20)]})
    assert status_of(caught.value) == "RESOURCE_EXHAUSTED"


def test_json_in_and_out_over_http(engine, over_http):
    asked = {"text_input": ["a", "b"], "max_tokens": [4], "temperature": [0.5], "ignore_eos": [True]}
    wanted = [tritonclient.http.InferRequestedOutput("text_output", binary_data=False)]
    wanted.append(tritonclient.http.InferRequestedOutput("num_generated_tokens", binary_data=True))
    for how in (None, "gzip", "deflate"):
        inputs = inputs_of(over_http, asked, binary_data=False)
        result = over_http.infer("tiny", inputs, outputs=wanted, request_compression_algorithm=how)
        told, counts = result.get_response()["outputs"]
        assert told["data"] == [TEXT[:16]] * 2 or TEXT.startswith(told["data"][0])
        assert "data" not in counts and result.as_numpy("num_generated_tokens").tolist() == [4, 4]
    nested = {"name": "input_ids", "datatype": "INT32", "shape": [1, 2], "data": [[5, 6]]}
    answer = httpx.post(f"http://{over_http._parsed_url.netloc}/v2/models/tiny/infer", json={"inputs": [nested]})
    assert answer.json()["outputs"][0]["data"] and engine.requests[-1].tokens == (5, 6)


@contextlib.contextmanager
def calling(server, *, options=()):
    """The service's stub, for what Triton's client does not send."""
    with grpc.insecure_channel(server.grpc_address, options=options) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def message_of(**asked) -> service_pb2.ModelInferRequest:
    """A request with its tensors in `contents`, as clients other than Triton's have them."""
    fields = {"BYTES": "bytes_contents", "INT32": "int_contents", "FP32": "fp32_contents", "BOOL": "bool_contents"}
    message = service_pb2.ModelInferRequest(model_name="tiny")
    for name, values in asked.items():
        tensor = message.inputs.add(name=name, datatype=INPUTS[name].datatype, shape=[len(values)])
        getattr(tensor.contents, fields[tensor.datatype]).extend(values)
    return message


def test_tensors_in_contents(engine, running):
    with calling(running[0]) as stub:
        answer = stub.ModelInfer(message_of(text_input=[b"x"], max_tokens=[4], temperature=[0.5], ignore_eos=[True]))
        assert deserialize_bytes_tensor(answer.raw_output_contents[1]).tolist() == [b"length"]
        wrong = [message_of(text_input=[b"x"]) for _ in range(4)]
        wrong[0].raw_input_contents.append(b"\1\0\0\0x")
        wrong[1].raw_input_contents.extend([b""] * 2)
        wrong[2].inputs[0].contents.int_contents.append(1)
        wrong[3].inputs[0].shape[0] = 2
        wrong.append(message_of(text_input=[b"x"]))
        wrong[4].inputs[0].name, wrong[4].inputs[0].shape[0] = "你" * 5000, 2  # more than a header holds
        for message, said in zip(wrong, ("beside raw", "2 raw_input", "has int_contents", "1 elements", "你")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.ModelInfer(message)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and said in caught.value.details()


class Stream:
    """Triton's client with an open stream."""

    def __init__(self, server, **how):
        self.client = tritonclient.grpc.InferenceServerClient(server.grpc_address)
        self._told = queue.Queue()
        self.client.start_stream(lambda result, error: self._told.put(error or result.get_response()), **how)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.client.close()

    def ask(self, request_id: str, asked: dict, *, model="tiny", **how):
        self.client.async_stream_infer(model, inputs_of(self.client, asked), request_id=request_id, **how)

    def next(self):
        return self._told.get(timeout=20)

    def rest(self) -> list:
        """What comes until the server has answered everything."""
        self.client.stop_stream()
        return [self._told.get() for _ in range(self._told.qsize())]


def output(response, name: str):
    names = [each.name for each in response.outputs]
    found = tritonclient.grpc.InferResult(response).as_numpy(name) if name in names else None
    return None if found is None else found.tolist()


def test_requests_of_one_stream(engine, running, tokenizer):
    """Those that stream, one that does not, and those that cannot be answered: side by side, each by its id."""
    with Stream(running[0]) as stream:
        stream.ask("a", {"text_input": ["x"], "stream": [True], "max_tokens": [99]}, enable_empty_final_response=True)
        stream.ask("b", {"text_input": ["x", "y"], "max_tokens": [99]})
        stream.ask("c", {"text_input": ["x"]}, model="other")
        stream.ask("d", {"text_input": ["x", "y"], "stream": [True]})
        asked = {"text_input": ["so: "], "stream": [True], "max_tokens": [3], "exclude_input_in_output": [False]}
        stream.ask("e", asked)
        wanted = [tritonclient.grpc.InferRequestedOutput(name) for name in ("logprobs", "output_ids")]
        stream.ask("f", {"messages": [json.dumps(USER)], "stream": [True]}, outputs=wanted)
        told = stream.rest()
    errors = [each for each in told if isinstance(each, InferenceServerException)]
    assert sorted(error.message()[:30] for error in errors) == [
        "stream is true with 2 prompts;",
        "the model 'other' is not serve",
    ]
    by_id = {name: [each for each in told if each not in errors and each.id == name] for name in "abcdef"}
    for name, responses in by_id.items():
        finals = [each.parameters["triton_final_response"].bool_param for each in responses]
        assert finals == [False] * (len(finals) - 1) + [True] * bool(finals), name
    assert [len(by_id[name]) for name in "bcd"] == [1, 0, 0] and len(by_id["a"]) > 3
    assert b"".join(output(each, "text_output")[0] for each in by_id["a"]).decode() == TEXT
    assert [output(each, "finish_reason") for each in by_id["a"]][-2:] == [None, [b"stop"]]
    assert output(by_id["b"][0], "text_output") == [TEXT.encode()] * 2
    assert b"".join(output(each, "text_output")[0] for each in by_id["e"]).startswith(b"so: The")
    parts = [json.loads(output(each, "logprobs")[0])["content"] for each in by_id["f"]]
    assert "".join(entry["token"] for part in parts for entry in part) == TEXT
    assert output(by_id["f"][-1], "output_ids") == [[*tokenizer.encode(TEXT), tokenizer.eos_id]]


def test_more_requests_than_a_stream_answers_at_once(engine, running):
    number = front.MAX_IN_STREAM + 5
    with Stream(running[0]) as stream:
        for index in range(number):
            stream.ask(str(index), {"text_input": ["x"]})
        assert sorted(int(each.id) for each in stream.rest()) == [*range(number)]


def endless(engine):
    """A request that takes longer than anything here is waited for."""
    engine.script = lambda request: [70] * 900
    engine.seconds_per_event = 0.02
    return {"text_input": ["x"], "max_tokens": [900]}


def test_whoever_leaves_frees_the_engine(engine, running, over_grpc, eventually, caplog):
    """A call that is cancelled, one past its deadline, a stream that is cancelled and a client that is gone."""
    asked = endless(engine)
    told = queue.Queue()
    call = over_grpc.async_infer("tiny", inputs_of(over_grpc, asked), lambda result, error: told.put(error))
    eventually(lambda: len(engine.active) == 1)
    call.cancel()
    assert status_of(told.get(timeout=20)) == "CANCELLED"
    eventually(lambda: not engine.active)

    with pytest.raises(InferenceServerException) as caught:
        over_grpc.infer("tiny", inputs_of(over_grpc, asked), client_timeout=0.1)
    assert status_of(caught.value) == "DEADLINE_EXCEEDED"
    eventually(lambda: not engine.active)

    with Stream(running[0]) as stream:
        stream.ask("a", asked | {"stream": [True]})
        stream.ask("b", asked)
        assert stream.next().id == "a"
        eventually(lambda: len(engine.active) == 2)
        stream.client.stop_stream(cancel_requests=True)
        eventually(lambda: not engine.active)

    program = (
        "import sys, grpc\n"
        "with grpc.insecure_channel(sys.argv[1]) as channel:\n"
        "    call = channel.unary_unary('/inference.GRPCInferenceService/ModelInfer')\n"
        "    call(bytes.fromhex(sys.argv[2]))\n"
    )
    message = message_of(text_input=[b"x"], max_tokens=[900]).SerializeToString().hex()
    gone = subprocess.Popen([sys.executable, "-c", program, running[0].grpc_address, message])
    eventually(lambda: len(engine.active) == 1)
    gone.kill()
    gone.wait()
    eventually(lambda: not engine.active)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_lost_http_connection_frees_the_engine(engine, running, eventually):
    asked = endless(engine)
    body, _ = tritonclient.http.InferenceServerClient.generate_request_body(
        inputs_of(tritonclient.http.InferenceServerClient("x"), asked, binary_data=False)
    )
    host, port = running[0].url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        connection.sendall((head % len(body)).encode() + body)
        eventually(lambda: len(engine.active) == 1)
    eventually(lambda: not engine.active)


def test_the_timeout_of_a_request(engine, running, client):
    asked = endless(engine)
    with pytest.raises(InferenceServerException, match="timeout of 0.02 s") as caught:
        ask(client, asked, timeout=20_000)
    assert status_of(caught.value) in ("DEADLINE_EXCEEDED", "504")
    assert not engine.active


def test_an_engine_failure_is_an_error_and_the_server_lives_on(engine, client):
    said, engine.script = engine.script, lambda request: [70, 71]
    with pytest.raises(InferenceServerException, match="the script ran out") as caught:
        ask(client, {"text_input": ["x"]})
    assert status_of(caught.value) in ("INTERNAL", "500")
    engine.script = said
    assert ask(client, {"text_input": ["x"]}, "finish_reason") == {"finish_reason": [b"stop"]}


def test_an_answer_that_the_engine_does_not_go_on_with_is_none(engine, running, client, eventually):
    """As where it is closed under the server; in a stream the request fails alone."""
    asked, said = endless(engine), "the engine was closed before the answer was complete"

    def leave_it():
        eventually(lambda: engine.active)
        next(iter(engine.active)).abort()

    leaving = threading.Thread(target=leave_it)
    leaving.start()
    with pytest.raises(InferenceServerException, match=said) as caught:
        ask(client, asked)
    leaving.join()
    assert status_of(caught.value) in ("UNAVAILABLE", "503")
    with Stream(running[0]) as stream:
        stream.ask("a", asked)
        leave_it()
        assert said in stream.next().message()
        engine.seconds_per_event = 0
        stream.ask("b", asked)
        assert stream.next().id == "b"


def test_who_does_not_read_holds_up_nobody(engine, running, over_grpc, eventually):
    """One stream has answers for a megabyte and reads none of them; the other clients do not notice."""
    engine.script = lambda request: [70] * 900
    message = message_of(text_input=[b"x"], max_tokens=[900], stream=[True])
    sent = itertools.count()
    with calling(running[0]) as stub:
        stream = stub.ModelStreamInfer(message for _ in iter(lambda: next(sent) < 20, False))
        eventually(lambda: len(engine.requests) == 20)
        assert len(ask(over_grpc, {"text_input": ["x"]})["text_output"]) == 1
        stream.cancel()
    eventually(lambda: not engine.active)


@contextlib.contextmanager
def limited(pipeline, *, drain_seconds=1.0, log_prompts=False, **limits):
    """A server with both fronts and these limits, with its `doors`."""
    operation = Operation(Limits(**limits), log_prompts=log_prompts)
    how = {"model_name": "tiny", "grpc_port": 0, "drain_seconds": drain_seconds, "operation": operation}
    with start_server(pipeline, **how) as server:
        server.doors = server._app.state.doors
        yield server


def counts(server) -> dict[str, int]:
    """Requests of gRPC by method and code, as /metrics tell; that as many durations are told is checked."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r'^internjax_grpc_requests_total{code="(.*)",method="(.*)"} (.*)$', text, re.M)
    timed = re.findall(r'^internjax_grpc_request_duration_seconds_count{method="(.*)"} (.*)$', text, re.M)
    assert sum(float(count) for *_, count in found) == sum(float(count) for _, count in timed)
    return {f"{method} {code}": int(float(count)) for code, method, count in found}


def test_both_fronts_share_the_places(scripted, eventually):
    """One runs, one waits, more are refused: calls, requests in a stream, and requests of HTTP; probes are answered."""
    pipeline = scripted(TEXT)
    asked, told = endless(pipeline.engine), queue.Queue()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 900}
    busy = "the server is busy: 1 requests run and 1 wait; try again later"
    with limited(pipeline, max_running=1, max_waiting=1) as server, calling(server) as stub, Stream(server) as stream:
        client, doors, message = stream.client, server.doors, message_of(text_input=[b"x"])
        stream.ask("a", asked | {"stream": [True]})
        assert stream.next().id == "a" and doors.num_running == 1
        waiting = client.async_infer("tiny", inputs_of(client, asked), lambda result, error: told.put(error))
        eventually(lambda: doors.num_waiting == 1)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, busy)
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) > 0
        stream.ask("b", {"text_input": ["x"]})
        while not isinstance(refused := stream.next(), InferenceServerException):
            assert refused.id == "a"
        assert refused.message() == busy
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 429
        assert client.is_server_ready() and len(pipeline.engine.requests) == 1
        waiting.cancel()
        eventually(lambda: doors.num_waiting == 0)
        pipeline.engine.seconds_per_event = 0  # the stream goes on: what came in it last was refused
        eventually(lambda: doors.num_running == doors.num_inside == 0)
        pipeline.engine.script = lambda request: [70] * 16
        assert stub.ModelInfer(message).id == "" and ask(client, {"text_input": ["x"]})
        eventually(lambda: counts(server).get("ModelInfer OK") == 2)
        assert counts(server) == {
            "ModelStreamInfer OK": 1,
            "ModelStreamInfer RESOURCE_EXHAUSTED": 1,
            "ModelInfer RESOURCE_EXHAUSTED": 1,
            "ModelInfer CANCELLED": 1,
            "ModelInfer OK": 2,
            "ServerReady OK": 1,
        }


def test_a_message_over_the_limit_of_bodies_is_refused(scripted):
    pipeline = scripted(TEXT)
    with limited(pipeline, body_bytes=2000) as server, calling(server) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message_of(text_input=[b"x" * 2000]))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        packed = gzip.compress(b" " * 2001)
        response = httpx.post(
            f"{server.url}/v2/models/tiny/infer", content=packed, headers={"Content-Encoding": "gzip"}
        )
        assert response.status_code == 413 and "more than 2000 bytes" in response.json()["error"]
        assert stub.ModelInfer(message_of(text_input=[b"x"])) and len(pipeline.engine.requests) == 1


INFER = "/inference.GRPCInferenceService/ModelInfer"


@contextlib.contextmanager
def silent(server, method=INFER, **how):
    """A call of one request whose message does not come. It is ended with the block, if it was not before."""
    over = threading.Event()
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.stream_unary(method).future(iter(lambda: over.wait(20) and None, None), timeout=20, **how)
        try:
            yield call
        finally:
            over.set()


def test_a_call_whose_message_does_not_come_in_time_is_ended(scripted, eventually):
    pipeline = scripted(TEXT)
    with limited(pipeline, body_seconds=0.3, max_running=1, max_waiting=0) as server, calling(server) as stub:
        with silent(server) as call:
            eventually(lambda: server.doors.num_inside == 1)
            with pytest.raises(grpc.RpcError, match="the server is busy"):  # it holds a place, for its time
                stub.ModelInfer(message_of(text_input=[b"x"]))
            assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "the message did not come in within 0.3 seconds" in call.exception().details()
        with silent(server, INFER.replace("ModelInfer", "ModelReady")) as call:
            assert "the message did not come in" in call.exception().details()
        assert stub.ModelInfer(message_of(text_input=[b"x"])) and server.doors.num_inside == 0
        with grpc.insecure_channel(server.grpc_address) as channel:
            for messages_, said in (([], "ModelInfer has no message"), ([b"\xff"], "is no ModelInferRequest")):
                with pytest.raises(grpc.RpcError, match=said) as caught:
                    channel.stream_unary(INFER)(iter(messages_), timeout=20)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(pipeline.engine.requests) == 1


def test_nothing_is_read_of_a_call_that_is_refused_or_asks_for_nothing(scripted):
    with start_server(scripted(TEXT), model_name="tiny", api_key="sesame", grpc_port=0, drain_seconds=1) as server:
        for method in ("ModelInfer", "ModelReady", "ModelStatistics"):
            with silent(server, INFER.replace("ModelInfer", method)) as call:
                assert call.exception().code() is grpc.StatusCode.UNAUTHENTICATED
        with calling(server) as stub:
            large = message_of(text_input=[b"x" * (8 << 20)])
            with pytest.raises(grpc.RpcError, match="the API key is missing or wrong") as caught:
                stub.ModelInfer(large)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with silent(server, INFER.replace("ModelInfer", "ServerLive")) as call:
            assert call.result() == b"\x08\x01", "live"
        with silent(server, INFER.replace("ModelInfer", "Other")) as call:
            assert call.exception().code() is grpc.StatusCode.UNIMPLEMENTED
        server._loop.call_soon_threadsafe(server._app.state.doors.close, "no more")
        with silent(server, metadata=(("authorization", "Bearer sesame"),)) as call:
            assert (call.exception().code(), call.exception().details()) == (grpc.StatusCode.UNAVAILABLE, "no more")


def test_clients_that_are_stopped_and_connections_without_calls_are_given_up(scripted, eventually, monkeypatch):
    for name, seconds in (("_PING_SECONDS", 0.3), ("_PONG_SECONDS", 0.3), ("_IDLE_SECONDS", 0.3)):
        monkeypatch.setattr(front, name, seconds)
    program = (
        "import sys, grpc\n"
        "with grpc.insecure_channel(sys.argv[1]) as channel:\n"
        "    call = channel.stream_unary(sys.argv[2])\n"
        "    call(iter(sys.stdin.readline, None))\n"
    )
    with limited(scripted(TEXT)) as server:
        stopped = subprocess.Popen([sys.executable, "-c", program, server.grpc_address, INFER], stdin=subprocess.PIPE)
        try:
            eventually(lambda: server.doors.num_inside == 1)
            stopped.send_signal(signal.SIGSTOP)
            eventually(lambda: server.doors.num_inside == 0)
        finally:
            stopped.kill()
            stopped.wait()

        async def idle_twice():
            async with grpc.aio.insecure_channel(server.grpc_address) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                for _ in range(2):
                    assert (await stub.ServerLive(service_pb2.ServerLiveRequest())).live
                    while channel.get_state() is not grpc.ChannelConnectivity.IDLE:
                        await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(idle_twice(), 10))


def test_a_client_that_does_not_read_its_stream_is_given_up(scripted, eventually):
    pipeline = scripted(lambda request: [70] * 900)
    message, sent = message_of(text_input=[b"x"], max_tokens=[900], stream=[True]), itertools.count()
    few_bytes = [("grpc.http2.bdp_probe", 0)]  # that may be under way: else the window grows to what there is
    with limited(pipeline, send_seconds=0.1) as server, calling(server, options=few_bytes) as stub:
        stream = stub.ModelStreamInfer(message for _ in iter(lambda: next(sent) < 20, False))
        eventually(lambda: counts(server).get("ModelStreamInfer CANCELLED", 0) > 0)
        eventually(lambda: server.doors.num_inside == 0 and not pipeline.engine.active)
        assert stub.ModelInfer(message_of(text_input=[b"x"]))
        with pytest.raises(grpc.RpcError, match="the client has not read for 0.1 seconds") as caught:
            for _ in stream:  # what was under way, and then no end that could be taken for one
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_more_calls_than_are_taken_at_once(scripted, eventually, monkeypatch):
    monkeypatch.setattr(front, "MAX_CALLS", 1)
    pipeline = scripted(TEXT)
    asked = endless(pipeline.engine)
    with limited(pipeline, max_running=1, max_waiting=0) as server, Stream(server) as stream:
        stream.ask("a", asked)
        eventually(lambda: len(pipeline.engine.active) == 1)
        with Stream(server) as idle, tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
            idle.ask("b", asked)
            assert "the server is busy" in idle.next().message()
            with pytest.raises(InferenceServerException, match="(?i)concurrent rpc") as caught:
                client.is_server_live()
            assert status_of(caught.value) == "RESOURCE_EXHAUSTED"
        stream.client.stop_stream(cancel_requests=True)
        eventually(lambda: not pipeline.engine.active)


def test_every_request_has_a_line_and_what_it_says_only_where_that_is_asked_for(scripted, caplog, eventually):
    def lines() -> list[dict]:
        return [json.loads(JSONLines().format(record)) for record in caplog.records if record.name == "serve"]

    asked = {"text_input": ["SECRET"], "max_tokens": [99]}
    with caplog.at_level(logging.INFO, logger="serve"):
        with limited(scripted(TEXT)) as server, calling(server) as stub, Stream(server) as stream:
            call = stub.ModelInfer.with_call(message_of(text_input=[b"SECRET"]), metadata=(("x-request-id", "mine"),))
            assert dict(call[1].trailing_metadata())["x-request-id"] == "mine"
            stream.ask("a", asked | {"stream": [True]})
            stream.ask("b\nb", asked, model="other")
            with pytest.raises(InferenceServerException, match="in /metrics and in the server's log"):
                stream.client.get_inference_statistics("tiny")
            stream.rest()
            assert stream.client.is_server_live()
            ask(tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")), asked, request_id="c")
            eventually(lambda: len([each for each in lines() if each["route"].startswith("/v2")]) == 1)
        assert "SECRET" not in caplog.text and TEXT not in caplog.text
        by_status = {(each["route"], each["status"]): each for each in lines()}
        assert len(lines()) == 5 + len([each for each in lines() if each["route"] in ("/health", "/metrics")])
        whole, streamed = by_status["ModelInfer", "OK"], by_status["ModelStreamInfer", "OK"]
        assert (whole["request"], whole["method"], whole["outcome"]) == ("mine", "gRPC", "answered")
        assert (streamed["answer"], streamed["outcome"], streamed["finish"]) == ("a", "streamed", "stop")
        assert streamed["completion"] == whole["completion"] > 0 and streamed["seconds"] > 0
        refused = by_status["ModelStreamInfer", "NOT_FOUND"]
        assert refused["request"] == streamed["request"] and "answer" not in refused
        assert ("ModelStatistics", "UNIMPLEMENTED") in by_status
        over_http = by_status["/v2/models/{name:path}/infer", 200]
        assert (over_http["answer"], over_http["completion"]) == ("c", streamed["completion"])
        with limited(scripted(TEXT), log_prompts=True) as server, calling(server) as stub:
            stub.ModelInfer(message_of(text_input=[b"SECRET"]))
            eventually(lambda: "SECRET" in lines()[-1].get("text", ""))


def test_the_key(scripted):
    def key(text: str | None = "Bearer sesame") -> dict:
        return {"headers": {} if text is None else {"authorization": text}}  # Triton's client writes into it

    def refused(call) -> str:
        with pytest.raises(InferenceServerException, match="the API key is missing or wrong") as caught:
            call()
        return status_of(caught.value)

    pipeline = scripted(TEXT)
    with start_server(pipeline, model_name="tiny", api_key="sesame", grpc_port=0, drain_seconds=1) as server:
        http = tritonclient.http.InferenceServerClient(server.url.removeprefix("http://"))
        with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client, http:
            for each, status in ((client, "UNAUTHENTICATED"), (http, "401")):
                assert each.is_server_live() and each.is_server_ready()
                prompt = inputs_of(each, {"text_input": ["x"]})
                for wrong in (None, "Bearer other", "sesame"):
                    assert refused(lambda: each.infer("tiny", prompt, **key(wrong))) == status  # noqa: B023
                    assert refused(lambda: each.get_server_metadata(**key(wrong))) == status  # noqa: B023
                assert each.infer("tiny", prompt, **key()).as_numpy("text_output").tolist() == [TEXT.encode()]
                assert each.get_server_metadata(**key())
        with Stream(server) as stream:
            assert status_of(stream.next()) == "UNAUTHENTICATED"
        with Stream(server, **key()) as stream:
            stream.ask("a", {"text_input": ["x"]})
            assert stream.next().id == "a"
    assert len(pipeline.engine.requests) == 3
    with pytest.raises(ValueError, match="an API key has characters that gRPC cannot carry"):
        start_server(pipeline, model_name="tiny", api_key="sésame", grpc_port=0)


def test_a_server_that_leaves_lets_answers_finish_and_waits_for_no_idle_stream(scripted, eventually):
    pipeline = scripted(TEXT)
    asked = endless(pipeline.engine)
    server = start_server(pipeline, model_name="tiny", grpc_port=0, drain_seconds=300)
    with Stream(server) as busy, Stream(server) as idle:
        busy.ask("a", asked)
        eventually(lambda: len(pipeline.engine.active) == 1)
        closing = threading.Thread(target=server.close)
        closing.start()
        eventually(lambda: not busy.client.is_server_ready())
        assert busy.client.is_server_live() and not busy.client.is_model_ready("tiny")
        with pytest.raises(InferenceServerException, match="takes no more requests") as caught:
            ask(idle.client, {"text_input": ["x"]})
        assert status_of(caught.value) == "UNAVAILABLE"
        pipeline.engine.seconds_per_event = 0
        answer = busy.next()
        assert output(answer, "num_generated_tokens") == [900]
        closing.join(timeout=20)
        assert not closing.is_alive() and not server.alive
        assert idle.rest() == []


def test_a_server_that_stops_tells_who_waits_and_who_runs_too_long(scripted, eventually):
    pipeline, told = scripted(TEXT), queue.Queue()
    asked = endless(pipeline.engine)
    with limited(pipeline, max_running=2, max_waiting=5, drain_seconds=0.05) as server, Stream(server) as stream:
        stream.ask("a", asked)
        eventually(lambda: len(pipeline.engine.active) == 1)
        for number in (0, 1):  # one has a place, one waits for it
            prompt = inputs_of(stream.client, asked)
            stream.client.async_infer("tiny", prompt, lambda result, error: told.put(error))
            eventually(lambda number=number: (server.doors.num_running, server.doors.num_waiting) == (2, number))
        server.close()
        waiting, running = told.get(timeout=20), told.get(timeout=20)
        assert [status_of(each) for each in (waiting, running)] == ["UNAVAILABLE"] * 2
        assert waiting.message() == "the server stops and takes no more requests"
        late = "the server stops and the answer was not complete in time"
        assert running.message() == stream.next().message() == late and stream.rest() == []
    eventually(lambda: not pipeline.engine.active)


def test_ports_and_packages(scripted, monkeypatch):
    with start_server(scripted(TEXT), model_name="tiny", grpc_port=0) as server:
        port = int(server.grpc_address.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is in use; give another one with --grpc-port"):
            start_server(scripted(TEXT), model_name="tiny", grpc_port=port)
    start_server(scripted(TEXT), model_name="tiny", grpc_port=port).close()
    with socket.create_server(("127.0.0.1", 0)) as other:  # one that came while the model was read
        port = other.getsockname()[1]
        taken = SimpleNamespace(getsockname=other.getsockname, close=lambda: None)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} cannot be taken for gRPC .*; give another port"):
            start_server(scripted(TEXT), model_name="tiny", grpc_port=taken)
    monkeypatch.setattr(serving, "_is_installed", lambda name: name != "grpc")
    with pytest.raises(ValueError, match="grpcio and protobuf, and grpc cannot be imported; install the extra `serve`"):
        take_grpc_port("127.0.0.1", 0)


def test_grpc_answers_before_the_model_is_there(scripted, caplog):
    """As HTTP does: it lives, is not ready, and says how far it is to who asks for more."""
    starting, operation = Starting("tiny"), Operation()

    def key() -> dict:
        return {"headers": {"authorization": "Bearer sesame"}}  # Triton's client writes into it

    port = take_grpc_port("127.0.0.1", 0)
    with serving.Server(starting, take_port("127.0.0.1", 0), model_name="tiny", drain_seconds=1) as server:
        server.add_grpc(port, api_keys=("sesame",), operation=operation)
        with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
            prompt = inputs_of(client, {"text_input": ["x"]})
            assert client.is_server_live() and not client.is_server_ready()
            assert not client.is_model_ready("tiny", **key())
            with pytest.raises(InferenceServerException, match="the API key is missing or wrong"):
                client.infer("tiny", prompt)
            for status in ("loading", "compiling 4 of 9"):
                for call in (client.get_server_metadata, client.get_model_repository_index):
                    with pytest.raises(InferenceServerException, match="the model is not there yet") as caught:
                        call(**key())
                    assert status_of(caught.value) == "UNAVAILABLE" and status in caught.value.message()
                with pytest.raises(InferenceServerException, match=f"the model is not there yet .{status}, for "):
                    client.infer("tiny", prompt, **key())
                starting.compiled(Compiled("draw", 1.0, 3, 9))
            with Stream(server, **key()) as stream:
                assert status_of(stream.next()) == "UNAVAILABLE"
            with silent(server, metadata=(("authorization", "Bearer sesame"),)) as call:
                assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
                assert int(dict(call.trailing_metadata())["retry-after"]) > 0
            server.use(create_app(scripted(TEXT), model_name="tiny", api_key="sesame", operation=operation))
            assert client.is_server_ready()
            assert client.infer("tiny", prompt, **key()).as_numpy("text_output").tolist()
    with pytest.raises(ConnectionError):  # closed with the server, also of one whose model never came
        socket.create_connection(server.grpc_address.split(":"))
    with serving.Server(starting, take_port("127.0.0.1", 0), model_name="tiny", drain_seconds=1) as server:
        server.add_grpc(take_grpc_port("127.0.0.1", 0), api_keys=(), operation=operation)
    with pytest.raises(ConnectionError):
        socket.create_connection(server.grpc_address.split(":"))
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_command_answers_over_grpc_until_it_is_told_to_end(scripted, monkeypatch, capsys):
    pipeline, use, asked = scripted(TEXT), serving.Server.use, []

    def using(server, app):
        with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
            assert client.is_server_live() and not client.is_server_ready(), "the model was awaited"
        use(server, app)

        def ask_it():
            try:
                with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
                    asked.append(ask(client, {"text_input": ["x"]}, "text_output", model="my tiny"))
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=ask_it).start()

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(serving.Server, "use", using)
    monkeypatch.setattr(command, "open_served", lambda args, on_program: pipeline)
    try:
        assert command.main(["runs/my tiny", "--port", "0", "--grpc-port", "0"]) == 0
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
            signal.signal(number, handler)
    assert asked == [{"text_output": [TEXT.encode()]}]
    assert "grpc     127.0.0.1:" in capsys.readouterr().out


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=9), max_size=4))
def test_raw_strings_are_those_of_triton(strings):
    theirs = serialize_byte_tensor(np.array([*strings, None], object)[:-1])
    raw = raw_of(Tensor("a", "BYTES", (len(strings),), strings))
    assert raw == (theirs.item() if theirs.size else b"")
    assert from_raw("a", "BYTES", (len(strings),), raw).values == strings
    for cut in range(1, len(raw)):
        with pytest.raises(Refusal, match="a "):
            from_raw("a", "BYTES", (len(strings),), raw[:cut])


@pytest.mark.parametrize(
    ("datatype", "values"), [("BOOL", [True, False]), ("INT32", [-5, 7]), ("UINT64", [2**63, 0]), ("FP32", [0.5, -2.0])]
)
def test_raw_numbers_and_lists(datatype, values):
    tensor = from_values("a", datatype, [2, 1], [[values[0]], [values[1]]])
    assert tensor == from_raw("a", datatype, [2, 1], raw_of(tensor)) == Tensor("a", datatype, (2, 1), values)
    for wrong in (["x", "y"], [None, None], [[[[[[[[[1]]]]]]]]], [[1], 2], "ab", [2**70, "1"], [values[0]] * 3):
        with pytest.raises(Refusal, match="a "):
            from_values("a", datatype, [2], wrong)


def test_the_readme_names_every_tensor():
    text = (ROOT / "serve" / "README.md").read_text()
    assert {name for name in (*INPUTS, *OUTPUTS) if f"`{name}`" not in text} == set()
