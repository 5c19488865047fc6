"""Conversation files of the field -> `internjax.text.chat.Message` lists: detected, or named.

alpaca     {"instruction", "input"?, "output", "system"?, "history"?}
openai     {"messages": [{"role", "content", "tool_calls"?}], "tools"?}
sharegpt   {"conversations": [{"from", "value"}], "system"?, "tools"?} (Guanaco and Vicuna files have this form)
oasst      {"text": "### Human: ...### Assistant: ..."} (the flat form of OpenAssistant / Guanaco)
completion {"prompt", "completion"} or {"question", "answer"}
moss       {"chat": {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}}, "meta_instruction"?}
preference {"conversations" or "prompt", "chosen", "rejected"}
text       {"text"}: no conversation
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipelines.sources import json_rows
from internjax.text.chat import Message, ToolCall, from_openai, tools_message

Format = Literal["alpaca", "openai", "sharegpt", "oasst", "completion", "moss", "preference", "text"]

_TURN = re.compile(r"###\s*(Human|Assistant|System):\s?")
_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "system": "system", "tool": "environment",
    "observation": "environment", "environment": "environment", "function_response": "environment",
}  # fmt: skip


class Preference(NamedTuple):
    """A conversation and two answers to it, the better one first."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


class Sample(NamedTuple):
    """What one row says, and where it stands ("file:line")."""

    place: str
    messages: list[Message]


def detect(row: Mapping[str, Any]) -> Format | None:
    """Returns the format of a row by its fields, or None where they fit none."""
    # The order is important: preference rows carry a prompt in another format's fields.
    if "chosen" in row and "rejected" in row:
        return "preference"
    if isinstance(row.get("messages"), list):
        return "openai"
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if isinstance(row.get("chat"), dict):
        return "moss"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row):
        return "completion"
    if isinstance(row.get("text"), str):
        return "oasst" if _TURN.match(row["text"].lstrip()) else "text"
    return None


def detect_file(path: str | Path) -> Format:
    """Returns the format of a file by its first readable row. Raises ValueError for an empty or an unknown one."""
    bad: list[str] = []
    first = next(json_rows(path, on_bad_row=bad.append), None)
    if first is None:
        raise ValueError(bad[0] if bad else f"{path} is empty: it has no JSON row; give a file with at least one")
    found = detect(first.value)
    if found is None:
        raise ValueError(
            f"{first.place}: fields {', '.join(sorted(first.value)) or 'none'} fit no known format. Wanted one of: "
            "instruction/output (Alpaca), messages (OpenAI), conversations (ShareGPT), chat (MOSS), prompt/completion, "
            "chosen/rejected, text"
        )
    return found


def conversations(
    path: str | Path, *, format: Format | None = None, on_bad_row: Callable[[str], None] | None = None
) -> Iterator[Sample]:
    """Yields the conversations of a JSONL or JSON file, `format` or what its first row shows.

    A row that is no conversation raises ValueError "file:line: reason", or is handed to `on_bad_row` and left out.
    """
    format = format or detect_file(path)
    if format not in _READERS:
        raise ValueError(f"{path} holds {format} rows, not conversations; give one of: {', '.join(_READERS)}")
    read = _READERS[format]
    for row in json_rows(path, on_bad_row=on_bad_row):
        try:
            messages = read(row.value)
            if not any(message.role == "assistant" for message in messages):
                raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"{row.place}: not a {format} row: {reason}"
            if on_bad_row is None:
                raise ValueError(message) from error
            on_bad_row(message)
            continue
        yield Sample(row.place, messages)


def preferences(path: str | Path, *, on_bad_row: Callable[[str], None] | None = None) -> Iterator[Preference]:
    """Yields the pairs of a preference file; a bad row raises ValueError or is handed to `on_bad_row`."""
    for row in json_rows(path, on_bad_row=on_bad_row):
        try:
            prompt = row.value.get("conversations", row.value.get("messages", row.value.get("prompt")))
            if not prompt:
                raise ValueError("it has no prompt")
            prompt = [Message("user", prompt)] if isinstance(prompt, str) else [_sharegpt_turn(turn) for turn in prompt]
            answers = [_answer(row.value[name], name) for name in ("chosen", "rejected")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            message = f"{row.place}: not a preference row: {reason}; wanted a prompt, chosen and rejected"
            if on_bad_row is None:
                raise ValueError(message) from error
            on_bad_row(message)
            continue
        yield Preference([*_opening(row.value), *prompt], *answers)


def to_row(messages: Sequence[Message]) -> dict[str, Any]:
    """Returns a conversation as an OpenAI row; `conversations` reads it back."""
    from internjax.text.chat import to_openai

    return {"messages": to_openai(messages)}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, wanted text")
    return value


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    messages = [Message("system", row["system"])] if row.get("system") else []
    for asked, answered in row.get("history") or []:
        messages += [Message("user", asked), Message("assistant", answered)]
    asked = _text(row["instruction"], "instruction")
    if row.get("input"):
        asked = f"{asked}\n{_text(row['input'], 'input')}"
    return [*messages, Message("user", asked), Message("assistant", _text(row["output"], "output"))]


def _openai(row: Mapping[str, Any]) -> list[Message]:
    for index, turn in enumerate(row["messages"]):
        unread = [name for name in ("function_call", "refusal", "audio") if isinstance(turn, dict) and turn.get(name)]
        if unread:
            raise ValueError(f"message {index} has {unread[0]}, which is not read; give content or tool_calls")
        if isinstance(turn, dict) and turn.get("weight", 1) != 1:
            raise ValueError(f"message {index} has the weight {turn['weight']}; every assistant turn is learned alike")
    return _tools(row.get("tools")) + from_openai(row["messages"])


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return _opening(row) + [_sharegpt_turn(turn) for turn in row["conversations"]]


def _opening(row: Mapping[str, Any]) -> list[Message]:
    """The system turns of a row that has them beside its conversation."""
    system = [Message("system", row["system"])] if row.get("system") else []
    return system + _tools(row.get("tools"))


def _sharegpt_turn(turn: Mapping[str, Any]) -> Message:
    if "from" not in turn:
        return from_openai([turn])[0]
    said, text = turn["from"], _text(turn["value"], "value")
    if said == "function_call":
        call = json.loads(text)
        parameters = call.get("arguments", call.get("parameters", {}))
        parameters = json.loads(parameters) if isinstance(parameters, str) else parameters
        body = json.dumps({"name": call["name"], "parameters": parameters}, ensure_ascii=False)
        return Message("assistant", "", call=ToolCall("plugin", body))
    if said not in _ROLES:
        raise ValueError(f"a turn is from {said!r}; known: {', '.join([*_ROLES, 'function_call'])}")
    role = _ROLES[said]
    return Message(role, text, name="plugin" if role == "environment" else None)


def _oasst(row: Mapping[str, Any]) -> list[Message]:
    before, *pieces = _TURN.split(_text(row["text"], "text").strip())
    if before:
        raise ValueError(
            f"the text begins with {before[:40]!r}, not with '### Human:', '### Assistant:' or '### System:'"
        )
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [Message(roles[who], text.strip()) for who, text in zip(pieces[::2], pieces[1::2], strict=True)]


def _completion(row: Mapping[str, Any]) -> list[Message]:
    asked, answered = ("prompt", "completion") if "prompt" in row else ("question", "answer")
    return [Message("user", _text(row[asked], asked)), Message("assistant", _text(row[answered], answered))]


def _moss(row: Mapping[str, Any]) -> list[Message]:
    instruction = row.get("meta_instruction")
    messages = [Message("system", instruction)] if instruction else []
    turns = sorted(row["chat"].items(), key=lambda item: int(item[0].rpartition("_")[2]))
    for _, turn in turns:
        messages.append(Message("user", _moss_text(turn, "Human")))
        answer = _moss_text(turn, "MOSS")
        thoughts, command, result = (
            text if name in turn and (text := _moss_text(turn, name)).lower() != "none" else ""
            for name in ("Inner Thoughts", "Commands", "Tool Responses")
        )
        if command:
            name, _, inside = command.partition("(")
            parameters = {"arguments": inside.rstrip().removesuffix(")")}
            body = json.dumps({"name": name.strip(), "parameters": parameters}, ensure_ascii=False)
            messages.append(Message("assistant", thoughts, call=ToolCall("plugin", body)))
            messages.append(Message("environment", result, name="plugin"))
        elif thoughts:
            answer = f"{thoughts}\n{answer}"
        messages.append(Message("assistant", answer))
    return messages


def _moss_text(turn: Mapping[str, Any], name: str) -> str:
    """Returns a MOSS field without its speaker tag and end marker: "<|Human|>: Hi<eoh>" is "Hi"."""
    return re.sub(r"^<\|[\w ]+\|>:\s*|<eo\w>\s*$", "", _text(turn[name], name).strip()).strip()


def _tools(tools: Any) -> list[Message]:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return []
    return [tools_message([tool.get("function", tool) for tool in tools])]


def _answer(value: Any, name: str) -> Message:
    if isinstance(value, str):
        return Message("assistant", value)
    if not value:
        raise ValueError(f"{name} is empty")
    answer = _sharegpt_turn(value if isinstance(value, Mapping) else value[-1])
    if answer.role != "assistant":
        raise ValueError(f"{name} ends with a turn of the {answer.role}, wanted the assistant's")
    return answer


_READERS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "alpaca": _alpaca,
    "openai": _openai,
    "sharegpt": _sharegpt,
    "oasst": _oasst,
    "completion": _completion,
    "moss": _moss,
}
