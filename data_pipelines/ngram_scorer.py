"""A scorer of counted words, for `coherence.py` where there is no model: an interpolated trigram with a cache.

    python -m data_pipelines.long_text train --input PATH [PATH ...] --output ngrams

A token is a word as `kernels.words` finds it (a Han character is one), hashed into V = 2^18 buckets; so no word is
unknown, and the probabilities of the V tokens sum to 1. With c the counts of the training text, T(h) the sum of c(h, .)
and N(h) the number of different tokens after h:

    p1(w)      = (max(c(w) - d, 0) + d N() / V) / T()
    p2(w | v)  = (max(c(v, w) - d, 0) + d N(v) p1(w)) / T(v)                    p1(w) where v was not seen
    p3(w | uv) = (max(c(u, v, w) - d, 0) + d N(u, v) p2(w | v)) / T(u, v)       p2(w | v) where uv was not seen

the interpolated absolute discounting of Ney, Essen and Kneser (1994). A trigram does not see S1, so the context enters
through a cache (Kuhn and De Mori, 1990): with k the counts of the row so far, n its tokens, r the counts in which an
occurrence loses half of its weight in `half_life` tokens (Clarkson and Robinson, 1997), and R their sum,

    q0(w)      = (k(w) + a p1(w)) / (n + a)
    q1(w)      = (r(w) + e q0(w)) / (R + e)
    q2(w | v)  = (k(v, w) + b q1(w)) / (k(v, .) + b)
    p(w)       = (1 - s) p3(w | uv) + s q2(w | v)

each smoothed by the one above it, as if that had been seen a, e or b times (MacKay and Peto, 1995). Where S1 is of one
text with S2, its words come back and help; where it is not, they take the cache's probability away from S2's own, and
hurt. So this sees topics and vocabulary, and no argument. Train it on other text than what it is to judge: documents
whose own trigrams were counted need no context.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.coherence import Scored, Scorer, pieces

FORMAT = 2
MANIFEST = "ngrams.json"
ARRAYS = ("words", "pair_keys", "pair_counts", "triple_keys", "triple_counts")
BITS = 18
VOCABULARY = 1 << BITS
MERGE_TOKENS = 1 << 21
"""Tokens whose n-grams are counted before they are added to the others."""


@dataclass(frozen=True)
class NgramSettings:
    """The letters are those of the formulas above."""

    discount: float = 0.75
    """d"""
    cache_share: float = 0.6
    """s"""
    half_life: float = 100.0
    word_smoothing: float = 1000.0
    """a"""
    recent_smoothing: float = 100.0
    """e"""
    pair_smoothing: float = 16.0
    """b"""
    max_ngrams: int = 1 << 24
    """Of two and of three words each; when there are more, those counted least are forgotten."""

    def __post_init__(self):
        if not (0 < self.discount < 1 and 0 <= self.cache_share < 1):
            raise ValueError(
                f"discount is {self.discount} and cache_share {self.cache_share}; give shares between 0 and 1 "
                "(cache_share: 0 as well)"
            )
        for name in ("half_life", "word_smoothing", "recent_smoothing", "pair_smoothing"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if self.max_ngrams < 1024:
            raise ValueError(f"max_ngrams is {self.max_ngrams}; give at least 1024")


class Counts(NamedTuple):
    """words: [V]. A key is the buckets of its words, the first highest, 18 bits each; keys are sorted."""

    words: np.ndarray
    pair_keys: np.ndarray
    pair_counts: np.ndarray
    triple_keys: np.ndarray
    triple_counts: np.ndarray


def encode(text: str) -> np.ndarray:
    """Returns the bucket of every word, int32."""
    from data_pipelines import kernels

    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    room = 2 * len(data) // 3 + 2
    hashes, sizes, flags = np.empty(room, np.uint64), np.empty(room, np.int32), np.empty(room, np.uint8)
    offsets = np.array([0, len(data)], np.int64)
    found = kernels.words(data if len(data) else np.zeros(1, np.uint8), offsets, hashes, sizes, flags, offsets.copy())
    return ((hashes[:found] * np.uint64(kernels.MIX)) >> np.uint64(64 - BITS)).astype(np.int32)


# --- training --------------------------------------------------------------------------------------------------------


def count(texts: Iterable[str], settings: NgramSettings = NgramSettings()) -> Counts:
    """Returns the counts of the texts, the same whatever their order unless n-grams had to be forgotten.

    Memory is bounded by max_ngrams. Raises ValueError where there are no three words in a row.
    """
    words = np.zeros(VOCABULARY, np.int64)
    pairs, triples = _no_ngrams(), _no_ngrams()
    for tokens, starts in _blocks(texts):
        words += np.bincount(tokens, minlength=VOCABULARY)
        ids = tokens.astype(np.uint64)
        firsts = np.zeros(len(ids) + 1, bool)  # where a text begins, no n-gram goes across
        firsts[starts] = True
        two = (ids[:-1] << np.uint64(BITS)) | ids[1:]
        three = (two[:-1] << np.uint64(BITS)) | ids[2:]
        crosses = firsts[1 : len(ids)]
        pairs = _added(pairs, two[~crosses], settings.max_ngrams)
        triples = _added(triples, three[~(crosses[:-1] | crosses[1:])], settings.max_ngrams)
    if not len(triples[0]):
        raise ValueError("the training text has no three words in a row; give text to count")
    return Counts(words, *pairs, *triples)


def _no_ngrams() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.uint64), np.zeros(0, np.int64)


def _blocks(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, list[int]]]:
    """(tokens of several texts, or of pieces of a long one, end to end, where each begins)."""
    waiting: list[np.ndarray] = []
    starts, total = [], 0
    for tokens in (encode(piece) for text in texts for piece in pieces(text)):
        waiting.append(tokens)
        starts.append(total)
        total += len(tokens)
        if total >= MERGE_TOKENS:
            yield np.concatenate(waiting), starts
            waiting, starts, total = [], [], 0
    if total:
        yield np.concatenate(waiting), starts


def _added(held: tuple[np.ndarray, np.ndarray], keys: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The sorted keys and counts with further occurrences; of too many, those counted least are left out."""
    new, counts = np.unique(keys, return_counts=True)
    together, places = np.unique(np.concatenate([held[0], new]), return_inverse=True)
    total = np.bincount(places, np.concatenate([held[1], counts]), minlength=len(together)).astype(np.int64)
    least = 1
    while (total >= least).sum() > most:
        least += 1
    return together[total >= least], total[total >= least]


# --- the folder ------------------------------------------------------------------------------------------------------


def write_counts(folder: Path, counts: Counts, settings: NgramSettings) -> None:
    """Writes the arrays and the manifest with their checksums."""
    for name, array in zip(ARRAYS, counts, strict=True):
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    manifest = {
        "format": FORMAT,
        "settings": asdict(settings),
        "num_tokens": int(counts.words.sum()),
        "num_pairs": len(counts.pair_keys),
        "num_triples": len(counts.triple_keys),
        "sha256": {name: _sha256(folder / f"{name}.npy") for name in ARRAYS},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def open_counts(folder: str | Path) -> Scorer:
    """Returns the scorer of a folder. Raises ValueError naming what is missing, altered or of another format."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this version reads {FORMAT}")
        for name in ARRAYS:
            if manifest["sha256"][name] != _sha256(folder / f"{name}.npy"):
                raise ValueError(f"{name}.npy was altered after it was written, its sha256 differs")
        counts = Counts(*(np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS))
        settings = NgramSettings(**manifest["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no n-grams that can be read ({error}); train them anew") from error
    return ngram_scorer(counts, settings, name=str(folder), version=version_of(folder))


def version_of(folder: str | Path) -> str:
    """Returns the digest of a folder's n-grams and settings."""
    return _sha256(Path(folder) / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- scores ----------------------------------------------------------------------------------------------------------


def make_tables(counts: Counts, settings: NgramSettings) -> Any:
    """Returns the counts as the compiled loops look them up, `ngram_scan.Tables`."""
    from data_pipelines import ngram_scan

    bits, d = np.uint64(BITS), settings.discount
    seen, total = int((counts.words > 0).sum()), int(counts.words.sum())
    words, *of_words = _contexts(counts.pair_keys >> bits, counts.pair_counts)
    wide = np.zeros((2, VOCABULARY))
    wide[:, words] = of_words
    return ngram_scan.Tables(
        (np.maximum(counts.words - d, 0.0) + d * seen / VOCABULARY) / total,
        *ngram_scan.table(counts.pair_keys, counts.pair_counts),
        *ngram_scan.table(counts.triple_keys, counts.triple_counts),
        *wide,
        *ngram_scan.table(*_contexts(counts.triple_keys >> bits, counts.triple_counts)),
        d, settings.cache_share, 0.5 ** (1.0 / settings.half_life),
        settings.word_smoothing, settings.recent_smoothing, settings.pair_smoothing,
    )  # fmt: skip


def _contexts(contexts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different contexts of sorted n-grams; T and N of each."""
    found, starts, different = np.unique(contexts, return_index=True, return_counts=True)
    return found, np.add.reduceat(counts, starts), different


def ngram_scorer(counts: Counts, settings: NgramSettings, *, name: str, version: str) -> Scorer:
    """Returns the scorer. It looks for no most likely token, so its accuracies are NaN."""
    tables = make_tables(counts, settings)

    def score(rows: Sequence[np.ndarray], num_scored: int, length: int) -> Scored:
        from data_pipelines import ngram_scan

        starts = np.cumsum([0, *map(len, rows)])
        losses = np.empty(len(rows))
        cache = ngram_scan.empty_cache(length, VOCABULARY)
        ngram_scan.losses(tables, cache, np.concatenate(rows).astype(np.int64), starts, num_scored, losses)
        return Scored(losses, np.full(len(rows), np.nan))

    return Scorer(name, version, encode, score)
