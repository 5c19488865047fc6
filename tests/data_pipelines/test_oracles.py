"""Live, with datatrove and datasketch: rules and near duplicates against implementations that share nothing with ours.

datatrove's filters are given our words, so that verdicts are compared and not tokenizers. Where the two differ on
purpose, a test says so.
"""

import dataclasses
import random
from itertools import combinations

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import dedup, rules
from data_pipelines.words import find_spans, find_words
from tests.data_pipelines.test_dedup import batch_of, corpus, plain_jaccard, plain_shingles
from tests.data_pipelines.test_rules import GOOD, plain_words

pytestmark = pytest.mark.parity
__all__ = ["corpus"]  # a fixture of test_dedup

GOPHER = rules.TextRules(
    min_words=50, max_words=100_000, min_mean_word_length=3, max_mean_word_length=10, min_alphabetic_words=0.8,
    min_stop_words=2, max_hashes_per_word=0.1, max_ellipses_per_word=0.1, max_bullet_lines=0.9,
    max_ellipsis_lines=0.3,
)  # fmt: skip
REASONS = {
    "gopher_short_doc": "few_words", "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words", "gopher_too_many_hashes": "hash_signs",
    "gopher_too_many_ellipsis": "ellipses", "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines", "gopher_below_alpha_threshold": "few_alphabetic_words",
    "gopher_enough_stop_words": "few_stop_words",
}  # fmt: skip
"""datatrove's reason -> ours."""


@pytest.fixture(scope="module")
def filters():
    """datatrove's filters, for which the words of a text are ours."""
    found = pytest.importorskip("datatrove.pipeline.filters")
    tokenizers = pytest.importorskip("datatrove.utils.word_tokenizers")

    class OurWords(tokenizers.WordTokenizer):
        def word_tokenize(self, text):
            return plain_words(text)

        def sent_tokenize(self, text):
            return [text]

        def span_tokenize(self, text):
            return [(0, len(text))]

    return found, OurWords()


def verdict(found, text):
    """The reason that a filter of datatrove gives, or None; and the text that it leaves."""
    from datatrove.data import Document

    document = Document(text=text, id="0")
    result = found.filter(document)
    return (None if result is True else result[1]), document.text


def checks_of(texts, settings):
    return {check.reason: check for check in rules.text_checks(batch_of(texts), settings)}


def pages(count):
    """Texts of lines that end in a stop or not, from good prose to heaps of marks: all kinds of verdicts."""
    rng = random.Random(5)
    good = GOOD.lower().split()
    kinds = (
        lambda: rng.choice(good), lambda: str(rng.randrange(3000)), lambda: "#" + rng.choice(good),
        lambda: "antidisestablishmentarianism", lambda: "a", lambda: rng.choice(good) + "...", lambda: "ideas",
    )  # fmt: skip
    for _ in range(count):
        weights = [rng.choice((0, 0, 0, 1, 4)) for _ in kinds]
        weights[0] += rng.choice((0, 2, 12))
        weights[-1] += not any(weights)
        bullet, end = rng.choice(("", "", "- ", "\u2022 ")), rng.choice((".", ".", "", "..."))
        lines = []
        for _ in range(rng.randint(1, 12)):
            words = [kind() for kind in rng.choices(kinds, weights, k=rng.randint(3, 16))]
            lines.append(bullet + " ".join(words) + end)
        yield "\n".join(lines)


def test_gopher_quality_has_our_verdicts(filters):
    """All texts but those around which both count differently: see the next test."""
    filters, words = filters
    texts = list(pages(1500))
    ours, quality = checks_of(texts, GOPHER), filters.GopherQualityFilter(language=words)
    fails = {name: ours[name].fails() for name in REASONS.values()}
    seen = set()
    for row, text in enumerate(texts):
        reason, _ = verdict(quality, text)
        first = next((name for name in REASONS.values() if fails[name][row]), None)
        assert first == REASONS.get(reason), (reason, {name: ours[name].values_D[row] for name in fails}, text)
        seen.add(reason)
    assert seen == {None, *REASONS}, "every rule decides of some text"


def test_where_gopher_quality_differs(filters):
    filters, words = filters
    quality = filters.GopherQualityFilter(language=words)
    blank = "\n\n".join(f"- {line}" for line in GOOD.splitlines() if line)
    # A blank line is no line that begins with no bullet, and stop words have no case.
    assert verdict(quality, blank)[0] is None
    assert checks_of([blank], GOPHER)["bullet_lines"].fails().all()
    shout = "\n".join("FIVE GREEN BOATS WENT TO THE SEA AND CAME BACK." for _ in range(8))
    assert verdict(quality, shout)[0] == "gopher_enough_stop_words"
    assert not checks_of([shout], GOPHER)["few_stop_words"].fails().any()


def test_repeated_lines_paragraphs_and_ngrams_are_those_of_gopher(filters):
    """The counts are equal. Our shares are of the bytes of words and lines, datatrove's of the whole text."""
    from datatrove.pipeline.filters import gopher_repetition_filter as theirs

    rng = random.Random(6)
    good = [line for line in GOOD.replace(", ", ".\n").splitlines() if line]
    texts = ["\n".join(rng.choices([*good[: rng.randint(1, 8)], ""], k=rng.randint(2, 30))) for _ in range(300)]
    texts = ["\n".join(line for line in text.split("\n")).strip() or "a" for text in texts]
    found, ours = find_words(batch_of(texts)), checks_of(texts, rules.WEB)
    shares_D6 = rules.duplicate_ngram_shares(found, rules.repetition(found), np.arange(len(texts)))
    shares = dict(zip(range(5, 11), shares_D6.T, strict=True))
    assert sum((share > 0).sum() for share in shares.values()) > 500
    for row, text in enumerate(texts):
        words = plain_words(text.lower())
        for n, share in shares.items():
            wanted = theirs.find_all_duplicate(words, n) / sum(map(len, words))
            assert share[row] == pytest.approx(wanted)
        lines = [line for line in text.split("\n") if line]
        elements, characters = theirs.find_duplicates(lines)
        assert ours["duplicate_lines"].values_D[row] == pytest.approx(elements / len(lines))
        assert ours["duplicate_line_bytes"].values_D[row] == pytest.approx(characters / sum(map(len, lines)))
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        elements, _ = theirs.find_duplicates([part.strip("\n") for part in paragraphs])
        assert ours["duplicate_paragraphs"].values_D[row] == pytest.approx(elements / len(paragraphs))


def test_c4_cleans_the_lines_that_we_clean_and_drops_the_pages_that_we_drop(filters):
    filters, words = filters
    c4 = filters.C4QualityFilter(
        filter_no_terminal_punct=False, min_num_sentences=-1, min_words_per_line=-1, max_word_length=-1, language=words
    )
    rng = random.Random(7)
    lines = [
        *GOOD.splitlines(), "Please enable JavaScript {now}.", "Our Privacy Policy applies.", "This site uses cookies.",
        "see [12] and [edit] and [citation needed], not [x1]", "A body { of text", "lorem Ipsum dolor",
        "the cook is known for use of cookies.", "terms of  use", "javascript",
    ]  # fmt: skip
    texts = ["\n".join(rng.choices(lines, k=rng.randint(1, 6))) for _ in range(500)]
    cleaned = rules.edit(rules.clean_lines, rules.clean_rows)(batch_of(texts)).batch
    ours = {check.reason: check for check in rules.text_checks(cleaned, rules.WEB)}
    seen = set()
    for row, (text, mine) in enumerate(zip(texts, cleaned.column("text").to_pylist(), strict=True)):
        reason, left = verdict(c4, text)
        fails = [name for name in ("lorem_ipsum", "braces") if ours[name].fails()[row]]
        assert (reason is None) == (not fails), (reason, fails, text)
        assert reason is None or {"curly_bracket": "braces"}.get(reason, reason) in fails
        assert reason or left == "\n".join(line.strip() for line in mine.split("\n")).strip()
        seen.add(reason)
    assert seen == {None, "lorem_ipsum", "curly_bracket"}
    # Empty brackets are no mark of a citation to us.
    assert verdict(c4, "a list: x = []")[1] == "a list: x =" and rules.clean_lines("x = []") == "x = []"


# --- near duplicates -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sketches(corpus):
    datasketch = pytest.importorskip("datasketch")
    found = []
    for text in corpus:
        sketch = datasketch.MinHash(num_perm=128, seed=3)
        sketch.update_batch([" ".join(words).encode() for words in sorted(plain_shingles(text))])
        found.append(sketch)
    return found


def test_our_signatures_err_no_more_than_those_of_datasketch(corpus, sketches):
    _, signatures = dedup.sign(find_spans(batch_of(corpus)))
    errors = []
    for a, b in combinations(range(len(corpus)), 2):
        true = plain_jaccard(corpus[a], corpus[b])
        if true > 0.1:
            ours, theirs = (signatures[a] == signatures[b]).mean(), sketches[a].jaccard(sketches[b])
            errors.append((ours - true, theirs - true, np.sqrt(true * (1 - true) / 128)))
    ours, theirs, deviation = np.array(errors).T
    assert len(errors) > 200
    assert np.sqrt(np.square(ours).mean()) < 1.25 * np.sqrt(np.square(deviation).mean())
    assert np.sqrt(np.square(ours).mean()) < 1.25 * np.sqrt(np.square(theirs).mean())
    assert (np.abs(ours) <= 5 * deviation + 1e-9).all()


def test_groups_are_those_of_the_pairs_that_datasketch_finds(corpus, sketches, tmp_path):
    import datasketch

    index = datasketch.MinHashLSH(num_perm=128, params=(20, 6))
    for number, sketch in enumerate(sketches):
        index.insert(number, sketch)
    root = list(range(len(corpus)))

    def find(number):
        while root[number] != number:
            number = root[number]
        return number

    for number, sketch in enumerate(sketches):
        for other in index.query(sketch):
            if plain_jaccard(corpus[number], corpus[other]) >= 0.7:
                root[max(find(number), find(other))] = min(find(number), find(other))
    batch, settings = batch_of(corpus), dedup.NearDuplicates()
    pairs = list(combinations(range(len(corpus)), 2))

    def grouped(seed):
        drawn = dataclasses.replace(settings, seed=seed)
        sketched = [dedup.sketch_near(batch, settings=drawn)]
        (folder := tmp_path / str(seed)).mkdir()
        groups = dedup.group(sketched, lambda rows: batch.take(pa.array(rows)), folder, drawn)
        return dict(zip(groups.rows_D.tolist(), groups.rows_D[groups.root_D].tolist(), strict=True))

    draws = [grouped(seed) for seed in range(6)]
    together = [(a, b) for a, b in pairs if find(a) == find(b)]
    # Either misses some of the pairs just above the threshold by chance, and not the same ones.
    for ours in draws:
        num_ours = sum(ours[a] == ours[b] for a, b in pairs)
        assert len(together) > 100 and 0.95 * len(together) <= num_ours <= 1.05 * len(together)
    # Of a pair of Jaccard j all 20 bands of 6 hashes differ with probability (1 - j^6)^20: Poisson's three deviations.
    close = {(a, b): jaccard for a, b in pairs if (jaccard := plain_jaccard(corpus[a], corpus[b])) >= 0.7}
    chance = len(draws) * sum((1 - jaccard**6) ** 20 for jaccard in close.values())
    missed = [pair for ours in draws for pair in close if ours[pair[0]] != ours[pair[1]]]
    assert len(missed) <= chance + 3 * chance**0.5
    assert all(close[pair] < 0.85 for pair in missed), "no chance misses pairs that are so alike"
