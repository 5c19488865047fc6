import json
import shutil

import pytest

from data_pipelines import code, imports, python_imports
from data_pipelines.code_languages import detect_languages, language_of
from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.imports import import_graph


def edges(files):
    return {path: sorted(needs) for path, needs in import_graph(files).items() if needs}


JAVA = {
    "core/src/org/x/util/Text.java": "package org.x.util;\npublic class Text { static class Inner {} }",
    "core/src/org/x/util/Unused.java": "package org.x.util;\nclass Unused {}",
    "core/src/org/x/Base.java": "package org.x;\nimport java.util.List;\nimport org.x.util.*;\nclass Base { Text t; }",
    "core/src/org/x/A.java": "package org.x;\nimport org.x.util.Text.Inner;\nimport static org.x.Base.go;\nclass A {}",
    "core/src/org/x/B.java": "package org.x;\n/* import org.x.A; */\n// import org.x.A;\nimport org.x.B;\nclass B {}",
}
JAVA_EDGES = {
    "core/src/org/x/Base.java": ["core/src/org/x/util/Text.java"],
    "core/src/org/x/A.java": ["core/src/org/x/Base.java", "core/src/org/x/util/Text.java"],
}
GO = {
    "go.mod": "module example.com/tool/v2\n\ngo 1.22\n",
    "main.go": 'package main\nimport (\n\t"fmt"\n\tst "example.com/tool/v2/store"\n\t_ "example.com/tool/v2/plug"\n)\n'
    "func main() { fmt.Println(st.Open(), st.Limit) }",
    "store/open.go": "package store\nfunc Open() int { return 1 }\nfunc (s *S) Close() {}\n",
    "store/limits.go": "package store\nconst (\n\tLimit = 3\n\tOther = 4\n)\n",
    "store/unused.go": 'package store\nimport "os"\ntype Unused struct{}\n',
    "store/open_test.go": 'package store\nimport "example.com/tool/v2/plug"\n',
    "plug/plug.go": "package plug\n",
    "os/x.go": "package os\n",
}
GO_EDGES = {
    "main.go": ["plug/plug.go", "store/limits.go", "store/open.go"],
    "store/open_test.go": ["plug/plug.go"],
}
C = {
    "a/util.h": "#pragma once\n",
    "b/util.h": "#pragma once\n",
    "a/one.c": '#include "util.h"\n#include <stdio.h>\n',
    "b/deep/two.cpp": '# include "util.h"\n  #include "../util.h"\n',  # not beside it: b/ is nearer than a/
    "c/three.c": '#include "util.h"\n',  # a/ and b/ are equally near
    "c/four.c": '#include <a/util.h>\n#include "missing.h"\n',
    "include/lib/string.h": "",
    "include/lib/Shape.hpp": '#include "Shape.hpp"\n',
    "src/shape.cc": '#include <lib/shape.hpp>\n#include <string.h>\n/*\n#include "a/util.h"\n*/\n',
}
C_EDGES = {
    "a/one.c": ["a/util.h"],
    "b/deep/two.cpp": ["b/util.h"],
    "c/four.c": ["a/util.h"],
    "src/shape.cc": ["include/lib/Shape.hpp"],
}
CASE = {"x/Util.h": "", "x/util.h": "", "x/a.c": '#include "util.h"', "x/b.c": '#include "UTIL.H"'}
CASE_EDGES = {"x/a.c": ["x/util.h"]}  # of two that differ in case none is meant by a third spelling
JAVASCRIPT = {
    "src/app.ts": "import React from 'react';\nimport { Button, type Size as S } from './ui';\nimport './style.css';\n"
    "const lazy = () => import('./pages/home');",
    "src/ui/index.ts": "export { default as Button } from './Button';\nexport * from './sizes';\n",
    "src/ui/Button.tsx": "import {\n  Size,\n} from './sizes.js';\nexport default function Button() {}",
    "src/ui/sizes.ts": "export type Size = 1 | 2;",
    "src/pages/home.js": "const ui = require('../ui'), self = require('./home');\n// require('./gone')\n",
    "src/pages/index.jsx": "export * as home from './home';\nimport x from '/abs/ui';",
    "src/pages/HOME.js": "",
}
JAVASCRIPT_EDGES = {
    "src/app.ts": ["src/pages/home.js", "src/ui/Button.tsx", "src/ui/sizes.ts"],
    "src/ui/index.ts": ["src/ui/Button.tsx", "src/ui/sizes.ts"],
    "src/ui/Button.tsx": ["src/ui/sizes.ts"],
    "src/pages/home.js": ["src/ui/index.ts"],
    "src/pages/index.jsx": ["src/pages/home.js"],
}
RUST = {
    "Cargo.toml": '[package]\nedition = "2021"\nname = "my-tool"\n',
    "src/lib.rs": "pub mod model;\nmod error;\npub use crate::error::Failure;\nuse std::fmt;\n",
    "src/error.rs": "pub struct Failure;\n",
    "src/model/mod.rs": "mod layer;\nuse self::layer::Layer;\n",
    "src/model/layer.rs": "use crate::{Failure as F, // a, b\n    error::{self, Failure}};\nuse super::super::model;\n",
    "examples/run.rs": "use my_tool::model::layer::{Layer, Other};\nuse my_tool::Failure;\n",
}
RUST_EDGES = {
    "src/lib.rs": ["src/error.rs", "src/model/mod.rs"],
    "src/model/mod.rs": ["src/model/layer.rs"],
    "src/model/layer.rs": ["src/error.rs", "src/model/mod.rs"],
    "examples/run.rs": ["src/error.rs", "src/model/layer.rs"],
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(JAVA, JAVA_EDGES, id="java"),
        pytest.param(GO, GO_EDGES, id="go"),
        pytest.param(C, C_EDGES, id="c"),
        pytest.param(CASE, CASE_EDGES, id="case"),
        pytest.param(JAVASCRIPT, JAVASCRIPT_EDGES, id="javascript"),
        pytest.param(RUST, RUST_EDGES, id="rust"),
    ],
)
def test_imports_by_language(files, expected):
    assert edges(files) == expected


def test_go_without_a_module_file_goes_by_the_end_of_the_address():
    files = {path: text for path, text in GO.items() if path != "go.mod"}
    assert edges(files) == {path: needs for path, needs in GO_EDGES.items()}


def chained(language, name, others):
    """A file that imports the others, in the words of its language."""
    lines = {
        "py": "import {}\n", "java": "import p.{};\n", "c": '#include "{}.c"\n', "js": "import './{}';\n",
        "rs": "use crate::{};\n", "go": 'import "m.org/{}"\n',
    }  # fmt: skip
    head = {"java": "package p;\n", "go": f"package {name}\n"}.get(language, "")
    return head + "".join(lines[language].format(other) for other in others)


@pytest.mark.parametrize("language", ["py", "java", "c", "js", "rs", "go"])
@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"a": "b", "b": "c", "c": ""}, "cba"),
        ({"a": "bc", "b": "d", "c": "d", "d": ""}, "dbca"),
        ({"y": "x", "x": "y"}, "xy"),
        ({"m": "n", "n": "mz", "z": "", "a": "m"}, "zmna"),
        ({"a": "aq", "b": ""}, "ab"),  # itself, and a file that is not there
        ({"a": ""}, "a"),
    ],
)
def test_order_vectors_in_every_language(language, graph, expected):
    place = "{0}/{0}.go" if language == "go" else "{0}." + language
    texts = {place.format(name): chained(language, name, others) for name, others in graph.items()}
    texts |= {"rs": {"lib.rs": ""}, "go": {"go.mod": "module m.org\n"}}.get(language, {})
    order = code.order_files(texts, is_code={path: path not in ("lib.rs", "go.mod") for path in texts})
    assert [path for path in order if path not in ("lib.rs", "go.mod")] == [place.format(name) for name in expected]


def test_order_report_counts_and_refuses_what_is_out_of_order_outside_loops():
    graph = import_graph({"a.c": '#include "b.c"', "b.c": '#include "a.c"', "c.c": '#include "d.c"', "d.c": ""})
    report = code.order_report(graph, code.dependency_order(graph))
    assert report == code.OrderReport(4, 3, {1: 2, 2: 1}, violations=1, alphabetical_violations=2)
    with pytest.raises(RuntimeError, match="1 imports are out of order outside loops, the first: c.c imports d.c"):
        code.order_report(graph, sorted(graph))


FUNCTIONS = "".join(f"def f():\n    from {name} import x\n" for name in ("a.b.c.p", "b.c.p", "c.p", "p", "."))
STARS = "".join(f'export * from "../p{number}";\n' for number in range(6))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # Functions import from their own package by all of its names: 5**8 ways.
        ({"a/b/c/p/__init__.py": FUNCTIONS, "user.py": "from a.b.c.p import x"}, "a/b/c/p/__init__.py"),
        # Six folders hand on everything from all of them: 6**8 ways.
        ({f"p{n}/index.js": STARS for n in range(6)} | {"user.js": 'import {x} from "./p0";'}, "p0/index.js"),
    ],
)
def test_names_that_lead_round_in_circles_are_followed_once(texts, expected, monkeypatch):
    gone = []
    for module, name in ((imports, "_js_file"), (python_imports, "_module")):
        step = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, step=step: gone.append(given) or step(*given))
    assert edges(texts)["user.py" if "user.py" in texts else "user.js"] == [expected]
    assert len(gone) < 500


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("a/b.PY", "", "python"),
        ("Makefile", "", "makefile"),
        ("x/Dockerfile.dev", "", "dockerfile"),
        ("include/x.h", "int f(void);\n", "c"),
        ("include/x.h", "namespace a {\n", "cpp"),
        ("x.m", "#import <Foundation/Foundation.h>\n", "objectivec"),
        ("x.m", "function y = f(x)\n", "matlab"),
        ("run", "#!/usr/bin/env -S python3.11 -u\n", "python"),
        ("run", "#! /bin/bash\n", "shell"),
        ("run", "#!/usr/bin/env DEBUG=1 node\n", "javascript"),
        ("run", "#!\n", "und"),
        (".py", "", "und"),
        ("notes", "python\n", "und"),
    ],
)
def test_language_of(path, text, expected):
    assert language_of(path, text) == expected


def test_languages_are_entered_and_notebooks_become_markdown():
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "if x:\n\ty = '```'\n```", "outputs": [{"text": "secret"}]},
        {"cell_type": "code", "source": []},
    ]
    texts = {"a.ipynb": json.dumps({"cells": cells}), "b.ipynb": "[]", "c.rs": "fn f() {}\n", "d": "?"}
    given = [make_document(text, source="s", path=path, domain="code") for path, text in texts.items()]
    outcome = detect_languages(to_batch([*given, given[2]._replace(language="kept")]))
    found = to_documents(outcome.batch)
    assert [row.language for row in found] == ["markdown", "notebook", "rust", "und", "kept"]
    assert [row.domain for row in found] == ["reference", "reference", "code", "code", "code"]
    assert found[0].text == "# Title\ntext\n\n````python\nif x:\n\ty = '```'\n```\n````\n"
    assert list(outcome.reasons) == [None, "broken_notebook", None, None, None]
    assert [row.text for row in found[1:4]] == [row.text for row in given[1:]]


def test_a_repository_becomes_one_text_from_the_command(tmp_path, capsys):
    for path, text in RUST.items():
        (tmp_path / "r" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / path).write_text(text)
    (tmp_path / "r/src/README.md").write_text("Sources.")
    assert code.main([str(tmp_path / "r"), "--output", str(tmp_path / "r.md")]) == 0
    printed = capsys.readouterr().out
    assert "7 imports between them" in printed and "imports against the order: 1, all in loops" in printed
    text = (tmp_path / "r.md").read_text()
    places = [text.index(f"## {path}\n") for path in ("src/README.md", "src/error.rs", "src/lib.rs")]
    assert places == sorted(places) and "```rust\npub struct Failure;\n```\n" in text
    shutil.make_archive(str(tmp_path / "r"), "gztar", tmp_path, "r")
    assert code.main([str(tmp_path / "r.tar.gz"), "--output", str(tmp_path / "again.md")]) == 0
    assert (tmp_path / "again.md").read_text() == text and capsys.readouterr().out.startswith(printed.split("\n")[0])
    assert code.main([str(tmp_path / "none")]) == 1 and "no such file or folder" in capsys.readouterr().err
