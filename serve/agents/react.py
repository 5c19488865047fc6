"""ReAct: a model thinks, acts through tools and reads what they answer, all in plain text.

    Thought: ...            the model
    Action: tool            the model
    Action Input: {...}     the model
    Observation: ...        the tool's answer, sent back as a user turn
    ...
    Final Answer: ...       the model

It needs nothing of the model but text, so any chat model will do. What can be repaired without guessing the model's
intent (fences, Python literals, one bare string for a tool with one parameter) is repaired; everything else goes back
to the model as an observation that says what was wrong.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from internjax.text.message import Chat, Message
from serve.agents.trace import Step, Trace
from serve.tools.tool import Tool, call, spec

STOP = ("\nObservation:",)

PROMPT = """Answer the user's question. You can use these tools:
{tools}

Write exactly in this form, one action at a time, and then stop:
Thought: what you need to find out next
Action: the name of one tool, out of {names}
Action Input: the tool's arguments as one JSON object

You will be told the result in a line that starts with "Observation:". Repeat until you know the answer, then write:
Thought: I know the answer
Final Answer: the answer to the question"""

LAST_TURN = "This was the last action. Write the line `Final Answer:` now, with what you know."


class Act(NamedTuple):
    thought: str
    tool: str
    arguments: str


class Finish(NamedTuple):
    thought: str
    answer: str


class Malformed(NamedTuple):
    text: str
    reason: str


def react(
    chat: Chat, question: str, tools: Sequence[Tool], *, max_turns: int = 6, sampling: Any = None, prompt: str = PROMPT
) -> Trace:
    """The answer of `chat` to `question` with the help of `tools`, and how it came about.

    `sampling` goes to `chat` as it is. The model is told when its last turn has come.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}; give at least 1")
    by_name = {tool.name: tool for tool in tools}
    listing = "\n".join(json.dumps(spec(tool), ensure_ascii=False) for tool in tools)
    system = prompt.format(tools=listing or "(none)", names=", ".join(by_name) or "(none)")
    messages = [Message("system", system), Message("user", question)]
    steps: list[Step] = []
    for turn in range(1, max_turns + 1):
        reply = _visible(chat(tuple(messages), tools=(), stop=STOP, sampling=sampling).content)
        messages.append(Message("assistant", reply))
        match parse_reply(reply):
            case Finish(thought, answer):
                steps.append(Step(thought))
                return Trace(answer, "answer", tuple(messages), tuple(steps))
            case Act(thought, name, arguments):
                step = _act(thought, name, arguments, by_name)
            case Malformed(text, reason):
                step = Step(text, error=reason)
        steps.append(step)
        if turn < max_turns:
            observation = f"Observation: {step.observation if step.error is None else 'Error: ' + step.error}"
            last = f"\n{LAST_TURN}" if turn == max_turns - 1 else ""
            messages.append(Message("user", observation + last))
    return Trace(None, "max_turns", tuple(messages), tuple(steps))


_LABEL = re.compile(
    r"^[ \t*#>_-]*(thought|action[ _]?input|action|observation|final[ _]?answer)[ \t]*\d*[ \t*_]*:[ \t*_]*",
    re.IGNORECASE | re.MULTILINE,
)


def parse_reply(text: str) -> Act | Finish | Malformed:
    """What a reply asks for: the first action or final answer in it. Whatever comes behind is not looked at."""
    labels = list(_LABEL.finditer(text))
    thought, action = text[: labels[0].start()].strip() if labels else text.strip(), None
    for label, following in zip(labels, [*labels[1:], None]):
        value = text[label.end() : following.start() if following else len(text)].strip()
        match re.sub(r"[ _]", "", label[1].lower()):
            case "thought":
                thought = value
            case "action":
                if action is not None:
                    break
                action = value.strip("`'\"*[] \t")
            case "actioninput" if action is not None:
                return Act(thought, action, value)
            case "finalanswer":
                if not value:
                    return Malformed(text, "`Final Answer:` is empty; write the answer behind it")
                return Finish(thought, value)
            case _:
                break
    if action is not None:
        return Malformed(
            text, f"`Action: {action}` has no `Action Input:` line; write one, {{}} if there is nothing to give"
        )
    return Malformed(text, "neither an `Action:` line nor a `Final Answer:` line was found; write one of them")


def parse_arguments(text: str, tool: Tool) -> dict[str, Any]:
    """The arguments that a model wrote for `tool`. Raises ValueError, worded for the model, if there is no telling."""
    bare = _without_fence(text)
    value = _literal(bare)
    if isinstance(value, dict):
        return value
    properties = tool.parameters.get("properties", {})
    only = next(iter(properties)) if len(properties) == 1 else None
    looks_like_object = (
        bare.startswith("{") and only is not None and re.search(rf"""['"]{re.escape(only)}['"]\s*:""", bare)
    )
    if only is not None and properties[only].get("type") == "string" and bare and not looks_like_object:
        return {only: value if isinstance(value, str) else bare}
    raise ValueError(f"the Action Input of {tool.name} is not a JSON object: {bare[:200]!r}. Write {_example(tool)}")


def _visible(reply: str) -> str:
    """The reply up to an observation that the model made up, in case `chat` does not know stop strings."""
    for label in _LABEL.finditer(reply):
        if label[1].lower() == "observation":
            return reply[: label.start()].rstrip()
    return reply


def _act(thought: str, name: str, arguments: str, tools: dict[str, Tool]) -> Step:
    if name not in tools:
        return Step(thought, name, arguments, error=f"there is no tool {name!r}; use one of {sorted(tools)}")
    try:
        observation = call(tools[name], parse_arguments(arguments, tools[name]))
    except Exception as error:  # a tool's failure is the model's to deal with; the loop must survive it
        return Step(thought, name, arguments, error=str(error) or repr(error))
    return Step(thought, name, arguments, observation=observation)


def _without_fence(text: str) -> str:
    fenced = re.fullmatch(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*", text, flags=re.DOTALL)
    return fenced[1] if fenced else text.strip()


def _literal(text: str) -> Any:
    """The JSON value at the start of `text`, or the Python literal that it is, or None."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text)[0]  # strict=False: newlines inside strings
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _example(tool: Tool) -> str:
    return json.dumps(
        {name: f"<{schema.get('type', 'any')}>" for name, schema in tool.parameters["properties"].items()}
    )
