"""Compiles the loops of a chain, from its last stage on: what `ahead` starts beside a run of the chain.

python -m data_pipelines.compile_chain mixed
"""

import contextlib
import sys
from pathlib import Path

from data_pipelines import ahead, wanjuan
from data_pipelines.document import Document, make_document
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
    ahead.mark_of(name).touch()


if __name__ == "__main__":
    compile_chain(sys.argv[1])
