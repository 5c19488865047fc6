"""Conversations as values: `Message`, `ToolCall`, and their forms as dicts (OpenAI's, the chat template's)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Role = Literal["system", "user", "assistant", "environment"]
ToolName = Literal["interpreter", "plugin"]
# System text of the turn named "interpreter".
INTERPRETER_PROMPT = (
    "A Python interpreter is at your service. Send it code whenever running code gives a better answer than thinking "
    "alone: arithmetic, checking a claim, working on text, tables and files. What the code prints comes back to you."
)


@dataclass(frozen=True)
class ToolCall:
    """What an assistant wants run: Python code for "interpreter", `{"name", "parameters"}` JSON for "plugin"."""

    name: ToolName
    content: str

    def __post_init__(self):
        if self.name not in get_args(ToolName):
            raise ValueError(f"a call names {self.name!r}; give one of {list(get_args(ToolName))}")


@dataclass(frozen=True)
class Message:
    """One turn. The names "interpreter" and "plugin" mark tool turns; others ("file") are plain text in the header."""

    role: Role
    content: str
    name: str | None = None
    call: ToolCall | None = None

    def __post_init__(self):
        if self.role not in get_args(Role):
            raise ValueError(
                f"role is {self.role!r}; give one of {list(get_args(Role))} (OpenAI's 'tool' is 'environment')"
            )
        if not isinstance(self.content, str):
            raise ValueError(f"content of the {self.role} turn is a {type(self.content).__name__}; give text")
        if self.call is not None and self.role != "assistant":
            raise ValueError(f"the {self.role} turn carries a call; only the assistant calls tools")
        if self.name is not None and (not self.name or "\n" in self.name):
            raise ValueError(f"name is {self.name!r}; give one line of text, or None")

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts of the turn: its name, what it says, what it wants run; those that it has."""
        named = () if self.name is None else (self.name,)
        return (*named, self.content, *(() if self.call is None else (self.call.content,)))


# Chat(messages, *, tools, stop, sampling) -> the assistant's message: what agents and judges are given as a model.
Chat = Callable[..., Message]


class Rendered(NamedTuple):
    """Token ids, and 1 for each that the assistant must produce: its text, its call, its `<|im_end|>`."""

    ids: list[int]
    mask: list[int]


def tools_message(tools: Sequence[Mapping]) -> Message:
    """The system turn that declares tools, each {name, description, parameters}, as a JSON list."""
    return Message("system", json.dumps(list(tools), ensure_ascii=False), name="plugin")


def to_openai(messages: Sequence[Message]) -> list[dict]:
    """OpenAI's dicts of a conversation. An interpreter call becomes the function "interpreter" with {"code": ...}."""
    turns = []
    for message in messages:
        role = "tool" if message.role == "environment" else message.role
        turn: dict = {"role": role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if message.call is not None:
            turn["tool_calls"] = [{"type": "function", "function": _openai_function(message.call)}]
        turns.append(turn)
    return turns


def from_openai(turns: Sequence[Mapping]) -> list[Message]:
    """Messages of OpenAI's dicts: "tool" is "environment", "developer" is "system", `tool_calls` is the call."""
    messages = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "role" not in turn:
            raise ValueError(f"message {index} is {turn!r:.80}; give an object with role and content")
        role, name = turn["role"], turn.get("name")
        if role == "tool":
            role, name = "environment", name if name == "interpreter" else "plugin"
        elif role == "developer":
            role = "system"
        calls = turn.get("tool_calls") or []
        if len(calls) > 1:
            raise ValueError(f"message {index} has {len(calls)} tool_calls; a turn holds one: give each its own turn")
        call = _call_from_openai(calls[0], index) if calls else None
        messages.append(Message(role, _content_text(turn.get("content"), index), name=name, call=call))
    return messages


def to_dict(message: Message) -> dict:
    """The message as `INTERNLM2_TEMPLATE` reads it (transformers' apply_chat_template)."""
    turn: dict = {"role": message.role, "content": message.content}
    if message.name is not None:
        turn["name"] = message.name
    if message.call is not None:
        turn["call"] = {"name": message.call.name, "content": message.call.content}
    return turn


def _openai_function(call: ToolCall) -> dict:
    if call.name == "interpreter":
        return {"name": "interpreter", "arguments": json.dumps({"code": call.content}, ensure_ascii=False)}
    try:
        wanted = json.loads(call.content)
        return {"name": wanted["name"], "arguments": json.dumps(wanted.get("parameters", {}), ensure_ascii=False)}
    except (ValueError, KeyError, TypeError, AttributeError):  # a model's broken JSON is handed on, not hidden
        return {"name": "", "arguments": call.content}


def _call_from_openai(call: Mapping, index: int) -> ToolCall:
    try:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the tool call of message {index} cannot be read ({error!r}); "
            'give {"function": {"name": ..., "arguments": "<JSON object>"}}'
        ) from error
    if name == "interpreter" and isinstance(arguments, Mapping) and isinstance(arguments.get("code"), str):
        return ToolCall("interpreter", arguments["code"])
    return ToolCall("plugin", json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False))


def _content_text(content, index: int) -> str:
    """Text of OpenAI's content, which is a string, nothing, or a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
    if any(kind != "text" for kind in kinds):
        raise ValueError(f"message {index} holds parts {kinds}; only text parts are read")
    return "".join(part["text"] for part in content)
