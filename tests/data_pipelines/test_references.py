"""Rules and near duplicates beside the libraries that people know: datatrove's Gopher and C4 filters, datasketch."""

import dataclasses
import importlib
import pydoc_data.topics
import random
import re
from itertools import combinations

import numpy as np
import pytest

from data_pipelines import dedup
from data_pipelines.document import make_document, to_batch
from data_pipelines.rules import WEB, find_words, text_checks

pytestmark = pytest.mark.parity

# Our check -> datatrove's argument for it. Bounds are Gopher's, so that a rule of theirs means the same as one of ours.
QUALITY = {
    "few_words": {"min_doc_words": 50},
    "short_words": {"min_avg_word_length": 3},
    "long_words": {"max_avg_word_length": 10},
    "bullet_lines": {"max_bullet_lines_ratio": 0.9},
    "ellipsis_lines": {"max_ellipsis_lines_ratio": 0.3},
    "few_alphabetic_words": {"max_non_alpha_words_ratio": 0.8},
    "few_stop_words": {"min_stop_words": 2},
}
REPETITION = {
    "duplicate_lines": {"dup_line_frac": 0.3},
    "duplicate_line_bytes": {"dup_line_char_frac": 0.2},
    "duplicate_paragraphs": {"dup_para_frac": 0.3},
    **{f"top_{n}gram": {"top_n_grams": ((n, bound),)} for n, bound in ((2, 0.2), (3, 0.18), (4, 0.16))},
    **{
        f"duplicate_{n}grams": {"dup_n_grams": ((n, bound),)}
        for n, bound in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    },
}
OFF = {
    "GopherQualityFilter": dict.fromkeys(
        (
            "min_doc_words", "max_doc_words", "min_avg_word_length", "max_avg_word_length", "max_symbol_word_ratio",
            "max_bullet_lines_ratio", "max_ellipsis_lines_ratio", "max_non_alpha_words_ratio", "min_stop_words",
        )
    ),
    "GopherRepetitionFilter": dict.fromkeys(
        ("dup_line_frac", "dup_para_frac", "dup_line_char_frac", "dup_para_char_frac")
    ) | {"top_n_grams": (), "dup_n_grams": ()},
}  # fmt: skip
RULES = dataclasses.replace(WEB, min_mean_word_length=3.0, min_alphabetic_words=0.8)


@pytest.fixture(scope="module")
def texts():
    """Sections of Python's manual, and edits of them that break each rule: some a little, some by far."""
    sections = [text for text in pydoc_data.topics.topics.values() if 300 < len(text) < 6000][:60]
    rng = random.Random(4)
    edits = (
        lambda text: text[: rng.randrange(40, 600)],
        lambda text: text + "\n#" * rng.randrange(300),
        lambda text: "\n".join(f"- {line}" if rng.random() < 0.95 else line for line in text.split("\n") if line),
        lambda text: "\n".join(line + "..." * (rng.random() < 0.4) for line in text.split("\n") if line),
        lambda text: text + " 12 34" * rng.randrange(200),
        lambda text: text.replace("the ", "").replace(" to ", " ").replace(" of ", " ").replace(" and ", " ")[:500],
        lambda text: text + (text[:200] + "\n") * rng.randrange(12),
        lambda text: text + " more of it" * rng.randrange(120),
        lambda text: text + "\n\nThe end." * rng.randrange(12),
        lambda text: " ".join(word * rng.randrange(1, 4) for word in text.split()),
        lambda text: " ".join(word[:3] for word in text.split()),
    )
    return sections + [edit(text) for edit in edits for text in rng.sample(sections, 12)]


def verdicts(module, name, settings, texts):
    """Whether datatrove drops each text."""
    Document = pytest.importorskip("datatrove.data").Document
    rule = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)(
        **OFF.get(name, {}) | settings
    )
    return np.array([rule.filter(Document(text=text, id="")) is not True for text in texts])


@pytest.mark.parametrize("check", [*QUALITY, *REPETITION])
def test_gopher_rules_say_what_those_of_datatrove_say(check, texts):
    module, name, settings = (
        ("gopher_quality_filter", "GopherQualityFilter", QUALITY[check])
        if check in QUALITY
        else ("gopher_repetition_filter", "GopherRepetitionFilter", REPETITION[check])
    )
    if check == "few_alphabetic_words" or "gram" in check:
        # Their words are also marks, and their shares are of all characters: on words and spaces both mean the same.
        texts = [" ".join(re.findall(r"[a-z]+|[0-9]+", text.lower())) for text in texts]
    if check.startswith("top"):  # of a short text they count an n-gram that comes once
        texts = [text for text in texts if len(text.split()) >= 100]
    theirs = verdicts(module, name, settings, texts)
    batch = to_batch([make_document(text, source="s", path=str(n)) for n, text in enumerate(texts)])
    ours = next(found for found in text_checks(batch, RULES) if found.reason == check)
    differ = theirs != ours.fails()
    assert theirs.any() and not theirs.all(), "the texts lie on both sides"
    assert differ.mean() < 0.08, differ.sum()
    # They split words elsewhere and count the spaces of n-grams: the values differ a little, and so may verdicts.
    near = np.abs(ours.values_D - ours.bound) <= 0.35 * ours.bound
    assert (near | ~differ).all(), ours.values_D[differ & ~near]


def test_c4_rules_say_what_those_of_datatrove_say(texts):
    marked = [text + mark for text in texts[:20] for mark in ("\nLorem ipsum dolor sit amet.", "\nIt is {so}.", "")]
    settings = {"min_num_sentences": -1, "filter_no_terminal_punct": False, "min_words_per_line": -1}
    theirs = verdicts("c4_filters", "C4QualityFilter", settings, marked)
    batch = to_batch([make_document(text, source="s", path=str(n)) for n, text in enumerate(marked)])
    ours = {found.reason: found.fails() for found in text_checks(batch, WEB)}
    assert 0 < theirs.sum() < len(theirs) and (theirs == (ours["braces"] | ours["lorem_ipsum"])).all()


def test_datasketch_estimates_as_well_and_finds_no_pair_that_is_missed():
    datasketch = pytest.importorskip("datasketch")
    rng = random.Random(5)
    base = [[f"w{rng.randrange(500)}" for _ in range(120)] for _ in range(30)]
    rows = base + [
        [f"n{rng.randrange(500)}" if rng.random() < rate else word for word in words]
        for words in base
        for rate in (0.01, 0.03, 0.06)
    ]
    shingles = [{" ".join(row[at : at + 5]) for at in range(len(row) - 4)} for row in rows]
    theirs = [datasketch.MinHash(num_perm=128) for _ in rows]
    for sketch, held in zip(theirs, shingles, strict=True):
        sketch.update_batch([each.encode() for each in sorted(held)])
    batch = to_batch([make_document(" ".join(row), source="s", path=str(n)) for n, row in enumerate(rows)])
    _, signatures = dedup.sign(find_words(batch))
    origin = [*range(30), *(number // 3 for number in range(90))]
    pairs = [(a, b) for a, b in combinations(range(len(rows)), 2) if origin[a] == origin[b]]
    true = np.array([len(shingles[a] & shingles[b]) / len(shingles[a] | shingles[b]) for a, b in pairs])
    errors = [
        np.array([estimate(a, b) for a, b in pairs]) - true
        for estimate in (
            lambda a, b: float((signatures[a] == signatures[b]).mean()),
            lambda a, b: theirs[a].jaccard(theirs[b]),
        )
    ]
    ours, other = (float(np.sqrt(np.mean(error**2))) for error in errors)
    assert ours < 0.05 and abs(ours - other) < 0.01

    index = datasketch.MinHashLSH(num_perm=128, params=(20, 6))
    for number, sketch in enumerate(theirs):
        index.insert(number, sketch)
    alike = [pair for pair, value in zip(pairs, true, strict=True) if value >= 0.7]
    found = sum(b in index.query(theirs[a]) for a, b in alike)
    bands = signatures[:, :120].reshape(len(rows), 20, 6)
    mine = sum(bool((bands[a] == bands[b]).all(axis=1).any()) for a, b in alike)
    assert len(alike) > 40 and mine >= found - 2 and mine >= 0.95 * len(alike)
