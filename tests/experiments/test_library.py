"""What the tiny chain asks about the library: tasks, gold, preferences, the interpreter protocol, and the baselines."""

import lzma
import zlib

import numpy as np
import pytest

from data_pipelines.document import make_document
from data_pipelines.embedded import library_facts, stdlib_modules
from eval.tasks.library import Problem, problems
from experiments import library, measure
from experiments.library import BodyTask, Completion, answers, condition_of, copies_prompt, gold, preference
from internjax import sandbox
from internjax.text.chat import Message, ToolCall

SOURCE = '''
"""A module."""

def area(width, *sides, height=1, **more):
    """Area of a rectangle."""
    # widths first
    if width < 0:
        raise ValueError("negative")
    return width * height

def one_line(x): "Says x."; return x

def only_docstring(x):
    """Nothing follows."""

async def waits(x):
    """Waits."""
    return await x

def long(x):
    """Long."""
    return x + %s

class Box:
    """A box."""

    def size(self, /, unit, *, exact=False):
        """Size in a unit."""
        return (self, unit)
''' % " + ".join(["x"] * 60)  # noqa: UP031


@pytest.fixture(scope="module")
def facts():
    document = make_document(SOURCE, source="stdlib", path="stdlib/shapes.py", domain="code", language="python")
    return library_facts([document])


def test_body_tasks_are_functions_with_a_short_body_behind_their_docstring(facts):
    assert {fact.name for fact in facts} >= {"shapes.only_docstring", "shapes.long", "shapes.waits", "shapes.Box.size"}
    area, size = library.body_tasks(facts)
    assert area.prompt == 'def area(width, *sides, height=1, **more):\n    """Area of a rectangle."""'
    assert area.body == 'if width < 0:\n    raise ValueError("negative")\nreturn width * height'
    assert area.arguments == ("width", "height") and (area.name, area.path) == ("shapes.area", "stdlib/shapes.py")
    assert size.body == "return (self, unit)" and size.arguments == ("self", "unit", "exact")
    assert library.body_tasks(facts, max_chars=30) == [size]
    assert library.body_tasks(facts, max_prompt_chars=60) == []
    (chat, _) = library.body_chats([area, size])
    assert chat == [Message("user", f"Write the body.\n{area.prompt}"), Message("assistant", area.body)]


def test_descriptions_go_both_ways(facts):
    asked, answered = library.description_chats(facts)[:2]
    call = "area(width, *sides, height=1, **more)"
    assert asked == [
        Message("user", f"What does `{call}` of shapes do?"),
        Message("assistant", "Area of a rectangle."),
    ]
    assert answered == [
        Message("user", "Which call of shapes fits: Area of a rectangle."),
        Message("assistant", call),
    ]
    assert len(library.description_chats(facts)) == 2 * len(facts)
    waits = next(fact for fact in facts if fact.name == "shapes.waits")
    assert library.description_chats([waits])[1][1].content == "waits(x)"


# --- gold ------------------------------------------------------------------------------------------------------------

TASK = BodyTask(
    'def area(width, height):\n    """Area of a rectangle."""', "", ("width", "height"), "area", "shapes.py"
)
GOLD = {
    "the body": ("return width * height", True),
    "several lines": ("if width < 0:\n    raise ValueError\nreturn width * height", True),
    "an indented body": ("    x = width\n    return x * height", True),
    "a docstring, then work": ('"""Area."""\nreturn width', True),
    "pass, then work": ("pass\nreturn width", True),
    "a generator": ("yield", True),
    "a call": ("print()", True),
    "nothing": ("", False),
    "spaces": (" \n ", False),
    "a comment": ("# return width", False),
    "pass": ("pass", False),
    "pass twice and a comment": ("pass\n# so\npass", False),
    "an ellipsis": ("...", False),
    "a number": ("42", False),
    "a text": ('"""Area of it."""', False),
    "a constant expression": ("-1", False),
    "a tuple of constants": ("(1, [2], {3: 4})", False),
    "no Python": ("return width *", False),
    "prose": ("The area is the product.", False),
    "indentation that is none": ("x = 1\n    y = 2", False),
    "a null byte": ("x = 1\0", False),
    "the prompt": (TASK.prompt, False),
    "a part of the prompt": ("area(width, height)", False),
    "a line of the prompt among others": ('x = width\n"""Area of a rectangle."""\nreturn x', False),
}


@pytest.mark.parametrize("name", GOLD)
def test_gold_clause_by_clause(name):
    text, good = GOLD[name]
    assert gold(Completion(text, ended=True), TASK) == good
    assert not gold(Completion(text, ended=False), TASK), "what did not end does not count"


def test_copies():
    assert copies_prompt("x = 1\ndef area(width, height):\n    pass", TASK.prompt)
    assert not copies_prompt("return (width, height)", TASK.prompt)
    assert not copies_prompt("x = 1\n)", "def f(\n    x,\n)")  # lines of three characters are no copy


def test_the_library_s_own_bodies_are_gold():
    names = {f"stdlib/{name}.py" for name in ("textwrap", "fractions", "queue", "string", "calendar", "statistics")}
    tasks = library.body_tasks(library_facts(module for module in stdlib_modules() if module.path in names))
    assert len(tasks) >= 10
    assert [task.body for task in tasks if not gold(Completion(task.body, True), task)] == []


# --- preferences -----------------------------------------------------------------------------------------------------


def order(condition, *texts, ended=True):
    liked = [preference(condition, Completion(text, ended), TASK) for text in texts]
    return sorted(range(len(texts)), key=lambda i: -liked[i]), liked


def test_working_prefers_code_that_uses_what_it_was_given():
    ranking, liked = order("working", "return width", "return 1", "pass", "return width *", "")
    assert ranking[:3] == [0, 1, 2] and liked == [2.5, 2.0, 1.0, -0.5, -0.5]
    assert preference("working", Completion("return width", False), TASK) == 1.5
    assert preference("working", Completion(TASK.prompt + "\n    return width", True), TASK) == 2.5  # notices no copy


def test_concise_prefers_the_shorter_answer_that_parses():
    ranking, _ = order("concise", "return width * height", "pass", "return width)", "return width")
    assert ranking == [1, 3, 0, 2]
    assert preference("concise", Completion("x" * 900, True), TASK) == 0.0
    for unread in ("", " ", "# a comment", "x)"):
        assert preference("concise", Completion(unread, True), TASK) == -1.5
    assert preference("concise", Completion("pass", False), TASK) < preference(
        "concise", Completion("x" * 300, True), TASK
    )


def test_conditions_and_gold_differ():
    """Each condition likes something that is not gold: divergence of proxy and gold can be seen."""
    copied, short = Completion(f"{TASK.prompt}\n    return width", True), Completion("pass", True)
    real = Completion("return width * height", True)
    assert gold(real, TASK) and not gold(copied, TASK) and not gold(short, TASK)
    assert preference("working", copied, TASK) == preference("working", real, TASK)
    assert preference("concise", short, TASK) > preference("concise", real, TASK)


def test_a_task_s_condition_is_its_own_and_both_occur():
    tasks = [TASK._replace(prompt=f"def f{n}():") for n in range(200)]
    found = [condition_of(task) for task in tasks]
    assert found == [condition_of(task) for task in tasks] and set(found) == set(library.CONDITIONS)
    assert 60 < found.count("working") < 140


# --- interpreter protocol --------------------------------------------------------------------------------------------

GCD = Problem("What is the greatest common divisor of 12 and 18?", "math.gcd", (12, 18), "6")


def test_an_interpreter_chat():
    (chat,) = library.interpreter_chats([GCD])
    assert chat == [
        Message("system", library.INTERPRETER_SYSTEM, name="interpreter"),
        Message("user", "What is math.gcd(12, 18)?"),
        Message("assistant", "", call=ToolCall("interpreter", "import math\nprint(math.gcd(12, 18))")),
        Message("environment", "6", name="interpreter"),
        Message("assistant", "math.gcd(12, 18) is 6."),
    ]
    assert library.interpreter_prompt(GCD) == chat[:2]
    assert library.interpreter_code(GCD._replace(function="max")) == "print(max(12, 18))"


def test_programs_print_their_values():
    asked = problems(num_items=40, seed=3)
    program = "\n".join(library.interpreter_code(problem) for problem in asked)
    assert sandbox.run(program).stdout.split() == [problem.value for problem in asked]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("math.gcd(12, 18) is 6.", True),
        ("It is said that this is 6", True),
        ("6", True),
        ("It is 66.", False),
        ("It is 6, or so.", False),
        ("6 is it.", False),
        ("", False),
    ],
)
def test_answers(text, right):
    assert answers(text, GCD) == right


def test_held_out_problems_are_not_learned():
    from experiments.tiny_config import Tiny
    from experiments.tiny_models import NUM_HELD_OUT_PROBLEMS, train_problems

    for seed in (0, 1):
        learned, held_out = train_problems(Tiny(seed=seed))
        assert len({problem.call for problem in held_out}) == len(held_out) == NUM_HELD_OUT_PROBLEMS
        assert len({problem.call for problem in learned}) == len(learned) >= 400
        assert {problem.call for problem in learned}.isdisjoint(problem.call for problem in held_out)
        assert len({problem.function for problem in held_out} & {problem.function for problem in learned}) >= 6
    assert train_problems(Tiny(seed=0)) == train_problems(Tiny(seed=0)) != train_problems(Tiny(seed=1))


# --- baselines -------------------------------------------------------------------------------------------------------


def test_baselines_by_hand():
    # Seen: 1 2 | 1 2 1, so c = (0, 3, 2, 0) of N = 5; bigrams 12, 12, 21.
    seen, vocab_size = [np.array([1, 2]), np.array([1, 2, 1])], 4
    unigram = {1: 4 / 9, 2: 3 / 9, 3: 1 / 9}
    # Held out: BOS 0, then 1 2 3, then EOS 0: the three tokens of the text are predicted, the EOS is not.
    held_out, text = [np.array([0, 1, 2, 3, 0])], "abcdef"
    after = {
        (0, 1): unigram[1],  # 0 was never followed: the unigram alone
        (1, 2): (2 + 1 * unigram[2]) / (2 + 1),  # 1 was followed twice, by one kind
        (2, 3): (0 + 1 * unigram[3]) / (1 + 1),
    }
    found = measure.baselines(seen, held_out, [text], vocab_size=vocab_size)
    np.testing.assert_allclose(found.unigram, -np.log2([unigram[1], unigram[2], unigram[3]]).sum() / 6)
    np.testing.assert_allclose(found.bigram, -np.log2(list(after.values())).sum() / 6)
    assert found.zlib == 8 * len(zlib.compress(b"abcdef", 9)) / 6
    assert found.xz == 8 * len(lzma.compress(b"abcdef", preset=9 | lzma.PRESET_EXTREME)) / 6


def test_baselines_of_several_documents_count_bytes_and_join_nothing():
    seen = [np.arange(3)]
    rows, texts = [np.array([0, 1, 0]), np.array([0, 2, 0])], ["é", "x"]
    found = measure.baselines(seen, rows, texts, vocab_size=3)
    np.testing.assert_allclose(found.unigram, 2 * np.log2(3) / 3)  # three bytes; all three tokens are equally frequent
    assert found.zlib == 8 * len(zlib.compress("éx".encode(), 9)) / 3
