"""The page of a run: everything it shows is what the run folder says, and broken or unfinished runs have a page too."""

import json
import re

import pytest

from internjax.train.page import charts, curve, evaluations, flat, is_log, main, numbers, read_run, write_page


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run that was killed after step 4, went on from step 2 and ended."""
    path = tmp_path / "my run"
    (path / "samples").mkdir(parents=True)
    config = {"type": "Pretrain", "run": "my run", "schedule": {"type": "Cosine", "warmup_steps": 2}, "sizes": [1, 2]}
    (path / "experiment.json").write_text(json.dumps(config))
    versions = {
        "command": "python -m experiments.x --a 'b c'",
        "python": "3.11.7",
        "git_commit": "abc",
        "git_diff": "+new\n-old\n same",
        "packages": {"jax": "0.10.2"},
        "resumed": [{"packages": {"jax": "0.10.3"}, "git_commit": "def"}],
    }
    (path / "versions.json").write_text(json.dumps(versions))
    losses = [8.0, 4.0, None, 2.0, 1.5, 1.0]
    metrics = [
        {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": 0.1 / step, "weight": 4.0}
        | ({"eval/loss": 3.0 / step} if step % 3 == 0 else {})
        for step, loss in enumerate(losses, 1)
    ]
    write_rows(path / "metrics.jsonl", metrics)

    def timed(step, seconds, at):
        row = {"step": step, "steps": 1, "seconds": seconds, "input_wait": 0.0, "tokens": 100}
        return row | {"tokens_per_second": 100 / seconds, "mfu": 0.1 / seconds, "device_memory_bytes": 2e9, "at": at}

    times = [{"event": "start", "step": 0, "seconds": 1.0, "at": 1e9 + 1}]
    times += [{"event": "compile", "step": 1, "seconds": 5.0, "at": 1e9 + 6}]
    times += [timed(step, 9.0, 1e9 + 6 + 9 * (step - 1)) for step in (2, 3, 4)]
    times += [{"event": "start", "step": 2, "seconds": 2.0, "at": 1e9 + 50}]
    times += [{"event": "compile", "step": 3, "seconds": 5.0, "at": 1e9 + 55}]
    times += [timed(step, 2.0, 1e9 + 55 + 2 * (step - 3)) for step in (4, 5, 6)]
    times += [{"event": "end", "reason": "complete", "at": 1e9 + 62}]
    write_rows(path / "timing.jsonl", times)
    incident = {"step": 3, "incident": "not_finite", "position": 2, "loss": "nan", "num_documents": 5}
    write_rows(path / "incidents.jsonl", [incident | {"documents": ["a document 1", "b", "c", "d"]}])
    for step in (2, 4, 6):
        write_rows(path / "samples" / f"{step}.jsonl", [{"prompt": "x <b>", "text": f"said {step} <i>"}])
    (path / "samples" / "preview.jsonl").write_text("not JSON\n")
    return path


def finish(folder):
    (folder / "complete.json").write_text('{"loss": 1.0}')


def text_of(folder):
    write_page(folder)
    html, markdown = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    return html, re.sub(r"\\(.)", r"\1", markdown)


def test_the_page_shows_what_the_folder_says(folder):
    finish(folder)
    html, markdown = text_of(folder)
    for part in ("At a glance", "Curves", "Evaluation", "Samples", "Incidents", "Where the time went", "Config"):
        assert f"## {part}" in markdown and f">{part}</a>" in html, part
    assert "Pretrain · complete · started 2001-09-09 01:46:40 UTC" in markdown
    assert "| 3 | not finite | nan | – | 2 | a document 1; b; c and 2 more |" in markdown
    assert "| `schedule` | Cosine |" in markdown and "| `schedule.warmup_steps` | 2 |" in markdown
    assert "| 2 | jax | 0.10.3 |" in markdown and "abc, and 2 changed lines" in markdown
    assert "python -m experiments.x --a 'b c'" in markdown
    assert "| 2001-09-09 01:46:40 UTC | 0 | 4 | killed, or running |" in markdown
    assert "2 steps done twice" in markdown and "| 3 | 1.000 |" in markdown
    assert all(f"said {step} &lt;i&gt;" in html for step in (2, 4, 6)) and "<script" not in html
    assert not re.search(r"(src|href)=\"(?!#)", html)  # it needs nothing but itself


def test_numbers_by_hand(folder):
    found = numbers(read_run(folder))
    # Of the two times that step 4 was done, the one that is in the run counts.
    assert found == {
        "steps": 6,
        "final loss": 1.0,
        "first loss": 8.0,
        "median tokens/s": 50.0,
        "median MFU": 0.05,
        "peak memory, GB": 2.0,
        "wall time, s": 62.0,
        "goodput": pytest.approx((9 + 2 + 2 + 2) / 62),
        "starts": 2,
        "incidents": 1,
        "eval/loss": 0.5,
    }


def test_curves_leave_gaps_out_and_keep_the_last_of_a_step(folder):
    run = read_run(folder)
    assert curve(run.metrics, "loss") == [(1, 8.0), (2, 4.0), (4, 2.0), (5, 1.5), (6, 1.0)]
    assert charts(run)["Tokens per second"][2] == (4, 50.0)
    assert evaluations(run) == {"eval/loss": [(3, 1.0), (6, 0.5)]}
    assert set(run.samples) == {2, 4, 6}
    assert is_log("Loss", [[(1, 10.0), (2, 1.0)]]) and not is_log("Loss", [[(1, 4.0), (2, 1.0)]])
    assert not is_log("Loss", [[(1, 10.0), (2, -1.0)]]) and not is_log("MFU", [[(1, 10.0), (2, 1.0)]])


def test_flat_names_choices_by_their_field():
    config = {"type": "A", "b": {"type": "B", "c": {"type": "C", "d": None}}, "e": [1]}
    assert flat(config) == {"b": "B", "b.c": "C", "b.c.d": None, "e": [1]}


def test_a_run_that_has_not_ended_has_a_page(folder):
    rows = (folder / "timing.jsonl").read_text().splitlines(keepends=True)
    (folder / "timing.jsonl").write_text("".join(rows[:-1]) + '{"step": 7, "sec')
    assert "not complete (running, or killed)" in text_of(folder)[1]
    for name in ("metrics.jsonl", "timing.jsonl", "incidents.jsonl", "versions.json"):
        (folder / name).unlink()
    for path in (folder / "samples").iterdir():
        path.unlink()
    html, markdown = text_of(folder)
    assert "## Config" in markdown and "## Curves" not in markdown and "Curves" not in html


def test_other_folders_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="in it are the runs my run"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        read_run(tmp_path / "nothing")
    monkeypatch.setattr("sys.argv", ["page", str(tmp_path)])
    with pytest.raises(SystemExit, match="^error: "):  # a text as exit code: it goes to stderr, and the code is 1
        main()
