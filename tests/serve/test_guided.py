"""Guided answers of a random model: whatever it would rather say, what comes out is what was asked for."""

import dataclasses
import json
import re
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internjax.decode.speculate import PromptLookup
from internjax.text.chat import stop_ids
from internjax.text.message import Message
from serve.guided import (
    MAX_COMPILED,
    AnyJSON,
    CalledFunction,
    CallOf,
    Choice,
    Grammar,
    GuideError,
    Guides,
    JSONSchema,
    Regex,
)
from serve.pipeline import Params, Pipeline
from serve.server import start_server

USER = [{"role": "user", "content": "hi"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    sizes = {"num_slots": 4, "max_context": 1024, "context_buckets": ()}
    with Pipeline(tiny_model, **sizes, speculation=PromptLookup(num_drafts=2)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def client(pipeline):
    with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client


def validate(value, schema):
    """Raises jsonschema.ValidationError where the value is not as the schema wants it."""
    import jsonschema  # takes three seconds, which every worker would spend on collecting this file

    jsonschema.validate(value, schema)


def answer(pipeline, guide, seed=0, **options):
    return pipeline.complete("x", Params(guide=guide, seed=seed, max_tokens=150, **options)).result()


def small_schemas():
    plain = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -9, "maximum": 99},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["é\n", 1.5, [None]]},
            {"const": {"a": "你"}},
        ]
    )
    arrays = st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, plain)
    parts = plain | arrays | st.builds(lambda a, b: {"anyOf": [a, b]}, plain, plain)
    return st.builds(
        lambda properties, optional: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name != optional],
            "additionalProperties": False,
        },
        st.dictionaries(st.sampled_from("abc"), parts, max_size=3),
        st.sampled_from("abc"),
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=small_schemas(), seed=st.integers(0, 2**32 - 1), greedy=st.booleans())
def test_an_answer_follows_its_schema(pipeline, schema, seed, greedy):
    result = answer(pipeline, JSONSchema(schema), seed, temperature=0.0 if greedy else 1.0)
    assert result.finish == "stop", result.text
    validate(json.loads(result.text), schema)


PATTERNS = ["[0-9]{3}-[a-f]{2,4}", "(yes|no), (é|你好){1,3}\n?", r"[a-z_]{1,8}@[^ @]{1,4}\.(com|org)"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_answer_matches_its_expression(pipeline, pattern):
    texts = {answer(pipeline, Regex(pattern), seed).text for seed in range(4)}
    assert len(texts) > 1 and all(re.fullmatch(pattern, text) for text in texts), texts


def test_choices_and_grammars(pipeline):
    options = ("yes", 'no "quotes"\n', "你好", "yes, but")
    texts = {answer(pipeline, Choice(options), seed, temperature=2.0).text for seed in range(12)}
    assert texts <= set(options) and len(texts) > 1
    for text in ('start: "a" ("b" | start)', 'root ::= "a" ("b" | root)'):
        result = answer(pipeline, Grammar(text), 3)
        assert re.fullmatch("a+b", result.text)
    assert isinstance(json.loads(answer(pipeline, JSONSchema('{"type": "array", "maxItems": 0}')).text), list)


def test_n_answers_are_guided_each_by_its_own_guide_beside_free_ones(client, pipeline):
    alone = client.completions.create(model="tiny", prompt="x", max_tokens=20, seed=5)
    schema = {"name": "person", "schema": PERSON, "strict": True}
    asked = {"type": "json_schema", "json_schema": schema}
    handle = pipeline.complete("x", Params(max_tokens=20, seed=5))
    chat = client.chat.completions.create(model="tiny", messages=USER, n=4, seed=1, response_format=asked)
    people = [json.loads(choice.message.content) for choice in chat.choices]
    for person in people:
        validate(person, PERSON)
    assert len({person["age"] for person in people}) > 1
    assert {choice.finish_reason for choice in chat.choices} == {"stop"}
    assert handle.result().text == alone.choices[0].text


def test_the_stream_of_a_guided_answer_is_the_answer(client):
    outputs = {"structured_outputs": {"regex": "[a-z]{4} [0-9]{4}"}}
    sampling = {"model": "tiny", "prompt": "x", "max_tokens": 20, "seed": 2, "extra_body": outputs}
    whole = client.completions.create(**sampling).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(stream=True, **sampling)]
    assert "".join(chunk.text for chunk in chunks) == whole.text and re.fullmatch("[a-z]{4} [0-9]{4}", whole.text)
    assert chunks[-1].finish_reason == whole.finish_reason == "stop"
    sampling["max_tokens"] = 3
    cut = client.completions.create(**sampling).choices[0]
    assert cut.finish_reason == "length" and whole.text.startswith(cut.text)


def test_the_client_s_parse_gives_objects(client):
    class Person(pydantic.BaseModel):
        kind: Literal["cat", "dog"]
        legs: Literal[3, 4]

    class Pair(pydantic.BaseModel):
        first: Person
        second: Person | None

    chat = client.chat.completions.parse(model="tiny", messages=USER, response_format=Pair, seed=0)
    pair = chat.choices[0].message.parsed
    assert isinstance(pair, Pair) and pair.first.legs in (3, 4)


def test_json_mode_begins_an_object_and_a_stop_string_may_cut_it(client):
    asked = {"model": "tiny", "messages": USER, "response_format": {"type": "json_object"}, "max_tokens": 30}
    chat = client.chat.completions.create(**asked, seed=3)
    assert chat.choices[0].message.content.startswith("{")
    cut = client.chat.completions.create(**asked, seed=3, stop="{")
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("", "stop")


BAD = {
    "a regex": ({"structured_outputs": {"regex": "a("}}, "structured_outputs", "unclosed group"),
    "look-around": ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs", "look-around"),
    "a grammar": ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "nothing"),
    "a marker": ({"structured_outputs": {"grammar": "start: <|action_start|>"}}, "structured_outputs", "action_start"),
    "a schema": ({"structured_outputs": {"json": {"type": "wrong"}}}, "structured_outputs", "wrong"),
    "no JSON": ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
    "a deep one": (
        {"structured_outputs": {"json": '{"items":' * 400 + "{}" + "}" * 400}},
        "structured_outputs",
        "limit",
    ),
    "a deep grammar": ({"structured_outputs": {"grammar": "start: " + "(" * 9999}}, "structured_outputs", "Grammar"),
    "no choice": ({"structured_outputs": {"choice": []}}, "structured_outputs", "Choice"),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "give one"),
    "options": ({"structured_outputs": {"json": {"x-guidance": {}}}}, "structured_outputs", "x-guidance"),
    "bans": ({"structured_outputs": {"regex": "a"}, "bad_words": ["b"]}, "bad_words", "Leave out"),
    "least": ({"structured_outputs": {"regex": "a"}, "min_tokens": 2, "max_tokens": 9}, "min_tokens", "Leave out"),
    "no end": ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "Leave out"),
}
STRICT = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}, "strict": True}}
BAD_CHATS = {
    "not enforceable": ({"response_format": STRICT}, "response_format", "not"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
    "both": (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "both",
    ),
    "tools": (
        {"response_format": {"type": "json_object"}, "tools": [{"type": "function", "function": {"name": "f"}}]},
        "response_format",
        "holds no calls",
    ),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_CHATS])
def test_what_cannot_be_followed_is_refused_with_its_reason(client, case):
    extra, param, said = (BAD | BAD_CHATS)[case]
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as refused:
        if case in BAD:
            client.completions.create(model="tiny", prompt="x", extra_body=extra)
        else:
            client.chat.completions.create(model="tiny", messages=USER, extra_body=extra)
    assert refused.value.param == param


def test_a_schema_that_is_not_strict_is_followed_as_far_as_it_can_be(client):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3, "uniqueItems": True}
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    chat = client.chat.completions.create(model="tiny", messages=USER, response_format=asked, max_tokens=60)
    assert set(json.loads(chat.choices[0].message.content)) <= {1, 2}


def test_an_answer_that_nothing_can_go_on_with_fails_alone(client, pipeline, eventually):
    """A grammar may name a token by its id; a marker is never drawn all the same."""
    token = pipeline.tokenizer.special["<|action_start|>"]
    with pytest.raises(openai.BadRequestError, match="cannot be guided any further") as refused:
        outputs = {"grammar": f'start: "a" <[{token}]>'}
        client.completions.create(model="tiny", prompt="x", extra_body={"structured_outputs": outputs})
    assert refused.value.param == "structured_outputs"
    stats = pipeline.engine.stats
    eventually(lambda: stats().num_free_pages == stats().num_pages and stats().num_active == 0)
    assert answer(pipeline, Regex("ab")).text == "ab"


LINE = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/point"}, "b": {"$ref": "#/$defs/point"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 2}},
}
TOOLS = [
    {"type": "function", "function": {"name": "line", "parameters": LINE}},
    {"type": "function", "function": {"name": "person", "parameters": PERSON, "strict": True}},
    {"type": "function", "function": {"name": "interpreter"}},
]


def strict(parameters):
    return {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}


SCHEMAS = {"line": LINE, "person": PERSON, "interpreter": {"required": ["code"]}}


def call_in(client, **asked):
    """The one call of an answer, which a stream gives likewise."""
    asked = {"model": "tiny", "messages": USER, "tools": TOOLS, "max_tokens": 160} | asked
    choice = client.chat.completions.create(**asked).choices[0]
    (call,) = choice.message.tool_calls
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **asked)]
    deltas = [call.function for chunk in chunks for call in chunk.delta.tool_calls or ()]
    streamed = deltas[0].name, "".join(delta.arguments for delta in deltas)
    assert streamed == (call.function.name, call.function.arguments) and chunks[-1].finish_reason == "tool_calls"
    assert not choice.message.content and choice.finish_reason == "tool_calls"
    validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return call.function


def test_a_call_can_be_asked_for(client):
    tools = TOOLS[:2]  # a random model never ends its code
    names = {call_in(client, tool_choice="required", tools=tools, seed=seed).name for seed in range(2)}
    assert names <= {"line", "person"}
    for name in ("line", "person"):
        named = {"type": "function", "function": {"name": name}}
        assert call_in(client, tool_choice=named, tools=tools, seed=1).name == name
    code = {"type": "function", "function": {"name": "interpreter"}}
    cut = client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, tool_choice=code, max_tokens=30)
    assert cut.choices[0].message.content.startswith("<|action_start|><|interpreter|>\n```python\n")
    assert (cut.choices[0].message.tool_calls, cut.choices[0].finish_reason) == (None, "length")


def test_a_call_of_a_strict_function_follows_its_schema_where_the_model_makes_one(client, pipeline):
    special = pipeline.tokenizer.special
    begin = {special["<|action_start|>"]: 100}
    assert call_in(client, tools=TOOLS[1:2], logit_bias=begin, seed=4).name == "person"
    asked = {"model": "tiny", "messages": USER, "tools": TOOLS[1:2], "max_tokens": 30, "seed": 4}
    text = client.chat.completions.create(**asked, logit_bias={special["<|action_start|>"]: -100}).choices[0].message
    assert text.content and text.tool_calls is None


@pytest.mark.parametrize(
    ("extra", "param", "said"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "none"}}}, "tool_choice", "declared are: 'line'"),
        ({"tool_choice": "any"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice", "functions"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice", "declare only"),
        ({"tool_choice": "required", "bad_words": ["a"]}, "bad_words", "tool_choice"),
        ({"min_tokens": 3}, "min_tokens", "strict"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format", "holds no calls"),
        ({"tools": [strict({"not": {}})]}, "tools", "not"),
        ({"tools": [strict({"type": "array"})]}, "tools", "object"),
    ],
)
def test_calls_that_cannot_be_asked_for_are_refused(client, extra, param, said):
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as refused:
        client.chat.completions.create(model="tiny", messages=USER, extra_body={"tools": TOOLS} | extra)
    assert refused.value.param == param


def test_a_guided_turn_of_a_conversation_with_tools_is_refused(pipeline):
    with pytest.raises(ValueError, match="holds no calls"):
        pipeline.chat([Message("user", "hi")], Params(guide=AnyJSON()), tools=[{"name": "interpreter"}])
    with pytest.raises(ValueError, match="no tools are declared"):
        pipeline.chat([Message("user", "hi")], Params(guide=CallOf((CalledFunction("f", {}),))))
    for wrong in (Regex(""), Choice("ab"), Choice(("a", "")), JSONSchema(3), "json"):
        with pytest.raises(ValueError, match="guide must be|a schema is"):
            Params(guide=wrong)
    with pytest.raises(ValueError, match="bad_words"):
        dataclasses.replace(Params(guide=AnyJSON()), bad_words=("a",))


def test_masks_have_the_model_s_size_and_compiled_guides_are_bounded(tokenizer):
    ends = stop_ids(tokenizer)
    guides = Guides(tokenizer, vocab_size=tokenizer.vocab_size + 100, stop_ids=ends)
    for number in range(MAX_COMPILED + 5):
        guides.compile(Regex(f"x{number}"))
    assert guides.num_compiled == MAX_COMPILED
    guide = guides.compile(Regex("[^a]"))()
    bits = np.unpackbits(guide.mask().view(np.uint8), bitorder="little")
    assert len(guide.mask()) == -(-(tokenizer.vocab_size + 100) // 32)
    allowed = {*np.nonzero(bits)[0].tolist()}
    assert allowed and not allowed & {*tokenizer.special.values()} and max(allowed) < tokenizer.vocab_size
    guide.take(tokenizer.encode("b")[0])
    assert {*np.nonzero(np.unpackbits(guide.mask().view(np.uint8), bitorder="little"))[0].tolist()} == {*ends}
    with pytest.raises(GuideError, match="cannot be guided"):
        guide.take(tokenizer.encode("b")[0])
