"""MOSS conversations: thoughts, plug-in commands and their results as tool turns.

{"chat": {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}, ...}, "meta_instruction"?}

A turn with a command becomes: the user's question; the assistant's thoughts with the call (both are learned); the
result as the tool's turn (never learned); the assistant's answer. Calculate("1 + 2") is the call of the tool Calculate
with {"arguments": "1 + 2"}. Several commands of a turn become one call after the other, each with its own result.

MOSS-002's rows are one text: {"plain_text": "[Human]: ...<eoh> [MOSS]: ...<eoa> [Human]: ...", "prefix"?}
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from internjax.text.message import Message, ToolCall

# A name in brackets opens a turn only behind the mark that ends one; elsewhere it is what somebody said.
_SPEAKER = re.compile(r"(?:\A|(?<=<eoh>)|(?<=<eoa>))\s*\[(Human|MOSS)\]:")
_COMMAND = re.compile(r"(\w+)\((.*?)\)(?=\s*,\s*\w+\(|\s*$)", re.DOTALL)


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """Returns the conversation of a row; raises ValueError or KeyError where it is none."""
    instruction = row.get("meta_instruction") or row.get("prefix")
    messages = [Message("system", instruction)] if instruction else []
    if "chat" not in row and "plain_text" in row:
        return messages + _plain_turns(row["plain_text"])
    if not isinstance(row["chat"], Mapping):
        raise ValueError(f"chat is {type(row['chat']).__name__}, wanted an object of turns (turn_1, turn_2, ...)")
    # A table of conversations has the longest one's turns in every row.
    held = [(name, turn) for name, turn in row["chat"].items() if turn is not None]
    turns = sorted(held, key=lambda item: int(item[0].rpartition("_")[2]))
    for _, turn in turns:
        messages.append(Message("user", _text(turn, "Human")))
        thoughts, command, result = (
            text if name in turn and (text := _text(turn, name)).lower() != "none" else ""
            for name in ("Inner Thoughts", "Commands", "Tool Responses")
        )
        answer = _text(turn, "MOSS")
        if command:
            messages += _calls(thoughts, command, result)
        elif thoughts:
            answer = f"{thoughts}\n{answer}"
        messages.append(Message("assistant", answer))
    return messages


def _plain_turns(text: Any) -> list[Message]:
    if not isinstance(text, str):
        raise ValueError(f"plain_text is {type(text).__name__}, wanted text")
    before, *pieces = _SPEAKER.split(text)
    if before or not pieces:
        raise ValueError(f"plain_text begins with {text[:40]!r}, not with '[Human]:' or '[MOSS]:'")
    messages = []
    for who, said in zip(pieces[::2], pieces[1::2], strict=True):
        role, end = ("user", "<eoh>") if who == "Human" else ("assistant", "<eoa>")
        said = said.strip()
        if not said.endswith(end):
            raise ValueError(f"a turn of [{who}] ends with {said[-40:]!r}, not with {end}")
        messages.append(Message(role, said.removesuffix(end).strip()))
    return messages


def _calls(thoughts: str, command: str, result: str) -> list[Message]:
    """The turns of one or several commands and what they gave; the thoughts come before the first."""
    calls = _commands(command)
    results = [result] if len(calls) == 1 else _results([text for text, _ in calls], result)
    messages = []
    for number, ((_, call), outcome) in enumerate(zip(calls, results, strict=True)):
        messages.append(Message("assistant", thoughts if number == 0 else "", call=call))
        messages.append(Message("environment", outcome, name="plugin"))
    return messages


def _commands(text: str) -> list[tuple[str, ToolCall]]:
    found = list(_COMMAND.finditer(text))
    # A quote that stays open says that the comma found lies inside an argument.
    if len(found) > 1 and any(hit[2].count('"') % 2 for hit in found):
        found = [hit] if (hit := re.fullmatch(r"(\w+)\((.*)\)", text, re.DOTALL)) else []
    if not found:
        raise ValueError(f"the command {text[:60]!r} is not of the form Name(arguments)")
    return [(hit[0], _call(hit[1], hit[2])) for hit in found]


def _call(name: str, inside: str) -> ToolCall:
    arguments = inside.strip()
    if re.fullmatch(r'"(?:[^"\\]|\\.)*"', arguments, re.DOTALL):
        try:
            arguments = ast.literal_eval(arguments)
        except (ValueError, SyntaxError):  # a line break inside the quotes
            arguments = arguments[1:-1]
    body = json.dumps({"name": name, "parameters": {"arguments": arguments}}, ensure_ascii=False)
    return ToolCall("plugin", body)


def _results(commands: list[str], text: str) -> list[str]:
    """The result of every command: MOSS writes them as "COMMAND =>" and what it gave, one after the other."""
    starts = [text.find(f"{command} =>") for command in commands]
    if -1 in starts or starts != sorted(starts):
        raise ValueError(
            f"a turn has {len(commands)} commands and its results do not name each of them in order (COMMAND => result)"
        )
    return [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)])]


def _text(turn: Mapping[str, Any], name: str) -> str:
    """Returns a field without its speaker tag and end marker: "<|Human|>: Hi<eoh>" is "Hi"."""
    value = turn[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, wanted text")
    return re.sub(r"^<\|[\w ]+\|>:\s*|<eo\w>\s*$", "", value.strip()).strip()
