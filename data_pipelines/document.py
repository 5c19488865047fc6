"""One document, one Arrow schema, two kinds of stages.

A batch stage is a pure function on an Arrow record batch: the same rows come back, with changed text where the stage
edits, and with a reason for every row that must go. A corpus stage decides over all documents from small sketches of
them, and may enter what it found. `ledger.py` removes the rows that go and counts them; `chain.py` runs stages over a
corpus of any size.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("language", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("licence", pa.string()),
        pa.field("meta", pa.string(), nullable=False),
    ]
)

EMPTY_META: Mapping[str, Any] = MappingProxyType({})


class Document(NamedTuple):
    """id: hash of where it came from and what it says. path: the file (or file:line) that a split keeps together.
    domain: the kind of text, which picks a chain ("code", "reference", "web"). meta: JSON values, such as repository.
    """

    id: str
    text: str
    source: str
    path: str
    domain: str = "web"
    language: str = "und"
    licence: str | None = None
    meta: Mapping[str, Any] = EMPTY_META


class Check(NamedTuple):
    """Rows fail where values_D is below (or above) the bound. NaN: not measured.

    of: in words, which documents the bound holds for, where others have another; the values of those are NaN.
    """

    reason: str
    values_D: np.ndarray
    side: Literal["below", "above"]
    bound: float
    of: str = ""

    def fails(self) -> np.ndarray:
        """Per row, whether it fails; what was not measured does not."""
        return self.values_D < self.bound if self.side == "below" else self.values_D > self.bound

    def spread(self, rows: Sequence[int], num_rows: int) -> "Check":
        """The check of some rows of a batch as one of the whole batch: nothing was measured of the others."""
        values_D = np.full(num_rows, np.nan)
        values_D[rows] = self.values_D
        return self._replace(values_D=values_D)


class Outcome(NamedTuple):
    """What a stage says: the rows it was given (text perhaps edited), a reason or None per row, a detail or None.

    checks: what it measured, where it measures; a sample of that is kept (`measures.py`).
    """

    batch: pa.RecordBatch
    reasons: Sequence[str | None]
    details: Sequence[str | None]
    checks: Sequence[Check] = ()


class Decision(NamedTuple):
    """What a corpus stage says of the documents that go: their numbers in the corpus (int64, ascending), a reason and a
    detail for each. report: plain figures about the whole, kept in the ledger. changes: other values for columns of
    `SCHEMA`, beside a column `row` (int64, ascending) that says of which documents.
    """

    rows: np.ndarray
    reasons: Sequence[str]
    details: Sequence[str]
    report: Mapping[str, Any] = EMPTY_META
    changes: pa.RecordBatch | None = None


Fetch = Callable[[np.ndarray], pa.RecordBatch]
"""Numbers of documents in the corpus -> these documents, in that order."""


class Corpus(NamedTuple):
    """A decision over the whole corpus that never holds its text.

    sketch: batch -> a record batch with a column `row` (int64, the row of the batch; rows may be left out) and whatever
    is small and enough to decide. resolve(sketches, fetch, scratch): all sketches, with `row` made the number of the
    document in the corpus; fetch gives the few documents whose text it must see; scratch is an empty folder.
    """

    sketch: Callable[[pa.RecordBatch], pa.RecordBatch]
    resolve: Callable[[Sequence[pa.RecordBatch], Fetch, Path], Decision]


class Stage(NamedTuple):
    """scope "batch": a function of a record batch of any size, 0 rows included; "corpus": a `Corpus`.

    version: what the result depends on beyond code and settings, such as the digest of a block list that is read from a
    file; with another version nothing that an interrupted run finished is taken over.
    """

    name: str
    scope: Literal["batch", "corpus"]
    apply: Callable[[pa.RecordBatch], Outcome] | Corpus
    version: str = ""


def document_id(text: str | memoryview, *, source: str, path: str) -> str:
    """32 hex digits, the first 128 bits of a SHA-256 over source, path and raw text: equal on every machine.

    The text may be given as its UTF-8.
    """
    raw_source, raw_path = source.encode("utf-8", "surrogatepass"), path.encode("utf-8", "surrogatepass")
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    size = len(raw).to_bytes(8, "little")
    digest = hashlib.sha256(_sized(raw_source) + _sized(raw_path) + size)
    digest.update(raw)
    return digest.hexdigest()[:32]


def _sized(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


def make_document(
    text: str,
    *,
    source: str,
    path: str,
    domain: str = "web",
    language: str = "und",
    licence: str | None = None,
    meta: Mapping[str, Any] = EMPTY_META,
) -> Document:
    """A document with its content-addressed id. Lone surrogates, which no UTF-8 file can hold, become "?"."""
    text, source, path = storable(text), storable(source), storable(path)
    return Document(document_id(text, source=source, path=path), text, source, path, domain, language, licence, meta)


def storable(text: str) -> str:
    """The text with "?" in place of lone surrogates."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def to_batch(documents: Iterable[Document]) -> pa.RecordBatch:
    """A record batch of `SCHEMA`, one row per document, in order; 0 documents give 0 rows."""
    rows = list(documents)
    columns = {
        "id": [row.id for row in rows],
        "text": [row.text for row in rows],
        "source": [row.source for row in rows],
        "domain": [row.domain for row in rows],
        "language": [row.language for row in rows],
        "path": [row.path for row in rows],
        "licence": [row.licence for row in rows],
        "meta": [meta_json(row.meta) for row in rows],
    }
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def meta_json(meta: Mapping[str, Any]) -> str:
    """The meta of a document as the column holds it."""
    if not meta:
        return "{}"
    # Dates, bytes and decimals, which parquet has and JSON lacks, are kept as their text.
    return storable(json.dumps(dict(meta), sort_keys=True, ensure_ascii=False, default=str))


def to_documents(batch: pa.RecordBatch) -> list[Document]:
    """The documents of a record batch, in order."""
    columns = {name: batch.column(name).to_pylist() for name in SCHEMA.names}
    columns["meta"] = [json.loads(meta) for meta in columns["meta"]]
    return [Document(*row) for row in zip(*(columns[name] for name in Document._fields), strict=True)]


def with_text(batch: pa.RecordBatch, texts: Sequence[str] | pa.Array) -> pa.RecordBatch:
    """The batch with another text column; ids stay those of the raw documents."""
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.large_string())
    return batch.set_column(SCHEMA.get_field_index("text"), SCHEMA.field("text"), column)


class TextBuffer(NamedTuple):
    """UTF-8 bytes of all rows end to end, and where each row starts: row i is data[offsets[i]:offsets[i + 1]]."""

    data: np.ndarray
    offsets: np.ndarray


def text_buffer(batch: pa.RecordBatch) -> TextBuffer:
    """The raw bytes behind the text column without a copy; sliced batches and 0 rows included.

    They are read-only whoever made them: of arrays that may be written to, every compiled loop would be compiled anew.
    """
    column = batch.column("text")
    assert column.type == pa.large_string(), f"text must be large_string, got {column.type}"
    if len(column) == 0:
        return TextBuffer(np.frombuffer(b"", np.uint8), np.zeros(1, np.int64))
    _, offsets, data = column.buffers()
    starts = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    raw = np.frombuffer(b"" if data is None else data, np.uint8)
    raw.flags.writeable = False
    return TextBuffer(raw, starts.astype(np.int64))


def num_text_bytes(batch: pa.RecordBatch) -> int:
    """UTF-8 bytes of the text column."""
    offsets = text_buffer(batch).offsets
    return int(offsets[-1] - offsets[0])


def concat_batches(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """All rows in one record batch; no batches give 0 rows."""
    table = pa.Table.from_batches(list(batches), schema=SCHEMA).combine_chunks()
    return table.to_batches()[0] if table.num_rows else to_batch([])


Apply = Callable[[pa.RecordBatch], Outcome]


def only(domains: Sequence[str], apply: Apply | Corpus, *, others: bool = False) -> Apply | Corpus:
    """Returns the stage that acts on rows of these domains (others=True: of all but these) and passes the rest on."""

    def chosen(batch: pa.RecordBatch) -> list[int]:
        return [row for row, d in enumerate(batch.column("domain").to_pylist()) if (d in domains) != others]

    def sketched(batch: pa.RecordBatch) -> pa.RecordBatch:
        rows = np.array(chosen(batch), np.int64)
        sketch = apply.sketch(batch.take(pa.array(rows)))
        place = sketch.schema.get_field_index("row")
        return sketch.set_column(place, "row", pa.array(rows[sketch.column("row").to_numpy()]))

    def selected(batch: pa.RecordBatch) -> Outcome:
        rows = chosen(batch)
        if len(rows) == batch.num_rows:
            return apply(batch)
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        if not rows:
            return Outcome(batch, reasons, details)
        outcome = apply(batch.take(pa.array(rows)))
        for row, reason, detail in zip(rows, outcome.reasons, outcome.details, strict=True):
            reasons[row], details[row] = reason, detail
        checks = [check.spread(rows, batch.num_rows) for check in outcome.checks]
        # Old and new rows end to end, then every row from where it now lies.
        both = concat_batches([batch, outcome.batch])
        where = list(range(batch.num_rows))
        for new, row in enumerate(rows):
            where[row] = batch.num_rows + new
        return Outcome(both.take(pa.array(where)), reasons, details, checks)

    return Corpus(sketched, apply.resolve) if isinstance(apply, Corpus) else selected


def fingerprint(documents: Iterable[Document] | pa.RecordBatch) -> str:
    """SHA-256 over the document ids in order: two corpora are equal exactly when this is."""
    ids = documents.column("id").to_pylist() if isinstance(documents, pa.RecordBatch) else [d.id for d in documents]
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def in_held_out(path: str, *, fraction: float) -> bool:
    """True where the file belongs to the held-out part: a function of the path alone, so all parts of one file agree.

    A path of the form file.jsonl:12 is its own file, so rows of one JSONL are split by row.
    """
    bucket = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    return bucket < fraction * 2.0**64


class Split(NamedTuple):
    train: list[Document]
    held_out: list[Document]


def split_by_file(documents: Iterable[Document], *, fraction: float = 0.05) -> Split:
    """Train and held-out documents in their given order, split by a stable hash of the path."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"held-out fraction is {fraction}; wanted a number from 0 to 1")
    parts = Split([], [])
    for document in documents:
        (parts.held_out if in_held_out(document.path, fraction=fraction) else parts.train).append(document)
    return parts
