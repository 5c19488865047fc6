"""Exact and near-duplicate removal.

Near duplicates: MinHash with 128 hash functions over shingles of 5 words (InternLM2's report, section 3.1), 20 bands of
6 rows, every candidate pair verified by its true Jaccard similarity, 0.7 or more. Words are those of `kernels.words`,
so Chinese needs no segmenter and another indentation does not make code another text. Of a group the newest copy stays
(field `date` of meta), among equally new ones the one with the least id: the order of the input never matters.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Outcome
from data_pipelines.rules import Words, find_words

NUM_HASHES = 128
SHINGLE_WORDS = 5
_SPACE = re.compile(r"\s+")


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
    """root_D: the row that stays for each row (itself where it stays); partner_D, similarity_D: its closest pair."""

    root_D: np.ndarray
    partner_D: np.ndarray
    similarity_D: np.ndarray


def exact_duplicates(batch: pa.RecordBatch) -> Outcome:
    """Drops rows whose text, but for white space and case, another row has."""
    keys = [_key(text) for text in batch.column("text").to_pylist()]
    rank = preference(batch)
    best: dict[bytes, int] = {}
    for row in np.argsort(rank).tolist():
        best.setdefault(keys[row], row)
    stays = [best[key] for key in keys]
    ids = batch.column("id").to_pylist()
    same = [None if stay == row else f"the same as {ids[stay]}" for row, stay in enumerate(stays)]
    return Outcome(batch, [text and "exact_duplicate" for text in same], same)


def _key(text: str) -> bytes:
    plain = _SPACE.sub(" ", text).strip().lower()
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def preference(batch: pa.RecordBatch) -> np.ndarray:
    """Returns the rank of every row among copies: the newest first, then the least id; rank 0 is the best."""
    dates = [
        str(json.loads(meta).get("date", "")) if '"date"' in meta else "" for meta in batch.column("meta").to_pylist()
    ]
    newest = {date: -number for number, date in enumerate(sorted(set(dates)))}
    ids = batch.column("id").to_pylist()
    order = sorted(range(batch.num_rows), key=lambda row: (newest[dates[row]], ids[row], row))
    rank = np.empty(batch.num_rows, np.int64)
    rank[order] = np.arange(batch.num_rows)
    return rank


def near_duplicates(settings: NearDuplicates) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that keeps one row of every group of near duplicates."""

    def apply(batch: pa.RecordBatch) -> Outcome:
        groups = group(batch, settings)
        ids = batch.column("id").to_pylist()
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        for row in np.flatnonzero(groups.root_D != np.arange(batch.num_rows)).tolist():
            reasons[row] = "near_duplicate"
            pair = f"{ids[groups.partner_D[row]]}, Jaccard {groups.similarity_D[row]:.3f}"
            details[row] = f"in the group of {ids[groups.root_D[row]]}; tied to {pair}"
        return Outcome(batch, reasons, details)

    return apply


def group(batch: pa.RecordBatch, settings: NearDuplicates) -> Groups:
    """Returns which rows belong together: verified pairs, joined into groups."""
    from data_pipelines import kernels

    num_rows = batch.num_rows
    shingles = shingle(find_words(batch))
    signatures = sign(shingles, seed=settings.seed)
    keys, members = candidates(signatures, shingles, settings)
    root_D, partner_D, similarity_D = np.arange(num_rows), np.full(num_rows, -1), np.zeros(num_rows)
    kernels.unite(
        keys, members, shingles.values, shingles.starts, preference(batch), signatures, settings.threshold,
        settings.signature_slack, settings.neighbours, root_D, partner_D, similarity_D,
    )  # fmt: skip
    for row in range(num_rows):
        while root_D[row] != root_D[root_D[row]]:
            root_D[row] = root_D[root_D[row]]
    return Groups(root_D, partner_D, similarity_D)


def shingle(words: Words) -> Shingles:
    """Returns the distinct shingles of every row: 5 words running; a row of fewer words has one shingle of them all."""
    num_words = len(words.hashes)
    row_of = np.repeat(np.arange(len(words.starts) - 1), np.diff(words.starts))
    left = words.starts[1:][row_of] - np.arange(num_words)  # words from here to the end of the row
    first = np.arange(num_words) == words.starts[:-1][row_of]
    begins = np.flatnonzero((left >= SHINGLE_WORDS) | first)
    sizes = np.minimum(left[begins], SHINGLE_WORDS)
    values = sizes.astype(np.uint64)
    for place in range(SHINGLE_WORDS):
        has = sizes > place
        mixed = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
        values = np.where(has, mixed + words.hashes[np.minimum(begins + place, num_words - 1)], values)
    rows = row_of[begins]
    order = np.lexsort((values, rows))
    values, rows = values[order], rows[order]
    new = np.ones(len(values), bool)
    new[1:] = (values[1:] != values[:-1]) | (rows[1:] != rows[:-1])
    starts = np.searchsorted(rows[new], np.arange(len(words.starts)))
    return Shingles(values[new], starts.astype(np.int64))


def sign(shingles: Shingles, *, seed: int = 0) -> np.ndarray:
    """Returns MinHash signatures [D, 128] uint32; two agree in a share of hashes that estimates their Jaccard."""
    from data_pipelines import kernels

    draws = _random_words(seed, 2 * NUM_HASHES)
    out = np.empty((len(shingles.starts) - 1, NUM_HASHES), np.uint32)
    kernels.signatures(shingles.values, shingles.starts, draws[:NUM_HASHES] | np.uint32(1), draws[NUM_HASHES:], out)
    return out


def _random_words(seed: int, count: int) -> np.ndarray:
    """Returns uint32 of splitmix64: the same numbers in every version of every library."""
    state = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)


def candidates(signatures: np.ndarray, shingles: Shingles, settings: NearDuplicates) -> tuple[np.ndarray, np.ndarray]:
    """Returns (band keys sorted, row of each): rows that share a key are candidates. Rows without words have none."""
    rows = np.flatnonzero(np.diff(shingles.starts) > 0)
    keys = []
    for band in range(settings.bands):
        key = np.full(len(rows), band + 1, np.uint64)
        for column in range(band * settings.rows, (band + 1) * settings.rows):
            key = (key ^ (key >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + signatures[rows, column]
        keys.append(key)
    key, member = np.concatenate(keys), np.tile(rows, settings.bands)
    order = np.lexsort((member, key))
    return key[order], member[order].astype(np.int64)
