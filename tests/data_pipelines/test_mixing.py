"""Mixtures: shares kept at every block, rows found without walking, limits counted, repeats refused.

Token i of document d has the id 1000 d + i; the sources' documents are numbered apart. S sources, R rows of a block.
"""

import itertools
import re
import shutil
import types
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.document import make_document, to_batch
from data_pipelines.loading import batches, open_rows, row_batch
from data_pipelines.mixing import (
    BLOCK_ROWS,
    UNKNOWN,
    Source,
    block_of_rows,
    kinds,
    main,
    make_sources,
    open_mixture,
    rows_of_sources,
)
from data_pipelines.mixing import whole_weights as whole
from data_pipelines.tokens import TokenDocument, write_tokens

WEIGHTS = st.lists(st.integers(1, 10**6) | st.floats(1e-6, 1e3), min_size=1, max_size=5)


def token_folder(path, lengths, *, first=0, vocab_size=1 << 20, fingerprint="f" * 64):
    documents = [
        TokenDocument(f"{path.name}-{d}", list(range(1000 * d, 1000 * d + n))) for d, n in enumerate(lengths, first)
    ]
    tokenizer = types.SimpleNamespace(vocab_size=vocab_size, fingerprint=fingerprint)
    write_tokens(path, documents, tokenizer=tokenizer, shard_tokens=300)
    return str(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three sources of other sizes; documents 0.., 100.., 200.. tell them apart."""
    root, draw = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    return tuple(
        token_folder(root / name, draw.integers(2, most, count).tolist(), first=first)
        for name, most, count, first in (("web", 40, 60, 0), ("code", 90, 40, 100), ("books", 300, 9, 200))
    )


def mixture(folders, *, packing="concat", seq_len=16, seed=3, num_rows=None, **columns):
    return open_mixture(
        make_sources(folders, **columns), seq_len=seq_len, packing=packing, seed=seed, num_rows=num_rows
    )


def sources_of(rows, count):
    """Source of each of the first rows, read off their tokens."""
    return [int(rows[i]["tokens"][0]) // 100_000 for i in range(count)]


# --- which source each row comes from --------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS)
def test_counts_are_those_of_taking_the_earliest_due_row_each_time(weights):
    weights = whole(weights)
    counts = [0] * len(weights)
    for num_rows in range(30):
        assert rows_of_sources(weights, num_rows) == counts
        nearest = min(range(len(weights)), key=lambda s: (Fraction(2 * counts[s] + 1, weights[s]), s))
        counts[nearest] += 1


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, num_rows=st.integers(0, 10**14), more=st.integers(0, 5000))
def test_every_source_has_its_share_at_any_length(weights, num_rows, more):
    weights = whole(weights)
    counts, later = rows_of_sources(weights, num_rows), rows_of_sources(weights, num_rows + more)
    assert sum(counts) == num_rows and all(b >= a for a, b in zip(counts, later))
    for weight, count in zip(weights, counts):
        share = Fraction(weight, sum(weights))
        assert abs(count - share * num_rows) <= Fraction(1, 2) + share * len(weights) / 2


@settings(max_examples=30, deadline=None)
@given(weights=WEIGHTS, block=st.integers(0, 10**9), seed=st.integers(0, 99))
def test_a_block_goes_on_where_the_one_before_it_ended(weights, block, seed):
    weights = whole(weights)
    here, after = (block_of_rows(weights, seed=seed, block=b) for b in (block, block + 1))
    for s, (first, follows) in enumerate(
        zip(rows_of_sources(weights, block * BLOCK_ROWS), rows_of_sources(weights, (block + 1) * BLOCK_ROWS))
    ):
        assert here.index_R[here.source_R == s].tolist() == list(range(first, follows))
        assert after.index_R[after.source_R == s][:1].tolist() in ([follows], [])


def test_blocks_are_shuffled_by_seed_and_number():
    def labels(seed, block):
        return tuple(block_of_rows((1, 1), seed=seed, block=block).source_R.tolist())

    assert labels(0, 5) == labels(0, 5)
    assert len({labels(seed, block) for seed in range(3) for block in range(3)}) == 9
    changes = sum(a != b for a, b in itertools.pairwise(labels(0, 0)))
    assert 400 < changes < 620, "neither runs nor strict alternation"


def test_weights_need_no_sum_and_must_be_above_zero(folders):
    assert whole((0.5, 0.25)) == (2, 1)
    a, b = mixture(folders, weights=(0.6, 0.3, 0.3)), mixture(folders, weights=(1.2, 0.6, 0.6))
    assert sources_of(a, 300) == sources_of(b, 300)
    for wrong in ((1.0, 0.0, 1.0), (1.0, -2.0, 1.0), (1.0, float("nan"), 1.0), (1.0, float("inf"), 1.0)):
        with pytest.raises(ValueError, match="weights must be numbers above 0.*leave a source out instead"):
            mixture(folders, weights=wrong)
    with pytest.raises(ValueError, match="some sources have a weight and some have none"):
        open_mixture([Source(folders[0], 1.0), Source(folders[1])], seq_len=16, packing="concat", seed=0)
    with pytest.raises(ValueError, match="3 folders and 2 values of weight; give one for each, or none"):
        mixture(folders, weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="no token folder given"):
        mixture(())


# --- rows of a mixture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_one_source_is_that_folder_byte_for_byte(packing, folders):
    alone = open_rows(folders[1], seq_len=90, packing=packing, seed=3)
    mixed = mixture(folders[1:2], packing=packing, seq_len=90)
    weighted = mixture(folders[1:2], packing=packing, seq_len=90, weights=(0.3,))
    numbers = [*range(40), 1023, 1024, 5000]
    for rows in (mixed, weighted):
        for found, wanted in zip(row_batch(rows, numbers), row_batch(alone, numbers)):
            assert found.tobytes() == wanted.tobytes() and found.dtype == wanted.dtype


def test_rows_of_a_source_follow_each_other_and_shares_hold(folders):
    rows = mixture(folders, weights=(5, 3, 2))
    alone = [open_rows(folders[0], seq_len=16, packing="concat", seed=3)[i]["tokens"] for i in range(40)]
    found = [rows[i]["tokens"] for i in range(2 * BLOCK_ROWS)]
    kinds = np.array([tokens[0] // 100_000 for tokens in found])
    mine = [tokens for tokens, kind in zip(found, kinds) if kind == 0]
    np.testing.assert_array_equal(mine[:40], alone)  # the first source has the order that it has alone
    for part in (kinds[:BLOCK_ROWS], kinds[BLOCK_ROWS:]):
        assert np.abs(np.bincount(part) - BLOCK_ROWS * np.array([0.5, 0.3, 0.2])).max() <= 1.5


def test_sources_with_equally_many_documents_have_their_own_orders(tmp_path):
    folders = [token_folder(tmp_path / name, [17] * 30, first=first) for name, first in (("a", 0), ("b", 100))]
    rows = mixture(folders, weights=(1, 1), packing="whole")
    documents = [int(rows[i]["tokens"][0]) // 1000 for i in range(60)]
    a, b = ([d % 100 for d in documents if d // 100 == s] for s in range(2))
    size = min(len(a), len(b), 30)
    assert a[:size] != b[:size] and len(set(a[:30])) == len(a[:30])


def test_without_weights_all_sources_end_their_epoch_together(folders):
    rows = mixture(folders)
    shares = rows.shares(rows.num_rows)
    assert [share.num_epochs for share in shares] == pytest.approx([1, 1, 1], abs=0.05)
    positions = [int(source.folder.lengths_D.sum()) - len(source.folder.lengths_D) for source in rows.sources]
    assert [share.num_positions for share in shares] == positions
    long = mixture(folders).shares(100 * BLOCK_ROWS)
    assert [share.share for share in long] == pytest.approx([n / sum(positions) for n in positions], abs=2e-5)


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_a_batch_far_into_the_run_is_read_at_once(packing, folders):
    """Row 10^6 is in some epoch 10,000 of a tiny source: only `whole` has to plan the epochs between."""
    step = 10**6 if packing == "concat" else 200
    rows = mixture(folders, packing=packing, seq_len=300)
    batch = next(batches(rows, batch_size=3)(step))
    for b in range(3):
        row = rows[3 * step + b]
        assert all((np.asarray(field[b]) == row[name]).all() for name, field in batch._asdict().items())
    if packing == "concat":
        assert all(len(source._first_row) == 1 for source in rows.sources), "no epoch was walked through"


# --- limits on documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_limits_choose_documents_and_are_counted(packing, folders):
    lengths = open_rows(folders[1], seq_len=90, packing=packing, seed=3).folder.lengths_D
    least, most = (int(n) for n in np.sort(lengths)[[9, 29]])  # each the length of some document: limits include
    rows = mixture(folders[1:2], packing=packing, seq_len=90, min_tokens=(least,), max_tokens=(most,))
    kept = np.flatnonzero((lengths >= least) & (lengths <= most))
    assert {least, most} <= set(lengths[kept].tolist())
    used = {int(i) // 1000 - 100 for n in range(rows.num_rows) for i in rows[n]["tokens"][rows[n]["segments"] > 0]}
    assert used <= set(kept.tolist()) and len(used) >= len(kept) - 2  # concat may end before the last ones
    (share,) = rows.shares(rows.num_rows)
    assert (share.num_documents, share.num_filtered, share.num_left_out) == (40, 40 - len(kept), 0)
    assert share.num_positions == int((lengths[kept] - 1).sum())
    assert f"{len(kept)} of 40 documents ({40 - len(kept)} outside the limits, 0 fit no row)" in str(share)
    assert mixture(folders[1:2], max_tokens=(most,)).shares(1)[0].num_filtered == (lengths > most).sum()


def test_half_of_the_rows_from_long_documents_of_the_same_folder(folders):
    """What a long-context phase does: the same corpus twice, cut by length, half of the rows each."""
    rows = mixture((folders[1],) * 2, weights=(1, 1), max_tokens=(45, 0), min_tokens=(0, 46))
    lengths = rows.sources[0].folder.lengths_D
    for i in range(BLOCK_ROWS, BLOCK_ROWS + 40):
        sizes = lengths[rows[i]["tokens"] // 1000 - 100]
        assert (sizes <= 45).all() or (sizes >= 46).all()
    assert [share.num_rows for share in rows.shares(2 * BLOCK_ROWS)] == [BLOCK_ROWS, BLOCK_ROWS]


def test_the_same_documents_twice_are_refused(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "copy")
    for other in (folders[0], str(tmp_path / "copy")):
        with pytest.raises(ValueError, match="hold the same documents.*larger weight, or limits.*do not overlap"):
            mixture((folders[0], other))
    with pytest.raises(ValueError, match="hold the same documents"):
        mixture((folders[0], folders[0]), max_tokens=(20, 0), min_tokens=(0, 20))
    mixture((folders[0], folders[0]), max_tokens=(20, 0), min_tokens=(0, 21))


def test_limits_that_leave_nothing_are_refused_with_what_is_there(folders):
    with pytest.raises(
        ValueError, match=r"none of the 40 documents of .*code has between 500 and any number of tokens"
    ):
        mixture(folders[1:2], min_tokens=(500,))
    with pytest.raises(ValueError, match=r"between 30 and 29 tokens: they have \d+ to \d+, half of them at least \d+"):
        mixture(folders[1:2], min_tokens=(30,), max_tokens=(29,))
    with pytest.raises(ValueError, match="0 .no limit. or more, given -1, 0 and 0.0 for .*code"):
        mixture(folders[1:2], min_tokens=(-1,))
    with pytest.raises(ValueError, match=r"web: no row of 8192 tokens results from 60 documents"):
        mixture(folders[:2], seq_len=8192)


# --- repeats ---------------------------------------------------------------------------------------------------------


def test_a_run_that_repeats_more_than_allowed_is_refused_with_the_numbers(folders):
    num_rows = open_rows(folders[2], seq_len=16, packing="concat", seed=3).num_rows
    asked = 40 * num_rows
    with pytest.raises(ValueError) as caught:
        mixture(folders, weights=(8, 1, 1), max_epochs=(0, 0, 2), num_rows=asked)
    share = mixture(folders, weights=(8, 1, 1)).shares(asked)[2]
    said = str(caught.value)
    assert f"books has {num_rows * 16:,} tokens in rows ({num_rows:,} rows of 16), 2 epochs" in said
    assert f"of them {2 * num_rows * 16:,}, and the run asks for {share.num_rows * 16:,}" in said
    assert f"({share.num_epochs:.2f} epochs)" in said and "raise max_epochs" in said and "web" not in said
    mixture(folders, weights=(8, 1, 1), max_epochs=(0, 0, 4.5), num_rows=asked)
    with pytest.raises(ValueError, match="has max_epochs 2, .* give num_rows"):
        mixture(folders, max_epochs=(0, 0, 2))


@pytest.mark.parametrize("packing", ["concat", "whole"])
def test_exactly_the_epochs_allowed_are_read_and_no_row_more(packing, folders):
    num_rows = open_rows(folders[0], seq_len=40, packing=packing, seed=3).num_rows
    with pytest.raises(ValueError, match=r"and the run asks for"):
        mixture(folders[:1], packing=packing, seq_len=40, max_epochs=(2,), num_rows=2 * num_rows + 1)
    rows = mixture(folders[:1], packing=packing, seq_len=40, max_epochs=(2,), num_rows=2 * num_rows)
    stream = batches(rows, batch_size=num_rows)(0)
    assert len(next(stream).tokens) == len(next(stream).tokens) == num_rows
    with pytest.raises(ValueError, match=f"may be read for 2 epochs, {2 * num_rows} rows, and row {2 * num_rows} is"):
        next(stream)


# --- documents that a folder reads more than once --------------------------------------------------------------------


@pytest.fixture
def with_times(tmp_path):
    """Documents of which an epoch reads some more than once, and how often."""
    draw = np.random.default_rng(5)
    lengths, times = draw.integers(1, 40, 300), draw.integers(1, 4, 300)
    documents = [
        TokenDocument(f"code-{d}", list(range(1000 * d, 1000 * d + n)), times=int(times[d]))
        for d, n in enumerate(lengths.tolist())
    ]
    tokenizer = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
    write_tokens(tmp_path / "code", documents, tokenizer=tokenizer, shard_tokens=700)
    return str(tmp_path / "code"), lengths, times


@pytest.mark.parametrize(("packing", "limits"), [("concat", {}), ("whole", {}), ("whole", {"min_tokens": (20,)})])
def test_an_epoch_reads_every_document_as_often_as_it_says(with_times, packing, limits):
    folder, lengths, times = with_times
    rows = mixture([folder], packing=packing, seq_len=30, **limits)
    fit = (lengths > 1) & (lengths >= limits.get("min_tokens", (0,))[0]) & ((lengths <= 31) | (packing == "concat"))
    wanted = Counter({(d, at): times[d] for d in np.flatnonzero(fit).tolist() for at in range(lengths[d] - 1)})
    orders = []
    for epoch in (0, 1):
        read, order = Counter(), []
        for number in range(epoch * rows.num_rows, (epoch + 1) * rows.num_rows):
            for _, document, start, length in rows.pieces(number):
                read.update((document, at) for at in range(start, start + length))
                order.append(document)
        assert read <= wanted and wanted.total() - read.total() < (30 if packing == "concat" else 1)  # a last row
        orders.append(order)
    assert orders[0] != orders[1]
    (share,) = rows.shares(rows.num_rows)
    assert share.num_positions == wanted.total() and share.num_epochs == 1
    assert share.num_repeated == (times[fit] > 1).sum()
    assert share.num_documents - share.num_filtered - share.num_left_out == fit.sum()
    assert f"; {share.num_repeated} are read more than once in an epoch" in str(share)


def test_a_kept_plan_knows_how_often_documents_are_read(with_times, monkeypatch):
    monkeypatch.setattr("data_pipelines.loading._KEEP_PLANS_FROM", 10)
    folder, lengths, times = with_times
    first = mixture([folder], seq_len=30).num_rows
    documents = pq.read_table(f"{folder}/documents.parquet")
    tokenizer = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
    again = [TokenDocument(f"code-{d}", list(range(1000 * d, 1000 * d + n))) for d, n in enumerate(lengths.tolist())]
    shutil.copytree(f"{folder}/plans", f"{folder}.plans")
    write_tokens(folder, again, tokenizer=tokenizer, shard_tokens=700)
    shutil.copytree(f"{folder}.plans", f"{folder}/plans")
    assert "times" in documents.column_names and mixture([folder], seq_len=30).num_rows < first


def test_statistics_of_kinds_count_what_is_read_again(with_times, folders, tmp_path):
    folder, lengths, times = with_times
    documents = [
        make_document("text", source="s", path=str(d), language="high" if times[d] == 3 else "other")._replace(
            id=f"code-{d}"
        )
        for d in range(len(lengths))
    ]
    (tmp_path / "run" / "documents").mkdir(parents=True)
    pq.write_table(pa.Table.from_batches([to_batch(documents)]), tmp_path / "run" / "documents" / "0.parquet")
    rows = mixture([folder, folders[0]], seq_len=16, weights=(1, 1))
    share = rows.shares(4096)[0]
    found = {each.kind[0]: each for each in kinds(rows, [tmp_path / "run"], by=["language"], num_rows=4096)}
    mine = (times == 3) & (lengths > 1)
    assert found["high"].num_documents == mine.sum() and found["high"].num_tokens == lengths[mine].sum()
    assert found["high"].num_epochs == pytest.approx(3 * share.num_epochs)
    rest = (times < 3) & (lengths > 1)
    average = (lengths * times)[rest].sum() / lengths[rest].sum()
    assert found["other"].num_epochs == pytest.approx(average * share.num_epochs)
    assert sum(each.share for each in found.values()) == pytest.approx(1)


# --- what does not belong together -----------------------------------------------------------------------------------


def test_sources_of_other_tokenizers_are_refused(folders, tmp_path):
    other = token_folder(tmp_path / "other", [9] * 9, fingerprint="e" * 64)
    with pytest.raises(ValueError, match=r"other \(tokenizer eeeeeeeeeeee, .*ffffffffffff.* by different tokenizers"):
        mixture((folders[0], other))
    small = token_folder(tmp_path / "small", [9] * 9, vocab_size=60_000)
    with pytest.raises(ValueError, match=r"small .*60000 ids, uint16.*1048576 ids, uint32.*different tokenizers"):
        mixture((folders[0], small))
    with pytest.raises(ValueError, match="the one given is abc"):
        open_mixture(make_sources(folders), seq_len=16, packing="concat", seed=0, tokenizer_sha256="abc")


def test_a_lost_shard_of_one_source_is_named(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "code")
    (tmp_path / "code" / "00001.bin").unlink()
    with pytest.raises(ValueError, match=r"code lacks 00001.bin, which its manifest lists; restore it"):
        mixture((folders[0], str(tmp_path / "code")))


def test_the_example_of_the_readme_runs(capsys):
    text = (Path(__file__).parents[2] / "data_pipelines" / "README.md").read_text("utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "open_mixture" in code]
    exec(compile(code, "data_pipelines/README.md", "exec"), {})
    short, long, shape = capsys.readouterr().out.splitlines()
    assert "50.00% of the rows" in short and "50.00% of the rows" in long and shape.startswith("(4, 64) [")


# --- statistics ------------------------------------------------------------------------------------------------------


def test_what_each_kind_of_document_gives_to_a_run(folders, tmp_path, capsys):
    """Documents of the run: those of the folder `web`, by turns of two languages, and one that is in no folder."""
    lengths = open_rows(folders[0], seq_len=16, packing="concat", seed=3).folder.lengths_D.tolist()
    rows = [
        make_document("x" * n, source="s", path="p", language="ab"[n % 2])._replace(id=f"web-{n}")
        for n in range(len(lengths) + 1)
    ]
    (tmp_path / "run" / "documents").mkdir(parents=True)
    for name in ("00000", "00001"):  # one document twice, as in two runs
        part = rows[:40] if name == "00000" else rows[39:]
        pq.write_table(pa.Table.from_batches([to_batch(part)]), tmp_path / "run" / "documents" / f"{name}.parquet")
    rows_of = mixture(folders[:2], weights=(1, 3))
    found = kinds(rows_of, [tmp_path / "run"], by=["language"], num_rows=4096)
    web, code = rows_of.shares(4096)
    for each, number in zip(sorted(found[:2], key=lambda each: each.kind), (0, 1)):
        mine = range(number, len(lengths), 2)
        assert each[1:5] == (("ab"[number],), len(mine), sum(mine), sum(lengths[n] for n in mine))
        assert each.folder == web.folder and each.num_epochs == web.num_epochs
    (other,) = found[2:]
    assert other.kind == (UNKNOWN,) and other.num_documents == 40 and other.num_bytes == 0
    assert sum(each.share for each in found) == pytest.approx(1)
    read = [sum(each.num_tokens * each.num_epochs for each in found if each.folder == f.folder) for f in (web, code)]
    assert [sum(each.share for each in found[:2]), other.share] == pytest.approx([n / sum(read) for n in read])
    # Whole documents and limits: what is read is counted, and no more.
    few = mixture(folders[:2], packing="whole", weights=(1, 3), min_tokens=(0, 5))
    found = kinds(few, [tmp_path / "run"], by=["language"], num_rows=4096)
    for rows, share in zip(few.sources, few.shares(4096), strict=True):
        mine = [each for each in found if each.folder == share.folder]
        num_read = share.num_documents - share.num_filtered - share.num_left_out
        assert sum(each.num_documents for each in mine) == num_read < share.num_documents
        assert sum(each.num_tokens for each in mine) == share.num_positions + num_read
        assert (rows.folder.lengths_D[rows.read_D()] <= 17).all()
    arguments = ["--tokens", *folders[:2], "--seq-len", "16", "--num-tokens", "65536", "--weights", "1", "3"]
    assert main([*arguments, "--documents", str(tmp_path / "run"), "--by", "language"]) == 0
    said = capsys.readouterr().out
    assert "25.00% of the rows" in said and f"web: b: {len(lengths) // 2} documents, " in said and said.count("\n") == 5
    assert main([*arguments, "--documents", str(tmp_path / "none")]) == 1 and "error: " in capsys.readouterr().err
