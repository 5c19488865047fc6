"""Tasks from your own files: multiple choice and questions as JSONL, texts for bits per byte."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.task import ChoiceItem, ChoiceTask, GenerateItem, GenerateTask, TextItem, TextTask


def choices(path: str | os.PathLike) -> ChoiceTask:
    """Returns the task of a JSONL file with rows {"question", "choices": [...], "answer"}.

    `answer` is the index of the right choice (from 0), its letter, or its text. A choice follows the question after one
    space.
    """
    items = []
    for place, row in _rows(path):
        _want_text(row, "question", place)
        options = row.get("choices")
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
            raise ValueError(f'{place}: given "choices": {options!r:.80}; wanted a list of at least two texts')
        answer = _index(row.get("answer"), options, place)
        items.append(ChoiceItem(place, row["question"].rstrip(), tuple(f" {o.strip()}" for o in options), answer))
    return ChoiceTask(Path(path).stem, 1, tuple(items))


def questions(path: str | os.PathLike, *, max_new_tokens: int = 64) -> GenerateTask:
    """Returns the task of a JSONL file with rows {"question", "answer"}: the first line written is to be the answer."""
    items = []
    for place, row in _rows(path):
        _want_text(row, "question", place)
        _want_text(row, "answer", place)
        items.append(GenerateItem(place, row["question"], row["answer"]))
    return GenerateTask(Path(path).stem, 1, tuple(items), max_new_tokens=max_new_tokens, stop=())


def text(paths: Sequence[str | os.PathLike], *, name: str = "text") -> TextTask:
    """Returns the bits-per-byte task of UTF-8 text files, one document each."""
    return TextTask(name, 1, tuple(TextItem(str(path), _read(path)) for path in paths))


def _index(answer: Any, options: Sequence[str], place: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str) and options.count(answer) == 1:
        return options.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and 0 <= ord(answer.upper()) - ord("A") < len(options):
        return ord(answer.upper()) - ord("A")
    last = chr(ord("A") + len(options) - 1)
    raise ValueError(
        f'{place}: given "answer": {answer!r:.80}; wanted 0 to {len(options) - 1}, A to {last}, or the text of a choice'
    )


def _rows(path: str | os.PathLike) -> list[tuple[str, dict]]:
    rows = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not valid JSON ({error}); every line is one JSON object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}: given {line[:60]!r}; every line is one JSON object")
        rows.append((place, row))
    return rows


def _want_text(row: dict, key: str, place: str) -> None:
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise ValueError(f'{place}: given "{key}": {row.get(key)!r:.80}; wanted a text that is not empty')


def _read(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}; give a file that can be read") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error
