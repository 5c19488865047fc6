import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import tiers as t
from data_pipelines.document import make_document, to_batch, to_documents


def batch_of(*languages, **meta):
    return to_batch(
        make_document("x", source="s", path=f"f{i}", language=name, meta=meta) for i, name in enumerate(languages)
    )


def test_tiers_go_to_meta_and_the_low_one_goes():
    stage = t.tiers(t.Tiers(languages=("c", "go")), score=lambda batch: np.array([0.8, 0.79, 0.2, 0.19, 0.0, 1.0]))
    outcome = stage(batch_of("c", "c", "go", "go", "ada", "ada", kept=1))
    metas = [row.meta for row in to_documents(outcome.batch)]
    assert [meta["tier"] for meta in metas] == ["high", "moderate", "moderate", "low", "moderate", "moderate"]
    assert [meta["weight"] for meta in metas] == [3, 1, 1, 0, 1, 1] and metas[0]["kept"] == 1
    assert list(outcome.reasons) == [None, None, None, "low_quality", None, None]
    assert outcome.details[3] == "quality 0.190 is below 0.2"
    (check,) = outcome.checks
    assert check.fails().tolist() == [False] * 3 + [True] + [False] * 2 and np.isnan(check.values_D[4:]).all()
    everywhere = t.tiers(t.Tiers())(batch_of("ada", quality=0.1))
    assert everywhere.reasons == ["low_quality"] and t.tiers(t.Tiers())(batch_of()).reasons == []


def test_scores_that_are_missing_or_wrong_are_refused():
    with pytest.raises(ValueError, match=r"f0 has no quality in meta \(None\)"):
        t.tiers(t.Tiers())(batch_of("c"))
    for scores, message in (
        ([0.5], "shape"),
        ([0.5, np.nan], "the score of f1 is nan"),
        ([2, 0], "the score of f0 is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            t.tiers(t.Tiers(), score=lambda batch, scores=scores: np.array(scores))(batch_of("c", "c"))
    with pytest.raises(ValueError, match="low is 0.9"):
        t.Tiers(low=0.9)
    for weight in (0, 2.5):
        with pytest.raises(ValueError, match=rf"high_weight is {weight}; wanted a whole number from 1 on"):
            t.Tiers(high_weight=weight)


def test_agreement_by_hand():
    scored = [t.Scored(str(i), "c" if i < 10 else "go", 0.9 if i % 10 < 5 else 0.1) for i in range(20)]
    labels = {str(i): "high" if i % 10 < 4 else "low" for i in range(10)} | {str(i): "high" for i in range(10, 15)}
    found = t.agreement(scored, labels)
    # c: 9 of 10 agree; by chance 0.5 * 0.4 + 0.5 * 0.6 = 0.5.
    assert found["c"] == t.Agreement(10, pytest.approx(0.9), pytest.approx(0.8))
    assert found["go"] == t.Agreement(5, 1.0, 0.0)  # one label alone proves nothing
    assert t.trusted_languages(found, min_samples=5) == ("c",) and t.trusted_languages(found) == ()


SCORED = [
    t.Scored("a", "c", 0.99), t.Scored("b", "c", 0.95), t.Scored("c", "c", 0.01), t.Scored("d", "go", 0.9),
    t.Scored("e", "go", 0.6), t.Scored("f", "c", 0.98), t.Scored("g", "c", 0.7), t.Scored("h", "c", 0.95),
]  # fmt: skip


def test_what_to_label_next():
    labels = {"f": "low", "g": "low", "h": "high"}
    found = t.label_next(SCORED, labels, count=10)
    assert [(row.id, row.why) for row in found] == [
        ("f", "contradicted"), ("g", "contradicted"),
        ("a", "confident"), ("c", "confident"), ("d", "confident"), ("b", "confident"),
    ]  # fmt: skip
    assert found == t.label_next(SCORED[::-1], labels, count=10) and found[:3] == t.label_next(SCORED, labels, count=3)
    # Labels that the score goes on to contradict come back in turn, and leave half of the places to new files.
    found = t.label_next(SCORED, dict.fromkeys("fgab", "low"), count=3, times={"a": 2, "f": 3, "b": 2})
    assert [row.id for row in found] == ["g", "a", "h"]
    with pytest.raises(ValueError, match="count is 0"):
        t.label_next(SCORED, {}, count=0)


def test_commands(tmp_path, capsys):
    scored, labels, output, table = (
        tmp_path / name for name in ("scored.jsonl", "labels.jsonl", "next.jsonl", "scored.parquet")
    )
    scored.write_text("".join(json.dumps(row._asdict() | {"text": f"text {row.id}"}) + "\n" for row in SCORED))
    labels.write_text('{"id": "f", "label": "high"}\n{"id": "f", "label": "low"}\n')  # the later round holds
    given = ["--scored", str(scored), "--labels", str(labels)]
    assert t.main(["label", *given, "--count", "2", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["label"], row["text"]) for row in rows] == [("f", "low", "text f"), ("a", None, "text a")]
    assert t.main(["agreement", *given]) == 0
    assert "c: 1 labels, accuracy 0.000, kappa 0.000: the score does not count" in capsys.readouterr().out
    # What the classifier says goes before what an earlier round left in meta; a text without a word has no score.
    rows = [
        {"id": "a", "meta": '{"quality": 0.9}', "scores": {"code_quality": 0.1}}, {"id": "b", "meta": {"quality": 0.7}},
        {"id": "c", "scores": {"code_quality": None}},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([row | {"meta": json.dumps(row.get("meta"))} for row in rows[1:2]]), table)
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(row.id, row.quality) for row in t.read_scored(scored)] == [("a", 0.1), ("b", 0.7)]
    assert [(row.id, row.quality) for row in t.read_scored(table)] == [("b", 0.7)]
    labels.write_text('{"id": "f", "label": "good"}\n')
    assert (
        t.main(["agreement", *given]) == 1 and "labels.jsonl:1: id is 'f' and label 'good'" in capsys.readouterr().err
    )
