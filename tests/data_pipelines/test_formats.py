"""Conversation files: one golden row per format, what is learned of it token by token, and bad rows by place."""

import json
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import moss
from data_pipelines.formats import conversations, detect, detect_file, preferences, texts, to_row
from internjax.text import chat
from internjax.text.chat import Message, ToolCall
from internjax.text.tokenizer import train_tokenizer

WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object"}}
CALL = '{"name": "weather", "parameters": {"city": "Brno"}}'
TOOLS = Message("system", json.dumps([WEATHER]), name="plugin")
TURN = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}

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
    "xtuner": (
        {
            "conversation": [
                {"system": "Be short.", "input": "Hi.", "output": "Hello.", "output_with_loss": False},
                {"input": "1 + 1?", "output": "2"},
            ]
        },
        [
            Message("system", "Be short."),
            Message("user", "Hi."),
            Message("assistant", "Hello."),
            Message("user", "1 + 1?"),
            Message("assistant", "2"),
        ],
        "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
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
    (sample,) = chat.render_samples(first.messages, tokenizer, learned=first.learned)
    assert with_marks(sample, tokenizer) == rendered


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


def test_turns_that_are_read_and_not_learned(tmp_path, tokenizer):
    """OpenAI's weight, XTuner's loss, axolotl's train; of prompt/completion lists the completion is learned."""
    user, one, two = ({"role": role, "content": text} for role, text in zip(("user", "assistant", "assistant"), "qab"))
    rows = [
        {"messages": [user, one | {"weight": 0}, user, two | {"weight": 1}], "tools": [WEATHER]},
        {"messages": [user, one | {"loss": False}, user, two]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a", "train": False},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "b"},
            ]
        },
        {"prompt": [user, one, user], "completion": [two]},
    ]
    for number, row in enumerate(rows):
        (sample,) = conversations(written(tmp_path / f"{number}.jsonl", [row]))
        (rendered,) = chat.render_samples(sample.messages, tokenizer, learned=sample.learned)
        text = with_marks(rendered, tokenizer)
        assert text.endswith(
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        )


def test_calls_in_older_and_parallel_forms(tmp_path):
    call = {"name": "weather", "arguments": '{"city": "Brno"}'}
    other = {"name": "weather", "arguments": '{"city": "Wien"}'}
    calls = [{"id": "1", "function": call}, {"id": "2", "function": other}]
    rows = [
        {
            "functions": [WEATHER],
            "messages": [
                TURN,
                {"role": "assistant", "content": None, "function_call": call},
                {"role": "function", "name": "weather", "content": "dry"},
                SAID,
            ],
        },
        {
            "messages": [
                TURN,
                {"role": "assistant", "content": "I ask.", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "2", "content": "wet"},
                {"role": "tool", "tool_call_id": "1", "content": "dry"},
                SAID,
            ]
        },
    ]  # fmt: skip
    old, parallel = (sample.messages for sample in conversations(written(tmp_path / "a.jsonl", rows)))
    assert old == [
        TOOLS,
        Message("user", "q"),
        Message("assistant", "", call=ToolCall("plugin", CALL)),
        Message("environment", "dry", name="plugin"),
        Message("assistant", "a"),
    ]
    assert parallel == [
        Message("user", "q"),
        Message("assistant", "I ask.", call=ToolCall("plugin", CALL)),
        Message("environment", "dry", name="plugin"),
        Message("assistant", "", call=ToolCall("plugin", CALL.replace("Brno", "Wien"))),
        Message("environment", "wet", name="plugin"),
        Message("assistant", "a"),
    ]


def test_conversations_of_moss_002(tmp_path):
    text = "[Human]: Say [MOSS]: twice.<eoh> [MOSS]: [MOSS]: [MOSS]:<eoa> [Human]: Bye.<eoh>\n[MOSS]: Bye.\n<eoa>"
    row = {"id": 1, "num_turns": 2, "prefix": "You are MOSS.", "plain_text": text}
    path = written(tmp_path / "a.jsonl", [row, {"plain_text": text}])
    assert detect_file(path) == "moss"
    turns = [
        Message("user", "Say [MOSS]: twice."),
        Message("assistant", "[MOSS]: [MOSS]:"),
        Message("user", "Bye."),
        Message("assistant", "Bye."),
    ]
    assert [s.messages for s in conversations(path)] == [[Message("system", "You are MOSS."), *turns], turns]


def test_commands_of_moss():
    turn = {"Human": "q", "Inner Thoughts": "I look.", "MOSS": "a"}

    def calls(command, result):
        turns = {"turn_1": turn | {"Commands": command, "Tool Responses": result}, "turn_2": None}
        messages = moss.messages_of({"chat": turns})
        return [(json.loads(m.call.content) if m.call else m.content) for m in messages[1:-1]]

    assert calls('Search("rain, (in) Brno")', "dry") == [
        {"name": "Search", "parameters": {"arguments": "rain, (in) Brno"}},
        "dry",
    ]
    assert calls('Search("f(x), g(y)")', "-")[0]["parameters"] == {"arguments": "f(x), g(y)"}
    assert calls('A("x"), B(1, 2)', 'A("x") =>\nfirst\nB(1, 2) =>\nsecond') == [
        {"name": "A", "parameters": {"arguments": "x"}},
        'A("x") =>\nfirst',
        {"name": "B", "parameters": {"arguments": "1, 2"}},
        "B(1, 2) =>\nsecond",
    ]


# --- trees -----------------------------------------------------------------------------------------------------------


def node(text, role, *replies, **fields):
    return {"message_id": text, "text": text, "role": role, "replies": list(replies)} | fields


TREE = node(
    "q", "prompter",
    node("worse", "assistant", node("why?", "prompter", node("so", "assistant")), node("open", "prompter"), rank=1),
    node("best", "assistant", node("thanks", "prompter"), rank=0),
    node("spam", "assistant", rank=2, review_result=False),
    node("gone", "assistant", deleted=True),
)  # fmt: skip


def test_trees_give_every_path_and_learn_each_answer_once(tmp_path, tokenizer):
    path = written(tmp_path / "a.jsonl", [{"message_tree_id": "q", "prompt": TREE}])
    assert detect_file(path) == "oasst_tree"
    samples = list(conversations(path))
    texts = [[message.content for message in sample.messages] for sample in samples]
    assert texts == [["q", "best"], ["q", "worse", "why?", "so"]]
    assert [sample.place for sample in samples] == [f"{path}:1#1", f"{path}:1#2"]
    assert {sample.group for sample in samples} == {"q"}
    (best,) = conversations(path, format="oasst_best")
    assert [message.content for message in best.messages] == ["q", "best"]

    shared = node(
        "q", "prompter", node("a", "assistant", *(node(x, "prompter", node(x * 2, "assistant")) for x in "bc"))
    )
    samples = conversations(written(tmp_path / "b.jsonl", [{"prompt": shared}]))
    marked = [with_marks(chat.render(s.messages, tokenizer, learned=s.learned), tokenizer) for s in samples]
    assert [text.count("⟦") for text in marked] == [2, 1]
    assert "⟦a<|im_end|>⟧" in marked[0] and "assistant\na<|im_end|>" in marked[1] and "⟦cc<|im_end|>⟧" in marked[1]


def test_trees_of_single_messages(tmp_path):
    rows = []

    def flatten(message, parent):
        rows.append({**message, "parent_id": parent, "replies": None})
        for reply in message["replies"]:
            flatten(reply, message["message_id"])

    flatten(TREE, None)
    path = written(
        tmp_path / "a.jsonl", [*reversed(rows), {"message_id": "x", "parent_id": "?", "text": "", "role": "assistant"}]
    )
    bad = []
    found = [[m.content for m in sample.messages] for sample in conversations(path, on_bad_row=bad.append)]
    assert found == [["q", "best"], ["q", "worse", "why?", "so"]]
    assert bad == [f"{path}:{len(rows) + 1}: the parent_id '?' is no message of the data; give whole trees"]


# --- where rows come from --------------------------------------------------------------------------------------------


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    import gzip

    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"ask": f"q{n}", "reply": f"a{n}", "extra": n} for n in range(3)]
    lines, array = "".join(json.dumps(row) + "\n" for row in rows).encode(), json.dumps(rows).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.json").write_bytes(array)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    for name, content in (("a.jsonl.zst", lines), ("a.json.zst", array)):
        (tmp_path / name).write_bytes(pa.compress(content, codec="zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    names = [str(path) for path in sorted(tmp_path.glob("a.*"))]
    names += [f"datasets:{tmp_path}/saved", f"datasets:{tmp_path}/splits@test"]
    assert len(names) == 9
    columns = ("instruction=ask", "output=reply")
    for name in names:
        assert detect_file(name, columns=columns) == "alpaca"
        samples = list(conversations(name, columns=columns))
        assert [[m.content for m in sample.messages] for sample in samples] == [[f"q{n}", f"a{n}"] for n in range(3)]
        assert all(sample.place.startswith(f"{name}:") for sample in samples)
    with pytest.raises(ValueError, match="it has the splits test; name one: .*splits@SPLIT"):
        detect_file(f"datasets:{tmp_path}/splits")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    with pytest.raises(ValueError, match=r"a.jsonl.gz: cannot be decompressed .*copy it again"):
        list(conversations(tmp_path / "a.jsonl.gz", columns=columns))


def test_a_named_data_set_is_asked_of_its_library(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split):
        asked.append((name, config, split))
        if name == "org/none":
            raise ConnectionError("no network")
        return datasets.Dataset.from_list([{"prompt": "q", "completion": "a"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("datasets:org/name", "datasets:org/name:main@test[:10]"):
        (sample,) = conversations(name, format="completion")
        assert sample.place == f"{name}:1"
    assert asked == [("org/name", None, "train"), ("org/name", "main", "test[:10]")]
    with pytest.raises(
        ValueError, match=r"datasets:org/none cannot be loaded .*no network.*Without a network, fetch it"
    ):
        detect_file("datasets:org/none")


def test_columns_that_are_not_there_are_named(tmp_path):
    path = written(tmp_path / "a.jsonl", [{"ask": "q", "reply": "a"}, {"ask": "q"}])
    columns, bad = ("instruction=ask", "output=reply"), []
    assert len(list(conversations(path, columns=columns, on_bad_row=bad.append))) == 1
    assert bad == [f"{path}:2: it has no column 'reply', which is to be the field 'output'; it has ask"]
    with pytest.raises(ValueError, match=r"columns has 'ask'; give FIELD=COLUMN"):
        detect_file(path, columns=("ask",))
    with pytest.raises(ValueError, match="is a folder, wanted a file; name its files"):
        detect_file(tmp_path)
    with pytest.raises(ValueError, match=r"named .xlsx are not read; give .jsonl"):
        detect_file(written(tmp_path / "a.xlsx", ["x"]))
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    assert detect_file(tmp_path / "a.txt") == "text"
    assert [text.text for text in texts(tmp_path / "a.txt")] == ["Once upon a time.\n"]


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
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    ]
    rows.append({name: rows[2][name] for name in ("chosen", "rejected")})
    pairs = list(preferences(written(tmp_path / "a.jsonl", rows)))
    assert len(pairs) == 5
    for line, pair in enumerate(pairs, 1):
        answers = Message("assistant", "good"), Message("assistant", "bad")
        assert pair == ([Message("user", "q")], *answers, f"{tmp_path / 'a.jsonl'}:{line}")
    row = rows[1] | {"system": "S", "tools": json.dumps([WEATHER])}
    (pair,) = preferences(written(tmp_path / "b.jsonl", [row]))
    assert pair.prompt == [Message("system", "S"), TOOLS, Message("user", "q")]


def test_preferences_written_as_dialogues(tmp_path):
    """hh-rlhf: both conversations whole, or the prompt up to the open turn and the answers apart."""
    asked = "\n\nHuman: Say\n\nHuman things.\n\nAssistant: Which?\n\nHuman: Any."
    good, bad = "Hi.\n\nAnd: bye.", "No."
    answers = {"chosen": good, "rejected": bad}
    rows = [
        {name: f"{asked}\n\nAssistant: {text}" for name, text in answers.items()},
        {"prompt": f"{asked}\n\nAssistant:"} | {name: f" {text}\n" for name, text in answers.items()},
    ]
    turns = [Message("user", "Say\n\nHuman things."), Message("assistant", "Which?"), Message("user", "Any.")]
    path = written(tmp_path / "a.jsonl", rows)
    answers = Message("assistant", good), Message("assistant", bad)
    assert [pair[:3] for pair in preferences(path)] == [(turns, *answers)] * 2
    assert detect_file(path) == "preference"
    # A prompt that only begins like one is what a person asks.
    (pair,) = preferences(written(tmp_path / "b.jsonl", [{"prompt": "Human: who?", "chosen": " a", "rejected": "b"}]))
    assert pair.prompt == [Message("user", "Human: who?")] and pair.chosen.content == " a"


BAD_PREFERENCES = {
    '{"chosen": "\\n\\nHuman: q\\n\\nAssistant: a", "rejected": "b"}': "a text begins with 'b', not with 'Human:'",
    '{"chosen": "Human: q\\n\\nAssistant: a", "rejected": "Human: p\\n\\nAssistant: b"}': "differ before their last",
    '{"chosen": "Human: q\\n\\nHuman: r", "rejected": "Human: q\\n\\nAssistant: b"}': "ends with a turn of the user",
    '{"chosen": "Human: q\\n\\nAssistant: a", "rejected": ["b"]}': "rejected is list, wanted text",
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
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: not a valid preference row: ")
    assert BAD_PREFERENCES[row] in bad[0]
    with pytest.raises(ValueError, match=r"a.jsonl:2: not a valid preference row.*wanted a prompt, chosen and rej"):
        list(preferences(path))


# --- bad rows --------------------------------------------------------------------------------------------------------


BAD_ROWS = {
    "no output": ("alpaca", {"instruction": "q"}, "field 'output' is missing"),
    "output of a wrong type": ("alpaca", {"instruction": "q", "output": ["a"]}, "output is list, wanted text"),
    "history of a wrong type": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": [["q", 1]]},
        "content of the assistant turn is a int",
    ),
    "history of a wrong form": (
        "alpaca",
        {"instruction": "q", "output": "a", "history": ["q"]},
        "history 0 is 'q', wanted",
    ),
    "turns of a wrong type": ("openai", {"messages": 5}, "messages is int, wanted a list of turns"),
    "a turn of a wrong type": ("sharegpt", {"conversations": [5]}, "turn 0 of conversations is 5, wanted an object"),
    "a chat of a wrong type": ("moss", {"chat": []}, "chat is list, wanted an object of turns"),
    "unknown role": ("openai", {"messages": [{"role": "bot", "content": "a"}]}, "role is 'bot'"),
    "no role": ("openai", {"messages": [{"content": "a"}, SAID]}, "message 0 is"),
    "a picture": ("openai", {"messages": [TURN | {"content": [{"type": "image_url"}]}, SAID]}, "only text parts"),
    "two calls in a turn": (
        "openai",
        {"messages": [TURN, SAID | {"tool_calls": [{}, {}]}]},
        "message 1 has 2 tool_calls, and the messages behind it are not their results",
    ),
    "an unreadable call": (
        "openai",
        {"messages": [TURN, SAID | {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "the tool call of message 1 cannot be read",
    ),
    "turns that are not to be learned": (
        "openai",
        {"messages": [TURN, SAID | {"weight": 0}]},
        "every assistant turn is marked as not to be learned",
    ),
    "half a weight": ("openai", {"messages": [TURN, SAID | {"weight": 0.5}]}, "turn 1 has weight 0.5; a turn is"),
    "an empty answer": ("alpaca", {"instruction": "q", "output": " "}, "the assistant says nothing"),
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
    "a command of MOSS that is none": (
        "moss",
        {"chat": {"turn_1": {"Human": "q", "MOSS": "a", "Commands": "look it up"}}},
        "the command 'look it up' is not of the form Name(arguments)",
    ),
    "commands of MOSS without results": (
        "moss",
        {"chat": {"turn_1": {"Human": "q", "MOSS": "a", "Commands": 'A("x"), B("y")', "Tool Responses": "1"}}},
        "a turn has 2 commands and its results do not name each of them",
    ),
    "a turn of MOSS-002 that is cut": ("moss", {"plain_text": "[Human]: q<eoh> [MOSS]: a"}, "ends with 'a', not with"),
    "a text that is none of MOSS-002": ("moss", {"plain_text": "Once"}, "begins with 'Once', not with '[Human]:'"),
    "another format": ("moss", {"messages": [TURN, SAID]}, "field 'chat' is missing"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(name, tmp_path):
    format, row, reason = BAD_ROWS[name]
    good = GOLDEN[format][0]
    path, bad = written(tmp_path / "a.jsonl", [good, row, good]), []
    assert len(list(conversations(path, on_bad_row=bad.append))) == 2
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: not a valid {format} row: ") and reason in bad[0], bad
    with pytest.raises(ValueError, match=rf"a.jsonl:2: not a valid {format} row: "):
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
    with pytest.raises(ValueError, match="is empty: it has no row; give a file with at least one"):
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
