"""The REST interface, asked by the `openai` client over a real socket, with an engine that answers from a script."""

import asyncio
import json
import logging
import socket
import threading
from types import SimpleNamespace

import httpx
import openai
import pytest
from openai.types import completion_create_params as completion_fields
from openai.types.chat import completion_create_params as chat_fields

from internjax.decode.request import check_options
from internjax.decode.sample import Limits
from internjax.text.chat import render
from internjax.text.message import Message, ToolCall
from serve.answering import streams
from serve.answering.params import Params
from serve.client import remote_chat
from serve.guided import Choice
from serve.pipeline import chat_callable
from serve.rest.jobs import is_brief, lines_of
from serve.rest.requests import ChatRequest, CompletionRequest
from serve.server import start_server
from tests.serve import test_guided, test_session_routes

TEXT = "The answer is 6, héllo 你好."
CODE_CALL = "Let me see.<|action_start|><|interpreter|>\n```python\n1 + 1\n```<|action_end|><|im_end|>"
PLUGIN_CALL = '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1, "b": 2}}<|action_end|><|im_end|>'
USER = [{"role": "user", "content": "hi"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
INTERPRETER = {"type": "function", "function": {"name": "interpreter"}}


def raw(client, path: str, body) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{client.base_url}{path}", content=content, headers={"Content-Type": "application/json"})


def test_models(serve):
    client, _ = serve()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "internjax"
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; 'tiny' is"):
        client.models.retrieve("other")


def test_completion(serve, tokenizer):
    client, pipeline = serve()
    answer = client.completions.create(model="tiny", prompt="say", max_tokens=200)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
    num_prompt, num_said = 1 + len(tokenizer.encode("say")), len(tokenizer.encode(TEXT)) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, num_said)
    assert answer.usage.total_tokens == num_prompt + num_said
    client.completions.create(model="tiny", prompt="say")
    assert pipeline.engine.requests[-1].max_new_tokens == 16  # the documented default


@pytest.mark.parametrize("stream", [False, True])
def test_many_requests_with_many_answers_share_few_threads(serve, eventually, monkeypatch, stream):
    go_on = threading.Event()
    client, pipeline = serve(lambda request: go_on.wait(20) and [70] * 3)
    monkeypatch.setattr(streams, "_more", more := threading.BoundedSemaphore(12))
    body = {"model": "tiny", "prompt": [[5]], "n": 128, "max_tokens": 3, "stream": stream}
    before, told = {*threading.enumerate()}, []
    asking = [threading.Thread(target=lambda: told.append(raw(client, "completions", body))) for _ in range(8)]
    for thread in asking:
        thread.start()

    def num_readers() -> int:
        return sum(thread.name.startswith("reader-") for thread in {*threading.enumerate()} - before)

    eventually(lambda: len(pipeline.engine.requests) == 8 * 128 and num_readers() == 8 + 12)
    go_on.set()
    for thread in asking:
        thread.join(timeout=20)
    assert [response.status_code for response in told] == [200] * 8
    for response in told:
        lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        choices = [choice for part in lines or [response.json()] for choice in part["choices"]]
        assert sorted(c["index"] for c in choices if c["finish_reason"]) == [*range(128)]
    eventually(lambda: num_readers() == 0)
    assert all(more.acquire(blocking=False) for _ in range(12)), "a thread that ended was not given back"


@pytest.mark.parametrize("prompt", ["one", ["one", "two"], [5, 6, 7], [[5], [6, 7]]])
def test_every_form_of_prompt_with_n(serve, tokenizer, prompt):
    client, pipeline = serve()
    answer = client.completions.create(model="tiny", prompt=prompt, n=2, seed=7, max_tokens=100)
    prompts = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    ids = [tuple([1, *tokenizer.encode(p)] if isinstance(p, str) else p) for p in prompts]
    assert [request.tokens for request in pipeline.engine.requests] == [i for i in ids for _ in range(2)]
    assert [request.sampling.seed for request in pipeline.engine.requests] == [7, 8] * len(ids)
    assert [choice.index for choice in answer.choices] == list(range(2 * len(ids)))
    assert answer.usage.prompt_tokens == sum(map(len, ids))


def test_echo_puts_the_prompt_in_front(serve, tokenizer):
    client, _ = serve()
    assert (
        client.completions.create(model="tiny", prompt="say: ", echo=True, max_tokens=99).choices[0].text
        == "say: " + TEXT
    )
    chunks = client.completions.create(
        model="tiny", prompt=tokenizer.encode("ids "), echo=True, stream=True, max_tokens=99
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ids " + TEXT


@pytest.mark.parametrize("chunks", [(1,), (3,), (100,)])
def test_completion_stream_with_usage(serve, chunks):
    client, _ = serve(chunks=chunks)
    stream = client.completions.create(
        model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}, max_tokens=99, logprobs=0
    )
    *parts, last = stream
    assert "".join(part.choices[0].text for part in parts) == TEXT
    assert "".join(token for part in parts for token in (part.choices[0].logprobs or EMPTY).tokens) == TEXT
    assert [part.choices[0].finish_reason for part in parts][-1] == "stop"
    assert last.choices == [] and last.usage.completion_tokens > 1
    assert {part.id for part in parts} == {last.id}


class EMPTY:
    tokens = ()


def test_logprobs_of_both_kinds(serve, tokenizer):
    client, _ = serve()
    said = tokenizer.encode(TEXT)
    logprobs = client.completions.create(model="tiny", prompt="x", logprobs=0, max_tokens=99).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([-token_id / 1000 for token_id in said])
    assert all(TEXT[o:].startswith(t) for o, t in zip(logprobs.text_offset, logprobs.tokens, strict=True))
    content = client.chat.completions.create(model="tiny", messages=USER, logprobs=True).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == logprobs.token_logprobs
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == TEXT
    assert client.chat.completions.create(model="tiny", messages=USER).choices[0].logprobs is None


def test_most_likely_tokens_of_both_kinds(serve, tokenizer):
    client, _ = serve()
    said = tokenizer.encode(TEXT)
    logprobs = client.completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=99).choices[0].logprobs
    assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)
    chat = client.chat.completions.create(model="tiny", messages=USER, logprobs=True, top_logprobs=3)
    content = chat.choices[0].logprobs.content
    for token_id, entry in zip(said, content, strict=True):
        assert [top.logprob for top in entry.top_logprobs] == [entry.logprob - i for i in range(3)]
        assert [bytes(top.bytes) for top in entry.top_logprobs] == [tokenizer.bytes_of(token_id + i) for i in range(3)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("as_ids", "max_tokens"), [(False, 5), (True, 5), (True, 1), (True, 0)])
def test_echo_with_the_prompts_log_probabilities(serve, tokenizer, as_ids, max_tokens, stream):
    """What scoring clients ask for: one list over prompt and answer, offsets into the text they are in."""
    client, pipeline = serve(chunks=(2,))
    text = "say héllo: "
    ids, said = tokenizer.encode(text), tokenizer.encode(TEXT)[:max_tokens]
    asked = {"model": "tiny", "prompt": ids if as_ids else text, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        parts = [choice.logprobs for choice in choices if choice.logprobs]
        whole, finish = "".join(choice.text for choice in choices), choices[-1].finish_reason
        found = {name: [x for part in parts for x in getattr(part, name)] for name in FIELDS_OF_LOGPROBS}
    else:
        answer = client.completions.create(**asked)
        whole, finish = answer.choices[0].text, answer.choices[0].finish_reason
        found = {name: getattr(answer.choices[0].logprobs, name) for name in FIELDS_OF_LOGPROBS}
        assert answer.usage.completion_tokens == max_tokens
    assert whole == text + tokenizer.decode(said) and finish == "length"
    first = [None] if as_ids else [-ids[0] / 1000]  # behind the token that begins a text
    assert found["token_logprobs"] == pytest.approx([*first, *[-token_id / 1000 for token_id in (*ids[1:], *said)]])
    assert [None if t is None else max(t.values()) for t in found["top_logprobs"]] == found["token_logprobs"]
    assert all(whole[o:].startswith(t) for o, t in zip(found["text_offset"], found["tokens"], strict=True))
    assert "".join(found["tokens"]) == whole
    assert pipeline.engine.requests == [] or pipeline.engine.requests[-1].tokens[-len(ids) :] == tuple(ids)


FIELDS_OF_LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def test_chat(serve, tokenizer):
    client, pipeline = serve()
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0.2, top_p=0.5, seed=-3)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.tool_calls is None
    request = pipeline.engine.requests[0]
    expected = [Message("system", "Be kind."), Message("user", "hi")]
    assert list(request.tokens) == render(expected, tokenizer, add_generation_prompt=True).ids
    assert (request.sampling.temperature, request.sampling.top_p) == (0.2, 0.5)
    assert request.sampling.seed == 2**32 - 3
    assert request.max_new_tokens == pipeline.max_context - len(request.tokens)


def test_chat_stream(serve):
    client, _ = serve(chunks=(2,))
    chunks = list(client.chat.completions.create(model="tiny", messages=USER, stream=True, n=2))
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert [choice.delta.role for choice in own] == ["assistant", *[None] * (len(own) - 1)]
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert [choice.finish_reason for choice in own if choice.finish_reason] == ["stop"]


def test_what_comes_when_all_answers_are_there_is_one_part():
    """The last words, the finish, the usage and the end of the stream."""
    job = SimpleNamespace(body=ChatRequest(model="tiny", messages=USER, stream=True), is_complete=False)

    async def chunks():
        yield {"text": "a"}
        job.is_complete = True
        yield {"text": "b"}
        yield {"finish": "stop"}

    async def parts():
        return [part async for part in lines_of(job, "kind", chunks())]

    assert asyncio.run(parts()) == [
        'data: {"text": "a"}\n\n',
        'data: {"text": "b"}\n\ndata: {"finish": "stop"}\n\ndata: [DONE]\n\n',
    ]


def test_only_what_is_short_and_without_a_guide_is_begun_in_the_event_loop():
    assert is_brief(["x" * 900, [1] * 900], Params()) and not is_brief(["x" * 1901, "y"], Params())
    assert not is_brief(["x"] * 21, Params()) and not is_brief(["x"], Params(guide=Choice(("a", "b"))))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["is", ["zzz", " is 6, h"], [TEXT[-5:]]])
def test_stop(serve, stop, stream):
    client, pipeline = serve(chunks=(3,))
    cut = min(TEXT.index(s) for s in ([stop] if isinstance(stop, str) else stop) if s in TEXT)
    answer = client.chat.completions.create(model="tiny", messages=USER, stop=stop, stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == TEXT[:cut]
    assert not pipeline.engine.active


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_length(serve, name):
    client, _ = serve()
    answer = client.chat.completions.create(model="tiny", messages=USER, **{name: 4})
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 4)


def test_more_sampling_options_come_as_extra_body(serve):
    client, pipeline = serve()
    own = {"frequency_penalty": 0.5, "presence_penalty": -1.5}
    extra = {"top_k": 5, "min_p": 0.1, "typical_p": 0.5, "repetition_penalty": 1.1}
    more = {"min_tokens": 4, "bad_words": ["answer"], "stop_token_ids": [77, 2], "ignore_eos": True}
    client.completions.create(model="tiny", prompt="x", **own, logit_bias={"5": -100}, extra_body=extra | more)
    chat = {"messages": USER, "max_completion_tokens": 9, "logit_bias": {"5": -100}}
    client.chat.completions.create(model="tiny", **chat, **own, extra_body=extra | more)
    for request in pipeline.engine.requests:
        assert {name: getattr(request.sampling, name) for name in own | extra} == own | extra
        assert (request.sampling.logit_bias, request.sampling.min_new_tokens) == (((5, -100),), 4)
        assert tuple(pipeline.tokenizer.encode(" answer")) in request.sampling.bad_words
        assert request.stop_ids == (77, 2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "name", "arguments", "text"),
    [(CODE_CALL, "interpreter", {"code": "1 + 1"}, "Let me see."), (PLUGIN_CALL, "add", {"a": 1, "b": 2}, "")],
)
def test_tool_calls(serve, stream, said, name, arguments, text):
    client, _ = serve(said, chunks=(2, 1))
    answer = client.chat.completions.create(model="tiny", messages=USER, tools=[ADD, INTERPRETER], stream=stream)
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == text
        first, *more = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert len(more) > 3 and all(call.id is call.function.name is None and call.index == 0 for call in more)
        first.function.arguments += "".join(call.function.arguments for call in more)
        calls, finish = [first], chunks[-1].finish_reason
    else:
        assert (answer.choices[0].message.content or "") == text
        calls, finish = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    (call,) = calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == ("function", name, arguments)
    assert call.id and finish == "tool_calls"


@pytest.mark.parametrize(("said", "role_name"), [(CODE_CALL, "interpreter"), (PLUGIN_CALL, "plugin")])
def test_a_tool_result_comes_back_as_the_environment(serve, tokenizer, said, role_name):
    client, pipeline = serve(said)
    tools = [ADD, INTERPRETER]
    message = client.chat.completions.create(model="tiny", messages=USER, tools=tools).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}
    client.chat.completions.create(model="tiny", messages=[*USER, message, result], tools=tools)
    before, after = (list(request.tokens) for request in pipeline.engine.requests)
    said_ids = tokenizer.encode(said, allow_special=True)
    assert after[: len(before) + len(said_ids)] == before + said_ids
    assert pipeline.tokenizer.decode(after[len(before) + len(said_ids) :], skip_special=False) == (
        f"\n<|im_start|>environment name=<|{role_name}|>\n2<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_are_not_told_when_none_may_be_called(serve, tokenizer):
    client, pipeline = serve(CODE_CALL)
    answer = client.chat.completions.create(model="tiny", messages=USER, tools=[INTERPRETER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    expected = render([Message("user", "hi")], tokenizer, add_generation_prompt=True).ids
    assert list(pipeline.engine.requests[0].tokens) == expected


def test_every_documented_field_is_known():
    for params, model in ((chat_fields, ChatRequest), (completion_fields, CompletionRequest)):
        documented = set(params.CompletionCreateParamsNonStreaming.__annotations__)
        documented |= set(params.CompletionCreateParamsBase.__annotations__)
        assert documented and documented <= set(model.model_fields)


BAD_CHATS = {
    "frequency_penalty": 2.5,
    "presence_penalty": -2.5,
    "logit_bias": {"5": 101},
    "top_logprobs": 3,  # without logprobs
    "typical_p": 0,
    "bad_words": [""],
    "min_tokens": -1,
    "stop_token_ids": [-1],
    "ignore_eos": 1,
    "response_format": "json",
    "structured_outputs": {},
    "modalities": ["audio"],
    "audio": {"voice": "alloy", "format": "wav"},
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "metadata": {"a": "b"},
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "service_tier": "flex",
    "store": True,
    "verbosity": "high",
    "web_search_options": {},
    "tool_choice": "required",
    "parallel_tool_calls": True,
    "temperature": 2.5,
    "top_p": 0,
    "n": 0,
    "seed": 1.5,
    "max_tokens": 0,
    "max_completion_tokens": "5",
    "stop": [""],
    "stream": "yes",
    "stream_options": {"include_usage": True},
    "messages": [],
    "logprobs": 1,
    "user": 5,
    "safety_identifier": 5,
    "tools": [{"type": "custom"}],
    "top_k": -1,
    "min_p": 1.5,
    "repetition_penalty": 0,
    "no_such_field": 1,
}
BAD_COMPLETIONS = {
    "best_of": 4,
    "suffix": "end",
    "logprobs": 21,
    "echo": "yes",
    "prompt": [],
    "logit_bias": {"340": 1},
    "frequency_penalty": "1",
    "presence_penalty": 3,
    "max_tokens": 0,  # without echo
    "min_tokens": 17,
    "stop_token_ids": list(range(20)),
    "bad_words": [f"{i}{i}" for i in range(10, 80)],
    "temperature": -0.1,
    "stream_options": {},
    "no_such_field": 1,
}


@pytest.fixture(scope="module")
def refusing(tokenizer):
    """A client of one server for all requests that must not reach the engine."""
    from serve.pipeline import Pipeline

    class NoEngine:
        max_context, num_pages, page_size, limits, adapters, fault = 1024, 64, 16, Limits(), (), None

        def silent_seconds(self):
            return 0.0

        def submit(self, request):
            check_options(request, self.limits, vocab_size=340)
            raise AssertionError("a bad request reached the engine")

    with start_server(Pipeline.over(NoEngine(), tokenizer), model_name="tiny") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
            yield client


def check_refused(response: httpx.Response, param: str | None, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert error["param"] == param, error
    return error


@pytest.mark.parametrize("field", BAD_CHATS)
def test_what_a_chat_cannot_honour_is_refused_by_name(refusing, field):
    body = {"model": "tiny", "messages": USER} | {field: BAD_CHATS[field]}
    error = check_refused(raw(refusing, "chat/completions", body), PARAM_OF.get(field, field))
    assert field.split("_")[0] in error["message"]


PARAM_OF = {"stop": "stop[0]", "tools": "tools[0].type", "logit_bias": "logit_bias.5"}
PARAM_OF |= {"bad_words": "bad_words[0]", "stop_token_ids": "stop_token_ids[0]"}


@pytest.mark.parametrize("field", BAD_COMPLETIONS)
def test_what_a_completion_cannot_honour_is_refused_by_name(refusing, field):
    body = {"model": "tiny", "prompt": "x"} | {field: BAD_COMPLETIONS[field]}
    check_refused(raw(refusing, "completions", body), field)


def test_no_field_is_ignored():
    """Each field is either honoured (its effect is tested above) or in the table of what is refused."""
    honoured = {
        "model": test_models,
        "messages": test_chat,
        "max_tokens": test_length,
        "max_completion_tokens": test_length,
        "temperature": test_chat,
        "top_p": test_chat,
        "seed": test_chat,
        "n": test_chat_stream,
        "stop": test_stop,
        "stream": test_chat_stream,
        "stream_options": test_completion_stream_with_usage,
        "logprobs": test_logprobs_of_both_kinds,
        "top_logprobs": test_most_likely_tokens_of_both_kinds,
        "tools": test_tool_calls,
        "tool_choice": test_tools_are_not_told_when_none_may_be_called,
        "parallel_tool_calls": test_tool_calls,  # a turn holds one call, whether or not more are allowed
        "user": test_the_log_names_the_user,
        "safety_identifier": test_the_log_names_the_user,
        "prompt": test_every_form_of_prompt_with_n,
        "structured_outputs": test_guided.test_the_stream_of_a_guided_answer_is_the_answer,
        "response_format": test_guided.test_n_answers_are_guided_each_by_its_own_guide_beside_free_ones,
        "echo": test_echo_puts_the_prompt_in_front,
        "best_of": test_neutral_values_pass,
        "top_k": test_more_sampling_options_come_as_extra_body,
        "min_p": test_more_sampling_options_come_as_extra_body,
        "repetition_penalty": test_more_sampling_options_come_as_extra_body,
        "typical_p": test_more_sampling_options_come_as_extra_body,
        "frequency_penalty": test_more_sampling_options_come_as_extra_body,
        "presence_penalty": test_more_sampling_options_come_as_extra_body,
        "logit_bias": test_more_sampling_options_come_as_extra_body,
        "bad_words": test_more_sampling_options_come_as_extra_body,
        "min_tokens": test_more_sampling_options_come_as_extra_body,
        "stop_token_ids": test_more_sampling_options_come_as_extra_body,
        "ignore_eos": test_more_sampling_options_come_as_extra_body,
        "session_id": test_session_routes.test_a_turn_sends_only_what_is_new_and_is_answered_as_if_all_was_sent,
    }
    assert set(ChatRequest.model_fields) - set(BAD_CHATS) - set(honoured) == set()
    assert set(CompletionRequest.model_fields) - set(BAD_COMPLETIONS) - set(honoured) == set()


def test_neutral_values_pass(serve):
    client, _ = serve()
    neutral = dict.fromkeys(BAD_CHATS) | {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "functions": [],
        "function_call": "none",
        "metadata": {},
        "service_tier": "auto",
        "store": False,
        "verbosity": "medium",
        "reasoning_effort": "none",
        "tool_choice": "none",
        "logprobs": True,
        "top_logprobs": 0,
        "bad_words": [],
        "min_tokens": 0,
        "stop_token_ids": [],
        "ignore_eos": False,
    }
    del neutral["no_such_field"]
    response = raw(client, "chat/completions", neutral | {"model": "tiny", "messages": USER})
    assert response.status_code == 200, response.text
    body = {"model": "tiny", "prompt": "x", "suffix": "", "n": 2, "best_of": 2, "logprobs": None}
    assert raw(client, "completions", body).status_code == 200


BAD_MESSAGES = {
    "unknown role": ([{"role": "robot", "content": "x"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "an image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
    "a part with a cache": (
        [{"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}]}],
        "messages[0].content",
    ),
    "a number": ([{"role": "user", "content": 5}], "messages[0].content"),
    "unknown key": ([{"role": "user", "content": "x", "colour": "red"}], "messages[0].colour"),
    "a refusal": ([{"role": "assistant", "content": "x", "refusal": "no"}], "messages[0].refusal"),
    "calls of a user": (
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}],
        "messages[0].tool_calls",
    ),
    "two calls in a turn": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}] * 2}],
        "messages",
    ),
    "broken arguments": (
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        "messages",
    ),
    "result of no call": ([{"role": "tool", "tool_call_id": "call_9", "content": "2"}], "messages[0].tool_call_id"),
    "name with a newline": ([{"role": "user", "content": "x", "name": "a\nb"}], "messages"),
    "a lone surrogate": ([{"role": "user", "content": "\ud800"}], "messages"),
    "not a list": ("hi", "messages"),
    "strings": (["hi"], "messages[0]"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_are_refused(refusing, case):
    messages, param = BAD_MESSAGES[case]
    check_refused(raw(refusing, "chat/completions", {"model": "tiny", "messages": messages}), param)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b"", "body"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"null", "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 100_000, "body"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"model": "tiny", "prompt": "x", "seed": 1' + b"0" * 30 + b"}", "seed"),
    ],
)
def test_bad_bodies_are_refused(refusing, body, said):
    response = raw(refusing, "completions", body)
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "the body has no Content-Type; send it with Content-Type: application/json"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "has the Content-Type 'application/x-www-form-urlenc"),
    ],
)
def test_a_body_that_is_not_sent_as_json_is_told_so(headers, said, refusing):
    content = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    response = httpx.post(f"{refusing.base_url}completions", content=content, headers=headers)
    assert said in check_refused(response, None)["message"]


def test_a_body_that_is_too_large_is_refused(refusing):
    response = raw(refusing, "completions", json.dumps({"model": "tiny", "prompt": "x" * (17 << 20)}).encode())
    check_refused(response, None, 413)


def test_other_models_other_paths_other_methods(refusing):
    body = {"model": "gpt", "messages": USER}
    assert check_refused(raw(refusing, "chat/completions", body), "model", 404)["code"] == "model_not_found"
    check_refused(raw(refusing, "audio/speech", {}), None, 404)
    check_refused(httpx.get(f"{refusing.base_url}completions"), None, 405)
    for path, methods in (("completions", "POST"), ("sessions", "GET, POST"), ("sessions/x", "DELETE, GET")):
        assert httpx.patch(f"{refusing.base_url}{path}").headers["Allow"] == methods
    assert check_refused(raw(refusing, "chat/completions", {"model": "tiny", "messages": USER, "store": 0}), "store")
    with pytest.raises(openai.BadRequestError, match="suffix is refused: text is continued, not filled in"):
        refusing.completions.create(model="tiny", prompt="x", suffix="end")


def test_what_is_longer_than_the_context_is_refused_with_the_numbers(refusing):
    body = {"model": "tiny", "prompt": [5] * 1020, "max_tokens": 5}
    error = check_refused(raw(refusing, "completions", body), "prompt")
    assert error["code"] == "context_length_exceeded"
    assert "holds 1024 tokens; the prompt has 1020 and 5 are asked for, 1025 together" in error["message"]


def test_too_many_answers_are_refused(refusing):
    check_refused(raw(refusing, "completions", {"model": "tiny", "prompt": [[5]] * 5, "n": 128}), "n")


def test_none_of_the_answers_runs_when_one_cannot(serve):
    client, pipeline = serve(seconds_per_event=0.05)
    check_refused(raw(client, "completions", {"model": "tiny", "prompt": [[5], [5] * 1025]}), "prompt")
    assert len(pipeline.engine.requests) == 1 and not pipeline.engine.active


def test_the_key(serve):
    client, _ = serve(api_key="sésame")
    base = str(client.base_url)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sésame".encode()}):
        for method, path in (("GET", "models"), ("POST", "completions"), ("GET", "nowhere")):
            response = httpx.request(method, base + path, headers=headers)
            assert check_refused(response, None, 401)["code"] == "invalid_api_key"
    headers = {"Authorization": "Bearer sésame".encode()}
    assert httpx.get(f"{base}models", headers=headers).status_code == 200
    assert httpx.get(base.replace("/v1/", "/health")).status_code == 200


def test_health_tells_of_a_failed_engine(serve):
    client, pipeline = serve()
    url = str(client.base_url).replace("/v1/", "/health")
    assert httpx.get(url).json() == {"status": "ok", "model": "tiny", "fault": None}
    pipeline.engine.fault = "out of memory"
    response = httpx.get(url)
    assert (response.status_code, response.json()["fault"]) == (503, "out of memory")


def test_an_engine_failure_is_an_error_and_the_server_lives_on(serve):
    client, pipeline = serve(lambda request: [70, 71])
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="x", max_tokens=50)
    assert caught.value.body["type"] == "server_error"
    with pytest.raises(openai.APIError, match="the script ran out"):
        list(client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True))
    pipeline.engine.script = lambda request: [70, 2]
    assert client.completions.create(model="tiny", prompt="x").choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(serve, eventually, stream):
    client, pipeline = serve(lambda request: [70] * 500, seconds_per_event=0.02)
    body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 500, "n": 2, "stream": stream}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: len(pipeline.engine.active) == 2)
        if stream:
            assert b"200 OK" in connection.recv(1000)
    eventually(lambda: not pipeline.engine.active)


def test_many_clients_at_once(serve):
    client, pipeline = serve(chunks=(2,), seconds_per_event=0.005)
    answers = [None] * 16

    def ask(index):
        answers[index] = (
            client.chat.completions.create(model="tiny", messages=USER, seed=index).choices[0].message.content
        )

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert answers == [TEXT] * 16
    assert sorted(request.sampling.seed for request in pipeline.engine.requests) == list(range(16))


def test_the_log_names_the_user(serve, caplog, eventually):
    client, _ = serve()
    with caplog.at_level(logging.INFO, logger="serve"):
        client.completions.create(model="tiny", prompt="SECRET", user="ada")
        client.chat.completions.create(model="tiny", messages=USER, safety_identifier="bob")
        eventually(lambda: "user='bob'" in caplog.text)
    assert "user='ada'" in caplog.text
    assert "SECRET" not in caplog.text and TEXT not in caplog.text


def test_a_port_in_use_is_refused_and_a_closed_one_is_free(scripted):
    with start_server(scripted(TEXT), model_name="tiny") as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is in use"):
            start_server(scripted(TEXT), model_name="tiny", port=port)
    start_server(scripted(TEXT), model_name="tiny", port=port).close()


@pytest.mark.parametrize("said", [TEXT, CODE_CALL, PLUGIN_CALL])
def test_a_remote_chat_is_the_same_as_one_in_process(serve, said):
    client, pipeline = serve(said)
    tools = [
        dict(ADD["function"]),
        {"name": "interpreter", "description": "Runs code.", "parameters": {"type": "object"}},
    ]
    start = [Message("system", "Be kind."), Message("user", "hi")]
    replies = []
    for chat in (remote_chat(str(client.base_url), "tiny"), chat_callable(pipeline)):
        sampling = {"seed": 3, "max_tokens": 200}
        first = chat(start, tools=tools, stop=("zzz",), sampling=sampling)
        result = [Message("environment", "2", name=first.call.name)] if first.call else [Message("user", "more")]
        second = chat([*start, first, *result], tools=tools, stop=(), sampling=sampling)
        replies.append((first, second))
    assert replies[0] == replies[1]
    remote, local = pipeline.engine.requests[:2], pipeline.engine.requests[2:]
    assert remote == local


def test_a_remote_call_that_is_no_json_stays_text(serve):
    client, _ = serve("<|action_start|><|plugin|>\nnonsense<|action_end|><|im_end|>")
    reply = remote_chat(str(client.base_url), "tiny")([Message("user", "hi")], tools=[dict(ADD["function"])])
    assert reply.call is None and "nonsense" in reply.content


def test_calls_round_trip_through_the_wire(serve):
    """What a client sends back of an answer is the message that the model gave."""
    from serve.rest.protocol import messages_of

    call = ToolCall("interpreter", "print('<|im_end|>')")
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c",
                "type": "function",
                "function": {"name": "interpreter", "arguments": json.dumps({"code": call.content})},
            }
        ],
    }
    request = ChatRequest.model_validate({"model": "tiny", "messages": [*USER, turn]})
    assert messages_of(request.messages, {})[1] == Message("assistant", "", call=call)
