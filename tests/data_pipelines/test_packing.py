"""Kept plans and compiled fitting: the same rows as a plain search, planned once, never from a damaged file."""

import bisect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import packing
from data_pipelines.packing import Plan, kept_plan, plan_rows

ROOT = Path(__file__).parents[2]
KEY = {"seed": 0, "epoch": 1, "offsets": ["ab", "cd"], "limits": (0, 7)}


def best_fit_by_lists(lengths, *, seq_len, block, seed):
    """Rows of documents, from sorted lists of Python: what `whole` promises, without its arithmetic."""
    positions = np.maximum(lengths - 1, 0)
    order = np.random.default_rng((seed, 0)).permutation(len(lengths))
    fitting = [d for d in order.tolist() if 0 < positions[d] <= seq_len]
    rows = []
    for begin in range(0, len(fitting), block):
        open_rows = []
        for document in sorted(fitting[begin : begin + block], key=lambda d: -positions[d]):
            at = bisect.bisect_left(open_rows, (positions[document], -1))
            space, row = open_rows.pop(at) if at < len(open_rows) else (seq_len, len(rows))
            rows += [[]] * (row == len(rows))
            rows[row] = [*rows[row], document]
            bisect.insort(open_rows, (space - positions[document], row))
    return [rows[r] for r in np.random.default_rng((seed, 0, 1)).permutation(len(rows))]


@pytest.mark.parametrize("compile_from", [0, 1 << 60], ids=["compiled", "plain"])
def test_whole_is_the_plain_best_fit(compile_from, monkeypatch):
    monkeypatch.setattr(packing, "_COMPILE_FROM", compile_from)
    monkeypatch.setattr(packing, "_FIT_BLOCK", 300)
    lengths = np.random.default_rng(4).lognormal(3.0, 1.2, 2000).astype(int)
    plan = plan_rows(lengths, seq_len=100, packing="whole", seed=2, epoch=0)
    rows = [plan.document_P[a:b].tolist() for a, b in zip(plan.first_R, plan.first_R[1:])]
    assert rows == best_fit_by_lists(lengths, seq_len=100, block=300, seed=2)


@pytest.mark.parametrize(("middle", "spread", "seq_len"), [(600, 1.0, 4096), (6000, 1.3, 32768), (250, 0.8, 2048)])
def test_whole_fills_rows_of_realistic_lengths(middle, spread, seq_len):
    """Log-normal lengths, as web pages, books and conversations have them."""
    lengths = np.random.default_rng(0).lognormal(np.log(middle), spread, 20_000).astype(int)
    plan = plan_rows(lengths, seq_len=seq_len, packing="whole", seed=0, epoch=0)
    assert plan.length_P.sum() / (plan.num_rows * seq_len) > 0.99


def some_plan() -> Plan:
    return plan_rows(np.arange(2, 60), seq_len=40, packing="concat", seed=1, epoch=0)


def never() -> Plan:
    raise AssertionError("planned again")


def equal(a: Plan, b: Plan) -> bool:
    return all(np.array_equal(x, y) and np.asarray(x).dtype == np.asarray(y).dtype for x, y in zip(a, b))


def test_a_kept_plan_comes_back_and_nothing_else_is_left(tmp_path):
    made = kept_plan(tmp_path / "plans", KEY, some_plan)
    assert equal(made, some_plan()) and equal(kept_plan(tmp_path / "plans", dict(KEY), never), made)
    assert len(list(tmp_path.glob("plans/*.plan"))) == 1 and len(list(tmp_path.glob("plans/.*"))) == 1  # the lock


def test_every_value_of_the_key_matters(tmp_path):
    kept_plan(tmp_path / "plans", KEY, some_plan)
    for name, value in {"seed": 1, "epoch": 0, "offsets": ["ab", "ce"], "limits": (0, 8)}.items():
        with pytest.raises(AssertionError, match="planned again"):
            kept_plan(tmp_path / "plans", KEY | {name: value}, never)


def cut(raw):
    return raw[: len(raw) // 2]


def flipped(raw):
    return raw[:-9] + bytes([raw[-9] ^ 16]) + raw[-8:]


def of_another(raw):
    return raw.replace(b'"epoch": 1', b'"epoch": 2')


def objects(raw):
    return raw.replace(b"<i4", b"|O8", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, ""),
        (flipped, "the checksum of .* differs"),
        (of_another, "it belongs to other data"),
        (objects, "its arrays are no integers"),
        (lambda raw: b"", "it is no plan"),
        (lambda raw: b"\xff" * 500, "it is no plan"),
        (lambda raw: raw[:8] + b"\xff{\n", ""),
    ],
)
def test_a_damaged_plan_is_told_and_made_anew(change, said, tmp_path, capsys):
    kept_plan(tmp_path / "plans", KEY, some_plan)
    (file,) = tmp_path.glob("plans/*.plan")
    good = file.read_bytes()
    file.write_bytes(change(good))
    assert equal(kept_plan(tmp_path / "plans", KEY, some_plan), some_plan())
    message = capsys.readouterr().err
    assert f"{file} cannot be used" in message and "it is planned anew" in message
    assert re.search(said, message)
    assert file.read_bytes() == good


def test_without_the_right_or_the_room_to_write_it_goes_on(tmp_path, monkeypatch):
    (tmp_path / "plans").write_text("a file where the folder should be")
    assert equal(kept_plan(tmp_path / "plans", KEY, some_plan), some_plan())

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.os, "fsync", full)
    assert equal(kept_plan(tmp_path / "here", KEY, some_plan), some_plan())
    assert [path.name for path in (tmp_path / "here").iterdir()] == [".lock"]


def test_of_processes_that_ask_at_once_one_plans(tmp_path):
    program = textwrap.dedent(f"""
        import pathlib, sys, time
        import numpy as np
        from data_pipelines.packing import kept_plan, plan_rows
        folder = pathlib.Path({str(tmp_path)!r})

        def make():
            (folder / ("planned by " + sys.argv[1])).touch()
            time.sleep(0.5)  # the others come meanwhile
            return plan_rows(np.arange(2, 60), seq_len=40, packing="concat", seed=1, epoch=0)

        (folder / ("ready " + sys.argv[1])).touch()
        while len(list(folder.glob("ready *"))) < 3:
            time.sleep(0.01)
        print(kept_plan(folder / "plans", {{"a": 1}}, make).document_P.tolist())
    """)
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    said = {process.communicate(timeout=60)[0].strip() for process in started}
    assert said == {str(some_plan().document_P.tolist())}
    assert len(list(tmp_path.glob("planned by *"))) == 1
