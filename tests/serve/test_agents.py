"""The agents, with models that answer from a script: every turn, every observation and every repair is exact."""

import pytest

from internjax.text.message import Message, ToolCall
from serve.agents.interpreter import interpret
from serve.agents.react import LAST_TURN, STOP, Act, Finish, Malformed, parse_arguments, parse_reply, react
from serve.agents.trace import Step
from serve.tools.python import interpreter_tool, python_tool
from serve.tools.tool import Tool, spec

ADD = Tool(
    "add",
    "Adds two integers.",
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    lambda a, b: str(a + b),
)
SHOUT = Tool(
    "shout", "Shouts.", {"type": "object", "properties": {"text": {"type": "string"}}}, lambda text: text.upper()
)
BROKEN = Tool("broken", "Fails.", {"type": "object", "properties": {}}, lambda: 1 / 0)


class Scripted:
    """A Chat that gives its replies one after the other and keeps what it was asked."""

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked: list = []

    def __call__(self, messages, *, tools, stop, sampling):
        self.asked.append((messages, tools, stop, sampling))
        reply = self.replies.pop(0)
        return reply if isinstance(reply, Message) else Message("assistant", reply)


def test_react_from_question_to_answer():
    chat = Scripted(
        'Thought: I add them.\nAction: add\nAction Input: {"a": 2, "b": 3}',
        "Thought: I know the answer\nFinal Answer: 5",
    )
    trace = react(chat, "2 + 3?", [ADD], sampling={"seed": 1})
    assert (trace.answer, trace.finish) == ("5", "answer")
    assert trace.steps == (
        Step("I add them.", "add", '{"a": 2, "b": 3}', observation="5"),
        Step("I know the answer"),
    )
    assert [message.role for message in trace.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert trace.messages[3].content == "Observation: 5"
    assert "Adds two integers." in trace.messages[0].content
    first, second = chat.asked
    assert first == (trace.messages[:2], (), STOP, {"seed": 1}) and second[0] == trace.messages[:4]


def test_react_runs_python_in_the_sandbox():
    chat = Scripted(
        "Thought: compute\nAction: python\nAction Input:\n```python\nimport math\nmath.gcd(12, 18)\n```",
        "Final Answer: 6",
    )
    trace = react(chat, "gcd of 12 and 18?", [python_tool()])
    assert (trace.answer, trace.steps[0].observation) == ("6", "6")


@pytest.mark.parametrize(
    ("reply", "reported"),
    [
        ("I would just say 5.", "neither an `Action:` line nor a `Final Answer:` line"),
        ("Thought: hm\nAction: add", "has no `Action Input:` line"),
        ("Final Answer:", "`Final Answer:` is empty"),
        ("", "neither"),
        ('Action: subtract\nAction Input: {"a": 1}', "there is no tool 'subtract'; use one of ['add', 'broken']"),
        ("Action: add\nAction Input: two and three", "not a JSON object: 'two and three'"),
        ('Action: add\nAction Input: {"a": 1}', "'b' is missing"),
        ('Action: add\nAction Input: {"a": "1", "b": 2}', "'a' is '1', not of type integer"),
        ("Action: broken\nAction Input: {}", "division by zero"),
    ],
)
def test_react_reports_what_it_cannot_use_and_goes_on(reply, reported):
    chat = Scripted(reply, "Final Answer: done")
    trace = react(chat, "?", [ADD, BROKEN])
    assert trace.answer == "done"
    assert reported in trace.steps[0].error and trace.steps[0].observation is None
    assert trace.messages[3].content == f"Observation: Error: {trace.steps[0].error}"


def test_react_stops_after_its_turns_and_says_so_before_the_last():
    chat = Scripted(*['Action: add\nAction Input: {"a": 1, "b": 1}'] * 3)
    trace = react(chat, "?", [ADD], max_turns=3)
    assert (trace.answer, trace.finish, len(trace.steps)) == (None, "max_turns", 3)
    warned = [LAST_TURN in messages[-1].content for messages, *_ in chat.asked]
    assert warned == [False, False, True]
    with pytest.raises(ValueError, match="max_turns is 0"):
        react(chat, "?", [ADD], max_turns=0)


def test_react_does_not_believe_observations_that_the_model_made_up():
    chat = Scripted(
        'Action: add\nAction Input: {"a": 1, "b": 1}\nObservation: 7\nFinal Answer: 7',
        "Final Answer: 2",
    )
    trace = react(chat, "1 + 1?", [ADD])
    assert (trace.answer, trace.steps[0].observation) == ("2", "2")
    assert "7" not in trace.messages[2].content


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("Thought: t\nAction: a\nAction Input: {}", Act("t", "a", "{}")),
        ("Action: a\nAction Input: x\nAction: b\nAction Input: y", Act("", "a", "x")),  # the first one counts
        ("musing first\nAction: `a`\nAction Input: x", Act("musing first", "a", "x")),
        ("**Thought:** t\n**Action:** a\n**Action Input:** x", Act("t", "a", "x")),
        ("thought 1: t\naction 1: a\naction input 1: x", Act("t", "a", "x")),
        ("Action: a\nAction Input: x\ny\nz", Act("", "a", "x\ny\nz")),
        ("Thought: t\nFinal Answer: one\ntwo", Finish("t", "one\ntwo")),
        ("Final Answer: 5\nThought: but\nAction: a\nAction Input: x", Finish("", "5")),
        ("Action: a\nAction: b\nAction Input: x", Malformed),
        ("Action Input: x", Malformed),
        ("The Final Answer: is nowhere at a line's start", Malformed),
    ],
)
def test_parse_reply(text, parsed):
    assert parse_reply(text) == parsed if not isinstance(parsed, type) else isinstance(parse_reply(text), parsed)


@pytest.mark.parametrize(
    ("text", "tool", "arguments"),
    [
        ('{"a": 1, "b": 2}', ADD, {"a": 1, "b": 2}),
        ('```json\n{"a": 1, "b": 2}\n```', ADD, {"a": 1, "b": 2}),
        ('{"a": 1, "b": 2} I hope this is right', ADD, {"a": 1, "b": 2}),
        ("{'a': 1, 'b': 2}", ADD, {"a": 1, "b": 2}),
        ('{"text": "two\nlines"}', SHOUT, {"text": "two\nlines"}),
        ("plain words", SHOUT, {"text": "plain words"}),
        ('"quoted"', SHOUT, {"text": "quoted"}),
        ("{1, 2}", SHOUT, {"text": "{1, 2}"}),
        ('{"text": "never closed', SHOUT, None),
        ("", SHOUT, None),
        ("[1, 2]", ADD, None),
    ],
)
def test_parse_arguments(text, tool, arguments):
    if arguments is None:
        with pytest.raises(ValueError, match="is not a JSON object"):
            parse_arguments(text, tool)
    else:
        assert parse_arguments(text, tool) == arguments


def called(name, content, text=""):
    return Message("assistant", text, call=ToolCall(name, content))


def test_interpreter_protocol_from_question_to_answer():
    chat = Scripted(
        called("interpreter", "import math\nx = math.gcd(12, 18)\nx", "Let me compute."),
        called("plugin", '{"name": "add", "parameters": {"a": 6, "b": 1}}'),
        called("interpreter", "x"),
        "It is 6, and 7 with one more.",
    )
    tools = [interpreter_tool(), ADD]
    trace = interpret(chat, "gcd?", tools, system="Be short.", sampling="greedy")
    assert (trace.answer, trace.finish) == ("It is 6, and 7 with one more.", "answer")
    assert [(m.role, m.name) for m in trace.messages] == [
        ("system", None),
        ("user", None),
        ("assistant", None),
        ("environment", "interpreter"),
        ("assistant", None),
        ("environment", "plugin"),
        ("assistant", None),
        ("environment", "interpreter"),
        ("assistant", None),
    ]
    assert [step.observation for step in trace.steps] == ["6", "7", "6", None]
    assert [step.tool for step in trace.steps] == ["interpreter", "add", "interpreter", None]
    assert trace.steps[0].text == "Let me compute."
    assert all(asked[1:] == (tuple(map(spec, tools)), (), "greedy") for asked in chat.asked)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("plugin", "{", "the call is not JSON"),
        ("plugin", "[1]", "the call has no name"),
        ("plugin", '{"name": "add", "parameters": [1]}', "write a JSON object"),
        ("plugin", '{"name": "add", "parameters": {"a": 1}}', "'b' is missing"),
        ("plugin", '{"name": "nothing", "parameters": {}}', "there is no tool 'nothing'"),
        ("plugin", '{"name": "broken"}', "division by zero"),
        ("interpreter", "1 + 1", "there is no tool 'interpreter'"),
    ],
)
def test_interpreter_protocol_answers_a_bad_call_with_the_error(name, content, error):
    trace = interpret(Scripted(called(name, content), "sorry"), "?", [ADD, BROKEN])
    assert trace.answer == "sorry"
    assert error in trace.steps[0].error
    assert trace.messages[2] == Message("environment", f"Error: {trace.steps[0].error}", name=name)


def test_interpreter_protocol_ends_with_its_turns():
    conversation = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "again")]
    trace = interpret(Scripted(*[called("interpreter", "1")] * 2), conversation, [interpreter_tool()], max_turns=2)
    assert (trace.answer, trace.finish, len(trace.steps)) == (None, "max_turns", 2)
    assert trace.messages[:3] == tuple(conversation)
    assert trace.messages[-1].role == "environment"  # the last call has its answer: the conversation can go on
