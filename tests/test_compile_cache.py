"""Programs that one process compiled are there for the next."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from internjax import compile_cache

PROGRAM = """
import sys
import jax
from internjax.compile_cache import keep_programs
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
folder = keep_programs()
double = jax.jit(lambda x: (x @ x).sum())
double(jax.numpy.ones((8, 8))).block_until_ready()
print(folder, hits.count("/jax/compilation_cache/cache_hits"), sep="\\n")
"""


def run(home: Path, **environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "XDG_CACHE"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=kept | {"HOME": str(home), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_next_process_finds_what_was_compiled_but_not_what_is_old(tmp_path):
    folder, hits = run(tmp_path)
    assert hits == "0" and Path(folder).parent == tmp_path / ".cache" / "internjax" / "programs"
    old = Path(folder) / "of_a_compiler" / "old-cache"
    old.parent.mkdir()
    old.touch()
    long_ago = time.time() - (compile_cache.DAYS + 1) * 24 * 3600
    for path in (old, old.parent):
        os.utime(path, (long_ago, long_ago))
    again, hits = run(tmp_path)
    assert again == folder and int(hits) > 0 and not old.exists() and any(Path(folder).iterdir())


def test_the_user_s_folder_stays_and_none_is_needed(tmp_path, monkeypatch):
    assert compile_cache.keep_programs() == Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert compile_cache.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
