"""hf: and modelscope: names, with the hubs' own clients against a hub on this machine; other processes ask it.

The clients read their variables when they are imported, so each environment is a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from internjax.hf.open import logits, open_model
from internjax.hf.save import save_model
from tests.hf.hub_server import COMMIT, Hub

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import json, sys
from internjax.hf import hub
answers = []
for function, *arguments in json.loads(sys.argv[1]):
    try:
        if function == "read_rows":
            from data_pipelines.rows import read_rows
            answers.append([tuple(row) for row in read_rows(*arguments)])
        else:
            answers.append(str(getattr(hub, function)(*arguments)))
    except ValueError as error:
        answers.append(f"ValueError: {error}")
print(json.dumps(answers))
"""


def ask(calls, **environment):
    """Returns what each call returns, or its error, in a process with this environment."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "MODELSCOPE_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(calls)],
        cwd=ROOT,
        env=kept | {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, config, params, tokenizer):
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_model(folder, config=config, params=params, tokenizer=tokenizer, shard_size="60KB")
    return folder


@pytest.fixture(scope="module")
def hub(exported):
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in exported.iterdir()}
        unsafe = {"pytorch_model.bin": b"pickle", "modeling_x.py": b"code", "original/consolidated.safetensors": b"x"}
        hub.repositories["models", "lab/tiny"] = files | unsafe | {"consolidated.safetensors": b"again"}
        hub.repositories["models", "lab/pickled"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
        rows, test = b'{"text": "one"}\n{"text": "two"}\n', b'{"text": "three"}\n'
        code = {"rows.py": b"raise SystemExit", "README.md": b"rows"}
        hub.repositories["datasets", "lab/rows"] = {"data/train.jsonl": rows, "data/test.jsonl": test} | code
        yield hub


def fetched_files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_the_hugging_face_hub(hub, exported, params, tmp_path):
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "secret"}
    hub.asked.clear()
    model, again, data, pickled, absent, no_revision, pushed, bad, rows, no_split = ask(
        [
            ["fetch_model", "hf:lab/tiny"],
            ["fetch_model", "hf:lab/tiny@v1.0"],
            ["resolve_data", "hf:lab/rows"],
            ["fetch_model", "hf:lab/pickled"],
            ["fetch_model", "hf:lab/nothing"],
            ["fetch_model", "hf:lab/tiny@v9"],
            ["push", str(exported), "lab/mine"],
            ["push", str(ROOT / "tests"), "lab/mine"],
            ["read_rows", "hf:lab/rows"],
            ["read_rows", "hf:lab/rows@dev"],
        ],
        **environment,
    )
    assert Path(model).is_relative_to(tmp_path / "home") and Path(model).name == COMMIT and again == model
    assert fetched_files(model) == {path.name for path in exported.iterdir()}
    assert {token for method, path, token in hub.asked if path.startswith("/api/models/lab/tiny")} == {"Bearer secret"}
    opened = open_model(model)
    np.testing.assert_array_equal(logits(opened, [[1, 5, 9]]), logits(open_model(exported), [[1, 5, 9]]))
    assert fetched_files(data) == {"data/train.jsonl", "data/test.jsonl", "README.md"}
    assert "hf:lab/pickled has no safetensors" in pickled and "safe_serialization=True" in pickled
    assert "hf:lab/nothing could not be fetched (RepositoryNotFoundError" in absent and "Without it: download" in absent
    assert "RevisionNotFoundError" in no_revision
    assert not {"pytorch_model.bin", "modeling_x.py", "rows.py", "consolidated.safetensors"} & hub.fetched()
    assert pushed == f"{hub.address}/lab/mine"
    assert hub.created[0]["visibility"] == "private"
    assert hub.repositories["models", "lab/mine"] == {path.name: path.read_bytes() for path in exported.iterdir()}
    assert "is no model or adapter folder" in bad
    assert rows == [["hf:lab/rows:1", {"text": "one"}], ["hf:lab/rows:2", {"text": "two"}]]
    assert "Should be one of ['train', 'test']" in no_split and f"the files that lie in {data}" in no_split
    # Offline, and with a hub that does not answer: what was fetched is found, the rest tells the manual way.
    hub.asked.clear()
    calls = [["fetch_model", "hf:lab/tiny"], ["fetch_model", "hf:lab/other"], ["resolve_data", "hf:lab/other"]]
    found, missing, no_data = ask(calls, **environment, HF_HUB_OFFLINE="1")
    assert found == model and hub.asked == []
    assert "Without it: download the files of lab/other (config.json, *.safetensors" in missing
    assert "(its JSON or parquet files)" in no_data
    found, missing, _ = ask(calls, **environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert found == model and "ConnectError" in missing
    (refused,) = ask([["push", str(exported), "lab/mine"]], **environment | {"HF_TOKEN": "wrong"})
    assert "could not be pushed to lab/mine" in refused and "check HF_TOKEN" in refused


def test_modelscope(hub, exported, tmp_path):
    pytest.importorskip("modelscope_hub")
    environment = {
        "MODELSCOPE_ENDPOINT": hub.address,
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "MODELSCOPE_HOME": str(tmp_path / "home"),
        "HOME": str(tmp_path),
    }
    calls = [["fetch_model", "modelscope:lab/tiny"], ["resolve_data", "modelscope:lab/rows"]]
    calls += [["fetch_model", "modelscope:lab/nothing"], ["read_rows", "modelscope:lab/rows@test"]]
    hub.asked.clear()
    model, data, absent, rows = ask(calls, **environment)
    assert Path(model).is_relative_to(tmp_path / "cache")
    assert {path.name for path in exported.iterdir()} <= fetched_files(model)
    assert not {"pytorch_model.bin", "modeling_x.py", "rows.py", "consolidated.safetensors"} & hub.fetched()
    assert (Path(data) / "data" / "train.jsonl").is_file()
    assert "modelscope:lab/nothing could not be fetched" in absent and "Without it: download" in absent
    hub.asked.clear()
    found, _, missing, again = ask(calls, **environment, HF_HUB_OFFLINE="1")
    assert found == model and hub.asked == [] and "Without it: download" in missing
    assert again == rows == [["modelscope:lab/rows@test:1", {"text": "three"}]]


@pytest.mark.parametrize("name", ["hf:", "hf:a b/c", "hf:../x", "hf:a/b/c"])
def test_names_that_are_none(name):
    from internjax.hf.hub import fetch_model

    with pytest.raises(ValueError, match="is no name of a hub; give hf:ORG/NAME"):
        fetch_model(name)


def test_local_data_stays_where_it_is(tmp_path):
    from internjax.hf.hub import resolve_data

    assert resolve_data(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="no data at 'nowhere'; give a file, a folder, hf:ORG/NAME"):
        resolve_data("nowhere")
