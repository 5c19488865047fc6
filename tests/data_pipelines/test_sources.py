import json
import sys

import pytest

from data_pipelines import sources
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


def test_docstrings_become_one_document_per_module_class_and_function(module):
    documents = sources.docstring_documents([module])
    assert [d.meta["name"] for d in documents] == ["geo.shapes", "geo.shapes.Shape", "geo.shapes.area"]
    assert {d.path for d in documents} == {module.path}
    assert documents[1].text == (
        "class geo.shapes.Shape(base.Thing, metaclass=Meta)\n\nA shape.\n\nIt has sides.\n\n"
        "def geo.shapes.Shape.area(self, *, scale: float=1.0) -> float\n\nSize of the surface.\n\n"
        "def geo.shapes.Shape._hidden(self)\n\nNot for others.\n"
    )


def test_facts_are_public_and_keep_their_file(module):
    facts = sources.library_facts([module])
    assert [fact.name for fact in facts] == ["geo.shapes.Shape", "geo.shapes.Shape.area", "geo.shapes.area"]
    assert facts[1].source == (
        'def area(self, *, scale: float = 1.0) -> float:\n    """Size of the surface."""\n    return scale\n'
    )
    assert facts[0].summary == "A shape." and facts[0].path == module.path
    assert facts[2].source.startswith("async def area(x, /, *rest):\n    ")


def test_embedded_corpus_is_the_library_without_tests_and_imports_nothing():
    loaded = set(sys.modules)
    documents = sources.stdlib_corpus()
    assert "antigravity" not in set(sys.modules) - loaded and "idlelib" not in set(sys.modules) - loaded
    paths = {d.path for d in documents if d.source == "stdlib"}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "stdlib/asyncio/base_events.py"} <= paths
    assert not [p for p in paths if "/test/" in p or "/tests/" in p or "site-packages" in p or "sysconfigdata" in p]
    assert len({d.id for d in documents}) == len(documents)
    assert set(sources.by_source(documents)) == {"stdlib", "stdlib-docstrings", "pydoc-topics", "package-docs"}
    topic = next(d for d in documents if d.path == "pydoc/while")
    assert "while" in topic.text
    assert fingerprint(documents) == fingerprint(sources.stdlib_corpus())
    facts = {fact.name: fact for fact in sources.library_facts(documents)}
    gcd = facts["textwrap.dedent"]
    assert gcd.signature == "def dedent(text)" and gcd.source.startswith("def dedent(text):\n")
    assert in_held_out(gcd.path, fraction=0.5) == in_held_out("stdlib/textwrap.py", fraction=0.5)


def test_jsonl_rows_and_their_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one", "language": "en", "id": 7, "score": 0.5}, {"text": "two", "path": "x.md", "domain": "code"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    one, two = sources.read([path])
    assert (one.text, one.language, one.path, one.source) == ("one", "en", "rows.jsonl:1", "rows")
    assert one.meta == {"original_id": 7, "score": 0.5}
    assert (two.path, two.domain) == ("x.md", "code")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2: not valid JSON .*wanted one JSON object per line"),
        (b'{"text": "fine"}\n[1, 2]\n', r"bad\.jsonl:2: a JSON list; wanted one JSON object per line"),
        (b'{"text": "fine"}\n\n{"body": "x"}\n', r"bad\.jsonl:3: field 'text' is NoneType, .*the fields body"),
        (b'{"text": "fine"}\n\xff\xfe\n', r"bad\.jsonl:2: not valid JSON"),
        (b'{"text": "fine"}\n' + b"[" * 100_000, r"bad\.jsonl:2: not valid JSON"),
    ],
)
def test_bad_rows_are_named_and_may_be_set_aside(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.read([path])
    bad = []
    assert [d.text for d in sources.read([path], on_bad_row=bad.append)] == ["fine"]
    assert len(bad) == 1


def test_missing_empty_and_wrong_files_say_what_to_do(tmp_path):
    (tmp_path / "here.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no such file or folder: .*gone\.jsonl; .* holds here\.jsonl"):
        sources.read([tmp_path / "gone.jsonl"])
    with pytest.raises(ValueError, match="the corpus is empty: no document in .*here"):
        sources.read([tmp_path / "here.jsonl"])
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable parquet file"):
        sources.read([tmp_path / "x.parquet"])
    (tmp_path / "list.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"belongs in a file named \.jsonl"):
        sources.read([tmp_path / "list.json"])


def test_rows_of_a_json_array_stand_where_they_begin(tmp_path):
    path, rows = tmp_path / "a.json", [{"a": 1, "b": "]\n,"}, {}, 5, {"c": [{}, "x"]}]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        f"\ufeff\n {json.dumps(rows, indent=1)}\n",
        "[]",
        ' {"a": 1}',
    ):
        path.write_text(text, "utf-8")
        found, bad = [], []
        for place, value in sources.json_rows(path, on_bad_row=bad.append):
            line, index = map(int, place.removeprefix(f"{path}:").removesuffix("]").split("["))
            found.append((index, value))
            assert line <= 1 + text.count("\n")
        wanted = json.loads(text.removeprefix("\ufeff"))
        wanted = list(enumerate(wanted if isinstance(wanted, list) else [wanted]))
        assert found == [each for each in wanted if isinstance(each[1], dict)]
        assert len(bad) == len(wanted) - len(found)
    path.write_text('[\n {"a": 1},\n {"a": 2}\n]\n')
    assert [row.place for row in sources.json_rows(path)] == [f"{path}:2[0]", f"{path}:3[1]"]
    for text, message in (
        ("[1", "Expecting ',' delimiter"),
        ("[1 2]", "Expecting ','"),
        ("[1,]", "Expecting value"),
        ("[] x", "Extra data"),
        ("[,]", "Expecting value"),
        ("", "Expecting value"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a.json: not valid JSON \({message}.*wanted one array of objects"):
            list(sources.json_rows(path))


def test_folder_parquet_text_and_json_array(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "repo"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "sub" / ".git" / "x.py").write_text("hidden = 1\n")
    (root / "sub" / "m.py").write_bytes(b"x = '\xff'\n")
    (root / "README.md").write_text("\ufeffRead me\n", encoding="utf-8")
    (root / "photo.png").write_bytes(b"\x89PNG")
    (root / "a.json").write_text('[{"text": "row"}]')
    pq.write_table(pa.table({"text": ["p", None], "n": [1, 2]}), root / "t.parquet")
    bad = []
    found = {d.path: d for d in sources.read([root], on_bad_row=bad.append)}
    assert len(bad) == 1 and "t.parquet:2: field 'text' is NoneType" in bad[0]
    assert sorted(found) == ["repo/README.md", "repo/a.json:1[0]", "repo/sub/m.py", "repo/t.parquet:1"]
    assert found["repo/sub/m.py"].domain == "code" and found["repo/sub/m.py"].text == "x = '\ufffd'\n"
    assert found["repo/README.md"].text == "Read me\n" and found["repo/README.md"].meta == {"repository": "repo"}
    with pytest.raises(ValueError, match="no column 'text'; it has n"):
        pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
        sources.read([tmp_path / "n.parquet"])
