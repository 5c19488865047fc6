"""The embedded corpus: the library that every Python carries with it, as documents and as facts.

It is the running interpreter's own standard library without its tests, its docstrings and its help topics, and the
documentation files of the installed packages. Modules are read with `ast`, never imported.
"""

import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from data_pipelines.document import Document, make_document
from data_pipelines.outline import Definition, Outline, outline, string_table
from data_pipelines.readers import files_below

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
OWN_METADATA = re.compile(r"internjax-[^/]*\.dist-info/METADATA")
"""The README of this project, every edit of which would shift what is measured on the corpus."""
LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice|copyright|authors|top_level|entry_points|sources|requires", re.I)


def stdlib_corpus() -> list[Document]:
    """The embedded corpus: modules ("stdlib"), their docstrings, help topics, installed packages' documentation.

    Sorted within each part, so that equal interpreters and packages give equal documents (`document.fingerprint`).
    """
    modules = stdlib_modules()
    return [*modules, *docstring_documents(modules), *topic_documents(modules), *package_documents()]


def stdlib_modules(root: str | Path | None = None) -> list[Document]:
    """One "code" document per module of the standard library, tests and per-machine build settings left out."""
    base = Path(root or sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(files_below(base, skip=SKIPPED_FOLDERS)):
        relative = path.relative_to(base).as_posix()
        if path.suffix != ".py" or relative.startswith(("config-", "_sysconfigdata")):
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        documents.append(
            make_document(
                text, source="stdlib", path=f"stdlib/{relative}", domain="code", language="python",
                licence="PSF-2.0", meta={"repository": "stdlib"},
            )
        )  # fmt: skip
    if not documents:
        raise ValueError(f"no Python module under {base}; wanted the standard library as source files; install it")
    return documents


def docstring_documents(modules: Iterable[Document]) -> list[Document]:
    """One "reference" document per module docstring, per class with its methods, per function, with its signature.

    The path stays the module's, so a split by file keeps a function and its description together.
    """
    documents: list[Document] = []
    for module in modules:
        if module.language != "python":
            continue
        found, name = outline(module.text), module_name(module.path)
        pages = [(name, f"{name}\n\n{found.docstring}\n")] if found.docstring else []
        pages += [(f"{name}.{top}", page) for top, page in _pages(found, name).items()]
        for qualified, page in pages:
            documents.append(
                make_document(
                    page, source=f"{module.source}-docstrings", path=module.path, domain="reference", language="en",
                    licence=module.licence, meta={"name": qualified},
                )
            )  # fmt: skip
    return list({document.id: document for document in documents}.values())


def _pages(found: Outline, module: str) -> dict[str, str]:
    """Top-level name -> its docstring page, followed by those of its members."""
    pages: dict[str, str] = {}
    for item in found.definitions:
        top = item.name.split(".")[0]
        pages[top] = pages.get(top, "") + ("\n" if top in pages else "") + _entry(item, module)
    return pages


def _entry(item: Definition, module: str) -> str:
    keyword = next(word for word in ("class ", "async def ", "def ") if item.signature.startswith(word))
    rest = item.signature[len(keyword) + len(item.name.rpartition(".")[2]) :]
    return f"{keyword}{module}.{item.name}{rest}\n\n{item.docstring}\n"


def topic_documents(modules: Iterable[Document]) -> list[Document]:
    """One "reference" document per help topic of `pydoc_data`."""
    return [
        make_document(
            text.strip("\n") + "\n", source="pydoc-topics", path=f"pydoc/{topic}", domain="reference", language="en",
            licence="PSF-2.0", meta={"name": topic},
        )
        for module in modules
        if module.path == "stdlib/pydoc_data/topics.py"
        for topic, text in string_table(module.text, "topics")
    ]  # fmt: skip


def package_documents(roots: Iterable[str | Path] | None = None) -> list[Document]:
    """One "reference" document per documentation file of the installed packages, and per long description.

    Licences, notices and lists of file names are left out: they say the same thing a hundred times. So is this project
    itself.
    """
    if roots is None:
        roots = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    documents = []
    for base in map(Path, roots):
        for path in sorted(files_below(base, skip={"__pycache__", "test", "tests", "testing"})):
            relative = path.relative_to(base).as_posix()
            if LICENCE_NAME.search(relative) or OWN_METADATA.fullmatch(relative):
                continue
            if path.name == "METADATA":
                text = path.read_text("utf-8", "replace").partition("\n\n")[2]
            elif path.suffix.lower() in {".md", ".rst"}:
                text = path.read_text("utf-8", "replace")
            else:
                continue
            if text.strip():
                documents.append(
                    make_document(
                        text, source="package-docs", path=f"packages/{relative}", domain="reference", language="en",
                        meta={"repository": relative.split("/")[0]},
                    )
                )  # fmt: skip
    return documents


def module_name(path: str) -> str:
    """Dotted name of a module path: "stdlib/json/decoder.py" -> "json.decoder"."""
    parts = path.removeprefix("stdlib/").removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


class Fact(NamedTuple):
    """What the library says about one of its functions: material for instruction pairs and evaluation items.

    path is that of the module's document, so that `document.in_held_out(path)` holds for facts as well.
    """

    name: str
    module: str
    signature: str
    summary: str
    docstring: str
    source: str
    path: str
    kind: str


def library_facts(documents: Iterable[Document]) -> list[Fact]:
    """A fact per documented public function and class in the Python documents, in their order."""
    facts = []
    for document in documents:
        if document.domain != "code" or document.language != "python":
            continue
        module, lines = module_name(document.path), document.text.splitlines(keepends=True)
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for item in outline(document.text).definitions:
            summary = item.docstring.strip().partition("\n")[0].strip()
            if any(part.startswith("_") for part in item.name.split(".")) or not summary:
                continue
            body = "".join(lines[item.first_line - 1 : item.last_line])
            facts.append(
                Fact(
                    f"{module}.{item.name}", module, item.signature, summary, item.docstring, _dedent(body),
                    document.path, item.kind,
                )
            )  # fmt: skip
    return facts


def _dedent(text: str) -> str:
    indent = len(text) - len(text.lstrip(" "))
    return "".join(line[indent:] if line[:indent] == " " * indent else line for line in text.splitlines(True))
