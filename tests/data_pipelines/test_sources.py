import errno
import gzip
import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import embedded, executors, readers, rows, sources, tables, wanjuan
from data_pipelines.chain import Sizes
from data_pipelines.dedup import exact_duplicates
from data_pipelines.document import SCHEMA, Stage, make_document, to_batch, to_documents
from tests.data_pipelines.test_archives import tar_bytes
from tests.data_pipelines.test_web_pages import page, response


def test_jsonl_rows_and_their_fields(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "one", "language": "en", "id": 7, "score": 0.5}, {"text": "two", "path": "x.md", "domain": "code"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    one, two = sources.read([path])
    assert (one.text, one.language, one.path, one.source) == ("one", "en", "rows.jsonl:1", "rows")
    assert one.meta == {"original_id": 7, "score": 0.5}
    assert (two.path, two.domain) == ("x.md", "code")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "fine"}\n{"text": \n', r"bad\.jsonl:2: not valid JSON .*wanted one JSON object per line"),
        (b'{"text": "fine"}\n[1, 2]\n', r"bad\.jsonl:2: a JSON list; wanted one JSON object per line"),
        (b'{"text": "fine"}\n\n{"body": "x"}\n', r"bad\.jsonl:3: no field 'text' or 'content'; .*the fields body"),
        (b'{"text": "fine"}\n\xff\xfe\n', r"bad\.jsonl:2: not valid JSON"),
        (b'{"text": "fine"}\n' + b"[" * 100_000, r"bad\.jsonl:2: not valid JSON"),
    ],
)
def test_bad_rows_are_named_and_may_be_set_aside(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.read([path])
    bad = []
    assert [d.text for d in sources.read([path], on_bad_row=bad.append)] == ["fine"]
    assert len(bad) == 1


def test_missing_empty_and_wrong_files_say_what_to_do(tmp_path):
    (tmp_path / "here.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no such file or folder: .*gone\.jsonl; .* holds here\.jsonl; give an"):
        sources.read([tmp_path / "gone.jsonl"])
    with pytest.raises(ValueError, match=r"/none/gone\.jsonl; .*/none cannot be listed \(No such file.*; give"):
        sources.read([tmp_path / "none" / "gone.jsonl"])
    with pytest.raises(ValueError, match="the corpus is empty: no document in .*here"):
        sources.read([tmp_path / "here.jsonl"])
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: not a readable parquet file"):
        sources.read([tmp_path / "x.parquet"])
    (tmp_path / "list.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"belongs in a file named \.jsonl"):
        sources.read([tmp_path / "list.json"])


def test_rows_of_a_json_array_stand_where_they_begin(tmp_path):
    path, rows = tmp_path / "a.json", [{"a": 1, "b": "]\n,"}, {}, 5, {"c": [{}, "x"]}]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        f"\ufeff\n {json.dumps(rows, indent=1)}\n",
        "[]",
        ' {"a": 1}',
    ):
        path.write_text(text, "utf-8")
        found, bad = [], []
        for place, value in readers.json_rows(path, on_bad_row=bad.append):
            line, index = map(int, place.removeprefix(f"{path}:").removesuffix("]").split("["))
            found.append((index, value))
            assert line <= 1 + text.count("\n")
        wanted = json.loads(text.removeprefix("\ufeff"))
        wanted = list(enumerate(wanted if isinstance(wanted, list) else [wanted]))
        assert found == [each for each in wanted if isinstance(each[1], dict)]
        assert len(bad) == len(wanted) - len(found)
    path.write_text('[\n {"a": 1},\n {"a": 2}\n]\n')
    assert [row.place for row in readers.json_rows(path)] == [f"{path}:2[0]", f"{path}:3[1]"]
    for text, message in (
        ("[1", "Expecting ',' delimiter"),
        ("[1 2]", "Expecting ','"),
        ("[1,]", "Expecting value"),
        ("[] x", "Extra data"),
        ("[,]", "Expecting value"),
        ("", "Expecting value"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a.json: not valid JSON \({message}.*wanted one array of objects"):
            list(readers.json_rows(path))


def test_folder_parquet_text_and_json_array(tmp_path):
    root = tmp_path / "repo"
    (root / "sub" / ".git").mkdir(parents=True)
    (root / "sub" / ".git" / "x.py").write_text("hidden = 1\n")
    (root / "sub" / "m.py").write_bytes(b"x = '\xff'\n")
    (root / "README.md").write_text("\ufeffRead me\n", encoding="utf-8")
    (root / "photo.png").write_bytes(b"\x89PNG")
    (root / "a.json").write_text('[{"text": "row"}]')
    pq.write_table(pa.table({"text": ["p", None], "n": [1, 2]}), root / "t.parquet")
    bad = []
    found = {d.path: d for d in sources.read([root], on_bad_row=bad.append)}
    assert len(bad) == 1 and "t.parquet:2: field 'text' is NoneType" in bad[0]
    assert sorted(found) == ["repo/README.md", "repo/a.json:1[0]", "repo/sub/m.py", "repo/t.parquet:1"]
    assert found["repo/sub/m.py"].domain == "code" and found["repo/sub/m.py"].text == "x = '\ufffd'\n"
    assert found["repo/README.md"].text == "Read me\n" and found["repo/README.md"].meta == {"repository": "repo"}
    with pytest.raises(ValueError, match="no column 'text' or 'content'; it has n"):
        pq.write_table(pa.table({"n": [1]}), tmp_path / "n.parquet")
        sources.read([tmp_path / "n.parquet"])


def test_what_a_repository_is_made_of_is_read_by_name_and_first_line(tmp_path):
    files = {
        "a.pyx": "x = 1\n", "h.h": "class Shape {};\n", "n.ipynb": "{}", "LICENSE": "MIT", "LICENSE.txt": "MIT",
        "go.mod": "module m\n", "sub/Cargo.toml": "[package]\n", "Makefile": "all:\n", "run": "#!/usr/bin/env node\n",
        "guide.rst": "Guide", "notes.txt": "Notes", "settings.yaml": "a: 1", "table.csv": "1,2", "plain": "not known",
        "film.mp4": "", "package.json": '{"name": "r"}', "numbers.json": "[[1]]",
        "node_modules/m.js": "x", "vendored/.git": "gitdir: x", "vendored/v.rs": "fn f() {}",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_text(text)
    bad = []
    found = {d.path: d for d in sources.read([tmp_path / "r"], on_bad_row=bad.append)}
    assert {path: (d.domain, d.language) for path, d in found.items()} == {
        "r/a.pyx": ("code", "cython"),
        "r/h.h": ("code", "cpp"),
        "r/n.ipynb": ("code", "notebook"),
        "r/LICENSE": ("code", "und"),
        "r/LICENSE.txt": ("code", "und"),
        "r/go.mod": ("code", "gomod"),
        "r/sub/Cargo.toml": ("code", "toml"),
        "r/Makefile": ("code", "makefile"),
        "r/run": ("code", "javascript"),
        "r/guide.rst": ("reference", "und"),
        "r/notes.txt": ("reference", "und"),
        "r/vendored/v.rs": ("code", "rust"),
    }
    repositories = {path: d.meta["repository"] for path, d in found.items()}
    assert repositories.pop("r/vendored/v.rs") == "r/vendored" and set(repositories.values()) == {"r"}
    no_rows = "not text: none of its values is an object with a text"
    assert sorted(message.removeprefix(f"{tmp_path}/r/") for message in bad) == [
        "film.mp4: not text: a video", f"numbers.json: {no_rows}", f"package.json: {no_rows}"
    ]  # fmt: skip
    (alone,) = sources.read([tmp_path / "r" / "notes.txt"])
    assert (alone.domain, alone.path, dict(alone.meta)) == ("web", "notes.txt", {})


def test_rows_of_wanjuan_are_recognised_by_their_fields(tmp_path):
    page = {
        "id": "Bk3", "content": "A page.", "title": "T", "language": "en", "date": "2018-06-18T18:54:52Z",
        "token_num": 3, "toxic_score": 0.1, "porn_score": 0.2, "fluency_score": 0.9, "not_ad_score": 0.8,
    }  # fmt: skip
    images = {"id": "BkK", "img_list": [{"url": "u", "caption": ""}], "content": "![](u)\nwith a text"}
    path = tmp_path / "part.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"id": "BkO", "content": "A text."}, images, page)))
    bad = []
    text, cc = sources.read([path], on_bad_row=bad.append)
    assert (text.text, text.language, dict(text.meta)) == ("A text.", "und", {"original_id": "BkO"})
    assert (cc.text, cc.language, cc.meta["date"], cc.meta["original_id"]) == ("A page.", "en", page["date"], "Bk3")
    assert cc.meta["fluency_score"] == 0.9 and "content" not in cc.meta
    assert bad == [f"{path}:2: not text: content interleaved with 1 images (img_list)"]
    pq.write_table(pa.table({"content": ["in parquet"], "text": pa.array([None], pa.string())}), tmp_path / "c.parquet")
    assert [d.text for d in sources.read([tmp_path / "c.parquet"])] == ["in parquet"]


def test_what_may_not_be_read_and_what_is_no_file_is_told(tmp_path, monkeypatch):
    for name in ("a.txt", "private/b.txt", "z/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe")
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("private"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # a user who is root may list all
    bad = []
    assert [d.text for d in sources.read([tmp_path], on_bad_row=bad.append)] == ["a.txt", "z/c.txt"]
    assert sorted(bad) == [
        f"{tmp_path}/pipe.txt: a pipe, a socket or a device; not read",
        f"{tmp_path}/pipe: a pipe, a socket or a device; not read",
        f"{tmp_path}/private: cannot be listed (Permission denied); change its permissions",
    ]
    with pytest.raises(ValueError, match=r"pipe\.txt: a pipe, .*; give a file or a folder"):
        sources.read([tmp_path / "pipe.txt"])
    with pytest.raises(ValueError, match="private: cannot be listed"):
        sources.read([tmp_path / "private"])
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt: permission denied; change its permissions or give"):
        sources.read([tmp_path / "a.txt"])


def strings(values, kind=pa.string()):
    """A column of bytes that nobody looked at."""
    joined, offsets = b"".join(values), np.cumsum([0, *map(len, values)])
    width = np.int64 if kind == pa.large_string() else np.int32
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets.astype(width)), pa.py_buffer(joined)])


def write_tables(folder, table):
    """The table as parquet, as an Arrow file and as an Arrow stream."""
    pq.write_table(table, folder / "t.parquet")
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(folder / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    return [folder / name for name in ("t.parquet", "file.arrow", "stream.arrow")]


def test_a_row_of_a_table_that_cannot_be_read_is_set_aside_alone(tmp_path):
    texts = [f"text {number}".encode() for number in range(700)]
    texts[3] = texts[300] = b"\xff\xfe"
    when = pa.array([None] * 699 + [1 << 50], pa.timestamp("s"))  # a year that Python has no date for
    for path in write_tables(tmp_path, pa.table({"text": strings(texts), "when": when})):
        bad = []
        found = sources.read([path], on_bad_row=bad.append)
        good = [number for number in range(700) if number not in (3, 300, 699)]
        assert [(d.text, d.path) for d in found] == [(f"text {n}", f"{path.name}:{n + 1}") for n in good]
        assert [message.partition(": ")[0] for message in bad] == [f"{path}:{number}" for number in (4, 301, 700)]
        assert "cannot be read (column 'text': " in bad[0] and "UTF8" in bad[0] and "; mend the row" in bad[0]
        assert "cannot be read" in bad[2]
        with pytest.raises(ValueError, match=rf"{path.name}:4: cannot be read"):
            sources.read([path])
    bad.clear()
    read = [row.place for row in rows.read_rows(tmp_path / "t.parquet", on_bad_row=bad.append)]
    assert read == [f"{tmp_path}/t.parquet:{number + 1}" for number in good] and len(bad) == 3
    with pytest.raises(ValueError, match=r"t\.parquet:4: cannot be read"):
        list(rows.read_rows(tmp_path / "t.parquet"))


def test_a_kept_document_that_cannot_be_read_is_set_aside_alone(tmp_path):
    documents = [make_document(f"text {number}", source="s", path=str(number)) for number in range(5)]
    batch = to_batch(documents)
    texts = strings([b"text 0", b"text 1", b"\xff", b"text 3", b"text 4"], pa.large_string())
    batch = batch.set_column(SCHEMA.get_field_index("text"), SCHEMA.field("text"), texts)
    metas = batch.column("meta").to_pylist()
    batch = batch.set_column(SCHEMA.get_field_index("meta"), SCHEMA.field("meta"), pa.array([*metas[:4], "{"]))
    for path in write_tables(tmp_path, pa.Table.from_batches([batch])):
        bad = []
        assert sources.read([path], on_bad_row=bad.append) == [documents[n] for n in (0, 1, 3)]
        assert [message.partition(": ")[0] for message in bad] == [f"{path}:3", f"{path}:5"]


def test_rows_of_data_sets_that_cannot_be_read_are_set_aside_alone(monkeypatch):
    import datasets

    data = datasets.Dataset(pa.table({"text": strings([b"one", b"\xff", b"two", b"\xff", b"\xff", b"three"])}))
    monkeypatch.setattr(rows, "_open_named", lambda name, found: data)
    bad = []
    found = sources.read(["datasets:mine"], on_bad_row=bad.append)
    assert [(d.text, d.path) for d in found] == [
        ("one", "datasets:mine:1"), ("two", "datasets:mine:3"), ("three", "datasets:mine:6")
    ]  # fmt: skip
    assert [message.partition(": cannot be read")[0] for message in bad] == [f"datasets:mine:{n}" for n in (2, 4, 5)]
    with pytest.raises(ValueError, match="datasets:mine:2: cannot be read"):
        list(rows.read_rows("datasets:mine"))


def test_rows_that_are_too_long_are_set_aside_whatever_they_stand_in(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 3000)
    texts = ["short", "x" * 2900, "\u4e2d" * 1001, "x" * 3100, "last"]
    written = write_tables(tmp_path, pa.table({"text": texts}))
    written.append(tmp_path / "a.json")
    written[-1].write_text(json.dumps([{"text": text} for text in texts], indent=1))
    data = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(rows, "_open_named", lambda name, found: data)
    for given in (*written, "datasets:mine"):
        bad = []
        assert [d.text for d in sources.read([given], on_bad_row=bad.append)] == [texts[n] for n in (0, 1, 4)], given
        assert len(bad) == 2 and all("more than 3000" in message and "split it" in message for message in bad)
    (tmp_path / "wide").mkdir()
    for path in write_tables(tmp_path / "wide", pa.table({"text": ["a", "b"], "image": [b"x" * 4000, b"x"]})):
        bad = []
        assert [d.text for d in sources.read([path], on_bad_row=bad.append)] == ["b"]
        assert bad == [f"{path}:1: a row of 4009 bytes, more than 3000; split it"]


@pytest.mark.parametrize("batch_bytes", [1, 4000, 1 << 20])
def test_rows_of_tables_are_python_objects_some_bytes_at_a_time(tmp_path, monkeypatch, batch_bytes):
    lengths = [10] * 500 + [3000] * 5 + [100] * 300 + [9000, 10]
    documents = [make_document("x" * length, source="s", path=str(n)) for n, length in enumerate(lengths)]
    sizes, made = Sizes(batch_bytes=batch_bytes), []

    def watched(batch):
        made.append((batch.num_rows, batch.nbytes))
        return to_documents(batch)

    monkeypatch.setattr(tables, "to_documents", watched)
    for path in write_tables(tmp_path, pa.Table.from_batches([to_batch(documents)])):
        unit = sources.unit(sources.cut(sources.find_files([path]), size=1 << 30).slices, sizes=sizes)
        made.clear()
        assert list(unit.read(None)) == documents
        assert max(num_rows for num_rows, _ in made) <= tables.BATCH_ROWS
        assert all(num_rows == 1 or num_bytes <= batch_bytes for num_rows, num_bytes in made)
        assert batch_bytes < 1 << 20 or len(made) < 10


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.parquet", "in.tar", "in.warc.gz"])
def test_progress_moves_within_one_file(tmp_path, name):
    draw, path = random.Random(3), tmp_path / name
    texts = [" ".join(f"{draw.getrandbits(40):x}" for _ in range(150)) for _ in range(1500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name == "in.parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif name == "in.tar":
        path.write_bytes(tar_bytes({"a.txt": texts[0].encode(), "rows.jsonl": lines, "b.txt": b"last"}))
    elif name == "in.warc.gz":
        path.write_bytes(b"".join(gzip.compress(response("http://a.org/", page(text))) for text in texts))
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    told = []
    documents = sources.stream([path], progress=lambda label, done, total: told.append((done, total)))
    assert len(list(documents)) >= len(texts)
    size, done = path.stat().st_size, [done for done, _ in told]
    assert {total for _, total in told} == {size} and done == sorted(done)
    assert done[-1] == size > done[-2] and done[0] < size / 3
    assert len({number * 4 // size for number in done}) == 5, "it is seen in every quarter"


def test_utf16_is_read_and_what_has_nul_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("zwölf 十二", encoding="utf-16")
    (tmp_path / "b.txt").write_bytes(b"text\0more")
    bad = []
    assert [d.text for d in sources.read([tmp_path], on_bad_row=bad.append)] == ["zwölf 十二"]
    assert bad == [f"{tmp_path}/b.txt: not text: there is a NUL among its first 8000 bytes"]


def run(paths, folder, **how):
    with executors.local(1) as run_tasks:
        wanjuan.run_files(paths, [Stage("exact", "corpus", exact_duplicates)], folder, run_tasks, **how)
    return sources.read([folder])


def test_data_sets_are_read_from_folders_files_and_by_name(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list([{"text": f"text {n}" if n != 5 else None, "n": n} for n in range(9)])
    data.save_to_disk("saved", num_shards=2)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"what a map left")
    datasets.DatasetDict({"train": data.select(range(3)), "test": data.select(range(3, 5))}).save_to_disk("splits")
    monkeypatch.setattr(rows, "resolve_data", lambda name: tmp_path / "splits")
    texts = [f"text {n}" for n in range(9) if n != 5]
    small = Sizes(unit_bytes=200)
    for given, kept in (
        ("saved", texts),
        ("datasets:saved", texts),
        ("splits", texts[:5]),
        ("datasets:splits@test", texts[3:5]),
        ("hf:org/name", texts[:3]),
        (next((tmp_path / "saved").glob("data-00001*")), texts[5:]),
    ):
        found = run([given], tmp_path / "out", sizes=small)
        assert sorted(d.text for d in found) == sorted(kept), given
        if str(given).startswith(("datasets", "hf")):
            assert (found[0].source, found[0].path) == (given, f"{given}:1")
    found = run(["datasets:saved"], tmp_path / "out", sizes=small)
    assert [(d.path, dict(d.meta)) for d in found][5] == ("datasets:saved:7", {"n": 6})
    assert "datasets:saved:6: field 'text' is NoneType" in (tmp_path / "out" / "set_aside.txt").read_text()
    arrow = tmp_path / "cut.arrow"
    whole = next((tmp_path / "saved").glob("data-00000*")).read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.arrow(:1: damaged from here on|: not a readable Arrow file)"):
        sources.read([arrow])


def test_the_embedded_corpus_is_an_input(tmp_path, monkeypatch):
    documents = [make_document(f"x = {n}\n", source="stdlib", path=f"stdlib/{n}.py", domain="code") for n in range(3)]
    monkeypatch.setattr(embedded, "stdlib_corpus", lambda: documents)
    assert run(["embedded"], tmp_path / "out") == documents
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "a.txt").write_text("a folder of that name")
    monkeypatch.chdir(tmp_path)
    assert [d.path for d in sources.read(["./embedded"])] == ["embedded/a.txt"]


def test_documents_that_have_one_id_are_duplicates(tmp_path):
    twice = make_document("one text", source="s", path="p")
    pq.write_table(pa.Table.from_batches([to_batch([twice, twice])]), tmp_path / "twice.parquet")
    assert run([tmp_path / "twice.parquet"], tmp_path / "out") == [twice]
    counts = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert (counts["documents_in"], counts["dropped"]["exact"]) == (2, {"duplicate_id": 1})
