"""Ids that rows bear in their files: which of them come more than once in a source.

They are no ids of documents (`document.document_id`): a row keeps its own as `original_id` in meta. That two rows of a
source bear the same one is no reason to drop either, but something to know of the file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.decisions import file_batches

FIELD = "original_id"
GIVEN_IDS = pa.schema([("key", pa.uint64()), ("id", pa.string()), ("path", pa.string())])
"""key: a hash of source and id. id: its JSON, cut to SHOWN_CHARACTERS. path: of the document."""
SHOWN_CHARACTERS, SHOWN_IDS = 60, 5


def given_ids(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The rows of a batch that bear an id, as `GIVEN_IDS`."""
    has = pc.match_substring(batch.column("meta"), f'"{FIELD}"')
    if not pc.any(has).as_py():
        return pa.record_batch([[], [], []], schema=GIVEN_IDS)
    rows = batch.select(["source", "path", "meta"]).filter(has)
    keys, names, paths = [], [], []
    for source, path, meta in zip(*(column.to_pylist() for column in rows.columns), strict=True):
        name = _id_in(meta)
        if name:
            keys.append(hashlib.blake2b(b"%b\0%b" % (source.encode(), name), digest_size=8).digest())
            names.append(name.decode()[:SHOWN_CHARACTERS])
            paths.append(path)
    return pa.record_batch([np.frombuffer(b"".join(keys), "<u8"), names, paths], schema=GIVEN_IDS)


class _Meta(msgspec.Struct):
    original_id: msgspec.Raw = msgspec.Raw(b"")


_decoder = msgspec.json.Decoder(_Meta)  # it passes over the other fields, which takes a third of the time


def _id_in(meta: str) -> bytes:
    """The JSON of the id; b"" where there is none, but perhaps one in another field."""
    try:
        return bytes(_decoder.decode(meta).original_id)
    except msgspec.DecodeError:  # NaN, which the standard library writes
        fields = json.loads(meta)
        return json.dumps(fields[FIELD], ensure_ascii=False).encode() if FIELD in fields else b""


def repeated_ids(files: Sequence[Path]) -> dict[str, Any]:
    """Of all rows of files of `GIVEN_IDS`: how many bear an id that another row of their source bore before, and some
    of these; {} where there is none. Eight bytes of every row are in memory.
    """
    found = [batch for path in files for batch in file_batches(path)]
    keys = np.concatenate([np.zeros(0, np.uint64), *(batch.column("key").to_numpy() for batch in found)])
    distinct, counts = np.unique(keys, return_counts=True)
    repeated = distinct[counts > 1]
    if not len(repeated):
        return {}
    shown = {key: list(_bearing(found, key)) for key in repeated[:SHOWN_IDS].tolist()}
    return {"rows": len(keys) - len(distinct), "some": [_said(rows) for rows in shown.values()]}


def _bearing(batches: Sequence[pa.RecordBatch], key: int) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.filter(pc.equal(batch.column("key"), pa.scalar(key, pa.uint64()))).to_pylist()


def _said(rows: Sequence[dict[str, Any]]) -> str:
    paths = [row["path"] for row in rows]
    more = f" and {len(paths) - 2} more" if len(paths) > 2 else ""
    return f"{paths[0]}, {paths[1]}{more} bear the id {rows[0]['id']}"
