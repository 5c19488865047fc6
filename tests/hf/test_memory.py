"""Models are read, written and restored in little more memory than they take, under a limit of the kernel."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import QUICK_FLAGS

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_model_is_streamed_in_two_tensors_beyond_its_own_size(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.hf.limited_memory", str(tmp_path)],
        cwd=ROOT,
        # One device and few arenas; every large block of memory goes back to the kernel when it is freed.
        env=os.environ | {"XLA_FLAGS": QUICK_FLAGS, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if " " not in line] == ["read", "converted", "restored"]
