"""ArrayRecord export: Grain reads what was in the token folder, and a file that is not as written is refused."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.array_records import MANIFEST, export, main, open_records, parse, serialise
from data_pipelines.tokens import TokenDocument, open_tokens, write_tokens
from internjax.text.tokenizer import train_tokenizer

IDS = st.lists(st.integers(0, 2**63 - 1) | st.sampled_from([0, 127, 128, 16383, 16384, 92543]), max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents with masks in three shards, one of them empty."""
    tokenizer = train_tokenizer(["a text about texts"] * 4, vocab_size=300)
    draw = np.random.default_rng(0)
    documents = [
        TokenDocument(f"文 {n}", draw.integers(0, 300, size).tolist(), draw.integers(0, 2, size).tolist())
        for n, size in enumerate([5, 0, 300, 7, 1])
    ]
    path = tmp_path_factory.mktemp("array_records") / "tokens"
    write_tokens(path, documents, tokenizer=tokenizer, shard_tokens=200)
    return path


def test_grain_reads_the_documents_back(folder, tmp_path):
    manifest = export(folder, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.array_record", "00001.array_record", MANIFEST,
    ]  # fmt: skip
    opened, records = open_tokens(folder), open_records(tmp_path / "out")
    assert len(records) == manifest["num_documents"] == 5
    for index in np.random.default_rng(1).permutation(5).tolist():
        found = parse(records[index])
        assert found["id"] == f"文 {index}" and sorted(found) == manifest["features"]
        assert found["tokens"].tolist() == opened.document(index).tolist()
        assert found["loss_mask"].tolist() == opened.mask(index).tolist()
    assert [parse(record)["id"] for record in records.__getitems__([4, 1])] == ["文 4", "文 1"]


def test_the_example_of_the_readme_runs(folder, tmp_path):
    text = (Path(__file__).parents[2] / "data_pipelines" / "README.md").read_text("utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "open_records" in code]
    scope = {}
    exec(compile(code, "data_pipelines/README.md", "exec"), scope)
    opened = open_tokens(folder)
    found = scope["documents"](str(folder), tmp_path / "out")
    assert [ids.tolist() for ids in found] == [opened.document(index).tolist() for index in range(5)]


@settings(max_examples=50, deadline=None)
@given(ids=IDS, name=st.text(max_size=200))
def test_any_record_comes_back(ids, name):
    name = name.encode("utf-8", "replace").decode()
    found = parse(serialise(np.array(ids, np.int64), name))
    assert found["id"] == name and found["tokens"].tolist() == ids and "loss_mask" not in found


def test_a_record_is_the_protocol_buffer_that_it_says():
    # Written by hand: Example.features (1) holds entries (1) of key (1) and value (2); bytes_list is 1, int64_list 3.
    one = b"\x0a\x02id\x12\x05\x0a\x03\x0a\x01a"
    two = b"\x0a\x06tokens\x12\x07\x1a\x05\x0a\x03\x05\xac\x02"
    features = b"\x0a" + bytes([len(one)]) + one + b"\x0a" + bytes([len(two)]) + two
    assert serialise(np.array([5, 300]), "a") == b"\x0a" + bytes([len(features)]) + features
    with pytest.raises(ValueError, match=r"no tf\.train\.Example as this module writes it"):
        parse(features)


def test_a_document_has_as_many_records_as_an_epoch_reads_it(tmp_path):
    tokenizer = types.SimpleNamespace(vocab_size=300, fingerprint="f" * 64)
    documents = [TokenDocument(name, [number, 7], times=number) for number, name in enumerate("abc", 1)]
    write_tokens(tmp_path / "tokens", documents, tokenizer=tokenizer)
    manifest = export(tmp_path / "tokens", tmp_path / "out")
    source = open_records(tmp_path / "out")
    assert [parse(source[n])["id"] for n in range(len(source))] == list("abbccc")
    assert (manifest["num_documents"], manifest["num_tokens"], manifest["epoch_tokens"]) == (3, 6, 12)


def test_damage_is_refused_by_name(folder, tmp_path):
    export(folder, tmp_path / "out")
    path = tmp_path / "out" / "00001.array_record"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"00001\.array_record was altered after it was written"):
        open_records(tmp_path / "out")
    path.write_bytes(raw[:-1])
    for verify in (True, False):
        with pytest.raises(ValueError, match=r"00001\.array_record has \d+ bytes, \d+ were written"):
            open_records(tmp_path / "out", verify=verify)
    path.unlink()
    with pytest.raises(ValueError, match=r"lacks 00001\.array_record"):
        open_records(tmp_path / "out")
    with pytest.raises(ValueError, match=f"holds no {MANIFEST}"):
        open_records(folder)


def test_the_command_writes_all_or_nothing(folder, tmp_path, capsys):
    assert main(["--tokens", str(folder), "--output", str(tmp_path / "out")]) == 0
    assert "5 documents, 313 tokens in 2 ArrayRecord files" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["tokenizer_sha256"] == open_tokens(folder).manifest["tokenizer_sha256"]
    assert main(["--tokens", str(folder), "--output", str(folder)]) == 1
    assert "is not replaced" in capsys.readouterr().err and len(open_tokens(folder).lengths_D) == 5
    assert main(["--tokens", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 1
    assert len(open_records(tmp_path / "out")) == 5
