"""Large bodies: read in a thread, with the same answers and errors as others."""

import functools
import gzip
import json
import threading

import httpx
import pytest
import tritonclient.grpc

from serve.kserve import requests as kserve
from serve.operation import bodies
from serve.operation.bodies import LARGE_BYTES
from serve.pipeline import Pipeline
from serve.rest import chat_completions, responses, scores, session_routes
from serve.rest.scores import Scorer
from serve.server import start_server
from tests.serve.conftest import ScriptedEngine
from tests.serve.test_hostile import BODIES
from tests.serve.test_kserve import inputs_of
from tests.serve.test_vectors import reward_model  # noqa: F401

CHAT = BODIES["/v1/chat/completions"]
JSON = {"Content-Type": "application/json"}
INPUT = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}


@pytest.fixture(scope="module")
def server(tokenizer, tiny_model, tmp_path_factory):
    said = [*tokenizer.encode("The answer is 6."), tokenizer.eos_id]
    pipeline = Pipeline.over(ScriptedEngine(lambda request: said, chunks=(4,)), tokenizer, model=tiny_model)
    folder = tmp_path_factory.mktemp("adapters")
    how = {"model_name": "tiny", "drain_seconds": 1, "adapter_root": folder, "grpc_port": 0}
    with start_server(pipeline, **how) as server:
        yield server


@pytest.fixture(scope="module")
def client():
    with httpx.Client(timeout=30) as client:
        yield client


def sent(client, server, path: str, body: bytes, *, spaces: int = 0, headers=JSON) -> tuple[int, dict]:
    """Status and body of the answer to a body with so much nothing behind it, without what is new each time."""
    response = client.post(server.url + path, content=body + b" " * spaces, headers=headers)
    found = response.json()
    for name in ("id", "created", "created_at", "completed_at", "expires_at"):
        found.pop(name, None)
    for item in found.get("output", ()):
        item.pop("id")
    return response.status_code, found


@pytest.mark.parametrize("path", BODIES)
def test_a_large_body_is_answered_and_refused_as_others_are(client, server, path):
    first = next(iter(BODIES[path]))
    given = [
        json.dumps(body).encode()
        for body in (BODIES[path], {}, BODIES[path] | {first: 5}, BODIES[path] | {"unheard_of": 1}, [], None)
    ]
    given += [b"{", b'{"a": 1} x', b"\xff\xfe", b'{"a": "\xc3\x28"}', b"[" * 100_000, b"1" * 5_000]
    for body in given:
        small, large = (sent(client, server, path, body, spaces=spaces) for spaces in (0, LARGE_BYTES))
        assert small == large, body[:100]
    for headers in ({}, {"Content-Type": "text/plain"}):  # it is not read as JSON
        found = [sent(client, server, path, given[0], spaces=spaces, headers=headers) for spaces in (0, LARGE_BYTES)]
        assert {(status, body["error"]["code"]) for status, body in found} == {(400, "invalid_value")}


@pytest.fixture
def threads(monkeypatch):
    """threads(module, name): the threads in which a function is called from now on."""

    def watch(module, name: str) -> list[threading.Thread]:
        found, work = [], getattr(module, name)

        @functools.wraps(work)
        def watched(*arguments, **how):
            found.append(threading.current_thread())
            return work(*arguments, **how)

        monkeypatch.setattr(module, name, watched)
        return found

    return watch


@pytest.mark.parametrize(
    ("path", "body", "module", "name"),
    [
        ("/v1/chat/completions", CHAT, bodies, "_checked"),
        ("/v1/chat/completions", CHAT, chat_completions, "refuse"),
        ("/v1/chat/completions", CHAT, chat_completions, "messages_of"),
        ("/v1/responses", BODIES["/v1/responses"], responses, "refuse_response"),
        ("/v1/responses", BODIES["/v1/responses"], responses, "messages_of_items"),
        ("/v1/sessions", BODIES["/v1/sessions"], session_routes, "messages_of"),
        ("/v2/models/tiny/infer", {"inputs": [INPUT]}, kserve, "job_of"),
    ],
)
def test_what_takes_long_of_a_large_body_is_not_done_in_the_event_loop(
    client, server, threads, path, body, module, name
):
    found = threads(module, name)
    data = json.dumps(body).encode()
    assert sent(client, server, path, data, spaces=LARGE_BYTES)[0] == 200
    assert found and server._thread not in found
    found.clear()
    assert sent(client, server, path, data)[0] == 200
    assert found in ([], [server._thread]), "a small one is read where it is"


def test_nor_is_a_body_that_is_large_when_it_is_unpacked(client, server, threads):
    found, body = threads(kserve, "job_of"), json.dumps({"inputs": [INPUT]}).encode()
    packed = gzip.compress(body + b" " * LARGE_BYTES)
    status, _ = sent(client, server, "/v2/models/tiny/infer", packed, headers=JSON | {"Content-Encoding": "gzip"})
    assert status == 200 and len(packed) < LARGE_BYTES and found and server._thread not in found


def test_nor_is_a_large_message_of_grpc(server, threads):
    found = threads(kserve, "job_of")
    with tritonclient.grpc.InferenceServerClient(server.grpc_address) as triton:
        triton.infer("tiny", inputs_of(triton, {"text_input": ["x"]}))
        assert found == [server._thread]
        found.clear()
        padded = {"input_ids": [[5] * (LARGE_BYTES // 4)], "input_lengths": [3]}
        triton.infer("tiny", inputs_of(triton, padded))
    assert len(found) == 1 and server._thread not in found


def test_nor_are_conversations_to_be_scored(client, reward_model, threads):  # noqa: F811
    found = threads(scores, "_conversations")
    with start_server(Scorer(reward_model, max_context=128), model_name="tiny") as server:
        body = json.dumps({"model": "tiny", "pairs": [{"prompt": "a", "answer": "b"}]}).encode()
        for spaces in (0, LARGE_BYTES):
            assert sent(client, server, "/v1/score", body, spaces=spaces)[0] == 200
        assert found[0] is server._thread and found[1] is not server._thread
