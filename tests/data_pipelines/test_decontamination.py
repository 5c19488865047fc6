import json
import random

import numpy as np
import pytest

from data_pipelines import decontamination as d
from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.rules import find_words
from tests.data_pipelines.test_rules import plain_words

QUESTION = "Ann has 3 red boxes, and each of the boxes holds 12 pens. How many pens has she got in all?"
ANSWER = "She has 3 * 12 = 36 pens. The answer is thirty six."
CHINESE = "小明家的果园里有三十棵苹果树和二十棵梨树，每棵苹果树收了四十斤苹果，请问一共收了多少斤？"


def index_of(*items, name="sums", **settings):
    return d.build_index([d.Benchmark(name, items)], d.Decontamination(**settings))


def batch_of(*texts):
    return to_batch([make_document(text, source="s", path=str(i)) for i, text in enumerate(texts)])


def filler(seed, num_words=60):
    draw = random.Random(seed)
    return " ".join(draw.choice(["sea", "sand", "wind", "boat", "tide", "gull", "rope"]) for _ in range(num_words))


def plain_grams(text, n=12, han=25):
    words = [word.lower() for word in plain_words(text)]
    is_han = [len(word) == 1 and "\u3040" <= word <= "\u9fff" for word in words]
    for size, mostly in ((n, False), (han, True)):
        for i in range(len(words) - size + 1):
            if (2 * sum(is_han[i : i + size]) > size) == mostly:
                yield i, size, tuple(words[i : i + size])


def test_hits_are_those_of_plain_sets():
    draw = random.Random(0)
    vocabulary = ["a", "b", "cc", "的", "是", "éa"]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(0, 40))) for _ in range(60)]
    index = index_of(*texts[:20], words=3, han_characters=4, max_items=100)
    known = {gram for text in texts[:20] for _, _, gram in plain_grams(text, 3, 4)}
    batch = batch_of(*texts)
    words = find_words(batch)
    hits = d.find_hits(words, index)
    found = {(r, w - int(words.starts[r]), n) for r, w, n in zip(*(c.tolist() for c in hits[:3]), strict=True)}
    assert found == {
        (r, i, n) for r, text in enumerate(texts) for i, n, gram in plain_grams(text, 3, 4) if gram in known
    }
    assert len(found) > 300
    for row in range(len(texts)):
        places = np.flatnonzero(hits.rows == row)
        if len(places):
            (overlap,) = d.overlaps(hits, places, len(plain_words(texts[row])), index)
            covered = {w for r, i, n in found if r == row for w in range(i, i + n)}
            assert (overlap.words, overlap.ngrams) == (len(covered), len(places))
    assert len(d.find_hits(find_words(batch_of()), index).rows) == 0


def test_documents_go_with_benchmark_share_and_items():
    index = index_of("something else entirely", f"{QUESTION}\n{ANSWER}", CHINESE)
    changed = QUESTION.upper().replace(" ", "\n\t").replace("?", "!!")  # case, spaces, marks leave no trace
    bridge = "pens has she got in all? She has 3 * 12 = 36 pens"  # neither question nor answer alone
    near = QUESTION.replace("12", "14").replace("and each", "and all")  # no 12 words in a row
    texts = [filler(1), f"{filler(2)} {changed} {filler(3)}", bridge, near, f"他说：{CHINESE[:30]}", CHINESE[:20], ""]
    outcome = d.decontaminate(index)(batch_of(*texts))
    assert [reason == "contaminated" for reason in outcome.reasons] == [False, True, True, False, True, False, False]
    assert outcome.details[1] == "sums: 21 words (0.15) of items 1"
    assert outcome.details[4].endswith("of items 2")
    assert d.decontaminate(index)(batch_of()).reasons == []


def test_cutting_takes_out_the_lines_and_says_so_in_meta():
    index = index_of(QUESTION, action="cut")
    before, after = f"{filler(1)}\nÉ. ", f"的\n{filler(2)}\n"
    outcome = d.decontaminate(index)(batch_of(before + QUESTION + after, QUESTION, filler(3)))
    documents = to_documents(outcome.batch)
    assert list(outcome.reasons) == [None, "contaminated", None]
    assert documents[0].text == f"{filler(1)}\n{filler(2)}\n" and documents[0].meta == {"decontaminated": {"sums": [0]}}
    assert outcome.details[1].startswith("1.00 would be cut, above 0.5; sums: 21 words (1.00)")
    assert documents[2].text == filler(3) and documents[2].meta == {}


def test_several_benchmarks_templates_and_short_items():
    template = "Write a function that takes the given list of numbers and returns the"
    benchmarks = [
        d.Benchmark("sums", [QUESTION, "too short"]),
        d.Benchmark("copy", [QUESTION]),
        d.Benchmark("code", [f"{template} {word} {filler(word)}" for word in "abcdefg"]),
    ]
    index = d.build_index(benchmarks, d.Decontamination())
    batch = batch_of(template, QUESTION, f"{template} a {filler('a')}")
    assert d.decontaminate(index)(batch).reasons == [None, "contaminated", "contaminated"]
    assert d.report([batch, batch_of(QUESTION + QUESTION)], index) == [
        d.BenchmarkReport("sums", 2, 1, 0, documents=2, items_found=1, words=63),
        d.BenchmarkReport("copy", 1, 0, 0, documents=2, items_found=1, words=63),
        d.BenchmarkReport("code", 7, 0, 2, documents=1, items_found=1, words=72),
    ]


def test_command_reads_fields_and_names_what_is_wrong(tmp_path, capsys):
    rows = [{"question": QUESTION, "choices": {"text": ["three dozen", "four"]}}, {"question": "x"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "doc.txt").write_text(
        "has she got in all? Three dozen. FOUR, pens; how many pens has she got in all three dozen four"
    )

    def run(benchmark):
        return d.main(["--benchmark", benchmark, "--input", str(tmp_path / "doc.txt"), "--words", "8"])

    assert run(f"sums={tmp_path}/b.jsonl:question,choices.text") == 0
    assert "\nsums: 1 of 1 items in 1 documents (0 too short, 0 n-grams" in capsys.readouterr().out
    assert run(f"sums={tmp_path}/bad.jsonl:question,choices.text") == 1
    assert "bad.jsonl:2: benchmark 'sums' has no field 'choices.text'; this row has question" in capsys.readouterr().err
    assert run("sums") == 1 and "wanted NAME=FILE.jsonl:FIELD" in capsys.readouterr().err
    with pytest.raises(ValueError, match="an n-gram of 12 words; give fields with longer texts"):
        index_of("short")
    with pytest.raises(ValueError, match="action is 'mask'"):
        d.Decontamination(action="mask")
