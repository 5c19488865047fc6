"""Finds what was given, cuts it into slices that can be read by themselves, and reads these: where every corpus begins.

    FILE.jsonl FILE.json               rows with a text (readers.py); FILE.parquet, FILE.arrow as well
    FILE.warc FILE.html                web pages, their main text (web_pages.py); FILE.wet their extracted texts
    FILE.tar FILE.zip                  the repository in the archive, read as a folder is (archives.py)
    FOLDER                             every file in it whose name, or #! line, says that it is text or one of the above
    any other FILE                     one text
    hf:ORG/NAME modelscope:ORG/NAME datasets:NAME       a named data set (rows.py); FOLDERs that save_to_disk wrote too
    embedded                           the standard library of this Python (embedded.py)

All may be compressed (.gz, .bz2, .xz, .zst, .tgz), but parquet, Arrow and zip, which are by themselves.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines import embedded, rows
from data_pipelines.archives import ARCHIVE_SUFFIXES, DAMAGE, member_files
from data_pipelines.chain import Sizes, Unit
from data_pipelines.code_languages import DATA, UNKNOWN, language_of
from data_pipelines.document import Document, fingerprint
from data_pipelines.json_lines import row_batches
from data_pipelines.licence import is_licence_file
from data_pipelines.readers import (
    MANIFESTS,
    SKIPPED_FOLDERS,
    TEXT_SUFFIXES,
    BadRow,
    File,
    Reading,
    bare_name,
    document_of_row,
    existing,
    files_below,
    refusal,
    row_documents,
    set_aside,
    text_document,
    uncompressed_suffix,
)
from data_pipelines.tables import arrow_documents, open_parquet, parquet_documents
from data_pipelines.web_pages import html_document, warc_documents

WHAT_IS_READ = (
    "JSONL, parquet, Arrow, WARC, HTML, text, folders, repositories as folders or archives, hf:ORG/NAME, "
    "datasets:NAME, embedded (the standard library)"
)
"""For the help of a command that takes these."""
EMBEDDED = "embedded"
ROW_SUFFIXES = {".jsonl", ".json"}
WARC_SUFFIXES = {".warc", ".wet"}
HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mkv", ".avi", ".mov", ".flv", ".webm", ".wmv", ".mpg", ".mpeg"}
"""WanJuan's video part: said to be no text rather than passed over."""
READ_SUFFIXES = {
    *ROW_SUFFIXES, *WARC_SUFFIXES, *HTML_SUFFIXES, *VIDEO_SUFFIXES, *TEXT_SUFFIXES, ".parquet", ".arrow"
}  # fmt: skip
HEAD_BYTES = 256
"""In which a `#!` line is looked for, where the name of a file says nothing."""


class Slice(NamedTuple):
    """Part of a file that can be read by itself: bytes start:stop of JSONL, whose first line has the number first_line;
    row groups start:stop of parquet; rows start:stop of a named data set; other files whole. digest: SHA-256 of these
    bytes, or of what they are part of.
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


Progress = Callable[[str, int, int], None]
"""Is told (what, done, of how many)."""


def stream(
    paths: Iterable[str | Path],
    *,
    on_bad_row: BadRow = None,
    progress: Progress = lambda label, done, total: None,
) -> Iterator[Document]:
    """Documents of files, folders and named data sets, by what each is, files in sorted order, one at a time.

    A piece that cannot be read raises ValueError "file:line: reason", or is handed to `on_bad_row` and left out.
    progress is told bytes of the files, compressed or not, with every document.
    """
    files = find_files(paths, on_bad_row=on_bad_row)
    readings = [Reading(_size(file)) for file in files]
    before, total = 0, sum(reading.size for reading in readings)
    for file, reading in zip(files, readings, strict=True):
        for document in _file(file._replace(reading=reading), on_bad_row=on_bad_row):
            if total:
                progress("bytes read", min(before + reading.num_bytes(), total - 1), total)
            yield document
        before += reading.size
    if total:
        progress("bytes read", total, total)


def _size(file: File) -> int:
    """Bytes of a file; 0 for a data set that is given by its name, and where it is gone."""
    try:
        return 0 if is_name(str(file.path)) else file.path.stat().st_size
    except OSError:
        return 0


def read(paths: Iterable[str | Path], *, on_bad_row: BadRow = None) -> list[Document]:
    """All documents that `stream` gives. Raises ValueError where there is none."""
    paths = list(paths)
    documents = list(stream(paths, on_bad_row=on_bad_row))
    if not documents:
        names = ", ".join(str(path) for path in paths) or "no path"
        raise ValueError(f"the corpus is empty: no document in {names}; wanted rows with a non-empty text")
    return documents


# --- finding ---------------------------------------------------------------------------------------------------------


def find_files(paths: Iterable[str | Path], *, on_bad_row: BadRow = None) -> list[File]:
    """The files to read, sorted, each once, their paths absolute: those given, and of folders every one that is read.

    Hidden files and folders are left out; a link to a folder, which is not followed, a folder that cannot be listed and
    what is no file (a pipe, say) are handed to `on_bad_row`. Of a folder that
    `data_pipelines.wanjuan` wrote, the kept documents are read and nothing else.
    """
    found: dict[str, File] = {}
    for given in sorted({str(path) for path in paths}):
        if is_name(given):
            found.setdefault(given, File(Path(given), given))
            continue
        # Absolute, because the workers of a cluster run in folders of their own.
        path = Path(os.path.abspath(existing(given)))
        for file in _below(path, on_bad_row) if path.is_dir() else [File(path, path.name)]:
            found.setdefault(os.path.realpath(file.path), file)
    return sorted(found.values(), key=lambda file: (file.name, str(file.path)))


def is_name(given: str) -> bool:
    """Whether this names a data set rather than a path; ./embedded is a path."""
    return given == EMBEDDED or rows.is_name(given)


def _below(base: Path, on_bad_row: BadRow) -> Iterator[File]:
    if (base / "ledger.json").is_file() and (base / "documents").is_dir():
        yield from (File(path, f"{base.name}/documents/{path.name}") for path in (base / "documents").glob("*.parquet"))
        return
    repositories, saved = {base: base.name}, {}
    for path in files_below(base, skip=SKIPPED_FOLDERS, on_bad_row=on_bad_row):
        name, folder = f"{base.name}/{path.relative_to(base).as_posix()}", path.parent
        if reason := refusal(path):
            set_aside(f"{path}: {reason}", on_bad_row)
            continue
        if folder not in saved:
            saved[folder] = _saved_files(folder)
        if saved[folder] is not None and path.name not in saved[folder]:
            continue
        if is_read(name) or _has_no_suffix(name) and language_of(name, _head(File(path, name))) != UNKNOWN:
            yield File(path, name, _repository(folder, base, repositories))


def _repository(folder: Path, base: Path, known: dict[Path, str]) -> str:
    """The name of the nearest folder above that is a repository of git, else of the folder that was given."""
    if folder not in known:
        own = f"{base.name}/{folder.relative_to(base).as_posix()}"
        known[folder] = own if (folder / ".git").exists() else _repository(folder.parent, base, known)
    return known[folder]


def _saved_files(folder: Path) -> set[str] | None:
    """The files with rows of a folder that `datasets` saved (its own records and caches are none); None elsewhere."""
    if (folder / "dataset_dict.json").is_file():
        return set()
    if not (folder / "state.json").is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        return {file["filename"] for file in state["_data_files"]}
    except (ValueError, KeyError, TypeError, OSError):
        return None


def is_read(name: str) -> bool:
    """Whether the name of a file in a folder or archive says that it is read: a format, a text, code, a licence."""
    suffix = uncompressed_suffix(PurePosixPath(name))
    if suffix in READ_SUFFIXES | ARCHIVE_SUFFIXES:
        return True
    bare = bare_name(name)
    return is_licence_file(bare) or bare.rpartition("/")[2] in MANIFESTS or language_of(bare) not in DATA | {UNKNOWN}


def _has_no_suffix(name: str) -> bool:
    return "." not in name.rpartition("/")[2]


def _head(file: File) -> str:
    """How a file begins, nothing of a stream being used up."""
    if file.stream is not None:
        raw = file.stream.peek(HEAD_BYTES)[:HEAD_BYTES]
    else:
        try:
            with file.path.open("rb") as content:
                raw = content.read(HEAD_BYTES)
        except OSError:
            return ""
    return raw.decode("utf-8", "replace")


# --- cutting ---------------------------------------------------------------------------------------------------------


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
        if is_name(str(file.path)):
            return Cut(list(_cut_named(file, size)), [])
        if uncompressed_suffix(file.path) in ROW_SUFFIXES and not file.path.stat().st_size:
            return Cut([], [f"{file.path}:1: the file is empty"])
        if file.path.suffix.lower() == ".jsonl":
            return Cut(list(_cut_lines(file, size)), [])
        with file.path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        num_bytes = file.path.stat().st_size
        if file.path.suffix.lower() == ".parquet" and num_bytes > size:
            return Cut(list(_cut_row_groups(file, size, digest)), [])
        return Cut([Slice(file, 0, -1, 1, digest, num_bytes)], [])
    except (OSError, ValueError) as error:
        return Cut([], [_about(file, error)])


def _about(file: File, error: Exception) -> str:
    return str(error) if str(error).startswith(str(file.path)) else f"{file.path}: cannot be read ({error})"


def _cut_named(file: File, size: int) -> Iterator[Slice]:
    name = str(file.path)
    if name == EMBEDDED:
        documents = embedded.stdlib_corpus()
        yield Slice(file, 0, -1, 1, fingerprint(documents), sum(len(document.text) for document in documents))
        return
    found = rows.extent(name)
    step = max(1, found.num_rows * size // max(found.num_bytes, 1))
    for start in range(0, found.num_rows, step):
        stop = min(start + step, found.num_rows)
        num_bytes = found.num_bytes * (stop - start) // found.num_rows
        yield Slice(file, start, stop, start + 1, f"{found.digest}:{start}:{stop}", num_bytes)


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
                    line += _num_newlines(block, end)
                    yield Slice(file, start, at + end, first, digest.hexdigest(), at + end - start)
                    start, first, digest = at + end, line, hashlib.sha256()
                    content.seek(start)
                    at = start
                    continue
            digest.update(block)
            line += _num_newlines(block, len(block))
            at += len(block)
    if at > start:
        yield Slice(file, start, at, first, digest.hexdigest(), at - start)


def _num_newlines(block: bytes, end: int) -> int:
    """Of block[:end]; several times as fast as `bytes.count` where lines are short."""
    return int(np.count_nonzero(np.frombuffer(block, np.uint8, end) == ord("\n")))


def _cut_row_groups(file: File, size: int, digest: str) -> Iterator[Slice]:
    groups = open_parquet(file).metadata
    start = first = waiting = num_rows = 0
    for group in range(groups.num_row_groups):
        waiting += groups.row_group(group).total_byte_size
        num_rows += groups.row_group(group).num_rows
        if waiting >= size or group == groups.num_row_groups - 1:
            yield Slice(file, start, group + 1, first + 1, f"{digest}:{start}:{group + 1}", waiting)
            start, first, waiting = group + 1, num_rows, 0


# --- units -----------------------------------------------------------------------------------------------------------


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


def unit(slices: Sequence[Slice], *, sizes: Sizes = Sizes()) -> Unit:
    """The slices as a unit of a chain; numbers of lines and rows are those of the files. sizes: of what is read at a
    time.
    """
    digest = hashlib.sha256()
    for piece in slices:
        file = piece.file
        about = f"{file.path}\0{file.name}\0{file.repository}\0{piece.first_line}\0{piece.digest}\n"
        digest.update(about.encode("utf-8", "replace"))
    read = functools.partial(_unit_documents, tuple(slices), sizes)
    return Unit(digest.hexdigest(), read, _name_of(slices))


def _name_of(slices: Sequence[Slice]) -> str:
    """ "FILE", "FILE from 12 on" (line or row), "FILE to FILE"."""
    ends = [
        f"{piece.file.path} from {piece.first_line} on" if piece.first_line > 1 else str(piece.file.path)
        for piece in (slices[0], slices[-1])
    ]
    return " to ".join(dict.fromkeys(ends))


Rows = Callable[..., Iterator[Document | pa.RecordBatch]]
"""What gives the documents of JSONL, one by one (`readers.row_documents`) or in batches (`json_lines.row_batches`)."""


def _unit_documents(slices: Sequence[Slice], sizes: Sizes, on_bad_row: BadRow) -> Iterator[Document | pa.RecordBatch]:
    rows_of = functools.partial(row_batches, sizes=sizes)
    for file, start, stop, first, *_ in slices:
        span = Span(start, stop, first)
        yield from _file(file, on_bad_row=on_bad_row, span=span, rows_of=rows_of, sizes=sizes)


class Span(NamedTuple):
    """What of a file is read, as in a `Slice`."""

    start: int = 0
    stop: int = -1
    first: int = 1


WHOLE = Span()


def _file(
    file: File, *, on_bad_row: BadRow, span: Span = WHOLE, rows_of: Rows = row_documents, sizes: Sizes = Sizes()
) -> Iterator[Document | pa.RecordBatch]:
    """The documents of a slice of a file; a file that cannot be read at all is set aside as a whole."""
    try:
        if is_name(str(file.path)):
            yield from _named(str(file.path), span, on_bad_row)
        elif file.stream is None and uncompressed_suffix(file.path) in ARCHIVE_SUFFIXES:
            for member in member_files(file, is_read=_may_be_read, on_bad_row=on_bad_row):
                yield from _member(member, on_bad_row, sizes)
        else:
            yield from _documents(file, on_bad_row, span, rows_of, sizes)
    except (ValueError, OSError) as error:
        set_aside(_about(file, error), on_bad_row)


def _documents(
    file: File, on_bad_row: BadRow, span: Span, rows_of: Rows, sizes: Sizes
) -> Iterator[Document | pa.RecordBatch]:
    suffix, (start, stop, first) = uncompressed_suffix(file.path), span
    if suffix in ROW_SUFFIXES:
        return rows_of(file, on_bad_row=on_bad_row, start=start, stop=stop, first_line=first)
    if suffix == ".parquet":
        return parquet_documents(file, on_bad_row=on_bad_row, start=start, stop=stop, first_row=first, sizes=sizes)
    if suffix == ".arrow":
        return arrow_documents(file, on_bad_row=on_bad_row, sizes=sizes)
    if suffix in WARC_SUFFIXES:
        return warc_documents(file, on_bad_row=on_bad_row)
    if suffix in HTML_SUFFIXES:
        return html_document(file, on_bad_row=on_bad_row)
    if suffix in VIDEO_SUFFIXES:
        raise ValueError(f"{file.path}: not text: a video")
    return text_document(file, on_bad_row=on_bad_row)


def _may_be_read(name: str) -> bool:
    return is_read(name) or _has_no_suffix(name)


def _member(member: File, on_bad_row: BadRow, sizes: Sizes) -> Iterator[Document]:
    try:
        if is_read(member.name) or language_of(member.name, _head(member)) != UNKNOWN:
            yield from _documents(member, on_bad_row, WHOLE, row_documents, sizes)
    except (ValueError, *DAMAGE) as error:
        set_aside(_about(member, error), on_bad_row)


def _named(name: str, span: Span, on_bad_row: BadRow) -> Iterator[Document]:
    """The documents of a data set that is given by its name, or of a span of its rows."""
    if name == EMBEDDED:
        yield from embedded.stdlib_corpus()
        return
    for row in rows.read_span(name, span.start, span.stop, on_bad_row=on_bad_row):
        yield from document_of_row(row, path=row.place, source=name, on_bad_row=on_bad_row)


def by_source(documents: Iterable[Document]) -> dict[str, int]:
    """Source -> number of documents."""
    return dict(Counter(document.source for document in documents))
