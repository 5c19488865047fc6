"""The Responses interface, asked by the `openai` client."""

import json

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response as WholeResponse
from openai.types.responses import response_create_params

from internjax.text.chat import render
from internjax.text.message import Message
from serve.pipeline import Pipeline
from serve.rest.kept import KeepLimits
from serve.rest.response_requests import ResponseRequest
from serve.server import start_server

TEXT = "The answer is 6, héllo 你好."
CALL = 'I add.<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1, "b": 2}}<|action_end|><|im_end|>'
ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": None}
USER, BRIEF = Message("user", "hi"), Message("system", "Be brief.")
BAD = {
    "access_programs": [],
    "background": True,
    "background_options": {},
    "context_management": [{"type": "compaction"}],
    "conversation": "conv_1",
    "image": {},
    "include": ["reasoning.encrypted_content"],
    "input": [],
    "instructions": 5,
    "max_output_tokens": 0,
    "max_tool_calls": 3,
    "metadata": {"a": 1},
    "model": 5,
    "moderation": {},
    "parallel_tool_calls": False,
    "previous_response_id": "resp_none",
    "prompt": {"id": "p"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "x"},
    "prompt_cache_retention": "24h",
    "reasoning": {"effort": "high"},
    "safety_identifier": "x" * 513,
    "seed": "1",
    "service_tier": "flex",
    "store": 1,
    "stream": "yes",
    "stream_options": {},
    "temperature": 3,
    "text": {"verbosity": "low"},
    "tool_choice": "required",
    "tools": [{"type": "web_search"}],
    "top_logprobs": 2,
    "top_p": 0,
    "truncation": "auto",
    "user": "x" * 513,
    "no_such_field": 1,
}
TEXT_PART = {"type": "input_text", "text": "x"}
CACHED = {"prompt_cache_breakpoint": {"mode": "explicit"}}
CALL_ITEM = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
WHERE = {"text": "text.verbosity", "tools": "tools[0].type", "metadata": "metadata.a"}


def test_a_text_is_answered_and_the_response_is_one(serve, tokenizer):
    client, pipeline = serve()
    options = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 100, "metadata": {"a": "b"}, "user": "ada"}
    answer = client.responses.create(model="tiny", input="hi", instructions="Be brief.", **options)
    assert (answer.output_text, answer.status, answer.incomplete_details) == (TEXT, "completed", None)
    (request,) = pipeline.engine.requests
    assert list(request.tokens) == render([BRIEF, USER], tokenizer, add_generation_prompt=True).ids
    assert (request.sampling.temperature, request.sampling.top_p, request.max_new_tokens) == (0.5, 0.9, 100)
    assert answer.usage.input_tokens == len(request.tokens) and answer.usage.output_tokens > 5
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    for name, value in (options | {"instructions": "Be brief.", "store": True}).items():
        assert getattr(answer, name) == value
    WholeResponse.model_validate(answer.model_dump(exclude_unset=True))
    cut = client.responses.create(model="tiny", input="hi", max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason, cut.output[0].status) == (
        "incomplete", "max_output_tokens", "incomplete"
    )  # fmt: skip


@pytest.mark.parametrize("chunks", [(1,), (100,)])
def test_the_events_of_a_stream_add_up_to_the_response(serve, chunks):
    client, _ = serve(CALL, chunks=chunks)
    asked = {"model": "tiny", "input": "hi", "tools": [ADD]}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        found = list(stream)
        last = stream.get_final_response()
    assert [event.sequence_number for event in found] == list(range(len(found)))
    assert last.output_text == whole.output_text == "I add."
    call = last.output[1]
    assert (call.name, json.loads(call.arguments), call.type) == ("add", {"a": 1, "b": 2}, "function_call")
    assert [item.type for item in last.output] == [item.type for item in whole.output] == ["message", "function_call"]
    kinds = [event.type.removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-9:] == [
        "output_text.delta", "output_text.done", "content_part.done", "output_item.done", "output_item.added",
        "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    raw = list(client.responses.create(stream=True, **asked))
    assert "".join(event.delta for event in raw if event.type == "response.output_text.delta") == "I add."
    assert raw[-1].response.usage.output_tokens == whole.usage.output_tokens
    assert client.responses.retrieve(raw[-1].response.id).output == raw[-1].response.output
    cut = list(client.responses.create(stream=True, max_output_tokens=20, **asked))
    (message,) = cut[-1].response.output
    assert cut[-1].type == "response.incomplete" and message.content[0].text.startswith("I add.<|action_start|>")
    assert "".join(e.delta for e in cut if e.type == "response.output_text.delta") == message.content[0].text


def test_a_response_goes_on_behind_another_and_behind_its_call(serve, tokenizer):
    client, pipeline = serve(CALL)
    first = client.responses.create(model="tiny", input="hi", instructions="Be brief.", tools=[ADD])
    output = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "3"}
    pipeline.engine.script = lambda request: [*tokenizer.encode(TEXT), tokenizer.eos_id]
    second = client.responses.create(model="tiny", input=[output], previous_response_id=first.id, tools=[ADD])
    spelled = client.responses.create(
        model="tiny", input=[{"role": "user", "content": "hi"}, *first.output, output], tools=[ADD]
    )
    before, behind, alone = (list(request.tokens) for request in pipeline.engine.requests)
    assert behind == alone and "Be brief." in tokenizer.decode(before) and "Be brief." not in tokenizer.decode(behind)
    said = tokenizer.encode(CALL, allow_special=True)
    at = next(i for i in range(len(behind)) if behind[i : i + len(said)] == said)
    assert tokenizer.decode(behind[at + len(said) :], skip_special=False) == (
        "\n<|im_start|>environment name=<|plugin|>\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second.previous_response_id == first.id and spelled.previous_response_id is None
    third = client.responses.create(model="tiny", input="and now?", previous_response_id=second.id)
    read = tokenizer.decode(list(pipeline.engine.requests[-1].tokens))
    assert [read.index(said) for said in ("hi", "I add.", TEXT, "and now?")] == sorted(
        read.index(said) for said in ("hi", "I add.", TEXT, "and now?")
    )
    client.responses.delete(third.id)
    for missing in (third.id, client.responses.create(model="tiny", input="x", store=False).id):
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.retrieve(missing)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="tiny", input="x", previous_response_id=missing)
        assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        client.with_options(api_key="other").responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        client.with_options(api_key="other").responses.delete(second.id)


def test_newer_responses_take_the_place_of_old_ones(serve):
    client, _ = serve(keep=KeepLimits(responses=2))
    first, second, third = (client.responses.create(model="tiny", input="x").id for _ in range(3))
    assert {client.responses.retrieve(each).id for each in (second, third)} == {second, third}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first)


def test_what_is_kept_is_bounded_in_bytes_and_shared_between_keys(serve):
    """Tools that may not be called are told to nobody, so no context bounds them; they are given back."""
    client, _ = serve(keep=KeepLimits(response_bytes=5 << 20))
    other = client.with_options(api_key="other")

    def kept(responses, size):
        tool = ADD | {"description": "x" * size}
        answer = responses.create(model="tiny", input="x", tools=[tool], tool_choice="none")
        assert answer.tools[0].description == tool["description"]
        return answer

    theirs = kept(other.responses, 1 << 20)
    ours = [kept(client.responses, 1 << 20) for _ in range(5)]
    assert all(answer.store for answer in (theirs, *ours))
    assert other.responses.retrieve(theirs.id) == theirs, "the one who floods gives way"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(ours[1].id)
    assert [client.responses.retrieve(answer.id) for answer in ours[2:]] == ours[2:]
    alone = kept(client.responses, 6 << 20)
    assert alone.store is False
    with pytest.raises(openai.NotFoundError, match="`store` says so"):
        client.responses.retrieve(alone.id)
    assert client.responses.retrieve(ours[-1].id) == ours[-1], "one that has no room takes none"
    figures = httpx.get(f"{str(client.base_url).removesuffix('/v1/')}/metrics").text
    (taken,) = (line.split()[1] for line in figures.splitlines() if line.startswith("internjax_response_bytes "))
    assert 4 << 20 < float(taken) <= 5 << 20


def test_log_probabilities_are_included_where_they_are_asked_for(serve):
    client, _ = serve()
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    answer = client.responses.create(model="tiny", input="x", **asked)
    logprobs = answer.output[0].content[0].logprobs
    assert "".join(each.token for each in logprobs) == TEXT and len(logprobs[0].top_logprobs) == 2
    stream = client.responses.create(model="tiny", input="x", stream=True, **asked)
    streamed = [e.logprobs for e in stream if e.type == "response.output_text.delta"]
    assert [each.logprob for part in streamed for each in part] == [each.logprob for each in logprobs]
    assert client.responses.create(model="tiny", input="x").output[0].content[0].logprobs == []
    asking = [{"role": "user", "content": "x"}, *answer.output, {"role": "user", "content": "and?"}]
    assert client.responses.create(model="tiny", input=asking).output_text == TEXT, "an output goes back as it is"


def test_what_may_be_asked_for_with_a_kept_response(serve):
    client, _ = serve()
    kept = client.responses.create(model="tiny", input="x")
    assert client.responses.retrieve(kept.id, include_obfuscation=False) == kept
    for name, value in {"include": [], "starting_after": 3, "include_obfuscation": True, "stream": True}.items():
        with pytest.raises(openai.BadRequestError, match="shown whole, as it was") as caught:
            client.responses.retrieve(kept.id, **{name: value or ["message.output_text.logprobs"]})
        assert caught.value.param == name


def test_an_answer_that_breaks_off_is_an_error_event_and_is_not_kept(serve):
    client, pipeline = serve(lambda request: [70, 71])
    with pytest.raises(openai.APIError, match="the script ran out"):
        list(client.responses.create(model="tiny", input="x", stream=True))
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model="tiny", input="x")
    assert not pipeline.engine.active


@pytest.fixture(scope="module")
def guided(tiny_model):
    with Pipeline(tiny_model, num_slots=2, max_context=1024, context_buckets=()) as pipeline:
        with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
                yield client


def test_a_text_follows_its_format_and_a_call_can_be_asked_for(guided):
    class Pet(pydantic.BaseModel):
        legs: int = pydantic.Field(ge=0, le=9)
        barks: bool

    parsed = guided.responses.parse(model="tiny", input="x", text_format=Pet, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Pet)
    schema = Pet.model_json_schema() | {"additionalProperties": False}
    tool = {"type": "function", "name": "pet", "parameters": schema, "strict": True}
    for choice in ("required", {"type": "function", "name": "pet"}):
        asked = {"tools": [tool], "tool_choice": choice, "max_output_tokens": 100}
        (item,) = guided.responses.create(model="tiny", input="x", **asked).output
        assert item.type == "function_call" and Pet.model_validate_json(item.arguments)
    same = [guided.responses.create(model="tiny", input="x", max_output_tokens=9, extra_body={"seed": 3}) for _ in "ab"]
    assert same[0].output_text == same[1].output_text


def refusal_of(client, body, param: str) -> str:
    response = httpx.post(f"{client.base_url}responses", json={"model": "tiny", "input": "x"} | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    return error["message"]


@pytest.mark.parametrize("field", BAD)
def test_what_cannot_be_honoured_is_refused_by_name(guided, field):
    assert refusal_of(guided, {field: BAD[field]}, WHERE.get(field, field))


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "item_reference", "id": "x"}, "input[0]"),
        ({"role": "tool", "content": "x"}, "input[0].role"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input[0].content"),
        ({"role": "user", "content": "x", "phase": "commentary"}, "input[0].phase"),
        ({"role": "user", "content": "x", "id": "item 1"}, "input[0].id"),
        ({"role": "assistant", "content": "x", "status": "in_progress"}, "input[0].status"),
        ({"role": "user", "content": [TEXT_PART | {"annotations": [{}]}]}, "input[0].content[0].annotations"),
        ({"role": "user", "content": [TEXT_PART, TEXT_PART | CACHED]}, "input[0].content[1].prompt_cache_breakpoint"),
        ({"role": "assistant", "content": [TEXT_PART | {"logprobs": [{"token": "x"}]}]}, "input[0].content"),
        (CALL_ITEM | {"async": True}, "input[0].async"),
        (CALL_ITEM | {"status": "incomplete"}, "input[0].status"),
        ({"type": "function_call_output", "call_id": "c", "output": "x", "name": "f"}, "input[0].name"),
        ({"type": "function_call_output", "call_id": "none", "output": "x"}, "input[0].call_id"),
        ({"type": "function_call", "call_id": "x" * 513, "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ("text", "input[0]"),
    ],
)
def test_items_that_cannot_be_read_are_refused_by_their_place(guided, item, param):
    refusal_of(guided, {"input": [item]}, param)


@pytest.mark.parametrize(("name", "value"), [("async", True), ("defer_loading", True), ("output_schema", {})])
def test_what_a_tool_cannot_have_is_refused_by_its_place(guided, name, value):
    refusal_of(guided, {"tools": [ADD, ADD | {name: value}]}, f"tools[1].{name}")


@pytest.mark.parametrize("kind", ["text", "json_object"])
@pytest.mark.parametrize(("name", "value"), [("schema", {}), ("name", "s"), ("strict", True), ("description", "x")])
def test_only_a_schema_is_described(guided, kind, name, value):
    refusal_of(guided, {"text": {"format": {"type": kind, name: value}}}, f"text.format.{name}")


@pytest.mark.parametrize(
    ("schema", "format_of"), [({"a": float("nan")}, "tools"), ({"\ud800": 1}, "tools"), ({"a": float("inf")}, "text")]
)
def test_what_could_not_be_given_back_is_refused(guided, schema, format_of):
    """JSON as Python reads it has numbers and texts that JSON has not."""
    given = {
        "tools": [{"type": "function", "name": "f", "parameters": schema}],
        "text": {"format": {"type": "json_schema", "name": "s", "schema": schema}},
    }
    body = json.dumps({"model": "tiny", "input": "x", format_of: given[format_of]}).encode()
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{guided.base_url}responses", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, format_of), response.text


def test_every_documented_field_is_honoured_or_refused():
    documented = {*response_create_params.ResponseCreateParamsBase.__annotations__, "stream"}
    assert documented <= {*ResponseRequest.model_fields} == {*BAD} - {"no_such_field"}
