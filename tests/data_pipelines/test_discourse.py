"""Measures of long texts against plain Python, and what the bounds say of prose, tables, dumps and code."""

import random
import re
import statistics

import numpy as np
import pytest

from data_pipelines import classifier, discourse
from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.ledger import Ledger
from data_pipelines.long_text import LONG_TEXT, longer_than
from data_pipelines.wanjuan import run_chain

# Words of grammar, and three times as often one of 400 others.
GRAMMAR = "the a of and to in on with for at by but however because for_example she he they it this we".split()
ENGLISH = 6 * GRAMMAR + [f"{first}{last}" for first in "bcdfghklmnprstvwzjqx" for last in
    "and ell ist orn une ack eam ill oad ust ark ent ish ost ulb ave eed ind oom urn".split()]  # fmt: skip
LISTED = {character for phrases in discourse.LISTS.values() for character in "".join(phrases)}
CHINESE = 8 * "我们 他 她 这 但是 因为 所以 如果".split() + [
    character for character in map(chr, range(0x4E00, 0x5300)) if character not in LISTED
]


def prose(num_words, seed=0, words=ENGLISH, space=" ", end=".\n"):
    """Sentences of random words, a paragraph line each, no long run of words twice."""
    draw = random.Random(seed)
    lines = []
    while num_words > 0:
        size = draw.randint(6, 30)
        line = space.join(
            f"{draw.choice(words)}{draw.choice(['', '', 's', ','])}" if space else draw.choice(words)
            for _ in range(size)
        )
        lines.append(line.replace("for_example", "for example") + end)
        num_words -= size
    return "".join(lines)


def batch_of(*texts, language="en", domain="web"):
    return to_batch(
        make_document(text, source="s", path=f"p{n}", language=language, domain=domain) for n, text in enumerate(texts)
    )


def by_hand(text):
    """The measures as their table defines them."""
    lengths = [len(line) for line in text.split("\n") if line.strip()] or [0]
    words, characters = re.findall(r"[a-z0-9_]+|[\u4e00-\u9fff]", text.lower()), max(len(text), 1)
    pieces = [words[at : at + 4096] for at in range(0, len(words) - 4095, 4096)] or [words]
    runs = [tuple(words[at : at + 8]) for at in range(len(words) - 7)]
    counts = {}
    for name, phrases in discourse.LISTS.items():
        spaced = phrases[0].isascii()
        wanted = {}  # first word -> phrases, the longest first
        for phrase in sorted((tuple(p.split() if spaced else p) for p in phrases), key=len, reverse=True):
            wanted.setdefault(phrase[0], []).append(phrase)
        found = size = at = 0
        # One list at a time is enough where no phrase of another overlaps, as in these texts.
        while at < len(words):
            hit = next((p for p in wanted.get(words[at], ()) if tuple(words[at : at + len(p)]) == p), None)
            found, size, at = found + (hit is not None), size + len(hit or ()), at + len(hit or " ")
        counts[name] = found / max(len(words), 1) if spaced else size / characters
    return {
        "mean_line": statistics.mean(lengths),
        "std_line": statistics.pstdev(lengths),
        "median_line": statistics.median(lengths),
        "max_line": max(lengths),
        "min_line": min(lengths),
        "newline_rate": text.count("\n") / characters,
        "comma_rate": (text.count(",") + text.count("，")) / characters,
        "space_rate": text.count(" ") / characters,
        "pipe_rate": text.count("|") / characters,
        "words_per_character": len(words) / characters,
        "unique_words": sum(len(set(p)) for p in pieces) / sum(map(len, pieces)) if words else 1.0,
        "unique_runs": len(set(runs)) / len(runs) if runs else 1.0,
        **counts,
    }


TEXTS = [
    prose(9000),
    prose(300) * 3,
    prose(500, words=CHINESE, space="", end="。\n"),
    "a | b |\n\n  \n, ，x\nlonger line here",
    "no line end",
    "",
    "\n\n",
    "For\nexample we, but also IN OTHER words: 我们这里，换句话说。",
]


def test_measures_are_those_of_plain_python():
    found = discourse.measure(batch_of(*TEXTS))
    assert tuple(found) == discourse.MEASURES
    for row, text in enumerate(TEXTS):
        wanted = by_hand(text)
        for name, values in found.items():
            assert values[row] == pytest.approx(wanted[name], rel=1e-9, abs=1e-12), (name, text[:30])
    assert by_hand(TEXTS[-1])["chinese_connectives"] == 4 / len(TEXTS[-1])
    assert by_hand(TEXTS[-1])["english_connectives"] == 4 / 16


def test_measures_do_not_depend_on_the_batch():
    batch = batch_of(*TEXTS)
    whole = discourse.measure(batch)
    for row in range(len(TEXTS)):
        alone = discourse.measure(batch.slice(row, 1))
        assert all(alone[name][0] == values[row] for name, values in whole.items())
    assert all(len(values) == 0 for values in discourse.measure(batch.slice(0, 0)).values())


def test_a_text_of_several_blocks_measures_alike(monkeypatch):
    """What lies across a cut is lost, no more; of a long text one run in several is looked at."""
    text = prose(30000) + prose(400, seed=1) * 40
    whole = discourse.measure(batch_of(text))
    monkeypatch.setattr(discourse, "WORD_BLOCK", 1 << 15)
    cut = discourse.measure(batch_of(text))
    for name, values in whole.items():
        assert cut[name][0] == pytest.approx(values[0], rel=0.05, abs=1e-3), name
    long = discourse.measure(batch_of(prose(30000) * 8))["unique_runs"][0]  # above 2^20 bytes
    assert long == pytest.approx(1 / 8, rel=0.05)


JUDGED = {
    "prose": (prose(9000), "en", None),
    "chinese prose": (prose(20000, words=CHINESE, space="", end="。\n"), "zh", None),
    "prose in another language": (prose(9000, words=[w[::-1] for w in ENGLISH]), "de", None),
    "a table": ("".join(f"| {n * 7919 % 1009} | {n * n % 997} |\n" for n in range(5000)), "und", "high_pipe_rate"),
    "a list of names": ("".join(f"nam{n}\n" for n in range(9000)), "und", "low_mean_line"),
    "a dump": ("".join(f"{n * 2654435761 % 2**32:08x}" * 8 for n in range(900)), "en", "low_words_per_character"),
    "one passage": (prose(150) * 200, "en", "low_unique_words"),
    "one long passage": (prose(5000) * 4, "en", "low_unique_runs"),
    "words without a sentence": (prose(9000, words=ENGLISH[126:]), "en", "low_english_pronouns"),
    "signs": ("这" * 20000, "zh", "low_unique_words"),
}


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_no_text_goes(name):
    text, language, reason = JUDGED[name]
    outcome = discourse.statistics()(batch_of(text, language=language))
    assert outcome.reasons == [reason], outcome.details
    scores = to_documents(outcome.batch)[0].meta["scores"]
    assert set(scores) == set(discourse.MEASURES)
    if reason:
        measured = reason.partition("_")[2]
        told = re.search(rf"{reason}: (\S+) is (above|below) ", outcome.details[0])
        assert float(told[1]) == pytest.approx(scores[measured], rel=1e-3, abs=1e-6)


def test_all_failing_measures_are_told_and_code_is_left_alone():
    text = JUDGED["a list of names"][0]
    batch = to_batch(
        [
            make_document(text, source="s", path="a", language="en", meta={"scores": {"fluency": 1.0}}),
            make_document(text, source="s", path="b", domain="code", language="python", meta={"scores": {"x": 1}}),
        ]
    )
    outcome = discourse.statistics()(batch)
    assert outcome.reasons == ["low_mean_line", None] and outcome.details[1] is None
    for reason in ("low_mean_line: ", "high_newline_rate: ", "low_english_pronouns: "):
        assert reason in outcome.details[0]
    text_row, code_row = to_documents(outcome.batch)
    assert text_row.meta["scores"]["fluency"] == 1.0 and text_row.meta["scores"]["mean_line"] < 8
    assert code_row == to_documents(batch)[1]
    checks = {(check.reason, check.of): check for check in outcome.checks}
    english, chinese = (checks["low_mean_line", language] for language in ("en", "zh"))
    assert english.values_D[0] == pytest.approx(text_row.meta["scores"]["mean_line"], abs=1e-5) and english.bound == 8
    assert np.isnan(english.values_D[1]) and np.isnan(chinese.values_D).all() and chinese.bound == 4
    assert ("low_mean_line", "all others") in checks and ("low_chinese_pronouns", "en") not in checks
    wide = discourse.statistics({"*": discourse.Bounds(min_mean_line=0, max_newline_rate=1, min_words_per_character=0)})
    assert wide(batch).reasons == [None, None]
    with pytest.raises(ValueError, match=r'"\*", for all others, is missing'):
        discourse.statistics({"en": discourse.ENGLISH})


def test_long_is_more_than_32_kb_of_utf8():
    batch = batch_of("x" * 32768, "x" * 32769, "中" * 10922, "中" * 10923, "")
    outcome = longer_than()(batch)
    assert outcome.reasons == ["not_long", None, "not_long", None, "not_long"]
    assert outcome.details[0] == "32768 bytes are not above 32768" and outcome.batch is batch
    assert longer_than()(batch.slice(1, 2)).reasons == [None, "not_long"]


def test_the_chain_counts_what_goes():
    texts = {"long": prose(9000), "short": prose(100), "table": JUDGED["a table"][0]}
    documents = [make_document(text, source="s", path=name, language="en") for name, text in texts.items()]
    ledger = Ledger()
    assert [document.path for document in run_chain(documents, LONG_TEXT, ledger)] == ["long"]
    assert {name: dict(count.dropped) for name, count in ledger.stages.items()} == {
        "normalise": {}, "language": {}, "length": {"not_long": 1}, "statistics": {"high_pipe_rate": 1}
    }  # fmt: skip


def test_scores_are_added_to_the_rows_named():
    batch = batch_of("a", "b", "c")
    found = classifier.with_scores(batch, {"x": [0.12345678, np.nan, 3.0]}, rows=[0, 1])
    assert [d.meta for d in to_documents(found)] == [{"scores": {"x": 0.123457}}, {"scores": {"x": None}}, {}]
