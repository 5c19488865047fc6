"""The runner on scripted models: scores computed by hand, the log, and every refusal."""

import json
import math

import pytest

from eval import metrics
from eval.model import Completion, EvalModel, Score
from eval.report import markdown, rows, verdict
from eval.run import check, compare, evaluate
from eval.task import (
    ChoiceItem,
    ChoiceTask,
    GenerateItem,
    GenerateTask,
    TextItem,
    TextTask,
    fingerprint,
    per_byte,
    per_token,
    total,
)

CHOICES = ChoiceTask(
    "letters",
    1,
    tuple(ChoiceItem(f"i{n}", f"q{n}", (" a", " bb", " ccc", " dddd"), n % 4) for n in range(8)),
    rank=total,
)
WORDS = GenerateTask("words", 2, tuple(GenerateItem(f"w{n}", f"say {n}:", f"word{n}") for n in range(4)))
TEXTS = TextTask("texts", 1, (TextItem("one", "abcd"), TextItem("two", "語語")))


def scripted(*, prefers=" bb", completions=None, logprob=-4 * math.log(2), is_cut=False):
    """A model that prefers one choice wherever it may, and writes `completions[prompt]`."""

    def loglikelihood(pairs):
        return [
            Score(logprob if context == "" else -1.0 if text == prefers else -9.0, len(text), False, is_cut)
            for context, text in pairs
        ]

    def generate(prompts, *, max_new_tokens, stop=()):
        return [completions[prompt] for prompt in prompts]

    return EvalModel(loglikelihood, generate)


SAID = {
    "say 0:": Completion(" word0 "),
    "say 1:": Completion("\n\n word1"),
    "say 2:": Completion("word3", is_capped=True),
    "say 3:": Completion("", is_cut=True),
}


def test_scores_counts_and_intervals_by_hand():
    letters, words, texts = evaluate(scripted(completions=SAID), [CHOICES, WORDS, TEXTS])
    assert (letters.metric, letters.chance, letters.num_items) == ("accuracy", 0.25, 8)
    assert letters.interval == metrics.wilson(2, 8)  # " bb" is right in two of eight
    assert words.interval == metrics.wilson(2, 4)
    assert (words.num_capped, words.num_unparsed, words.num_cut, words.chance) == (1, 1, 1, 0.0)
    # 4 bits for each of two documents, of 4 and 6 bytes.
    assert texts.interval.value == pytest.approx(8 / 10)
    assert texts.interval.low == pytest.approx(4 / 6) and texts.interval.high == pytest.approx(1.0)
    assert [record["value"] for record in texts.records] == pytest.approx([1.0, 4 / 6])


def test_cut_contexts_are_counted_per_item():
    (result,) = evaluate(scripted(is_cut=True), [CHOICES])
    assert result.num_cut == 8


@pytest.mark.parametrize("rank, chosen", [(total, 0), (per_byte, 3), (per_token, 2)])
def test_ranks_differ_where_lengths_do(rank, chosen):
    scores = {" a": Score(-2.0, 1, False), " bb": Score(-3.0, 1, False), " ccc": Score(-3.6, 4, False)}
    scores[" dddd"] = Score(-4.0, 2, False)

    def loglikelihood(pairs):
        return [scores[text] for _, text in pairs]

    task = ChoiceTask("t", 1, CHOICES.items, rank=rank)
    (result,) = evaluate(EvalModel(loglikelihood, None), [task])
    assert {record["chosen"] for record in result.records} == {chosen}


def test_ties_go_to_the_first_choice():
    (result,) = evaluate(scripted(prefers=None), [CHOICES])
    assert [record["chosen"] for record in result.records] == [0] * 8


def test_every_sample_is_logged(tmp_path):
    evaluate(scripted(completions=SAID), [CHOICES, WORDS], log_folder=tmp_path / "log")
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == [
        "letters.jsonl",
        "results.json",
        "words.jsonl",
    ]
    records = [json.loads(line) for line in (tmp_path / "log" / "words.jsonl").read_text().splitlines()]
    assert records[2] == {
        "id": "w2",
        "value": 0.0,
        "prompt": "say 2:",
        "completion": "word3",
        "extracted": "word3",
        "answer": "word2",
        "is_capped": True,
    }
    summary = json.loads((tmp_path / "log" / "results.json").read_text())
    assert [entry["task"] for entry in summary] == ["letters", "words"]
    assert summary[1]["interval"]["value"] == 0.5 and "records" not in summary[1]
    assert summary[0]["fingerprint"] == fingerprint(CHOICES)


@pytest.mark.parametrize(
    "model, wanted",
    [
        (EvalModel(lambda pairs: [Score(-1.0, 1, True)] * 31, None), "answered 31 of 32"),
        (EvalModel(lambda pairs: [Score(-1.0, 1, True)] * 31 + [None], None), r"1 items: \['i7'\]"),
        (EvalModel(lambda pairs: [Score(math.nan, 1, True)] * 4 + [Score(-1.0, 1, True)] * 28, None), r"\['i0'\]"),
        (EvalModel(lambda pairs: [Score(-math.inf, 1, True)] * 32, None), "8 items"),
    ],
)
def test_a_partial_score_is_refused(model, wanted, tmp_path):
    with pytest.raises(ValueError, match=wanted):
        evaluate(model, [CHOICES], log_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_completions_are_refused():
    model = EvalModel(None, lambda prompts, **_: [Completion("x"), None, Completion("y"), None])
    with pytest.raises(ValueError, match=r"2 items: \['w1', 'w3'\]"):
        evaluate(model, [WORDS])


def replaced(task, **fields):
    return type(task)(**(vars(task) | fields))


def test_tasks_are_checked_on_their_own_gold():
    check(CHOICES)
    check(WORDS)
    with pytest.raises(ValueError, match="does not count as right"):
        check(replaced(WORDS, extract=lambda text: text[:3]))
    with pytest.raises(ValueError, match="does not count as right"):
        check(replaced(WORDS, extract=lambda text: None))
    with pytest.raises(ValueError, match="empty text counts as right"):
        check(replaced(WORDS, extract=lambda text: text, judge=lambda given, wanted: float(given in wanted)))
    with pytest.raises(ValueError, match="missed by a model that prefers the right continuation"):
        check(replaced(CHOICES, rank=lambda score, text: -score.logprob))


def test_a_task_whose_answer_stands_in_one_place_is_refused():
    items = tuple(ChoiceItem(f"i{n}", "q", ("a", "b", "c", "d"), 0) for n in range(20))
    with pytest.raises(ValueError, match="first choice is right in 20 of 20"):
        evaluate(scripted(), [ChoiceTask("biased", 1, items)])


def test_the_check_runs_before_the_model_is_asked():
    def loglikelihood(pairs):
        raise AssertionError("asked")

    with pytest.raises(ValueError, match="prefers"):
        evaluate(EvalModel(loglikelihood, None), [CHOICES, replaced(CHOICES, name="x", rank=lambda score, text: 0.0)])


def test_malformed_tasks_are_refused():
    with pytest.raises(ValueError, match="more than once"):
        ChoiceTask("t", 1, (CHOICES.items[0],) * 2)
    with pytest.raises(ValueError, match="no items"):
        GenerateTask("t", 1, ())
    with pytest.raises(ValueError, match="at least two"):
        ChoiceItem("i", "q", ("a",), 0)
    with pytest.raises(ValueError, match="index"):
        ChoiceItem("i", "q", ("a", "b"), 2)
    with pytest.raises(ValueError, match="empty documents"):
        TextTask("t", 1, (TextItem("i", ""),))
    with pytest.raises(ValueError, match="more than once"):
        evaluate(scripted(), [CHOICES, CHOICES])


def test_the_fingerprint_covers_items_and_rules():
    prints = {
        fingerprint(task)
        for task in (
            CHOICES,
            replaced(CHOICES, version=2),
            replaced(CHOICES, rank=per_byte),
            replaced(CHOICES, items=CHOICES.items[:-1]),
            replaced(CHOICES, items=(*CHOICES.items[:-1], ChoiceItem("i7", "q7", (" a", " bb", " ccc", " d"), 3))),
            WORDS,
            replaced(WORDS, stop=()),
            replaced(WORDS, max_new_tokens=5),
            TEXTS,
        )
    }
    assert len(prints) == 9
    assert fingerprint(CHOICES) == fingerprint(replaced(CHOICES))


def test_two_models_are_compared_item_by_item():
    right = {f"say {n}:": Completion(f"word{n}") for n in range(4)}
    first, second = (evaluate(scripted(completions=said), [WORDS])[0] for said in (SAID, right))
    comparison = compare(first, second)
    assert comparison.difference.value == 0.5
    assert comparison.test == (0, 2, 0.5)  # two discordant items: p = 2 (1/2)^2
    assert verdict(comparison).startswith("+50.0 points (+0.0 to +100.0), p = 0.5")
    with pytest.raises(ValueError, match="same task"):
        compare(first, evaluate(scripted(), [CHOICES])[0])
    texts = evaluate(scripted(), [TEXTS])[0]
    assert compare(texts, texts).test is None or set(r["value"] for r in texts.records) <= {0.0, 1.0}


def test_the_table_says_everything_beside_the_score():
    results = evaluate(scripted(completions=SAID), [CHOICES, WORDS, TEXTS])
    assert rows(results)[0] == ("letters v1", "accuracy", "25.0 %", "7.1 % to 59.1 %", "25 %", "8", "0", "0", "0")
    assert rows(results)[1][:6] == ("words v2", "share right", "50.0 %", "15.0 % to 85.0 %", "0 %", "4")
    assert rows(results)[2][2:5] == ("0.800", "0.667 to 1.000", "-")
    assert markdown(results).count("\n") == 5
