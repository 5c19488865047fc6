"""The summary of a run says what its ledger says, and names no file."""

import json

import pytest

from data_pipelines import wanjuan
from experiments.benchmarks import real_runs
from tests.experiments.test_data_benchmark import TEXT


def test_a_run_is_told_without_its_paths(tmp_path, capsys):
    secret = tmp_path / "secret place"
    secret.mkdir()
    texts = [TEXT, TEXT.upper(), TEXT.replace("newest", "oldest"), "Too short.", "Seven mills. " * 40]
    rows = [json.dumps({"text": text, "id": number // 2}) for number, text in enumerate(texts)]
    (secret / "rows.jsonl").write_text("\n".join([*rows, "{broken", '{"text": 5}', "{also broken"]) + "\n")
    (secret / "nul.txt").write_bytes(b"a\0b")
    assert wanjuan.main(["reference", "--input", str(secret), "--output", str(tmp_path / "out"), "--threads", "1"]) == 0
    output = tmp_path / "result.json"
    real_runs.main(["--run", "reference", str(tmp_path / "out"), "five rows", "--output", str(output)])
    text = output.read_text()
    assert str(tmp_path) not in text and "secret" not in text and "rows.jsonl" not in text
    run = json.loads(text)["runs"]["reference"]
    assert (run["given"], run["documents_in"], run["documents_kept"]) == ("five rows", 5, 1)
    dropped = {
        stage: {name: each["documents"] for name, each in of["dropped"].items()} for stage, of in run["stages"].items()
    }
    assert dropped["exact_duplicates"] == {"exact_duplicate": 1} and dropped["near_duplicates"] == {"near_duplicate": 1}
    assert sum(dropped["rules"].values()) == 2
    assert run["stages"]["rules"]["dropped"]["few_words"]["bytes"] == len("Too short.\n")
    assert run["rows_set_aside"] == {
        "not valid JSON": 2,
        "field 'text' is int, wanted a string": 1,
        "not text, there is a NUL among its first bytes": 1,
    }
    assert run["repeated_ids"] == 2 and run["near_duplicates"]["near_duplicates"]["groups"] == 1
    assert run["kept_documents"]["language"] == {"en": 1}
    assert '"documents_kept": 1' in capsys.readouterr().out
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())
    ledger["stages"][1]["documents_kept"] += 1
    (tmp_path / "out" / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(RuntimeError, match="the stage language does not sum"):
        real_runs.summarised(tmp_path / "out", "")
