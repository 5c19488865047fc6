"""Says which items of evaluation sets stand in which documents; drops such documents in a chain (--benchmark there).

    python -m data_pipelines.decontamination --benchmark NAME=FILE.jsonl:FIELD[,FIELD...] [...] --input PATH [PATH ...]

What is looked for is 12 words of an item in a row, an n-gram (case, spaces and punctuation leave no trace). Where
more than half of the words are Han or kana characters it is 25 of them. The fields of an item are one text, so that
n-grams which bridge question and answer count as well. What stands in many items of a benchmark is its template and is
left out, and so are items shorter than an n-gram: the report counts both.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines import chain, sources
from data_pipelines.document import SCHEMA, Document, Outcome, make_document, text_buffer, to_batch, with_text
from data_pipelines.executors import shown_progress
from data_pipelines.ngrams import find_ngrams, ngram_hashes, span_bytes
from data_pipelines.readers import json_rows
from data_pipelines.words import Words, find_words


@dataclass(frozen=True)
class Decontamination:
    """words: length of an n-gram; han_characters: of one that is mostly Han or kana characters.

    action "drop": a document with `min_ngrams` n-grams goes; "cut": the lines that hold them are taken out, and the
    document goes only where more than `max_cut` of its bytes would.
    """

    words: int = 12
    han_characters: int = 25
    action: Literal["drop", "cut"] = "drop"
    min_ngrams: int = 1
    max_cut: float = 0.5
    max_items: int = 5
    """An n-gram that more items of one benchmark hold is its template and no sign of a leak."""

    def __post_init__(self):
        if min(self.words, self.han_characters, self.min_ngrams, self.max_items) < 1:
            raise ValueError("words, han_characters, min_ngrams and max_items are counts; wanted 1 or more of each")
        if self.action not in ("drop", "cut"):
            raise ValueError(f"action is {self.action!r}; wanted 'drop' or 'cut'")
        if not 0 <= self.max_cut <= 1:
            raise ValueError(f"max_cut is {self.max_cut}; wanted a share from 0 to 1")


class Benchmark(NamedTuple):
    """items: the text of each item. place: where it came from, for the reader of a report."""

    name: str
    items: Sequence[str]
    place: str = ""


class Index(NamedTuple):
    """grams: hashes, sorted. owners of gram g: owner_benchmarks and owner_items from owner_starts[g] on.

    num_items, num_short, num_template_grams by benchmark.
    """

    settings: Decontamination
    names: tuple[str, ...]
    grams: np.ndarray
    owner_starts: np.ndarray
    owner_benchmarks: np.ndarray
    owner_items: np.ndarray
    filter_bits: np.ndarray
    num_items: dict[str, int]
    num_short: dict[str, int]
    num_template_grams: dict[str, int]


class Overlap(NamedTuple):
    """words: of the document, in n-grams of the benchmark; share: of the document's words; items: indices, sorted."""

    benchmark: str
    ngrams: int
    words: int
    share: float
    items: tuple[int, ...]


# --- the index -------------------------------------------------------------------------------------------------------


def read_benchmark(name: str, path: str | Path, fields: Sequence[str]) -> Benchmark:
    """Returns a benchmark from JSONL (also .gz, .zst). "choices.text" is a field of a field; lists are joined.

    An item without one of the fields is an error that names file and line.
    """
    if not fields:
        raise ValueError(f"benchmark {name!r}: no field is named; wanted NAME=FILE.jsonl:FIELD[,FIELD...]")
    items = []
    for row in json_rows(path):
        texts = []
        for field in fields:
            value: Any = row.value
            for part in field.split("."):
                if not isinstance(value, dict) or part not in value:
                    names = ", ".join(sorted(row.value))
                    raise ValueError(f"{row.place}: benchmark {name!r} has no field {field!r}; this row has {names}")
                value = value[part]
            texts.extend(map(str, value if isinstance(value, list) else [value]))
        items.append("\n".join(texts))
    if not items:
        raise ValueError(f"benchmark {name!r}: {path} holds no item")
    return Benchmark(name, items, str(path))


def build_index(benchmarks: Iterable[Benchmark], settings: Decontamination) -> Index:
    """Returns the n-grams of the benchmarks. Raises ValueError where a name comes twice or no item is long enough."""
    names: list[str] = []
    parts: list[np.ndarray] = []
    items, shorts, templates = {}, {}, {}
    for benchmark in benchmarks:
        if benchmark.name in names:
            raise ValueError(f"benchmark {benchmark.name!r} is given twice; give each its own name")
        batch = to_batch(make_document(text, source="benchmark", path="") for text in benchmark.items)
        words = find_words(batch)
        hashes = ngram_hashes(words, settings.words, settings.han_characters)
        hashes = hashes[np.lexsort((hashes[:, 1], hashes[:, 0]))]  # columns: gram, item
        pairs = hashes[np.append(True, np.any(hashes[1:] != hashes[:-1], axis=1))[: len(hashes)]]
        present = np.zeros(len(benchmark.items), bool)
        present[pairs[:, 1].astype(np.int64)] = True
        grams, counts = np.unique(pairs[:, 0], return_counts=True)
        common = grams[counts > settings.max_items]
        pairs = pairs[~np.isin(pairs[:, 0], common)]
        items[benchmark.name] = len(benchmark.items)
        shorts[benchmark.name] = int((~present).sum())
        templates[benchmark.name] = len(common)
        parts.append(np.column_stack([pairs, np.full(len(pairs), len(names), np.uint64)]))
        names.append(benchmark.name)
    owners = np.concatenate(parts) if parts else np.zeros((0, 3), np.uint64)
    if not len(owners):
        raise ValueError(
            f"no item of {', '.join(names) or 'no benchmark'} has an n-gram of {settings.words} words; "
            "give fields with longer texts or fewer words"
        )
    owners = owners[np.lexsort((owners[:, 1], owners[:, 2], owners[:, 0]))]
    grams, starts = np.unique(owners[:, 0], return_index=True)
    return Index(
        settings, tuple(names), grams, np.append(starts, len(owners)), owners[:, 2].astype(np.int64),
        owners[:, 1].astype(np.int64), _filter_bits(grams), items, shorts, templates,
    )  # fmt: skip


def _filter_bits(grams: np.ndarray) -> np.ndarray:
    """A bit per hash among at least 16 times as many, so that most n-grams of clean text are passed by."""
    size = 1 << max(int(16 * len(grams)).bit_length(), 16)
    places = grams & np.uint64(size - 1)
    bits = np.zeros(size // 8, np.uint8)
    np.bitwise_or.at(
        bits, (places >> np.uint64(3)).astype(np.int64), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
    )
    return bits


# --- documents -------------------------------------------------------------------------------------------------------


class Hits(NamedTuple):
    """N-grams of a batch that are in the index: row, first word (of the batch), number of words, gram."""

    rows: np.ndarray
    words: np.ndarray
    lengths: np.ndarray
    grams: np.ndarray


def find_hits(words: Words, index: Index) -> Hits:
    """Returns the n-grams that the rows share with the index, by row and word."""
    found, lengths, hashes = find_ngrams(words, index.settings.words, index.settings.han_characters, index.filter_bits)
    grams = np.minimum(np.searchsorted(index.grams, hashes), len(index.grams) - 1)
    real = index.grams[grams] == hashes
    found, lengths, grams = found[real], lengths[real], grams[real]
    rows = np.searchsorted(words.starts, found, side="right") - 1
    order = np.argsort(found, kind="stable")
    return Hits(rows[order], found[order], lengths[order], grams[order])


def overlaps(hits: Hits, rows: np.ndarray, num_words: int, index: Index) -> list[Overlap]:
    """Returns what one row shares with each benchmark, the largest share first. rows: places of its hits."""
    places: dict[int, list[int]] = defaultdict(list)
    items: dict[int, set[int]] = defaultdict(set)
    for place in rows.tolist():
        gram = int(hits.grams[place])
        for owner in range(index.owner_starts[gram], index.owner_starts[gram + 1]):
            benchmark = int(index.owner_benchmarks[owner])
            if not places[benchmark] or places[benchmark][-1] != place:
                places[benchmark].append(place)
            items[benchmark].add(int(index.owner_items[owner]))
    result = []
    for benchmark, held in places.items():
        covered = _num_covered(hits.words[held], hits.words[held] + hits.lengths[held])
        share = covered / num_words
        result.append(Overlap(index.names[benchmark], len(held), covered, share, tuple(sorted(items[benchmark]))))
    return sorted(result, key=lambda overlap: (-overlap.words, overlap.benchmark))


def _num_covered(begins: np.ndarray, ends: np.ndarray) -> int:
    """Length of the union of intervals with ascending begins."""
    reached = np.concatenate([[begins[0]], np.maximum.accumulate(ends)[:-1]])
    return int(np.maximum(np.maximum.accumulate(ends) - np.maximum(begins, reached), 0).sum())


def decontaminate(index: Index) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops, or cuts, the rows that share n-grams with the benchmarks.

    The detail names each benchmark with the share of the document and its items; what was cut is in meta as
    `decontaminated` (benchmark -> items).
    """
    settings = index.settings

    def apply(batch: pa.RecordBatch) -> Outcome:
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        words = find_words(batch)
        hits = find_hits(words, index)
        if not len(hits.rows):
            return Outcome(batch, reasons, details)
        texts, metas = batch.column("text").to_pylist(), batch.column("meta").to_pylist()
        for row in np.unique(hits.rows).tolist():
            places = np.flatnonzero(hits.rows == row)
            if len(places) < settings.min_ngrams:
                continue
            found = overlaps(hits, places, int(words.starts[row + 1] - words.starts[row]), index)
            detail = "; ".join(map(_describe, found))
            if settings.action == "cut":
                rest, share = _cut(batch, words, row, hits.words[places], hits.lengths[places])
                if share <= settings.max_cut:
                    texts[row] = rest
                    cut = {overlap.benchmark: list(overlap.items) for overlap in found}
                    metas[row] = json.dumps(
                        json.loads(metas[row]) | {"decontaminated": cut}, sort_keys=True, ensure_ascii=False
                    )
                    continue
                detail = f"{share:.2f} would be cut, above {settings.max_cut:g}; {detail}"
            reasons[row], details[row] = "contaminated", detail
        batch = with_text(batch, texts)
        place = SCHEMA.get_field_index("meta")
        return Outcome(batch.set_column(place, SCHEMA.field("meta"), pa.array(metas, pa.string())), reasons, details)

    return apply


def _describe(overlap: Overlap) -> str:
    shown = ", ".join(map(str, overlap.items[:5])) + (", ..." if len(overlap.items) > 5 else "")
    return f"{overlap.benchmark}: {overlap.words} words ({overlap.share:.2f}) of items {shown}"


def _cut(batch: pa.RecordBatch, words: Words, row: int, begins: np.ndarray, lengths: np.ndarray) -> tuple[str, float]:
    """Returns the row's text without the lines of these words, and the share of its bytes that they are."""
    data, offsets = text_buffer(batch)
    first, last = int(offsets[row]), int(offsets[row + 1])
    spans = span_bytes(data, first, last, begins - words.starts[row], lengths)
    text = data[first:last].tobytes()
    pieces, at = [], 0
    for begin, end in spans.tolist():
        start = text.rfind(b"\n", 0, begin - first) + 1
        stop = text.find(b"\n", end - first)
        stop = len(text) if stop < 0 else stop + 1
        pieces.append(text[at : max(at, start)])
        at = max(at, stop)
    pieces.append(text[at:])
    rest = b"".join(pieces)
    return rest.decode("utf-8"), 1 - len(rest) / max(len(text), 1)


# --- the report ------------------------------------------------------------------------------------------------------


class BenchmarkReport(NamedTuple):
    """short_items: without an n-gram, so never found. documents: that share n-grams with it; items_found: theirs."""

    benchmark: str
    items: int
    short_items: int
    template_ngrams: int
    documents: int
    items_found: int
    words: int


def report(batches: Iterable[pa.RecordBatch], index: Index) -> list[BenchmarkReport]:
    """Returns what documents share with each benchmark, whatever a stage would do about it."""
    documents: Counter[str] = Counter()
    num_words: Counter[str] = Counter()
    items: dict[str, set[int]] = defaultdict(set)
    for batch in batches:
        words = find_words(batch)
        hits = find_hits(words, index)
        for row in np.unique(hits.rows).tolist():
            places = np.flatnonzero(hits.rows == row)
            for overlap in overlaps(hits, places, int(words.starts[row + 1] - words.starts[row]), index):
                documents[overlap.benchmark] += 1
                num_words[overlap.benchmark] += overlap.words
                items[overlap.benchmark].update(overlap.items)
    return [
        BenchmarkReport(
            name, index.num_items[name], index.num_short[name], index.num_template_grams[name], documents[name],
            len(items[name]), num_words[name],
        )
        for name in index.names
    ]  # fmt: skip


def parse_benchmark(text: str) -> Benchmark:
    """Returns the benchmark of NAME=FILE.jsonl:FIELD[,FIELD...]."""
    name, equals, rest = text.partition("=")
    path, colon, fields = rest.rpartition(":")
    if not (name and equals and colon and path and fields):
        raise ValueError(f"benchmark {text!r} is not understood; wanted NAME=FILE.jsonl:FIELD[,FIELD...]")
    return read_benchmark(name, path, fields.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.decontamination",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--benchmark", nargs="+", required=True, metavar="NAME=FILE.jsonl:FIELD[,FIELD...]",
        help="evaluation sets (JSONL), and the fields that make an item",
    )  # fmt: skip
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=sources.WHAT_IS_READ)
    parser.add_argument("--words", type=int, default=Decontamination.words, help="words of an n-gram (default: 12)")
    parser.add_argument(
        "--han-characters",
        type=int,
        default=Decontamination.han_characters,
        help="where they are most of an n-gram (default: 25)",
    )
    parser.add_argument("--output", metavar="FILE.json", help="where the report goes as JSON as well")
    given = parser.parse_args(arguments)
    bad: list[str] = []
    num_documents = 0

    def documents() -> Iterator[Document]:
        nonlocal num_documents
        with shown_progress() as progress:
            for document in sources.stream(given.input, on_bad_row=bad.append, progress=progress):
                num_documents += 1
                yield document

    try:
        settings = Decontamination(words=given.words, han_characters=given.han_characters)
        index = build_index(map(parse_benchmark, given.benchmark), settings)
        found = report(chain.batches(documents(), chain.Sizes()), index)
        if not num_documents:
            unread = f" ({len(bad)} rows could not be read: {bad[0]})" if bad else ""
            raise ValueError(
                f"the corpus is empty: no document in {', '.join(given.input)}{unread}; wanted files with text"
            )
        if given.output:
            written = Path(given.output)
            written.parent.mkdir(parents=True, exist_ok=True)
            written.write_text(json.dumps([row._asdict() for row in found], indent=2) + "\n", "utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for message in bad[:5]:
        print(f"left out: {message}", file=sys.stderr)
    print(f"{num_documents} documents, {len(bad)} rows could not be read")
    for row in found:
        left_out = f"{row.short_items} too short, {row.template_ngrams} n-grams of its template left out"
        print(f"{row.benchmark}: {row.items_found} of {row.items} items in {row.documents} documents ({left_out})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
