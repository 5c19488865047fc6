"""Rules that drop a document by measured values, each with a named reason and a visible threshold.

Text: the kinds of Gopher (arXiv:2112.11446, A1.1), C4 (arXiv:1910.10683, 2.2) and RefinedWeb (arXiv:2306.01116), and
the three groups that InternLM2's report names: line breaks and separators, abnormal characters, punctuation. The report
prints no thresholds: the numbers here are defaults of this project. Each Han or kana character is a word by itself, so
the same bounds hold for Chinese; the two that do not (stop words, length of words) are asked of other scripts only.
Those of code are in `code_rules.py`.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import Check, Outcome, text_buffer, with_text
from data_pipelines.words import Words, find_words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True)
class TextRules:
    """A document goes when a measure lies below its min_ or above its max_. Shares are from 0 to 1."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 2.5
    max_mean_word_length: float = 10.0
    """In characters, of scripts that put spaces between words."""
    min_alphabetic_words: float = 0.7
    min_stop_words: int = 2
    """How many different ones of `STOP_WORDS`."""
    max_hashes_per_word: float = 0.1
    max_ellipses_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    max_duplicate_lines: float = 0.3
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_line_bytes: float = 0.2
    max_top_ngram_bytes: tuple[float, float, float] = (0.20, 0.18, 0.16)
    """Of 2-, 3- and 4-grams."""
    max_duplicate_ngram_bytes: tuple[float, float, float, float, float, float] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Of 5- to 10-grams."""
    min_sentences: int = 3
    min_terminal_lines: float = 0.12
    """Lines that end in a mark that ends a sentence."""
    max_short_lines: float = 0.67
    """Lines of at most 30 characters."""
    max_newlines_per_word: float = 0.3
    max_line_characters: int = 20_000
    max_blank_lines: float = 0.8
    max_replacement_characters: float = 0.001
    max_control_characters: float = 0.001
    min_letters: float = 0.5
    """Share of letters in the characters that are no white space."""
    max_punctuation: float = 0.3
    allow_braces: bool = False
    """C4 takes a { for a sign of code."""


WEB = TextRules()
"""Pages of the web."""

REFERENCE = TextRules(
    min_words=12, max_words=10_000_000, max_line_characters=1_000_000, min_mean_word_length=2.0, min_stop_words=0,
    min_sentences=1, min_terminal_lines=0.0,
    max_short_lines=1.0, max_newlines_per_word=1.5, max_bullet_lines=1.0, max_ellipsis_lines=0.5,
    max_duplicate_lines=0.6, max_duplicate_line_bytes=0.3, max_duplicate_paragraphs=0.4, min_alphabetic_words=0.5,
    max_top_ngram_bytes=(0.4, 0.35, 0.35), max_duplicate_ngram_bytes=(0.5, 0.45, 0.45, 0.4, 0.4, 0.4),
    min_letters=0.3, max_punctuation=0.5, max_hashes_per_word=0.3, allow_braces=True,
)  # fmt: skip
"""Documentation: short entries, signatures, tables and code between the sentences are what it is made of. The closing
brackets of an example are lines that repeat themselves; what they weigh in bytes is little.
"""


def judge(batch: pa.RecordBatch, checks: Iterable[Check]) -> Outcome:
    """Returns the batch with, per row, its first failing check as the reason and all of them with values as detail."""
    failed: list[list[str]] = [[] for _ in range(batch.num_rows)]
    reasons: list[str | None] = [None] * batch.num_rows
    checks = list(checks)
    for check in checks:
        for row in np.flatnonzero(check.fails()).tolist():
            reasons[row] = reasons[row] or check.reason
            failed[row].append(f"{check.reason}: {check.values_D[row]:.4g} is {check.side} {check.bound:g}")
    return Outcome(batch, reasons, ["; ".join(texts) or None for texts in failed], checks)


def text_rules(rules: TextRules) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops what breaks the rules."""
    return lambda batch: judge(batch, text_checks(batch, rules))


def text_checks(batch: pa.RecordBatch, rules: TextRules) -> list[Check]:
    """Returns every measure of the batch beside its bound; the order decides which reason is recorded first.

    Shares of duplicate n-grams are 0 where they cannot reach the least of their bounds.
    """
    from data_pipelines import text_counts as k
    from data_pipelines.repetition import DUPLICATE_NGRAMS, TOP_NGRAMS

    data, offsets = text_buffer(batch)
    counts_DM = np.zeros((batch.num_rows, k.NUM_COUNTS))
    k.counts(data, offsets, counts_DM)
    count = counts_DM.T
    words = find_words(batch)
    totals_D3 = word_totals(words)
    num_D = np.diff(words.starts).astype(np.float64)
    some_D, lines_D, characters_D = np.maximum(num_D, 1), np.maximum(count[k.LINES], 1), count[k.CHARACTERS]
    all_D = np.maximum(characters_D, 1)
    blank_D = count[k.BLANK_LINES] / np.maximum(count[k.LINES] + count[k.BLANK_LINES], 1)
    visible_D = np.maximum(count[k.LETTERS] + count[k.DIGITS] + count[k.PUNCTUATION], 1)
    spaced_D = count[k.HAN] < 0.3 * np.maximum(count[k.LETTERS], 1)  # scripts that put spaces between words
    mean_D = (totals_D3[:, 0] - count[k.WORD_TAIL_BYTES]) / np.maximum(num_D - count[k.WORD_JOINS], 1)
    alphabetic_D = totals_D3[:, 1] / some_D
    found = repetition(words)
    ngrams = zip(TOP_NGRAMS, found.top_D3.T, rules.max_top_ngram_bytes, strict=True)
    suspects = np.flatnonzero(found.cover_D > min(rules.max_duplicate_ngram_bytes))  # no other row can break a bound
    shares_D6 = duplicate_ngram_shares(words, found, suspects)
    repeats = zip(DUPLICATE_NGRAMS, shares_D6.T, rules.max_duplicate_ngram_bytes, strict=True)
    return [
        Check("few_words", num_D, "below", rules.min_words),
        Check("many_words", num_D, "above", rules.max_words),
        Check("replacement_characters", count[k.REPLACEMENTS] / all_D, "above", rules.max_replacement_characters),
        Check("control_characters", count[k.CONTROLS] / all_D, "above", rules.max_control_characters),
        Check("few_letters", count[k.LETTERS] / visible_D, "below", rules.min_letters),
        Check("much_punctuation", count[k.PUNCTUATION] / visible_D, "above", rules.max_punctuation),
        Check("short_words", np.where(spaced_D, mean_D, np.inf), "below", rules.min_mean_word_length),
        Check("long_words", np.where(spaced_D, mean_D, 0), "above", rules.max_mean_word_length),
        Check("few_alphabetic_words", alphabetic_D, "below", rules.min_alphabetic_words),
        Check("few_stop_words", np.where(spaced_D, totals_D3[:, 2], np.inf), "below", rules.min_stop_words),
        Check("hash_signs", count[k.HASHES] / some_D, "above", rules.max_hashes_per_word),
        Check("ellipses", count[k.ELLIPSES] / some_D, "above", rules.max_ellipses_per_word),
        Check("bullet_lines", count[k.BULLET_LINES] / lines_D, "above", rules.max_bullet_lines),
        Check("ellipsis_lines", count[k.ELLIPSIS_LINES] / lines_D, "above", rules.max_ellipsis_lines),
        Check("few_sentences", count[k.SENTENCES], "below", rules.min_sentences),
        Check("lines_without_end_mark", count[k.TERMINAL_LINES] / lines_D, "below", rules.min_terminal_lines),
        Check("short_lines", count[k.SHORT_LINES] / lines_D, "above", rules.max_short_lines),
        Check("line_breaks", count[k.NEWLINES] / some_D, "above", rules.max_newlines_per_word),
        Check("long_line", count[k.LONGEST_LINE], "above", rules.max_line_characters),
        Check("blank_lines", blank_D, "above", rules.max_blank_lines),
        Check("braces", count[k.BRACES], "above", np.inf if rules.allow_braces else 0),
        Check("lorem_ipsum", k.hold_lorem_ipsum(data, offsets), "above", 0),
        Check("duplicate_lines", count[k.DUPLICATE_LINES], "above", rules.max_duplicate_lines),
        Check("duplicate_line_bytes", count[k.DUPLICATE_LINE_BYTES], "above", rules.max_duplicate_line_bytes),
        Check("duplicate_paragraphs", count[k.DUPLICATE_PARAGRAPHS], "above", rules.max_duplicate_paragraphs),
        *(Check(f"top_{n}gram", values, "above", bound) for n, values, bound in ngrams),
        *(Check(f"duplicate_{n}grams", values, "above", bound) for n, values, bound in repeats),
    ]


def power_of_two(least: int) -> int:
    return 1 << max(least - 1, 15).bit_length()


def word_totals(words: Words) -> np.ndarray:
    """Returns [D, 3] of every row: the bytes of its words, its words with a letter, its different `STOP_WORDS`."""
    from data_pipelines import kernels

    stop_words = kernels.word_hashes(" ".join(STOP_WORDS))
    totals_D3 = np.zeros((len(words.starts) - 1, 3))
    kernels.word_totals(words.hashes, words.lengths, words.flags, words.starts, stop_words, totals_D3)
    return totals_D3


class Repetition(NamedTuple):
    """Shares of the bytes of the words: of the top 2-, 3- and 4-gram; a bound on those of longer duplicate n-grams.

    repeated: of every word, whether the five words from it on stand elsewhere in its row as well.
    """

    top_D3: np.ndarray
    cover_D: np.ndarray
    repeated: np.ndarray


def repetition(words: Words) -> Repetition:
    """Returns how much of every row repeats itself."""
    from data_pipelines import repetition as kernels

    num_rows, most = len(words.starts) - 1, int(np.diff(words.starts).max(initial=0))
    scratch = (
        np.empty(power_of_two(2 * most), np.uint64), np.empty(power_of_two(4 * most), np.int32),
        *(np.empty(most + 1, np.int32) for _ in range(4)), np.empty(most + 1, np.uint64), np.empty(most + 1, np.int64),
    )  # fmt: skip
    found = Repetition(
        np.zeros((num_rows, len(kernels.TOP_NGRAMS))), np.zeros(num_rows), np.zeros(len(words.hashes), bool)
    )
    kernels.repetition(words.hashes, words.lengths, words.starts, *scratch, found.repeated, found.top_D3, found.cover_D)
    return found


def duplicate_ngram_shares(words: Words, found: Repetition, rows: np.ndarray) -> np.ndarray:
    """Returns [D, 6] per row, n from 5 to 10: the bytes of words inside n-grams met before over those of all words.

    0 in rows not named. found: `repetition` of the words.
    """
    from data_pipelines import repetition as kernels

    shares_D6 = np.zeros((len(words.starts) - 1, len(kernels.DUPLICATE_NGRAMS)))
    most = int(np.diff(words.starts)[rows].max(initial=0))
    scratch = (
        np.empty(power_of_two(2 * most), np.uint64), np.empty(most + 1, np.uint64),
        np.empty(most + 1, np.int64), np.empty(most + 1, np.int64),
    )  # fmt: skip
    kernels.duplicate_ngrams(words.hashes, words.lengths, words.starts, found.repeated, rows, *scratch, shares_D6)
    return shares_D6


# --- edits -----------------------------------------------------------------------------------------------------------

INVISIBLE = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\u00ad]")
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
TRAILING = " \t\u3000\xa0"
BLANK_RUN = re.compile(r"\n{4,}")
POLICY_PHRASES = (
    "javascript", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
POLICY = re.compile("|".join(POLICY_PHRASES), re.IGNORECASE)
CITATION = re.compile(r"\[(\d+|edit|citation needed)\]")


def normalise_text(text: str) -> str:
    """Returns the text in NFC with \\n line ends, without invisible and control characters and runs of blank lines; a
    text of which nothing is left is "".
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.isascii():
        text = INVISIBLE.sub("", unicodedata.normalize("NFC", text))
    text = "\n".join([line.rstrip(TRAILING) for line in CONTROL.sub("", text).split("\n")])
    text = BLANK_RUN.sub("\n\n\n", text).strip("\n")
    return text and text + "\n"


def normalise_code(text: str) -> str:
    """Returns the text with \\n line ends and without a byte order mark; white space stays as it is."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def clean_lines(text: str) -> str:
    """Returns the text without C4's policy and JavaScript lines and without citation marks."""
    return "\n".join(CITATION.sub("", line) for line in text.split("\n") if not POLICY.search(line))


class Edited(NamedTuple):
    """Bytes of the edited rows end to end, where each starts, and which rows are left to the edit's definition."""

    data: np.ndarray
    offsets: np.ndarray
    hard: np.ndarray


def _compiled_edit(batch: pa.RecordBatch, kernel: Callable[..., None], *arguments: np.ndarray) -> Edited:
    data, offsets = text_buffer(batch)
    out = np.empty(int(offsets[-1] - offsets[0]) + batch.num_rows + 64, np.uint8)
    edited = Edited(out, np.zeros(batch.num_rows + 1, np.int64), np.zeros(batch.num_rows, bool))
    kernel(data, offsets, *arguments, *edited)
    return edited


def normalise_rows(batch: pa.RecordBatch) -> Edited:
    """`normalise_text`, compiled."""
    from data_pipelines import editing

    return _compiled_edit(batch, editing.normalise)


def clean_rows(batch: pa.RecordBatch) -> Edited:
    """`clean_lines`, compiled."""
    from data_pipelines import editing

    phrases = [phrase.encode() for phrase in POLICY_PHRASES]
    starts = np.cumsum([0, *map(len, phrases)])
    return _compiled_edit(batch, editing.clean_lines, np.frombuffer(b"".join(phrases), np.uint8), starts)


def plain_rows(batch: pa.RecordBatch) -> Edited:
    """The text as exact duplicates compare it (`dedup.plain_text`), compiled."""
    from data_pipelines import editing

    return _compiled_edit(batch, editing.plain, _plain_points())


@functools.cache
def _plain_points() -> np.ndarray:
    """Code point below 0x20000 -> what it becomes in plain text; 0 where that cannot be said of it alone: it becomes
    several characters or more bytes, or its neighbours decide, as they do of a capital sigma.
    """
    points = np.array([0 if 0xD800 <= point < 0xE000 else point for point in range(0x20000)], np.uint32)
    points[[0x130, 0x3A3]] = 0
    texts = points.tobytes().decode("utf-32-le"), re.sub(r"\s", " ", points.tobytes().decode("utf-32-le").lower())
    becomes = np.frombuffer(texts[1].encode("utf-32-le"), np.uint32).copy()
    num_bytes = [np.digitize(each, [0x80, 0x800, 0x10000]) for each in (points, becomes)]
    becomes[num_bytes[1] > num_bytes[0]] = 0
    return becomes


def edit(
    change: Callable[[str], str], fast: Callable[[pa.RecordBatch], Edited] | None = None
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that changes every text and drops those of which nothing is left ("empty").

    fast: the same change for whole batches; `change` edits the rows that it leaves.
    """

    def apply(batch: pa.RecordBatch) -> Outcome:
        if fast is None or batch.num_rows == 0:
            texts = pa.array([change(text) for text in batch.column("text").to_pylist()], pa.large_string())
        else:
            texts = _texts(batch, fast(batch), change)
        reasons: list[str | None] = [None] * batch.num_rows
        from data_pipelines import editing

        may_be_blank_D = np.empty(batch.num_rows, bool)
        edited = with_text(batch, texts)
        editing.may_be_blank(*text_buffer(edited), may_be_blank_D)
        for row in np.flatnonzero(may_be_blank_D).tolist():
            reasons[row] = None if texts[row].as_py().strip() else "empty"
        return Outcome(edited, reasons, [reason and "no character is left" for reason in reasons])

    return apply


def _texts(batch: pa.RecordBatch, edited: Edited, change: Callable[[str], str]) -> pa.Array:
    """The edited texts as one column."""
    data, offsets = edited.data, edited.offsets
    rows = np.flatnonzero(edited.hard).tolist()  # nothing was written for these
    if rows:
        changed = [change(batch.column("text")[row].as_py()).encode() for row in rows]
        data, offsets = _with_rows(data, offsets, rows, changed)
    return pa.LargeStringArray.from_buffers(batch.num_rows, pa.py_buffer(offsets), pa.py_buffer(data[: offsets[-1]]))


def _with_rows(
    data: np.ndarray, offsets: np.ndarray, rows: Sequence[int], texts: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray]:
    """The data and offsets with these texts as those of the rows, ascending, which had none: what follows is moved."""
    sizes = np.zeros(len(offsets), np.int64)
    sizes[np.array(rows) + 1] = [len(text) for text in texts]
    moved = offsets + np.cumsum(sizes)
    if moved[-1] > len(data):
        data = np.concatenate([data, np.empty(moved[-1] - len(data), np.uint8)])
    content = memoryview(data)
    starts, stops = offsets[rows].tolist(), [*offsets[rows[1:]].tolist(), int(offsets[-1])]
    for row, text, start, stop in reversed(list(zip(rows, texts, starts, stops, strict=True))):
        place = int(moved[row + 1])
        content[place : place + stop - start] = content[start:stop]
        content[place - len(text) : place] = text
    return data, moved
