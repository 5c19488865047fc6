"""Whether the beginning of a long text helps to predict what follows: P(S2 | S1) against P(S2).

InternLM2's report, section 3.1.3, with the definitions of LongWanjuan (arXiv:2402.13583). A document is cut into
windows of 4,096 tokens; S2 is the last 1,024 of a window, S1 all before it. Every window is scored twice, with all of
S1 and with the last `short_context` tokens of it (0: with nothing but the token that begins texts):

    ppl_long, ppl_short    means over the windows of exp(mean negative log-likelihood of S2)
    ppl_delta = ppl_short - ppl_long;  ppl_ratio = ppl_delta / (ppl_short + 1e-5)
    acc_long, acc_short    means of the share of S2 that was the scorer's most likely next token
    acc_delta = acc_long - acc_short;  acc_ratio = acc_delta / (acc_short + 1e-5)
    tokens_per_character   tokens / characters of the whole document
    unique_tokens          different tokens of a window / its tokens, over all windows

A document below the threshold of its domain and language goes: there S1 hurts S2. The perplexity itself decides
nothing. One passage over and over has the greatest ppl_ratio of all, so too small a share of unique tokens is a reason
of its own.

The last window may be shorter: it counts where it has more than short_context + S2 tokens, since with fewer both
contexts would be one. A document without a window has no scores (null) and goes, or stays, as "unscored".

A scorer is two functions (`Scorer`): `checkpoint_scorer.py` makes one of a model, `ngram_scorer.py` of counted words.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from data_pipelines.classifier import ANY, checks_by_key, keys_from_narrow, with_scores
from data_pipelines.document import Check, Outcome

PIECE_CHARACTERS = 1 << 20
"""So much of a text is encoded at a time."""
WINDOWS_AT_ONCE = 32
EPSILON = 1e-5

Measure = Literal["ppl_ratio", "ppl_delta"]


@dataclass(frozen=True)
class Windows:
    """How a document is cut and what is asked of it."""

    window: int = 4096
    scored: int = 1024
    """S2: the last tokens of a window."""
    short_context: int = 1024
    """What P(S2) sees of S1; 0 is nothing."""

    def __post_init__(self):
        if not (self.scored >= 1 and 0 <= self.short_context and self.scored + self.short_context < self.window):
            raise ValueError(
                f"window is {self.window}, scored {self.scored}, short_context {self.short_context}; wanted at least 1 "
                "scored token, and more context in the window than the short one"
            )


class Scored(NamedTuple):
    """Of each row, over the tokens that were scored: mean negative log-likelihood (natural), and the share that was the
    most likely one, NaN of a scorer that looks for no such token."""

    loss_B: np.ndarray
    accuracy_B: np.ndarray


class Scorer(NamedTuple):
    """encode: text -> token ids, int32. score(rows, num_scored, length): scores the last `num_scored` tokens of each
    row given those before them in the row; no row is longer than `length`; rows without context begin a text.

    What score says of a row must not depend on the other rows. version: equal where all scores are.
    """

    name: str
    version: str
    encode: Callable[[str], np.ndarray]
    score: Callable[[Sequence[np.ndarray], int, int], Scored]


# --- scores ----------------------------------------------------------------------------------------------------------

SCORES = (
    "ppl_long", "ppl_short", "ppl_delta", "ppl_ratio", "acc_long", "acc_short", "acc_delta", "acc_ratio",
    "tokens_per_character", "unique_tokens",
)  # fmt: skip


class _Sums(NamedTuple):
    """What the windows of each document add up to; perplexities and accuracies with long and short context."""

    ppl_D2: np.ndarray
    acc_D2: np.ndarray
    windows_D: np.ndarray
    unique_D: np.ndarray
    in_windows_D: np.ndarray


class _Window(NamedTuple):
    row: int
    tokens: np.ndarray


class Coherence(NamedTuple):
    """scores: every name of `SCORES`, NaN where there is none. The others count, per document."""

    scores: dict[str, np.ndarray]
    windows_D: np.ndarray
    tokens_D: np.ndarray


def coherence(texts: Iterable[str], scorer: Scorer, cut: Windows = Windows()) -> Coherence:
    """Returns the scores of every text. They do not depend on which texts come together.

    In memory are the windows that wait for each other, and of a text the tokens of a piece.
    """
    texts = list(texts)
    num = len(texts)
    sums = _Sums(np.zeros((num, 2)), np.zeros((num, 2)), *(np.zeros(num, np.int64) for _ in range(3)))
    tokens_D = np.zeros(num, np.int64)
    waiting: list[_Window] = []
    for row, text in enumerate(texts):
        for tokens in token_windows(text, scorer.encode, cut.window):
            tokens_D[row] += len(tokens)
            if len(tokens) <= cut.short_context + cut.scored:
                continue
            waiting.append(_Window(row, tokens))
            if len(waiting) == WINDOWS_AT_ONCE:
                _add(waiting, scorer, cut, sums)
                waiting.clear()
    if waiting:
        _add(waiting, scorer, cut, sums)
    characters_D = np.array([len(text) for text in texts], np.int64)
    return Coherence(_scores(sums, tokens_D, characters_D), sums.windows_D, tokens_D)


def token_windows(text: str, encode: Callable[[str], np.ndarray], window: int) -> Iterator[np.ndarray]:
    """Yields the tokens of a text in windows, the last of which may be shorter."""
    held = np.zeros(0, np.int32)
    for piece in pieces(text):
        held = np.concatenate([held, encode(piece)])
        whole = len(held) // window * window
        yield from held[:whole].reshape(-1, window)
        held = held[whole:]
    if len(held):
        yield held


def pieces(text: str) -> Iterator[str]:
    """Yields a text in pieces that end with a line, or at least a word, where one does."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        end = max(text.rfind("\n", start, stop), text.rfind(" ", stop - 256, stop)) + 1 or stop
        yield text[start:end]
        start = end
    yield text[start:]


def _add(windows: Sequence[_Window], scorer: Scorer, cut: Windows, sums: _Sums) -> None:
    """Scores windows with both contexts and adds them up by document."""
    rows = np.array([window.row for window in windows])
    short = cut.scored + cut.short_context
    for column, (held, length) in enumerate(
        (
            ([window.tokens for window in windows], cut.window),
            ([window.tokens[-short:] for window in windows], short),
        )
    ):
        found = scorer.score(held, cut.scored, length)
        assert found.loss_B.shape == found.accuracy_B.shape == rows.shape, "a scorer gives one value per row"
        if not np.isfinite(found.loss_B).all():
            raise ValueError(f"the scorer {scorer.name} gave a loss that is no number; its weights are not sound")
        # In the order of the windows, so that sums do not depend on where a group of windows ends.
        np.add.at(sums.ppl_D2[:, column], rows, np.exp(found.loss_B))
        np.add.at(sums.acc_D2[:, column], rows, found.accuracy_B)
    np.add.at(sums.windows_D, rows, 1)
    np.add.at(sums.unique_D, rows, [len(np.unique(window.tokens)) for window in windows])
    np.add.at(sums.in_windows_D, rows, [len(window.tokens) for window in windows])


def _scores(sums: _Sums, tokens_D: np.ndarray, characters_D: np.ndarray) -> dict[str, np.ndarray]:
    some_D = np.where(sums.windows_D > 0, sums.windows_D, np.nan)
    ppl_long, ppl_short = (sums.ppl_D2 / some_D[:, None]).T
    acc_long, acc_short = (sums.acc_D2 / some_D[:, None]).T
    columns = (
        ppl_long, ppl_short, ppl_short - ppl_long, (ppl_short - ppl_long) / (ppl_short + EPSILON),
        acc_long, acc_short, acc_long - acc_short, (acc_long - acc_short) / (acc_short + EPSILON),
        tokens_D / np.maximum(characters_D, 1),
        sums.unique_D / np.where(sums.windows_D > 0, sums.in_windows_D, np.nan),
    )  # fmt: skip
    return dict(zip(SCORES, columns, strict=True))


# --- the stage -------------------------------------------------------------------------------------------------------


class ScoreThreshold(NamedTuple):
    """Documents of a domain and language ("*": any) whose score lies below `value` go."""

    domain: str
    language: str
    value: float


class Thresholds(NamedTuple):
    """scorer, windows: with what they were fitted; empty and None of thresholds that fit any."""

    measure: Measure
    thresholds: tuple[ScoreThreshold, ...]
    scorer: str = ""
    windows: Windows | None = None


NOT_HURT = Thresholds("ppl_ratio", (ScoreThreshold(ANY, ANY, 0.0),))
"""What holds where none were fitted: a document goes where S1 makes S2 less likely."""


@dataclass(frozen=True)
class Filter:
    """What goes beside documents below their threshold."""

    min_unique_tokens: float = 0.05
    """A smaller share is one passage over and over."""
    unscored: Literal["drop", "keep"] = "drop"
    """What becomes of documents without a window; when kept, their scores are null in meta."""

    def __post_init__(self):
        if self.unscored not in get_args(Literal["drop", "keep"]):
            raise ValueError(f"unscored is {self.unscored!r}; give drop or keep")


def coherent(
    load: Callable[[], Scorer],
    thresholds: Thresholds = NOT_HURT,
    *,
    cut: Windows = Windows(),
    settings: Filter = Filter(),
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops documents whose S1 hurts S2 ("context_hurts"), repetitive ones ("repeated_tokens")
    and those too short to say ("unscored"), and keeps all scores in meta.

    load: gives the scorer, the same one for each call; called when the first batch comes. Raises ValueError where the
    thresholds were fitted with another scorer or other windows.
    """
    if thresholds.windows is not None and thresholds.windows != cut:
        raise ValueError(
            f"the thresholds were fitted with {asdict(thresholds.windows)}, and the stage would cut by {asdict(cut)}; "
            "fit them anew or cut alike"
        )
    if thresholds.measure not in get_args(Measure):
        raise ValueError(f"the measure is {thresholds.measure!r}; give one of {', '.join(get_args(Measure))}")
    held = {(item.domain, item.language): item.value for item in thresholds.thresholds}
    if (ANY, ANY) not in held:
        raise ValueError(f"no threshold holds for all documents; give one with domain and language {ANY!r}")
    least = cut.scored + cut.short_context + 1

    def apply(batch: pa.RecordBatch) -> Outcome:
        scorer = load()
        if thresholds.scorer not in ("", scorer.version):
            raise ValueError(
                f"the thresholds were fitted with another scorer than {scorer.name} ({thresholds.scorer[:12]}, this is "
                f"{scorer.version[:12]}); perplexities of two scorers do not compare: fit them anew"
            )
        found = coherence(batch.column("text").to_pylist(), scorer, cut)
        reasons: list[str | None] = [None] * batch.num_rows
        details: list[str | None] = [None] * batch.num_rows
        keys = list(zip(batch.column("domain").to_pylist(), batch.column("language").to_pylist(), strict=True))
        for row, key in enumerate(keys):
            failed = []
            score, unique = (float(found.scores[name][row]) for name in (thresholds.measure, "unique_tokens"))
            chosen = next(each for each in keys_from_narrow(*key) if each in held)
            if found.windows_D[row] == 0 and settings.unscored == "drop":
                failed.append(("unscored", f"{found.tokens_D[row]} tokens are below {least}, so nothing was scored"))
            if unique < settings.min_unique_tokens:
                failed.append(("repeated_tokens", f"{unique:.4f} of them differ, below {settings.min_unique_tokens:g}"))
            if score < held[chosen]:
                said = f"{thresholds.measure} {score:.5f} is below {held[chosen]:.5f} ({', '.join(chosen)})"
                failed.append(("context_hurts", said))
            if failed:
                reasons[row] = failed[0][0]
                details[row] = "; ".join(f"{reason}: {said}" for reason, said in failed)
        checks = [
            Check("repeated_tokens", found.scores["unique_tokens"], "below", settings.min_unique_tokens),
            *checks_by_key("context_hurts", found.scores[thresholds.measure], "below", held, keys),
        ]
        return Outcome(with_scores(batch, found.scores), reasons, details, checks)

    return apply
