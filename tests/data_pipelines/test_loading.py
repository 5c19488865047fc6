"""Packed rows: every position once, no target across documents, and an order that is a function of seed and step.

Token i of document d has the id 1000 d + i, so that a row tells by itself where each of its tokens comes from.
D documents, T tokens of a row.
"""

import itertools
import threading
import time
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import packing
from data_pipelines.loading import Rows, batches, open_rows
from data_pipelines.packing import plan_rows
from data_pipelines.tokens import TokenDocument, open_tokens, write_tokens
from internjax.train.batch import Batch

TOKENIZER = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def token_folder(path, lengths, *, masks=None):
    documents = [
        TokenDocument(str(d), list(range(1000 * d, 1000 * d + length)), masks and masks[d])
        for d, length in enumerate(lengths)
    ]
    write_tokens(path, documents, tokenizer=TOKENIZER, shard_tokens=50)
    return path


def pieces_of(plan):
    """(row, document, start, length) of every piece."""
    rows = np.repeat(np.arange(plan.num_rows), np.diff(plan.first_R))
    return list(zip(rows.tolist(), plan.document_P.tolist(), plan.start_P.tolist(), plan.length_P.tolist()))


def seed_of_order(order, *, num_rows):
    """A seed whose first epoch takes the documents in this order and leaves the rows in theirs."""

    def drawn(seed, size):
        return list(np.random.default_rng(seed).permutation(size))

    wanted = (list(order), list(range(num_rows)))
    return next(s for s in range(1000) if (drawn((s, 0), len(order)), drawn((s, 0, 1), num_rows)) == wanted)


# --- plans -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_concat_fills_every_row_and_uses_no_position_twice(lengths, seq_len, seed, epoch):
    num_positions = sum(max(length - 1, 0) for length in lengths)
    if num_positions < seq_len:
        with pytest.raises(ValueError, match=f"no row of {seq_len} tokens results.*a shorter seq_len or more text"):
            plan_rows(np.array(lengths), seq_len=seq_len, packing="concat", seed=seed, epoch=epoch)
        return
    plan = plan_rows(np.array(lengths), seq_len=seq_len, packing="concat", seed=seed, epoch=epoch)
    filled, used = np.zeros(plan.num_rows, int), []
    for row, document, start, length in pieces_of(plan):
        filled[row] += length
        used += [(document, start + i) for i in range(length)]
        assert length > 0 and 0 <= start and start + length <= lengths[document] - 1
    assert (filled == seq_len).all()
    assert len(set(used)) == len(used) == num_positions // seq_len * seq_len
    assert plan.num_left_out == sum(length < 2 for length in lengths)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), seed=st.integers(0, 99))
def test_whole_uses_every_document_that_fits_once_and_cuts_none(lengths, seq_len, seed):
    fitting = {d: length - 1 for d, length in enumerate(lengths) if 2 <= length <= seq_len + 1}
    if not fitting:
        with pytest.raises(ValueError, match="a longer seq_len"):
            plan_rows(np.array(lengths), seq_len=seq_len, packing="whole", seed=seed, epoch=0)
        return
    plan = plan_rows(np.array(lengths), seq_len=seq_len, packing="whole", seed=seed, epoch=0)
    pieces = pieces_of(plan)
    assert sorted(document for _, document, _, _ in pieces) == sorted(fitting)
    assert all(start == 0 and length == fitting[document] for _, document, start, length in pieces)
    filled = np.bincount([row for row, *_ in pieces], weights=[length for *_, length in pieces])
    assert len(filled) == plan.num_rows and filled.min() > 0 and filled.max() <= seq_len
    assert plan.num_left_out == len(lengths) - len(fitting)


def test_whole_is_at_least_98_percent_full(monkeypatch):
    monkeypatch.setattr(packing, "_FIT_BLOCK", 1000)  # several blocks
    lengths = np.random.default_rng(0).lognormal(5.0, 0.8, 5000).astype(int)  # 150 tokens in the middle, a long tail
    plan = plan_rows(lengths, seq_len=2048, packing="whole", seed=0, epoch=0)
    assert plan.length_P.sum() / (plan.num_rows * 2048) >= 0.98


def test_whole_takes_the_largest_first_into_the_fullest_row():
    plan = plan_rows(np.array([4, 8, 3, 6]), seq_len=10, packing="whole", seed=0, epoch=0)
    rows = [sorted(plan.length_P[a:b].tolist()) for a, b in itertools.pairwise(plan.first_R)]
    assert sorted(rows) == [[2, 5], [3, 7]]  # 7; 5 needs a new row; 3 fills the first one exactly; 2 goes with 5


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_a_plan_depends_on_seed_and_epoch_alone(packing):
    lengths = np.random.default_rng(1).integers(2, 30, 200)

    def order(seed, epoch):
        return plan_rows(lengths, seq_len=32, packing=packing, seed=seed, epoch=epoch).document_P.tolist()

    assert order(3, 1) == order(3, 1)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_rows_of_a_long_document_are_not_neighbours():
    plan = plan_rows(np.array([4001]), seq_len=10, packing="concat", seed=0, epoch=0)
    assert sorted(plan.start_P.tolist()) == list(range(0, 4000, 10))
    followers = sum(b - a == 10 for a, b in itertools.pairwise(plan.start_P.tolist()))
    assert followers < 20, "in a random order about one row in 400 stands behind the one before it"


def test_unknown_packing_is_refused():
    with pytest.raises(ValueError, match="unknown packing 'best'; known: concat, whole"):
        plan_rows(np.array([9]), seq_len=4, packing="best", seed=0, epoch=0)


# --- rows ------------------------------------------------------------------------------------------------------------


def row_by_hand(rows, index, *, tokens, targets, loss_mask, positions, segments):
    wanted = dict(tokens=tokens, targets=targets, loss_mask=loss_mask, positions=positions, segments=segments)
    found = rows[index]
    assert {name: value.tolist() for name, value in found.items()} == wanted
    types_ = {name: str(value.dtype) for name, value in found.items()}
    assert types_ == dict.fromkeys(Batch._fields, "int32") | {"loss_mask": "float32"}


def test_concat_rows_by_hand(tmp_path):
    folder = token_folder(tmp_path / "a", [4, 6], masks=[[1, 0, 1, 1], [0, 1, 1, 0, 0, 1]])
    rows = open_rows(folder, seq_len=4, packing="concat", seed=seed_of_order([0, 1], num_rows=2))
    # Document 0 has three positions; the first of document 1 comes behind them, its other four are the next row.
    row_by_hand(
        rows, 0,
        tokens=[0, 1, 2, 1000], targets=[1, 2, 3, 1001], loss_mask=[0, 1, 1, 1], positions=[0, 1, 2, 0],
        segments=[1, 1, 1, 2],
    )  # fmt: skip
    row_by_hand(
        rows, 1,
        tokens=[1001, 1002, 1003, 1004], targets=[1002, 1003, 1004, 1005], loss_mask=[1, 0, 0, 1],
        positions=[0, 1, 2, 3], segments=[1, 1, 1, 1],
    )  # fmt: skip


def test_whole_rows_by_hand(tmp_path):
    folder = token_folder(tmp_path / "a", [3, 9, 4], masks=[[1, 1, 1], [1] * 9, [0, 0, 1, 1]])
    rows = open_rows(folder, seq_len=6, packing="whole", seed=0)
    assert rows.plan(0).num_left_out == 1  # the one of nine tokens
    row_by_hand(
        rows, 0,
        tokens=[2000, 2001, 2002, 0, 1, 0], targets=[2001, 2002, 2003, 1, 2, 0], loss_mask=[0, 1, 1, 1, 1, 0],
        positions=[0, 1, 2, 0, 1, 0], segments=[1, 1, 1, 2, 2, 0],
    )  # fmt: skip


def test_without_masks_every_target_is_learned_and_padding_is_not(tmp_path):
    rows = open_rows(token_folder(tmp_path / "a", [3, 3]), seq_len=6, packing="whole", seed=0)
    assert rows[0]["loss_mask"].tolist() == [1, 1, 1, 1, 0, 0]


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(2, 24), packing=st.sampled_from(["concat", "whole"]), data=st.data())
def test_targets_stay_in_their_document(lengths, seq_len, packing, data, tmp_path_factory):
    folder = open_tokens(token_folder(tmp_path_factory.mktemp("rows") / "a", lengths))
    rows = Rows(folder, seq_len=seq_len, packing=packing, seed=0)
    try:
        num_rows = rows.plan(0).num_rows
    except ValueError:
        return
    row = rows[data.draw(st.integers(0, 2 * num_rows))]
    real = row["segments"] > 0
    assert (row["targets"][real] == row["tokens"][real] + 1).all()  # the next token of the same document
    assert (row["tokens"][real] % 1000 < np.array(lengths)[row["tokens"][real] // 1000] - 1).all()
    assert all((row[name][~real] == 0).all() for name in Batch._fields)
    for segment in range(1, row["segments"].max() + 1):
        inside = row["segments"] == segment
        assert row["positions"][inside].tolist() == list(range(inside.sum()))
        assert len(set(row["tokens"][inside] // 1000)) == 1
    assert (np.diff(row["segments"][real]) >= 0).all()


# --- batches ---------------------------------------------------------------------------------------------------------


def taken(data, step, count):
    return [np.stack(batch) for batch in itertools.islice(data(step), count)]


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_batches_from_any_step_are_those_of_the_whole_run(packing, tmp_path):
    folder = token_folder(tmp_path / "a", np.random.default_rng(2).integers(2, 20, 30).tolist())

    def data(seed=5):
        return batches(open_rows(folder, seq_len=16, packing=packing, seed=seed), batch_size=3)

    rows_per_epoch = open_rows(folder, seq_len=16, packing=packing, seed=5).plan(0).num_rows
    whole = taken(data(), 0, 3 * rows_per_epoch)  # nine epochs
    assert all(batch.shape == (5, 3, 16) for batch in whole)
    for step in (1, 2, rows_per_epoch // 3, rows_per_epoch + 1, 3 * rows_per_epoch - 2):
        for came, began in zip(whole[step : step + 2], taken(data(), step, 2)):
            np.testing.assert_array_equal(came, began)
    assert not np.array_equal(whole[0], taken(data(seed=6), 0, 1)[0])


def test_epochs_hold_the_same_documents_in_another_order(tmp_path):
    folder = token_folder(tmp_path / "a", [17] * 12)  # a row each
    rows = open_rows(folder, seq_len=16, packing="whole", seed=0)
    documents = [int(rows[i]["tokens"][0]) // 1000 for i in range(36)]
    epochs = [documents[0:12], documents[12:24], documents[24:36]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_number_of_threads_does_not_matter(tmp_path):
    folder = token_folder(tmp_path / "a", [5, 4, 7, 3])

    def rows():
        return open_rows(folder, seq_len=4, packing="concat", seed=1)

    alone = taken(batches(rows(), batch_size=2, num_threads=1), 200, 20)
    together = taken(batches(rows(), batch_size=2, num_threads=16, prefetch=64), 200, 20)
    np.testing.assert_array_equal(alone, together)


def test_threads_that_ask_for_new_epochs_at_once_agree(tmp_path, monkeypatch):
    folder = open_tokens(token_folder(tmp_path / "a", [9, 9]))
    alone = Rows(folder, seq_len=8, packing="whole", seed=1)
    wanted = [alone[i]["tokens"].tolist() for i in range(40)]
    slow = packing.plan_rows

    def plan_slowly(*arguments, **how):
        time.sleep(0.002)  # every thread is inside at the same time
        return slow(*arguments, **how)

    monkeypatch.setattr(packing, "plan_rows", plan_slowly)
    shared, found = Rows(folder, seq_len=8, packing="whole", seed=1), {}

    def ask(index):
        found[index] = shared[index]["tokens"].tolist()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(40)] == wanted


def test_wrong_folder_tokenizer_and_batch_size_are_refused(tmp_path):
    folder = token_folder(tmp_path / "a", [9])
    with pytest.raises(ValueError, match=r"written by the tokenizer ffffffffffff, the one given is abc"):
        open_rows(folder, seq_len=4, packing="concat", seed=0, tokenizer_sha256="abc")
    rows = open_rows(folder, seq_len=4, packing="concat", seed=0, tokenizer_sha256="f" * 64)
    with pytest.raises(ValueError, match="batch_size must be at least 1, given 0"):
        batches(rows, batch_size=0)
