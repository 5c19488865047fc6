"""/tokenize, /detokenize and /tokenizer_info: the ids are those that the answering routes read."""

import json

import httpx
import pytest

from internjax.text.tokenizer import Tokenizer, longest_token
from serve.server import start_server
from tests.serve.test_openai import ADD, BAD_MESSAGES, TEXT, USER, check_refused

SAYS = "héllo <|im_end|> 你好"


@pytest.fixture(scope="module")
def served(tokenizer):
    from serve.pipeline import Pipeline
    from tests.serve.conftest import ScriptedEngine

    said = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    pipeline = Pipeline.over(ScriptedEngine(lambda request: said), tokenizer)
    with start_server(pipeline, model_name="tiny") as server, httpx.Client(base_url=server.url, timeout=20) as client:
        yield client, pipeline.engine


def post(client, path: str, body) -> httpx.Response:
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


def test_ids_of_a_prompt_are_what_a_completion_reads_and_come_back_as_text(served, tokenizer):
    client, engine = served
    found = post(client, "/tokenize", {"model": "tiny", "prompt": SAYS, "return_token_strs": True}).json()
    post(client, "/v1/completions", {"model": "tiny", "prompt": SAYS})
    ids = found["tokens"]
    assert tuple(ids) == engine.requests[-1].tokens and ids[0] == tokenizer.bos_id
    assert found["count"] == len(ids) == len(found["token_strs"]) and found["max_model_len"] == 1024
    assert [tokenizer.token(token_id) for token_id in ids] == found["token_strs"]
    bare = post(client, "/tokenize", {"prompt": SAYS, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:] and bare["token_strs"] is None
    assert post(client, "/detokenize", {"tokens": ids[1:]}).json() == {"prompt": SAYS}
    assert post(client, "/detokenize", {"model": "tiny", "tokens": ids}).json()["prompt"].startswith("<s>")
    assert post(client, "/tokenize", {"prompt": ""}).json()["tokens"] == ids[:1]
    assert post(client, "/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("fields", [{}, {"tools": [ADD]}])
def test_ids_of_a_conversation_are_what_a_chat_reads(served, fields):
    client, engine = served
    messages = [{"role": "system", "content": "Be kind."}, *USER]
    found = post(client, "/tokenize", {"messages": messages} | fields).json()["tokens"]
    post(client, "/v1/chat/completions", {"model": "tiny", "messages": messages} | fields)
    assert tuple(found) == engine.requests[-1].tokens
    shorter = post(client, "/tokenize", {"messages": messages, "add_generation_prompt": False} | fields).json()
    assert shorter["tokens"] == found[: shorter["count"]] and shorter["count"] < len(found)


BAD = {
    "neither": ({}, "prompt"),
    "both": ({"prompt": "x", "messages": USER}, "prompt"),
    "ids": ({"prompt": [1, 2]}, "prompt"),
    "a surrogate": ({"prompt": "\ud800"}, "prompt"),
    "no messages": ({"messages": []}, "messages"),
    "unknown": ({"prompt": "x", "colour": 1}, "colour"),
    "special": ({"messages": USER, "add_special_tokens": True}, "add_special_tokens"),
    "tools": ({"prompt": "x", "tools": [ADD]}, "tools"),
    "generation": ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    "template": ({"messages": USER, "chat_template": "x"}, "chat_template"),
    "template's": ({"messages": USER, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
    "going on": ({"messages": USER, "continue_final_message": True}, "continue_final_message"),
    "images": ({"messages": USER, "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    "type": ({"prompt": "x", "return_token_strs": 1}, "return_token_strs"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_tokenised_is_refused_by_name(served, case):
    body, param = BAD[case]
    check_refused(post(served[0], "/tokenize", body), param)


def test_messages_other_models_and_ids_that_are_none_are_refused(served):
    client, _ = served
    for messages, param in BAD_MESSAGES.values():
        check_refused(post(client, "/tokenize", {"messages": messages}), param)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
        assert check_refused(post(client, path, body | {"model": "gpt"}), "model", 404)["code"] == "model_not_found"
    for tokens, param in (
        ([5, 340], "tokens[1]"),
        ([-1], "tokens[0]"),
        (["x"], "tokens[0]"),
        (5, "tokens"),
        (None, "tokens"),
    ):
        check_refused(post(client, "/detokenize", {"tokens": tokens}), param)


def test_what_no_context_holds_is_refused_before_it_is_read(served, tokenizer, monkeypatch):
    """Texts by the bound of answers, which is beyond the context: until there they are counted; ids by the context."""
    client, _ = served
    most = 1024 * longest_token(tokenizer)
    long, user = "a" * (most + 1), {"role": "user"}
    assert post(client, "/tokenize", {"prompt": "a" * 2000}).json()["count"] > 1024
    assert post(client, "/detokenize", {"tokens": [5] * 1024}).status_code == 200
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    monkeypatch.setattr(Tokenizer, "decode", None)
    said = f"{most + 1} characters; the context holds 1024 tokens, which are {most}"
    for path, body, param in (
        ("/tokenize", {"prompt": long}, "prompt"),
        ("/tokenize", {"prompt": long, "add_special_tokens": False}, "prompt"),
        ("/tokenize", {"messages": [user | {"content": long[:9]}, user | {"content": long[9:]}]}, "messages"),
        ("/v1/completions", {"model": "tiny", "prompt": long}, "prompt"),
    ):
        error = check_refused(post(client, path, body), param)
        assert said in error["message"] and error["code"] == "context_length_exceeded"
    error = check_refused(post(client, "/detokenize", {"tokens": [5] * 1025}), "tokens")
    assert error["message"].startswith("1025 ids are given; the context holds 1024")
    assert error["code"] == "context_length_exceeded"


def test_what_the_tokenizer_is(served, tokenizer):
    found = served[0].get("/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"], found["vocab_size"]) == ("<s>", "</s>", 340)
    assert found["special_tokens"]["<|im_end|>"] == tokenizer.special["<|im_end|>"]
    assert found["chat_template"] == tokenizer.chat_template and found["model_max_length"] == 1024
