import pytest

from data_pipelines import licence
from data_pipelines.chain import Sizes
from data_pipelines.document import Stage, make_document
from data_pipelines.ledger import Ledger, fates
from data_pipelines.wanjuan import run_chain

# The phrases that tell licences apart, in the case, marks and line breaks of the originals.
GRANT = "Permission is hereby granted, free of charge, to any person obtaining a copy\nof X to whom it is\n"
MIT = GRANT + "furnished to do so, subject to the following conditions:\nThe above copyright notice"
BSD = "Redistribution and use in source and binary forms, with or without\nmodification, are permitted"
ISC = "Permission to use, copy, modify, and/or distribute this software for any\npurpose with or without fee is hereby "
ISC += "granted"


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("MIT", MIT),
        ("MIT-0", GRANT + 'furnished to do so.\n\nTHE SOFTWARE IS PROVIDED "AS IS"'),
        (None, MIT + " X. Its name shall not be used in advertising."),
        ("BSD-2-Clause", BSD),
        ("BSD-3-Clause", BSD + "\nto endorse or\n   promote products"),
        ("BSD-4-Clause", BSD + " to endorse or promote products. All advertising materials mentioning features"),
        ("ISC", ISC + ", provided that the above copyright notice"),
        ("0BSD", ISC + '.\n\nTHE SOFTWARE IS PROVIDED "AS IS"'),
        ("Apache-2.0", "                 Apache License\n           Version 2.0, January 2004"),
        ("GPL-3.0", "GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007"),
        ("LGPL-3.0", "GNU LESSER GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007"),
        ("MPL-2.0", "Mozilla Public License Version 2.0\nthe GNU Lesser General Public License, Version 2.1, or"),
        ("Apache-2.0 AND MIT", "Apache License, Version 2.0\n" + MIT),
        (None, "All rights reserved."),
    ],
)
def test_licence_texts(expected, text):
    assert licence.licence_of_text(text) == expected


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("r/LICENSE", True),
        ("r/licence.md", True),
        ("r/COPYING.LESSER", True),
        ("r/LICENSE-MIT", True),
        ("r/UNLICENSE", True),
        ("r/license.py", False),
        ("r/licensed.txt", False),
        ("r/LICENSE/a.c", False),
    ],
)
def test_names_of_licence_files(path, expected):
    assert licence.is_licence_file(path) == expected


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("mit", True),
        ("GPL-2.0-only OR MIT", True),
        ("GPL-2.0 AND MIT", False),
        ("MIT AND (GPL-2.0 OR Apache-2.0)", True),
        ("GPL-2.0 OR MIT AND LGPL-3.0", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT", False),
        ("MIT Apache-2.0", False),
        ("MIT OR", False),
        ("", False),
    ],
)
def test_expressions(expression, expected):
    assert licence.allows(expression, {"MIT", "Apache-2.0"}) == expected
    assert licence.allows("GPL-2.0-or-later", {"GPL-2.0"}) and licence.canonical("mit or (isc)") == "MIT OR (ISC)"


def test_every_file_gets_the_nearest_licence_and_what_is_not_allowed_goes():
    texts = {
        "r/LICENSE": MIT,
        "r/a.c": "int a;",
        "r/own.c": "// SPDX-License-Identifier: gpl-2.0-only OR apache-2.0 */\nint a;",
        "r/deep/er/b.c": "int b;",
        "r/third/COPYING": "GNU GENERAL PUBLIC LICENSE Version 2, June 1991",
        "r/third/c.c": "int c;",
        "r/odd/LICENSE.txt": "Ask me.",
        "r/odd/d.c": "int d;",
        "rr/e.c": "int e;",
        "two/LICENSE-MIT": MIT,
        "two/LICENSE-GPL": "GNU GENERAL PUBLIC LICENSE Version 2, June 1991",
        "two/g.rs": "fn g() {}",
    }
    documents = [
        make_document(text, source="s", path=path, domain="code", meta={"repository": path.split("/")[0]})
        for path, text in texts.items()
    ]
    documents += [
        make_document("int f;", source="s", path="f.c", licence="bsd-3-clause"),
        make_document("text", source="s", path="x/LICENSE"),
    ]
    found, ledger = {}, Ledger()
    for document in run_chain(documents, [stage(licence.PERMISSIVE, unknown="drop")], ledger):
        found[document.path] = document.licence
    found |= {fate.path: (fate.reason, fate.detail) for fate in fates(ledger)}
    assert found == {
        "r/LICENSE": ("licence_text", "read as MIT"),
        "r/a.c": "MIT",
        "r/own.c": "GPL-2.0-only OR Apache-2.0",
        "r/deep/er/b.c": "MIT",
        "r/third/COPYING": ("licence_text", "read as GPL-2.0"),
        "r/third/c.c": ("licence_not_allowed", "GPL-2.0"),
        "r/odd/LICENSE.txt": ("licence_text", "read as unknown"),
        "r/odd/d.c": UNKNOWN,
        "rr/e.c": UNKNOWN,
        "two/LICENSE-MIT": ("licence_text", "read as GPL-2.0 OR MIT"),
        "two/LICENSE-GPL": ("licence_text", "read as GPL-2.0 OR MIT"),
        "two/g.rs": "GPL-2.0 OR MIT",
        "f.c": "BSD-3-Clause",
        "x/LICENSE": UNKNOWN,  # no repository: a text like any other
    }
    assert ledger.reports["licences"]["licences"] == {"BSD-3-Clause": 1, "GPL-2.0": 2, "GPL-2.0 OR MIT": 3} | {
        "GPL-2.0-only OR Apache-2.0": 1, "MIT": 3, "unknown": 4,
    }  # fmt: skip
    # Cut anywhere, the same: a licence file may lie in another part than the files that it is of.
    ledger = Ledger()
    kept = run_chain(documents, [stage(None)], ledger, sizes=Sizes(unit_bytes=1, batch_rows=1))
    assert {fate.reason for fate in fates(ledger)} == {"licence_text"} and len(kept) == len(documents) - 5
    assert {document.path: document.licence for document in kept}["r/deep/er/b.c"] == "MIT"
    with pytest.raises(ValueError, match="wanted a collection of SPDX names"):
        licence.licences("MIT")


UNKNOWN = ("licence_unknown", "no entry, no SPDX line, no licence file that is recognised in its folder or above")


def stage(allowed, **how):
    return Stage("licences", "corpus", licence.licences(allowed, **how))
