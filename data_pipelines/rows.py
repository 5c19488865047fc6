"""Rows of whatever a data set lies in: JSONL, a JSON array, parquet, a text file, a data set by name.

FILE.jsonl  FILE.json  (also .gz, .zst ...)  an object per line; one array of objects
FILE.parquet                                 a row per object
FILE.txt  FILE.md                            one row: {"text": the whole file}
hf:ORG/NAME[:CONFIG][@SPLIT]                 a data set of a hub, its files fetched by the hub's own client (`hf.hub`)
modelscope:ORG/NAME[:CONFIG][@SPLIT]         and read by the `datasets` library; the split is "train" unless named
datasets:NAME[:CONFIG][@SPLIT]               whatever that library knows by this name, or a folder that its
                                             save_to_disk wrote
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.readers import (
    TEXT_SUFFIXES,
    BadRow,
    Row,
    existing,
    given_file,
    json_rows,
    opened,
    set_aside,
    uncompressed_suffix,
)
from data_pipelines.tables import parquet_rows
from internjax.hf.hub import resolve_data

_NAMED = re.compile(r"(?P<where>datasets|hf|modelscope):(?P<name>[^@:]+)(?::(?P<config>[^@:]+))?(?:@(?P<split>.+))?")


def read_rows(name: str | Path, *, columns: Sequence[str] = (), on_bad_row: BadRow = None) -> Iterator[Row]:
    """Yields the rows of a file or a named data set, with where each stands ("file:line").

    `columns` renames: "instruction=question" makes the column question the field instruction. A row that cannot be
    read, or lacks such a column, raises ValueError, or its message is handed to `on_bad_row` and it is left out.
    """
    renamed = parse_columns(columns)
    for row in _rows(name, on_bad_row):
        missing = [column for column in renamed.values() if column not in row.value]
        if not missing:
            yield row if not renamed else Row(row.place, _renamed(row.value, renamed))
            continue
        message = (
            f"{row.place}: it has no column {missing[0]!r}, which is to be the field "
            f"{next(field for field, column in renamed.items() if column == missing[0])!r}; "
            f"it has {', '.join(row.value) or 'none'}"
        )
        if on_bad_row is None:
            raise ValueError(message)
        on_bad_row(message)


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Returns field -> column of "field=column" texts."""
    pairs = [text.partition("=") for text in columns]
    wrong = [text for text, (field, _, column) in zip(columns, pairs) if not field or not column]
    if wrong:
        raise ValueError(f"columns has {wrong[0]!r}; give FIELD=COLUMN, such as instruction=question")
    fields = [field for field, _, _ in pairs]
    if len(set(fields)) < len(fields):
        raise ValueError(f"columns names a field twice: {', '.join(columns)}; give each field once")
    return {field: column for field, _, column in pairs}


def columns_of(columns: Sequence[str], name: str, names: Sequence[str]) -> tuple[str, ...]:
    """Returns the FIELD=COLUMN texts that hold for one of several files: those for all, and its FILE:FIELD=COLUMN.

    Its own win over those for all. Raises ValueError where a text is for a file that is none of `names`.
    """
    found: dict[str, str] = {}
    for text in sorted(columns, key=lambda text: _file_of(text, names) != ""):
        if _file_of(text, names) in ("", name):
            text = text.removeprefix(f"{name}:")
            found[text.partition("=")[0]] = text
    return tuple(found.values())


def _file_of(text: str, names: Sequence[str]) -> str:
    """The file that FILE:FIELD=COLUMN is for; empty for FIELD=COLUMN."""
    if ":" not in text.partition("=")[0]:
        return ""
    # The longest: hf:org/name may be a file's name, and hf:org/name:config another's.
    file = max((name for name in names if text.startswith(f"{name}:")), key=len, default=None)
    if file is None:
        raise ValueError(f"columns has {text!r}, which is for none of the files {', '.join(names)}")
    return file


def _renamed(value: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    taken = set(renamed.values()) | set(renamed)
    return {field: value[column] for field, column in renamed.items()} | {
        name: each for name, each in value.items() if name not in taken
    }


def _rows(name: str | Path, on_bad_row: BadRow) -> Iterator[Row]:
    if found := _NAMED.fullmatch(str(name)):
        data = _open_named(str(name), found)
        yield from _rows_of(data, str(name), range(len(data)), on_bad_row)
        return
    path = existing(name)
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir())[:8]
        raise ValueError(
            f"{path} is a folder, wanted a file; name its files ({', '.join(files) or 'it is empty'}), or "
            f"datasets:{path} for a folder that the datasets library saved"
        )
    suffix = uncompressed_suffix(path)
    if suffix in {".json", ".jsonl"}:
        yield from json_rows(path, on_bad_row=on_bad_row)
    elif suffix == ".parquet":
        yield from parquet_rows(given_file(path), on_bad_row=on_bad_row)
    elif suffix in TEXT_SUFFIXES:
        with opened(path) as file:
            text = file.read().decode("utf-8-sig", "replace")
        if text.strip():
            yield Row(f"{path}:1", {"text": text})
    else:
        raise ValueError(
            f"{path}: files named {suffix or 'without a suffix'} are not read; give .jsonl, .json, .parquet, .txt, "
            "or a data set by name: hf:ORG/NAME, modelscope:ORG/NAME, datasets:NAME"
        )


def _rows_of(data: Any, name: str, rows: range, on_bad_row: BadRow) -> Iterator[Row]:
    """Some rows of a data set, the first of all being name:1. One that is no text in UTF-8 ends a reading, not all."""
    row = rows.start
    while row < rows.stop:
        try:
            for value in data.select(range(row, rows.stop)):
                row += 1
                yield Row(f"{name}:{row}", value)
        except (UnicodeError, ArithmeticError) as error:
            row += 1
            set_aside(f"{name}:{row}: cannot be read ({error}); mend the row, or leave it out", on_bad_row)


def _open_named(name: str, found: re.Match) -> Any:
    """The split of a data set: of a hub, on disk, or whatever the `datasets` library knows by the name."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{name} is read by the datasets library, which is not installed; pip install datasets, or give a file"
        ) from error
    split = found["split"] or "train"
    on_hub = found["where"] != "datasets"
    folder = resolve_data(f"{found['where']}:{found['name']}") if on_hub else Path(found["name"])
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise ValueError(f"it has the splits {', '.join(saved)}; name one: {name.partition('@')[0]}@SPLIT")
                return saved[split]
            return saved
        return datasets.load_dataset(str(folder) if on_hub else found["name"], found["config"], split=split)
    except Exception as error:  # the library raises its own kinds, and its clients' ones
        if on_hub:
            raise ValueError(
                f"{name} cannot be read by the datasets library ({type(error).__name__}: {error}). Name a "
                f"configuration or split ({found['where']}:{found['name']}:CONFIG@SPLIT), or give one of the files "
                f"that lie in {folder}"
            ) from error
        raise ValueError(
            f"{name} cannot be loaded by the datasets library ({type(error).__name__}: {error}). Without a network, "
            "fetch it elsewhere, save_to_disk it and give datasets:FOLDER, or give its files"
        ) from error


class Extent(NamedTuple):
    """Of a named data set; num_bytes: of its files, 0 where it lies in memory. digest: of its name and its content."""

    num_rows: int
    num_bytes: int
    digest: str


def is_name(name: str | Path) -> bool:
    """Whether this is hf:ORG/NAME, modelscope:ORG/NAME or datasets:NAME rather than a path."""
    return _NAMED.fullmatch(str(name)) is not None


def extent(name: str) -> Extent:
    """Returns how large a named data set is. Its files are read once, and its rows where it has no files."""
    data = _open_named(name, _NAMED.fullmatch(name))
    paths = [Path(file["filename"]) for file in data.cache_files]
    if not paths:
        return Extent(len(data), 0, digest(name))
    found = hashlib.sha256(name.encode())
    for path in paths:
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return Extent(len(data), sum(path.stat().st_size for path in paths), found.hexdigest())


def read_span(name: str, start: int, stop: int, *, on_bad_row: BadRow = None) -> Iterator[Row]:
    """Yields rows start:stop (-1: to the last) of a named data set, with "name:number of the row, from 1"."""
    data = _open_named(name, _NAMED.fullmatch(name))
    yield from _rows_of(data, name, range(start, len(data) if stop < 0 else stop), on_bad_row)


def digest(name: str | Path) -> str:
    """Returns the sha256 of a file's bytes, or of a named data set's rows."""
    if _NAMED.fullmatch(str(name)):
        found = hashlib.sha256()
        for row in _rows(name, None):
            found.update(json.dumps(row.value, sort_keys=True, default=str).encode() + b"\n")
        return found.hexdigest()
    path = existing(name)
    if path.is_dir():
        next(_rows(path, None))  # says what is wanted instead
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
