"""Profiles and samples: the same for any cut and order, and what they say of other thresholds holds."""

import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines import measures
from data_pipelines.document import Check, Outcome, make_document, to_batch
from data_pipelines.measures import Bound, Sample, add_profile, add_sample, bounded, count_in, curves, measure, settled


def documents(number):
    rng = random.Random(number)
    return [
        make_document(
            "x" * rng.randrange(40), source=rng.choice("ab"), path=f"f:{n}", licence=rng.choice([None, "MIT"])
        )
        for n in range(number)
    ]  # fmt: skip


def outcome_of(batch):
    """A bound of all texts, one of middling and one of long ones; every tenth row goes without one."""
    lengths = np.array([len(text) for text in batch.column("text").to_pylist()], float)
    checks = [
        Check("long", lengths, "above", 30),
        Check("odd", np.where((lengths < 5) | (lengths > 20), np.nan, lengths % 7), "below", 2, "middling"),
        Check("odd", np.where(lengths > 20, lengths % 7, np.nan), "below", 1, "others"),
        Check("off", lengths, "above", np.inf),
    ]
    fails = np.stack([check.fails() for check in checks]).any(axis=0)
    other = [name.endswith("0") for name in batch.column("id").to_pylist()]
    return Outcome(batch, ["x" if a or b else None for a, b in zip(fails, other)], [None] * batch.num_rows, checks)


def sampled(groups):
    """The sample of documents that come in groups of batches, a part for each group."""
    whole = Sample()
    for group in groups:
        part = Sample()
        for batch in group:
            measure(part, "s", batch, outcome_of(batch))
        add_sample(whole, Sample(part.bounds, part.num_documents, part.num_bytes, [settled(part)]), "s")
    return whole


def said(rows):
    """All values as text: NaN is equal to itself."""
    return repr(rows.to_pylist())


def test_the_sample_is_that_of_the_least_ids_however_it_was_cut(monkeypatch):
    monkeypatch.setattr(measures, "SAMPLE", 20)
    rows = documents(300)
    whole = sampled([[to_batch(rows)]])
    middling, others = Bound("odd", "below", 2, "middling"), Bound("odd", "below", 1, "others")
    assert whole.bounds == [Bound("long", "above", 30), middling, others]
    assert (whole.num_documents, whole.num_bytes) == (300, sum(len(row.text) for row in rows))
    found = settled(whole)
    assert found.column("id").to_pylist() == sorted(row.id for row in rows)[:20]
    by_id = {row.id: row for row in rows}
    for row in found.to_pylist():
        length = len(by_id[row["id"]].text)
        assert row["num_bytes"] == row["values"][0] == length
        assert np.isnan(row["values"]).tolist() == [False, not 5 <= length <= 20, length <= 20]
        fails = (
            [0] * (length > 30) + [1] * (5 <= length <= 20 and length % 7 < 2) + [2] * (length > 20 and length % 7 < 1)
        )
        assert row["failed"] == (fails or ([-1] if row["id"].endswith("0") else []))
    random.Random(1).shuffle(rows)
    pieces = [rows[start : start + 7] for start in range(0, 300, 7)]
    other = sampled([[to_batch(piece) for piece in pieces[:20]], [to_batch([])], [to_batch(p) for p in pieces[20:]]])
    assert said(settled(other)) == said(found) and other.bounds == whole.bounds
    twice = settled(sampled([[to_batch(rows + rows[:150])]]))
    assert said(twice) == said(found), "a document that comes twice is there once"


def test_curves_say_what_a_run_with_another_threshold_keeps():
    batch = to_batch(documents(200))
    sample = Sample()
    measure(sample, "s", batch, outcome_of(batch))
    lengths = np.array([len(text) for text in batch.column("text").to_pylist()], float)
    long, middling, _ = curves(sample.bounds, settled(sample))
    others = np.array([name.endswith("0") for name in batch.column("id").to_pylist()])
    long_fails, middling_fails, others_fail, _ = (check.fails() for check in outcome_of(batch).checks)
    odd_fails = middling_fails | others_fail
    unexplained = others & ~odd_fails & ~long_fails
    assert [point[0] for point in long.points] == sorted({*lengths[~odd_fails & ~unexplained], 30})
    for threshold, share, volume in long.points:
        stays = ~odd_fails & ~unexplained & (lengths <= threshold)
        assert share == pytest.approx(stays.mean()) and volume == pytest.approx(lengths[stays].sum() / lengths.sum())
    assert long.points[long.now][0] == 30
    assert middling.points[middling.now][0] == 2
    for threshold, share, _ in middling.points:
        touched = (lengths >= 5) & (lengths <= 20) & (lengths % 7 < threshold)
        assert share == pytest.approx((~long_fails & ~others_fail & ~unexplained & ~touched).mean())


def test_stages_that_measure_other_things_of_other_batches_are_found_out():
    batch = to_batch(documents(3))
    sample = Sample()
    measure(sample, "s", batch, outcome_of(batch))
    one = Outcome(batch, [None] * 3, [None] * 3, [Check("other", np.zeros(3), "above", 1)])
    checks = r"\[long .*, odd \(middling\) .*, odd \(others\) .*\] of some batches and \[other above 1\]"
    with pytest.raises(RuntimeError, match=checks + r" of others\. Return .* one number"):
        measure(sample, "s", batch, one)
    sample, other_bound = Sample(), one._replace(checks=[one.checks[0]._replace(bound=2)])
    measure(sample, "s", batch, one)
    with pytest.raises(RuntimeError, match=r"\[other above 1\] of some batches and \[other above 2\] of others"):
        measure(sample, "s", batch, other_bound)
    bound_per_row = one._replace(checks=[one.checks[0]._replace(bound=np.ones(3))])
    with pytest.raises(RuntimeError, match=r"gave 'other' a bound of shape \(3,\)\. Return .* one number"):
        measure(Sample(), "s", batch, bound_per_row)


def test_a_profile_counts_documents_and_bytes(monkeypatch):
    rows = documents(100)
    profile, part = {}, {}
    count_in(profile, to_batch(rows[:30]))
    count_in(part, to_batch(rows[30:]).slice(0, 70))
    add_profile(profile, part)
    found = bounded(profile)
    assert list(found) == ["bytes", "source", "domain", "language", "licence"]
    for name, value_of in (
        ("source", lambda row: row.source),
        ("licence", lambda row: row.licence or measures.UNKNOWN),
        ("bytes", lambda row: str(1 << (len(row.text).bit_length() - 1) if row.text else 0)),
    ):
        documents_of = Counter(map(value_of, rows))
        assert {value: entry[0] for value, entry in found[name].items()} == documents_of
        assert sum(entry[1] for entry in found[name].values()) == sum(len(row.text) for row in rows)
    assert list(map(int, found["bytes"])) == sorted(map(int, found["bytes"]))
    monkeypatch.setattr(measures, "MOST_VALUES", 1)
    few = bounded(profile)["source"]
    most = Counter(row.source for row in rows).most_common(1)[0]
    assert [(name, entry[0]) for name, entry in few.items()] == [most, (measures.OTHERS, 100 - most[1])]


def test_what_stages_left_in_meta_is_counted():
    metas = [{"tier": "high"}, {"tier": "high", "personal_data_masked": {"email": 3}}, {"tier": 4}, {"note": "tier"}]
    rows = [make_document("four", source="s", path=f"p{n}", meta=meta) for n, meta in enumerate(metas)]
    profile = {}
    batches = [to_batch(rows)]
    assert list(measures.counted(batches, profile)) == batches
    assert profile["tier"] == {"high": [2, 8]} and profile["personal_data_masked"] == {"email": [1, 4]}
    assert profile["source"] == {"s": [4, 16]} and isinstance(batches[0], pa.RecordBatch)
