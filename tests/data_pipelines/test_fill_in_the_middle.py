import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import tokens
from data_pipelines.fill_in_the_middle import FillInTheMiddle, draw_cut, fill_in_the_middle
from data_pipelines.tokens import open_tokens, text_documents
from internjax.text.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from tests.text.test_tokenizer import write_llama_like

TOKENIZER = train_tokenizer(["the middle of a text", "中文 text"], vocab_size=300)
MARKS = ("<|im_start|>", "<|im_end|>", "<|action_start|>")
PREFIX, MIDDLE, SUFFIX = (TOKENIZER.special[mark] for mark in MARKS)


def chosen(**changes):
    return FillInTheMiddle(*MARKS, **({"rate": 1.0} | changes))


def made(texts, **changes):
    """The ids of (id, text) pairs between BOS and EOS."""
    found = list(text_documents(texts, TOKENIZER, parts=fill_in_the_middle(chosen(**changes), TOKENIZER)))
    assert all(each.ids[0] == TOKENIZER.bos_id and each.ids[-1] == TOKENIZER.eos_id for each in found)
    return [each.ids[1:-1] for each in found]


def restored(ids):
    """Prefix, middle and suffix that a model would learn from."""
    at = {mark: ids.index(mark) for mark in (PREFIX, MIDDLE, SUFFIX)}
    assert all(ids.count(mark) == 1 for mark in at) and at[PREFIX] == 0 < at[SUFFIX] < at[MIDDLE]
    pieces = ids[1 : at[SUFFIX]], ids[at[MIDDLE] + 1 :], ids[at[SUFFIX] + 1 : at[MIDDLE]]
    return [TOKENIZER.decode(piece, skip_special=False) for piece in pieces]


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.integers(0, 10**6), st.sampled_from([0, 0.5, 1])
)
def test_a_text_comes_back_from_its_pieces(text, number, spm_rate):
    (ids,) = made([(str(number), text)], spm_rate=spm_rate)
    cut = draw_cut(len(text), str(number), chosen(spm_rate=spm_rate))
    before, middle, after = restored(ids)
    assert before + middle + after == text
    assert cut.order == "spm" or (len(before), len(middle)) == (cut.start, cut.stop - cut.start)
    assert cut.order == "psm" or (before, len(after)) == ("", len(text) - cut.stop)


def test_both_orders_by_hand():
    text = "the middle of a text"
    cut = draw_cut(len(text), "d", chosen())
    a, b, c = map(TOKENIZER.encode, (text[: cut.start], text[cut.start : cut.stop], text[cut.stop :]))
    assert a and b and c, "a cut that shows something"
    assert made([("d", text)], spm_rate=0) == [[PREFIX, *a, SUFFIX, *c, MIDDLE, *b]]
    assert made([("d", text)], spm_rate=1) == [[PREFIX, SUFFIX, *c, MIDDLE, *a, *b]]


def test_rates_and_places_are_drawn_evenly_from_seed_and_id_alone():
    drawn = chosen(rate=0.3, spm_rate=0.25)
    cuts = [draw_cut(9, str(i), drawn) for i in range(6000)]
    cut = [each for each in cuts if each]
    assert abs(len(cut) / 6000 - 0.3) < 0.03
    assert abs(sum(each.order == "spm" for each in cut) / len(cut) - 0.25) < 0.05
    ends = [place for each in cut for place in (each.start, each.stop)]
    assert all(abs(ends.count(place) / len(ends) - 0.1) < 0.03 for place in range(10))
    assert cuts != [draw_cut(9, str(i), chosen(rate=0.3, spm_rate=0.25, seed=1)) for i in range(6000)]
    texts = [(str(i), f"text {i}") for i in range(40)]
    together = made(texts, rate=0.3)
    assert together == [made([pair], rate=0.3)[0] for pair in texts]
    assert 0 < sum(ids[0] == PREFIX for ids in together) < 40


def test_marks_that_a_text_spells_are_text_and_others_are_refused():
    (ids,) = made([("d", f"a {MARKS[1]} b")])
    assert "".join(restored(ids)) == f"a {MARKS[1]} b"
    with pytest.raises(ValueError, match="wanted three different special tokens"):
        FillInTheMiddle("<|im_start|>", "<|im_end|>", "<|im_start|>")
    with pytest.raises(ValueError, match="rate is 2"):
        chosen(rate=2)
    with pytest.raises(
        ValueError, match=r"<PRE>, <MID>: no special tokens of the tokenizer; give three of its own: .*<"
    ):
        fill_in_the_middle(FillInTheMiddle("<PRE>", "<MID>", "<|im_end|>"), TOKENIZER)


def test_a_tokenizer_that_puts_a_space_before_texts_is_refused(tmp_path):
    tokenizer = load_tokenizer(write_llama_like(tmp_path))
    marks = FillInTheMiddle(*list(tokenizer.special)[:3])
    with pytest.raises(ValueError, match="puts a space before every text"):
        fill_in_the_middle(marks, tokenizer)


def test_the_command_writes_them_into_a_token_folder(tmp_path, capsys):
    save_tokenizer(TOKENIZER, tmp_path / "tokenizer")
    rows = [{"text": f"a text of number {n}", "domain": "code"} for n in range(40)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--input", str(tmp_path / "in.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    given += ["--output", str(tmp_path / "out")]
    fill = ["--fill-in-the-middle", *MARKS]

    def written(*options):
        assert tokens.main([*given, *options]) == 0
        opened = open_tokens(tmp_path / "out")
        return [opened.document(n).tolist()[1:-1] for n in range(40)], opened.manifest["about"]

    plain, _ = written()
    found, about = written(*fill, "--fill-rate", "0.5", "--spm-rate", "0")
    whole = [ids for ids in found if ids[0] != PREFIX]
    assert 10 < len(whole) < 30 and all(ids in plain for ids in whole)
    assert ["".join(restored(ids)) for ids in found if ids[0] == PREFIX] == [
        TOKENIZER.decode(before) for before, ids in zip(plain, found, strict=True) if ids[0] == PREFIX
    ]
    assert about["fill_in_the_middle"]["middle"] == MARKS[1] and about["fill_in_the_middle"]["spm_rate"] == 0
    assert written(*fill)[0] == written(*fill, "--fill-seed", "0")[0] != written(*fill, "--fill-seed", "1")[0]
    assert tokens.main([*given, "--fill-in-the-middle", "a", "b", "c"]) == 1
    assert "no special tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tokens.main([*given, "--fill-rate", "0.1"])
