"""What the tiny chain asks about the standard library: conversations, preferences, and checks that a program can make.

Everything is computed from `data_pipelines.embedded.Fact` records (what the library says about its own functions) and
from calls of known value (`eval.tasks.library.problems`). Nothing here is written by a model.
"""

import ast
import hashlib
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.embedded import Fact
from eval.tasks.library import Problem
from internjax.text.chat import Message, ToolCall

# --- instruction pairs -----------------------------------------------------------------------------------------------


class BodyTask(NamedTuple):
    """Write the body of a function. path is the module's file, so that a split by file holds here too."""

    prompt: str
    body: str
    arguments: tuple[str, ...]
    name: str
    path: str


def description_chats(facts: Sequence[Fact]) -> list[list[Message]]:
    """Returns a question about each fact and its answer in the library's own words, both ways round."""
    chats = []
    for fact in facts:
        call = re.sub(r"^(async def|def|class) ", "", fact.signature)
        chats.append([Message("user", f"What does `{call}` of {fact.module} do?"), Message("assistant", fact.summary)])
        chats.append([Message("user", f"Which call of {fact.module} fits: {fact.summary}"), Message("assistant", call)])
    return chats


def body_tasks(facts: Sequence[Fact], *, max_chars: int = 160, max_prompt_chars: int = 300) -> list[BodyTask]:
    """Returns the functions whose body (docstring aside) has at most `max_chars` characters."""
    tasks = []
    for fact in facts:
        try:
            function = ast.parse(fact.source).body[0]
        except (SyntaxError, IndexError):
            continue
        if not isinstance(function, ast.FunctionDef) or len(function.body) < 2:
            continue
        lines = fact.source.splitlines()
        first = function.body[1]
        body = textwrap.dedent("\n".join(lines[first.lineno - 1 : function.end_lineno])).strip()
        prompt = f'{fact.signature}:\n    """{fact.summary}"""'
        if first.lineno > function.body[0].end_lineno and len(body) <= max_chars and len(prompt) <= max_prompt_chars:
            arguments = tuple(a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs)
            tasks.append(BodyTask(prompt, body, arguments, fact.name, fact.path))
    return tasks


def body_prompt(task: BodyTask) -> list[Message]:
    """Returns the conversation that asks for the body."""
    return [Message("user", f"Write the body.\n{task.prompt}")]


def body_chats(tasks: Sequence[BodyTask]) -> list[list[Message]]:
    """Returns each task with the library's own body as the answer."""
    return [[*body_prompt(task), Message("assistant", task.body)] for task in tasks]


# --- interpreter protocol --------------------------------------------------------------------------------------------


INTERPRETER_SYSTEM = "Send Python code to the interpreter."


def interpreter_prompt(problem: Problem) -> list[Message]:
    """Returns the conversation that asks for the value of a call."""
    return [
        Message("system", INTERPRETER_SYSTEM, name="interpreter"),
        Message("user", f"What is {problem.call}?"),
    ]


def interpreter_code(problem: Problem) -> str:
    """Returns the program that prints the value."""
    module = problem.function.rpartition(".")[0]
    return f"import {module}\nprint({problem.call})" if module else f"print({problem.call})"


def interpreter_chats(problems: Sequence[Problem]) -> list[list[Message]]:
    """Returns each problem with its program, the interpreter's output, and the answer read off it."""
    return [
        [
            *interpreter_prompt(problem),
            Message("assistant", "", call=ToolCall("interpreter", interpreter_code(problem))),
            Message("environment", problem.value, name="interpreter"),
            Message("assistant", f"{problem.call} is {problem.value}."),
        ]
        for problem in problems
    ]


def answers(text: str, problem: Problem) -> bool:
    """Returns whether the final answer states the value after the last "is"."""
    return text.rpartition(" is ")[2].strip().rstrip(".") == problem.value


# --- programmatic gold and preferences -------------------------------------------------------------------------------


class Completion(NamedTuple):
    """What a model wrote for a task; ended says that it stopped by itself."""

    text: str
    ended: bool


def _statements(text: str) -> list[ast.stmt] | None:
    """Returns the statements of a body, or None where it does not parse."""
    try:
        return ast.parse(textwrap.dedent(text)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):  # an expression that names, calls and yields nothing is a constant
        kinds = ast.Name | ast.Call | ast.Yield | ast.YieldFrom | ast.Await
        return any(isinstance(node, kinds) for node in ast.walk(statement))
    return not isinstance(statement, ast.Pass)


def copies_prompt(text: str, prompt: str) -> bool:
    """Returns whether the text is the prompt, or holds a line of it, or is a piece of it."""
    stripped = text.strip()
    lines = {line.strip() for line in prompt.splitlines() if len(line.strip()) > 3}
    return stripped in prompt or any(line.strip() in lines for line in stripped.splitlines())


def gold(completion: Completion, task: BodyTask) -> bool:
    """Returns whether a completion counts: it ended, parses, does something, and does not copy the prompt.

    To do something is to hold a statement that is not a constant (a docstring, `...`), a comment or `pass`.
    """
    statements = _statements(completion.text)
    if not completion.ended or not statements:
        return False
    return any(map(_does_something, statements)) and not copies_prompt(completion.text, task.prompt)


CONDITIONS = {
    "working": "Prefer the answer that is working code: it parses and uses what it was given.",
    "concise": "Prefer the shorter answer among those that parse.",
}
"""Conditional system prompts of the reward model: our own texts, the published ones are not known."""


def condition_of(task: BodyTask) -> str:
    """Returns the condition under which a task's answers are judged: one or the other by the hash of its prompt."""
    return list(CONDITIONS)[hashlib.sha256(task.prompt.encode()).digest()[0] % len(CONDITIONS)]


def preference(condition: str, completion: Completion, task: BodyTask) -> float:
    """Returns how much a condition likes a completion; a pair prefers the higher one.

    working: it parses, does something, uses an argument by name, stopped by itself. concise: it parses, stopped by
    itself, has few characters. Neither is the gold: concise likes `pass`, working does not notice a copied prompt.
    """
    statements = _statements(completion.text)
    if condition == "concise":
        if not statements:
            return -2.0 + 0.5 * completion.ended
        return 1.0 * completion.ended - min(len(completion.text.strip()), 400) / 400
    if not statements:
        return -1.0 + 0.5 * completion.ended
    used = {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}
    return 1.0 * any(map(_does_something, statements)) + 0.5 * bool(used & set(task.arguments)) + 1.0 * completion.ended
