"""Compiled programs kept on disk, so that the next process does not compile them again."""

import contextlib
import hashlib
import os
import platform
import time
from pathlib import Path

import jax

DAYS = 30
"""A program that was compiled longer ago is removed, so that the folder does not grow for ever."""

_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_programs() -> Path | None:
    """Has jax keep what it compiles, and returns the folder: below $XDG_CACHE_HOME or ~/.cache, in internjax/programs.

    For a command to call before its first program. A folder that the user named (JAX_COMPILATION_CACHE_DIR) stays;
    JAX_ENABLE_COMPILATION_CACHE=false switches all of it off. Where nothing can be written, nothing is kept (None).
    jax tells programs of other versions, devices and flags apart, but not processors, and the folder may be one that
    machines share: each kind of processor has its own.
    """
    if (given := jax.config.jax_compilation_cache_dir) is not None:
        return Path(given)
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "internjax" / "programs" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
    except (OSError, RuntimeError):  # no home
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if _SECONDS not in os.environ:
        # jax's own 1 s leaves out most of a small model's programs.
        jax.config.update(_SECONDS.lower(), 0.1)
    return folder


def _processor() -> str:
    """Returns a name of what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _remove_old(folder: Path) -> None:
    for entry in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if entry.is_file() and time.time() - entry.stat().st_mtime > DAYS * 24 * 3600:
                entry.unlink()
