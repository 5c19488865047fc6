"""Runs tasks on a model: scores with counts and intervals, a log of every sample, and no score from partial answers."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.metrics import Interval, bits_per_byte, bootstrap_mean, bootstrap_ratio, wilson
from eval.model import Completion, EvalModel, Score
from eval.significance import McNemar, mcnemar, paired_bootstrap
from eval.task import ChoiceTask, GenerateTask, Task, TextTask, fingerprint


class Result(NamedTuple):
    """One task's score and what stands beside it."""

    task: str
    version: int
    fingerprint: str
    metric: str
    interval: Interval
    num_items: int
    num_cut: int
    """Items whose prompt lost its beginning because it did not fit."""
    num_capped: int
    """Completions that ended at the token limit."""
    num_unparsed: int
    """Completions in which no answer was found; they count as wrong."""
    chance: float | None
    """What guessing gives; None where that has no meaning."""
    records: tuple[dict[str, Any], ...]
    """One per item, in order: `id`, `value` (what the metric averages) and what the model said."""


def evaluate(
    model: EvalModel, tasks: Sequence[Task], *, log_folder: str | os.PathLike | None = None
) -> tuple[Result, ...]:
    """Returns one result per task. With `log_folder`, writes every sample to TASK.jsonl in it and all to results.json.

    Every task is first checked on its own gold answers (see `check`). Raises ValueError for a task that fails this, and
    for a model that leaves items unanswered or gives numbers that are not finite: there are no partial scores.
    """
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"given the task names {twice} more than once; every task needs its own")
    for task in tasks:
        check(task)
    results = []
    for task in tasks:
        result = _run(model, task)
        results.append(result)
        if log_folder is not None:
            _write(Path(log_folder) / f"{task.name}.jsonl", "".join(map(_line, result.records)))
    if log_folder is not None:
        summary = [result._asdict() | {"interval": result.interval._asdict()} for result in results]
        for entry in summary:
            del entry["records"]  # they stand in the tasks' own files
        _write(Path(log_folder) / "results.json", json.dumps(summary, indent=2) + "\n")
    return tuple(results)


def check(task: Task) -> None:
    """Raises ValueError unless a perfect model gets 100 % of the task and one that says nothing gets about chance.

    A choice task is asked of a model that prefers the right continuation (must be all right), and of one to which all
    are equal, so that it takes the first: its share must be compatible with chance (99.9 % interval), else the place of
    an answer gives it away. A generated task is given its gold texts (all right) and empty ones (none right).
    """
    if isinstance(task, ChoiceTask):
        gold = {(item.context, item.choices[item.answer]) for item in task.items}
        right = _run(EvalModel(lambda pairs: [Score(_gold_score(pair, gold), 1, True) for pair in pairs], _mute), task)
        if missed := [record["id"] for record in right.records if not record["value"]]:
            raise ValueError(
                f"task {task.name!r}: items {missed[:5]} are missed by a model that prefers the right continuation; "
                "give every item one right continuation, and a rank that grows with the log-probability"
            )
        num_first = sum(item.answer == 0 for item in task.items)
        interval = wilson(num_first, len(task.items), confidence=0.999)
        chance = _chance(task)
        if not interval.low <= chance <= interval.high:
            raise ValueError(
                f"task {task.name!r}: the first choice is right in {num_first} of {len(task.items)} items, chance is "
                f"{chance:.2f}; shuffle the choices, or the place of an answer gives it away"
            )
    elif isinstance(task, GenerateTask):
        for item in task.items:
            gold = task.extract(item.answer if item.gold is None else item.gold)
            empty = task.extract("")
            if gold is None or task.judge(gold, item.answer) != 1.0:
                raise ValueError(
                    f"task {task.name!r}, item {item.id!r}: its own gold text does not count as right (extracted "
                    f"{gold!r}, wanted {item.answer!r}); mend extract, judge or the item's gold"
                )
            if empty is not None and task.judge(empty, item.answer) != 0.0:
                raise ValueError(
                    f"task {task.name!r}, item {item.id!r}: an empty text counts as right (answer {item.answer!r})"
                )


class Comparison(NamedTuple):
    """Second minus first on the same items, and the exact test where items are right or wrong."""

    difference: Interval
    test: McNemar | None


def compare(first: Result, second: Result) -> Comparison:
    """Returns the paired difference of two results of the same task; raises ValueError if the tasks differ."""
    if first.fingerprint != second.fingerprint:
        raise ValueError(
            f"given {first.task!r} ({first.fingerprint[:12]}) and {second.task!r} ({second.fingerprint[:12]}); wanted "
            "results of one and the same task: run both models on equal items and rules"
        )
    pair = [[record["value"] for record in result.records] for result in (first, second)]
    exact = mcnemar(*pair) if all(value in (0.0, 1.0) for values in pair for value in values) else None
    return Comparison(paired_bootstrap(*pair), exact)


def _run(model: EvalModel, task: Task) -> Result:
    if isinstance(task, ChoiceTask):
        return _run_choice(model, task)
    if isinstance(task, GenerateTask):
        return _run_generate(model, task)
    return _run_text(model, task)


def _run_choice(model: EvalModel, task: ChoiceTask) -> Result:
    pairs = [(item.context, choice) for item in task.items for choice in item.choices]
    owners = [item.id for item in task.items for _ in item.choices]
    scores = iter(_complete(task, owners, model.loglikelihood(pairs)))
    records, num_cut = [], 0
    for item in task.items:
        given = [next(scores) for _ in item.choices]
        ranks = [task.rank(score, choice) for score, choice in zip(given, item.choices)]
        chosen = ranks.index(max(ranks))
        num_cut += any(score.is_cut for score in given)
        logprobs = [score.logprob for score in given]
        records.append(
            {"id": item.id, "value": float(chosen == item.answer), "chosen": chosen, "answer": item.answer}
            | {"context": item.context, "choices": item.choices, "logprobs": logprobs}
        )
    return _result(task, "accuracy", records, num_cut=num_cut, chance=_chance(task))


def _run_generate(model: EvalModel, task: GenerateTask) -> Result:
    prompts = [item.prompt for item in task.items]
    given = model.generate(prompts, max_new_tokens=task.max_new_tokens, stop=task.stop)
    completions: list[Completion] = _complete(task, [item.id for item in task.items], given)
    records = []
    for item, completion in zip(task.items, completions):
        extracted = task.extract(completion.text)
        value = 0.0 if extracted is None else float(task.judge(extracted, item.answer))
        records.append(
            {"id": item.id, "value": value, "prompt": item.prompt, "completion": completion.text}
            | {"extracted": extracted, "answer": item.answer, "is_capped": completion.is_capped}
        )
    return _result(
        task,
        "share right",
        records,
        num_cut=sum(completion.is_cut for completion in completions),
        num_capped=sum(completion.is_capped for completion in completions),
        num_unparsed=sum(record["extracted"] is None for record in records),
        chance=0.0,
    )


def _run_text(model: EvalModel, task: TextTask) -> Result:
    scores = model.loglikelihood([("", item.text) for item in task.items])
    scores = _complete(task, [item.id for item in task.items], scores)
    records = []
    for item, score in zip(task.items, scores):
        num_bytes = len(item.text.encode())
        records.append(
            {"id": item.id, "value": bits_per_byte(score.logprob, item.text), "logprob": score.logprob}
            | {"num_tokens": score.num_tokens, "num_bytes": num_bytes}
        )
    return _result(task, "bits per byte", records, num_cut=0, chance=None)


def _result(
    task: Task,
    metric: str,
    records: list[dict],
    *,
    num_cut: int,
    chance: float | None,
    num_capped: int = 0,
    num_unparsed: int = 0,
) -> Result:
    values = [record["value"] for record in records]
    if isinstance(task, TextTask):
        num_bytes = [record["num_bytes"] for record in records]
        interval = bootstrap_ratio([v * n for v, n in zip(values, num_bytes)], num_bytes)
    elif set(values) <= {0.0, 1.0}:
        interval = wilson(sum(values), len(values))
    else:
        interval = bootstrap_mean(values)
    return Result(
        task=task.name,
        version=task.version,
        fingerprint=fingerprint(task),
        metric=metric,
        interval=interval,
        num_items=len(records),
        num_cut=num_cut,
        num_capped=num_capped,
        num_unparsed=num_unparsed,
        chance=chance,
        records=tuple(records),
    )


def _complete(task: Task, ids: Sequence[str], given: Sequence) -> list:
    """Returns `given` if it answers every request with finite numbers, else raises with the ids that are missing."""
    if len(given) != len(ids):
        raise ValueError(
            f"task {task.name!r}: the model answered {len(given)} of {len(ids)} requests (from item "
            f"{ids[min(len(given), len(ids) - 1)]!r} on); a score wants all of them: run again"
        )
    missing = {i for i, answer in zip(ids, given) if answer is None}
    missing |= {i for i, answer in zip(ids, given) if isinstance(answer, Score) and not math.isfinite(answer.logprob)}
    if missing:
        raise ValueError(
            f"task {task.name!r}: no answer, or none that is finite, for {len(missing)} items: {sorted(missing)[:10]}; "
            "a score wants all of them: check the model and run again"
        )
    return list(given)


def _chance(task: ChoiceTask) -> float:
    return sum(1 / len(item.choices) for item in task.items) / len(task.items)


def _gold_score(pair: tuple[str, str], gold: set[tuple[str, str]]) -> float:
    return -1e-6 if pair in gold else -1e3


def _mute(prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = ()) -> list[Completion]:
    return [Completion("") for _ in prompts]


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    """Writes by atomic rename: a reader never sees half of a log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
