import pytest

from data_pipelines import code
from data_pipelines.document import make_document


def order(files, docs=()):
    texts = {**files, **dict.fromkeys(docs, "text\n")}
    return code.order_files(texts, is_code={path: path not in docs for path in texts})


def edges(files):
    return {path: sorted(needs) for path, needs in code.import_graph(files).items()}


@pytest.mark.parametrize(
    ("name", "files", "expected"),
    [
        ("chain", {"a.py": "import b", "b.py": "import c", "c.py": ""}, ["c.py", "b.py", "a.py"]),
        (
            "diamond",
            {"a.py": "import b, c", "b.py": "import d", "c.py": "import d", "d.py": ""},
            ["d.py", "b.py", "c.py", "a.py"],
        ),
        ("2-cycle starts alphabetically", {"y.py": "import x", "x.py": "import y"}, ["x.py", "y.py"]),
        (
            "what a loop needs and what needs it stay outside",
            {"m.py": "import n", "n.py": "import m, z", "z.py": "", "a.py": "import m"},
            ["z.py", "m.py", "n.py", "a.py"],
        ),
        ("self import", {"a.py": "import a"}, ["a.py"]),
        ("missing import", {"a.py": "import numpy, b.c.d", "b.py": ""}, ["b.py", "a.py"]),
        (
            "inside a function",
            {"a.py": "def f():\n  try:\n    import b\n  finally: 0", "b.py": ""},
            ["b.py", "a.py"],
        ),
        ("no edges: alphabetical", {"b.py": "", "a.py": "", "c.py": ""}, ["a.py", "b.py", "c.py"]),
        ("one file", {"only.py": "x = 1"}, ["only.py"]),
        ("unparsable file has no edges", {"a.py": "import b; print 'x'", "b.py": ""}, ["a.py", "b.py"]),
    ],
)
def test_order_vectors(name, files, expected):
    assert order(files) == expected, name


def test_relative_imports_cross_folders():
    files = {
        "p/__init__.py": "",
        "p/a/__init__.py": "",
        "p/a/x.py": "from ..b import y\nfrom . import w\nfrom .v import name",
        "p/a/w.py": "",
        "p/a/v.py": "from ... import outside",
        "p/b/__init__.py": "",
        "p/b/y.py": "from ..c import *",
        "p/c.py": "",
    }
    assert edges(files)["p/a/x.py"] == ["p/a/v.py", "p/a/w.py", "p/b/y.py"]
    assert edges(files)["p/b/y.py"] == ["p/c.py"]
    assert edges(files)["p/a/v.py"] == []
    found = order(files)
    assert found.index("p/c.py") < found.index("p/b/y.py") < found.index("p/a/x.py")


def test_names_of_a_package_lead_to_the_file_that_defines_them():
    files = {
        "p/__init__.py": "from .core import run\nfrom .core import other as alias\nVERSION = 1",
        "p/core.py": "def run(): pass",
        "use_run.py": "from p import run",
        "use_version.py": "from p import VERSION",
        "use_module.py": "from p import core",
        "use_dotted.py": "import p.core",
        "use_star.py": "from p import *",
    }
    found = edges(files)
    assert found["use_run.py"] == found["use_module.py"] == found["use_dotted.py"] == ["p/core.py"]
    assert found["use_version.py"] == found["use_star.py"] == ["p/__init__.py"]
    assert found["p/__init__.py"] == ["p/core.py"]


def test_folders_without_init_are_roots_and_scripts_see_their_neighbours_first():
    files = {
        "src/p/__init__.py": "",
        "src/p/m.py": "",
        "main.py": "import p.m",
        "tools/run.py": "import helper",
        "tools/helper.py": "",
        "helper.py": "",
    }
    assert edges(files)["main.py"] == ["src/p/m.py"]
    assert edges(files)["tools/run.py"] == ["tools/helper.py"]
    # A module inside a package is not a top-level one.
    assert edges(files | {"x.py": "import m"})["x.py"] == []


def test_loops_are_broken_inside_only():
    graph = {"a": {"c"}, "b": {"a"}, "c": {"b", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a", "e"}, "g": set()}
    graph = {path: frozenset(needs) for path, needs in graph.items()}
    assert code.components(graph) == [["a", "b", "c"], ["d", "e"], ["f"], ["g"]]
    found = code.dependency_order(graph)
    member = {path: i for i, part in enumerate(code.components(graph)) for path in part}
    for path, needs in graph.items():
        for other in needs:
            assert member[path] == member[other] or found.index(other) < found.index(path)
    assert found == ["d", "e", "a", "b", "c", "f", "g"]


def test_a_long_chain_needs_no_recursion():
    files = {f"m{i:05d}": frozenset([f"m{i + 1:05d}"] if i < 5000 else []) for i in range(5001)}
    assert code.dependency_order(files) == sorted(files, reverse=True)


def test_documents_come_before_the_first_code_file_of_their_folder():
    files = {"z/b.py": "import z.a", "z/a.py": "", "a.py": "import z.b", "z/__init__.py": ""}
    docs = ["README.md", "z/guide.md", "docs/deep/x.md"]
    found = order(files, docs)
    # docs/ holds no code, so its file goes where those of the folder above go.
    assert found == ["z/guide.md", "z/__init__.py", "z/a.py", "z/b.py", "README.md", "docs/deep/x.md", "a.py"]
    # A folder whose code lies further down: before the first file there.
    assert order({"x/y/m.py": "", "a.py": ""}, ["x/top.md"]) == ["a.py", "x/top.md", "x/y/m.py"]
    assert order({}, ["only.md"]) == ["only.md"]


def file(path, text, domain="code"):
    meta = {"repository": "r"}
    return make_document(text, source="s", path=f"r/{path}", domain=domain, language="python", meta=meta)


def test_order_documents_moves_files_of_a_repository_only():
    other = make_document("web page", source="s", path="w")
    given = [file("a.py", "import b"), other, file("b.py", ""), file("README.md", "hi", domain="web")]
    assert [d.path for d in code.order_documents(given)] == ["r/README.md", "w", "r/b.py", "r/a.py"]
    assert sorted(code.order_documents(given)) == sorted(given)


def test_markdown_keeps_every_byte_and_fences_hold():
    tricky = "x = '''\n```\ncode\n```\n'''\n"
    files = [file("README.md", "# Title\n", domain="web"), file("a.py", tricky), file("b.py", "def f():\n\treturn 1")]
    (text,) = code.markdown(files, title="r")
    assert text.text == (
        "# r\n\n## README.md\n\n# Title\n\n\n"
        "## a.py\n\n````python\n" + tricky + "````\n\n\n"
        "## b.py\n\n```python\ndef f():\n\treturn 1\n```\n\n"
    )
    parts = code.markdown(files, title="r", max_bytes=60)
    assert [part.path for part in parts] == ["r/0", "r/1", "r/2"]
    assert all(len(part.text) < 120 for part in parts)


class Watched(str):
    """A path that counts how often it is hashed or compared with another."""

    looks = 0

    def __eq__(self, other):
        Watched.looks += 1
        return str.__eq__(self, other)

    def __hash__(self):
        Watched.looks += 1
        return str.__hash__(self)


@pytest.mark.parametrize("shape", ["chain", "loop", "star"])
def test_the_work_of_ordering_grows_with_the_imports_alone(shape):
    def looks(size):
        paths = [Watched(f"{number:06d}") for number in range(size)]
        follow = {path: [after] for path, after in zip(paths, paths[1:])} | {paths[-1]: []}
        graph = {
            "chain": follow,
            "loop": follow | {paths[-1]: [paths[0]]},
            "star": {path: [paths[0]] for path in paths[1:]} | {paths[0]: paths[1:]},
        }[shape]
        graph = {path: frozenset(needs) for path, needs in graph.items()}
        Watched.looks = 0
        assert sorted(code.dependency_order(graph)) == paths
        return Watched.looks

    assert looks(600) < 2.2 * looks(300)
