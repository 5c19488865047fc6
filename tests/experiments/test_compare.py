"""Runs side by side: what differs is shown, what does not is not, and what is no run is refused."""

import json
import re

import pytest

from experiments.compare import Compare, compare, main, names, write
from internjax import report
from internjax.train.page import read_run


def make_run(path, *, rate, losses, packages=("0.10.2",), **config):
    path.mkdir(parents=True)
    fields = {"type": "Pretrain", "run": path.name, "seed": 0, "optimizer": {"type": "AdamW", "peak_lr": rate}}
    (path / "experiment.json").write_text(json.dumps(fields | config))
    versions = {"command": f"python -m {path.name}", "packages": {"jax": packages[0], "flax": "1"}}
    (path / "versions.json").write_text(json.dumps(versions))
    rows = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    times = [
        {"event": "start", "step": 0, "seconds": 1.0, "at": 1e9},
        {"event": "compile", "step": 1, "seconds": 5.0, "at": 1e9 + 5},
        {"step": 2, "steps": 1, "seconds": 4.0, "input_wait": 0.0, "tokens_per_second": 25.0, "at": 1e9 + 9},
    ]
    (path / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    return path


@pytest.fixture
def pair(tmp_path):
    first = make_run(tmp_path / "one", rate=0.1, losses=[3.0, 2.0])
    second = make_run(tmp_path / "two", rate=0.2, losses=[3.0, 1.0, 0.5], packages=("0.11",), extra=None)
    return first, second


def markdown_of(*folders):
    runs = {folder.name: read_run(folder) for folder in folders}
    return re.sub(r"\\(.)", r"\1", report.markdown("t", compare(runs)))


def test_what_differs_is_shown_and_nothing_else(pair):
    text = markdown_of(*pair)
    assert "| `optimizer.peak_lr` | 0.1 | 0.2 |" in text and "| `extra` | – | None |" in text
    assert "`seed`" not in text and "`run`" not in text
    assert "| jax | 0.10.2 | 0.11 |" in text and "| flax |" not in text
    assert "| final loss | 2.000 | 0.5000 |" in text and "| goodput | 40.0% | 40.0% |" in text
    assert "| compile | 50.0% | 50.0% |" in text and "python -m one\npython -m two" in text
    # Both are in one chart.
    assert "| one | 2 | 3.000 | 2.000 |" in text and "| two | 3 | 3.000 | 0.5000 |" in text


def test_equal_runs_differ_in_nothing(tmp_path):
    folders = [make_run(tmp_path / name, rate=0.1, losses=[1.0]) for name in ("a", "b")]
    text = markdown_of(*folders)
    assert "None: the runs have one config." in text and "Equal: Python" in text


def test_names_are_as_long_as_it_takes(tmp_path):
    assert names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    with pytest.raises(ValueError, match="not with itself"):
        names([tmp_path / "a", tmp_path / "a"])


def test_the_command_writes_one_page(pair, tmp_path, capsys):
    main([*map(str, pair), "--output", str(tmp_path / "out" / "compare.html")])
    html = (tmp_path / "out" / "compare.html").read_text()
    assert html.startswith("<!doctype html>") and "<script" not in html and ">one</span>" in html
    assert not re.search(r"(src|href)=\"(?!#)", html)
    assert capsys.readouterr().out.strip().endswith("compare.html")
    main([*map(str, pair), "--output", str(tmp_path / "compare.md")])
    assert (tmp_path / "compare.md").read_text().startswith("# one and two")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda runs: (runs[:1], "c.html"), "at least two runs"),
        (lambda runs: (runs, "c.pdf"), "ends in .html or .md"),
        (lambda runs: ((*runs, "/nowhere/at/all"), "c.html"), "not a run folder: there is no such folder"),
        (lambda runs: ((runs[0], str(runs[1]) + "/.."), "c.html"), "in it are the runs one, two"),
    ],
)
def test_what_cannot_be_compared_is_refused(pair, tmp_path, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    runs, output = change(tuple(map(str, pair)))
    with pytest.raises(ValueError, match=said):
        write(Compare(runs, output))
    assert not (tmp_path / "c.html").exists()


def test_a_mistake_ends_with_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), str(tmp_path / "b")])
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("error: ")
