"""Compiles the loops of a chain from its last stage on, in a process of its own, while another runs the first stages.

    python -m data_pipelines.ahead mixed

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

from data_pipelines import wanjuan
from data_pipelines.blocks import digest_of_loops
from data_pipelines.document import Document, make_document
from data_pipelines.kernels import words
from data_pipelines.ledger import Ledger


def samples() -> list[Document]:
    """A few documents that every stage has work with: code, prose, and a near duplicate of each."""
    folder = Path(__file__).parent
    found = []
    for path, domain in ((folder / "README.md", "reference"), (folder / "chain.py", "code")):
        text = path.read_text(encoding="utf-8")
        for number, each in enumerate((text, text.replace("folder", "place"))):
            found.append(make_document(each, source=str(number), path=path.name, domain=domain))
    return found


def compile_chain(name: str) -> None:
    """Runs the stages of a chain, the last one first, each alone on the samples; the loops are then kept."""
    for stage in reversed(wanjuan.CHAINS[name]()):
        with contextlib.suppress(ValueError):  # a stage may drop all samples
            wanjuan.run_chain(samples(), [stage], Ledger())
    _mark(name).touch()


def _mark(name: str) -> Path:
    """The file, where numba keeps the loops, that says that those of a chain are all there as they are now."""
    version = f"{sys.implementation.cache_tag}-{numba.__version__}-{digest_of_loops(Path(__file__).parent)[:16]}"
    return Path(words.stats.cache_path, f"{name}-{version}.compiled")


@contextlib.contextmanager
def compiling(name: str) -> Iterator[None]:
    """Compiles the loops of a chain beside what is done meanwhile, unless they are kept or there is no core for it."""
    if (os.cpu_count() or 1) < 2 or numba.config.DISABLE_JIT or _mark(name).exists():
        yield
        return
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "data_pipelines.ahead", name], **quiet) as beside:
        try:
            yield
        except BaseException:
            beside.terminate()
            raise
        beside.wait()  # seconds, once: what the chain has met by now is compiled


if __name__ == "__main__":
    compile_chain(sys.argv[1])
