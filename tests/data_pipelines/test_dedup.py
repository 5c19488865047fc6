import ast
import asyncio
import random
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines import dedup
from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.words import find_spans
from tests.data_pipelines.test_rules import plain_words


def batch_of(texts, **fields):
    return to_batch([make_document(t, **({"source": "s", "path": f"f:{i}"} | fields)) for i, t in enumerate(texts)])


def decided(stage, batch, scratch):
    """Reason and detail per row, of a corpus that is one batch."""
    found = stage.resolve([stage.sketch(batch)], lambda rows: batch.take(pa.array(rows)), scratch)
    said = dict(zip(found.rows.tolist(), zip(found.reasons, found.details, strict=True), strict=True))
    return [said.get(row, (None, None)) for row in range(batch.num_rows)]


def reasons_of(stage, batch, scratch):
    return [reason for reason, _ in decided(stage, batch, scratch)]


def plain_shingles(text):
    # Of ASCII letters alone is the case left aside; such letters and others make no word together.
    words = [word.lower() if word.isascii() else word for word in plain_words(text)]
    return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, min(len(words), 1)))}


def plain_jaccard(a, b):
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b) if a | b else 0.0


@pytest.fixture(scope="module")
def corpus():
    """200 texts: 60 random ones and edits of them, from light to heavy, so that many pairs lie around 0.7."""
    rng = random.Random(3)
    vocabulary = [f"word{i}" for i in range(400)] + list("的一是了我不人在他有这上们来到时大地为子中你说生国年着就那和")
    texts = [[rng.choice(vocabulary) for _ in range(rng.randint(60, 200))] for _ in range(60)]
    for _ in range(140):
        copy = list(rng.choice(texts[:60]))
        for _ in range(rng.randint(0, 8)):
            copy[rng.randrange(len(copy))] = rng.choice(vocabulary)
        texts.append(copy)
    return [" ".join(words) for words in texts]


def test_shingles_are_five_words_running_and_chinese_needs_no_spaces():
    shingles = dedup.shingle(
        find_spans(batch_of(["a b c d e f", "a b", "", "我是中国人民", "A\tb\n  c, d. e f!", "b a"]))
    )
    sizes = np.diff(shingles.starts).tolist()
    assert sizes == [2, 1, 0, 2, 2, 1]
    rows = [shingles.values[a:b].tolist() for a, b in zip(shingles.starts[:-1], shingles.starts[1:], strict=True)]
    assert rows[0] == rows[4] == sorted(rows[0]) and rows[1] != rows[5]
    assert len(dedup.shingle(find_spans(batch_of([]))).values) == 0


def test_indentation_leaves_code_the_same():
    code = "def f(x):\n    if x:\n        return 1\n    return 2\n"
    shingles = dedup.shingle(find_spans(batch_of([code, code.replace("    ", "\t"), code.replace("    ", "  ")])))
    a, b, c = (shingles.values[i:j].tolist() for i, j in zip(shingles.starts[:-1], shingles.starts[1:], strict=True))
    assert a == b == c


def test_signatures_estimate_the_true_jaccard(corpus):
    sizes, signatures = dedup.sign(find_spans(batch_of(corpus)))
    assert sizes.tolist() == [len(plain_shingles(text)) for text in corpus]
    errors = []
    for a, b in combinations(range(len(corpus)), 2):
        true = plain_jaccard(corpus[a], corpus[b])
        if true > 0:
            errors.append(float((signatures[a] == signatures[b]).mean()) - true)
    assert len(errors) > 200
    assert abs(np.mean(errors)) < 0.01
    assert np.sqrt(np.mean(np.square(errors))) < 0.05  # sqrt(J (1 - J) / 128) is at most 0.044
    assert np.abs(errors).max() < 0.21


def test_groups_against_brute_force(corpus, tmp_path, monkeypatch):
    batch, settings = batch_of(corpus), dedup.NearDuplicates()
    for sketches in ([batch], [batch.slice(0, 50), batch.slice(50)]):
        sketched = [dedup.sketch_near(part, settings=settings) for part in sketches]
        if len(sketched) == 2:  # rows are numbered through the corpus
            sketched[1] = sketched[1].set_column(0, "row", pa.array(np.arange(50, 200)))
            for name, small in (("KEYS_AT_ONCE", 30), ("PAIRS_AT_ONCE", 20), ("SHINGLES_AT_ONCE", 500)):
                monkeypatch.setattr(dedup, name, small)
        groups = dedup.group(sketched, lambda rows: batch.take(pa.array(rows)), tmp_path, settings)
        row = groups.rows_D
        root = dict(zip(row.tolist(), row[groups.root_D].tolist(), strict=True))
        pairs = {(a, b): plain_jaccard(corpus[a], corpus[b]) for a, b in combinations(range(len(corpus)), 2)}
        duplicates = [pair for pair, value in pairs.items() if value >= 0.7]
        assert len(duplicates) > 100
        assert np.mean([root[a] == root[b] for a, b in duplicates]) >= 0.99  # recall
        for place in np.flatnonzero(groups.root_D != np.arange(len(corpus))):  # precision is exact: edges are verified
            pair = tuple(sorted((int(row[place]), int(row[groups.partner_D[place]]))))
            assert pairs[pair] >= 0.7
            assert groups.similarity_D[place] == pytest.approx(pairs[pair])


# --- real texts ------------------------------------------------------------------------------------------------------

PACKAGES = ("asyncio", "email", "encodings", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")


def real_texts():
    """Modules and long docstrings of the standard library, each text once; many of these are near copies of others."""
    library, found = Path(asyncio.__file__).parents[1], []
    for package in PACKAGES:
        for path in sorted((library / package).rglob("*.py")):
            text = path.read_text("utf-8", "replace")
            if 100 < len(text) < 60_000:
                found.append(text)
            nodes = ast.walk(ast.parse(text)) if package != "encodings" else ()
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            docstrings = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
            found += (docstring for docstring in docstrings if len(docstring) > 300)
    return list(dict.fromkeys(found))


def planted(texts):
    """(number of the text, an edited copy): what happens to texts on their way, lightly or heavily."""
    rng = random.Random(6)
    others = [line for text in texts[::7] for line in text.splitlines() if len(line) > 30]

    def changed_words(words, share):
        return [rng.choice(words) if rng.random() < share else word for word in words]

    for number in rng.sample(range(len(texts)), 300):
        text, how = texts[number], rng.choice(("words", "cut", "more", "shape", "lines"))
        lines = text.splitlines()
        if how == "words":
            yield number, " ".join(changed_words(text.split(), rng.choice((0.01, 0.03, 0.06))))
        elif how == "cut":
            yield number, text[: int(len(text) * rng.uniform(0.6, 0.98))]
        elif how == "more":
            extra = [rng.choice(others) for _ in range(1 + int(len(lines) * rng.uniform(0, 0.4)))]
            yield number, "\n".join(extra + lines)
        elif how == "shape":
            yield number, text.upper().replace("    ", "\t").replace("\n\n", "\n")
        else:
            kept = [line for line in lines if rng.random() > rng.choice((0.02, 0.1))]
            yield number, "\n".join(kept)


def true_pairs(texts):
    """(a, b) -> Jaccard similarity of every pair that shares a shingle, by plain sets."""
    found, having = Counter(), defaultdict(list)
    shingles = [plain_shingles(text) for text in texts]
    for number, own in enumerate(shingles):
        for shingle in own:
            having[shingle].append(number)
    for numbers in having.values():
        found.update(combinations(numbers, 2))
    return {(a, b): common / (len(shingles[a]) + len(shingles[b]) - common) for (a, b), common in found.items()}


def test_recall_and_precision_on_real_near_duplicates(tmp_path):
    """Natural ones of the standard library (its code pages, say) and planted ones, every pair known."""
    natural = real_texts()
    copies = list(planted(natural))
    texts = natural + [text for _, text in copies]
    pairs = true_pairs(texts)
    duplicates = [pair for pair, value in pairs.items() if value >= 0.7]
    batch, settings = batch_of(texts), dedup.NearDuplicates()
    sketch = dedup.sketch_near(batch, settings=settings)
    groups = dedup.group([sketch], lambda rows: batch.take(pa.array(rows)), tmp_path, settings)
    row = groups.rows_D.tolist()
    root = {row[place]: row[best] for place, best in enumerate(groups.root_D.tolist())}

    def recall(wanted, *, at_least):
        assert len(wanted) >= at_least, "enough of them to say something"
        return np.mean([root[a] == root[b] for a, b in wanted])

    of_copies = [(a, b) for b, (a, _) in enumerate(copies, len(natural)) if pairs.get((a, b), 0) >= 0.7]
    # By its bands a pair at 0.7 is found with probability 0.92, one at 0.8 with 0.998; groups are chains of pairs.
    assert recall([pair for pair in duplicates if pair[1] < len(natural)], at_least=30) >= 0.95
    assert recall(of_copies, at_least=200) >= 0.97
    assert recall([pair for pair in duplicates if pairs[pair] >= 0.8], at_least=150) >= 0.99
    # Precision is exact: who goes is tied to another by a true similarity, and who is like no other stays.
    gone = np.flatnonzero(groups.root_D != np.arange(len(texts))).tolist()
    for place in gone:
        pair = tuple(sorted((row[place], row[groups.partner_D[place]])))
        assert pairs[pair] >= 0.7 and groups.similarity_D[place] == pytest.approx(pairs[pair])
    alike = {number for pair in duplicates for number in pair}
    assert {row[place] for place in gone} <= alike and len(alike) < len(texts) - 200
    # As many go as in the groups that all true pairs make, or a few less.
    wanted = len(alike) - len(components(duplicates))
    assert 0.98 * wanted <= len(gone) <= wanted


def components(pairs):
    """The sets of numbers that pairs tie together."""
    found = {}
    for a, b in pairs:
        together = found.get(a, {a}) | found.get(b, {b})
        found |= dict.fromkeys(together, together)
    return {id(each): each for each in found.values()}


def test_what_stays_does_not_depend_on_the_order_of_the_input(corpus, tmp_path):
    documents = to_documents(batch_of(corpus))
    stage = dedup.near_duplicates(dedup.NearDuplicates(neighbours=2))

    def said(given):
        return {d.id: what for d, what in zip(given, decided(stage, to_batch(given), tmp_path), strict=True)}

    shuffled = random.Random(1).sample(documents, len(documents))
    assert said(documents) == said(shuffled)
    assert 0 < sum(reason is not None for reason, _ in said(documents).values()) < len(documents)


def test_exactly_one_of_a_group_stays_and_it_is_the_newest_then_the_least_id(tmp_path):
    text = " ".join(f"w{i}" for i in range(50))
    stage = dedup.near_duplicates(dedup.NearDuplicates())
    copies = [make_document(text + f" tail{i}", source="s", path=str(i)) for i in range(5)]
    outcome = decided(stage, to_batch(copies), tmp_path)
    stays = [d for d, (reason, _) in zip(copies, outcome, strict=True) if reason is None]
    assert [d.id for d in stays] == [min(d.id for d in copies)]
    assert {reason for reason, _ in outcome if reason} == {"near_duplicate"}
    assert all(stays[0].id in detail for _, detail in outcome if detail)
    newest = copies[3]._replace(meta={"date": "2024-05"})
    reasons = reasons_of(stage, to_batch([*copies[:3], newest, copies[4]]), tmp_path)
    assert [reason is None for reason in reasons] == [False, False, False, True, False]


def test_exact_duplicates_ignore_case_and_white_space_only(tmp_path):
    stage = dedup.exact_duplicates
    reasons = reasons_of(stage, batch_of(["Hello  World\n", "hello world", "hello, world", "x"]), tmp_path)
    assert sorted(map(str, reasons)) == ["None", "None", "None", "exact_duplicate"]
    assert reasons[2] is None and reasons[3] is None
    assert reasons_of(stage, batch_of([]), tmp_path) == []
    twice = to_batch([make_document("x", source="s", path="p")] * 2)
    assert reasons_of(stage, twice, tmp_path) == [None, "duplicate_id"]


CHARACTERS = st.sampled_from(list("aAzZ@[9 \n\x1c\x1f\x00.ß的"))
BORDERS = [("Word" * 40)[:size] for size in (63, 64, 65, 127, 128, 129)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(CHARACTERS, max_size=150), max_size=4), st.randoms(use_true_random=False))
@example(BORDERS, random.Random(0))
@example(
    [f"{size * 'a'} b" for size in (62, 63, 64, 127, 200)] + [64 * " " + "a" + 70 * " " + "b", "é" + 64 * "A"],
    random.Random(1),
)
def test_exact_keys_are_equal_where_the_plain_texts_are(texts, rng):
    """Runs longer than a block of 64 bytes, ends at its border, ASCII and other texts in one batch."""
    changed = [
        "".join(rng.choice((c, c.swapcase() if c.isascii() else c, c * 2 if c == " " else c)) for c in t) for t in texts
    ]
    every = [*texts, *changed]
    sketched = dedup.sketch_exact(batch_of(["before", *every]).slice(1))
    keys = list(zip(sketched.column("key_a").to_pylist(), sketched.column("key_b").to_pylist(), strict=True))
    plain = [dedup.plain_text(text) for text in every]
    assert [[a == b for b in keys] for a in keys] == [[a == b for b in plain] for a in plain]


def test_texts_without_words_and_empty_batches_are_no_duplicates(tmp_path):
    stage = dedup.near_duplicates(dedup.NearDuplicates())
    assert reasons_of(stage, batch_of(["", "...", "!!!", ""]), tmp_path) == [None] * 4
    assert reasons_of(stage, batch_of([]), tmp_path) == []


def test_settings_that_cannot_be_honoured_are_refused():
    with pytest.raises(ValueError, match="25 bands of 6 rows want more than the 128 hashes"):
        dedup.NearDuplicates(bands=25)
    with pytest.raises(ValueError, match="threshold is 70"):
        dedup.NearDuplicates(threshold=70)
