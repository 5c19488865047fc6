"""Conversation files of the field -> `internjax.text.chat.Message` lists: detected, or named.

alpaca     {"instruction", "input"?, "output", "system"?, "history"?}
openai     {"messages": [{"role", "content", "tool_calls"?}], "tools"?}
sharegpt   {"conversations": [{"from", "value"}], "system"?, "tools"?} (Guanaco and Vicuna files have this form)
xtuner     {"conversation": [{"system"?, "input", "output"}]}
oasst      {"text": "### Human: ...### Assistant: ..."} (the flat form of OpenAssistant / Guanaco)
oasst_tree message trees of OpenAssistant: every path; oasst_best (by name only): the best-ranked path of each tree
completion {"prompt", "completion"} or {"question", "answer"}; texts, or lists of OpenAI turns
moss       {"chat": {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}}, "meta_instruction"?},
           or MOSS-002's {"plain_text": "[Human]: ...<eoh> [MOSS]: ...<eoa> ...", "prefix"?}
preference {"conversations" or "messages" or "prompt" or "instruction", "chosen", "rejected"}; without a prompt, chosen
           and rejected are whole conversations: lists of turns, or hh-rlhf's texts "\n\nHuman: ...\n\nAssistant: ..."
text       {"text"}: no conversation

A turn with "loss": false, "train": false or "weight": 0 is read and not learned (xtuner: "output_with_loss": false).
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipelines import moss, trees
from data_pipelines.readers import Row
from data_pipelines.rows import BadRow, read_rows
from internjax.text.chat import Message, ToolCall, from_openai, tools_message

Format = Literal[
    "alpaca",
    "openai",
    "sharegpt",
    "xtuner",
    "oasst",
    "oasst_tree",
    "oasst_best",
    "completion",
    "moss",
    "preference",
    "text",
]

_TURN = re.compile(r"###\s*(Human|Assistant|System):\s?")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "system": "system", "tool": "environment",
    "observation": "environment", "environment": "environment", "function_response": "environment",
}  # fmt: skip
_ROW_ERRORS = (ValueError, KeyError, TypeError, AttributeError)


class Preference(NamedTuple):
    """A conversation and two answers to it, the better one first."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    place: str
    """Where the pair stands ("file:line")."""


class Sample(NamedTuple):
    """One conversation of a row, and where that stands ("file:line")."""

    place: str
    messages: list[Message]
    learned: tuple[bool, ...] | None = None
    """Of every message: whether it is learned, if it is the assistant's. None: all are."""
    group: str | None = None
    """Conversations with the same group have turns in common (the paths of a tree)."""


class _Talk(NamedTuple):
    """A conversation as a reader finds it in a row."""

    messages: list[Message]
    learned: tuple[bool, ...] | None = None


class Text(NamedTuple):
    """A text of a row, and where that stands."""

    place: str
    text: str


def detect(row: Mapping[str, Any]) -> Format | None:
    """Returns the format of a row by its fields, or None where they fit none."""
    # The order is important: preference rows carry a prompt in another format's fields.
    if "chosen" in row and "rejected" in row:
        return "preference"
    lists: dict[str, Format] = {"messages": "openai", "conversations": "sharegpt", "conversation": "xtuner"}
    for name, format in lists.items():
        if isinstance(row.get(name), list):
            return format
    if isinstance(row.get("chat"), dict) or isinstance(row.get("plain_text"), str):
        return "moss"
    if isinstance(row.get("prompt"), dict) or trees.is_message(row):
        return "oasst_tree"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if ("prompt" in row and "completion" in row) or ("question" in row and "answer" in row):
        return "completion"
    if isinstance(row.get("text"), str):
        return "oasst" if _TURN.match(row["text"].lstrip()) else "text"
    return None


def detect_file(path: str | Path, *, columns: Sequence[str] = ()) -> Format:
    """Returns the format of a file by its first readable row. Raises ValueError for an empty or an unknown one."""
    bad: list[str] = []
    first = next(read_rows(path, columns=columns, on_bad_row=bad.append), None)
    if first is None:
        raise ValueError(bad[0] if bad else f"{path} is empty: it has no row; give a file with at least one")
    found = detect(first.value)
    if found is None:
        raise ValueError(
            f"{first.place}: fields {', '.join(sorted(first.value)) or 'none'} fit no known format. Wanted one of: "
            "instruction/output (Alpaca), messages (OpenAI), conversations (ShareGPT), chat or plain_text (MOSS), "
            "prompt/completion, chosen/rejected, text. Columns of other names can be renamed: --columns "
            "instruction=ask output=reply (in a fine-tuning --reading.columns)"
        )
    return found


def unread_columns(path: str | Path, *, format: Format, columns: Sequence[str] = ()) -> list[str]:
    """Returns the columns of a file's first row that its format does not read: with texts in them, worth a look."""
    first = next(read_rows(path, columns=columns, on_bad_row=lambda message: None), None)
    return [] if first is None else [name for name in first.value if name not in _READ[format]]


def conversations(
    path: str | Path,
    *,
    format: Format | None = None,
    columns: Sequence[str] = (),
    on_bad_row: BadRow = None,
) -> Iterator[Sample]:
    """Yields the conversations of a file (see `rows.read_rows`), `format` or what its first row shows.

    A row that is no conversation raises ValueError "file:line: reason", or is handed to `on_bad_row` and left out.
    """
    format = format or detect_file(path, columns=columns)
    if format not in _READERS:
        raise ValueError(f"{path} holds {format} rows, not conversations; give one of: {', '.join(_READERS)}")
    read, bad = _READERS[format], _refusing(on_bad_row)
    rows: Iterable[Row] = read_rows(path, columns=columns, on_bad_row=on_bad_row)
    is_tree = format in ("oasst_tree", "oasst_best")
    if is_tree:
        rows = trees.gathered(rows, bad=bad)
    for row in rows:
        try:
            talks = [_checked(talk) for talk in read(row.value)]
            if not talks:
                raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")
        except _ROW_ERRORS as error:
            bad(f"{row.place}: not a valid {format} row: {_reason(error)}")
            continue
        for number, talk in enumerate(talks, 1):
            place = row.place if len(talks) == 1 else f"{row.place}#{number}"
            group = talk.messages[0].content if is_tree else None
            yield Sample(place, talk.messages, talk.learned, group)


def preferences(path: str | Path, *, columns: Sequence[str] = (), on_bad_row: BadRow = None) -> Iterator[Preference]:
    """Yields the pairs of a preference file; a bad row raises ValueError or is handed to `on_bad_row`."""
    bad = _refusing(on_bad_row)
    for row in read_rows(path, columns=columns, on_bad_row=on_bad_row):
        try:
            pair = _preference(row)
        except _ROW_ERRORS as error:
            bad(f"{row.place}: not a valid preference row: {_reason(error)}; wanted a prompt, chosen and rejected")
            continue
        yield pair


def texts(path: str | Path, *, columns: Sequence[str] = (), on_bad_row: BadRow = None) -> Iterator[Text]:
    """Yields the plain texts of a file; a row without one raises ValueError or is handed to `on_bad_row`."""
    bad = _refusing(on_bad_row)
    for row in read_rows(path, columns=columns, on_bad_row=on_bad_row):
        text = row.value.get("text")
        if isinstance(text, str) and text.strip():
            yield Text(row.place, text)
        else:
            found = "is empty" if isinstance(text, str) else f"is {type(text).__name__}, wanted text"
            bad(f"{row.place}: not a text row: text {found}")


def to_row(messages: Sequence[Message]) -> dict[str, Any]:
    """Returns a conversation as an OpenAI row; `conversations` reads it back."""
    from internjax.text.chat import to_openai

    return {"messages": to_openai(messages)}


def _refusing(on_bad_row: BadRow) -> Callable[[str], None]:
    def bad(message: str) -> None:
        if on_bad_row is None:
            raise ValueError(message)
        on_bad_row(message)

    return bad


def _reason(error: Exception) -> str:
    return f"field {error} is missing" if isinstance(error, KeyError) else str(error)


def _checked(talk: _Talk) -> _Talk:
    """Returns a conversation that has something to learn; raises ValueError for another."""
    answers = [index for index, message in enumerate(talk.messages) if message.role == "assistant"]
    if not answers:
        raise ValueError("the conversation has no assistant turn, so there is nothing to learn from it")
    learned = [talk.messages[index] for index in answers if talk.learned is None or talk.learned[index]]
    if not learned:
        raise ValueError("every assistant turn is marked as not to be learned, so there is nothing to learn from it")
    if not any(message.content.strip() or message.call for message in learned):
        raise ValueError("the assistant says nothing: its turns are empty")
    return talk


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, wanted text")
    return value


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    """The turns in a field."""
    turns = row[name]
    if not isinstance(turns, list):
        raise ValueError(f"{name} is {type(turns).__name__}, wanted a list of turns")
    wrong = [index for index, turn in enumerate(turns) if not isinstance(turn, Mapping)]
    if wrong:
        raise ValueError(f"turn {wrong[0]} of {name} is {turns[wrong[0]]!r:.80}, wanted an object")
    return turns


def _is_learned(turn: Any, index: int) -> bool:
    """Whether a turn's own marks (OpenAI's weight, XTuner's loss, axolotl's train) leave it to be learned."""
    for name in ("weight", "loss", "train"):
        mark = turn.get(name) if isinstance(turn, Mapping) else None
        if mark is not None and mark not in (0, 1):
            raise ValueError(f"turn {index} has {name} {mark!r}; a turn is learned (1, true) or not (0, false)")
        if mark is not None and not mark:
            return False
    return True


def _flags(before: int, learned: Sequence[bool]) -> tuple[bool, ...] | None:
    return None if all(learned) else (*(True for _ in range(before)), *learned)


# --- readers: a row's conversations ----------------------------------------------------------------------------------


def _alpaca(row: Mapping[str, Any]) -> list[_Talk]:
    messages = _question(row)
    return [_Talk([*messages, Message("assistant", _text(row["output"], "output"))])]


def _question(row: Mapping[str, Any]) -> list[Message]:
    """The turns of an Alpaca row up to its instruction."""
    messages = [Message("system", row["system"])] if row.get("system") else []
    for number, turns in enumerate(row.get("history") or []):
        if not isinstance(turns, list) or len(turns) != 2:
            raise ValueError(f"history {number} is {turns!r:.80}, wanted [question, answer]")
        messages += [Message("user", turns[0]), Message("assistant", turns[1])]
    asked = _text(row["instruction"], "instruction")
    if row.get("input"):
        asked = f"{asked}\n{_text(row['input'], 'input')}"
    return [*messages, Message("user", asked)]


def _openai(row: Mapping[str, Any]) -> list[_Talk]:
    turns = _one_call_each([_plain_call(turn, index) for index, turn in enumerate(_list(row, "messages"))])
    tools = _tools(row.get("tools") or row.get("functions"))
    learned = _flags(len(tools), [_is_learned(turn, index) for index, turn in enumerate(turns)])
    return [_Talk(tools + from_openai(turns), learned)]


def _plain_call(turn: Any, index: int) -> Any:
    """The turn with OpenAI's older function_call and role "function" in their newer form."""
    if not isinstance(turn, Mapping):
        return turn
    unread = [name for name in ("refusal", "audio") if turn.get(name)]
    if unread:
        raise ValueError(f"message {index} has {unread[0]}, which is not read; give content or tool_calls")
    if turn.get("function_call"):
        return dict(turn, tool_calls=[{"function": turn["function_call"]}])
    return dict(turn, role="tool") if turn.get("role") == "function" else turn


def _one_call_each(turns: Sequence[Any]) -> list[Any]:
    """The turns with parallel calls one after the other, each followed by its result: a turn of ours holds one call."""
    found, index = [], 0
    while index < len(turns):
        turn = turns[index]
        calls = (turn.get("tool_calls") or []) if isinstance(turn, Mapping) else []
        index += 1
        if len(calls) < 2:
            found.append(turn)
            continue
        results = turns[index : index + len(calls)]
        by_id = {result.get("tool_call_id"): result for result in results if result.get("role") == "tool"}
        names = [call.get("id") for call in calls]
        if None in names or set(by_id) != set(names):
            raise ValueError(
                f"message {index - 1} has {len(calls)} tool_calls, and the messages behind it are not their results by "
                "tool_call_id; give each call its result, or its own turn"
            )
        for number, call in enumerate(calls):
            content = turn.get("content") if number == 0 else ""
            found += [dict(turn, content=content, tool_calls=[call]), by_id[call["id"]]]
        index += len(calls)
    return found


def _sharegpt(row: Mapping[str, Any]) -> list[_Talk]:
    opening, turns = _opening(row), _list(row, "conversations")
    learned = _flags(len(opening), [_is_learned(turn, index) for index, turn in enumerate(turns)])
    return [_Talk(opening + [_sharegpt_turn(turn) for turn in turns], learned)]


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


def _xtuner(row: Mapping[str, Any]) -> list[_Talk]:
    messages: list[Message] = []
    learned: list[bool] = []
    for turn in _list(row, "conversation"):
        said = [("system", turn.get("system") or ""), ("user", turn.get("input") or "")]
        said = [Message(role, _text(text, role)) for role, text in said if text]
        messages += [*said, Message("assistant", _text(turn["output"], "output"))]
        learned += [*(True for _ in said), bool(turn.get("output_with_loss", True))]
    return [_Talk(messages, _flags(0, learned))]


def _oasst(row: Mapping[str, Any]) -> list[_Talk]:
    before, *pieces = _TURN.split(_text(row["text"], "text").strip())
    if before:
        raise ValueError(
            f"the text begins with {before[:40]!r}, not with '### Human:', '### Assistant:' or '### System:'"
        )
    roles = {"Human": "user", "Assistant": "assistant", "System": "system"}
    return [_Talk([Message(roles[who], text.strip()) for who, text in zip(pieces[::2], pieces[1::2], strict=True)])]


def _paths(row: Mapping[str, Any], read: Callable[[Mapping[str, Any]], list[trees.Path]]) -> list[_Talk]:
    return [_Talk(path.messages, path.learned) for path in read(row)]


def _completion(row: Mapping[str, Any]) -> list[_Talk]:
    asked, answered = ("prompt", "completion") if "prompt" in row else ("question", "answer")
    if isinstance(row[asked], list) and isinstance(row[answered], list):
        before, after = from_openai(row[asked]), from_openai(row[answered])
        tools = _tools(row.get("tools"))
        return [_Talk(tools + before + after, _flags(len(tools), [False] * len(before) + [True] * len(after)))]
    return [_Talk([Message("user", _text(row[asked], asked)), Message("assistant", _text(row[answered], answered))])]


def _tools(tools: Any) -> list[Message]:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return []
    return [tools_message([tool.get("function", tool) for tool in tools])]


# --- preference pairs ------------------------------------------------------------------------------------------------


def _preference(found: Row) -> Preference:
    row = found.value
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = row.get("conversations", row.get("messages", row.get("prompt")))
    if isinstance(prompt, str) and _is_dialogue(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        # The answers are what follows the open turn.
        prompt = _dialogue(prompt)[:-1]
        chosen, rejected = (text.strip() if isinstance(text, str) else text for text in (chosen, rejected))
    elif not prompt and (_is_dialogue(chosen) or _is_dialogue(rejected)):
        chosen, rejected = _dialogue(_text(chosen, "chosen")), _dialogue(_text(rejected, "rejected"))
    if prompt:
        before = [Message("user", prompt)] if isinstance(prompt, str) else [_sharegpt_turn(turn) for turn in prompt]
        before = [*_opening(row), *before]
    elif "instruction" in row:
        before = _question(row)
    else:
        before = [*_opening(row), *_shared_beginning(chosen, rejected)]
    if not before:
        raise ValueError("it has no prompt")
    return Preference(before, _answer(chosen, "chosen"), _answer(rejected, "rejected"), found.place)


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def _dialogue(text: str) -> list[dict[str, str]]:
    """The turns of a text in hh-rlhf's form: an empty line and the speaker's name before each."""
    _, *pieces = _SPEAKER.split(f"\n\n{text.strip()}")
    if pieces[:1] != ["Human"]:
        raise ValueError(f"a text begins with {text.strip()[:40]!r}, not with 'Human:' as the other one does")
    return [{"from": who.lower(), "value": said.strip()} for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _shared_beginning(chosen: Any, rejected: Any) -> list[Message]:
    """The turns before the last one of two whole conversations, which must agree."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        return []
    first, second = ([_sharegpt_turn(turn) for turn in turns[:-1]] for turns in (chosen, rejected))
    if first != second:
        raise ValueError("it has no prompt, and chosen and rejected differ before their last turns")
    return first


def _answer(value: Any, name: str) -> Message:
    if isinstance(value, str):
        return Message("assistant", value)
    if not value:
        raise ValueError(f"{name} is empty")
    answer = _sharegpt_turn(value if isinstance(value, Mapping) else value[-1])
    if answer.role != "assistant":
        raise ValueError(f"{name} ends with a turn of the {answer.role}, wanted the assistant's")
    return answer


_READERS: dict[str, Callable[[Mapping[str, Any]], list[_Talk]]] = {
    "alpaca": _alpaca,
    "openai": _openai,
    "sharegpt": _sharegpt,
    "xtuner": _xtuner,
    "oasst": _oasst,
    "oasst_tree": lambda row: _paths(row, trees.every_path),
    "oasst_best": lambda row: _paths(row, trees.best_path),
    "completion": _completion,
    "moss": lambda row: [_Talk(moss.messages_of(row))],
}

_READ: dict[str, frozenset[str]] = {
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "openai": frozenset({"messages", "tools", "functions"}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "xtuner": frozenset({"conversation"}),
    "oasst": frozenset({"text"}),
    "oasst_tree": frozenset({"prompt", "message_id", "parent_id", "text", "role", "rank", "deleted", "review_result"}),
    "oasst_best": frozenset({"prompt", "message_id", "parent_id", "text", "role", "rank", "deleted", "review_result"}),
    "completion": frozenset({"prompt", "completion", "question", "answer", "tools"}),
    "moss": frozenset({"chat", "plain_text", "meta_instruction", "prefix"}),
    "preference": frozenset(
        {"conversations", "messages", "prompt", "instruction", "input", "history", "system", "tools"}
        | {"chosen", "rejected"}
    ),
    "text": frozenset({"text"}),
}
