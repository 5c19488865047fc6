"""What a task is: items and functions, as values.

A `ChoiceTask` ranks given continuations by log-likelihood, a `GenerateTask` scores what the model writes, a `TextTask`
measures bits per byte of whole documents. Functions are fields; nothing is looked up by name.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.metrics import exact_match
from eval.model import Score


@dataclass(frozen=True)
class ChoiceItem:
    """A context, its continuations as they follow it to the letter, and the index of the right one."""

    id: str
    context: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if not (len(self.choices) >= 2 and 0 <= self.answer < len(self.choices) and all(self.choices)):
            raise ValueError(
                f"item {self.id!r}: given answer {self.answer} among {len(self.choices)} choices; wanted at least two "
                "choices, none empty, and the index (from 0) of the right one"
            )


@dataclass(frozen=True)
class GenerateItem:
    """A prompt, the right answer, and a text that a perfect model could write (the answer itself if not given)."""

    id: str
    prompt: str
    answer: str
    gold: str | None = None


@dataclass(frozen=True)
class TextItem:
    """One document."""

    id: str
    text: str


def total(score: Score, continuation: str) -> float:
    """Returns the log-likelihood of the whole continuation (lm-eval's `acc`)."""
    return score.logprob


def per_byte(score: Score, continuation: str) -> float:
    """Returns the log-likelihood per UTF-8 byte, which does not favour short continuations (lm-eval's `acc_norm`)."""
    return score.logprob / len(continuation.encode())


def per_token(score: Score, continuation: str) -> float:
    """Returns the log-likelihood per token."""
    return score.logprob / score.num_tokens


def first_line(text: str) -> str | None:
    """Returns the first line that is not blank, or None where there is none."""
    return next((line.strip() for line in text.splitlines() if line.strip()), None)


@dataclass(frozen=True)
class ChoiceTask:
    """The continuation with the highest `rank` is the model's choice; ties go to the first. Metric: accuracy."""

    name: str
    version: int
    items: tuple[ChoiceItem, ...]
    rank: Callable[[Score, str], float] = per_byte

    def __post_init__(self):
        _check_items(self.name, self.items)


@dataclass(frozen=True)
class GenerateTask:
    """`extract` finds the answer in a greedy completion (None: there is none), `judge` compares it with the item's."""

    name: str
    version: int
    items: tuple[GenerateItem, ...]
    extract: Callable[[str], str | None] = first_line
    judge: Callable[[str, str], float] = exact_match
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self):
        _check_items(self.name, self.items)


@dataclass(frozen=True)
class TextTask:
    """Bits per byte of documents, long ones in rolling windows. Metric: total bits over total bytes."""

    name: str
    version: int
    items: tuple[TextItem, ...]

    def __post_init__(self):
        _check_items(self.name, self.items)
        if empty := [item.id for item in self.items if not item.text]:
            raise ValueError(f"task {self.name!r}: given empty documents {empty[:5]}; leave them out")


Task = ChoiceTask | GenerateTask | TextTask


def fingerprint(task: Task) -> str:
    """Returns a sha256 over everything a model sees and is judged by: results are comparable if it is equal."""
    if isinstance(task, ChoiceTask):
        rule = [task.rank.__qualname__]
    elif isinstance(task, GenerateTask):
        rule = [task.extract.__qualname__, task.judge.__qualname__, task.max_new_tokens, task.stop]
    else:
        rule = []
    items = [list(vars(item).values()) for item in task.items]
    seen = json.dumps([type(task).__name__, task.name, task.version, rule, items], ensure_ascii=False)
    return hashlib.sha256(seen.encode()).hexdigest()


def _check_items(name: str, items: Sequence[ChoiceItem | GenerateItem | TextItem]) -> None:
    ids = [item.id for item in items]
    if not ids:
        raise ValueError(f"task {name!r} has no items; a score needs at least one")
    if twice := sorted({i for i in ids if ids.count(i) > 1} if len(set(ids)) < len(ids) else ()):
        raise ValueError(f"task {name!r}: given the ids {twice[:5]} more than once; every item needs its own")
