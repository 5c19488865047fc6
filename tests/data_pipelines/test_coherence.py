"""P(S2 | S1) against P(S2): scores by hand, a real checkpoint, counted words, thresholds and their command."""

import argparse
import functools
import json
import math
import pydoc_data.topics
import re
from collections import Counter
from pathlib import Path

import cloudpickle
import jax
import numpy as np
import pytest

from data_pipelines import coherence, ngram_scan, ngram_scorer
from data_pipelines import coherence_thresholds as fitting
from data_pipelines import long_text as long
from data_pipelines.coherence import Filter, Scored, Scorer, Thresholds, Windows
from data_pipelines.digests import stage_digest
from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.ledger import Ledger, dropped_by_reason
from data_pipelines.measures import curves, settled
from data_pipelines.wanjuan import run_chain
from internjax.hf.open import open_model
from internjax.hf.save import save_model
from internjax.model import decoder
from internjax.model.config import DynamicNTK, ModelConfig
from internjax.text.tokenizer import train_tokenizer

SMALL = Windows(window=12, scored=4, short_context=3)
NGRAM = Windows(window=800, scored=200, short_context=100)
ARGPARSE, DECIMAL, *TRAINING = (
    Path(argparse.__file__).with_name(name).read_text("utf-8")
    for name in ("argparse.py", "_pydecimal.py", "ast.py", "inspect.py")
)


def fake(loss=lambda row, num_scored: 1.0, version="v"):
    """A scorer whose tokens are characters."""

    def score(rows, num_scored, length):
        assert all(num_scored <= len(row) <= length for row in rows)
        losses = np.array([loss(row, num_scored) for row in rows])
        return Scored(losses, np.array([len(row) / 100 for row in rows]))

    return Scorer("fake", version, lambda text: np.array([ord(c) for c in text], np.int32), score)


def batch_of(*texts, language="en", domain="web"):
    return to_batch(
        make_document(text, source="s", path=f"p{n}", language=language, domain=domain) for n, text in enumerate(texts)
    )


# --- windows and scores ----------------------------------------------------------------------------------------------


def test_scores_by_hand():
    """Of 29 characters: windows of 12, 12 and 5, the last of which is too short."""
    text = "abcdefghijkl" + "mmmmmmmmmmmm" + "nopqr"
    losses = {("abcdefghijkl", 4): 1.0, ("fghijkl", 4): 1.5, ("m" * 12, 4): 0.5, ("m" * 7, 4): 2.0}
    scorer = fake(lambda row, num: losses["".join(map(chr, row)), num])
    found = coherence.coherence([text, "abc", ""], scorer, SMALL)
    assert found.windows_D.tolist() == [2, 0, 0] and found.tokens_D.tolist() == [29, 3, 0]
    scores = {name: values[0] for name, values in found.scores.items()}
    ppl_long, ppl_short = (math.e + math.exp(0.5)) / 2, (math.exp(1.5) + math.exp(2)) / 2
    assert scores == pytest.approx(
        {
            "ppl_long": ppl_long,
            "ppl_short": ppl_short,
            "ppl_delta": ppl_short - ppl_long,
            "ppl_ratio": (ppl_short - ppl_long) / (ppl_short + 1e-5),
            "acc_long": 0.12,
            "acc_short": 0.07,
            "acc_delta": 0.05,
            "acc_ratio": 0.05 / (0.07 + 1e-5),
            "tokens_per_character": 1.0,
            "unique_tokens": 13 / 24,
        }
    )
    for name in set(coherence.SCORES) - {"tokens_per_character"}:
        assert np.isnan(found.scores[name][1:]).all(), name


@pytest.mark.parametrize(("short_context", "least"), [(3, 8), (0, 5)])
def test_the_last_window_counts_where_the_contexts_differ(short_context, least):
    cut = Windows(12, 4, short_context)
    for length, windows in ((least - 1, 0), (least, 1), (12, 1), (12 + least - 1, 1), (12 + least, 2)):
        assert coherence.coherence(["x" * length], fake(), cut).windows_D[0] == windows, length


def test_long_texts_are_encoded_in_pieces(monkeypatch):
    text = "one two\nthree " * 30
    words = Scorer("w", "v", lambda piece: np.array([len(word) for word in piece.split()], np.int32), fake().score)
    whole = np.concatenate(list(coherence.token_windows(text, words.encode, 16)))
    monkeypatch.setattr(coherence, "PIECE_CHARACTERS", 20)
    pieces = list(coherence.token_windows(text, words.encode, 16))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert [len(piece) for piece in pieces] == [16] * 5 + [10]
    assert list(coherence.pieces("x" * 50)) == ["x" * 20, "x" * 20, "x" * 10]


@pytest.mark.parametrize("fields", [{"scored": 0}, {"short_context": -1}, {"window": 2048}])
def test_windows_that_say_nothing_are_refused(fields):
    with pytest.raises(ValueError, match="more context in the window"):
        Windows(**fields)


# --- the stage -------------------------------------------------------------------------------------------------------


def hurt(row, num_scored):
    """Context helps where it is of the letters of S2, and hurts where it is not."""
    before, scored = set(row[:-num_scored]), set(row[-num_scored:])
    return 2.0 - 0.1 * len(before & scored) + 0.1 * len(before - scored)


TEXTS = {"helps": "abcdabcdabcd", "hurts": "wxyzuabdabcd", "repeats": "a" * 12, "short": "abcdabc"}


def test_the_stage_names_what_it_drops_and_keeps_scores():
    stage = coherence.coherent(lambda: fake(hurt), cut=SMALL, settings=Filter(min_unique_tokens=0.1))
    outcome = stage(batch_of(*TEXTS.values()))
    assert outcome.reasons == [None, "context_hurts", "repeated_tokens", "unscored"]
    assert re.fullmatch(r"context_hurts: ppl_ratio -0\.\d+ is below 0\.00000 \(\*, \*\)", outcome.details[1])
    assert outcome.details[2] == "repeated_tokens: 0.0833 of them differ, below 0.1"
    assert outcome.details[3] == "unscored: 7 tokens are below 8, so nothing was scored"
    metas = [document.meta["scores"] for document in to_documents(outcome.batch)]
    assert metas[0]["ppl_ratio"] > 0 > metas[1]["ppl_ratio"]
    assert metas[3]["ppl_ratio"] is None and metas[3]["tokens_per_character"] == 1.0
    kept = coherence.coherent(lambda: fake(hurt), cut=SMALL, settings=Filter(unscored="keep"))(batch_of("abc"))
    assert kept.reasons == [None] and to_documents(kept.batch)[0].meta["scores"]["ppl_ratio"] is None
    assert stage(batch_of()).reasons == []


def test_the_threshold_is_that_of_domain_and_language():
    rows = (("*", "*", 0.0), ("*", "zh", -9.0), ("book", "en", 9.0))
    held = Thresholds("ppl_delta", tuple(coherence.ScoreThreshold(*row) for row in rows))
    stage = coherence.coherent(lambda: fake(hurt), held, cut=SMALL)
    for domain, language, text, reason in (
        ("web", "en", "helps", None),
        ("book", "en", "helps", "context_hurts"),
        ("book", "zh", "hurts", None),
        ("web", "en", "hurts", "context_hurts"),
    ):
        assert stage(batch_of(TEXTS[text], domain=domain, language=language)).reasons == [reason], (domain, language)


def test_thresholds_of_another_scorer_or_other_windows_are_refused():
    held = coherence.NOT_HURT._replace(scorer="other", windows=SMALL)
    with pytest.raises(ValueError, match="were fitted with another scorer than fake"):
        coherence.coherent(fake, held, cut=SMALL)(batch_of("abc"))
    with pytest.raises(ValueError, match="fit them anew or cut alike"):
        coherence.coherent(fake, held)
    with pytest.raises(ValueError, match="no threshold holds for all"):
        coherence.coherent(fake, coherence.NOT_HURT._replace(thresholds=()))
    with pytest.raises(ValueError, match="a loss that is no number"):
        coherence.coherent(lambda: fake(lambda row, num: np.nan), cut=SMALL)(batch_of("x" * 12))


# --- a real checkpoint -----------------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=300, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48,
    max_position_embeddings=8, rope_scaling=DynamicNTK(2.0), initializer_range=0.2, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "model"
    tokenizer = train_tokenizer(["the cat sat on the mat and the dog sat on the cat " * 4], vocab_size=280)
    save_model(
        folder,
        config=CONFIG,
        params=jax.jit(functools.partial(decoder.init, CONFIG))(jax.random.key(0)),
        tokenizer=tokenizer,
    )
    return str(folder)


def test_a_checkpoint_scores_as_log_softmax_says(checkpoint):
    """Both contexts, a shorter last window, and no context at all, from the logits of every row by itself."""
    from internjax.model import rope

    scorer, model = long.open_scorer(checkpoint, 12, 3), open_model(checkpoint)
    inv_freq = rope.inv_freq(model.config, length=12)[None]  # dynamic scaling: that of a whole window
    logits = jax.jit(lambda tokens: decoder.logits(model.params, tokens, config=model.config, inv_freq_BF=inv_freq))
    text = "the dog sat on a mat, and the cat sat on the dog: miaow and the dog"
    tokens = scorer.encode(text)
    assert len(tokens) % 12 >= 8 and len(tokens) > 24
    np.testing.assert_array_equal(tokens, model.tokenizer.encode(text))

    def by_hand(row):
        padded = np.zeros((1, 12), np.int32)
        padded[0, : len(row)] = row
        rows = np.asarray(logits(padded), np.float64)[0, len(row) - 5 : len(row) - 1]
        chosen = rows[np.arange(4), row[-4:]] - np.log(np.exp(rows).sum(axis=1))
        return np.exp(-chosen.mean()), (rows.argmax(axis=1) == row[-4:]).mean()

    windows = [tokens[at : at + 12] for at in range(0, len(tokens), 12)]
    for short_context in (3, 0):
        found = coherence.coherence([text], scorer, Windows(12, 4, short_context)).scores
        begin = [] if short_context else [model.tokenizer.bos_id]
        for name, rows in {
            "long": windows,
            "short": [np.concatenate([begin, row[-4 - short_context :]]).astype(int) for row in windows],
        }.items():
            ppl, accuracy = np.mean([by_hand(row) for row in rows], axis=0)
            assert found[f"ppl_{name}"][0] == pytest.approx(ppl, rel=1e-5)
            assert found[f"acc_{name}"][0] == pytest.approx(accuracy)


def test_scores_do_not_depend_on_the_batch(checkpoint, ngrams, monkeypatch):
    texts = [ARGPARSE[at : at + size] for at, size in ((0, 400), (900, 700), (2000, 20), (3000, 1000))]
    for scorer, cut in ((long.open_scorer(checkpoint, 12, 3), SMALL), (ngrams, Windows(120, 30, 20))):
        together = coherence.coherence(texts, scorer, cut)
        alone = [coherence.coherence([text], scorer, cut) for text in reversed(texts)][::-1]
        with monkeypatch.context() as patched:
            patched.setattr(coherence, "WINDOWS_AT_ONCE", 7)
            sevens = coherence.coherence(texts, scorer, cut)
        for name, values in together.scores.items():
            np.testing.assert_array_equal(values, [float(one.scores[name][0]) for one in alone])
            np.testing.assert_array_equal(values, sevens.scores[name])


# --- counted words ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ngrams():
    settings = ngram_scorer.NgramSettings()
    return ngram_scorer.ngram_scorer(ngram_scorer.count(TRAINING, settings), settings, name="n", version="1")


def test_probabilities_sum_to_one_and_are_those_that_losses_are_made_of():
    settings = ngram_scorer.NgramSettings(half_life=2, word_smoothing=2, recent_smoothing=1, pair_smoothing=1)
    tables = ngram_scorer.make_tables(ngram_scorer.count(["a b c a b d a b c", "b c e"], settings), settings)
    rows = [
        ngram_scorer.encode(text).astype(np.int64) for text in ("", "a", "a b", "x y", "c a b", "a b c x a b c b a b")
    ]
    out = np.empty(ngram_scorer.VOCABULARY)
    cache = ngram_scan.empty_cache(32, ngram_scorer.VOCABULARY)
    for row in rows:
        ngram_scan.distribution(tables, cache, row, out)
        assert out.min() > 0 and out.sum() == pytest.approx(1.0, abs=1e-9), row
    assert not cache.words.any() and not cache.pair_slots.any()
    row, losses = rows[-1], np.empty(1)
    for at in range(len(row)):
        ngram_scan.losses(tables, cache, row, np.array([0, at + 1]), 1, losses)
        ngram_scan.distribution(tables, cache, row[:at], out)
        assert losses[0] == pytest.approx(-np.log(out[row[at]]), rel=1e-12)


def test_the_formula_by_hand():
    settings = ngram_scorer.NgramSettings(0.5, 0.25, 1.0, 2.0, 3.0, 1.0)
    tables = ngram_scorer.make_tables(ngram_scorer.count(["a b c a b d a b c", "b c e"], settings), settings)
    row = ngram_scorer.encode("a b c a b c").astype(np.int64)
    d, size = 0.5, ngram_scorer.VOCABULARY
    c = Counter("abcabdabcbce")
    p1 = (c["c"] - d + d * 5 / size) / 12
    p2 = (3 - d + d * 2 * p1) / 4  # bc x 3, bd
    p3 = (2 - d + d * 2 * p2) / 3  # abc x 2, abd
    q0 = (1 + 2 * p1) / (5 + 2)  # of "a b c a b" before it
    q1 = (1 / 4 + 3 * q0) / (1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16 + 3)  # two tokens after it
    q2 = (1 + 1 * q1) / (1 + 1)  # bc once, b followed once
    losses = np.empty(1)
    ngram_scan.losses(tables, ngram_scan.empty_cache(8, size), row, np.array([0, 6]), 1, losses)
    assert math.exp(-losses[0]) == pytest.approx(0.75 * p3 + 0.25 * q2, rel=1e-12)


def test_counts_do_not_go_across_texts_and_are_bounded(monkeypatch):
    texts = TRAINING
    whole = ngram_scorer.count(texts)
    tokens = [ngram_scorer.encode(text).tolist() for text in texts]
    for keys, counts, n in ((whole.pair_keys, whole.pair_counts, 2), (whole.triple_keys, whole.triple_counts, 3)):
        wanted = Counter(
            sum(word << 18 * (n - 1 - at) for at, word in enumerate(row[start : start + n]))
            for row in tokens
            for start in range(len(row) - n + 1)
        )
        assert dict(zip(keys.tolist(), counts.tolist())) == wanted
    monkeypatch.setattr(ngram_scorer, "MERGE_TOKENS", 1000)
    for one, other in zip(whole, ngram_scorer.count(texts[::-1]), strict=True):
        np.testing.assert_array_equal(one, other)
    few = ngram_scorer.count(texts, ngram_scorer.NgramSettings(max_ngrams=1024))
    assert len(few.triple_keys) <= 1024 and few.triple_counts.min() > 1
    with pytest.raises(ValueError, match="no three words in a row"):
        ngram_scorer.count(["one two", "three"])


def ratios(scorer, *texts, cut=NGRAM):
    return coherence.coherence(texts, scorer, cut).scores["ppl_ratio"]


def test_context_of_another_text_hurts(ngrams):
    """A window of 800 words: S1 of its own text, or of another one."""
    own, other = ngram_scorer.encode(ARGPARSE)[: 800 * 8], ngram_scorer.encode(DECIMAL)[: 800 * 8]
    held = own.reshape(-1, 800)
    mixed = held.copy()
    mixed[:, :500] = other.reshape(-1, 800)[:, :500]  # the short context stays
    words = Scorer("n", "1", lambda text: (held if text == "own" else mixed).ravel(), ngrams.score)
    natural, exchanged = ratios(words, "own", "mixed")
    assert natural > 0.02 > exchanged
    for short_context in (100, 0):
        natural, exchanged = ratios(words, "own", "mixed", cut=Windows(800, 200, short_context))
        assert natural > exchanged + 0.02


def test_halves_of_one_text_fit_better_than_halves_of_two(ngrams):
    cut = Windows(window=1600, scored=700, short_context=0)
    halves = {name: (text[8000:14000], text[14000:20000]) for name, text in (("a", ARGPARSE), ("d", DECIMAL))}
    joined = ["\n".join((halves[first][0], halves[second][1])) for first in "ad" for second in "ad"]
    one, ad, da, two = ratios(ngrams, *joined, cut=cut)
    assert min(one, two) > max(ad, da)


def test_one_passage_over_and_over_is_caught(ngrams):
    trap = "".join(ARGPARSE[9000:10500] for _ in range(40))
    assert ratios(ngrams, trap)[0] > 0.5 > ratios(ngrams, ARGPARSE)[0]
    stage = coherence.coherent(lambda: ngrams, cut=Windows(4096, 1024, 1024))
    outcome = stage(batch_of(trap, ARGPARSE, domain="code"))
    assert outcome.reasons == ["repeated_tokens", None]


# --- thresholds ------------------------------------------------------------------------------------------------------


def samples(domain, language, scores):
    return [fitting.Sample(f"{domain}{language}{n}", f"p{n}", domain, language, s, "t") for n, s in enumerate(scores)]


def test_thresholds_keep_the_wanted_share_and_fall_back():
    grid = np.arange(100) / 100
    data = [
        *samples("web", "en", grid),
        *samples("book", "en", grid[:40] + 1),
        *samples("web", "zh", grid[:60] + 5),
        *samples("paper", "fr", [0.5, np.nan, np.nan]),
    ]
    fit = fitting.fit_thresholds(data, {"*": 0.9, "book": 0.5}, num_borderline=2)
    assert [(row.domain, row.language) for row in fit.thresholds] == [
        ("*", "*"), ("*", "en"), ("*", "zh"), ("web", "en"), ("web", "zh")
    ]  # fmt: skip
    web = fit.thresholds[3]
    assert web[2:6] == (pytest.approx(0.095), 100, 0.9, 0.9)
    assert [row.score for row in web.below] == [0.09, 0.08] and [row.score for row in web.above] == [0.1, 0.11]
    assert fit.num_unscored == 2
    assert fit.notes == [
        "*, fr: 1 scored documents, fewer than 50; that of *, * holds",
        "book, en: 40 scored documents, fewer than 50; that of *, en holds",
        "paper, fr: 1 scored documents, fewer than 50; that of *, * holds",
        "2 documents have no score, since they are shorter than a window; they count nowhere",
    ]
    few = fitting.fit_thresholds(data, {"*": 0.9, "book": 0.5}, least_samples=40)
    assert [row[2:6] for row in few.thresholds if row.domain == "book"] == [(pytest.approx(1.195), 40, 0.5, 0.5)]
    for share in (0.9, 1.0):  # equal scores stay together
        tied = fitting.fit_thresholds(samples("web", "en", [0.5] * 5), {"*": share})
        assert tied.thresholds[0][2:5] == (0.5, 5, 1.0) and "look at the sample" in tied.notes[0]
    assert fit == fitting.fit_thresholds(data[::-1], {"*": 0.9, "book": 0.5}, num_borderline=2)
    for wrong, message in (({"web": 0.9}, "one for '\\*'"), ({"*": 0.0}, "above 0")):
        with pytest.raises(ValueError, match=message):
            fitting.fit_thresholds(data, wrong)
    with pytest.raises(ValueError, match="none of 2 documents has a score"):
        fitting.fit_thresholds(samples("a", "b", [np.nan, np.nan]), {"*": 0.9})


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder of n-grams and fitted thresholds, both by the command, from long pieces of the library's own text."""
    folder = tmp_path_factory.mktemp("fit")
    pieces = [(name, text[at : at + 40000]) for name, text in (("argparse", ARGPARSE), ("decimal", DECIMAL))
              for at in range(0, 80000, 20000)]  # fmt: skip
    mixed = (
        "mixed",
        "".join(ARGPARSE[at : at + 2500] + DECIMAL[at + 9000 : at + 11500] for at in range(0, 40000, 5000)),
    )
    rows = [{"text": text, "domain": "code", "language": "python", "path": f"{name}{n}"}
            for n, (name, text) in enumerate([*pieces, mixed, ("short", ARGPARSE[:20000])])]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text(json.dumps({"text": TRAINING[0]}) + "\n")
    (folder / "broken.jsonl").write_text("{\n")
    scorer, output = str(folder / "ngrams"), str(folder / "thresholds.json")
    assert long.main(["train", "--input", str(folder / "text.jsonl"), "--output", scorer]) == 0
    inputs = [str(folder / name) for name in ("rows.jsonl", "broken.jsonl")]
    cut = ["--window", "1500", "--scored", "500", "--short-context", "0"]
    more = ["--keep", "0.85", "book=0.5", "--least-samples", "5"]
    assert long.main(["fit", "--input", *inputs, "--scorer", scorer, "--output", output, *cut, *more]) == 0
    return folder, rows


def test_the_command_fits_thresholds_that_the_chain_uses(fitted):
    folder, rows = fitted
    values = json.loads((folder / "thresholds.json").read_text())
    assert values["windows"] == {"window": 1500, "scored": 500, "short_context": 0}
    key = [(row["domain"], row["language"], row["num_samples"]) for row in values["thresholds"]]
    assert key == [("*", "*", 9), ("*", "python", 9), ("code", "python", 9)]
    page = (folder / "thresholds.html").read_text()
    for words in ("What stays", "these go, the nearest", "these stay", "[...]", "domain, language"):
        assert words in page
    assert "<script" not in page and "http" not in re.sub(r"<pre.*?</pre>", "", page, flags=re.S)
    stages = long.long_text_stages(folder / "ngrams", thresholds=folder / "thresholds.json")
    assert [stage.name for stage in stages] == ["normalise", "language", "length", "statistics", "coherence"]
    documents = [make_document(row.pop("text"), source="s", **row) for row in map(dict, rows)]
    ledger = Ledger()
    kept = run_chain(documents, stages, ledger)
    assert dropped_by_reason(ledger) == {"context_hurts": 1, "not_long": 1}
    assert len(kept) == 8 and all(document.meta["scores"]["ppl_ratio"] > 0 for document in kept)
    sample, values = ledger.samples["coherence"], json.loads((folder / "thresholds.json").read_text())["thresholds"]
    bounds = [("all others", values[0]["value"]), ("python", values[1]["value"]), ("code, python", values[2]["value"])]
    assert [bound[2:] for bound in sample.bounds] == [(0.05, ""), *((value, of) for of, value in bounds)]
    found = {bound.of: points for bound, points, _ in curves(sample.bounds, settled(sample))}
    assert set(found) == {"", "code, python"}, "the other thresholds hold for no document"
    least = min(document.meta["scores"]["ppl_ratio"] for document in kept)
    assert [stays for threshold, stays, _ in found["code, python"] if threshold < least][-1] == 8 / 9
    assert found["code, python"][0][1] == 1 and found["code, python"][-1][1] == 1 / 9
    sent = cloudpickle.loads(cloudpickle.dumps(stages[-1]))
    batch = to_batch(documents[:3])
    assert sent.apply(batch).batch.equals(stages[-1].apply(batch).batch)
    assert stage_digest(stages[-1]) == stage_digest(sent)
    plain = long.long_text_stages(folder / "ngrams")
    assert stage_digest(plain[-1]) != stage_digest(stages[-1])


def test_what_is_scored_has_the_language_that_the_chain_finds():
    """A threshold is looked up by it, and a bound of Chinese text is none of English text."""
    prose = "\n".join(pydoc_data.topics.topics.values())[:40000]
    document = make_document(prose, source="s", path="p")
    assert document.language == "und"
    (sample,) = long.score_documents(iter([document]), fake(hurt), SMALL, "ppl_ratio", Ledger())
    assert sample.language == "en"


def test_damaged_and_foreign_files_are_refused(fitted, checkpoint, tmp_path, capsys):
    folder, _ = fitted
    with pytest.raises(ValueError, match="fitted with another scorer"):
        long.long_text_stages(checkpoint, thresholds=folder / "thresholds.json")
    (tmp_path / "t.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9"):
        long.long_text_stages(folder / "ngrams", thresholds=tmp_path / "t.json")
    (tmp_path / "n").mkdir()
    for path in (folder / "ngrams").iterdir():
        (tmp_path / "n" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "n" / "words.npy").write_bytes(b"x")
    with pytest.raises(ValueError, match="altered"):
        ngram_scorer.open_counts(tmp_path / "n")
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    wrong = {
        "no document is left to score: not_long": ["--input", str(short), "--output", str(tmp_path / "o.json")],
        "give a name that ends in .json": ["--input", str(short), "--output", str(tmp_path / "o")],
        "--keep has 'x'": ["--input", str(short), "--output", str(tmp_path / "o.json"), "--keep", "x"],
        "no such file": ["--input", str(tmp_path / "none"), "--output", str(tmp_path / "o.json")],
    }
    for message, given in wrong.items():
        assert long.main(["fit", "--scorer", str(folder / "ngrams"), *given]) == 1
        assert message in capsys.readouterr().err


def test_the_example_of_the_readme_runs(capsys):
    text = (Path(long.__file__).parent / "README.md").read_text("utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "long_text_stages" in code]
    exec(compile(code, "data_pipelines/README.md", "exec"), {})
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\{'not_long': \d+.*\} \S+\.py", last)
