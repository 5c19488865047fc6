"""Requests that no honest client sends, for every route that takes a body.

Each is refused with OpenAI's envelope and the field's name, none ends in a fault of the server, and the server answers
after it as before.
"""

import json

import httpx
import pytest

from serve.pipeline import Pipeline
from serve.server import start_server
from tests.serve.conftest import ScriptedEngine

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "tiny", "prompt": "x"},
    "/v1/responses": {"model": "tiny", "input": "x"},
    "/v1/sessions": {"model": "tiny"},
    "/v1/embeddings": {"model": "tiny", "input": "x"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
TEXT_FIELDS = {
    "/v1/chat/completions": ("messages", "user", "stop", "model", "session_id", "bad_words", "tools"),
    "/v1/completions": ("prompt", "user", "stop", "model", "bad_words", "structured_outputs"),
    "/v1/responses": ("input", "instructions", "user", "model", "previous_response_id", "metadata"),
    "/v1/sessions": ("model", "messages"),
    "/v1/embeddings": ("input", "model", "user"),
    "/v1/load_lora_adapter": ("lora_name", "lora_path"),
    "/tokenize": ("prompt", "model"),
    "/detokenize": ("model",),
}
"""Where a text can stand."""


@pytest.fixture(scope="module")
def server(tokenizer, tiny_model, tmp_path_factory):
    said = [*tokenizer.encode("The answer is 6."), tokenizer.eos_id]
    pipeline = Pipeline.over(ScriptedEngine(lambda request: said, chunks=(4,)), tokenizer, model=tiny_model)
    folder = tmp_path_factory.mktemp("adapters")
    with start_server(pipeline, model_name="tiny", drain_seconds=1, adapter_root=folder) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            yield client


def sent(server: httpx.Client, path: str, body) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.post(path, content=content, headers={"Content-Type": "application/json"})


def check_refused(response: httpx.Response, param=..., status: tuple[int, ...] = (400,)) -> dict:
    assert response.status_code in status, response.text[:500]
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert len(response.content) < 10_000, "an error does not send the request back"
    if param is not ...:
        assert (error["param"] or "").partition("[")[0].partition(".")[0] == param, error
    return error


def holding(field: str, text) -> object:
    """A value of a field with the text somewhere in it."""
    return {
        "messages": [{"role": "user", "content": text}],
        "tools": [{"type": "function", "function": {"name": "f", "description": text}}],
        "structured_outputs": {"regex": text},
        "metadata": {"a": text},
        "bad_words": [text],
    }.get(field, text)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_no_json_or_no_object(server, path):
    for body in (b"\xff\xfe", b'{"model": "\xc3\x28"}', b"{", b"", b"[]", b"3", b"null", b"[" * 100_000,
                 b'{"a":' * 100_000, b"\x00", b'{"model": "tiny",}', b"1e999", b"1" * 5_000):  # fmt: skip
        check_refused(sent(server, path, body))
    assert server.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "true", "[" * 500 + "]" * 500]
)
def test_numbers_that_are_none(server, path, value):
    """In every number's place, and in one of a text: NaN, infinite, beyond 64 bits, a boolean, deep lists."""
    fields = {
        "/v1/chat/completions": (
            "temperature",
            "seed",
            "max_tokens",
            "top_logprobs",
            "n",
            "top_k",
            "min_p",
            "logit_bias",
        ),
        "/v1/completions": ("temperature", "seed", "logprobs", "top_p", "best_of", "stop_token_ids", "prompt"),
        "/v1/responses": ("temperature", "max_output_tokens", "top_p", "top_logprobs", "seed", "input"),
        "/v1/sessions": ("max_length",),
        "/v1/embeddings": ("dimensions", "input"),
        "/v1/load_lora_adapter": ("lora_name",),
        "/tokenize": ("prompt",),
        "/detokenize": ("tokens",),
    }[path]
    for field in fields:
        given = {"logit_bias": f'{{"5": {value}}}', "stop_token_ids": f"[{value}]"}.get(field, value)
        body = json.dumps(BODIES[path] | {field: "@"}).replace('"@"', given).encode()
        check_refused(sent(server, path, body), field)


@pytest.mark.parametrize("path", BODIES)
def test_texts_that_are_none(server, path):
    """A lone surrogate is no text, wherever it stands: refused by name, or (a name that nobody has) not found."""
    for field in TEXT_FIELDS[path]:
        response = sent(server, path, BODIES[path] | {field: holding(field, "a\ud800b")})
        if response.status_code == 200:  # it is in no prompt, and stands in the log alone
            assert field in ("user", "stop", "bad_words", "metadata"), field
            continue
        check_refused(response, "model" if field == "model" else field, (400, 404))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "text", ["a\0b", "x" * 1_000_000, "\u202e\U000e0001\ufeff" * 50], ids=["NUL", "1 MB", "unseen"]
)
def test_texts_that_are_odd(server, path, text):
    """They are texts: taken, or refused by name, with an error that does not hold them."""
    for field in TEXT_FIELDS[path]:
        response = sent(server, path, BODIES[path] | {field: holding(field, text)})
        if response.status_code != 200:
            error = check_refused(response, status=(400, 404))
            too_long = error["code"] == "context_length_exceeded"  # in all; the conversation is named
            assert too_long or error["param"].partition("[")[0].partition(".")[0] == field, error
    assert server.get("/health").json()["status"] == "ok"


@pytest.mark.parametrize("path", BODIES)
def test_a_key_twice_is_the_last_one(server, path):
    """As JSON's readers have it; that it is checked is what counts."""
    body = json.dumps(BODIES[path])
    first = next(iter(BODIES[path]))
    check_refused(sent(server, path, f'{body[:-1]}, "{first}": 5}}'.encode()), first)


def test_keys_of_any_kind(server):
    for key in ("\0", "\ud800", "a" * 100_000, "", "__class__", "model_fields", "[0]"):
        error = check_refused(sent(server, "/v1/chat/completions", CHAT | {key: 1}))
        assert error["code"] == ("invalid_value" if key == "\ud800" else "unknown_parameter")
        assert error["param"] == (None if key in ("", "\ud800") else key[:200])


def test_schemas_that_are_deep_or_endless(server):
    deep: dict = {}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    endless = {"$ref": "#"}
    for schema in (deep, endless, {"pattern": "(" * 1000}, {"type": "string", "pattern": "\ud800"}, {"enum": []}):
        tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
        for more in ({"structured_outputs": {"json": schema}}, {"tools": [tool], "tool_choice": "required"}):
            response = sent(server, "/v1/chat/completions", CHAT | more)
            if response.status_code != 200:
                error = check_refused(response)
                assert error["code"] == "context_length_exceeded" or next(iter(more)) in error["param"], error
