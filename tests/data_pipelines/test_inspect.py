"""The page of a run says what the run did, another run confirms its sliders, and a document's fate is told whole."""

import dataclasses
import html
import json
import random
import re
import shutil
import subprocess
from itertools import combinations

import pyarrow.parquet as pq
import pytest

from data_pipelines import executors, fate, inspect, sources, wanjuan
from data_pipelines.dedup import NearDuplicates, exact_duplicates, near_duplicates
from data_pipelines.document import Stage
from data_pipelines.ledger import explain_run
from data_pipelines.pii import masked
from data_pipelines.rules import REFERENCE, TextRules, edit, normalise_text, text_rules
from data_pipelines.tokens import text_documents, write_tokens
from internjax.text.tokenizer import train_tokenizer
from tests.test_report import Checker

EVIL = "<script>alert(1)</script>"


def stages(rules: TextRules) -> list[Stage]:
    return [
        Stage("normalise", "batch", edit(normalise_text)),
        Stage("rules", "batch", text_rules(rules)),
        Stage("personal_data", "batch", masked()),
        Stage("exact_duplicates", "corpus", exact_duplicates),
        Stage("near_duplicates", "corpus", near_duplicates(NearDuplicates())),
    ]


def run(folder, output, *, rules=REFERENCE, keep_dropped=True):
    with executors.local(1) as run_tasks:
        wanjuan.run_files([folder / "in.jsonl"], stages(rules), folder / output, run_tasks, keep_dropped=keep_dropped)
    return folder / output


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Texts of 6 to 64 words, a chain of four near duplicates, a copy, personal data, a repeated line, a broken row."""
    rng = random.Random(3)

    def text(number):
        return (
            " ".join(f"{rng.choice('the of and to be'.split())} word{rng.randrange(900)}" for _ in range(number)) + "."
        )

    texts = [text(number // 2 + 3) for number in range(60)]
    words = text(60).split()
    for changed in range(4):
        texts.append(" ".join(f"new{place}" if place < 12 * changed else word for place, word in enumerate(words)))
    texts += [texts[10].upper(), f"{text(30)} Ask joe@mail.example.com.", f"{EVIL} again\n" * 40, "\u200b"]
    folder = tmp_path_factory.mktemp("inspect")
    rows = [json.dumps({"text": text, "source": "ab"[n % 2], "language": "en"}) for n, text in enumerate(texts)]
    (folder / "in.jsonl").write_text("\n".join([*rows, "{broken"]) + "\n")
    return folder


@pytest.fixture(scope="module")
def done(corpus):
    return run(corpus, "out")


@pytest.fixture(scope="module")
def page(done):
    return inspect.write_page(done).read_text()


def sliders(page):
    """Label -> [(threshold, share, words)], and which is in use."""
    found = {}
    for figure in re.findall(r'<figure class="chart slider".*?</figure>', page):
        attributes = dict(Checker(figure).attributes)
        label = re.search(r"<figcaption>(.*?) <output>", figure)[1]
        found[label] = json.loads(attributes["data-stops"]), int(attributes["data-now"])
    return found


def test_the_page_needs_nothing_but_itself_and_says_what_the_ledger_says(done, page):
    checker = Checker(page)
    assert checker.tags.count("script") == 1 and not {"img", "link", "iframe"} & set(checker.tags)
    assert not [name for name, _ in checker.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert "http" not in page.replace(EVIL, "") and "prefers-color-scheme:dark" in page and "@media (max-width" in page
    text, counts = "".join(checker.text), json.loads((done / "ledger.json").read_text())
    for said in (
        f"Documents in{counts['documents_in']}",
        f"{counts['documents_kept']} ({counts['documents_kept'] / counts['documents_in']:.1%} of raw)",
        "From raw to kept", "What they are like", "Masked data and tiers", "in.jsonl", "not valid JSON",
    ):  # fmt: skip
        assert said in text, said
    reasons = {reason for stage in counts["stages"] for reason in stage["dropped"]}
    assert {"empty", "few_words", "near_duplicate", "exact_duplicate"} < reasons
    assert all(f"{reason} of " in text for reason in reasons)
    assert f"en{counts['documents_in']}{counts['documents_dropped']}few_words (" in text
    assert "alert(1)" in text and EVIL not in page, "what was dropped is shown, not run"
    assert (done / "inspect.md").read_text().count("## ") >= 8


@pytest.mark.parametrize(("label", "field"), [("few words", "min_words"), ("long line", "max_line_characters")])
def test_a_slider_tells_what_a_run_with_that_threshold_keeps(corpus, page, label, field, tmp_path):
    stops, now = sliders(page)[label]
    values = [float(stop[0].replace(",", "")) for stop in stops]
    assert values[now] == getattr(REFERENCE, field)
    for place in {now, len(stops) // 2, len(stops) - 1}:
        rules = dataclasses.replace(REFERENCE, **{field: values[place]})
        folder = run(corpus, f"{field}-{place}", rules=rules)
        stage = json.loads((folder / "ledger.json").read_text())["stages"][1]
        said = stops[place][2]
        assert said.startswith(f"{stage['documents_kept']} documents ({stops[place][1]:.1%})"), said
        assert f"and {inspect.size(stage['bytes_kept'])} stay" in said


# A reader moves the slider to its end and follows the link to the samples; the title then says what is to be seen.
VISIT = """<script>addEventListener("load", () => {
  const box = [...document.querySelectorAll(".slider")].find((each) => each.textContent.startsWith("few words"));
  const input = box.querySelector("input"), section = document.querySelector("[id$=samples-of-what-was-dropped]");
  input.value = input.max;
  input.dispatchEvent(new Event("input"));
  document.querySelector(`nav a[href="#${section.id}"]`).click();
  const text = section.querySelector(".samples pre");
  document.title = JSON.stringify({
    number: box.querySelector("output").textContent,
    said: box.querySelector(".said").textContent,
    width: parseFloat(box.querySelector(".part").style.width),
    back: box.querySelector("button").checkVisibility(),
    heading: section.getBoundingClientRect().top,
    sample: text.checkVisibility() && text.textContent,
    styled: getComputedStyle(document.querySelector(".samples")).display,
  });
});</script>"""


def test_in_a_browser_a_slider_answers_and_the_samples_are_shown(page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{VISIT}</body>"))
    how = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "page.html").as_uri()
    done = subprocess.run([browser, *how, address], capture_output=True, text=True, timeout=120)
    seen = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    stops, _ = sliders(page)["few words"]
    assert [seen["number"], round(seen["width"] / 100, 4), seen["said"]] == [stops[-1][0], *stops[-1][1:]]
    assert seen["back"] and seen["styled"] == "grid" and 0 <= seen["heading"] < 100
    assert seen["sample"] and html.escape(seen["sample"]) in page


def test_a_run_that_drops_and_measures_nothing_has_a_page_too(corpus):
    with executors.local(1) as run_tasks:
        wanjuan.run_files([corpus / "in.jsonl"], stages(REFERENCE)[2:3], corpus / "all", run_tasks)
    page = inspect.write_page(corpus / "all").read_text()
    assert "From raw to kept" in page and not {"Thresholds", "Reasons"} & set(re.findall("<h2>(.*?)</h2>", page))
    assert "<script>" not in page


def test_without_the_text_the_page_says_how_to_get_it(corpus):
    page = inspect.write_page(run(corpus, "textless", keep_dropped=False)).read_text()
    assert "--keep-dropped" in page and "its text was not kept" in page and "alert(1)" not in page


def jaccard(one, other):
    sets = [{tuple(words[at : at + 5]) for at in range(len(words) - 4)} for words in (one.split(), other.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_groups_of_near_duplicates_are_measured(done, page):
    found = json.loads((done / "ledger.json").read_text())["reports"]["near_duplicates"]
    group = max(found["shown"], key=lambda group: group["size"])
    assert found["sizes"]["4"] == 1 and group["size"] == len(group["members"]) == 4
    texts = {document.id: document.text for document in sources.read([done])}
    texts |= {row["id"]: row["text"] for row in pq.read_table(done / "dropped.parquet").to_pylist()}
    plain = {name: re.sub(r"[^a-z0-9 ]", "", texts[name].lower()) for name in group["members"]}
    all_pairs = {pair: jaccard(plain[pair[0]], plain[pair[1]]) for pair in combinations(group["members"], 2)}
    for name, value in (("nearest", max(all_pairs.values())), ("farthest", min(all_pairs.values()))):
        a, b, similarity = group[name]
        assert similarity == pytest.approx(value, abs=1e-6)
        assert similarity == pytest.approx(all_pairs[group["members"][a], group["members"][b]], abs=1e-6)
    assert group["farthest"][2] < 0.7 <= group["nearest"][2], "a group is a chain"
    assert group["below_threshold"] == sum(value < 0.7 for value in all_pairs.values()) and group["pairs"] == 6
    assert f"{1 - group['farthest'][2]:.3f}" in page
    assert sum(found["ties"]["documents"]) == sum((int(size) - 1) * n for size, n in found["sizes"].items())
    for gone, partner, similarity in found["pairs"]:
        assert jaccard(texts[gone].lower().replace(".", ""), texts[partner].lower().replace(".", "")) == pytest.approx(
            similarity, abs=1e-6
        )


def test_the_whole_way_of_a_document(done, tmp_path):
    kept = sources.read([done])
    tokenizer = train_tokenizer([document.text for document in kept], vocab_size=300)
    write_tokens(
        tmp_path / "tokens", text_documents([(d.id, d.text) for d in kept], tokenizer), tokenizer=tokenizer,
        shard_tokens=2000,
    )  # fmt: skip
    one = kept[20]
    told = fate.tell(done, document=one.id[:12], tokens=tmp_path / "tokens")
    assert told.startswith(explain_run(done, one.id)) and f"documents/00000.parquet, row {20}" in told
    assert re.search(r"^rules +passed$", told, re.MULTILINE) and re.search(r"few_words +\d+ +goes below 12", told)
    shard, start, stop = re.search(r"tokens/(\d+)\.bin, tokens ([\d,]+) to ([\d,]+)", told).groups()
    raw = (tmp_path / "tokens" / f"{shard}.bin").read_bytes()
    start, stop = (2 * int(number.replace(",", "")) for number in (start, stop))
    ids = [int.from_bytes(raw[at : at + 2], "little") for at in range(start, stop, 2)]
    assert tokenizer.decode(ids[1:-1]) == one.text
    near = next(row for row in pq.read_table(done / "dropped.parquet").to_pylist() if row["stage"] == "near_duplicates")
    told = fate.tell(done, path=near["path"].split("/")[-1], tokens=tmp_path / "tokens")
    partner = re.search(r"tied to ([0-9a-f]{32}), Jaccard 0\.\d{3}", told)[1]
    assert f"{partner} is " in told and "near_duplicates          dropped: near_duplicate" in told
    assert "tokens  " not in told and near["text"][:100] in told
    short = next(row for row in pq.read_table(done / "dropped.parquet").to_pylist() if row["reason"] == "few_words")
    assert re.search(r"✗ few_words", fate.tell(done, document=short["id"]))


def test_what_is_not_there_is_said_with_what_is_near(done, tmp_path, capsys):
    name = sources.read([done])[0].id
    typed = name[:9] + ("0" if name[9] != "0" else "1") + name[10:]
    with pytest.raises(ValueError, match=rf"no document .* begins with '{typed}'; near it: {name} \("):
        fate.tell(done, document=typed)
    with pytest.raises(ValueError, match=f"near it: {name}"):
        fate.tell(done, document=name[:9] + name[10:])
    with pytest.raises(ValueError, match="none is near it; --path finds documents"):
        fate.tell(done, document="zz")
    with pytest.raises(ValueError, match=r"ids of this run begin with '', among them|none is near it"):
        fate.tell(done, document="")
    with pytest.raises(ValueError, match=r"has the path 'in\.json:3'; near it: in\.jsonl:"):
        fate.tell(done, path="in.json:3")
    assert inspect.main([str(done), "--document", typed]) == 1 and "near it" in capsys.readouterr().err
    assert inspect.main([str(done), "--document", name]) == 0 and f"{name}: kept" in capsys.readouterr().out
    assert inspect.main([str(done.parent)]) == 1 and "holds no run: it has no ledger.json" in capsys.readouterr().err
    (tmp_path / "ledger.json").write_text("{}")
    assert inspect.main([str(tmp_path)]) == 1 and "its ledger has format None" in capsys.readouterr().err
    assert inspect.main([str(done)]) == 0 and capsys.readouterr().out == f"{done / 'inspect.html'}\n"
