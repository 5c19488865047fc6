"""The run folder: made whole, refused for another config, cut on resume, and only ever removed when it is one."""

import dataclasses
import importlib.metadata
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from internjax.train import tracking
from internjax.train.optimizer import AdamW, Constant, Cosine
from internjax.train.tracking import (
    TrackingConfig,
    completed,
    differing_fields,
    open_run,
    read_rows,
    to_json,
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    optimizer: AdamW = AdamW()
    schedule: Cosine | Constant = Cosine(10)
    sizes: tuple[int, ...] = (1, 2)
    run: str = "a"


QUIET = TrackingConfig(wandb="disabled")


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def opened(path, config=None, **how):
    return open_run(path, config or Experiment(), tracking=QUIET, **how)


def test_a_config_is_written_with_the_names_of_its_choices(tmp_path):
    opened(tmp_path / "run")
    written = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert written["schedule"] == {"type": "Cosine", "warmup_steps": 10, "final_fraction": 0.1}
    assert written["optimizer"]["type"] == "AdamW" and written["sizes"] == [1, 2]
    assert to_json({"path": tmp_path}) == {"path": str(tmp_path)}
    with pytest.raises(ValueError, match="Pass functions to functions"):
        to_json({"loss": print})


def test_versions_tell_what_ran(tmp_path):
    opened(tmp_path / "run")
    told = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert told["packages"]["jax"] and told["packages"]["numpy"] == np.__version__
    for dist in itertools.islice(importlib.metadata.distributions(), 40):
        assert told["packages"][dist.name] == importlib.metadata.version(dist.name)
    assert told["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}") and told["command"]


def test_the_git_commit_and_diff_are_those_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.versions()["git_commit"] is None

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    (tmp_path / "file").write_text("two\n")
    told = tracking.versions()
    assert told["git_commit"] == git("rev-parse", "HEAD") and "+two" in told["git_diff"]


def test_the_same_config_resumes_and_another_is_refused_by_name(tmp_path):
    opened(tmp_path / "run").close()
    opened(tmp_path / "run").close()
    opened(tmp_path / "run", Experiment(run="elsewhere")).close()  # says where, not what
    other = Experiment(optimizer=AdamW(peak_lr=0.5), schedule=Constant(10))
    with pytest.raises(ValueError) as caught:
        opened(tmp_path / "run", other)
    said = str(caught.value)
    assert "optimizer.peak_lr: 0.5 now, 0.0003 in the folder" in said and "schedule: " in said and "Cosine" in said
    assert "sizes" not in said and "--fresh" in said


def test_differing_fields_name_what_came_and_went():
    assert differing_fields({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}) == ["b.c: 2 now, 3 in the folder"]
    assert differing_fields({"a": 1}, {}) == ['a: 1 now, "(absent)" in the folder']
    assert differing_fields({"a": [1, 2]}, {"a": [1, 2]}) == []


def test_fresh_removes_a_run_folder_and_nothing_else(tmp_path, monkeypatch):
    with opened(tmp_path / "run") as run:
        run.log(1, {"loss": 1.0})
    with opened(tmp_path / "run", Experiment(sizes=(3,)), fresh=True) as run:
        assert run.config["sizes"] == [3] and not (tmp_path / "run" / "metrics.jsonl").exists()
    # The same job's second start goes on with what its first one made; another job does not.
    for job, kept in (("one", False), ("one", True), ("two", False)):
        monkeypatch.setenv("INTERNJAX_JOB", job)
        with opened(tmp_path / "run", fresh=True) as run:
            assert (tmp_path / "run" / "metrics.jsonl").exists() == kept, job
            run.log(1, {"loss": 1.0})
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="not a run folder"):
        opened(precious, fresh=True)
    with pytest.raises(ValueError, match="not a run folder"):
        opened(precious)
    assert (precious / "thesis.txt").read_text() == "years"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precious", "run"]  # no leftovers
    opened(tmp_path / "new", fresh=True).close()


def test_rows_are_cut_to_the_restored_step(tmp_path):
    with opened(tmp_path / "run") as run:
        for step in range(1, 6):
            run.log(step, {"loss": np.float32(step) / 3})
            run.time({"step": step, "seconds": 0.1})
        whole = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "lo')  # a kill in the middle of a row
        assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
        run.cut(3)
        rows = read_rows(tmp_path / "run" / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        for step in (4, 5):
            run.log(step, {"loss": np.float32(step) / 3})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == whole
    assert len(read_rows(tmp_path / "run" / "timing.jsonl")) == 5  # lost work was still time spent


def test_incidents_and_samples_are_cut_like_metrics(tmp_path):
    with opened(tmp_path / "run") as run:
        for step in (2, 4):
            run.report({"step": step, "incident": "spike"})
            run.sample(step, [{"prompt": "è", "text": "x"}])
        (run.samples / "preview.jsonl").write_text("")
        run.cut(3)
        assert read_rows(run.folder / "incidents.jsonl") == [{"step": 2, "incident": "spike"}]
        assert sorted(path.name for path in run.samples.iterdir()) == ["2.jsonl", "preview.jsonl"]
        assert read_rows(run.samples / "2.jsonl") == [{"prompt": "è", "text": "x"}]
        run.cut(1)
        assert not (run.folder / "incidents.jsonl").exists()  # it is there when there is something to tell


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    with opened(tmp_path / "run") as run:
        run.log(1, {"loss": None, "accuracy": np.float32("nan"), "count": 3})
    assert read_rows(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": None, "accuracy": None, "count": 3}]


def test_the_time_of_a_run_counts_once(tmp_path):
    with opened(tmp_path / "run", begun=1e9) as run:
        assert run.take_begin() == 1e9 and run.take_begin() > 1.7e9


def test_a_run_is_complete_when_it_says_so(tmp_path):
    assert completed(tmp_path / "run") is None
    with opened(tmp_path / "run") as run:
        assert completed(run.folder) is None
        run.complete({"loss": np.float32(0.5)})
    assert completed(tmp_path / "run") == {"loss": 0.5}


def test_later_starts_record_what_changed(tmp_path, capsys):
    opened(tmp_path / "run").close()
    path = tmp_path / "run" / "versions.json"
    first = json.loads(path.read_text())
    assert "resumed" not in first
    first["packages"]["jax"] = "0.0.1"
    path.write_text(json.dumps(first))
    for _ in range(2):
        opened(tmp_path / "run").close()
    told = json.loads(path.read_text())
    assert told["packages"]["jax"] == "0.0.1" and len(told["resumed"]) == 1  # the second start changed nothing
    assert list(told["resumed"][0]["packages"]) == ["jax"] and "packages changed" in capsys.readouterr().err


def test_disabled_wandb_is_never_imported(tmp_path):
    program = (
        "import sys, internjax.train.tracking as t\n"
        f"run = t.open_run({str(tmp_path / 'run')!r}, {{}}, tracking=t.TrackingConfig(wandb='disabled'))\n"
        "run.log(1, {'loss': 1.0}); run.close()\n"
        "assert 'wandb' not in sys.modules and 'tqdm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class FakeWandb:
    """Stands where the wandb module is imported from, and keeps what it is told."""

    def __init__(self, folder):
        self.folder, self.inits, self.logged, self.finished, self.summary = folder, [], [], 0, {}

    def init(self, **how):
        self.inits.append(how)
        self.dir, self.settings = str(self.folder / "offline-run-1" / "files"), self
        self.mode, self.id = how["mode"], how["id"]
        return self

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def Table(self, columns, data):
        return columns, data

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    fake = FakeWandb(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE")
    return fake


def test_wandb_is_offline_keeps_its_id_and_prints_the_upload(tmp_path, wandb, capsys):
    for step in (1, 2):
        with open_run(tmp_path / "run", Experiment()) as run:
            run.log(step, {"loss": 0.5})
            run.time({"step": step, "seconds": 2.0})
            run.time({"event": "checkpoint", "step": step, "seconds": 2.0})
    first, second = wandb.inits
    assert first["mode"] == "offline" and first["id"] == second["id"] and first["project"] == "internjax"
    assert first["config"]["schedule"]["type"] == "Cosine"
    assert wandb.logged[:2] == [(1, {"loss": 0.5}), (1, {"timing/seconds": 2.0})] and len(wandb.logged) == 4
    assert wandb.finished == 2 and f"wandb sync {tmp_path}/*-{first['id']}" in capsys.readouterr().out


def test_wandb_keeps_the_id_that_a_checkpoint_holds(tmp_path, wandb):
    with open_run(tmp_path / "run", Experiment()) as run:
        assert run.wandb_id is None
        run.log(1, {"loss": 0.5})
        first = run.wandb_id
    (tmp_path / "run" / "wandb_id.txt").unlink()
    with open_run(tmp_path / "run", Experiment()) as run:
        run.adopt_wandb_id(first)
        run.adopt_wandb_id("another")
        run.log(2, {"loss": 0.5})
    assert [how["id"] for how in wandb.inits] == [first, first]


def test_samples_are_a_table_and_sums_a_summary_in_wandb(tmp_path, wandb):
    with open_run(tmp_path / "run", Experiment()) as run:
        run.sample(3, [{"prompt": "a", "text": "b"}, {"prompt": "c", "text": "d"}])
        run.log(3, {"loss": None, "learning_rate": 0.1})
        run.summarise({"goodput": np.float32(0.5)})
    assert wandb.logged == [
        (3, {"samples": (["prompt", "text"], [["a", "b"], ["c", "d"]])}),
        (3, {"learning_rate": 0.1}),
    ]
    assert wandb.summary == {"goodput": 0.5}


def test_the_variables_of_wandb_win(tmp_path, wandb, monkeypatch):
    def started(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with open_run(tmp_path / str(len(wandb.inits)), {}) as run:
            run.log(1, {})
        return wandb.inits[-1]

    assert started(WANDB_SWEEP_ID="s")["mode"] == "online"
    given = started(WANDB_MODE="online", WANDB_PROJECT="mine", WANDB_RUN_ID="abc", WANDB_NAME="n", WANDB_DIR="/d")
    assert (given["mode"], given["project"], given["id"], given["name"], given["dir"]) == (
        "online",
        "mine",
        "abc",
        "n",
        "/d",
    )
    count = len(wandb.inits)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with open_run(tmp_path / "off", {}) as run:
        run.log(1, {})
    assert len(wandb.inits) == count


def test_a_missing_wandb_is_said_once_and_nothing_else_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    monkeypatch.delenv("WANDB_MODE")
    with open_run(tmp_path / "run", {}) as run:
        run.log(1, {"loss": 1.0})
        run.log(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("wandb is not installed") == 1
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2
