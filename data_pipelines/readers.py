"""Documents of one file, by its format: rows of JSONL, of a JSON array; whole texts.

A reader streams: a row, a batch of rows, or one text of at most MAX_ROW_BYTES is in memory at a time. A piece that
cannot be read raises ValueError "file:line: reason", or its message is handed to `on_bad_row` and it is left out.
Which files are read at all is said in `sources.py`; parquet and Arrow are in `tables.py`, web pages in `web_pages.py`,
members of archives in `archives.py`.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

import msgspec
import pyarrow as pa

from data_pipelines.code_languages import DATA, PROSE, UNKNOWN, language_of
from data_pipelines.document import Document, make_document
from data_pipelines.licence import is_licence_file

BadRow = Callable[[str], None] | None
"""Takes "file:line: reason" of what cannot be read; None raises it as ValueError instead."""
MAX_ROW_BYTES = 64 << 20
"""Longest line, longest text and longest web page that is read: so much of one row is in memory at a time."""
BUFFER_BYTES = 1 << 18
"""Read from a file at a time: of rows longer than that, `readline` puts the pieces together."""
MAX_ARRAY_BYTES = 256 << 20
"""Longest JSON array (a .json file is parsed whole), and longest parquet or Arrow file inside an archive."""
SKIPPED_FOLDERS = {"__pycache__", "node_modules"}
"""Of what is given, folders whose files nobody wrote there."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".tgz"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".text", ".markdown"}
MANIFESTS = {"go.mod", "Cargo.toml"}
"""Data files that say how the imports of a repository are meant (`imports.py`)."""
TEXT_FIELDS = {"text", "content"}
FIELDS = ("source", "domain", "language", "licence", "path")
TAKEN = frozenset({*FIELDS, "id"})
"""Fields that do not go to meta as they are; the text does not go there either."""
NUM_BYTES_OF_BINARY = 8000
"""A file with a NUL among its first bytes is no text."""
_SPACE = re.compile(r"[ \t\n\r]*")


class Row(NamedTuple):
    """One JSON object of a file, and where it stands: "file:line"."""

    place: str
    value: dict[str, Any]


class Line(NamedTuple):
    """The bytes of a line that is not blank, and where it stands: "file:line"."""

    place: str
    raw: bytes


class Described(NamedTuple):
    """What a row says of its document (`document.Document`), whose id is still to be made."""

    text: str
    source: str
    path: str
    domain: str
    language: str
    licence: str | None
    meta: dict[str, Any]


class Reading:
    """How far a file is read. Whoever reads it sets `position`, which gives how many of its bytes are read."""

    def __init__(self, size: int):
        self.size = size
        self.position: Callable[[], int] = lambda: 0

    def num_bytes(self) -> int:
        try:
            return min(self.position(), self.size)
        except ValueError:  # of a file that is closed: it was read to its end
            return self.size


class File(NamedTuple):
    """A file and what its documents are to bear.

    path: absolute, or the name of a data set; of a member of an archive: archive/member, which is how messages name it.
    name: "folder/sub/file.py" below a folder or archive that was given. repository: the beginning of the name that is
    the name of its repository. stream: the bytes of a member, where they do not lie at `path`. reading: is told how far
    it is read.
    """

    path: Path
    name: str
    repository: str | None = None
    stream: BinaryIO | None = None
    reading: Reading | None = None


def set_aside(message: str, on_bad_row: BadRow) -> None:
    """Hands the message on, or raises it as ValueError where there is nobody to take it."""
    if on_bad_row is None:
        raise ValueError(message)
    on_bad_row(message)


# --- bytes -----------------------------------------------------------------------------------------------------------


def existing(path: str | Path) -> Path:
    """The path of a file or folder, or ValueError that says it is missing and what lies beside it, or unreadable."""
    path = Path(path)
    if not os.path.exists(path):
        try:
            beside = f"{path.parent} holds {', '.join(sorted(os.listdir(path.parent))[:12]) or 'nothing'}"
        except OSError as error:
            beside = f"{path.parent} cannot be listed ({error.strerror})"
        raise ValueError(f"no such file or folder: {path}; {beside}; give an existing path")
    if not os.access(path, os.R_OK):
        raise ValueError(f"cannot read {path}: permission denied; change its permissions or give another path")
    if not path.is_dir() and (reason := refusal(path)):
        raise ValueError(f"{path}: {reason}; give a file or a folder")
    return path


def refusal(path: Path) -> str | None:
    """Why a name in a folder is no file that can be read, and read again; None where it is one."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return "a link that leads nowhere" if path.is_symlink() else f"cannot be read ({error.strerror})"
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a link to a folder; not followed"
    return "a pipe, a socket or a device; not read"


def given_file(path: str | Path) -> File:
    """An existing file that was given by itself."""
    path = existing(path)
    return File(path, path.name)


def files_below(base: Path, *, skip: set[str], on_bad_row: BadRow = None) -> Iterator[Path]:
    """Files, and links to folders, below a folder; sorted, hidden ones left out. A folder that cannot be listed is set
    aside.
    """

    def unlisted(error: OSError) -> None:
        set_aside(f"{error.filename}: cannot be listed ({error.strerror}); change its permissions", on_bad_row)

    for where, folders, names in os.walk(base, onerror=unlisted):
        names += [name for name in folders if os.path.islink(os.path.join(where, name))]
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(where, name) for name in sorted(names) if not name.startswith("."))


def uncompressed_suffix(path: PurePath) -> str:
    """The suffix that says what a file holds: ".json" of "a.json.gz", ".tar" of "a.tgz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".tgz"]:
        return ".tar"
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def opened(file: File | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed where its name says so (COMPRESSED); ValueError where they are damaged."""
    path, stream = (file.path, file.stream) if isinstance(file, File) else (file, None)
    with contextlib.ExitStack() as files:
        raw = files.enter_context(path.open("rb", buffering=BUFFER_BYTES)) if stream is None else stream
        if isinstance(file, File):
            follow(file, raw)
        try:
            yield files.enter_context(_decompressed(raw, path.suffix.lower()))
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if path.suffix.lower() not in COMPRESSED:
                raise
            raise ValueError(f"{path}: cannot be decompressed ({error}); copy it again") from error


def follow(file: File, raw: BinaryIO) -> None:
    """From now on the file is read as far as `raw` is."""
    if file.reading is not None:
        file.reading.position = raw.tell


def _decompressed(raw: BinaryIO, suffix: str) -> contextlib.AbstractContextManager[BinaryIO]:
    if suffix in (".gz", ".tgz"):
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return contextlib.nullcontext(raw)


def read_bytes(stream: Any, size: int) -> bytes:
    """The next `size` bytes, or those that are there; piecewise, because `read` reserves all that is asked for."""
    pieces = []
    while size and (piece := stream.read(min(size, 1 << 16))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


class UntilDamage:
    """A stream that ends where its bytes can no longer be decompressed, so that what comes before is read.

    damage: why it ended so, or None. tail: the last 512 bytes that were read.
    """

    def __init__(self, stream: BinaryIO):
        self._stream, self._place = stream, 0
        self.damage: Exception | None = None
        self.tail = b""

    def read(self, size: int = -1) -> bytes:
        if self.damage is not None:
            return b""
        try:
            raw = self._stream.read1(size)  # read would lose what it had decompressed before the damage
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            self.damage = error
            return b""
        self._place += len(raw)
        self.tail = (self.tail + raw[-512:])[-512:]
        return raw

    def tell(self) -> int:
        return self._place


# --- rows ------------------------------------------------------------------------------------------------------------


def row_documents(
    file: File, *, on_bad_row: BadRow = None, start: int = 0, stop: int = -1, first_line: int = 1
) -> Iterator[Document]:
    """A document per row of JSONL or of a JSON array; fields beyond text, FIELDS and id go to meta."""
    rows = _json_rows(file, on_bad_row, start=start, stop=stop, first_line=first_line)
    yield from _row_documents(rows, file, on_bad_row)


def documents_of_lines(lines: Iterable[Line], file: File, on_bad_row: BadRow) -> Iterator[Document]:
    """A document per line of a .jsonl."""
    yield from _row_documents(_rows_of_lines(lines, on_bad_row), file, on_bad_row)


def _row_documents(rows: Iterable[Row], file: File, on_bad_row: BadRow) -> Iterator[Document]:
    for row in rows:
        yield from document_of_row(row, path=path_of_row(row, file), source=file.path.stem, on_bad_row=on_bad_row)


def path_of_row(row: Row, file: File) -> str:
    """The path of a row's document where the row has none."""
    return f"{file.name}:{row.place.rpartition(':')[2]}"


def document_of_row(row: Row, *, path: str, source: str, on_bad_row: BadRow) -> Iterator[Document]:
    """The document of a row, or none where it is set aside."""
    found = described(row, path=path, source=source, on_bad_row=on_bad_row)
    if found is not None:
        yield make_document(**found._asdict())


def described(row: Row, *, path: str, source: str, on_bad_row: BadRow) -> Described | None:
    """What a row says of its document, or None where it is set aside. Fields that are null count as absent.

    The text is the field `text`, or, where there is none, `content`: WanJuan 1.0 has id and content, WanJuan-CC also
    title, language, date and scores. Rows of WanJuan's image-text part (img_list with content) are no text.
    """
    fields = row.value
    field = "content" if fields.get("text") is None and fields.get("content") is not None else "text"
    text = fields.get(field)
    if field == "content" and fields.get("img_list"):
        number = len(fields["img_list"])
        set_aside(f"{row.place}: not text: content interleaved with {number} images (img_list)", on_bad_row)
        return None
    if not isinstance(text, str):
        kind, names = type(text).__name__, ", ".join(sorted(fields)) or "none"
        lacks = f"field {field!r} is {kind}, wanted a string" if field in fields else "no field 'text' or 'content'"
        reason = f"{lacks}; the row has the fields {names}"
        set_aside(f"{row.place}: {reason}", on_bad_row)
        return None
    # A character has four bytes at most.
    if len(text) > MAX_ROW_BYTES // 4 and len(text.encode("utf-8", "surrogatepass")) > MAX_ROW_BYTES:
        set_aside(f"{row.place}: a text of more than {MAX_ROW_BYTES} bytes; split it", on_bad_row)
        return None
    given = {key: value for key in FIELDS if (value := fields.get(key)) is not None}
    for key, value in given.items():
        if not isinstance(value, str):
            set_aside(f"{row.place}: field {key!r} is {type(value).__name__}, wanted a string", on_bad_row)
            return None
    meta = {key: value for key, value in fields.items() if key not in TAKEN and key != field}
    if "id" in fields:
        meta["original_id"] = fields["id"]
    return Described(
        text,
        source=given.get("source", source),
        path=given.get("path", path),
        domain=given.get("domain", "web"),
        language=given.get("language", UNKNOWN),
        licence=given.get("licence"),
        meta=meta,
    )


def json_rows(path: str | Path, *, on_bad_row: BadRow = None) -> Iterator[Row]:
    """JSON objects of a .jsonl file with "file:line", or of the array in a .json file with "file:line[index]".

    Either may be compressed: .jsonl.gz, .json.zst.
    """
    yield from _json_rows(given_file(path), on_bad_row)


def parse_json(raw: bytes) -> Any:
    """Returns and raises what `json.loads` does, in less than half of the time."""
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # NaN, lone surrogates and UTF-16, which the standard library takes; or an error, whose message is its own.
        return json.loads(raw)


def parse_line(raw: bytes) -> Any:
    """`parse_json` of a line, which may begin with a byte order mark."""
    return parse_json(raw.removeprefix(b"\xef\xbb\xbf"))


def _json_rows(file: File, on_bad_row: BadRow, *, start: int = 0, stop: int = -1, first_line: int = 1) -> Iterator[Row]:
    """Of a .jsonl, bytes start:stop are read (stop -1: to the end)."""
    if uncompressed_suffix(file.path) == ".json":
        yield from _json_array(file, on_bad_row)
        return
    with opened(file) as content:
        lines = lines_of(file, content, on_bad_row, start=start, stop=stop, first_line=first_line)
        yield from _rows_of_lines(lines, on_bad_row)


def lines_of(
    file: File, content: BinaryIO, on_bad_row: BadRow, *, start: int = 0, stop: int = -1, first_line: int = 1
) -> Iterator[Line]:
    """The lines in bytes start:stop of an opened file; those that are too long to be held are set aside."""
    if start:
        content.seek(start)
    for number, raw in _lines(content, stop - start if stop >= 0 else None):
        place = f"{file.path}:{first_line + number}"
        if raw is None:
            set_aside(f"{place}: a line of more than {MAX_ROW_BYTES} bytes; split it", on_bad_row)
        elif not raw.isspace():
            yield Line(place, raw)


def _rows_of_lines(lines: Iterable[Line], on_bad_row: BadRow) -> Iterator[Row]:
    for place, raw in lines:
        try:
            value = parse_line(raw)
        except (ValueError, RecursionError) as error:
            reason = f"not valid JSON ({error}); wanted one JSON object per line; the line begins {raw[:60]!r}"
            set_aside(f"{place}: {reason}", on_bad_row)
            continue
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            set_aside(f"{place}: a JSON {type(value).__name__}; wanted one JSON object per line", on_bad_row)


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


def _json_array(file: File, on_bad_row: BadRow) -> Iterator[Row]:
    path = file.path
    with opened(file) as content:
        raw = read_bytes(content, MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        reason = f"one array of more than {MAX_ARRAY_BYTES} bytes; give one object per line in a file named .jsonl"
        set_aside(f"{path}: {reason}", on_bad_row)
        return
    try:
        elements = _elements(raw.decode(json.detect_encoding(raw), "surrogatepass").removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        if b"\n{" in raw.strip():
            reason = "one object per line belongs in a file named .jsonl"
        else:
            reason = "wanted one array of objects"
        set_aside(f"{path}: not valid JSON ({error}); {reason}", on_bad_row)
        return
    if file.repository and not any(isinstance(value, dict) and TEXT_FIELDS & value.keys() for _, value in elements):
        set_aside(f"{path}: not text: none of its values is an object with a text", on_bad_row)
        return
    for index, (line, value) in enumerate(elements):
        place = f"{path}:{line}[{index}]"
        if isinstance(value, dict):
            yield Row(place, value)
        else:
            set_aside(f"{place}: a JSON {type(value).__name__}; wanted an array of objects", on_bad_row)


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


# --- whole texts -----------------------------------------------------------------------------------------------------


def text_document(file: File, *, on_bad_row: BadRow = None) -> Iterator[Document]:
    """One document: the whole file, empty or not. Bytes that are not UTF-8 become U+FFFD, which the rules count.

    Of a repository, code is of the domain "code" with its language; so are its licence files, notebooks and MANIFESTS,
    which the stages of code ask for (`code_languages.detect_languages`, `licence.licences`); documentation is of the
    domain "reference". Any other text is of the domain "web", and its language is not known yet.
    """
    with opened(file) as content:
        raw = read_bytes(content, MAX_ROW_BYTES + 1)
    if len(raw) > MAX_ROW_BYTES:
        set_aside(f"{file.path}:1: one text of more than {MAX_ROW_BYTES} bytes; split it", on_bad_row)
        return
    is_utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    if not is_utf16 and b"\0" in raw[:NUM_BYTES_OF_BINARY]:
        set_aside(f"{file.path}: not text: there is a NUL among its first {NUM_BYTES_OF_BINARY} bytes", on_bad_row)
        return
    text = raw.decode("utf-16" if is_utf16 else "utf-8-sig", "replace")
    domain, language = _kind(file, text)
    yield make_document(
        text, source=file.path.parent.name or "file", path=file.name, domain=domain, language=language,
        meta={"repository": file.repository} if file.repository else {},
    )  # fmt: skip


def _kind(file: File, text: str) -> tuple[str, str]:
    """Domain and language of a text by its name; by its first line where the name says nothing."""
    name = bare_name(file.name)
    language = language_of(name, text)
    if language not in PROSE | DATA | {UNKNOWN} or language == "notebook":
        return "code", language
    if file.repository is None:
        return "web", UNKNOWN
    if is_licence_file(name):
        return "code", UNKNOWN
    if name.rpartition("/")[2] in MANIFESTS:
        return "code", language
    return "reference", UNKNOWN


def bare_name(name: str) -> str:
    """The name without the suffix of a compression."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in COMPRESSED - {".tgz"} else name
