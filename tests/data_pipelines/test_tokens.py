"""Token folders: what is written comes back, and a folder that is not whole is refused by the name of the file."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import tokens
from data_pipelines.tokens import TokenDocument, main, open_tokens, text_documents, write_tokens
from internjax.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

IDS = st.lists(st.integers(0, 299), max_size=12)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a text about texts, and a second text"] * 4, vocab_size=300)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Three documents with masks in two shards."""
    rows = [([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 0]), ([10, 11, 12, 13], [1, 0, 1, 0])]
    documents = [TokenDocument(f"document {n}", *row) for n, row in enumerate(rows)]
    write_tokens(tmp_path / "tokens", documents, tokenizer=tokenizer, shard_tokens=5, about={"from": "hand"})
    return tmp_path / "tokens"


def test_the_files_are_what_the_format_says(folder, tokenizer):
    names = ["00000.bin", "00000.idx", "00000.mask", "00001.bin", "00001.idx", "00001.mask", "documents.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "manifest.json"]
    assert (folder / "00000.bin").read_bytes() == np.array([5, 6, 7, 8, 9], "<u2").tobytes()
    assert (folder / "00000.idx").read_bytes() == np.array([0, 3, 5], "<i8").tobytes()
    assert (folder / "00000.mask").read_bytes() == bytes([0, 1, 1, 0, 0])
    assert pq.read_table(folder / "documents.parquet").to_pydict() == {
        "id": ["document 0", "document 1", "document 2"],
        "shard": [0, 0, 1],
        "num_tokens": [3, 2, 4],
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == names
    facts = ("tokenizer_sha256", "vocab_size", "dtype", "has_mask", "num_documents", "num_tokens", "about")
    assert [manifest[name] for name in facts] == [tokenizer.fingerprint, 300, "uint16", True, 3, 9, {"from": "hand"}]


def test_documents_come_back_from_all_shards(folder, tokenizer):
    opened = open_tokens(folder, tokenizer_sha256=tokenizer.fingerprint)
    assert [opened.document(n).tolist() for n in range(3)] == [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    assert [opened.mask(n).tolist() for n in range(3)] == [[0, 1, 1], [0, 0], [1, 0, 1, 0]]
    assert opened.lengths_D.tolist() == [3, 2, 4] and opened.first_D.tolist() == [0, 2, 3]


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.tuples(IDS, st.integers(0, 1)), min_size=1, max_size=8), shard=st.integers(1, 30))
def test_any_documents_come_back(rows, shard, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens") / "a"
    documents = [TokenDocument(str(n), ids, [learn] * len(ids)) for n, (ids, learn) in enumerate(rows)]
    manifest = write_tokens(folder, iter(documents), tokenizer=tokenizer, shard_tokens=shard)
    opened = open_tokens(folder)
    assert [opened.document(n).tolist() for n in range(len(rows))] == [row.ids for row in documents]
    assert [opened.mask(n).tolist() for n in range(len(rows))] == [row.mask for row in documents]
    assert manifest == opened.manifest and manifest["num_tokens"] == sum(len(row.ids) for row in documents)
    full = [entry["num_tokens"] >= shard for entry in manifest["shards"]]
    assert all(full[:-1])


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(), min_size=1, max_size=4))
def test_texts_come_back_between_first_and_last_token(texts, tokenizer):
    named = [(str(n), text) for n, text in enumerate(texts)]
    documents = list(text_documents(named, tokenizer))
    assert [document.id for document in documents] == [name for name, _ in named]
    for document, text in zip(documents, texts, strict=True):
        assert document.ids[0] == tokenizer.bos_id and document.ids[-1] == tokenizer.eos_id and document.mask is None
        assert tokenizer.decode(document.ids[1:-1], skip_special=False) == text


def test_markers_in_a_text_are_text_and_batches_end_nowhere(tokenizer, monkeypatch):
    texts = [(str(n), f"{n}</s><|im_start|>") for n in range(1030)]  # more than two encoded batches
    documents = list(text_documents(texts, tokenizer))
    assert len(documents) == 1030 and documents[1029].id == "1029"
    monkeypatch.setattr(tokens, "_ENCODE_CHARACTERS", 40)  # and batches of three
    assert list(text_documents(texts[:10], tokenizer)) == documents[:10]
    assert all(set(document.ids[1:-1]).isdisjoint(tokenizer.special.values()) for document in documents)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype, tokenizer, tmp_path):
    larger = dataclasses.replace(tokenizer, vocab_size=vocab_size)
    ids = [0, 65535, vocab_size - 1]
    assert write_tokens(tmp_path / "a", [TokenDocument("a", ids)], tokenizer=larger)["dtype"] == dtype
    opened = open_tokens(tmp_path / "a")
    assert opened.document(0).tolist() == ids and opened.mask(0) is None


def damaged(folder, name, change):
    raw = bytearray((folder / name).read_bytes())
    (folder / name).write_bytes(change(raw))


def flipped(raw):
    raw[len(raw) // 2] ^= 4
    return raw


@pytest.mark.parametrize("name", ["00000.bin", "00001.idx", "00001.mask", "documents.parquet"])
def test_a_damaged_file_is_named(name, folder):
    open_tokens(folder)
    damaged(folder, name, flipped)
    with pytest.raises(ValueError, match=rf"{name} was altered after it was written.*write the folder anew"):
        open_tokens(folder)
    assert open_tokens(folder, verify=False).lengths_D.shape == (3,)  # sizes alone are looked at
    damaged(folder, name, lambda raw: raw[:-1])
    for verify in (True, False):
        with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, \d+ were written; it was cut short"):
            open_tokens(folder, verify=verify)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"lacks {name}, which its manifest lists; restore it"):
        open_tokens(folder)


def test_a_folder_of_another_tokenizer_is_refused(folder, tokenizer):
    other = train_tokenizer(["something else entirely"] * 4, vocab_size=300)
    with pytest.raises(ValueError) as caught:
        open_tokens(folder, tokenizer_sha256=other.fingerprint)
    said = str(caught.value)
    assert tokenizer.fingerprint[:12] in said and other.fingerprint[:12] in said and "write it anew" in said


def test_what_is_no_token_folder_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_tokens(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no token folder"):
        open_tokens(tmp_path / "empty")
    damaged(folder, "manifest.json", lambda raw: raw.replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(ValueError, match="has format 9, this version reads 1"):
        open_tokens(folder)
    damaged(folder, "manifest.json", lambda raw: raw[:40])
    with pytest.raises(ValueError, match=r"manifest.json cannot be read .*; write the folder anew"):
        open_tokens(folder)


def test_a_folder_appears_whole_and_is_replaced_whole(folder, tokenizer, monkeypatch):
    before = (folder / "manifest.json").read_bytes()
    beside = sorted(folder.parent.iterdir())

    def documents(*, fails: bool):
        yield TokenDocument("new", [1, 2, 3])
        assert (folder / "manifest.json").read_bytes() == before, "a reader sees the old one until the new one is whole"
        if fails:
            raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        write_tokens(folder, documents(fails=True), tokenizer=tokenizer)
    assert (folder / "manifest.json").read_bytes() == before and sorted(folder.parent.iterdir()) == beside
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no room"):
        patched.setattr(tokens, "save_tokenizer", mock.Mock(side_effect=RuntimeError("no room")))
        write_tokens(folder, documents(fails=False), tokenizer=tokenizer, keep_tokenizer=True)
    assert (folder / "manifest.json").read_bytes() == before and sorted(folder.parent.iterdir()) == beside
    write_tokens(folder, documents(fails=False), tokenizer=tokenizer, keep_tokenizer=True)
    assert open_tokens(folder).lengths_D.tolist() == [3] and sorted(folder.parent.iterdir()) == beside
    assert load_tokenizer(folder / "tokenizer").fingerprint == tokenizer.fingerprint


def test_nothing_to_write_and_a_foreign_folder_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no document to write tokens of; the corpus or the data file is empty"):
        write_tokens(tmp_path / "a", [], tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"thesis.txt.*is not replaced"):
        write_tokens(tmp_path / "precious", [TokenDocument("a", [1])], tokenizer=tokenizer)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years"


def test_the_command_reads_documents_one_by_one_and_may_choose_some(tokenizer, tmp_path, capsys):
    """Tiers of code become folders of their own, which a mixture weighs."""
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    rows = [{"text": f"a text {n}", "tier": "high" if n % 3 else "moderate", "domain": "code"} for n in range(9)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    given = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]

    def written(*where):
        assert main([*given, "--output", str(tmp_path / "out"), *where]) == 0
        return open_tokens(tmp_path / "out")

    assert written().manifest["num_documents"] == 9 == written("--where", "domain=code").manifest["num_documents"]
    high = written("--where", "tier=high")
    assert high.manifest["num_documents"] == 6 and high.manifest["about"] == {"where": "tier=high"}
    assert tokenizer.decode(high.document(0)[1:-1]) == "a text 1"
    assert "in.jsonl:10: not valid JSON" in capsys.readouterr().err
    assert main([*given, "--output", str(tmp_path / "none"), "--where", "tier=low"]) == 1
    said = "--where tier=low fits no document; tier is 'high', 'moderate'"
    assert said in capsys.readouterr().err and not (tmp_path / "none").exists()
    with pytest.raises(SystemExit):
        main([*given, "--output", str(tmp_path / "none"), "--where", "tier"])


def test_the_command_takes_from_meta_how_often_an_epoch_reads_a_document(tokenizer, tmp_path, capsys):
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    rows = [{"text": f"a text {n}"} | ({"weight": n} if n else {}) for n in range(4)]
    path, out = tmp_path / "in.jsonl", tmp_path / "out"
    path.write_text("\n".join(map(json.dumps, rows)))
    given = ["--input", str(path), "--tokenizer", str(tmp_path / "tokenizer"), "--output", str(out)]
    assert main([*given, "--times", "weight"]) == 0
    opened = open_tokens(out)
    assert opened.times_D.tolist() == [1, 1, 2, 3]
    num_tokens = int(opened.lengths_D @ [1, 1, 2, 3])
    assert opened.manifest["epoch_tokens"] == num_tokens > opened.manifest["num_tokens"]
    assert f"tokens ({num_tokens} in an epoch)" in capsys.readouterr().out
    damaged(out, "manifest.json", lambda raw: raw.replace(b'"epoch_tokens": ', b'"epoch_tokens": 1'))
    with pytest.raises(ValueError, match=r"documents\.parquet was altered after it was written"):
        open_tokens(out)
    for options in ([], ["--times", "nothing"]):  # as if there were no such field
        assert main([*given, *options]) == 0
        assert open_tokens(out).times_D is None and "epoch_tokens" not in open_tokens(out).manifest
    for wrong in (0, 1.5, -1, "2", True, None, float("nan"), float("inf")):
        path.write_text(json.dumps({"text": "a", "weight": wrong}))
        assert main([*given, "--times", "weight"]) == 1
        said = capsys.readouterr().err
        assert f"in.jsonl:1 has weight {wrong!r} in meta" in said and "a whole number from 1 on" in said
