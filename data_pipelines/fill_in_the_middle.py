"""Documents rearranged so that a left-to-right model learns to fill a gap (Bavarian et al. 2022, arXiv:2207.14255).

A document is cut at two places into prefix, middle and suffix. PSM writes PREFIX prefix SUFFIX suffix MIDDLE middle;
SPM, the paper's second variant, writes PREFIX SUFFIX suffix MIDDLE prefix middle. Whether, how and where a document is
cut is a function of (seed, document id) alone, and nothing ever crosses into another document.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, NamedTuple

import pyarrow as pa

from data_pipelines.document import Outcome, with_text


@dataclass(frozen=True)
class FillInTheMiddle:
    """rate: share of documents that are rearranged; spm_rate: share of those that are written as SPM.

    prefix, middle, suffix: the three marks; they must be special tokens of the tokenizer.
    """

    prefix: str
    middle: str
    suffix: str
    rate: float = 0.5
    spm_rate: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name in ("rate", "spm_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a share from 0 to 1")
        marks = (self.prefix, self.middle, self.suffix)
        if not all(marks) or any(one in other for one, other in permutations(marks, 2)):
            raise ValueError(f"the marks are {marks}; wanted three texts of which none is part of another")


class Cut(NamedTuple):
    """The middle is [start, stop) of the document."""

    order: Literal["psm", "spm"]
    start: int
    stop: int


def draw_cut(length: int, document_id: str, settings: FillInTheMiddle) -> Cut | None:
    """Returns where a document of this length (characters or tokens) is cut, or None where it stays as it is.

    The two places are drawn independently and evenly from 0 to length, both included.
    """
    digest = hashlib.sha256(f"{settings.seed}:{document_id}".encode()).digest()
    chosen, spm, one, other = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4))
    if chosen >= settings.rate * 2.0**64:
        return None
    first, second = sorted((one * (length + 1) >> 64, other * (length + 1) >> 64))
    return Cut("spm" if spm < settings.spm_rate * 2.0**64 else "psm", first, second)


def rearrange_text(text: str, document_id: str, settings: FillInTheMiddle) -> str:
    """Returns the text, rearranged or as it is. A text that holds one of the marks stays as it is."""
    cut = draw_cut(len(text), document_id, settings)
    if cut is None or any(mark in text for mark in (settings.prefix, settings.middle, settings.suffix)):
        return text
    before, middle, after = text[: cut.start], text[cut.start : cut.stop], text[cut.stop :]
    if cut.order == "spm":
        return "".join([settings.prefix, settings.suffix, after, settings.middle, before, middle])
    return "".join([settings.prefix, before, settings.suffix, after, settings.middle, middle])


def rearrange_tokens(
    tokens: Sequence[int], document_id: str, settings: FillInTheMiddle, *, ids: tuple[int, int, int]
) -> list[int]:
    """Returns the tokens of one document, rearranged or as they are. ids: of the marks prefix, middle, suffix.

    Leave tokens that begin or end every document (BOS, EOS) out and put them around what comes back.
    """
    if len(set(ids)) < 3:
        raise ValueError(f"the ids of the marks are {ids}; wanted three different ones")
    tokens, (prefix, middle, suffix) = list(tokens), ids
    cut = draw_cut(len(tokens), document_id, settings)
    if cut is None or not set(ids).isdisjoint(tokens):
        return tokens
    before, inside, after = tokens[: cut.start], tokens[cut.start : cut.stop], tokens[cut.stop :]
    if cut.order == "spm":
        return [prefix, suffix, *after, middle, *before, *inside]
    return [prefix, *before, suffix, *after, middle, *inside]


def restore_text(text: str, settings: FillInTheMiddle) -> str:
    """Returns the document that a rearranged text was made of; other texts come back as they are."""
    if not text.startswith(settings.prefix):
        return text
    before, _, rest = text.removeprefix(settings.prefix).partition(settings.suffix)
    after, _, middle = rest.rpartition(settings.middle)
    return before + middle + after  # SPM has nothing before SUFFIX, and its "middle" is prefix and middle in one


def fill_in_the_middle(settings: FillInTheMiddle) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that rearranges its share of the rows. It drops none, and belongs behind all that read text."""

    def apply(batch: pa.RecordBatch) -> Outcome:
        rows = zip(batch.column("text").to_pylist(), batch.column("id").to_pylist(), strict=True)
        texts = [rearrange_text(text, document_id, settings) for text, document_id in rows]
        return Outcome(with_text(batch, texts), [None] * batch.num_rows, [None] * batch.num_rows)

    return apply
