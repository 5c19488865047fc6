"""Calls in pieces: whatever a model writes and however it is cut, they add up to what the whole call is."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from internjax.text.chat import CODE_OPEN, CallBroken, CallDelta, CallEnd, CallStart, ToolParser
from internjax.text.message import ToolCall
from serve.answering.calls import CallPieces, Function, function_of
from serve.answering.readers import ChatReader, text_of

PLUGIN = '\n{"name": "add", "parameters": {"a": [1, {"b": "}\\"]"}], "c": "héllo 你"}}'
CODE = "\n```python\nif a:\n    print('```', \"é\\n\")\n\n```"


def pieces_of(kind: str, parts, call: ToolCall):
    pieces = CallPieces(kind)
    return [*(pieces.push(part) for part in parts), pieces.close(call)]


def joined(found) -> Function:
    names = [piece.name for piece in found if piece.name is not None]
    assert len(names) == 1
    first = next(index for index, piece in enumerate(found) if piece.name is not None)
    assert not any(piece.arguments for piece in found[:first])
    return Function(names[0], "".join(piece.arguments for piece in found))


def call_of(tokenizer, kind: str, body: str) -> ToolCall:
    """As the parser has it, from the text."""
    ids = tokenizer.encode(f"<|action_start|><|{kind}|>", allow_special=True)
    *_, end = ToolParser(tokenizer).push([*ids, *tokenizer.encode(body), tokenizer.special["<|action_end|>"]])
    return end.call


@pytest.mark.parametrize(("kind", "body"), [("plugin", PLUGIN), ("interpreter", CODE)])
def test_at_every_split_of_the_text_and_of_the_ids_nothing_is_lost_or_doubled(tokenizer, kind, body):
    call = call_of(tokenizer, kind, body)
    whole = function_of(call)
    assert json.loads(whole.arguments)
    for at in range(len(body) + 1):
        assert joined(pieces_of(kind, (body[:at], body[at:]), call)) == whole
    found = pieces_of(kind, body, call)
    assert joined(found) == whole and sum(bool(piece.arguments) for piece in found) > 15
    ids = tokenizer.encode(f"a<|action_start|><|{kind}|>", allow_special=True)
    ids += [*tokenizer.encode(body), tokenizer.special["<|action_end|>"], tokenizer.eos_id]
    for at in range(len(ids) + 1):
        parser, found = ToolParser(tokenizer), []
        for event in parser.push(ids[:at]) + parser.push(ids[at:]):
            match event:
                case CallStart(name):
                    pieces = CallPieces(name)
                case CallDelta(text):
                    found.append(pieces.push(text))
                case CallEnd(ended):
                    found.append(pieces.close(ended))
        assert joined(found) == whole


FRAGMENTS = st.sampled_from(['"', "{", "}", "[", "]", ":", ",", "\\", " ", "\n", "```", "`", "\t", "name", "a", "1"])


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(["plugin", "interpreter"]),
    opened=st.booleans(),
    rest=st.lists(FRAGMENTS, max_size=14).map("".join),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
@example("plugin", True, '{}, "name": "b"}', [1])
@example("plugin", True, '{"a": 1}, "parameters": {}}', [3])
@example("plugin", True, "{}", [1])
@example("plugin", True, '{"a": NaN}}', [1])
@example("interpreter", True, "x``` \n```", [1])
@example("interpreter", True, "x\n \n ```\n", [1])
def test_broken_calls_too_are_in_pieces_what_they_are_whole(tokenizer, kind, opened, rest, cuts):
    heads = {"plugin": '\n{"name": "add", "parameters": ', "interpreter": CODE_OPEN}
    body = (heads[kind] if opened else "") + rest
    call = call_of(tokenizer, kind, body)
    parts, at, number = [], 0, 0
    while at < len(body):
        size = cuts[number % len(cuts)]
        parts.append(body[at : at + size])
        at, number = at + size, number + 1
    whole = function_of(call)
    assert joined(pieces_of(kind, parts, call)) == whole
    if kind == "interpreter":
        assert json.loads(whole.arguments) == {"code": call.content}


@pytest.mark.parametrize(
    ("content", "name", "can_run"),
    [
        ('{"name": "add", "parameters": {"a":1,  "b": 2.0}}', "add", True),
        ('{"name": "add"}', "add", True),
        ('{"parameters": {}, "name": "add"}', "add", True),
        ('{"name": "add", "parameters": {"a": 1}', "add", True),  # only the last bracket of all is missing
        ('{"name": "add", "parameters": {}, "name": "b"}', "add", False),
        ('{"name": "add", "parameters": {"a": NaN}}', "add", False),
        ('{"name": "add", "parameters": {"a": 1,}}', "add", False),
        ('{"name": "add", "parameters": ' + '{"a":' * 5000 + "1" + "}" * 5001, "add", False),
        ('{"parameters": ' + "[" * 9999, "", False),
        ("nonsense", "", False),
    ],
)
def test_a_call_that_cannot_be_run_is_handed_on_as_it_is(content, name, can_run):
    function = function_of(ToolCall("plugin", content))
    assert function.name == name
    try:
        assert isinstance(json.loads(function.arguments), dict) and can_run
    except (ValueError, RecursionError):
        assert not can_run and function.arguments in content


def test_the_code_of_a_fence_that_is_not_closed_is_code(tokenizer):
    assert call_of(tokenizer, "interpreter", "\n```python\n1 + 1").content == "1 + 1"
    assert call_of(tokenizer, "interpreter", "\n```python\n\n```").content == ""
    parser = ToolParser(tokenizer)
    parser.push(tokenizer.encode("<|action_start|><|interpreter|>\n1", allow_special=True))
    assert isinstance(parser.close()[-1], CallBroken)


@pytest.mark.parametrize("may_call", [True, False])
def test_a_call_cut_off_within_a_character_is_one_text_in_its_order(tokenizer, may_call):
    ids = tokenizer.encode('See.<|action_start|><|plugin|>\n{"a": "', allow_special=True)
    ids += tokenizer.encode("é")[:1]  # the first of two bytes
    assert len(tokenizer.encode("é")) == 2
    reader = ChatReader(tokenizer, may_call=may_call)
    text = "".join(text_of(part) for token_id in ids for part in reader.push([token_id]))
    text += "".join(map(text_of, reader.close()))
    assert text == 'See.<|action_start|><|plugin|>\n{"a": "\ufffd'
