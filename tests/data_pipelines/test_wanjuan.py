import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipelines import classifier, code, embedded, sources, tokens, wanjuan
from data_pipelines.chain import Sizes
from data_pipelines.document import Check, Outcome, Stage, make_document, only, to_batch
from data_pipelines.ledger import Ledger, explain, fates, summary
from data_pipelines.mixing import make_sources, open_mixture
from data_pipelines.rules import edit
from data_pipelines.tiers import Tiers
from internjax.text.tokenizer import save_tokenizer, train_tokenizer
from tests.data_pipelines.test_rules import CHINESE, FUNCTION, GOOD


def code_file(path, text):
    meta = {"repository": "r"}
    return make_document(text, source="s", path=f"r/{path}", domain="code", language="python", meta=meta)


@pytest.fixture
def documents():
    body = "".join(f"def function_{i}(value):\n    return value + {i}\n\n\n" for i in range(30))
    return [
        code_file("a.py", "import b\n\n\n" + body),
        code_file("b.py", FUNCTION),
        code_file("c.py", ("import b\n\n\n" + body).replace("    ", "\t").replace("+ 7\n", "+ 77\n")),
        code_file("broken.py", "def f(:\n"),
        make_document(GOOD, source="s", path="good.txt"),
        make_document(GOOD.upper(), source="s", path="same.txt"),
        make_document(GOOD.replace("winter", "summer"), source="s", path="near.txt"),
        make_document(CHINESE, source="s", path="zh.txt"),
        make_document("Too short.", source="s", path="short.txt"),
    ]


def test_mixed_chain_gives_every_drop_its_reason(documents):
    ledger = Ledger()
    kept = wanjuan.run_chain(documents, wanjuan.CHAIN, ledger)
    counts = summary(ledger)
    assert counts["documents_in"] == 9 == counts["documents_kept"] + counts["documents_dropped"]
    dropped = {stage: reasons for stage, reasons in counts["dropped"].items() if reasons}
    assert dropped == {
        "code_rules": {"does_not_parse": 1},
        "code_near_duplicates": {"near_duplicate": 1},
        "text_rules": {"few_words": 1},
        "text_exact_duplicates": {"exact_duplicate": 1},
        "text_near_duplicates": {"near_duplicate": 1},
    }
    paths = [document.path for document in kept]
    assert "zh.txt" in paths and len(paths) == 4
    importer = next(path for path in paths if path in ("r/a.py", "r/c.py"))
    assert paths.index("r/b.py") < paths.index(importer)
    assert "few_words: 2 is below 12" in explain(ledger, documents[-1].id)
    assert kept[paths.index("zh.txt")].id == documents[7].id  # ids stay those of the raw documents


def test_kept_set_does_not_depend_on_order_batches_or_copies(documents):
    def ids(given, **how):
        return sorted(d.id for d in wanjuan.run_chain(given, wanjuan.CHAIN, Ledger(), **how))

    expected = ids(documents)
    assert ids(random.Random(0).sample(documents, len(documents))) == expected
    assert ids(documents + documents) == expected
    assert ids(documents, sizes=Sizes(unit_bytes=3000, batch_rows=2)) == expected


def test_only_leaves_other_rows_alone(documents):
    batch = to_batch(documents)

    def shout(part):
        texts = [text.upper() for text in part.column("text").to_pylist()]
        checks = [Check("long", np.arange(len(texts)), "above", 2)]
        return Outcome(edit(str.upper)(part).batch, ["loud"] * len(texts), ["!"] * len(texts), checks)

    outcome = only(("code",), shout)(batch)
    before, after = batch.column("text").to_pylist(), outcome.batch.column("text").to_pylist()
    assert after[:4] == [text.upper() for text in before[:4]] and after[4:] == before[4:]
    assert list(outcome.reasons) == ["loud"] * 4 + [None] * 5
    (check,) = outcome.checks
    assert check.fails().tolist() == [False] * 3 + [True] + [False] * 5 and np.isnan(check.values_D[4:]).all()
    assert outcome.batch.column("id").to_pylist() == batch.column("id").to_pylist()
    assert only(("none",), shout)(batch).batch is batch
    assert only(("code",), shout)(batch.slice(0, 0)).reasons == []


@pytest.mark.parametrize("chain", sorted(wanjuan.CHAINS))
def test_every_stage_accepts_no_rows(chain, tmp_path):
    for stage in wanjuan.CHAINS[chain]():
        if stage.scope == "corpus":
            assert len(stage.apply.resolve([stage.apply.sketch(to_batch([]))], None, tmp_path).rows) == 0
        else:
            outcome = stage.apply(to_batch([]))
            assert outcome.batch.num_rows == 0 and len(outcome.reasons) == 0


SYLLABLES = "ba ce di fo gu la me ni po ru sa te vi wo zu".split()


def page(number):
    """A text that every rule passes, and that is like no other."""
    draw = random.Random(number)

    def word():
        return draw.choice(("the", "of", "and", "with", "have", "".join(draw.choices(SYLLABLES, k=3))))

    return "".join(" ".join(word() for _ in range(14)).capitalize() + ".\n" for _ in range(12))


def write_model(folder, drop, word):
    """A classifier whose label 1 is texts with the word."""
    texts = [page(100 + number) + f" {word} " * 6 * (number % 2) for number in range(60)]
    fitted = classifier.fit(texts, np.arange(60) % 2, classifier.Settings(drop=drop, log2_buckets=12, epochs=20))
    everywhere = classifier.Threshold(classifier.ANY, classifier.ANY, 0.5, 60, 30, 1.0, 1.0)
    folder.mkdir(parents=True)
    classifier.write_classifier(folder, fitted._replace(thresholds=(everywhere,)), {})


def test_the_web_chain_uses_what_it_is_given(tmp_path, capsys):
    pages = {
        "https://www.ads.example/1": page(1),
        "words": page(2) + "Casino, free spins, casino!\n",
        "toxic": page(3) + "grumble " * 6,
        "advert": page(4) + "bargain " * 6,
        "stutter": page(5),
        "benchmark": page(6) + "How many pens does Ann have if each of her three red boxes holds twelve pens?\n",
        "good": page(7) + "Fluent fluent fluent fluent: write to joe@mail.example.com today.\n",
    }
    pages |= {name: text + "fluent " * 6 for name, text in pages.items() if name not in ("stutter", "good")}
    rows = [json.dumps({"text": text, "path": path}) for path, text in pages.items()]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    (tmp_path / "domains").write_text("ads.example\n")
    (tmp_path / "words").write_text("casino\nfree spins\t2\n")
    item = {"question": pages["benchmark"].splitlines()[-2]}
    (tmp_path / "sums.jsonl").write_text(json.dumps(item))
    for name, drop, word in [
        ("toxicity", "above", "grumble"), ("advertisement", "above", "bargain"), ("fluency", "below", "fluent"),
    ]:  # fmt: skip
        write_model(tmp_path / "models" / name, drop, word)
    options = ["--domains", "domains", "--words", "words", "--models", "models", "--benchmark"]
    options = [str(tmp_path / name) if not name.startswith("--") else name for name in options]
    options += [f"sums={tmp_path / 'sums.jsonl'}:question", "--threads", "1", "--output", str(tmp_path / "out")]
    assert wanjuan.main(["web", "--input", str(tmp_path / "in.jsonl"), *options]) == 0
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet").to_pylist()
    assert {row["path"]: row["reason"] for row in dropped} == {
        "https://www.ads.example/1": "blocked_domain",
        "words": "blocked_words",
        "toxic": "toxic",
        "advert": "advertisement",
        "stutter": "not_fluent",
        "benchmark": "contaminated",
    }
    (kept,) = pq.read_table(tmp_path / "out" / "documents").to_pylist()
    assert "[EMAIL]" in kept["text"] and json.loads(kept["meta"])["personal_data_masked"] == {"email": 1}
    assert set(json.loads(kept["meta"])["scores"]) == {"toxicity", "advertisement", "fluency"}
    (tmp_path / "models" / "toxicity").rename(tmp_path / "models" / "rudeness")
    assert wanjuan.main(["web", "--input", str(tmp_path / "in.jsonl"), *options]) == 1
    assert "rudeness" in (said := capsys.readouterr().err) and "with names of toxicity, adult_content" in said
    into_a_file = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "words" / "out"), "--threads", "1"]
    assert wanjuan.main(["code", *into_a_file]) == 1 and (tmp_path / "words").is_file()
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and "words" in said[-1] and not any("Traceback" in line for line in said)
    for chain, wrong in [
        ("code", "--domains x"),
        ("web", "--licences MIT"),
        ("reference", "--models x"),
        ("code", "--models x"),
        ("web", "--tier-low 0.1"),
        ("code", "--tier-high 0.9"),
        ("mixed", "--high-weight 2"),
        ("code", "--tiers --high-weight 2.5"),
    ]:
        with pytest.raises(SystemExit):
            wanjuan.main([chain, "--input", "x", "--output", "y", *wrong.split()])


def test_the_code_chain_reads_licences_languages_and_tiers(tmp_path):
    write_model(tmp_path / "code_quality", "below", "careful")
    files = {
        "LICENSE": "GNU GENERAL PUBLIC LICENSE Version 2, June 1991",
        "gpl.py": FUNCTION,
        "mit/COPYING": "Apache License, Version 2.0",
        "mit/good.py": FUNCTION.replace("def ", "def careful_") + '"""' + "careful " * 8 + '"""\n',
        "mit/poor.rs": 'fn main() {\n    println!("a bargain");\n}\n',
        "mit/poor.py": FUNCTION.replace("value", "bargain"),
        "mit/README.md": GOOD,
        "mit/short.md": "Short.",
    }
    documents = [
        make_document(text, source="s", path=f"r/{path}", domain="code", meta={"repository": "r"})
        for path, text in files.items()
    ]
    given = wanjuan.Given(
        models=str(tmp_path), licences=frozenset({"Apache-2.0"}), tiers=Tiers(low=0.5, languages=("python",))
    )
    ledger = Ledger()
    kept = wanjuan.run_chain(documents, wanjuan.code_files(given), ledger)
    assert {fate.path.removeprefix("r/"): fate.reason for fate in fates(ledger)} == {
        "LICENSE": "licence_text",
        "gpl.py": "licence_not_allowed",
        "mit/COPYING": "licence_text",
        "mit/poor.py": "low_quality",
        "mit/short.md": "few_words",
    }
    found = {d.path.removeprefix("r/mit/"): (d.language, d.domain, d.licence, d.meta.get("tier")) for d in kept}
    assert found == {
        "README.md": ("markdown", "reference", "Apache-2.0", None),
        "good.py": ("python", "code", "Apache-2.0", "high"),
        "poor.rs": ("rust", "code", "Apache-2.0", "moderate"),
    }
    (tmp_path / "code_quality").rename(tmp_path / "fluency")
    with pytest.raises(ValueError, match="holds no code_quality, which tiers go by"):
        wanjuan.code_files(given)


def test_high_tier_code_is_repeated_as_the_command_says(tmp_path, capsys):
    """From scores in meta to the rows of a mixture."""

    def of_code(name):
        return "".join(f"def {name}_{i}(given):\n    return {name} + given * {i}\n\n\n" for i in range(9))

    tokenizer = train_tokenizer([of_code("a")], vocab_size=300)
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    rows = [
        {"text": of_code(name), "path": name, "domain": "code", "language": "python", "quality": q}
        for name, q in (("a", 0.95), ("b", 0.9), ("c", 0.89), ("d", 0.3), ("e", 0.29))
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = "--tiers python --tier-high 0.9 --tier-low 0.3 --high-weight 4 --threads 1".split()
    chain = ["code", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "clean")]
    assert wanjuan.main([*chain, *options]) == 0
    kept = {document.path: document.meta for document in sources.read([tmp_path / "clean"])}
    wanted = {"a": ("high", 4), "b": ("high", 4), "c": ("moderate", 1), "d": ("moderate", 1)}
    assert {path: (meta["tier"], meta["weight"]) for path, meta in kept.items()} == wanted
    where = ["--tokenizer", str(tmp_path / "tokenizer"), "--output", str(tmp_path / "tokens"), "--times", "weight"]
    assert tokens.main(["--input", str(tmp_path / "clean"), *where]) == 0
    rows = open_mixture(make_sources([str(tmp_path / "tokens")]), seq_len=4096, packing="whole", seed=0)
    pieces = [piece for row in range(rows.num_rows) for piece in rows.pieces(row)]
    assert sorted(Counter(piece.document for piece in pieces).values()) == [1, 1, 4, 4]
    assert wanjuan.main([*chain, "--tiers", "--tier-high", "2"]) == 1
    assert "wanted 0 <= low <= high <= 1" in capsys.readouterr().err


@pytest.mark.slow
def test_embedded_corpus_through_the_chain():
    ledger = Ledger()
    given = embedded.stdlib_corpus()
    kept = wanjuan.run_chain(given, wanjuan.CHAIN, ledger)
    counts = summary(ledger)
    assert counts["documents_in"] == len(given) == len(kept) + counts["documents_dropped"]
    assert 0.6 < len(kept) / len(given) < 0.95
    reasons = counts["dropped"]["code_rules"]
    assert reasons["generated"] > 30 and reasons["data_only"] > 10
    said = {fate.path: fate.reason for fate in fates(ledger) if fate.stage == "code_rules"}
    assert said["stdlib/pydoc_data/topics.py"] == "generated"
    files = {d.path.removeprefix("stdlib/"): d.text for d in kept if d.source == "stdlib"}
    assert "argparse.py" in files and "struct.py" in files
    graph = code.import_graph(files)
    part = {path: number for number, paths in enumerate(code.components(graph)) for path in paths}
    place = {d.path.removeprefix("stdlib/"): i for i, d in enumerate(kept) if d.source == "stdlib"}
    outside = [(a, b) for a in graph for b in graph[a] if part[a] != part[b]]
    assert len(outside) > 1000
    assert all(place[needed] < place[path] for path, needed in outside)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "data_pipelines.wanjuan", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_command_writes_the_folder_and_replaces_only_its_own(tmp_path, documents):
    lines = [
        json.dumps({"text": d.text, "path": d.path, "domain": d.domain, "language": d.language}) for d in documents
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    out = tmp_path / "a folder"
    done = command("mixed", "--input", tmp_path / "in.jsonl", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "9 documents in, 4 kept, 1 rows could not be read" in done.stdout
    assert "in.jsonl:10: not valid JSON" in done.stderr
    assert pq.read_table(out / "documents").num_rows == 4
    assert json.loads((out / "ledger.json").read_text())["documents_kept"] == 4
    strict = command("mixed", "--input", tmp_path / "in.jsonl", "--output", out, "--strict")
    assert strict.returncode == 1 and "in.jsonl:10" in strict.stderr and "Traceback" not in strict.stderr
    assert pq.read_table(out / "documents").num_rows == 4
    foreign = command("mixed", "--input", tmp_path / "in.jsonl", "--output", tmp_path)
    assert foreign.returncode == 1 and "was not written by this command" in foreign.stderr
    assert (tmp_path / "in.jsonl").exists()


def test_a_repository_folder_becomes_one_markdown_text(tmp_path):
    root = tmp_path / "repo"
    root.mkdir()
    (root / "a.py").write_text("import b\n")
    (root / "b.py").write_text(FUNCTION)
    (root / "README.md").write_text(GOOD)
    kept = wanjuan.run_chain(sources.read([root]), wanjuan.CHAIN, Ledger())
    assert [d.path for d in kept] == ["repo/README.md", "repo/b.py", "repo/a.py"]
    wanjuan.main(["mixed", "--input", str(root), "--output", str(tmp_path / "clean"), "--threads", "1"])
    (line,) = (tmp_path / "clean" / "repositories.jsonl").read_text().splitlines()
    text = json.loads(line)["text"]
    assert [d.path for d in sources.read([tmp_path / "clean"])] == [d.path for d in kept]
    assert text.index("## README.md") < text.index("## b.py") < text.index("## a.py")


def test_the_readme_holds(tmp_path, monkeypatch, capsys):
    readme = (Path(wanjuan.__file__).parent / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"```sh\npython -m data_pipelines\.wanjuan (mixed .*)\n```", readme)
    programs = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "notes.jsonl").write_text(json.dumps({"text": GOOD}) + "\n")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "area.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    assert wanjuan.main(line.split()) == 0
    assert json.loads((tmp_path / "clean" / "ledger.json").read_text())["documents_kept"] == 2
    for name in ("documents/00000.parquet", "repositories.jsonl", "dropped.parquet", "set_aside.txt"):
        assert (tmp_path / "clean" / name).is_file()
    monkeypatch.setattr(embedded, "package_documents", list)  # its time, not its truth
    exec(compile(programs[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith(": kept\n")
    (of_code,) = (program for program in programs if "code_files(" in program)
    exec(compile(of_code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("r/area.py python MIT high 3\n") and "contaminated" in said and "sums" in said


def test_all_dropped_before_a_decision_over_the_corpus_is_said():
    """Batches of which nothing is left reach no sketch."""
    documents = [make_document("no", source="s", path=f"{n}.txt") for n in range(3)]
    gone = Stage("gone", "batch", lambda batch: Outcome(batch, ["gone"] * batch.num_rows, [None] * batch.num_rows))
    with pytest.raises(ValueError, match=r"all 3 documents were dropped: gone \(3\)"):
        wanjuan.run_chain(documents, (gone, *wanjuan.REFERENCE_TEXT), Ledger())
