"""Documents rearranged so that a left-to-right model learns to fill a gap (Bavarian et al. 2022, arXiv:2207.14255).

    python -m data_pipelines.tokens ... --fill-in-the-middle PREFIX MIDDLE SUFFIX [--fill-rate 0.5] [--spm-rate 0.5]

A document is cut between characters at two places into prefix, middle and suffix, which become tokens each by itself,
as they do where a gap is filled. PSM writes PREFIX prefix SUFFIX suffix MIDDLE middle; SPM, the paper's second variant,
writes PREFIX SUFFIX suffix MIDDLE prefix middle. Whether, how and where a document is cut is a function of (seed,
document id) alone, and nothing ever crosses into another document.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internjax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FillInTheMiddle:
    """rate: share of documents that are rearranged; spm_rate: share of those that are written as SPM.

    prefix, middle, suffix: the three marks, special tokens of the tokenizer.
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
        if len({self.prefix, self.middle, self.suffix}) < 3:
            marks = f"{self.prefix!r}, {self.middle!r}, {self.suffix!r}"
            raise ValueError(f"the marks are {marks}; wanted three different special tokens of the tokenizer")


class Part(NamedTuple):
    """A piece of a text that becomes tokens by itself, and the ids that stand before it."""

    before: tuple[int, ...]
    text: str


class Cut(NamedTuple):
    """The middle is [start, stop) of the document, in characters."""

    order: Literal["psm", "spm"]
    start: int
    stop: int


def draw_cut(length: int, document_id: str, settings: FillInTheMiddle) -> Cut | None:
    """Returns where a document of so many characters is cut, or None where it stays as it is.

    The two places are drawn independently and evenly from 0 to length, both included.
    """
    digest = hashlib.sha256(f"{settings.seed}:{document_id}".encode()).digest()
    chosen, spm, one, other = (int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(4))
    if chosen >= settings.rate * 2.0**64:
        return None
    first, second = sorted((one * (length + 1) >> 64, other * (length + 1) >> 64))
    return Cut("spm" if spm < settings.spm_rate * 2.0**64 else "psm", first, second)


def fill_in_the_middle(settings: FillInTheMiddle, tokenizer: Tokenizer) -> Callable[[str, str], list[Part]]:
    """Returns (document id, text) -> the parts of the text, rearranged or as it is, for `tokens.text_documents`.

    Raises ValueError where a mark is no special token, which a text may spell, or where texts cannot be put together
    from pieces.
    """
    marks = (settings.prefix, settings.middle, settings.suffix)
    if unknown := [mark for mark in marks if mark not in tokenizer.special]:
        some = ", ".join(sorted(tokenizer.special)[:20]) or "none"
        raise ValueError(f"{', '.join(unknown)}: no special tokens of the tokenizer; give three of its own: {some} ...")
    if tokenizer.decode([*tokenizer.encode("a"), *tokenizer.encode("b")]) != "ab":
        raise ValueError(
            "this tokenizer puts a space before every text, so that a text in pieces would gain spaces; give another"
        )
    prefix, middle, suffix = ((tokenizer.special[mark],) for mark in marks)

    def parts(document_id: str, text: str) -> list[Part]:
        cut = draw_cut(len(text), document_id, settings)
        if cut is None:
            return [Part((), text)]
        before, inside, after = text[: cut.start], text[cut.start : cut.stop], text[cut.stop :]
        if cut.order == "spm":
            return [Part(prefix + suffix, after), Part(middle, before), Part((), inside)]
        return [Part(prefix, before), Part(suffix, after), Part(middle, inside)]

    return parts
