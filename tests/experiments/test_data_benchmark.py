"""The benchmark of the data chain times the stages that it names, and counts what they did."""

import json

import pyarrow.parquet as pq

from experiments.benchmarks import data

TEXT = (
    "The river rises in the hills above the town and runs past seven mills, of which three are still at work. "
    "Their wheels were made of oak; the newest of them is a hundred years old and turns two stones at a time."
)


def test_rules_and_duplicates_is_what_its_name_says(tmp_path):
    texts = [TEXT, TEXT.upper(), TEXT.replace("newest", "oldest"), "Too short.", "Seven mills. " * 40]
    rows = [json.dumps({"path": f"{number}.txt", "text": text}) for number, text in enumerate(texts)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = data.whole("rules_and_duplicates", tmp_path / "corpus.jsonl", tmp_path)
    assert found["dropped"] == {"rules": 2, "exact_duplicates": 1, "near_duplicates": 1}
    assert (found["documents"], found["kept"]) == (5, 1)
    (kept,) = pq.read_table(tmp_path / "out" / "documents").to_pylist()
    assert kept["language"] == "und"  # nobody has asked for it
    stages = json.loads((tmp_path / "out" / "ledger.json").read_text())["stages"]
    assert [count["stage"] for count in stages] == ["normalise", "rules", "exact_duplicates", "near_duplicates"]
    assert data.WANTED.keys() <= data.CHAINS.keys() | data.stages().keys()
