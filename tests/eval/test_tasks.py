"""Tasks from library facts and from files: what is asked, that it is deterministic, and what is refused."""

import inspect
import json
import math

import pytest

from eval.run import check
from eval.task import first_line
from eval.tasks import files, library
from eval.tasks.library import Fact, first_call, identifier, same_call


def make_facts():
    """Public functions of some standard modules, as the running interpreter documents them."""
    import calendar
    import os.path
    import shutil
    import statistics
    import textwrap

    facts = []
    for module in (math, shutil, textwrap, statistics, os.path, calendar, inspect):
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value) or isinstance(value, type):
                continue
            summary = (inspect.getdoc(value) or "").partition("\n")[0]
            try:
                signature = str(inspect.signature(value))
            except ValueError:
                continue
            facts.append(Fact(module.__name__, name, signature, summary))
    return facts


FACTS = make_facts()
BUILDERS = (library.module_of, library.summary_of, library.name_of)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_builders_are_deterministic_in_the_seed_alone(build):
    task = build(FACTS, num_items=40, seed=1)
    assert task == build(FACTS[::-1], num_items=40, seed=1)
    assert task.items != build(FACTS, num_items=40, seed=2).items
    assert len(task.items) == 40
    check(task)


def test_module_of_asks_for_the_import():
    task = library.module_of(FACTS, num_items=1000, seed=0)
    homes = {}
    for fact in FACTS:
        homes.setdefault(fact.name, set()).add(fact.module)
    assert len(task.items) == sum(len(modules) == 1 for modules in homes.values())
    item = next(item for item in task.items if item.id == "module_of/math.gcd")
    assert item.context == "from" and item.choices[item.answer] == " math import gcd\n"
    for item in task.items:
        assert len(set(item.choices)) == 4
        # The same name in every choice: only the module tells them apart.
        assert len({choice.split(" import ")[1] for choice in item.choices}) == 1


def test_summary_of_has_distractors_of_like_length():
    task = library.summary_of(FACTS, num_items=1000, seed=0)
    item = next(item for item in task.items if item.id == "summary_of/textwrap.dedent")
    assert item.context == 'def dedent(text):\n    """'
    assert item.choices[item.answer].startswith("Remove any common leading whitespace")
    longest = sum(item.answer == max(range(4), key=lambda n: len(item.choices[n])) for item in task.items)
    assert longest / len(task.items) < 0.4  # taking the longest does not pay
    assert all(len(set(item.choices)) == 4 for item in task.items)


def test_name_of_shows_the_module_and_wants_the_name():
    task = library.name_of(FACTS, num_items=1000, seed=0)
    item = next(item for item in task.items if item.answer == "factorial")
    assert item.prompt.startswith("# ") and item.prompt.endswith("\nmath.")
    assert task.judge(task.extract("factorial(5)\n"), item.answer) == 1.0
    assert task.judge(task.extract("factorials"), item.answer) == 0.0


def test_too_few_facts_are_refused():
    with pytest.raises(ValueError, match="given 1 modules; wanted at least 4"):
        library.module_of([fact for fact in FACTS if fact.module == "math"], num_items=4, seed=0)
    with pytest.raises(ValueError, match="summary"):
        library.summary_of(FACTS[:2], num_items=4, seed=0)


def test_problems_are_true_different_and_held_out():
    train = library.problems(num_items=800, seed=0)
    held_out = library.problems(num_items=200, seed=1, exclude=train)
    calls = [problem.call for problem in (*train, *held_out)]
    assert len(set(calls)) == 1000
    assert {problem.function for problem in train} == {row[1] for row in library.ARITHMETIC}
    for problem in (*train, *held_out):
        assert str(eval(problem.call, {"math": math})) == problem.value
    mirrored = [(a.call, b.call) for a in train for b in held_out if library.same_call(a.call, b.call)]
    assert not mirrored  # gcd(a, b) is no new question to who learned gcd(b, a)
    choose = next(problem for problem in train if problem.function == "math.comb")
    assert choose.question == "How many ways are there to choose {1} out of {0}?".format(*choose.arguments)
    with pytest.raises(ValueError, match="at most 100000"):
        library.problems(num_items=100_001, seed=0)


def test_sessions_and_calls_are_sound_tasks():
    asked = library.problems(num_items=50, seed=0)
    for build in (library.interpreter_session, library.call_for):
        check(build(asked))
    item = library.interpreter_session(asked).items[0]
    assert item.prompt.endswith(f">>> {asked[0].call}\n") and item.answer == asked[0].value
    assert first_line("\n 6\n>>> next") == "6" and first_line(" \n") is None


@pytest.mark.parametrize(
    "text, found",
    [
        ("I'd run math.gcd(12, 18) for that.", "math.gcd(12, 18)"),
        ("```python\nprint(max(3, -4, 5))\n```", "max(3, -4, 5)"),
        ("math.factorial( 5 )", "math.factorial( 5 )"),
        ("math.gcd(a, b)", None),
        ("gcd 12 18", None),
        ("", None),
    ],
)
def test_the_first_call_with_numbers_is_found(text, found):
    assert first_call(text) == found


@pytest.mark.parametrize(
    "given, wanted, value",
    [
        ("math.gcd(18, 12)", "math.gcd(12, 18)", 1.0),
        ("math.gcd( 12,18 )", "math.gcd(12, 18)", 1.0),
        ("math.lcm(12, 18)", "math.gcd(12, 18)", 0.0),
        ("math.gcd(12, 18, 6)", "math.gcd(12, 18)", 0.0),
        ("math.comb(3, 8)", "math.comb(8, 3)", 0.0),
        ("pow(2, 3)", "pow(2, 3)", 1.0),
        ("max(1, -2, 3)", "max(1, 2, 3)", 0.0),
    ],
)
def test_calls_are_equal_up_to_an_order_that_does_not_matter(given, wanted, value):
    assert same_call(given, wanted) == value


def test_identifiers():
    assert identifier(" gcd(") == "gcd" and identifier("_x1 y") == "_x1"
    assert identifier("1x") is None and identifier("") is None


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_files_of_choices(tmp_path):
    options = ["Paris", "Rome", "C"]
    task = files.choices(
        write(
            tmp_path / "exam.jsonl",
            [
                {"question": "Capital of France? ", "choices": options, "answer": answer}
                for answer in (1, "a", "Rome", "C")
            ],
        )
    )
    assert task.name == "exam"
    assert [item.answer for item in task.items] == [1, 0, 1, 2]
    assert task.items[0].context == "Capital of France?" and task.items[0].choices == (" Paris", " Rome", " C")


def test_files_of_questions_and_texts(tmp_path):
    task = files.questions(write(tmp_path / "facts.jsonl", [{"question": "2 + 2 =", "answer": "4"}, ""]))
    assert [(item.prompt, item.answer) for item in task.items] == [("2 + 2 =", "4")]
    check(task)
    (tmp_path / "a.txt").write_text("abc")
    assert [item.text for item in files.text([tmp_path / "a.txt"]).items] == ["abc"]


@pytest.mark.parametrize(
    "row, wanted",
    [
        ("{not json", "exam.jsonl:1: not valid JSON"),
        ("[1]", "exam.jsonl:1: .*one JSON object"),
        ({"choices": ["a", "b"], "answer": 0}, 'exam.jsonl:1: given "question": None'),
        ({"question": "q", "choices": ["a"], "answer": 0}, "at least two"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "0 to 1, A to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "0 to 1"),
        ({"question": "q", "choices": ["a", "b"]}, 'given "answer": None'),
        ({"question": "q", "choices": ["x", "x"], "answer": "x"}, "text of a choice"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row, wanted, tmp_path):
    with pytest.raises(ValueError, match=wanted):
        files.choices(write(tmp_path / "exam.jsonl", [row]))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        files.text([tmp_path / "absent.txt"])
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        files.text([tmp_path / "latin.txt"])
    with pytest.raises(ValueError, match="no items"):
        files.choices(write(tmp_path / "empty.jsonl", []))
