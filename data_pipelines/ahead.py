"""Compiles the loops of a chain from its last stage on, in a process of its own, while another runs the first stages.

numba compiles one loop at a time, twenty seconds for a chain, and keeps what it has compiled. So the first run of a
chain on a machine, which would spend most of its time on that with one core, meets half of its loops ready.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numba

from data_pipelines.blocks import digest_of_loops
from data_pipelines.kernels import words


def mark_of(chain: str) -> Path:
    """The file, where numba keeps the loops, that says that those of a chain are all there as they are now."""
    version = f"{sys.implementation.cache_tag}-{numba.__version__}-{digest_of_loops(Path(__file__).parent)[:16]}"
    return Path(words.stats.cache_path, f"{chain}-{version}.compiled")


@contextlib.contextmanager
def compiling(chain: str) -> Iterator[None]:
    """Compiles the loops of a chain beside what is done meanwhile, unless they are kept or there is no core for it."""
    if (os.cpu_count() or 1) < 2 or numba.config.DISABLE_JIT or mark_of(chain).exists():
        yield
        return
    command = [sys.executable, "-m", "data_pipelines.compile_chain", chain]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as beside:
        try:
            yield
        except BaseException:
            beside.terminate()
            raise
        beside.wait()  # seconds, once: what the chain has met by now is compiled
