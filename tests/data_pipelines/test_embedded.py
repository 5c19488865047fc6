import sys

import pytest

from data_pipelines import embedded, sources
from data_pipelines import outline as outlines
from data_pipelines.document import fingerprint, in_held_out, make_document
from data_pipelines.outline import outline

MODULE = '''"""Shapes."""
import os
from . import base

__all__ = ["Shape", "area"]


@base.register
class Shape(base.Thing, metaclass=Meta):
    """A shape.

    It has sides.
    """

    def area(self, *, scale: float = 1.0) -> float:
        """Size of the surface."""
        return scale

    def _hidden(self):
        """Not for others."""


async def area(x, /, *rest):
    """Area of x."""

    def inner():
        """Not seen from outside."""

def plain(): pass
'''


@pytest.fixture
def module():
    return make_document(MODULE, source="stdlib", path="stdlib/geo/shapes.py", domain="code", language="python")


def test_outline_reads_imports_definitions_and_lines():
    found = outline(MODULE)
    assert found.docstring == "Shapes." and found.error is None
    assert [(i.module, i.names, i.level) for i in found.imports] == [("os", (), 0), ("", ("base",), 1)]
    assert [(d.kind, d.name, d.signature) for d in found.definitions] == [
        ("class", "Shape", "class Shape(base.Thing, metaclass=Meta)"),
        ("function", "Shape.area", "def area(self, *, scale: float=1.0) -> float"),
        ("function", "Shape._hidden", "def _hidden(self)"),
        ("function", "area", "async def area(x, /, *rest)"),
    ]
    assert (found.definitions[0].first_line, found.definitions[0].last_line) == (8, 20)
    assert outline("def f(:").error.startswith("SyntaxError")
    assert outline("x = 1\0").error is not None


def test_imports_of_a_text_that_was_parsed_are_known(monkeypatch):
    texts = [f"import a{number}" for number in range(6)]
    monkeypatch.setattr(outlines, "NUM_KNOWN_IMPORTS", 4)
    outlines._KNOWN_IMPORTS.clear()
    for text in texts:
        outline(text)
    parsed = []
    monkeypatch.setattr(outlines, "outline", lambda text: parsed.append(text) or outline.__wrapped__(text))
    for text in reversed(texts):
        assert [item.module for item in outlines.imports_of(text)] == [text.removeprefix("import ")]
    assert parsed == [texts[1], texts[0]]


def test_docstrings_become_one_document_per_module_class_and_function(module):
    documents = embedded.docstring_documents([module])
    assert [d.meta["name"] for d in documents] == ["geo.shapes", "geo.shapes.Shape", "geo.shapes.area"]
    assert {d.path for d in documents} == {module.path}
    assert documents[1].text == (
        "class geo.shapes.Shape(base.Thing, metaclass=Meta)\n\nA shape.\n\nIt has sides.\n\n"
        "def geo.shapes.Shape.area(self, *, scale: float=1.0) -> float\n\nSize of the surface.\n\n"
        "def geo.shapes.Shape._hidden(self)\n\nNot for others.\n"
    )


def test_facts_are_public_and_keep_their_file(module):
    facts = embedded.library_facts([module])
    assert [fact.name for fact in facts] == ["geo.shapes.Shape", "geo.shapes.Shape.area", "geo.shapes.area"]
    assert facts[1].source == (
        'def area(self, *, scale: float = 1.0) -> float:\n    """Size of the surface."""\n    return scale\n'
    )
    assert facts[0].summary == "A shape." and facts[0].path == module.path
    assert facts[2].source.startswith("async def area(x, /, *rest):\n    ")


def test_package_documents_leave_out_licences_and_this_project(tmp_path):
    for name in ("internjax-1.0.dist-info/METADATA", "other-1.0.dist-info/METADATA", "other-1.0.dist-info/LICENSE.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Metadata-Version: 2.4\nName: it\n\nWhat it does.\n")
    (document,) = embedded.package_documents([tmp_path])
    assert document.path == "packages/other-1.0.dist-info/METADATA" and document.text == "What it does.\n"


def test_embedded_corpus_is_the_library_without_tests_and_imports_nothing():
    loaded = set(sys.modules)
    documents = embedded.stdlib_corpus()
    assert "antigravity" not in set(sys.modules) - loaded and "idlelib" not in set(sys.modules) - loaded
    paths = {d.path for d in documents if d.source == "stdlib"}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/asyncio/base_events.py"} <= paths
    assert not [p for p in paths if "/test/" in p or "/tests/" in p or "site-packages" in p or "sysconfigdata" in p]
    assert len({d.id for d in documents}) == len(documents)
    assert set(sources.by_source(documents)) == {"stdlib", "stdlib-docstrings", "pydoc-topics", "package-docs"}
    topic = next(d for d in documents if d.path == "pydoc/while")
    assert "while" in topic.text
    assert fingerprint(documents) == fingerprint(embedded.stdlib_corpus())
    facts = {fact.name: fact for fact in embedded.library_facts(documents)}
    gcd = facts["textwrap.dedent"]
    assert gcd.signature == "def dedent(text)" and gcd.source.startswith("def dedent(text):\n")
    assert in_held_out(gcd.path, fraction=0.5) == in_held_out("stdlib/textwrap.py", fraction=0.5)
