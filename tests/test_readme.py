"""The README holds true: its Python runs, its commands exist, its map shows the house."""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# serve/ and eval/ have tests of their own READMEs.
TEXTS = [README, *((ROOT / name / "README.md").read_text("utf-8") for name in ("internjax", "experiments"))]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", "\n".join(TEXTS), re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"(?:^|`)((?:\.venv/bin/)?python -m [^`|#\n]+|make [^`|#\n]+)", "\n".join(TEXTS), re.MULTILINE)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_python_blocks_run_unless_they_say_what_they_need(code):
    if code.startswith("# needs"):
        compile(code, "README.md", "exec")
        return
    exec(compile(code, "README.md", "exec"), {})


def test_every_block_has_a_language_or_is_a_drawing():
    assert {language for language, _ in BLOCKS} <= {"sh", "python", ""}
    assert sum(language == "" for language, _ in BLOCKS) == 1, "the map alone"


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_exist(command):
    words = shlex.split(command.replace("...", ""))
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert words[1] in targets, command
        return
    if words[2] in ("MaxText.train", "levanter.main.train_lm"):
        return
    assert importlib.util.find_spec(words[2]) is not None, command
    flags = [word.split("=")[0] for word in words[3:] if word.startswith("--")]
    if flags:
        verbs = [words[3]] if words[2] == "internjax.hf" else []
        known = help_of(words[2], *verbs)
        assert all(flag.replace("_", "-") in known for flag in flags), (command, known)


@functools.cache
def help_of(module: str, *verbs: str) -> str:
    """What `python -m` prints, without a process that imports everything anew."""
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
        warnings.catch_warnings(),
        pytest.raises(SystemExit) as ended,
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module that a test has imported already
        patch.setattr(sys, "argv", [module, *verbs, "--help"])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code in (None, 0), (module, ended.value.code)
    return printed.getvalue().replace("_", "-")


def test_the_map_names_what_is_there():
    drawing = next(code for language, code in BLOCKS if language == "")
    folder = None
    for line in drawing.splitlines():
        for name in re.findall(r"(?:^|\s)([a-z_]+(?:/|\.py))(?=\s)", line):
            if not line.startswith(" ") and name.endswith("/"):
                folder = ROOT / name
                assert folder.is_dir(), name
            else:
                assert (folder / name).exists(), name


def test_the_table_of_training_names_every_file_once():
    room = ROOT / "internjax" / "train"
    named = re.findall(
        r"`([a-z_]+\.py)`", (room / "README.md").read_text("utf-8").split("## Pitfalls")[0].split("|---|---|")[1]
    )
    assert sorted(named) == sorted(path.name for path in room.glob("[a-z]*.py"))


def test_argparse_is_what_help_is_made_by():
    """The other commands of the house answer --help without a model."""
    for module in ("serve.__main__", "internjax.hf.__main__"):
        found = importlib.import_module(module)
        makers = [getattr(found, name) for name in ("build_parser", "_parser") if hasattr(found, name)]
        assert makers and isinstance(makers[0](), argparse.ArgumentParser)
