"""The order of the data is a function of seed and step: other processes, threads and beginnings read the same.

With packing, mixing and limits on, each process reads its own rows of every batch; put together they are the batches
that one process reads. Token i of document d has the id 1000 d + i.
"""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import loading
from data_pipelines.loading import batches, open_rows, row_batch
from data_pipelines.mixing import make_sources, open_mixture
from data_pipelines.tokens import TokenDocument, open_tokens, write_tokens
from internjax.train.batch import Batch

ROOT = Path(__file__).parents[2]
BATCH_SIZE, SEQ_LEN = 8, 48
PACKINGS = ("concat", "whole")

# Arguments: folders, step to begin at, number of batches, rows, threads, prefetch, file to write.
READER = textwrap.dedent(f"""
    import itertools, sys
    import numpy as np
    from data_pipelines.loading import batches
    from data_pipelines.mixing import make_sources, open_mixture

    web, code, step, count, only_rows, threads, prefetch, output = sys.argv[1:]
    sources = make_sources((web, code, code), weights=(3, 1, 1), min_tokens=(3, 0, 31), max_tokens=(0, 30, 0))
    found = {{}}
    for packing in ("concat", "whole"):
        data = batches(
            open_mixture(sources, seq_len={SEQ_LEN}, packing=packing, seed=7),
            batch_size={BATCH_SIZE},
            only_rows=tuple(map(int, only_rows.split(","))),
            num_threads=int(threads),
            prefetch=int(prefetch),
        )
        found[packing] = np.stack([np.stack(batch) for batch in itertools.islice(data(int(step)), int(count))])
    np.savez(output, **found)
""")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("order"), np.random.default_rng(1)
    tokenizer = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
    for name, first in (("web", 0), ("code", 500)):
        lengths = draw.integers(0, 70, 120).tolist()
        rows = [
            TokenDocument(f"{name}/{d}", list(range(1000 * d, 1000 * d + n)), [i % 4 > 0 for i in range(n)])
            for d, n in enumerate(lengths, first)
        ]
        write_tokens(root / name, rows, tokenizer=tokenizer, shard_tokens=700)
    return str(root / "web"), str(root / "code")


def opened(folders, packing="concat", seed=7):
    web, code = folders
    sources = make_sources((web, code, code), weights=(3, 1, 1), min_tokens=(3, 0, 31), max_tokens=(0, 30, 0))
    return open_mixture(sources, seq_len=SEQ_LEN, packing=packing, seed=seed)


def read(data, step, count):
    return np.stack([np.stack(batch) for batch in itertools.islice(data(step), count)])


@pytest.mark.slow
def test_1_2_and_4_processes_read_the_same_batches_from_anywhere(folders, tmp_path):
    """Two processes divide the rows of 60 batches in halves; four others go on at step 37 and divide them crosswise."""
    alone = {packing: read(batches(opened(folders, packing), batch_size=BATCH_SIZE), 0, 60) for packing in PACKINGS}
    jobs = [
        # rows of the process, first step, batches, threads, prefetch
        (range(0, 4), 0, 60, 1, 1),
        (range(4, 8), 0, 60, 4, 16),
        ((0, 4), 37, 23, 1, 30),
        ((1, 5), 37, 23, 2, 1),
        ((2, 6), 37, 23, 8, 3),
        ((3, 7), 37, 23, 3, 8),
    ]
    for two in (jobs[:2], jobs[2:4], jobs[4:]):
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    READER,
                    *folders,
                    str(step),
                    str(count),
                    ",".join(map(str, own)),
                    str(threads),
                    str(prefetch),
                    str(tmp_path / f"{own[0]} {own[-1]}.npz"),
                ],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            for own, step, count, threads, prefetch in two
        ]
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    for own, step, count, *_ in jobs:
        found = np.load(tmp_path / f"{own[0]} {own[-1]}.npz")
        for packing, whole in alone.items():
            wanted = whole[step : step + count][:, :, list(own)]
            assert wanted.shape == (count, 5, len(own), SEQ_LEN)
            np.testing.assert_array_equal(found[packing], wanted, err_msg=f"{packing}, rows {own}")


def test_the_seed_gives_another_order(folders):
    assert not np.array_equal(*(row_batch(opened(folders, seed=seed), range(8)).tokens for seed in (7, 8)))


def test_a_process_reads_its_rows_alone(folders, monkeypatch):
    rows, filled = opened(folders), []
    fill = rows.fill
    monkeypatch.setattr(rows, "fill", lambda index, batch, b: (filled.append(index), fill(index, batch, b)))
    batch = next(batches(rows, batch_size=8, only_rows=(1, 6), num_threads=1, prefetch=1)(5))
    assert batch.tokens.shape == (2, SEQ_LEN)
    assert {index % 8 for index in filled} == {1, 6} and {41, 46} <= set(filled)


@pytest.mark.parametrize("only_rows", [(), (0, 8), (-1, 0), (1, 0), (2, 2)])
def test_rows_that_a_batch_has_not_are_refused(only_rows, folders):
    with pytest.raises(ValueError, match="rows of a batch of 8 in ascending order, from 0 to 7, given"):
        batches(opened(folders), batch_size=8, only_rows=only_rows)


# --- what a batch is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_name_every_token_of_a_batch(packing, folders):
    rows = opened(folders, packing)
    batch = row_batch(rows, range(5 * BATCH_SIZE, 6 * BATCH_SIZE))
    spelled = [[[], []] for _ in range(BATCH_SIZE)]
    for line in rows.documents(5, BATCH_SIZE):
        folder, name, span, row = (
            line.replace(" document ", "\t").replace(" tokens ", "\t").replace(" (", "\t").split("\t")
        )
        assert folder in folders and name.split("/")[0] == Path(folder).name
        first, last = map(int, span.split(".."))
        ids = range(1000 * int(name.split("/")[1]) + first, 1000 * int(name.split("/")[1]) + last + 1)
        for found, part in zip(spelled[int(row.removeprefix("row ").removesuffix(")"))], (ids[:-1], ids[1:])):
            found.extend(part)
    for b, (tokens, targets) in enumerate(spelled):
        real = batch.segments[b] > 0
        assert tokens == batch.tokens[b][real].tolist() and targets == batch.targets[b][real].tolist()


def test_documents_are_found_in_any_part_of_the_table(folders, tmp_path):
    import pyarrow.parquet as pq

    shutil.copytree(folders[0], tmp_path / "web")
    rows = open_rows(tmp_path / "web", seq_len=SEQ_LEN, packing="concat", seed=0)
    whole = rows.documents(0, 20)
    table = tmp_path / "web" / "documents.parquet"
    pq.write_table(pq.read_table(table), table, row_group_size=7)
    assert rows.documents(0, 20) == whole and len({line.split()[2] for line in whole}) > 20


# --- files that are lost or changed ----------------------------------------------------------------------------------


def copied(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "web")
    return tmp_path / "web"


def drain(rows):
    for batch in itertools.islice(batches(rows, batch_size=4, num_threads=1, prefetch=1)(0), 200):
        assert isinstance(batch, Batch)


def test_a_shard_that_is_lost_while_the_run_reads_is_named(folders, tmp_path):
    folder = copied(folders, tmp_path)
    rows = open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    (folder / "00001.bin").rename(folder / "gone")
    with pytest.raises(
        OSError, match=r"00001.bin was there when the run began and cannot be read any more .*last checkpoint$"
    ):
        drain(rows)
    (folder / "gone").rename(folder / "00001.bin")
    drain(rows)


@pytest.mark.parametrize("name", ["00001.bin", "00002.mask"])
def test_a_shard_that_is_cut_while_the_run_reads_is_named(name, folders, tmp_path):
    folder = copied(folders, tmp_path)
    rows = open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    drain(rows)
    os.truncate(folder / name, 40)
    with pytest.raises(OSError, match=rf"{name} was cut while the run read it.*goes on from the last checkpoint"):
        drain(rows)


@pytest.mark.parametrize("shard_tokens", [700, 10_000], ids=["as many shards", "fewer shards"])
def test_a_folder_written_anew_is_not_read_with_the_old_offsets(shard_tokens, folders, tmp_path):
    folder = copied(folders, tmp_path)
    rows = open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    tokenizer = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
    new = [TokenDocument(str(d), list(range(35)), [1] * 35) for d in range(250)]
    write_tokens(folder, new, tokenizer=tokenizer, shard_tokens=shard_tokens)
    with pytest.raises(OSError, match=r"web was written anew while the run read it.*folder of its own"):
        drain(rows)


def flip(path, at, mask):
    raw = bytearray(path.read_bytes())
    raw[at] ^= mask
    path.write_bytes(raw)


def test_a_small_folder_is_read_through_and_a_large_one_is_watched(folders, tmp_path, monkeypatch):
    folder = copied(folders, tmp_path)
    flip(folder / "00000.bin", 3, 0x80)  # the highest byte of the first id
    with pytest.raises(ValueError, match="00000.bin was altered after it was written"):
        open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    monkeypatch.setattr(loading, "_READ_THROUGH", 0)
    rows = open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    with pytest.raises(
        ValueError, match=r"the id 21474\d+ was read, and the tokenizer has 1048576.*web/\d+ tokens 0\.\."
    ):
        drain(rows)
    flip(folder / "00001.idx", 8, 1)
    with pytest.raises(ValueError, match="00001.idx was altered after it was written .its sha256 differs"):
        open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)
    os.truncate(folder / "00002.bin", 40)
    with pytest.raises(ValueError, match=r"00002.bin has 40 bytes, \d+ were written; it was cut short"):
        open_rows(folder, seq_len=SEQ_LEN, packing="concat", seed=0)


def test_a_corpus_of_more_shards_than_files_may_be_open(folders, tmp_path, monkeypatch):
    from data_pipelines import shards

    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    rows = opened(folders)
    few = read(batches(rows, batch_size=BATCH_SIZE, num_threads=8, prefetch=32), 0, 40)
    np.testing.assert_array_equal(few, read(batches(rows, batch_size=BATCH_SIZE, num_threads=1), 0, 40))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for number in range(30):
        rows[number]
    assert before == 0 or len(os.listdir("/proc/self/fd")) <= before + 1


# --- kept plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_kept_plan_changes_no_row(packing, folders, tmp_path, monkeypatch):
    wanted = row_batch(opened(folders, packing), range(300))
    monkeypatch.setattr(loading, "_KEEP_PLANS_FROM", 0)
    for name in ("web", "code"):
        shutil.copytree(Path(folders[0]).with_name(name), tmp_path / name)
    own = tuple(str(tmp_path / name) for name in ("web", "code"))
    first = row_batch(opened(own, packing), range(300))
    monkeypatch.setattr(loading.packing, "plan_rows", None)  # a second planning would fail
    again = row_batch(opened(own, packing), range(300))
    for found in (first, again):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found, wanted))
    assert open_tokens(own[0]).manifest["num_documents"] == 120, "the folder is as whole as before"


def test_a_plan_is_kept_for_its_limits_and_seed_alone(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_KEEP_PLANS_FROM", 0)
    folder = str(copied(folders, tmp_path))

    def documents(seed=0, **limits):
        sources = make_sources((folder,), **limits)
        return (
            open_mixture(sources, seq_len=SEQ_LEN, packing="concat", seed=seed).sources[0].plan(0).document_P.tolist()
        )

    kinds = ({}, {"min_tokens": (30,)}, {"max_tokens": (50,)}, {"seed": 1})
    assert len({tuple(documents(**kind)) for kind in kinds}) == len(list(tmp_path.glob("web/plans/*.plan"))) == 4


GOLDEN = {
    "concat": "bd6f72f54fbd52f700c4f8ee5e37dcbf8c24f7b8b3f996e5f52b7ed7fcd58903",
    "whole": "a49a1d408b25c12378e34be9cb1fff84fbfeac17f2af2ed4e29aa3ae2574b1eb",
}


@pytest.mark.parametrize("packing", GOLDEN)
def test_the_order_of_one_folder_is_that_of_the_first_release(packing, tmp_path):
    """A run begun by an earlier version goes on with the same batches."""
    tokenizer = types.SimpleNamespace(vocab_size=1 << 20, fingerprint="f" * 64)
    lengths = np.random.default_rng(7).integers(0, 60, 200).tolist()
    documents = [
        TokenDocument(str(d), list(range(1000 * d, 1000 * d + n)), [i % 3 > 0 for i in range(n)])
        for d, n in enumerate(lengths)
    ]
    write_tokens(tmp_path / "a", documents, tokenizer=tokenizer, shard_tokens=900)
    digest = hashlib.sha256()
    for step in (0, 90):
        data = batches(open_rows(tmp_path / "a", seq_len=48, packing=packing, seed=3), batch_size=4)
        for batch in itertools.islice(data(step), 40):
            for field in batch:
                digest.update(field.tobytes() + str(field.dtype).encode() + str(field.shape).encode())
    assert digest.hexdigest() == GOLDEN[packing]


GOLDEN_MIXTURE = {
    "concat": "c5a0fa8520547a0f9b02c78e40e28c7531b6a275b619c49876b88582b129400f",
    "whole": "ef407318720d593a7fa73530d9cbefe85aa82b031d80b7b11e90e9f14ade7c5c",
}


@pytest.mark.parametrize("packing", GOLDEN_MIXTURE)
def test_the_order_of_a_mixture_is_that_of_the_first_release(packing, folders):
    """Rows of the first two blocks and of one far away."""
    digest = hashlib.sha256()
    for field in row_batch(opened(folders, packing), [*range(0, 2048, 3), 9000]):
        digest.update(field.tobytes())
    assert digest.hexdigest() == GOLDEN_MIXTURE[packing]
