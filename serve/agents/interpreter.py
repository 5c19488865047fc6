"""InternLM2's own tool protocol: the assistant calls, the environment answers, the assistant goes on.

A call is part of the assistant's message (`Message.call`), not of its text, and comes back as a turn of the role
`environment` that carries the called tool's name: nothing is parsed here, so nothing can be parsed wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from internjax.text.message import Chat, Message, ToolCall
from serve.agents.trace import Step, Trace
from serve.tools.tool import Tool, call, spec


def interpret(
    chat: Chat,
    question: str | Sequence[Message],
    tools: Sequence[Tool],
    *,
    max_turns: int = 6,
    sampling: Any = None,
    system: str | None = None,
) -> Trace:
    """The answer of `chat` to a question, or to a conversation, and how it came about.

    The tool named "interpreter" runs the code of interpreter calls, every other one is a plugin. The first assistant
    message without a call is the answer. A call that fails, or that names no tool, is answered with the error.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}; give at least 1")
    by_name = {tool.name: tool for tool in tools}
    messages = [] if system is None else [Message("system", system)]
    messages += [Message("user", question)] if isinstance(question, str) else list(question)
    specs = tuple(spec(tool) for tool in tools)
    steps: list[Step] = []
    for _ in range(max_turns):
        reply = chat(tuple(messages), tools=specs, stop=(), sampling=sampling)
        messages.append(reply)
        if reply.call is None:
            steps.append(Step(reply.content))
            return Trace(reply.content, "answer", tuple(messages), tuple(steps))
        step = _answer(reply.content, reply.call, by_name)
        steps.append(step)
        shown = step.observation if step.error is None else f"Error: {step.error}"
        messages.append(Message("environment", shown, name=reply.call.name))
    return Trace(None, "max_turns", tuple(messages), tuple(steps))


def _answer(text: str, wanted: ToolCall, tools: dict[str, Tool]) -> Step:
    try:
        name, arguments = _named(wanted)
    except ValueError as error:
        return Step(text, wanted.name, wanted.content, error=str(error))
    if name not in tools:
        return Step(text, name, wanted.content, error=f"there is no tool {name!r}; use one of {sorted(tools)}")
    try:
        observation = call(tools[name], arguments)
    except Exception as error:  # a tool's failure is the model's to deal with; the loop must survive it
        return Step(text, name, wanted.content, error=str(error) or repr(error))
    return Step(text, name, wanted.content, observation=observation)


def _named(wanted: ToolCall) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the tool that a call asks for."""
    if wanted.name == "interpreter":
        return "interpreter", {"code": wanted.content}
    try:
        body = json.loads(wanted.content, strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the call is not JSON ({error}); write {{'name': ..., 'parameters': {{...}}}}") from error
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise ValueError("the call has no name; write a JSON object with name and parameters")
    parameters = body.get("parameters", body.get("arguments", {}))
    if not isinstance(parameters, dict):
        raise ValueError(f"the parameters of {body['name']} are {parameters!r:.80}; write a JSON object")
    return body["name"], parameters
