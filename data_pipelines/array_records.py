"""A token folder as ArrayRecord files, for trainers that read these through Grain (MaxText, for one).

    python -m data_pipelines.array_records --tokens TOKENS --output DIR

DIR/NNNNN.array_record   one record per document, in the order of the shard of the same number (a document that an epoch
                         reads N times has N records); groups of one record, so that any document is read by itself
DIR/array_records.json   tokenizer sha256, counts, features, and the sha256 of every file

A record is a serialised `tf.train.Example` with the features

    tokens      int64 list    all ids of the document, first and last token of the text included
    id          bytes list    one value: the document's id in UTF-8
    loss_mask   int64 list    where the folder has masks: 1 where the token is to be learned

which is what MaxText parses where its data is tokenised beforehand (tokenize_train_data=False and "tokens" as the only
column). Rows are not packed: the trainer packs. `open_records` checks the files and gives Grain's data source over
them, `parse` reads a record without TensorFlow.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.tokens import DOCUMENTS, check_files, file_entry, open_tokens
from internjax.hf.folder import new_folder

MANIFEST = "array_records.json"
FORMAT = 1
WRITER_OPTIONS = "group_size:1"
_BYTES_LIST, _INT64_LIST = 1, 3  # fields of tf.train.Feature


# --- records ---------------------------------------------------------------------------------------------------------


def serialise(tokens: np.ndarray, name: str, mask: np.ndarray | None = None) -> bytes:
    """Returns the record of a document."""
    features = [
        _feature("id", _BYTES_LIST, _field(1, name.encode())),
        _feature("tokens", _INT64_LIST, _field(1, _varints(tokens))),
    ]
    if mask is not None:
        features.append(_feature("loss_mask", _INT64_LIST, _field(1, _varints(mask))))
    return _field(1, b"".join(_field(1, feature) for feature in sorted(features)))


def parse(record: bytes) -> dict[str, Any]:
    """Returns {"tokens": int64 array, "id": text, "loss_mask": int64 array where there is one} of a record."""
    found: dict[str, Any] = {}
    try:
        ((_, features),) = _fields(record)
        for _, entry in _fields(features):
            (_, name), (_, feature) = _fields(entry)
            ((kind, values),) = _fields(feature)
            lists = [value for _, value in _fields(values)]
            found[name.decode()] = lists[0].decode() if kind == _BYTES_LIST else _from_varints(b"".join(lists))
    except (ValueError, IndexError) as error:
        raise ValueError(
            "a record is no tf.train.Example as this module writes it; it is damaged, or another's"
        ) from error
    return found


def _feature(name: str, kind: int, values: bytes) -> bytes:
    """An entry of the map of features."""
    return _field(1, name.encode()) + _field(2, _field(kind, values))


def _field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes, a text or a message."""
    return bytes([number << 3 | 2]) + _varints(np.array([len(content)])) + content


def _fields(message: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    while at < len(message):
        number, kind = message[at] >> 3, message[at] & 7
        end = at + 1
        while end < len(message) and message[end] >= 128:
            end += 1
        size = int(_from_varints(message[at + 1 : end + 1])[0]) if end < len(message) else -1
        at = end + 1 + size
        if kind != 2 or size < 0 or at > len(message):
            raise ValueError(f"no field of bytes at {end}")
        found.append((number, message[end + 1 : at]))
    return found


def _varints(values: np.ndarray) -> bytes:
    """Numbers of at least 0 as base-128 integers, the least significant group first."""
    values = np.asarray(values, np.uint64)
    groups = np.ones(len(values), np.int64)
    for shift in range(7, 64, 7):
        groups += values >= np.uint64(1 << shift)
    starts = np.cumsum(groups) - groups
    out = np.empty(int(groups.sum()), np.uint8)
    for group in range(int(groups.max(initial=0))):
        rows = np.flatnonzero(groups > group)
        low = (values[rows] >> np.uint64(7 * group)).astype(np.uint8) & np.uint8(0x7F)
        out[starts[rows] + group] = low | np.where(groups[rows] > group + 1, np.uint8(0x80), np.uint8(0))
    return out.tobytes()


def _from_varints(content: bytes) -> np.ndarray:
    raw = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(ends):
        return np.zeros(0, np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    group = np.arange(ends[-1] + 1) - np.repeat(starts, ends - starts + 1)
    parts = (raw[: ends[-1] + 1] & 0x7F).astype(np.uint64) << (7 * group).astype(np.uint64)
    return np.add.reduceat(parts, starts).astype(np.int64)


# --- folders ---------------------------------------------------------------------------------------------------------


def export(tokens: str | os.PathLike, output: str | os.PathLike) -> dict[str, Any]:
    """Writes the documents of a token folder as ArrayRecord files and returns the manifest; all of it or nothing.

    Raises ValueError where the token folder is damaged, or `output` exists and holds something else.
    """
    import pyarrow.parquet as pq
    from array_record.python.array_record_module import ArrayRecordWriter

    opened = open_tokens(tokens)
    names = pq.read_table(opened.path / DOCUMENTS, columns=["id"]).column("id")
    with new_folder(output, overwrite=True, marker=MANIFEST) as new:
        for number, shard in enumerate(opened.manifest["shards"]):
            writer = ArrayRecordWriter(str(new / f"{shard['name']}.array_record"), WRITER_OPTIONS)
            for index in range(int(opened.first_D[number]), int(opened.first_D[number + 1])):
                record = serialise(opened.document(index), names[index].as_py(), opened.mask(index))
                for _ in range(1 if opened.times_D is None else int(opened.times_D[index])):
                    writer.write(record)
            writer.close()
        manifest = {
            "format": FORMAT,
            "record": "tf.train.Example",
            "features": ["id", "loss_mask", "tokens"] if opened.manifest["has_mask"] else ["id", "tokens"],
            **{
                name: opened.manifest[name]
                for name in ("tokenizer_sha256", "vocab_size", "num_documents", "num_tokens", "epoch_tokens", "about")
                if name in opened.manifest
            },
            "files": {path.name: file_entry(path) for path in sorted(new.glob("*.array_record"))},
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def open_records(folder: str | os.PathLike, *, verify: bool = True) -> Any:
    """Returns Grain's random access to the records of a folder, in order.

    Raises ValueError naming a file that is missing, short or altered; verify=False looks at sizes alone.
    """
    from grain.python import ArrayRecordDataSource

    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise ValueError(
            f"{folder} holds no {MANIFEST}; give a folder that python -m data_pipelines.array_records wrote"
        )
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {manifest.get('format')!r}, this version reads {FORMAT}; write it anew")
    check_files(folder, manifest["files"], verify=verify)
    return ArrayRecordDataSource([str(folder / name) for name in manifest["files"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports a token folder and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.array_records",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", required=True, metavar="FOLDER", help="token folder to read")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder to write; one of this command is replaced"
    )
    given = parser.parse_args(arguments)
    try:
        manifest = export(given.tokens, given.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{given.output}: {manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens in "
        f"{len(manifest['files'])} ArrayRecord files"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
