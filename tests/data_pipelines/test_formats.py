"""Conversation files: one golden row per format, what is learned of it token by token, and bad rows by place."""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.formats import conversations, detect, detect_file, preferences, to_row
from internjax.text import chat
from internjax.text.chat import Message, ToolCall
from internjax.text.tokenizer import train_tokenizer

WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}}
CALL = '{"name": "weather", "parameters": {"city": "Brno"}}'
TOOLS = Message("system", json.dumps([WEATHER]), name="plugin")

# Format -> (row, its messages, its rendering with what is learned between ⟦ and ⟧).
GOLDEN = {
    "alpaca": (
        {
            "instruction": "Name it.", "input": "a cat", "output": "Tom.", "system": "Be short.",
            "history": [["Hi.", "Hello."]],
        },
        [
            Message("system", "Be short."),
            Message("user", "Hi."),
            Message("assistant", "Hello."),
            Message("user", "Name it.\na cat"),
            Message("assistant", "Tom."),
        ],
        "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\nName it.\na cat<|im_end|>\n"
        "<|im_start|>assistant\n⟦Tom.<|im_end|>⟧\n",
    ),
    "openai": (
        {
            "tools": [{"type": "function", "function": WEATHER}],
            "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "in Brno?"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "c", "function": {"name": "weather", "arguments": '{"city": "Brno"}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": "dry"},
                {"role": "assistant", "content": "No."},
            ],
        },
        [
            TOOLS,
            Message("system", "Be short."),
            Message("user", "Rain in Brno?"),
            Message("assistant", "", call=ToolCall("plugin", CALL)),
            Message("environment", "dry", name="plugin"),
            Message("assistant", "No."),
        ],
        f"<s><|im_start|>system name=<|plugin|>\n{TOOLS.content}<|im_end|>\n"
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nRain in Brno?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦<|action_start|><|plugin|>\n{CALL}<|action_end|><|im_end|>⟧\n"
        "<|im_start|>environment name=<|plugin|>\ndry<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    ),
    "sharegpt": (
        {
            "system": "Be short.",
            "tools": json.dumps([WEATHER]),
            "conversations": [
                {"from": "human", "value": "Rain in Brno?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Brno"}}'},
                {"from": "observation", "value": "dry"},
                {"from": "gpt", "value": "No."},
            ],
        },
        [
            Message("system", "Be short."),
            TOOLS,
            Message("user", "Rain in Brno?"),
            Message("assistant", "", call=ToolCall("plugin", CALL)),
            Message("environment", "dry", name="plugin"),
            Message("assistant", "No."),
        ],
        "<s><|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>system name=<|plugin|>\n{TOOLS.content}<|im_end|>\n<|im_start|>user\nRain in Brno?<|im_end|>\n"
        f"<|im_start|>assistant\n⟦<|action_start|><|plugin|>\n{CALL}<|action_end|><|im_end|>⟧\n"
        "<|im_start|>environment name=<|plugin|>\ndry<|im_end|>\n<|im_start|>assistant\n⟦No.<|im_end|>⟧\n",
    ),
    "oasst": (
        {"text": "### Human: Hi.### Assistant: Hello.\n### Human: 1 + 1?### Assistant: 2"},
        [
            Message("user", "Hi."),
            Message("assistant", "Hello."),
            Message("user", "1 + 1?"),
            Message("assistant", "2"),
        ],
        "<s><|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
    ),
    "completion": (
        {"prompt": "1 + 1?", "completion": "2 <|im_end|> </s>"},
        [Message("user", "1 + 1?"), Message("assistant", "2 <|im_end|> </s>")],
        "<s><|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n⟦2 <|im_end|> </s><|im_end|>⟧\n",
    ),
    "moss": (
        {
            "meta_instruction": "You are MOSS.\n",
            "chat": {
                "turn_10": {"Human": "Bye.", "MOSS": "<|MOSS|>: Bye.<eom>\n"},
                "turn_2": {
                    "Human": "<|Human|>: (1 + 2) * (3)?<eoh>\n",
                    "Inner Thoughts": "<|Inner Thoughts|>: I compute it.<eot>\n",
                    "Commands": "<|Commands|>: Calculate((1 + 2) * (3))<eoc>\n",
                    "Tool Responses": "<|Results|>: 9<eor>\n",
                    "MOSS": "<|MOSS|>: 9.<eom>\n",
                },
                "turn_1": {"Human": "Hi.", "Inner Thoughts": "None", "Commands": "None", "MOSS": "Hello."},
            },
        },
        [
            Message("system", "You are MOSS.\n"),
            Message("user", "Hi."),
            Message("assistant", "Hello."),
            Message("user", "(1 + 2) * (3)?"),
            Message(
                "assistant",
                "I compute it.",
                call=ToolCall("plugin", '{"name": "Calculate", "parameters": {"arguments": "(1 + 2) * (3)"}}'),
            ),
            Message("environment", "9", name="plugin"),
            Message("assistant", "9."),
            Message("user", "Bye."),
            Message("assistant", "Bye."),
        ],
        "<s><|im_start|>system\nYou are MOSS.\n<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n<|im_start|>user\n(1 + 2) * (3)?<|im_end|>\n"
        "<|im_start|>assistant\n⟦I compute it.<|action_start|><|plugin|>\n"
        '{"name": "Calculate", "parameters": {"arguments": "(1 + 2) * (3)"}}<|action_end|><|im_end|>⟧\n'
        "<|im_start|>environment name=<|plugin|>\n9<|im_end|>\n<|im_start|>assistant\n⟦9.<|im_end|>⟧\n"
        "<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n⟦Bye.<|im_end|>⟧\n",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(
        ["user assistant system name environment plugin interpreter rain in Brno"] * 4, vocab_size=320
    )


def written(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def with_marks(rendered, tokenizer):
    """The text of a rendering, with what is learned between ⟦ and ⟧."""
    pieces = []
    for learned, run in groupby(zip(rendered.ids, rendered.mask, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run], skip_special=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return "".join(pieces)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_row_of_every_format(name, tmp_path, tokenizer):
    row, messages, rendered = GOLDEN[name]
    assert detect(row) == name
    path = written(tmp_path / "rows.jsonl", [row, row])
    first, second = conversations(path)
    assert first.messages == second.messages == messages
    assert (first.place, second.place) == (f"{path}:1", f"{path}:2")
    assert with_marks(chat.render(messages, tokenizer), tokenizer) == rendered


def test_other_spellings_of_the_same():
    assert detect({"question": "1 + 1?", "answer": "2"}) == "completion"
    assert detect({"text": "Once upon a time"}) == "text"
    assert detect({"text": "  \n### Human: Hi"}) == "oasst"
    assert detect({"conversations": [], "chosen": 1, "rejected": 2}) == "preference"
    assert detect({"chosen": "alone"}) is None and detect({"messages": "text"}) is None


def test_variants_within_a_format(tmp_path):
    rows = [
        {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "prompter", "value": "q"}, {"from": "chatgpt", "value": "a"}], "tools": ""},
    ]
    for sample in conversations(written(tmp_path / "a.jsonl", rows)):
        assert sample.messages == [Message("user", "q"), Message("assistant", "a")]
    (tmp_path / "b.json").write_text(json.dumps([{"question": "q", "answer": "a"}]))
    (sample,) = conversations(tmp_path / "b.json")
    assert sample.messages == [Message("user", "q"), Message("assistant", "a")]
    rows = [{"instruction": "q", "input": "", "output": "a", "history": None}]
    (sample,) = conversations(written(tmp_path / "c.jsonl", rows))
    assert sample.messages == [Message("user", "q"), Message("assistant", "a")]


# --- preferences -----------------------------------------------------------------------------------------------------


def test_preferences(tmp_path):
    turns = [{"from": "human", "value": "q"}]
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {
            "conversations": turns,
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {
            "messages": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
        },
    ]
    pairs = list(preferences(written(tmp_path / "a.jsonl", rows)))
    assert len(pairs) == 3
    for pair in pairs:
        assert pair == ([Message("user", "q")], Message("assistant", "good"), Message("assistant", "bad"))
    row = rows[1] | {"system": "S", "tools": json.dumps([WEATHER])}
    (pair,) = preferences(written(tmp_path / "b.jsonl", [row]))
    assert pair.prompt == [Message("system", "S"), TOOLS, Message("user", "q")]


BAD_PREFERENCES = {
    '{"prompt": "q", "chosen": "a"}': "field 'rejected' is missing",
    '{"chosen": "a", "rejected": "b"}': "it has no prompt",
    '{"prompt": "q", "chosen": [], "rejected": "b"}': "chosen is empty",
    '{"prompt": "q", "chosen": "a", "rejected": {"from": "human", "value": "b"}}': "ends with a turn of the user",
    '{"prompt": [{"from": "nobody", "value": "q"}], "chosen": "a", "rejected": "b"}': "a turn is from 'nobody'",
}


@pytest.mark.parametrize("row", BAD_PREFERENCES)
def test_a_bad_preference_row_is_named(row, tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path, bad = written(tmp_path / "a.jsonl", [good, row, good]), []
    assert len(list(preferences(path, on_bad_row=bad.append))) == 2
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: not a preference row: ") and BAD_PREFERENCES[row] in bad[0]
    with pytest.raises(ValueError, match=r"a.jsonl:2: not a preference row.*wanted a prompt, chosen and rejected"):
        list(preferences(path))


# --- bad rows --------------------------------------------------------------------------------------------------------


TURN = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
BAD_ROWS = {
    "no output": ("alpaca", {"instruction": "q"}, "field 'output' is missing"),
    "output of a wrong type": ("alpaca", {"instruction": "q", "output": ["a"]}, "output is list, wanted text"),
    "history of a wrong type": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["q", 1]]},
        "content of the assistant turn is a int",
    ),
    "unknown role": ("openai", {"messages": [{"role": "bot", "content": "a"}]}, "role is 'bot'"),
    "no role": ("openai", {"messages": [{"content": "a"}, SAID]}, "message 0 is"),
    "a picture": ("openai", {"messages": [TURN | {"content": [{"type": "image_url"}]}, SAID]}, "only text parts"),
    "two calls in a turn": (
        "openai",
        {"messages": [TURN, SAID | {"tool_calls": [{}, {}]}]},
        "message 1 has 2 tool_calls",
    ),
    "an unreadable call": (
        "openai",
        {"messages": [TURN, SAID | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "the tool call of message 1 cannot be read",
    ),
    "the old form of a call": (
        "openai",
        {"messages": [TURN, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}]},
        "message 1 has function_call, which is not read",
    ),
    "a turn that is not to be learned": ("openai", {"messages": [TURN, SAID | {"weight": 0}]}, "has the weight 0"),
    "tools that are no JSON": ("openai", {"messages": [TURN, SAID], "tools": "["}, "Expecting value"),
    "no answer": ("openai", {"messages": [TURN]}, "no assistant turn, so there is nothing to learn"),
    "unknown speaker": (
        "sharegpt",
        {"conversations": [{"from": "x", "value": "q"}]},
        "a turn is from 'x'; known: human",
    ),
    "value of a wrong type": (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": 1}]},
        "value is int, wanted text",
    ),
    "text before the first turn": ("oasst", {"text": "So. ### Human: q### Assistant: a"}, "begins with 'So. '"),
    "no turn at all": ("oasst", {"text": "Once upon a time"}, "begins with 'Once upon a time'"),
    "prompt of a wrong type": ("completion", {"prompt": [TURN], "completion": "a"}, "prompt is list, wanted text"),
    "no answer of MOSS": ("moss", {"chat": {"turn_1": {"Human": "q"}}}, "field 'MOSS' is missing"),
    "a turn without number": ("moss", {"chat": {"turn": {"Human": "q", "MOSS": "a"}}}, "invalid literal"),
    "another format": ("moss", {"messages": [TURN, SAID]}, "field 'chat' is missing"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(name, tmp_path):
    format, row, reason = BAD_ROWS[name]
    good = GOLDEN[format][0]
    path, bad = written(tmp_path / "a.jsonl", [good, row, good]), []
    assert len(list(conversations(path, on_bad_row=bad.append))) == 2
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: not a {format} row: ") and reason in bad[0], bad
    with pytest.raises(ValueError, match=rf"a.jsonl:2: not a {format} row: "):
        list(conversations(path))


def test_a_line_that_is_no_json_is_named_wherever_it_stands(tmp_path):
    good = GOLDEN["alpaca"][0]
    path, bad = written(tmp_path / "a.jsonl", ['{"instruction": ', good, "", "[1]", good]), []
    assert len(list(conversations(path, on_bad_row=bad.append))) == 2
    assert [message.partition(" ")[0] for message in bad] == [f"{path}:1:", f"{path}:4:"]
    assert "not valid JSON" in bad[0] and "wanted one JSON object per line" in bad[1]
    with pytest.raises(ValueError, match="a.jsonl:1: not valid JSON"):
        list(conversations(path))


def test_files_without_a_known_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder: .*nowhere.jsonl"):
        detect_file(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="is empty: it has no JSON row; give a file with at least one"):
        detect_file(written(tmp_path / "a.jsonl", ["", " "]))
    with pytest.raises(ValueError, match=r"a.jsonl:1: not valid JSON"):
        detect_file(written(tmp_path / "a.jsonl", ["{", "{"]))
    with pytest.raises(ValueError, match=r"a.jsonl:1: fields ask, reply fit no known format. Wanted one of"):
        detect_file(written(tmp_path / "a.jsonl", [{"reply": 1, "ask": 2}]))
    for row, name in (({"text": "Once"}, "text"), ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference")):
        with pytest.raises(ValueError, match=f"holds {name} rows, not conversations; give one of: alpaca"):
            list(conversations(written(tmp_path / "a.jsonl", [row])))


# --- to_row ----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner, max_size=3)
)
PLUGIN_CALLS = st.builds(
    lambda name, parameters: ToolCall(
        "plugin", json.dumps({"name": name, "parameters": parameters}, ensure_ascii=False)
    ),
    st.text().filter(lambda name: name != "interpreter"),
    st.dictionaries(st.text(), JSON, max_size=3),
)
CALLS = st.builds(ToolCall, st.just("interpreter"), st.text()) | PLUGIN_CALLS
TOOL_NAMES = st.sampled_from(["interpreter", "plugin"])
MESSAGES = st.one_of(
    st.builds(Message, st.just("system"), st.text(), st.none() | TOOL_NAMES),
    st.builds(Message, st.just("user"), st.text(), st.none() | st.just("file")),
    st.builds(Message, st.just("assistant"), st.text(), st.none(), st.none() | CALLS),
    st.builds(Message, st.just("environment"), st.text(), TOOL_NAMES),
)


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=6))
def test_a_row_of_a_conversation_reads_back(messages, tmp_path_factory):
    messages = [*messages, Message("assistant", "end")]
    path = written(tmp_path_factory.mktemp("rows") / "a.jsonl", [to_row(messages)])
    assert detect_file(path) == "openai"
    assert [sample.messages for sample in conversations(path)] == [messages]
