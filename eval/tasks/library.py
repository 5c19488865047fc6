"""Tasks made from facts about a code library: where a function lives, what it does, what a call of it gives.

Facts come in as values; nothing is read here. Contexts have the form of code (imports, definitions, interpreter
sessions), so that a base model trained on code can answer them; distractors are drawn by seed alone.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eval.task import ChoiceItem, ChoiceTask, GenerateItem, GenerateTask

NUM_CHOICES = 4
# Distractors are drawn from this many facts whose text is nearest in length, so that length does not give it away.
NUM_NEAREST = 24


class Fact(NamedTuple):
    """A public function: its module, its name in it, its signature as `(a, b=1)`, the first line of its docstring."""

    module: str
    name: str
    signature: str
    summary: str

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}"


def module_of(facts: Sequence[Fact], *, num_items: int, seed: int) -> ChoiceTask:
    """Returns the task "which module does NAME live in": `from` + ` MODULE import NAME`, four modules.

    Names that occur in several modules are left out. Modules are drawn as often as they hold facts, so that naming the
    most frequent module does not help.
    """
    known = _unique(facts, lambda fact: fact.name)
    modules = [fact.module for fact in known]
    _want(len(set(modules)), NUM_CHOICES, "modules")
    rng = random.Random(f"{seed} module_of")
    items = []
    for fact in _draw(known, num_items, rng):
        others: list[str] = []
        while len(others) < NUM_CHOICES - 1:
            module = rng.choice(modules)
            if module != fact.module and module not in others:
                others.append(module)
        choices, answer = _shuffled(fact.module, others, rng)
        continuations = tuple(f" {module} import {fact.name}\n" for module in choices)
        items.append(ChoiceItem(f"module_of/{fact.qualified}", "from", continuations, answer))
    return ChoiceTask("module_of", 1, tuple(items))


def summary_of(facts: Sequence[Fact], *, num_items: int, seed: int) -> ChoiceTask:
    """Returns the task "which description fits this signature": a definition's docstring, four first lines."""
    known = _unique(facts, lambda fact: fact.summary)
    _want(len(known), NUM_CHOICES, "facts with a summary of their own")
    rng = random.Random(f"{seed} summary_of")
    by_length = sorted(known, key=lambda fact: (len(fact.summary), fact.qualified))
    place = {fact: n for n, fact in enumerate(by_length)}
    items = []
    for fact in _draw(known, num_items, rng):
        start = max(0, min(place[fact] - NUM_NEAREST // 2, len(by_length) - NUM_NEAREST - 1))
        nearest = [other for other in by_length[start : start + NUM_NEAREST + 1] if other != fact]
        others = [other.summary for other in rng.sample(nearest, NUM_CHOICES - 1)]
        choices, answer = _shuffled(fact.summary, others, rng)
        context = f'def {fact.name}{fact.signature}:\n    """'
        items.append(ChoiceItem(f"summary_of/{fact.qualified}", context, tuple(choices), answer))
    return ChoiceTask("summary_of", 1, tuple(items))


def name_of(facts: Sequence[Fact], *, num_items: int, seed: int) -> GenerateTask:
    """Returns the task "name the function of this module that does this": a comment, then `MODULE.` to complete."""
    known = _unique(facts, lambda fact: fact.summary)
    _want(len(known), 1, "facts with a summary of their own")
    items = tuple(
        GenerateItem(f"name_of/{fact.qualified}", f"# {fact.summary}\n{fact.module}.", fact.name, f"{fact.name}(x)")
        for fact in _draw(known, num_items, random.Random(f"{seed} name_of"))
    )
    return GenerateTask("name_of", 1, items, extract=identifier, max_new_tokens=16, stop=("(", "\n"))


class Problem(NamedTuple):
    """A question about numbers, the call that answers it, and its value."""

    question: str
    function: str
    arguments: tuple[int, ...]
    value: str

    @property
    def call(self) -> str:
        return f"{self.function}({', '.join(map(str, self.arguments))})"


# Question, function, its implementation, and the ranges of its arguments. The order of arguments matters to none but
# those in ORDERED.
ARITHMETIC: tuple[tuple[str, str, Callable[..., int], tuple[range, ...]], ...] = (
    ("What is the greatest common divisor of {} and {}?", "math.gcd", math.gcd, (range(4, 100), range(4, 100))),
    ("What is the least common multiple of {} and {}?", "math.lcm", math.lcm, (range(2, 20), range(2, 20))),
    ("How many ways are there to choose {1} out of {0}?", "math.comb", math.comb, (range(4, 12), range(1, 4))),
    ("What is the factorial of {}?", "math.factorial", math.factorial, (range(2, 9),)),
    ("What is the integer square root of {}?", "math.isqrt", math.isqrt, (range(4, 400),)),
    ("What is {} to the power of {}?", "pow", pow, (range(2, 10), range(2, 4))),
    ("What is the largest of {}, {} and {}?", "max", max, (range(1, 100),) * 3),
    ("What is the smallest of {}, {} and {}?", "min", min, (range(1, 100),) * 3),
)
ORDERED = frozenset({"math.comb", "pow"})
# There are about two million different ones; drawing stays quick far below that.
MAX_PROBLEMS = 100_000


def problems(*, num_items: int, seed: int, exclude: Sequence[Problem] = ()) -> tuple[Problem, ...]:
    """Returns different arithmetic problems, none of them in `exclude` (so that a held-out set stays held out).

    Two problems are the same also where they differ only in an order of arguments that does not matter.
    """
    if num_items + len(exclude) > MAX_PROBLEMS:
        raise ValueError(f"given {num_items} problems beside {len(exclude)}; wanted at most {MAX_PROBLEMS} in all")
    rng = random.Random(f"{seed} problems")
    seen = {_identity(problem.call) for problem in exclude}
    found: list[Problem] = []
    while len(found) < num_items:
        question, function, compute, ranges = rng.choice(ARITHMETIC)
        arguments = tuple(rng.choice(span) for span in ranges)
        problem = Problem(question.format(*arguments), function, arguments, str(compute(*arguments)))
        if (identity := _identity(problem.call)) not in seen:
            seen.add(identity)
            found.append(problem)
    return tuple(found)


def interpreter_session(asked: Sequence[Problem]) -> GenerateTask:
    """Returns the task "what does this call print" in an interpreter session, after two lines that show the form."""
    shown = ">>> abs(-7)\n7\n>>> math.gcd(9, 6)\n3\n"
    items = tuple(
        GenerateItem(f"interpreter_session/{problem.call}", f"{shown}>>> {problem.call}\n", problem.value)
        for problem in asked
    )
    return GenerateTask("interpreter_session", 1, items, max_new_tokens=16, stop=("\n",))


def call_for(asked: Sequence[Problem]) -> GenerateTask:
    """Returns the task "write the call that answers this question", judged without running it."""
    items = tuple(GenerateItem(f"call_for/{problem.call}", problem.question, problem.call) for problem in asked)
    return GenerateTask("call_for", 1, items, extract=first_call, judge=same_call, max_new_tokens=64, stop=())


def identifier(text: str) -> str | None:
    """Returns the identifier that `text` begins with, or None."""
    found = re.match(r"\s*([^\W\d]\w*)", text)
    return found and found[1]


def first_call(text: str) -> str | None:
    """Returns the first call with plain number arguments in `text`, such as `math.gcd(12, 18)`, or None."""
    number = r"\s*-?\d+\s*"
    found = re.search(rf"(?<![\w.])[^\W\d]\w*(?:\.[^\W\d]\w*)*\((?:{number}(?:,{number})*)?\)", text)
    return found and found[0]


def same_call(given: str, wanted: str) -> float:
    """Returns 1.0 if both are the same function of the same numbers, in any order where order does not matter."""
    return float(_identity(given) == _identity(wanted))


def _identity(call: str) -> tuple[str, tuple[int, ...]]:
    """Returns function and arguments of a call, the arguments in one order where their order does not matter."""
    name, arguments = _parsed(call)
    return name, tuple(arguments if name in ORDERED else sorted(arguments))


def _parsed(call: str) -> tuple[str, list[int]]:
    name, _, arguments = call.partition("(")
    # Leading zeros are no Python numbers; int() reads them as what they say.
    return name, [int(number) for number in re.findall(r"-?\d+", arguments)]


def _unique(facts: Sequence[Fact], key: Callable[[Fact], str]) -> list[Fact]:
    """Returns facts whose key is not empty and no other's, in an order that does not depend on the order given."""
    counts = Counter(key(fact) for fact in facts)
    return sorted(fact for fact in facts if key(fact) and counts[key(fact)] == 1)


def _draw(known: Sequence[Fact], num_items: int, rng: random.Random) -> list[Fact]:
    return rng.sample(known, min(num_items, len(known)))


def _shuffled(right: str, others: Sequence[str], rng: random.Random) -> tuple[list[str], int]:
    choices = [right, *others]
    rng.shuffle(choices)
    return choices, choices.index(right)


def _want(num: int, wanted: int, what: str) -> None:
    if num < wanted:
        raise ValueError(f"given {num} {what}; wanted at least {wanted}: pass facts of a larger library")
