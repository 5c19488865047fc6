"""Units, parts, decisions, restart: nothing in the result depends on how the work was cut, done or interrupted."""

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import chain, dedup, executors, readers, sources, wanjuan
from data_pipelines.chain import Sizes
from data_pipelines.digests import stage_digest
from data_pipelines.document import Corpus, Decision, Outcome, Stage, make_document
from data_pipelines.ledger import Ledger, explain_run
from data_pipelines.tokens import text_documents, write_tokens
from internjax.text.tokenizer import train_tokenizer
from tests.data_pipelines.small_chain import (
    NOT_STARTED,
    SIZES,
    contents,
    run,
    run_real,
    stages,
    write_corpus,
    write_real,
)
from tests.data_pipelines.test_archives import tar_bytes, zip_bytes
from tests.data_pipelines.test_web_pages import page, response

SAME = ("documents/00000.parquet", "dropped.parquet", "measures.parquet", "repositories.jsonl")
ROOT = Path(__file__).resolve().parent.parent.parent


def program(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "tests.data_pipelines.small_chain", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Thousands of small parts need not outlive the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    write_corpus(folder / "in.jsonl")
    with executors.local(1) as run_tasks:
        run(folder, folder / "out", run_tasks)
    return contents(folder / "out")


def test_the_result_is_what_it_says(expected, tmp_path):
    counts = json.loads(expected["ledger.json"])
    assert counts["documents_in"] == 60 and counts["documents_kept"] + counts["documents_dropped"] == 60
    assert counts["dropped"]["short"]["short"] > 5 and counts["dropped"]["exact"]["exact_duplicate"] > 5
    assert (
        list(counts["rows_set_aside"].values()) == [1] and b"in.jsonl:21: not valid JSON" in expected["set_aside.txt"]
    )
    for name, content in expected.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    dropped = pq.read_table(tmp_path / "dropped.parquet").to_pylist()
    assert [row["stage"] for row in dropped] == sorted((row["stage"] for row in dropped), key=["short", "exact"].index)
    assert all(row["text"] is None for row in dropped)
    assert f"dropped by {dropped[-1]['stage']}" in explain_run(tmp_path, dropped[-1]["id"])
    kept = sources.read([tmp_path])
    assert explain_run(tmp_path, kept[0].id) == f"{kept[0].id}: kept"
    numbers = [int(document.path.rpartition(":")[2]) for document in kept]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("sizes", "threads"), [(Sizes(), 1), (SIZES, 2), (Sizes(unit_bytes=1, batch_rows=1), 2), (Sizes(batch_bytes=1), 1)]
)
def test_units_batches_and_threads_leave_no_trace(expected, tmp_path, sizes, threads):
    write_corpus(tmp_path / "in.jsonl")
    with executors.local(threads) as run_tasks:
        run(tmp_path, tmp_path / "out", run_tasks, sizes=sizes)
    found = contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name in SAME:
        assert found[name] == expected[name], name
    counts, others = json.loads(found["ledger.json"]), json.loads(expected["ledger.json"])
    assert len(counts.pop("rows_set_aside")) == len(others.pop("rows_set_aside")) == 1  # it names the file by its place
    assert counts == others
    assert not list(tmp_path.glob(".out*")), "work is removed at the end"


def test_order_and_copies_of_the_input(tmp_path):
    for name, first in (("a", 0), ("b", 20)):
        write_corpus(tmp_path / "in.jsonl")
        lines = (tmp_path / "in.jsonl").read_text().splitlines()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[first : first + 20]) + "\n")
    chain_of = stages(tmp_path)
    results = []
    with executors.local(1) as run_tasks:
        for number, names in enumerate(("ab", "ba", "bab")):
            paths = [tmp_path / f"{name}.jsonl" for name in names]
            wanjuan.run_files(paths, chain_of, tmp_path / f"out{number}", run_tasks, sizes=SIZES)
            results.append(contents(tmp_path / f"out{number}"))
        assert results[0] == results[1] == results[2]
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes())
        paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "copy"]
        wanjuan.run_files(paths, chain_of, tmp_path / "twice", run_tasks, sizes=SIZES)

    def texts(folder):
        return {document.text.lower() for document in sources.read([folder])}

    assert texts(tmp_path / "twice") == texts(tmp_path / "out0")


@pytest.mark.parametrize("place", ["batch", "resolve", "write"])
def test_a_killed_run_goes_on_where_it_was(expected, tmp_path, place):
    write_corpus(tmp_path / "in.jsonl")
    (tmp_path / "kill").write_text(place)
    killed = program(tmp_path)
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.new-*"))) == (place == "write"), "what was being written is left"
    before = (tmp_path / "log").read_text().splitlines()
    with executors.local(1) as run_tasks:
        run(tmp_path, tmp_path / "out", run_tasks)
    after = (tmp_path / "log").read_text().splitlines()[len(before) :]
    if place == "batch":
        assert len(before) > 20 and len(set(before) & set(after)) < 8, "the unit that was under way alone is read again"
    else:
        assert after == ["decided"] * (place == "resolve"), "nothing that was finished is done again"
    assert not list(tmp_path.glob(".out*")), "nothing is left"
    found = contents(tmp_path / "out")
    for name in SAME:
        assert found[name] == expected[name]
    assert json.loads(found["ledger.json"])["stages"] == json.loads(expected["ledger.json"])["stages"]


def test_a_task_is_named_by_what_it_reads_and_does(tmp_path):
    write_corpus(tmp_path / "in.jsonl")
    (tmp_path / "z.jsonl").write_text('{"text": "one"}\n')
    slices = sources.cut(sources.find_files([tmp_path / "in.jsonl", tmp_path / "z.jsonl"]), size=9000).slices
    said = []

    def run_tasks(function, tasks):
        said.extend(str(task) for task in tasks)
        return map(function, tasks)

    units = [sources.unit(slices[:1]), sources.unit(slices[1:])]
    chain.run(units, stages(tmp_path), chain.Settings(tmp_path / "work"), run_tasks)
    names = [f"{tmp_path}/in.jsonl", f"{tmp_path}/in.jsonl from {slices[1].first_line} on to {tmp_path}/z.jsonl"]
    steps = ["short | exact", "without exact | near", "without near"]
    assert said == [f"{step} of {name}" for step in steps for name in names]


def test_what_is_given_a_name_is_on_disk(tmp_path, monkeypatch):
    """So a crash of the machine leaves no part, decision or output that has its name and lacks bytes."""
    synced, named = {}, []

    def sync(descriptor):
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    def watched(move):
        def moved(path, target):
            for entry in [path, *path.rglob("*")]:
                found = entry.stat()
                assert found.st_ino in synced and (entry.is_dir() or synced[found.st_ino] == found.st_size), entry
            named.append(Path(target))
            return move(path, target)

        return moved

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))
    write_corpus(tmp_path / "in.jsonl")
    with executors.local(1) as run_tasks:
        run(tmp_path, tmp_path / "out", run_tasks)
    assert {path.parent.name for path in named[:-2]} == {"parts", "decisions"}
    assert [path.name for path in named[-2:]] == ["ledger.json", "out"]


@pytest.mark.slow
def test_a_corpus_of_ten_times_the_memory_passes(tmp_path):
    # What a compiler leaves in a process would count: another one compiles what is not compiled yet.
    (tmp_path / "first").mkdir()
    first = program(tmp_path / "first", "once")
    assert first.returncode == 0, first.stderr[-3000:]
    done = program(
        tmp_path, "memory", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1", ARROW_DEFAULT_MEMORY_POOL="system"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    times, kept = map(int, done.stdout.split())
    assert times >= 10 and kept == 1567


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    def refused(**how):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("ray.init", refused)
    with pytest.raises(ValueError, match=r"joined at a:1; .* \(nobody answers\)"), executors.ray("a:1"):
        pass


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_gives_the_same_bytes_though_a_worker_is_killed(tmp_path):
    """The chain `mixed` on real files: every file of the output, the ledger whole, and the tokens made of it."""
    write_corpus(tmp_path / "in.jsonl")
    write_real(tmp_path)
    with executors.local(1) as run_tasks:
        run_real(tmp_path, tmp_path / "alone", run_tasks)
    (tmp_path / "kill").write_text("batch")
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": "60",
        "PYTHONPATH": str(ROOT),
    }
    # Ray waits half a minute for each node to start, which can be little on a busy machine. In a process of its own
    # each time: one that has met a cluster that did not start may not get along with the next.
    for _ in range(3):
        done = program(tmp_path, "ray", **settings)
        if done.returncode != NOT_STARTED:
            break
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "kill").exists(), "a worker was killed"
    assert "the worker of a deadly text died 2 times (" in done.stdout and "leave out what it dies of" in done.stdout
    found, alone = contents(tmp_path / "out"), contents(tmp_path / "alone")
    assert found == alone
    dropped = json.loads(alone["ledger.json"])["dropped"]
    for stage in (
        "licences",
        "code_rules",
        "text_rules",
        *(f"{a}_{b}_duplicates" for a in ("code", "text") for b in ("exact", "near")),
    ):
        assert dropped[stage], stage
    kept = sources.read([tmp_path / "alone"])
    tokenizer = train_tokenizer([document.text for document in kept[:20]], vocab_size=300)
    for name in ("out", "alone"):
        texts = ((document.id, document.text) for document in sources.stream([tmp_path / name]))
        write_tokens(tmp_path / f"tokens of {name}", text_documents(texts, tokenizer), tokenizer=tokenizer)
    assert contents(tmp_path / "tokens of out") == contents(tmp_path / "tokens of alone")


def test_what_cannot_be_read_is_set_aside_by_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 3000)
    base = tmp_path / "in"
    base.mkdir()
    good = json.dumps({"text": "a good row of text"})
    (base / "long.jsonl").write_text("\n".join([good, json.dumps({"text": "x" * 5000}), good.replace("good", "fine")]))
    (base / "utf8.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    (base / "types.jsonl").write_text(
        '{"text": 5}\n{"txt": "x"}\n{"text": "x", "language": 3}\n[]\n{"text": "\\ud800 y"}\n'
    )
    (base / "short.jsonl.gz").write_bytes(gzip.compress(f"{good}\n".encode() * 300)[:-12])
    for name in ("empty.jsonl", "empty.json.gz"):
        (base / name).touch()
    for name, whole in (
        ("cut.warc.gz", response("http://a.org/", page("A page."))),
        ("cut.tar.gz", tar_bytes({"a.py": b"x"})),
        ("cut.zip", zip_bytes({"b.py": b"y"})),
    ):
        (base / name).write_bytes(gzip.compress(whole)[:-4] if name.endswith("gz") else whole[:-12])
    (base / "loop").symlink_to(base)
    (base / "self.txt").symlink_to(base / "self.txt")
    (base / "cut.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"n": [1]}), base / "columns.parquet")
    pq.write_table(pa.table({"text": pa.array([None, "one row"]), "when": [None, b"\xff"]}), base / "nulls.parquet")
    chain_of = [Stage("exact", "corpus", dedup.exact_duplicates)]
    with executors.local(1) as run_tasks:
        wanjuan.run_files([base], chain_of, tmp_path / "out", run_tasks)
        with pytest.raises(ValueError, match="a link to a folder; not followed"):
            wanjuan.run_files([base], chain_of, tmp_path / "strict", run_tasks, strict=True)
        with pytest.raises(ValueError, match=r"is empty: .* \(1 rows could not be read: .*utf8\.jsonl:1: not valid"):
            wanjuan.run_files([base / "utf8.jsonl"], chain_of, tmp_path / "none", run_tasks)
        with pytest.raises(ValueError, match=r"utf8\.jsonl:1: not valid JSON"):
            wanjuan.run_files([base / "utf8.jsonl"], chain_of, tmp_path / "strict", run_tasks, strict=True)
    said = (tmp_path / "out" / "set_aside.txt").read_text().replace(str(base) + "/", "")
    for message in (
        "long.jsonl:2: a line of more than 3000 bytes",
        "utf8.jsonl:1: not valid JSON",
        "types.jsonl:1: field 'text' is int",
        "types.jsonl:2: no field 'text' or 'content'; the row has the fields txt",
        "types.jsonl:3: field 'language' is int",
        "types.jsonl:4: a JSON list",
        "short.jsonl.gz: cannot be decompressed",
        "empty.jsonl:1: the file is empty",
        "empty.json.gz:1: the file is empty",
        "cut.warc.gz:1: cut off or damaged here",
        "cut.tar.gz: the archive is cut off or damaged",
        "cut.zip: not a readable zip archive",
        "loop: a link to a folder",
        "self.txt: a link that leads nowhere",
        "cut.parquet: not a readable parquet file",
        "columns.parquet: no column 'text'",
        "nulls.parquet:1: field 'text' is NoneType",
    ):
        assert message in said, (message, said)
    counts = json.loads((tmp_path / "out" / "ledger.json").read_text())
    assert sum(counts["rows_set_aside"].values()) == len(said.splitlines()) == 17
    assert counts["dropped"]["exact"]["exact_duplicate"] >= 1


def test_ids_that_rows_of_a_source_share_are_counted_and_said(tmp_path, capsys):
    words = "This is a text of some words. That no other row of these files has it, but for some, is true of the number"
    rows = [{"text": f"{words} {n}", "id": n % 40, "score": float("nan")} for n in range(48)]
    rows += [{"text": f"{words} none {n}"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    others = [{"text": f"{words} other {n}", "id": n, "tags": {"original_id": 1}} for n in range(10)]
    others += [{"text": f"{words} string", "id": "1"}, {"text": f"{words} list", "id": ["1"]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, others)))
    chain_of = [Stage("exact", "corpus", dedup.exact_duplicates)]
    found = []
    for number, sizes in enumerate((Sizes(), Sizes(unit_bytes=900, batch_rows=3))):
        with executors.local(2) as run_tasks:
            out = tmp_path / f"out{number}"
            wanjuan.run_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], chain_of, out, run_tasks, sizes=sizes)
        counts = json.loads((out / "ledger.json").read_text())
        assert counts["documents_in"] == counts["documents_kept"] == 65, "they are read and kept"
        found.append(counts["repeated_ids"])
    assert found[0] == found[1] and found[0]["rows"] == 8 and len(found[0]["some"]) == 5
    said = {f"a.jsonl:{n + 1}, a.jsonl:{n + 41} bear the id {n}" for n in range(8)}
    assert set(found[0]["some"]) < said
    command = ["mixed", "--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "clean"), "--threads", "1"]
    assert wanjuan.main(command) == 0
    assert "8 rows bear the id of another row of their source, and are read: a.jsonl:" in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    assert wanjuan.main(command) == 0
    assert "repeated_ids" not in json.loads((tmp_path / "clean" / "ledger.json").read_text())


def test_a_line_of_200_megabytes_is_passed_over(tmp_path):
    path, good = tmp_path / "in.jsonl", json.dumps({"text": "a good row of text"}).encode()
    with path.open("wb") as file:
        file.write(good + b'\n{"text": "')
        file.truncate(file.seek(200_000_000))  # nothing lies on disk
        file.seek(200_000_000)
        file.write(b'"}\n' + good.replace(b"good", b"fine"))
    with executors.local(1) as run_tasks:
        wanjuan.run_files([path], [Stage("exact", "corpus", dedup.exact_duplicates)], tmp_path / "out", run_tasks)
    assert [d.path for d in sources.read([tmp_path / "out"])] == ["in.jsonl:1", "in.jsonl:3"]
    said = (tmp_path / "out" / "set_aside.txt").read_text()
    assert said == f"{path}:2: a line of more than {64 << 20} bytes; split it\n"


def test_all_dropped_fails_and_the_text_of_dropped_documents_is_kept_on_request(tmp_path):
    write_corpus(tmp_path / "in.jsonl")
    nothing = Stage("all", "batch", lambda batch: Outcome(batch, ["bad"] * batch.num_rows, [None] * batch.num_rows))
    with executors.local(1) as run_tasks:
        with pytest.raises(ValueError, match=r"all 60 documents were dropped: bad \(60\)"):
            wanjuan.run_files([tmp_path / "in.jsonl"], [nothing], tmp_path / "none", run_tasks)
        run(tmp_path, tmp_path / "out", run_tasks, keep_dropped=True)
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert all(row["text"] for row in dropped) and any(row["text"].startswith("short ") for row in dropped)


def test_a_digest_follows_settings_and_code_and_refuses_what_it_cannot_tell():
    def stage(bound, version=""):
        return Stage("s", "batch", lambda batch: Outcome(batch, [bound], []), version)

    assert stage_digest(stage(1)) == stage_digest(stage(1))
    assert len({stage_digest(each) for each in (stage(1), stage(2), stage(1, "2"))}) == 3
    assert stage_digest(stage({"a", "b", "c"})) == stage_digest(stage({"c", "b", "a"}))
    with pytest.raises(ValueError, match="holds a object, whose content cannot be told"):
        stage_digest(stage(object()))
    with pytest.raises(ValueError, match="'s' stands twice"):
        chain.segments([stage(1), stage(2)])
    with pytest.raises(ValueError, match="scope corpus and is no Corpus"):
        chain.segments([stage(1)._replace(scope="corpus")])


def test_corpus_stages_that_follow_one_another_are_sketched_together(tmp_path):
    """Once, of what comes in; anew only where a decision between them changes documents."""
    documents = [make_document(f"text {number}", source="s", path=str(number)) for number in range(6)]

    def run(changes):
        seen, decided = {"one": [], "other": []}, {}

        def sketch(name, batch):
            seen[name].append(batch.column("language").to_pylist())
            return pa.record_batch({"row": pa.array(range(batch.num_rows), pa.int64()), "path": batch.column("path")})

        def resolve(name, sketches, fetch, scratch):
            paths = [path for batch in sketches for path in batch.column("path").to_pylist()]
            rows = [row for batch in sketches for row in batch.column("row").to_pylist()]
            decided[name] = paths
            assert fetch(np.array(rows)).column("path").to_pylist() == paths
            gone = {"one": ["1"], "other": ["4"]}[name]
            changed = pa.record_batch({"row": [3], "language": ["xx"]}) if changes and name == "one" else None
            places = [row for row, path in zip(rows, paths, strict=True) if path in gone]
            return Decision(np.array(places), ["gone"] * len(places), [""] * len(places), changes=changed)

        stages = [
            Stage(name, "corpus", Corpus(partial(sketch, name), partial(resolve, name))) for name in ("one", "other")
        ]
        ledger = Ledger()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("data_pipelines.chain.stage_digest", lambda stage: stage.name)
            kept = wanjuan.run_chain(documents, stages, ledger, sizes=Sizes(unit_bytes=15, batch_rows=2))
        return seen, decided, [document.path for document in kept]

    seen, decided, kept = run(changes=False)
    assert seen["one"] == seen["other"] and sum(map(len, seen["other"])) == 6
    assert decided == {"one": list("012345"), "other": list("02345")} and kept == list("0235")
    seen, again, kept = run(changes=True)
    assert again == decided and kept == list("0235")
    assert "xx" in sum(seen["other"], []) and "xx" not in sum(seen["one"], [])
