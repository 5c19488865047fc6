import json
import random
import re
import shlex
import shutil
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
import scipy

from data_pipelines import classifier, hashing, quality, quality_training
from data_pipelines.classifier import Classifier, Settings, Threshold, classified, open_classifier, text_rows
from data_pipelines.document import Stage, make_document, to_batch, to_documents
from data_pipelines.ledger import Ledger
from data_pipelines.pii import masked
from data_pipelines.safety import WordBounds, blocked_domains, blocked_words
from data_pipelines.wanjuan import run_chain

PLAIN = "the river runs by the old town and 人们 在 河边 散步 while boats carry stone to the harbour wall".split()
ADVERT = "buy cheap watches now 优惠 价格 免费 click here order today best price discount shipping offer".split()


def make_rows(count=400, seed=0):
    """Advertisements (1) and plain texts (0), half of the words of each common to both."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = [draw.choice(ADVERT if label and draw.random() < 0.5 else PLAIN) for _ in range(draw.randint(5, 40))]
        rows.append({"text": f"{' '.join(words)}. {number}", "label": label, "language": "en", "domain": "web"})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that the command wrote, from 400 rows with a second annotator who errs in 20 of the first 200."""
    folder = tmp_path_factory.mktemp("quality")
    rows = make_rows()
    for number, row in enumerate(rows[:200]):
        row["second"] = 1 - row["label"] if number % 10 == 0 else row["label"]
    data = write_rows(folder / "rows.jsonl", rows)
    arguments = ["train", "--data", data, "--output", str(folder / "advertisement"), "--drop", "above"]
    assert (
        quality.main([*arguments, "--second-label-field", "second", "--log2-buckets", "14", "--held-out", "0.4"]) == 0
    )
    return folder / "advertisement"


def test_of_rows_with_one_id_and_text_the_last_label_holds(tmp_path):
    rows = [{"id": "a", "text": "x", "label": 0}, {"text": "x", "label": 0}, {"id": "a", "text": "y", "label": 0}]
    data = write_rows(tmp_path / "rows.jsonl", [*rows, {"id": "a", "text": "x", "label": 1}])
    found = quality.read_labelled([data])
    assert found.texts == ["x", "x", "y"] and found.labels_D.tolist() == [1, 0, 0]


def batch_of(*texts, language="en", **meta):
    documents = [make_document(t, source="s", path=f"p{i}", language=language, meta=meta) for i, t in enumerate(texts)]
    return to_batch(documents)


# --- the model -------------------------------------------------------------------------------------------------------


def test_the_trained_folder_tells_advertisements_from_plain_text(model):
    manifest = json.loads((model / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert metrics["area_under_curve"] > 0.97 and metrics["precision"] >= 0.9 and metrics["recall"] > 0.8
    assert metrics["num_disagreed"] == 20 and metrics["kappa"] == pytest.approx(0.8)
    assert sum(metrics["num_documents"].values()) == 380
    page = (model / "report.html").read_text()
    assert "Precision and recall" in page and "Borderline" in page and "<script" not in page
    assert json.loads((model / "report.json").read_text())["metrics"] == metrics


def test_the_stage_drops_by_the_chosen_threshold_and_keeps_scores(model):
    stage = classified(model, drop="above", reason="advertisement")
    texts = [" ".join(ADVERT), " ".join(PLAIN), "...", " ".join(PLAIN * 200) + " ".join(ADVERT * 80)]
    outcome = stage(batch_of(*texts, scores={"fluency": 0.5}))
    assert outcome.reasons == ["advertisement", None, "unscored", "advertisement"]
    value = open_classifier(model).thresholds[0].value
    assert outcome.details[0].endswith(f"is above {value:.4f} (*, *)") and "no word" in outcome.details[2]
    (check,) = outcome.checks
    assert check.fails().tolist() == [True, False, False, True] and np.isnan(check.values_D[2])
    assert (check.bound, check.side, check.of) == (value, "above", "")
    scores = [document.meta["scores"] for document in to_documents(outcome.batch)]
    assert scores[2] == {"advertisement": None, "fluency": 0.5} and scores[0]["advertisement"] > value
    assert stage(batch_of(*texts).slice(1, 2)).reasons == [None, "unscored"]
    assert stage(batch_of()).reasons == []
    assert classified(model, drop="above", reason="x", threshold=0.999999)(batch_of(*texts[:2])).reasons == [None, None]


def test_a_model_that_scores_nothing_fails_the_run(model):
    documents = [make_document("!", source="s", path=f"p{n}") for n in range(3)]
    chain = (Stage("advertisements", "batch", classified(model, drop="above", reason="advertisement")),)
    with pytest.raises(ValueError, match=r"all 3 documents were dropped: unscored \(3\)"):
        run_chain(documents, chain, Ledger())


def test_the_stages_can_be_sent_to_another_process(model, tmp_path):
    """As Ray sends them: by value, with what they hold."""
    (tmp_path / "list.txt").write_text("bad.example\n")
    batch = batch_of("write to a@b.com at bad.example", " ".join(ADVERT), url="https://bad.example/")
    for stage in (
        classified(model, drop="above", reason="advertisement"),
        masked(),
        blocked_domains([tmp_path / "list.txt"]),
        blocked_words([tmp_path / "list.txt"], WordBounds(0, 0)),
    ):
        sent = cloudpickle.loads(cloudpickle.dumps(stage))
        assert sent(batch).reasons == stage(batch).reasons and sent(batch).batch.equals(stage(batch).batch)


def test_scores_do_not_depend_on_the_batch(model):
    held = open_classifier(model)
    texts = [row["text"] for row in make_rows(30, seed=5)] + ["", " ".join(ADVERT) * 300]
    together = classifier.margins(text_rows(texts), held)
    alone = [float(classifier.margins(text_rows([text]), held)[0]) for text in texts]
    np.testing.assert_array_equal(together, alone)


def test_equal_data_give_equal_bytes(model):
    rows = make_rows(120)
    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    first, second = (classifier.fit(texts, labels, Settings(log2_buckets=12, epochs=2)) for _ in range(2))
    assert first.weights.tobytes() == second.weights.tobytes() and first.bias == second.bias


def test_margins_are_those_of_the_formula():
    """bias + sum of weights / sqrt(number of n-grams), over buckets that a slow count of distinct n-grams bears out."""
    weights = np.ones(1 << 20, np.float32)
    held = Classifier(Settings(log2_buckets=20), weights, bias=-1.0)
    # ab, c, their pair; "ab ", "b c" and "ab c" ; white space counts once
    assert classifier.margins(text_rows(["ab \n c"]), held)[0] == pytest.approx(-1 + 6 / np.sqrt(6))
    # two Han characters, their pair; no three characters
    assert classifier.margins(text_rows(["中文"]), held)[0] == pytest.approx(-1 + 3 / np.sqrt(3))
    same = classifier.margins(text_rows(["AB 12  c", "ab 12 C"]), held._replace(weights=np.arange(1 << 20, dtype="f4")))
    assert same[0] == same[1]


def test_windows_tile_every_row_at_spaces_or_characters():
    texts = ["word " * 50, "", "中" * 100, "x" * 95, "short"]
    cut = classifier.cut_windows(text_rows(texts), 40)
    data = cut.data.tobytes()
    pieces = [data[a:b].decode() for a, b in zip(cut.bounds[:-1], cut.bounds[1:])]
    for row, text in enumerate(texts):
        assert "".join(piece for piece, owner in zip(pieces, cut.rows) if owner == row) == text
    assert all(piece.endswith(" ") for piece in pieces[:5]) and len(pieces) == 6 + 1 + 8 + 2 + 1
    assert max(map(len, pieces)) <= 80


@pytest.mark.parametrize(("drop", "worst"), [("above", [5.0, 4.0]), ("below", [1.0, 2.0])])
def test_a_long_document_scores_as_its_worst_windows(drop, worst, monkeypatch):
    def planted(data, bounds, hashes, starts, weights, bias, scratch, out):
        out[:] = [3.0, 5.0, np.nan, 1.0, 4.0, 2.0]

    monkeypatch.setattr(hashing, "margins", planted)
    held = Classifier(Settings(drop=drop, window_bytes=10, worst_windows=2), np.zeros(4, np.float32), 0.0)
    assert classifier.margins(text_rows(["a" * 60]), held)[0] == np.mean(worst)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "weights.npy").unlink(), "holds no classifier"),
        (lambda folder: (folder / "weights.npy").write_bytes(b"x"), "altered"),
        (lambda folder: edit(folder, format=9), "format 9"),
        (lambda folder: edit(folder, thresholds=[]), "no threshold for all"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(change, message, model, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("manifest.json", "weights.npy"):
        (folder / name).write_bytes((model / name).read_bytes())
    open_classifier(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        open_classifier(folder)


def edit(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | values))


def test_the_wrong_side_is_refused(model):
    with pytest.raises(ValueError, match="give drop='above', or train with --drop below"):
        classified(model, drop="below", reason="x")
    with pytest.raises(ValueError, match="threshold is 2"):
        classified(model, drop="above", reason="x", threshold=2)


# --- calibration and thresholds --------------------------------------------------------------------------------------


def test_calibration_is_the_least_loss():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 200)
    margins = 3 * labels + draw.normal(size=200) * 2 - 4
    slope, offset = quality_training.calibrate(margins, labels)
    high, low = (labels.sum() + 1) / (labels.sum() + 2), 1 / ((1 - labels).sum() + 2)
    targets = np.where(labels, high, low)
    best = scipy.optimize.minimize(
        lambda t: np.sum(np.logaddexp(0, t[0] * margins + t[1]) - targets * (t[0] * margins + t[1])), [0, 0]
    )
    np.testing.assert_allclose([slope, offset], best.x, atol=1e-4)


def test_measures_by_hand():
    first, second = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 1]), np.array([1, 0, 0, 0, 1, 0, 0, 1, 0, 1])
    assert quality_training.kappa(first, second) == pytest.approx((0.8 - 0.52) / 0.48)
    assert quality_training.kappa(np.ones(3), np.ones(3)) == 1.0
    scores, labels = np.array([0.9, 0.8, 0.8, 0.3, 0.1]), np.array([1, 0, 1, 1, 0])
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels == 1] for b in scores[labels == 0]]
    assert quality_training.area_under_curve(scores, labels) == pytest.approx(np.mean(pairs))
    points = quality_training.curve(scores, labels, "above")
    assert [tuple(np.round(p, 6)) for p in points] == [
        (0.85, 1.0, 0.333333, 1), (0.55, 0.666667, 0.666667, 3), (0.2, 0.75, 1.0, 4)
    ]  # fmt: skip
    assert [p.num_dropped for p in quality_training.curve(scores, labels, "below")] == [1, 2, 4]
    assert quality_training.curve(scores, labels, "below")[0] == (0.2, 1.0, 0.5, 1)
    many = quality_training.curve(np.linspace(1, 0, 20), np.array([1] * 5 + [0] * 2 + [1] + [0] * 12), "above")
    assert [quality_training.choose(many, p).num_dropped for p in (0.9, 0.75, 0.3)] == [5, 8, 8]
    assert quality_training.choose(many[:4], 0.1) is None and quality_training.choose(many[5:7], 0.9) is None
    measured = quality_training.measure(scores, labels, "above", 0.55)
    assert (measured["precision"], measured["recall"], measured["dropped_share"]) == pytest.approx((2 / 3, 2 / 3, 0.6))


def test_thresholds_go_by_domain_and_language_where_there_are_enough():
    draw = np.random.default_rng(1)
    labels = np.tile([0, 1], 300)
    languages = ["en"] * 300 + ["zh"] * 250 + ["fr"] * 50
    scores = np.clip(0.3 * labels + 0.35 + draw.normal(size=600) * 0.1 + np.repeat([0.2, -0.2], 300), 0, 1)
    data = quality_training.Labelled([""] * 600, labels, np.full(600, -1), ["web"] * 600, languages)
    chosen, notes = quality_training.choose_thresholds(scores, data, "above", 0.9)
    held = {(item.domain, item.language): item for item in chosen}
    assert list(held) == [("*", "*"), ("*", "en"), ("*", "zh"), ("web", "en"), ("web", "zh")]
    assert held["*", "en"].value - held["*", "zh"].value > 0.3
    assert all(item.precision >= 0.9 and item.num_dropped >= 5 for item in chosen)
    assert notes[0] == "*, fr: 50 documents, fewer than 100; the wider threshold holds"
    model = Classifier(Settings(), np.zeros(2), 0.0, thresholds=tuple(chosen))
    keys = [("web", "zh"), ("book", "zh"), ("book", "fr")]
    found = [classifier.threshold_for(model, *key) for key in keys]
    assert [(item.domain, item.language) for item in found] == [("web", "zh"), ("*", "zh"), ("*", "*")]
    with pytest.raises(ValueError, match="no threshold drops at least 5 of 600 .* or a lower --precision"):
        quality_training.choose_thresholds(draw.random(600), data, "above", 0.99)


def test_a_stage_below_its_threshold(model, tmp_path):
    held = open_classifier(model)
    fluent = held._replace(
        settings=Settings(drop="below", log2_buckets=14), thresholds=(Threshold("*", "*", 0.5, 9, 9, 1, 1),)
    )
    classifier.write_classifier(tmp_path, fluent, {})
    outcome = classified(tmp_path, drop="below", reason="not_fluent")(batch_of(" ".join(ADVERT), " ".join(PLAIN)))
    assert outcome.reasons == [None, "not_fluent"] and "is below 0.5000 (*, *)" in outcome.details[1]


# --- labelled rows and commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "label": 2}], [], "rows.jsonl:1: 'label' is 2; wanted 0 or 1"),
        ([{"text": "a", "label": "ad"}], [], "with --positive NAME"),
        ([{"text": "a", "label": 1}], ["--positive", "ad"], "wanted a name, since --positive ad"),
        ([{"text": "a", "label": 1}, {"text": "b"}], [], "rows.jsonl:2: no field 'label'; it has text"),
        ([{"body": "a", "label": 1}], [], "no field 'text'; it has body, label"),
        ([{"text": 3, "label": 1}], [], "'text' is int, wanted a string"),
        ([{"text": f"{n}", "label": 1} for n in range(80)], [], "documents with label 0 and .* give more labels"),
        ([{"text": "a", "label": 1}], ["--second-label-field", "b"], "no row has the field 'b'"),
        ([{"text": "a", "label": 1}], ["--log2-buckets", "40"], "log2_buckets is 40; give 10 to 26"),
        ([], [], "0 documents with label 0"),
        (
            [{"text": f"{'ab'[n % 3 % 2]} {n}", "label": n % 2} for n in range(200)], ["--precision", "0.99"],
            "nothing was learned|no threshold drops",
        ),
    ],
)  # fmt: skip
def test_labels_that_do_not_suffice_are_one_clear_message(rows, options, message, tmp_path, capsys):

    data = write_rows(tmp_path / "rows.jsonl", rows)
    output = tmp_path / "model"
    assert quality.main(["train", "--data", data, "--output", str(output), "--drop", "above", *options]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1
    assert not output.exists()


def test_the_score_command_adds_scores(model, tmp_path, capsys):
    rows = [{"body": " ".join(ADVERT), "n": 1}, {"body": "!", "scores": {"old": 1}}, {"body": " ".join(PLAIN)}]
    given = write_rows(tmp_path / "pages.jsonl", rows)
    output = tmp_path / "scored.jsonl"
    arguments = ["score", "--classifier", str(model), "--input", given, "--output", str(output)]
    assert quality.main([*arguments, "--text-field", "body"]) == 0
    assert "3 rows, scored 2 by advertisement" in capsys.readouterr().out
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert scored[0]["n"] == 1 and scored[0]["scores"]["advertisement"] > 0.9 > scored[2]["scores"]["advertisement"]
    assert scored[1]["scores"] == {"old": 1, "advertisement": None}
    assert quality.main(arguments) == 1 and "name the field of the text" in capsys.readouterr().err
    write_rows(tmp_path / "pages.jsonl", [{"text": "!"}])
    assert quality.main(arguments) == 1 and "scored none of 1 rows" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pages.jsonl", "scored.jsonl"]


def test_the_commands_and_stages_of_the_readme_hold(model, tmp_path):
    text = (Path(quality.__file__).parent / "README.md").read_text("utf-8")
    commands = re.findall(r"^python -m data_pipelines.quality (.*)", text, re.MULTILINE)
    assert [quality._parser().parse_args(shlex.split(command)).command for command in commands] == ["train", "score"]
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "not_fluent" in code]
    scope = {}
    exec(compile(code, "data_pipelines/README.md", "exec"), scope)
    shutil.copytree(model, tmp_path / "advertisement")
    shutil.copytree(model, tmp_path / "fluency")
    edit(
        tmp_path / "fluency", settings=json.loads((model / "manifest.json").read_text())["settings"] | {"drop": "below"}
    )
    assert [stage.name for stage in scope["quality_stages"](tmp_path)] == ["advertisements", "fluency"]
