"""Documents from files, and from the library that every Python carries with it.

The embedded corpus is the running interpreter's own standard library without its tests, its docstrings and its help
topics, and the documentation files of the installed packages. Modules are read with `ast`, never imported.
"""

import contextlib
import io
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.document import Document, make_document
from data_pipelines.outline import Definition, Outline, outline, string_table

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".text", ".markdown"}
LICENCE_NAME = re.compile(r"licen[cs]e|copying|notice|copyright|authors|top_level|entry_points|sources|requires", re.I)
_SPACE = re.compile(r"[ \t\n\r]*")
CODE_LANGUAGES = {
    ".py": "python", ".pyi": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".hpp": "cpp",
    ".java": "java", ".go": "go", ".rs": "rust", ".js": "javascript", ".ts": "typescript", ".sh": "shell",
}  # fmt: skip


class Row(NamedTuple):
    """One JSON object of a file, and where it stands: "file:line"."""

    place: str
    value: dict[str, Any]


# --- the embedded corpus ---------------------------------------------------------------------------------------------


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
    for path in sorted(_files(base, skip=SKIPPED_FOLDERS)):
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

    Licences, notices and lists of file names are left out: they say the same thing a hundred times.
    """
    if roots is None:
        roots = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    documents = []
    for base in map(Path, roots):
        for path in sorted(_files(base, skip={"__pycache__", "test", "tests", "testing"})):
            relative = path.relative_to(base).as_posix()
            if LICENCE_NAME.search(relative):
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


# --- files -----------------------------------------------------------------------------------------------------------


def read(paths: Iterable[str | Path], *, on_bad_row: Callable[[str], None] | None = None) -> list[Document]:
    """Documents of JSONL and parquet files, text files and folders, by what each path is.

    A row that cannot be read raises ValueError "file:line: reason", or is handed to `on_bad_row` and left out.
    """
    documents: list[Document] = []
    for given in paths:
        path = existing(given)
        if path.is_dir():
            documents.extend(folder(path, on_bad_row=on_bad_row))
        else:
            documents.extend(_file(path, path.name, on_bad_row=on_bad_row))
    if not documents:
        names = ", ".join(str(path) for path in paths) or "no path"
        raise ValueError(f"the corpus is empty: no document in {names}; wanted rows with a non-empty text")
    return documents


def existing(path: str | Path) -> Path:
    """The path, or ValueError that says it is missing or unreadable and what lies beside it."""
    path = Path(path)
    if not path.exists():
        near = sorted(item.name for item in path.parent.iterdir())[:12] if path.parent.is_dir() else []
        raise ValueError(f"no such file or folder: {path}; {path.parent} holds {', '.join(near) or 'nothing'}")
    if not os.access(path, os.R_OK):
        raise ValueError(f"cannot read {path}: permission denied; change its permissions or give another path")
    return path


def folder(path: str | Path, *, on_bad_row: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Documents of every readable file below a folder, by suffix, in sorted order; hidden folders are left out."""
    base = existing(path)
    for item in sorted(_files(base, skip={"__pycache__", "node_modules"})):
        if item.suffix.lower() in {".jsonl", ".json", ".parquet", *TEXT_SUFFIXES, *CODE_LANGUAGES}:
            yield from _file(item, f"{base.name}/{item.relative_to(base).as_posix()}", on_bad_row=on_bad_row)


def _file(path: Path, name: str, *, on_bad_row: Callable[[str], None] | None) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".json"}:
        yield from jsonl(path, name=name, on_bad_row=on_bad_row)
    elif suffix == ".parquet":
        yield from parquet(path, name=name)
    else:
        yield from plain_text(path, name=name)


def jsonl(
    path: str | Path,
    *,
    name: str | None = None,
    text_field: str = "text",
    on_bad_row: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """A document per row; fields beyond text, source, domain, language, licence go to meta."""
    for row in json_rows(path, on_bad_row=on_bad_row):
        text = row.value.get(text_field)
        if not isinstance(text, str):
            message = (
                f"{row.place}: field {text_field!r} is {type(text).__name__}, wanted a string; "
                f"the row has the fields {', '.join(sorted(row.value)) or 'none'}"
            )
            if on_bad_row is None:
                raise ValueError(message)
            on_bad_row(message)
            continue
        line = row.place.rpartition(":")[2]
        yield _from_fields(
            text, row.value, text_field, path=f"{name or Path(path).name}:{line}", source=Path(path).stem
        )


def json_rows(path: str | Path, *, on_bad_row: Callable[[str], None] | None = None) -> Iterator[Row]:
    """JSON objects of a .jsonl file with "file:line", or of the array in a .json file with "file:line[index]".

    Either may be compressed: .jsonl.gz, .json.zst.
    """
    path = existing(path)

    def bad(message: str) -> None:
        if on_bad_row is None:
            raise ValueError(message)
        on_bad_row(message)

    if uncompressed_suffix(path) == ".json":
        yield from _json_array(path, bad)
        return
    with opened(path) as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                bad(f"{place}: not valid JSON ({error}); wanted one JSON object per line; the line begins {raw[:60]!r}")
                continue
            if isinstance(value, dict):
                yield Row(place, value)
            else:
                bad(f"{place}: a JSON {type(value).__name__}; wanted one JSON object per line")


def _json_array(path: Path, bad: Callable[[str], None]) -> Iterator[Row]:
    with opened(path) as file:
        raw = file.read()
    try:
        elements = _elements(raw.decode(json.detect_encoding(raw), "surrogatepass").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if b"\n{" in raw.strip():
            bad(f"{path}: not valid JSON ({error}); one object per line belongs in a file named .jsonl")
        else:
            bad(f"{path}: not valid JSON ({error}); wanted one array of objects")
        return
    for index, (line, value) in enumerate(elements):
        place = f"{path}:{line}[{index}]"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            bad(f"{place}: a JSON {type(value).__name__}; wanted an array of objects")


def _elements(text: str) -> list[tuple[int, Any]]:
    """The elements of a JSON array (anything else is the only one), each with the line on which it begins."""
    start = _SPACE.match(text).end()
    if not text.startswith("[", start):
        return [(1 + text.count("\n", 0, start), json.loads(text))]
    decoder, found, line, at = json.JSONDecoder(), [], 1, 0
    here = _SPACE.match(text, start + 1).end()
    while not (text.startswith("]", here) and not found):
        line, at = line + text.count("\n", at, here), here
        value, end = decoder.raw_decode(text, here)
        found.append((line, value))
        here = _SPACE.match(text, end).end()
        if text.startswith("]", here):
            break
        if not text.startswith(",", here):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, here)
        here = _SPACE.match(text, here + 1).end()
    if (rest := _SPACE.match(text, here + 1).end()) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return found


def uncompressed_suffix(path: Path) -> str:
    """The suffix that says what a file holds: ".json" of "a.json.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in {".gz", ".zst"}:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name ends in .gz or .zst; ValueError where they are damaged."""
    suffix = path.suffix.lower()
    if suffix not in {".gz", ".zst"}:
        with path.open("rb") as file:
            yield file
        return
    import gzip
    import zlib

    try:
        if suffix == ".gz":
            with gzip.open(path) as file:
                yield file
        else:
            import pyarrow as pa

            with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream, io.BufferedReader(stream) as file:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be decompressed ({error}); copy it again") from error


def _from_fields(text: str, fields: dict[str, Any], text_field: str, *, path: str, source: str) -> Document:
    known = {text_field, "source", "domain", "language", "licence", "path"}
    given = {key: value for key, value in fields.items() if key in known and isinstance(value, str)}
    meta = {key: value for key, value in fields.items() if key not in known and key != "id"}
    if "id" in fields:
        meta["original_id"] = fields["id"]
    return make_document(
        text,
        source=given.get("source", source),
        path=given.get("path", path),
        domain=given.get("domain", "web"),
        language=given.get("language", "und"),
        licence=given.get("licence"),
        meta=meta,
    )


def plain_text(path: str | Path, *, name: str | None = None) -> Iterator[Document]:
    """One document: the whole file. Bytes that are not UTF-8 become U+FFFD, which the rules count."""
    path = existing(path)
    text = path.read_bytes().decode("utf-8-sig", "replace")
    language = CODE_LANGUAGES.get(path.suffix.lower())
    if text.strip():
        name = name or path.name
        yield make_document(
            text, source=path.parent.name or "file", path=name, domain="code" if language else "web",
            language=language or "und", meta={"repository": name.split("/")[0]} if "/" in name else {},
        )  # fmt: skip


def parquet(path: str | Path, *, name: str | None = None, text_field: str = "text") -> Iterator[Document]:
    """A document per row of a parquet file with a text column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = existing(path)
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy it again, or give a .jsonl") from None
    if text_field not in file.schema_arrow.names:
        raise ValueError(f"{path}: no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}")
    row = 0
    for batch in file.iter_batches():
        for fields in batch.to_pylist():
            row += 1
            if isinstance(fields[text_field], str):
                yield _from_fields(
                    fields[text_field], fields, text_field, path=f"{name or path.name}:{row}", source=path.stem
                )


def _files(base: Path, *, skip: set[str]) -> Iterator[Path]:
    for where, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def by_source(documents: Iterable[Document]) -> dict[str, int]:
    """Source -> number of documents."""
    return dict(Counter(document.source for document in documents))
