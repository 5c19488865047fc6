"""The loops of a chain are compiled beside it: all of them, and only where they are not kept already."""

import subprocess
import sys

import pytest

from data_pipelines import ahead

FOUND = """
import sys
from numba.core.registry import CPUDispatcher
from pathlib import Path
from data_pipelines import ahead, compile_chain, wanjuan
from data_pipelines.document import make_document
from data_pipelines.ledger import Ledger

def compiled():
    modules = [module for name, module in sys.modules.items() if name.startswith("data_pipelines.")]
    loops = {value for module in modules for value in vars(module).values() if isinstance(value, CPUDispatcher)}
    return {(loop.py_func.__module__, loop.__name__): len(loop.signatures) for loop in loops if loop.signatures}

ahead.mark_of = lambda name: Path(sys.argv[2])
compile_chain.compile_chain(sys.argv[1])
ready = compiled()
texts = [(path, path.read_text(), "code") for path in sorted(Path("tests/data_pipelines").glob("*.py"))]
texts += [(path, path.read_text(), "reference") for path in [Path("README.md"), *Path().glob("*/README.md")]]
texts += [(path, text.replace("the", "a"), domain) for path, text, domain in texts]
documents = [make_document(text, source=str(n), path=str(path), domain=d) for n, (path, text, d) in enumerate(texts)]
wanjuan.run_chain(documents, wanjuan.CHAINS[sys.argv[1]](), Ledger())
new = {name: number for name, number in compiled().items() if ready.get(name, 0) < number}
assert len(ready) > 10 and not new, (len(ready), new)
"""


@pytest.mark.parametrize("chain", ["mixed", "web"])
def test_samples_make_every_loop_compile_that_documents_do(chain, tmp_path):
    subprocess.run([sys.executable, "-c", FOUND, chain, str(tmp_path / "mark")], check=True)
    assert (tmp_path / "mark").exists()


def test_nothing_is_started_where_the_loops_are_kept(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(ahead, "mark_of", lambda name: tmp_path / name)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ahead.subprocess, "Popen", lambda command, **_: started.append(command) or _Beside())
    with ahead.compiling("web"):
        pass
    assert [command[1:] for command in started] == [["-m", "data_pipelines.compile_chain", "web"]]
    (tmp_path / "web").touch()
    with ahead.compiling("web"):
        pass
    assert len(started) == 1


def test_a_chain_that_fails_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "mark_of", lambda name: tmp_path / name)
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 2)
    begun, popen = [], subprocess.Popen
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(ahead.subprocess, "Popen", lambda command, **how: begun.append(popen(sleep, **how)) or begun[0])
    with pytest.raises(KeyError), ahead.compiling("web"):
        raise KeyError("of the chain")
    assert begun[0].wait() < 0


class _Beside:
    """A process that remembers nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def wait(self):
        return 0
