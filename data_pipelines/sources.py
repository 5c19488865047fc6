"""Documents from files, and from the library that every Python carries with it.

The embedded corpus is the running interpreter's own standard library without its tests, its docstrings and its help
topics, and the documentation files of the installed packages. Modules are read with `ast`, never imported.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_pipelines.chain import Unit
from data_pipelines.document import SCHEMA, Document, make_document, to_documents
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

BadRow = Callable[[str], None] | None
"""Takes "file:line: reason" of what cannot be read; None raises it as ValueError instead."""
MAX_ROW_BYTES = 64 << 20
"""Longest line, and longest text file, that is read: so much of one row is in memory at a time."""
MAX_ARRAY_BYTES = 256 << 20
"""Longest JSON array (a .json file is parsed whole)."""
READ_SUFFIXES = {".jsonl", ".json", ".parquet", *TEXT_SUFFIXES, *CODE_LANGUAGES}


class File(NamedTuple):
    """A file and the name that its documents are to bear: "folder/sub/file.py" below a folder that was given."""

    path: Path
    name: str


class Slice(NamedTuple):
    """Part of a file that can be read by itself: bytes start:stop of JSONL, whose first line has the number first_line;
    row groups start:stop of parquet; other files whole. digest: SHA-256 of these bytes.
    """

    file: File
    start: int
    stop: int
    first_line: int
    digest: str
    num_bytes: int


class Cut(NamedTuple):
    slices: list[Slice]
    bad: list[str]


def read(paths: Iterable[str | Path], *, on_bad_row: BadRow = None) -> list[Document]:
    """Documents of JSONL and parquet files, text files and folders, by what each path is, files in sorted order.

    A row that cannot be read raises ValueError "file:line: reason", or is handed to `on_bad_row` and left out.
    """
    paths = list(paths)
    documents = [
        document for file in find_files(paths, on_bad_row=on_bad_row) for document in _file(file, on_bad_row=on_bad_row)
    ]
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


def find_files(paths: Iterable[str | Path], *, on_bad_row: BadRow = None) -> list[File]:
    """The files to read, sorted, each once: those given, and below folders every one whose suffix says it is read.

    Hidden files and folders are left out; a link to a folder is not followed and is handed to `on_bad_row`. Of a folder
    that `data_pipelines.wanjuan` wrote, the kept documents are read and nothing else.
    """
    found: dict[str, File] = {}
    for given in sorted({str(path) for path in paths}):
        path = existing(given)
        for file in _below(path, on_bad_row) if path.is_dir() else [File(path, path.name)]:
            found.setdefault(os.path.realpath(file.path), file)
    return sorted(found.values(), key=lambda file: (file.name, str(file.path)))


def _below(base: Path, on_bad_row: BadRow) -> Iterator[File]:
    if (base / "ledger.json").is_file() and (base / "documents").is_dir():
        yield from (File(path, f"{base.name}/documents/{path.name}") for path in (base / "documents").glob("*.parquet"))
        return
    for path in _files(base, skip={"__pycache__", "node_modules"}):
        if path.is_symlink() and not path.is_file():
            reason = "a link to a folder; not followed" if path.is_dir() else "a link that leads nowhere"
            _set_aside(f"{path}: {reason}", on_bad_row)
        elif uncompressed_suffix(path) in READ_SUFFIXES:
            yield File(path, f"{base.name}/{path.relative_to(base).as_posix()}")


def _set_aside(message: str, on_bad_row: BadRow) -> None:
    if on_bad_row is None:
        raise ValueError(message)
    on_bad_row(message)


def cut(files: Iterable[File], *, size: int) -> Cut:
    """The files in slices of about `size` bytes, and the reasons why some cannot be read."""
    found = Cut([], [])
    for file in files:
        slices, bad = _cut(file, size)
        found.slices.extend(slices)
        found.bad.extend(bad)
    return found


def _cut(file: File, size: int) -> Cut:
    try:
        if file.path.suffix.lower() == ".jsonl":
            slices = list(_cut_lines(file, size))
            return Cut(slices, []) if slices else Cut([], [f"{file.path}:1: the file is empty"])
        with file.path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        num_bytes = file.path.stat().st_size
        if file.path.suffix.lower() == ".parquet" and num_bytes > size:
            return Cut(list(_cut_row_groups(file, size, digest)), [])
        return Cut([Slice(file, 0, -1, 1, digest, num_bytes)], [])
    except (OSError, ValueError) as error:
        return Cut([], [f"{file.path}: cannot be read ({error})"])


def _cut_lines(file: File, size: int) -> Iterator[Slice]:
    """Cuts at the first line end at or after `size` bytes; reads the file once, a megabyte at a time."""
    start = at = 0
    first = line = 1
    digest = hashlib.sha256()
    with file.path.open("rb") as content:
        while block := content.read(1 << 20):
            if at + len(block) - start >= size:
                end = block.find(b"\n", max(start + size - at - 1, 0)) + 1
                if end:
                    digest.update(memoryview(block)[:end])
                    line += block.count(b"\n", 0, end)
                    yield Slice(file, start, at + end, first, digest.hexdigest(), at + end - start)
                    start, first, digest = at + end, line, hashlib.sha256()
                    content.seek(start)
                    at = start
                    continue
            digest.update(block)
            line += block.count(b"\n")
            at += len(block)
    if at > start:
        yield Slice(file, start, at, first, digest.hexdigest(), at - start)


def _cut_row_groups(file: File, size: int, digest: str) -> Iterator[Slice]:
    groups = _open_parquet(file.path).metadata
    start = first = waiting = rows = 0
    for group in range(groups.num_row_groups):
        waiting += groups.row_group(group).total_byte_size
        rows += groups.row_group(group).num_rows
        if waiting >= size or group == groups.num_row_groups - 1:
            yield Slice(file, start, group + 1, first + 1, f"{digest}:{start}:{group + 1}", waiting)
            start, first, waiting = group + 1, rows, 0


def groups(slices: Iterable[Slice], *, size: int) -> Iterator[list[Slice]]:
    """The slices, in order, in groups of about `size` bytes."""
    waiting: list[Slice] = []
    num_bytes = 0
    for piece in slices:
        waiting.append(piece)
        num_bytes += piece.num_bytes
        if num_bytes >= size:
            yield waiting
            waiting, num_bytes = [], 0
    if waiting:
        yield waiting


def unit(slices: Sequence[Slice]) -> Unit:
    """The slices as a unit of a chain; numbers of lines and rows are those of the files."""
    digest = hashlib.sha256()
    for piece in slices:
        digest.update(
            f"{piece.file.path}\0{piece.file.name}\0{piece.first_line}\0{piece.digest}\n".encode("utf-8", "replace")
        )
    return Unit(digest.hexdigest(), functools.partial(_unit_documents, tuple(slices)))


def _unit_documents(slices: Sequence[Slice], on_bad_row: BadRow) -> Iterator[Document]:
    for piece in slices:
        yield from _file(piece.file, on_bad_row=on_bad_row, start=piece.start, stop=piece.stop, first=piece.first_line)


def _file(file: File, *, on_bad_row: BadRow, start: int = 0, stop: int = -1, first: int = 1) -> Iterator[Document]:
    path, name = file
    suffix = uncompressed_suffix(path)
    try:
        if suffix in {".jsonl", ".json"}:
            yield from jsonl(path, name=name, on_bad_row=on_bad_row, start=start, stop=stop, first_line=first)
        elif suffix == ".parquet":
            yield from parquet(path, name=name, on_bad_row=on_bad_row, start=start, stop=stop, first_row=first)
        else:
            yield from plain_text(path, name=name, on_bad_row=on_bad_row)
    except (ValueError, OSError) as error:
        if on_bad_row is None:
            raise ValueError(str(error)) from error
        on_bad_row(str(error) if str(error).startswith(str(path)) else f"{path}: cannot be read ({error})")


def jsonl(
    path: str | Path,
    *,
    name: str | None = None,
    text_field: str = "text",
    on_bad_row: BadRow = None,
    start: int = 0,
    stop: int = -1,
    first_line: int = 1,
) -> Iterator[Document]:
    """A document per row; fields beyond text, source, domain, language, licence, path go to meta."""
    path = existing(path)
    for row in json_rows(path, on_bad_row=on_bad_row, start=start, stop=stop, first_line=first_line):
        line = row.place.rpartition(":")[2]
        document = _from_fields(
            row.value, text_field, path=f"{name or path.name}:{line}", source=path.stem, place=row.place
        )
        if isinstance(document, Document):
            yield document
        else:
            _set_aside(document, on_bad_row)


def json_rows(
    path: str | Path, *, on_bad_row: BadRow = None, start: int = 0, stop: int = -1, first_line: int = 1
) -> Iterator[Row]:
    """JSON objects of a .jsonl file with "file:line", or of the array in a .json file with "file:line[index]".

    Either may be compressed: .jsonl.gz, .json.zst. Of a .jsonl, bytes start:stop are read (stop -1: to the end).
    """
    path = existing(path)
    if uncompressed_suffix(path) == ".json":
        yield from _json_array(path, on_bad_row)
        return
    with opened(path) as lines:
        if start:
            lines.seek(start)
        for number, raw in _lines(lines, stop - start if stop >= 0 else None):
            place = f"{path}:{first_line + number}"
            if raw is None:
                _set_aside(f"{place}: a line of more than {MAX_ROW_BYTES} bytes; split it", on_bad_row)
                continue
            if not raw.strip():
                continue
            try:
                value = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
            except (ValueError, RecursionError) as error:
                reason = f"not valid JSON ({error}); wanted one JSON object per line; the line begins {raw[:60]!r}"
                _set_aside(f"{place}: {reason}", on_bad_row)
                continue
            if isinstance(value, dict):
                yield Row(place, value)
            else:
                _set_aside(f"{place}: a JSON {type(value).__name__}; wanted one JSON object per line", on_bad_row)


def _lines(file: BinaryIO, size: int | None) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of the next `size` bytes; None for a line that is too long to be held."""
    read_bytes = number = 0
    while size is None or read_bytes < size:
        raw = file.readline(MAX_ROW_BYTES)
        if not raw:
            return
        read_bytes += len(raw)
        if len(raw) == MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_ROW_BYTES)
                read_bytes += len(raw)
            yield number, None
        else:
            yield number, raw
        number += 1


def _json_array(path: Path, on_bad_row: BadRow) -> Iterator[Row]:
    with opened(path) as file:
        raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        reason = f"one array of more than {MAX_ARRAY_BYTES} bytes; give one object per line in a file named .jsonl"
        _set_aside(f"{path}: {reason}", on_bad_row)
        return
    try:
        elements = _elements(raw.decode(json.detect_encoding(raw), "surrogatepass").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if b"\n{" in raw.strip():
            reason = "one object per line belongs in a file named .jsonl"
        else:
            reason = "wanted one array of objects"
        _set_aside(f"{path}: not valid JSON ({error}); {reason}", on_bad_row)
        return
    for index, (line, value) in enumerate(elements):
        place = f"{path}:{line}[{index}]"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            _set_aside(f"{place}: a JSON {type(value).__name__}; wanted an array of objects", on_bad_row)


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


FIELDS = ("source", "domain", "language", "licence", "path")


def _from_fields(fields: dict[str, Any], text_field: str, *, path: str, source: str, place: str) -> Document | str:
    """The document of a row, or "file:line: reason" where it is none. Fields that are null count as absent."""
    text = fields.get(text_field)
    if not isinstance(text, str):
        kind, names = type(text).__name__, ", ".join(sorted(fields)) or "none"
        return f"{place}: field {text_field!r} is {kind}, wanted a string; the row has the fields {names}"
    given = {key: fields[key] for key in FIELDS if fields.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            return f"{place}: field {key!r} is {type(value).__name__}, wanted a string"
    meta = {key: value for key, value in fields.items() if key not in FIELDS and key not in (text_field, "id")}
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


def plain_text(path: str | Path, *, name: str | None = None, on_bad_row: BadRow = None) -> Iterator[Document]:
    """One document: the whole file, empty or not. Bytes that are not UTF-8 become U+FFFD, which the rules count."""
    path = existing(path)
    with opened(path) as file:
        raw = file.read(MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        _set_aside(f"{path}:1: one text of more than {MAX_ROW_BYTES} bytes; split it", on_bad_row)
        return
    language, name = CODE_LANGUAGES.get(uncompressed_suffix(path)), name or path.name
    yield make_document(
        raw.decode("utf-8-sig", "replace"), source=path.parent.name or "file", path=name,
        domain="code" if language else "web", language=language or "und",
        meta={"repository": name.split("/")[0]} if "/" in name else {},
    )  # fmt: skip


def parquet(
    path: str | Path,
    *,
    name: str | None = None,
    text_field: str = "text",
    on_bad_row: BadRow = None,
    start: int = 0,
    stop: int = -1,
    first_row: int = 1,
) -> Iterator[Document]:
    """A document per row of a parquet file with a text column (row groups start:stop; stop -1: to the last).

    Rows of this project's own schema are taken as they are, with their ids.
    """
    path = existing(path)
    file = _open_parquet(path)
    if text_field not in file.schema_arrow.names:
        raise ValueError(f"{path}: no column {text_field!r}; it has {', '.join(file.schema_arrow.names)}")
    groups = range(start, file.num_row_groups if stop < 0 else stop)
    row = first_row - 1
    for batch in file.iter_batches(256, row_groups=list(groups)):
        if batch.schema.equals(SCHEMA):
            yield from to_documents(batch)
            continue
        for fields in batch.to_pylist():
            row += 1
            document = _from_fields(
                fields, text_field, path=f"{name or path.name}:{row}", source=path.stem, place=f"{path}:{row}"
            )
            if isinstance(document, Document):
                yield document
            else:
                _set_aside(document, on_bad_row)


def _open_parquet(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); copy it again, or give a .jsonl") from None


def _files(base: Path, *, skip: set[str]) -> Iterator[Path]:
    """Files, and links to folders, below a folder."""
    for where, folders, names in os.walk(base):
        names += [name for name in folders if os.path.islink(os.path.join(where, name))]
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def by_source(documents: Iterable[Document]) -> dict[str, int]:
    """Source -> number of documents."""
    return dict(Counter(document.source for document in documents))
