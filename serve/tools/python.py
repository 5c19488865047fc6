"""The Python tool: code in, what it printed out, run in `internjax.sandbox` and nowhere else.

Two forms. `python_tool` starts anew for every call. `interpreter_tool` is a notebook: each call sees the variables of
the ones before it, because those are run again, silently, in front of it; the sandbox keeps nothing between runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from internjax.sandbox import Limits, Outcome, run
from serve.tools.tool import Tool

MAX_SHOWN_CHARS = 4000

_PARAMETERS = {
    "type": "object",
    "properties": {"code": {"type": "string", "description": "Python source"}},
    "required": ["code"],
}

# Runs cells as a notebook does: one namespace, the value of a last expression is shown, a traceback holds only the
# cell's own frames. Earlier cells are silent, and may fail as they did before.
_RUNNER = """
import ast, contextlib, io, linecache, sys, traceback

def run_cell(source, name, space):
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), space)
        if value is not None:
            print(repr(value))

def main(cells):
    space = {{"__name__": "__main__"}}
    for number, source in enumerate(cells, 1):
        quiet = number < len(cells)
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            try:
                run_cell(source, f"<cell {{number}}>", space)
            except BaseException as error:
                if quiet:
                    continue
                frames = error.__traceback__
                while frames is not None and not frames.tb_frame.f_code.co_filename.startswith("<cell"):
                    frames = frames.tb_next
                sys.stdout.flush()
                traceback.print_exception(type(error), error, frames)
                sys.exit(1)

main({cells!r})
"""


def python_tool(*, limits: Limits | None = None) -> Tool:
    """A tool "python" that runs {"code": ...} in a fresh sandboxed interpreter."""

    def python(code: str) -> str:
        return shown(run_cells([code], limits=limits))

    return Tool(
        "python",
        "Runs Python code (standard library, no network) and returns what it prints and the value of the last line. "
        "Nothing is kept between calls.",
        _PARAMETERS,
        python,
    )


def interpreter_tool(*, limits: Limits | None = None) -> Tool:
    """A tool "interpreter" that remembers: make one for each conversation. `limits` hold for a call with its replay."""
    cells: list[str] = []

    def interpreter(code: str) -> str:
        outcome = run_cells([*cells, code], limits=limits)
        if outcome.status in ("ok", "error"):  # a cell that had to be stopped would stop every later one too
            cells.append(code)
        return shown(outcome)

    return Tool(
        "interpreter",
        "Runs Python code (standard library, no network) and returns what it prints and the value of the last line. "
        "Variables are kept between calls.",
        _PARAMETERS,
        interpreter,
    )


def run_cells(cells: Sequence[str], *, limits: Limits | None = None) -> Outcome:
    """Outcome of the last cell, run after the ones before it in one fresh interpreter."""
    program = _RUNNER.format(cells=[_without_fence(cell) for cell in cells])
    return run(program, limits=Limits() if limits is None else limits)


def shown(outcome: Outcome) -> str:
    """What the model reads of an outcome: the output, then the error or the reason why it was stopped."""
    parts = [_middle_cut(outcome.stdout.rstrip("\n"))]
    match outcome.status:
        case "ok":
            return parts[0] or "(no output)"
        case "error":
            parts.append(_middle_cut(outcome.stderr.strip()) or f"exit status {outcome.returncode}")
        case _:
            parts.append(outcome.reason)
    return "\n".join(part for part in parts if part)


def _without_fence(code: str) -> str:
    lines = code.strip("\n").split("\n")
    if len(lines) >= 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        return "\n".join(lines[1:-1])
    return code


def _middle_cut(text: str) -> str:
    if len(text) <= MAX_SHOWN_CHARS:
        return text
    half = MAX_SHOWN_CHARS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
