"""OpenAssistant's message trees -> conversations: every path from the first question to an answer, or the best one.

A tree is one row ({"message_tree_id", "prompt": {"text", "role", "replies": [...]}}) or one row per message
({"message_id", "parent_id", "text", "role"}, as the data set oasst1 has them). Messages that were deleted or failed
their review are left out with everything below them.

every path  Each leaf gives one conversation, cut behind its last answer. An answer that several paths share is learned
            in the first of them alone: read in the others, it is not counted twice.
best path   At every message the reply of the lowest rank (0 is best; without ranks the first): one conversation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from data_pipelines.readers import Row
from internjax.text.message import Message

_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}


class Path(NamedTuple):
    """Messages from the first one of a tree on, and whether each is learned here."""

    messages: list[Message]
    learned: tuple[bool, ...]


def is_message(row: Mapping[str, Any]) -> bool:
    """Returns whether a row is one message of a tree."""
    return all(name in row for name in ("message_id", "parent_id", "text", "role"))


def gathered(rows: Iterable[Row], *, bad: Callable[[str], None]) -> Iterator[Row]:
    """Yields rows that each hold a whole tree: those that do, and those put together from single messages."""
    roots: list[tuple[str, dict[str, Any]]] = []
    messages: dict[str, tuple[str, dict[str, Any]]] = {}
    for row in rows:
        if not is_message(row.value):
            yield row
            continue
        message = dict(row.value, replies=[])
        messages[message["message_id"]] = (row.place, message)
        if message["parent_id"] is None:
            roots.append((row.place, message))
    for place, message in messages.values():
        if message["parent_id"] is None:
            continue
        if message["parent_id"] in messages:
            messages[message["parent_id"]][1]["replies"].append(message)
        else:
            bad(f"{place}: the parent_id {message['parent_id']!r} is no message of the data; give whole trees")
    for place, root in roots:
        yield Row(place, {"prompt": root})


def every_path(row: Mapping[str, Any]) -> list[Path]:
    """Returns the conversations of a tree, one for each of its ends."""
    # By the identities of their messages; what lies inside another path has nothing of its own to learn.
    ends = {tuple(map(id, nodes)): nodes for nodes in map(_until_answer, _walk(row["prompt"])) if nodes}
    inside = {name[:length] for name in ends for length in range(len(name))}
    paths, seen = [], set()
    for name, nodes in ends.items():
        if name not in inside:
            paths.append(Path(_messages(nodes), tuple(node not in seen for node in name)))
            seen.update(name)
    return paths


def best_path(row: Mapping[str, Any]) -> list[Path]:
    """Returns the conversation of a tree's best-ranked replies."""
    nodes = [row["prompt"]] if _stays(row["prompt"]) else []
    while nodes and (replies := _replies(nodes[-1])):
        nodes.append(min(replies, key=_rank))
    nodes = _until_answer(nodes)
    return [Path(_messages(nodes), (True,) * len(nodes))] if nodes else []


def _walk(root: Mapping[str, Any]) -> Iterator[list[Mapping[str, Any]]]:
    """Yields root-to-leaf lists of messages, the best-ranked replies first."""
    waiting = [[root]] if _stays(root) else []
    while waiting:
        nodes = waiting.pop()
        replies = sorted(_replies(nodes[-1]), key=_rank)
        waiting += [[*nodes, reply] for reply in reversed(replies)]
        if not replies:
            yield nodes


def _replies(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [reply for reply in node.get("replies") or [] if _stays(reply)]


def _stays(node: Mapping[str, Any]) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _rank(node: Mapping[str, Any]) -> float:
    return float("inf") if node.get("rank") is None else node["rank"]


def _role(node: Mapping[str, Any]) -> str:
    if node["role"] not in _ROLES:
        raise ValueError(f"a message has the role {node['role']!r}; known: {', '.join(_ROLES)}")
    return _ROLES[node["role"]]


def _until_answer(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    ends = [index + 1 for index, node in enumerate(nodes) if _role(node) == "assistant"]
    return list(nodes[: ends[-1]]) if ends else []


def _messages(nodes: Sequence[Mapping[str, Any]]) -> list[Message]:
    return [Message(_role(node), node["text"]) for node in nodes]
