"""The licence of every file, by SPDX name: its own header line, else the licence file nearest above it.

Licence files are recognised by phrases that tell them apart; no licence text is carried along. What is not recognised
stays unknown rather than guessed.
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa

from data_pipelines.document import Corpus, Decision, Document, Fetch, to_documents

HEADER_CHARACTERS = 3000
"""Where an SPDX line is looked for."""
SPDX_LINE = re.compile(r"SPDX-License-Identifier:[ \t]*([\w.+()\- \t]+)")
LICENCE_FILE = re.compile(r"(?:un)?licen[cs]e|copying(?:\.lesser)?", re.IGNORECASE)
LICENCE_SUFFIX = re.compile(r"(?:[-_.](?:[\w.+-]+))?", re.IGNORECASE)
CHOICE_NAME = re.compile(r"licen[cs]e[-_.](?!(?:txt|md|rst|text|html)$)\w[\w.-]*", re.IGNORECASE)
"""LICENSE-MIT beside LICENSE-APACHE: the user chooses."""
EXPRESSION_WORD = re.compile(r"[()]|[^\s()]+")
VERSION_ENDINGS = ("-or-later", "-only", "+")
NOT_WORDS = re.compile(r"[^a-z0-9.]+")

MIT = "permission is hereby granted free of charge to any person obtaining a copy"
SOURCE_AND_BINARY = "redistribution and use in source and binary forms with or without modification"
FREELY = "distribute this software for any purpose with or without fee is hereby granted"
PHRASES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    # name, phrases that are all there, phrases of which none is: normalised, so lower case and without punctuation
    ("Apache-2.0", ("apache license version 2.0",), ()),
    ("AGPL-3.0", ("gnu affero general public license version 3 19 november 2007",), ()),
    ("LGPL-3.0", ("gnu lesser general public license version 3 29 june 2007",), ()),
    ("LGPL-2.1", ("gnu lesser general public license version 2.1 february 1999",), ()),
    ("GPL-3.0", ("gnu general public license version 3 29 june 2007",), ()),
    ("GPL-2.0", ("gnu general public license version 2 june 1991",), ()),
    ("MPL-2.0", ("mozilla public license version 2.0",), ()),
    ("EPL-2.0", ("eclipse public license v 2.0",), ()),
    ("BSL-1.0", ("boost software license version 1.0",), ()),
    ("PSF-2.0", ("python software foundation license version 2",), ()),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",), ()),
    ("CC0-1.0", ("cc0 1.0 universal",), ()),
    ("CC-BY-SA-4.0", ("attribution sharealike 4.0 international",), ()),
    ("CC-BY-4.0", ("attribution 4.0 international",), ("noncommercial", "noderivatives", "sharealike 4.0")),
    ("Zlib", ("is provided as is without any express or implied warranty", "altered source versions"), ()),
    ("BSD-4-Clause", (SOURCE_AND_BINARY, "all advertising materials mentioning features"), ()),
    ("BSD-3-Clause", (SOURCE_AND_BINARY, "endorse or promote products"), ("all advertising materials",)),
    ("BSD-2-Clause", (SOURCE_AND_BINARY,), ("endorse or promote products", "all advertising materials")),
    ("MIT", (MIT, "furnished to do so subject to the following conditions"), ("not be used in advertising",)),
    ("MIT-0", (MIT, "furnished to do so the software is provided as is"), ()),
    ("ISC", (f"{FREELY} provided that the above copyright notice",), ()),
    ("0BSD", (f"{FREELY} the software is provided as is",), ()),
)  # fmt: skip
PERMISSIVE = frozenset(
    "Apache-2.0 MIT MIT-0 BSD-2-Clause BSD-3-Clause ISC 0BSD Zlib BSL-1.0 PSF-2.0 Unlicense CC0-1.0 CC-BY-4.0".split()
)
"""Licences that ask for no more than a notice; the usual choice of what may be trained on."""
CANONICAL = {name.lower(): name for name in (*(row[0] for row in PHRASES), *PERMISSIVE)}


def is_licence_file(path: str) -> bool:
    """Whether the file's name is that of a licence text: LICENSE, LICENCE.txt, COPYING, LICENSE-MIT, UNLICENSE."""
    name = path.rpartition("/")[2]
    found = LICENCE_FILE.match(name)
    rest = name[found.end() :] if found else "?"
    return LICENCE_SUFFIX.fullmatch(rest) is not None and not rest.lower().endswith((".py", ".js", ".go", ".c", ".h"))


def licence_of_text(text: str) -> str | None:
    """Returns the licence that a licence file holds, several joined by AND, or None where no text is recognised."""
    plain = NOT_WORDS.sub(" ", text.lower()).replace(". ", " ")
    names = [
        name
        for name, wanted, unwanted in PHRASES
        if all(phrase in plain for phrase in wanted) and not any(phrase in plain for phrase in unwanted)
    ]
    return " AND ".join(names) or None


def spdx_of(text: str) -> str | None:
    """Returns the licence expression of the file's own SPDX line, or None."""
    found = SPDX_LINE.search(text, 0, HEADER_CHARACTERS)
    return canonical(found[1].rstrip(" \t-")) if found else None


def canonical(expression: str) -> str:
    """Returns a licence expression with the names as SPDX writes them and single spaces ("mit or apache-2.0")."""
    return " ".join(map(_canonical_word, EXPRESSION_WORD.findall(expression))).replace("( ", "(").replace(" )", ")")


def _canonical_word(word: str) -> str:
    if word.upper() in ("AND", "OR", "WITH"):
        return word.upper()
    ending = next((end for end in VERSION_ENDINGS if word.lower().endswith(end)), "")
    base = word[: len(word) - len(ending)]
    return CANONICAL.get(base.lower(), base) + ending


def allows(expression: str, allowed: Collection[str]) -> bool:
    """Whether an SPDX expression can be met with the allowed licences alone: one side of OR, both sides of AND.

    "X WITH exception" counts as X, "X+", "X-only" and "X-or-later" as X. What is no expression is not allowed.
    """
    names = {name.lower() for name in allowed}
    words = EXPRESSION_WORD.findall(expression)

    def side(at: int) -> tuple[bool, int]:
        value, at = term(at)
        while at < len(words) and words[at].upper() == "OR":
            other, at = term(at + 1)
            value = value or other
        return value, at

    def term(at: int) -> tuple[bool, int]:
        value, at = factor(at)
        while at < len(words) and words[at].upper() == "AND":
            other, at = factor(at + 1)
            value = value and other
        return value, at

    def factor(at: int) -> tuple[bool, int]:
        if at >= len(words) or words[at] == ")":
            raise IndexError
        if words[at] == "(":
            value, at = side(at + 1)
            if at >= len(words) or words[at] != ")":
                raise IndexError
            return value, at + 1
        name = words[at].lower()
        base = next((name.removesuffix(end) for end in VERSION_ENDINGS if name.endswith(end)), name)
        at += 1
        if at < len(words) and words[at].upper() == "WITH":
            at += 2
        return name in names or base in names, at

    try:
        value, end = side(0)
    except (IndexError, RecursionError):
        return False
    return value and end == len(words)


class Seen(NamedTuple):
    """What decides on a document's licence. folder and name: of its path. own: the licence entered, or its SPDX line.
    text: where it is a licence file of a repository, the licence that it holds ("unknown" if none is recognised).
    """

    repository: str | None
    folder: str
    name: str
    own: str | None
    text: str | None


def see(document: Document) -> Seen:
    """Returns what `find_licences` wants to know of a document."""
    repository = document.meta.get("repository")
    folder, _, name = document.path.rpartition("/")
    own = canonical(document.licence) if document.licence else spdx_of(document.text)
    holds = repository is not None and is_licence_file(document.path)
    text = (licence_of_text(document.text) or "unknown") if holds else None
    return Seen(None if repository is None else str(repository), folder, name, own, text)


def find_licences(seen: Iterable[Seen]) -> list[str | None]:
    """Returns the licence of each document: the one entered, its SPDX line, else that of the nearest licence files.

    Nearest: in its folder, else in the one above, up to the root of its repository (field `repository` of meta).
    Several licence files in a folder are a choice if each is named after its licence (LICENSE-MIT), else all hold.
    """
    seen = list(seen)
    texts: dict[str, dict[str, str]] = {}
    for document in seen:
        if document.text is not None:
            texts.setdefault(document.folder, {})[document.name] = document.text
    of_folder = {folder: _joined(found) for folder, found in texts.items()}
    return [document.own or _above(document, of_folder) for document in seen]


def _joined(found: Mapping[str, str]) -> str | None:
    """Returns the licence of a folder from its licence files; None where they hold nothing that is recognised."""
    distinct = list(dict.fromkeys(found[name] for name in sorted(found)))
    if len(distinct) == 1:
        return None if distinct == ["unknown"] else distinct[0]
    is_choice = all(CHOICE_NAME.fullmatch(name) for name in found)
    return (" OR " if is_choice else " AND ").join(f"({name})" if " " in name else name for name in distinct)


def _above(document: Seen, of_folder: Mapping[str, str | None]) -> str | None:
    repository, folder = document.repository, document.folder
    while repository and (folder == repository or folder.startswith(f"{repository}/")):
        if folder in of_folder:
            return of_folder[folder]
        folder = folder.rpartition("/")[0]
    return None


def licences(allowed: Collection[str] | None = None, *, unknown: Literal["keep", "drop"] = "keep") -> Corpus:
    """Returns the corpus stage that enters every row's licence and drops what is not allowed (None: all are).

    Licence files themselves go with the reason "licence_text" once they are read, so they run before deduplication.
    """
    if isinstance(allowed, str):
        raise ValueError(f"allowed is the text {allowed!r}; wanted a collection of SPDX names such as PERMISSIVE")
    return Corpus(_sketch, functools.partial(_resolve, allowed=allowed, unknown=unknown))


def _sketch(batch: pa.RecordBatch) -> pa.RecordBatch:
    seen = [see(document) for document in to_documents(batch)]
    columns = {name: pa.array([getattr(row, name) for row in seen], pa.string()) for name in Seen._fields}
    columns["given"] = batch.column("licence")
    return pa.RecordBatch.from_pydict({"row": pa.array(range(len(seen)), pa.int64()), **columns})


def _resolve(
    sketches: Sequence[pa.RecordBatch], fetch: Fetch, scratch: Path, *, allowed: Collection[str] | None, unknown: str
) -> Decision:
    table = pa.Table.from_batches(sketches)
    rows = table.column("row").to_numpy()
    seen = [Seen(*values) for values in zip(*(table.column(name).to_pylist() for name in Seen._fields))]
    found, goes, reasons, details = find_licences(seen), [], [], []
    for place, (document, licence) in enumerate(zip(seen, found, strict=True)):
        reason = None
        if document.text is not None:
            reason, detail = "licence_text", f"read as {licence or 'unknown'}"
        elif licence is None and unknown == "drop":
            reason = "licence_unknown"
            detail = "no entry, no SPDX line, no licence file that is recognised in its folder or above"
        elif licence is not None and allowed is not None and not allows(licence, allowed):
            reason, detail = "licence_not_allowed", licence
        if reason:
            goes.append(place)
            reasons.append(reason)
            details.append(detail)
    other = [place for place, given in enumerate(table.column("given").to_pylist()) if given != found[place]]
    values = [pa.array(rows[other], pa.int64()), pa.array([found[place] for place in other], pa.string())]
    changes = pa.record_batch(values, names=["row", "licence"])
    counts = Counter(licence or "unknown" for licence in found)
    return Decision(rows[goes], reasons, details, {"licences": dict(sorted(counts.items()))}, changes)
