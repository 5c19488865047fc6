"""Tools: the check of arguments, and Python that really runs in the sandbox."""

import pytest

from internjax.sandbox import Limits
from serve.tools.python import MAX_SHOWN_CHARS, interpreter_tool, python_tool
from serve.tools.tool import Tool, argument_faults, call, spec

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer"},
        "share": {"type": "number"},
        "unit": {"type": "string", "enum": ["m", "km"]},
        "flag": {"type": "boolean"},
        "names": {"type": "array"},
        "maybe": {"type": ["string", "null"]},
        "anything": {},
    },
    "required": ["count"],
}
TOOL = Tool("measure", "Measures.", SCHEMA, lambda count, **rest: f"{count} {sorted(rest)}")


def test_a_call_gives_text():
    assert spec(TOOL) == {"name": "measure", "description": "Measures.", "parameters": SCHEMA}
    arguments = {"count": 3, "share": 1, "unit": "km", "flag": True, "names": [], "maybe": None, "anything": {}}
    assert call(TOOL, arguments) == "3 ['anything', 'flag', 'maybe', 'names', 'share', 'unit']"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({}, "'count' is missing"),
        ({"count": "3"}, "'count' is '3', not of type integer"),
        ({"count": 3.0}, "'count' is 3.0, not of type integer"),
        ({"count": True}, "'count' is True, not of type integer"),
        ({"count": 1, "share": False}, "'share' is False, not of type number"),
        ({"count": 1, "flag": 1}, "'flag' is 1, not of type boolean"),
        ({"count": 1, "unit": "mile"}, "'unit' is 'mile', not one of ['m', 'km']"),
        ({"count": 1, "maybe": 2}, "'maybe' is 2, not of type string or null"),
        ({"count": 1, "colour": "red"}, "unknown argument 'colour'"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_runs(arguments, fault):
    assert argument_faults(TOOL, arguments) == [fault]
    with pytest.raises(ValueError, match="measure was not called: .* Wanted: count"):
        call(TOOL, arguments)


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("import math\nprint('gcd')\nmath.gcd(12, 18)", "gcd\n6"),
        ("x = 5", "(no output)"),
        ("None", "(no output)"),
        ("```python\n2 ** 10\n```", "1024"),
        ("'{}'.format(1)", "'1'"),
        ("", "(no output)"),
    ],
)
def test_python_shows_output_and_last_value(code, shown):
    assert call(python_tool(), {"code": code}) == shown


def test_python_shows_the_error_and_only_the_cell_s_frames():
    shown = call(python_tool(), {"code": "print('before')\ndef f():\n    return {}[3]\nf()"})
    assert shown.startswith("before\nTraceback") and shown.endswith("KeyError: 3")
    assert 'File "<cell 1>", line 3, in f' in shown and "return {}[3]" in shown
    assert "run_cell" not in shown
    assert "SyntaxError" in call(python_tool(), {"code": "for"})


def test_python_is_boxed():
    code = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)"
    assert "Error" in call(python_tool(), {"code": code})
    limits = Limits(wall_seconds=0.5)
    assert "wall clock" in call(python_tool(limits=limits), {"code": "while True: pass"})


def test_long_output_is_cut_in_the_middle():
    shown = call(python_tool(), {"code": "print('a' * 3000 + 'b' * 3000)"})
    assert shown.startswith("a" * 100) and shown.endswith("b" * 100) and "2000 characters left out" in shown
    assert len(shown) < MAX_SHOWN_CHARS + 100


def test_the_interpreter_remembers_and_python_does_not():
    tool = interpreter_tool(limits=Limits(wall_seconds=2))
    assert call(tool, {"code": "x = 20\nprint('once')"}) == "once"
    assert call(tool, {"code": "y = x + 1\n1 / 0"}).endswith("ZeroDivisionError: division by zero")
    assert call(tool, {"code": "(x, y)"}) == "(20, 21)"  # what ran before the error has run, and nothing is shown twice
    fresh = python_tool()
    call(fresh, {"code": "x = 20"})
    assert "NameError" in call(fresh, {"code": "x"})


def test_a_cell_that_had_to_be_stopped_is_not_run_again():
    tool = interpreter_tool(limits=Limits(wall_seconds=1.5))
    assert "wall clock" in call(tool, {"code": "x = 1\nwhile True: pass"})
    assert call(tool, {"code": "2 + 2"}) == "4"
