"""What a long text is like as a text: lines, separators, repetition, pronouns, discourse words; bounds by language.

The statistical filter of InternLM2's report, section 3.1.3, with the measures of LongWanjuan (arXiv:2402.13583). It is
to remove what is no text (tables, lists, dumps, one passage over and over), not to choose the best, so the bounds are
wide; neither source prints any, these are ours. The lists of words are ours too.

Each measure has a name, under which it stands in `scores` of meta and in the reason ("low_unique_words"):

    mean_line std_line median_line max_line min_line   characters of the lines that are not blank
    newline_rate comma_rate space_rate pipe_rate       per character (commas: the full-width one as well)
    words_per_character                                words as `kernels.words` finds them, a Han character being one
    unique_words           different words / words, in pieces of 4,096 words, so that a book is not below a chapter
    unique_runs            different runs of 8 words / all of them: 1/n for one passage n times over, however long it is
    english_pronouns       pronouns / words
    english_connectives    discourse words and phrases / words
    chinese_pronouns       characters of pronouns / characters; 我们 is one pronoun of two characters, not 我 as well
    chinese_connectives    characters of connectives / characters

The discourse-marker model of LongWanjuan (DMR), which must be trained, is left out.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from data_pipelines.classifier import OTHER_KEYS, WORD_BLOCK, with_scores
from data_pipelines.document import Check, Outcome, text_buffer
from data_pipelines.rules import judge, power_of_two

ENGLISH_PRONOUNS = (
    "i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself "
    "we us our ours ourselves they them their theirs themselves this that these those who whom whose which"
).split()
ENGLISH_CONNECTIVES = (
    "however", "therefore", "moreover", "furthermore", "nevertheless", "nonetheless", "consequently", "thus", "hence",
    "meanwhile", "otherwise", "instead", "although", "though", "whereas", "because", "unless", "until", "while",
    "especially", "formally", "particularly", "specifically", "generally", "typically", "usually", "finally",
    "firstly", "secondly", "thirdly", "lastly", "additionally", "similarly", "likewise", "conversely", "accordingly",
    "indeed", "besides", "eventually", "subsequently", "afterwards", "initially", "ultimately", "clearly",
    "perhaps", "also", "yet", "but", "for example", "for instance", "in fact", "in addition", "in other words",
    "in particular", "in general", "in contrast", "by contrast", "in conclusion", "in short", "in order to",
    "on the other hand", "on the contrary", "as a result", "at the same time", "at first", "at last", "after all",
    "of course", "that is", "such as", "even though", "even if", "so that", "as if", "as though", "rather than",
)  # fmt: skip
CHINESE_PRONOUNS = (
    "我 你 您 他 她 它 我们 你们 他们 她们 它们 咱们 自己 谁 这 那 此 其 这些 那些 这个 那个 这里 那里 "
    "这样 那样 这种 那种 大家 彼此 本身 本人 各自 什么 哪里 哪些 怎么 "
    "我們 你們 他們 她們 它們 咱們 誰 這 這些 這個 那個 這裡 那裡 這樣 那樣 這種 那種 什麼 哪裡 怎麼"
).split()
CHINESE_CONNECTIVES = (
    "因为 所以 但是 但 而 而且 并且 如果 虽然 然而 因此 于是 不过 可是 或者 以及 同时 另外 此外 例如 "
    "比如 首先 其次 最后 总之 即使 尽管 既然 由于 从而 只要 只有 除非 无论 不但 不仅 甚至 尤其 特别是 "
    "换句话说 也就是说 反之 否则 然后 接着 与此同时 另一方面 一方面 综上所述 总的来说 一般来说 "
    "因為 雖然 於是 並且 不過 同時 儘管 由於 從而 無論 不僅 特別是 換句話說 否則 然後 接著 與此同時 總之 "
    "最後 綜上所述 總的來說"
).split()
LISTS = {
    "english_pronouns": ENGLISH_PRONOUNS,
    "english_connectives": ENGLISH_CONNECTIVES,
    "chinese_pronouns": CHINESE_PRONOUNS,
    "chinese_connectives": CHINESE_CONNECTIVES,
}
MEASURES = (
    "mean_line", "std_line", "median_line", "max_line", "min_line", "newline_rate", "comma_rate", "space_rate",
    "pipe_rate", "words_per_character", "unique_words", "unique_runs", *LISTS,
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """A document goes when a measure lies below its min_ or above its max_."""

    min_mean_line: float = 8.0
    max_newline_rate: float = 0.12
    max_comma_rate: float = 0.08
    max_space_rate: float = 0.4
    max_pipe_rate: float = 0.02
    min_words_per_character: float = 0.08
    max_words_per_character: float = 0.4
    min_unique_words: float = 0.08
    min_unique_runs: float = 0.5
    min_english_pronouns: float = 0.0
    min_english_connectives: float = 0.0
    min_chinese_pronouns: float = 0.0
    min_chinese_connectives: float = 0.0


# Thai and others put no spaces between words, so that one word goes on to the next mark.
ANY_LANGUAGE = Bounds(min_words_per_character=0.01, max_words_per_character=1.0)
ENGLISH = Bounds(min_english_pronouns=0.005, min_english_connectives=0.001)
CHINESE = Bounds(
    min_mean_line=4.0, max_newline_rate=0.2, min_words_per_character=0.4, max_words_per_character=1.0,
    max_space_rate=0.2, min_chinese_pronouns=0.002, min_chinese_connectives=0.001,
)  # fmt: skip
BOUNDS: Mapping[str, Bounds] = MappingProxyType({"en": ENGLISH, "zh": CHINESE, "*": ANY_LANGUAGE})
"""By language; "*" is every other one, and a language that is not known."""


def measure(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """Returns every measure by name, float64, a value per row. Takes at most some 250 MB, however long a text is."""
    from data_pipelines import discourse_scan as scan
    from data_pipelines import hashing, kernels

    data, offsets = text_buffer(batch)
    lengths, distinct = np.empty(scan.LINE_LENGTHS, np.int64), np.empty(4 * scan.PIECE, np.uint64)
    lines_DM, sums_DM = np.zeros((batch.num_rows, scan.NUM_LINE_MEASURES)), np.zeros((batch.num_rows, 5))
    phrases_D = np.zeros((batch.num_rows, len(LISTS), 2), np.int64)
    keys, codes = _phrases()
    for row in range(batch.num_rows):
        start, stop = int(offsets[row]), int(offsets[row + 1])
        scan.line_measures(data, start, stop, lengths, lines_DM[row])
        # At most 2^20 runs are looked at, so the table has a bounded size.
        level = max((stop - start) >> 20, 0).bit_length()
        runs = np.zeros(min(power_of_two(stop - start), 1 << 21), np.uint64)
        bounds, owner = (np.empty(4 + (stop - start) // WORD_BLOCK, np.int64) for _ in range(2))
        count = hashing.windows(data, offsets[row : row + 2], WORD_BLOCK, bounds, owner)
        for piece in range(count):
            block = bounds[piece : piece + 2]
            room = 2 * int(block[1] - block[0]) // 3 + 2
            hashes, sizes, flags = np.empty(room, np.uint64), np.empty(room, np.int32), np.empty(room, np.uint8)
            hashes = hashes[: kernels.words(data, block, hashes, sizes, flags, np.empty(2, np.int64))]
            sums_DM[row, 0] += len(hashes)
            scan.distinct_words(hashes, distinct, sums_DM[row, 1:3])
            scan.distinct_runs(hashes, level, runs, sums_DM[row, 3:5])
            scan.count_phrases(hashes, keys, codes, phrases_D[row])
    return _named(lines_DM.T, sums_DM.T, phrases_D)


def _named(lines: np.ndarray, sums: np.ndarray, phrases_D: np.ndarray) -> dict[str, np.ndarray]:
    from data_pipelines import discourse_scan as scan

    characters_D, words_D = np.maximum(lines[scan.CHARACTERS], 1), np.maximum(sums[0], 1)
    columns = [
        *(lines[number] for number in range(scan.MEAN_LINE, scan.MIN_LINE + 1)),
        *(lines[number] / characters_D for number in (scan.NEWLINES, scan.COMMAS, scan.SPACES, scan.PIPES)),
        sums[0] / characters_D,
        # A text without words repeats none.
        *(np.where(total > 0, new / np.maximum(total, 1), 1.0) for total, new in (sums[1:3], sums[3:5])),
        *(phrases_D[:, number, 0] / words_D for number in (0, 1)),
        *(phrases_D[:, number, 1] / characters_D for number in (2, 3)),
    ]
    return dict(zip(MEASURES, columns, strict=True))


@functools.lru_cache(maxsize=1)
def _phrases() -> tuple[np.ndarray, np.ndarray]:
    """The lists as one table: keys, and the number of the list whose phrase ends there."""
    from data_pipelines import discourse_scan as scan
    from data_pipelines import kernels

    size = power_of_two(16 * sum(map(len, LISTS.values())))
    keys, codes = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    for code, phrases in enumerate(LISTS.values(), 1):
        for phrase in phrases:
            hashes = kernels.word_hashes(phrase)
            assert len(hashes) <= scan.LONGEST_PHRASE, f"{phrase!r} has more than {scan.LONGEST_PHRASE} words"
            scan.enter_phrase(hashes, code, keys, codes)
    return keys, codes


def statistics(
    bounds: Mapping[str, Bounds] = BOUNDS, *, passed: tuple[str, ...] = ("code",)
) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that drops what is no text by the bounds of its language, and keeps all measures in meta.

    The reason is the first measure that failed, the detail has all of them. Documents of the domains `passed` are left
    as they are. bounds: "*" must be among them.
    """
    if "*" not in bounds:
        raise ValueError(f'bounds are given for {", ".join(bounds) or "no language"}; "*", for all others, is missing')
    held = dict(bounds)

    def apply(batch: pa.RecordBatch) -> Outcome:
        rows = [row for row, domain in enumerate(batch.column("domain").to_pylist()) if domain not in passed]
        values = measure(batch.take(pa.array(rows, pa.int64())))
        wide = {name: np.full(batch.num_rows, np.nan) for name in MEASURES}
        for name, column in values.items():
            wide[name][rows] = column
        languages = [held.get(language, held["*"]) for language in batch.column("language").to_pylist()]
        checks = [
            check
            for bound in dict.fromkeys(held.values())
            for check in _checks(wide, bound, languages, of=_of(bound, held))
        ]
        outcome = judge(batch, checks)
        return outcome._replace(batch=with_scores(batch, wide, rows=rows))

    return apply


def _of(bounds: Bounds, held: Mapping[str, Bounds]) -> str:
    """The languages that have these bounds, where others have others."""
    names = sorted(OTHER_KEYS if name == "*" else name for name, found in held.items() if found == bounds)
    return ", ".join(names) if len(names) < len(held) else ""


def _checks(values: Mapping[str, np.ndarray], bounds: Bounds, languages: list[Bounds], *, of: str) -> list[Check]:
    """The checks of one language's bounds; rows of others have no value, which fails none.

    No measure is negative: a least value of 0 asks for nothing, and is no check.
    """
    mine_D = np.array([found == bounds for found in languages], bool)
    found = []
    for field in fields(bounds):
        side, _, name = field.name.partition("_")
        sides, bound = {"min": ("low", "below"), "max": ("high", "above")}[side], getattr(bounds, field.name)
        if side == "max" or bound > 0:
            chosen_D = np.where(mine_D, values[name], np.nan)
            found.append(Check(f"{sides[0]}_{name}", chosen_D, sides[1], bound, of))
    return found
