"""Exact and near-duplicate removal, over sketches of the documents.

Exact: 128 bits of the text, white space and case aside.

Near duplicates: MinHash with 128 hash functions over shingles of 5 words (InternLM2's report, section 3.1), 20 bands of
6 rows, every candidate pair verified by its true Jaccard similarity, 0.7 or more. Words are those of `kernels.words`,
so Chinese needs no segmenter and another indentation does not make code another text. Of a group the newest copy stays
(field `date` of meta), among equally new ones the one with the least id: the order of the input never matters.
A document's sketch is 512 bytes of signature; band keys are sorted a range at a time, and only candidates are read
again for their shingles.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Corpus, Decision, Fetch, text_buffer
from data_pipelines.rules import edit, plain_rows, power_of_two
from data_pipelines.words import Spans, find_spans

NUM_HASHES = 128
KEYS_AT_ONCE = 16 << 20
"""Band keys that are sorted together (40 bytes each)."""
PAIRS_AT_ONCE = 1 << 20
"""Candidate pairs that are held before they are verified."""
SHOWN_GROUPS, SHOWN_MEMBERS, SHOWN_PAIRS = 24, 12, 24
"""Groups, members of each and pairs that the report describes."""
SHINGLES_AT_ONCE = 1 << 20
"""Shingles of candidates that are in memory while they are verified: some 50 bytes each, with their texts and words."""
SHOWN_SHINGLES = 4 << 20
"""Shingles of the members of a group that is described."""


@dataclass(frozen=True)
class NearDuplicates:
    """threshold: least Jaccard similarity of duplicates. bands * rows hashes of the 128 are used to find candidates."""

    threshold: float = 0.7
    bands: int = 20
    rows: int = 6
    signature_slack: float = 0.12
    """A pair whose signatures agree in less than threshold - slack of the hashes is not verified (3 deviations)."""
    neighbours: int = 64
    """Members of a bucket that each one is compared with, so that giant buckets stay linear."""
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; wanted more than 0 and at most 1")
        if self.bands * self.rows > NUM_HASHES:
            raise ValueError(f"{self.bands} bands of {self.rows} rows want more than the {NUM_HASHES} hashes there are")


class Shingles(NamedTuple):
    """Distinct shingle hashes of every row, sorted; those of row d lie at starts[d]:starts[d + 1]."""

    values: np.ndarray
    starts: np.ndarray


class Groups(NamedTuple):
    """In order of preference, the best document first. rows_D: its number in the corpus; root_D: the place of the
    document that stays (its own where it stays); partner_D, similarity_D: its closest verified pair (-1: none).
    """

    rows_D: np.ndarray
    root_D: np.ndarray
    partner_D: np.ndarray
    similarity_D: np.ndarray
    report: dict[str, int]


# --- names and preference --------------------------------------------------------------------------------------------


def _identity(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """The columns that preference needs: the row, the two halves of the id, the date."""
    ids = batch.column("id").to_pylist()
    try:
        halves = np.frombuffer(bytes.fromhex("".join(ids)), ">u8").reshape(len(ids), 2).astype(np.uint64)
    except ValueError:
        wrong = next(name for name in ids if len(name) != 32)
        raise ValueError(f"document id {wrong!r} is not 32 hex digits; make documents with make_document") from None
    dates = [_date(meta) if '"date"' in meta else "" for meta in batch.column("meta").to_pylist()]
    return {
        "row": pa.array(np.arange(len(ids))),
        "id_high": pa.array(halves[:, 0]),
        "id_low": pa.array(halves[:, 1]),
        "date": pa.array(dates, pa.string()),
    }


def _date(meta: str) -> str:
    date = json.loads(meta).get("date")
    return "" if date is None else str(date)


def _gather(sketches: Sequence[pa.RecordBatch], column: str) -> np.ndarray:
    return np.concatenate([batch.column(column).to_numpy() for batch in sketches])


def preference(sketches: Sequence[pa.RecordBatch]) -> np.ndarray:
    """Returns the sketched documents from the best copy to the worst: the newest first, then the least id, then row."""
    dates = pa.chunked_array([batch.column("date") for batch in sketches]).dictionary_encode().combine_chunks()
    names = dates.dictionary.to_pylist()
    newest = np.empty(len(names), np.int64)
    newest[sorted(range(len(names)), key=names.__getitem__, reverse=True)] = np.arange(len(names))
    age = newest[dates.indices.to_numpy()]
    return np.lexsort((_gather(sketches, "row"), _gather(sketches, "id_low"), _gather(sketches, "id_high"), age))


def _name(high: np.uint64, low: np.uint64) -> str:
    return f"{int(high):016x}{int(low):016x}"


# --- exact -----------------------------------------------------------------------------------------------------------


def sketch_exact(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Returns identity and 128-bit key of every row."""
    keys_D2, is_ascii_D = _plain_keys(batch, only_ascii=True)
    others = np.flatnonzero(~is_ascii_D)
    if len(others):
        plain = _plain(batch.take(pa.array(others))).batch
        keys_D2[others], _ = _plain_keys(plain, only_ascii=False)
    key = {"key_a": pa.array(keys_D2[:, 0].copy()), "key_b": pa.array(keys_D2[:, 1].copy())}
    return pa.record_batch(_identity(batch) | key)


def _plain_keys(batch: pa.RecordBatch, *, only_ascii: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the key [D, 2] of every text that is ASCII, and which are; other texts have to be plain (`plain_text`)
    and only_ascii False.
    """
    from data_pipelines import editing

    data, offsets = text_buffer(batch)
    keys_D2, is_ascii_D = np.empty((batch.num_rows, 2), np.uint64), np.empty(batch.num_rows, bool)
    scratch = np.empty(int(np.diff(offsets).max(initial=0)) + 64, np.uint8)
    editing.plain_keys(data, offsets, only_ascii, scratch, keys_D2, is_ascii_D)
    return keys_D2, is_ascii_D


def plain_text(text: str) -> str:
    """Returns the text in lower case, each run of white space one space, none at the ends."""
    return " ".join(text.split()).lower()


_plain = edit(plain_text, plain_rows)


def resolve_exact(sketches: Sequence[pa.RecordBatch], fetch: Fetch, scratch: Path) -> Decision:
    """Drops all documents of a key but the best; a document that comes twice, id and all, is a `duplicate_id`."""
    order = preference(sketches)
    rows, high, low, a, b = (_gather(sketches, name)[order] for name in ("row", "id_high", "id_low", "key_a", "key_b"))
    by_key = np.lexsort((b, a))  # stable: the best of a key comes first
    new = np.ones(len(by_key), bool)
    new[1:] = (a[by_key][1:] != a[by_key][:-1]) | (b[by_key][1:] != b[by_key][:-1])
    stays = np.empty(len(order), np.int64)
    stays[by_key] = by_key[np.flatnonzero(new)][np.cumsum(new) - 1]
    gone = np.flatnonzero(stays != np.arange(len(order)))
    gone = gone[np.argsort(rows[gone])]
    reasons, details = [], []
    for place, stay in zip(gone.tolist(), stays[gone].tolist()):
        twice = high[place] == high[stay] and low[place] == low[stay]
        reasons.append("duplicate_id" if twice else "exact_duplicate")
        same = "came before: the same source, path and text" if twice else f"the same as {_name(high[stay], low[stay])}"
        details.append(same)
    return Decision(rows[gone], reasons, details)


exact_duplicates = Corpus(sketch_exact, resolve_exact)
"""Drops documents whose text, but for white space and case, another one has."""


# --- near ------------------------------------------------------------------------------------------------------------


def near_duplicates(settings: NearDuplicates) -> Corpus:
    """Returns the stage that keeps one document of every group of near duplicates."""
    return Corpus(partial(sketch_near, settings=settings), partial(resolve_near, settings=settings))


def sketch_near(batch: pa.RecordBatch, *, settings: NearDuplicates) -> pa.RecordBatch:
    """Returns identity, number of distinct shingles and MinHash signature of every row."""
    sizes, signatures = sign(find_spans(batch), seed=settings.seed)
    raw = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(4 * NUM_HASHES), batch.num_rows, [None, pa.py_buffer(signatures.tobytes())]
    )
    return pa.record_batch(_identity(batch) | {"num_shingles": pa.array(sizes, pa.int64()), "signature": raw})


def resolve_near(
    sketches: Sequence[pa.RecordBatch], fetch: Fetch, scratch: Path, *, settings: NearDuplicates
) -> Decision:
    """Drops every document of a group but the best."""
    groups = group(sketches, fetch, scratch, settings)
    places = np.flatnonzero(groups.root_D != np.arange(len(groups.root_D)))
    places = places[np.argsort(groups.rows_D[places])]
    order = preference(sketches)
    high, low = _gather(sketches, "id_high")[order], _gather(sketches, "id_low")[order]
    details = []
    for place in places.tolist():
        root, partner = groups.root_D[place], groups.partner_D[place]
        pair = f"{_name(high[partner], low[partner])}, Jaccard {groups.similarity_D[place]:.3f}"
        details.append(f"in the group of {_name(high[root], low[root])}; tied to {pair}")
    described = describe_groups(groups, high, low, _gather(sketches, "num_shingles")[order], fetch, settings)
    return Decision(groups.rows_D[places], ["near_duplicate"] * len(places), details, groups.report | described)


def describe_groups(
    groups: Groups,
    high_D: np.ndarray,
    low_D: np.ndarray,
    num_shingles_D: np.ndarray,
    fetch: Fetch,
    settings: NearDuplicates,
) -> dict[str, Any]:
    """Returns what the groups are like, all of them in figures and some in detail, as JSON values.

    sizes: members -> groups. ties: of the documents that go, by the Jaccard similarity to their closest verified one.
    pairs: some of these. shown: the largest groups, and as many others; ids are hashes, so that those with the least
    ones are drawn at random, the same whatever the order of the input.
    """
    num_members = np.bincount(groups.root_D, minlength=1)
    roots = np.flatnonzero(num_members > 1)
    sizes, counts = np.unique(num_members[roots], return_counts=True)
    largest = roots[np.lexsort((roots, -num_members[roots]))][: SHOWN_GROUPS // 2]
    others = np.setdiff1d(roots, largest)
    others = others[np.lexsort((low_D[others], high_D[others]))][: SHOWN_GROUPS // 2]
    by_root = np.argsort(groups.root_D, kind="stable")
    starts = np.searchsorted(groups.root_D[by_root], [*largest, *others])
    shown = []
    for root, start in zip([*largest.tolist(), *others.tolist()], starts.tolist()):
        places = by_root[start : start + min(int(num_members[root]), SHOWN_MEMBERS)]
        fit = np.searchsorted(np.cumsum(num_shingles_D[places]), SHOWN_SHINGLES, side="right")
        places = places[: max(int(fit), 2)]
        members = [_name(high_D[place], low_D[place]) for place in places.tolist()]
        distances = _distances(groups.rows_D[places], fetch, settings)
        shown.append({"size": int(num_members[root]), "members": members, **distances})
    gone = np.flatnonzero(groups.root_D != np.arange(len(groups.root_D)))
    pairs = gone[np.lexsort((low_D[gone], high_D[gone]))][:SHOWN_PAIRS]
    ties, edges = np.histogram(groups.similarity_D[gone], bins=6, range=(settings.threshold, 1))
    return {
        "sizes": dict(zip(map(str, sizes.tolist()), counts.tolist())),
        "ties": {"edges": [round(edge, 6) for edge in edges.tolist()], "documents": ties.tolist()},
        "pairs": [
            [_name(high_D[one], low_D[one]), _name(high_D[other], low_D[other]), _rounded(groups.similarity_D[one])]
            for one, other in zip(pairs.tolist(), groups.partner_D[pairs].tolist())
        ],
        "shown": shown,
    }


def _distances(rows: np.ndarray, fetch: Fetch, settings: NearDuplicates) -> dict[str, Any]:
    """Of all pairs of these documents: the nearest and the farthest (their places, similarity), how many lie below the
    threshold: groups are made by chains of pairs.
    """
    from data_pipelines import kernels

    by_row = np.argsort(rows)
    place_of = np.empty(len(rows), np.int64)
    place_of[by_row] = np.arange(len(rows))
    shingles = shingle(find_spans(fetch(rows[by_row])))
    spans = [(shingles.starts[place], shingles.starts[place + 1]) for place in place_of.tolist()]
    found = [(kernels.jaccard(shingles.values, *spans[a], *spans[b]), a, b) for b in range(len(rows)) for a in range(b)]
    nearest, farthest = max(found, key=lambda pair: pair[0]), min(found, key=lambda pair: pair[0])
    return {
        "nearest": [*nearest[1:], _rounded(nearest[0])],
        "farthest": [*farthest[1:], _rounded(farthest[0])],
        "pairs": len(found),
        "below_threshold": sum(pair[0] < settings.threshold for pair in found),
    }


def _rounded(similarity: float) -> float:
    return round(float(similarity), 6)


def group(sketches: Sequence[pa.RecordBatch], fetch: Fetch, scratch: Path, settings: NearDuplicates) -> Groups:
    """Returns which documents belong together: verified pairs, joined into groups.

    Documents are numbered by preference throughout, so that nothing depends on the order of the input.
    """
    from data_pipelines import kernels

    order = preference(sketches)
    rows_D, sizes_D = _gather(sketches, "row")[order], _gather(sketches, "num_shingles")[order]
    num_documents = len(order)
    place_of = np.empty(num_documents, np.int64)
    place_of[order] = np.arange(num_documents)
    signatures = _in_order(sketches, place_of, scratch)
    root_D, partner_D = np.arange(num_documents), np.full(num_documents, -1)
    similarity_D = np.zeros(num_documents)
    report = {"candidates": 0, "verified": 0, "groups": 0, "largest_group": 0, "capped_buckets": 0}
    for pairs in _candidate_pairs(signatures, sizes_D, root_D, settings, report):
        report["candidates"] += len(pairs)
        for block in _blocks(pairs, sizes_D):
            apart = kernels.apart(block, root_D)
            block = block[apart]
            places, local = np.unique(block, return_inverse=True)
            by_row = np.argsort(rows_D[places])
            back = np.empty(len(places), np.int64)
            back[by_row] = np.arange(len(places))
            shingles = shingle(find_spans(fetch(rows_D[places][by_row])))
            report["verified"] += kernels.unite(
                block, back[local.reshape(block.shape)], shingles.values, shingles.starts, settings.threshold,
                root_D, partner_D, similarity_D,
            )  # fmt: skip
    while (root_D[root_D] != root_D).any():
        root_D = root_D[root_D]
    members = np.bincount(root_D, minlength=1)
    report["groups"], report["largest_group"] = int((members > 1).sum()), int(members.max())
    return Groups(rows_D, root_D, partner_D, similarity_D, report)


def _in_order(sketches: Sequence[pa.RecordBatch], place_of: np.ndarray, scratch: Path) -> np.ndarray:
    """Signatures [D, 128] in order of preference, in a mapped file: they need not fit into memory."""
    shape = (len(place_of), NUM_HASHES)
    if not len(place_of):
        return np.zeros(shape, np.uint32)
    mapped = np.memmap(scratch / "signatures", np.uint32, "w+", shape=shape)
    start = 0
    for batch in sketches:
        column = batch.column("signature")
        raw = np.frombuffer(column.buffers()[1], np.uint32).reshape(-1, NUM_HASHES)
        mapped[place_of[start : start + len(column)]] = raw[column.offset : column.offset + len(column)]
        start += len(column)
    return mapped


def _candidate_pairs(
    signatures: np.ndarray,
    sizes_D: np.ndarray,
    root_D: np.ndarray,
    settings: NearDuplicates,
    report: dict[str, int],
) -> Iterator[np.ndarray]:
    """Pairs [P, 2] that share a band, are of sizes and signatures that allow the threshold, and are in no one group.

    At most about PAIRS_AT_ONCE are given at a time, each once, the better document second, in order. The report counts
    the buckets of which not all pairs were looked at.
    """
    from data_pipelines import kernels

    some = np.flatnonzero(sizes_D > 0)
    num_ranges = 1 + len(some) // KEYS_AT_ONCE
    agreement = (settings.threshold - settings.signature_slack) * NUM_HASHES
    room = min(PAIRS_AT_ONCE, len(some) * settings.neighbours) + settings.neighbours
    waiting = np.zeros((0, 2), np.int64)
    for band in range(settings.bands):
        all_keys = np.empty(len(some), np.uint64)
        kernels.band_keys(signatures, some, band, settings.rows, all_keys)
        for part in range(num_ranges):
            chosen = np.flatnonzero(all_keys % np.uint64(num_ranges) == part) if num_ranges > 1 else slice(None)
            keys, members = all_keys[chosen], some[chosen]
            by_key = np.argsort(keys, kind="stable")
            keys, members = keys[by_key], members[by_key]
            report["capped_buckets"] += int((np.diff(_bounds(keys)) > settings.neighbours + 1).sum())
            at = 0
            while at < len(keys):
                found = np.empty((room, 2), np.int64)
                count, at = kernels.candidates(
                    keys, members, sizes_D, signatures, settings.threshold, agreement, settings.neighbours, root_D, at,
                    found,
                )  # fmt: skip
                waiting = np.concatenate([waiting, found[:count]])
                if len(waiting) >= PAIRS_AT_ONCE:
                    yield _distinct(waiting, len(sizes_D))
                    waiting = waiting[:0]
    if len(waiting):
        yield _distinct(waiting, len(sizes_D))


def _bounds(keys: np.ndarray) -> np.ndarray:
    """Where runs of equal keys begin, and the end."""
    return np.concatenate([[0], 1 + np.flatnonzero(keys[1:] != keys[:-1]), [len(keys)]])


def _distinct(pairs: np.ndarray, num_documents: int) -> np.ndarray:
    codes = np.unique(pairs[:, 0] * num_documents + pairs[:, 1])
    return np.stack(np.divmod(codes, num_documents), axis=1)


def _blocks(pairs: np.ndarray, sizes_D: np.ndarray) -> Iterator[np.ndarray]:
    """The pairs in blocks whose documents have at most about SHINGLES_AT_ONCE shingles together."""
    from data_pipelines import kernels

    seen = np.full(len(sizes_D), -1, np.int32)
    start = number = 0
    while start < len(pairs):
        stop = kernels.end_of_block(pairs, sizes_D, start, SHINGLES_AT_ONCE, seen, number)
        yield pairs[start:stop]
        start, number = stop, number + 1


def sign(words: Spans, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns (number of distinct shingles [D], MinHash signatures [D, 128] uint32) of the rows.

    Two signatures agree in a share of their hashes that estimates the Jaccard similarity of the rows.
    """
    from data_pipelines import kernels

    draws = _random_words(seed, 2 * NUM_HASHES)
    num_rows, most = len(words.starts), int((words.stops - words.starts).max(initial=0))
    sizes, out = np.empty(num_rows, np.int64), np.empty((num_rows, NUM_HASHES), np.uint32)
    scratch = (
        np.empty(power_of_two(2 * most), np.uint64), np.empty(power_of_two(4 * most), np.uint8),
        np.empty(most + 4, np.int32), np.empty(most + 4, np.uint64),
    )  # fmt: skip
    odd = draws[:NUM_HASHES] | np.uint32(1)
    kernels.signatures(*words, odd, draws[NUM_HASHES:], *scratch, sizes, out)
    return sizes, out


def shingle(words: Spans) -> Shingles:
    """Returns the distinct shingles of every row: 5 words running; a row of fewer words has one shingle of them all."""
    from data_pipelines import kernels

    values = np.empty(int((words.stops - words.starts).sum()), np.uint64)
    starts = np.empty(len(words.starts) + 1, np.int64)
    kernels.shingles(*words, values, starts)
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist()):
        values[start:stop].sort()
    kernels.distinct(values, starts)
    return Shingles(values[: starts[-1]], starts)


def _random_words(seed: int, count: int) -> np.ndarray:
    """Returns uint32 of splitmix64: the same numbers in every version of every library."""
    state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
