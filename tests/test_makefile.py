"""The targets that a newcomer types: what they would run, and what they say where something is missing."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Makefile").read_text()


def make(*args, code=0, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "DATA", "ARGS"))}
    done = subprocess.run(
        ["make", "--no-print-directory", *args], cwd=ROOT, env=clean | env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_help_lists_every_target():
    targets = set(re.search(r"^\.PHONY: (.+)$", TEXT, re.M)[1].split())
    assert set(re.findall(r"^  make ([a-z-]+) ", make("help"), re.M)) == targets
    assert {"quickstart", "test", "parity", "setup-gpu", "notebook"} <= targets


def test_arguments_reach_the_chain_as_they_were_given():
    assert make("-n", "quickstart").rstrip().endswith(".venv/bin/python -m experiments.tiny")
    said = make("-n", "quickstart", "DATA=my chats.jsonl", "ARGS=--fresh --seed 3")
    assert re.search(r'-m experiments\.tiny --data "\$DATA" --fresh --seed 3$', said.rstrip())
    # What `make` exports is what the shell puts there.
    show = '--eval=show: ; @printf %s "$$DATA"'
    assert make(show, "show", "DATA=my 'odd' chats.jsonl") == "my 'odd' chats.jsonl"


def test_a_machine_without_a_gpu_is_told_what_to_do():
    said = make('--eval=check: ; @$(PY) -c "$$CHECK_GPU"', "check", code=2, JAX_PLATFORMS="cpu")
    assert "sees cpu:0" in said and "JAX sees no GPU" in said and "nvidia-smi" in said and "Remedy" in said


def test_a_python_that_is_too_old_or_not_there_is_told():
    find = '--eval=find: ; @bash -c "$$FIND_PYTHON"'
    assert Path(make(find, "find").strip()).exists()
    said = make(find, "find", "PYTHON=/no/such/python", code=2)
    assert "given '/no/such/python', wanted Python >= 3.11 with the venv and ensurepip modules" in said
    assert "make PYTHON=" in said
