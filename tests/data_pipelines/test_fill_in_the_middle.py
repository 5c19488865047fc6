import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import fill_in_the_middle as fim
from data_pipelines.document import make_document, to_batch

MARKS = {"prefix": "<PRE>", "middle": "<MID>", "suffix": "<SUF>"}


def given_settings(**changes):
    return fim.FillInTheMiddle(**(MARKS | {"rate": 1.0} | changes))


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_round_trip_of_texts_and_tokens(text, number, spm_rate):
    chosen = given_settings(spm_rate=spm_rate)
    made = fim.rearrange_text(text, str(number), chosen)
    assert all(made.count(mark) == 1 for mark in MARKS.values())
    assert fim.restore_text(made, chosen) == text
    # Of characters as tokens the same cut is made.
    tokens = fim.rearrange_tokens([ord(c) for c in text], str(number), chosen, ids=(-1, -2, -3))
    names = {-1: "<PRE>", -2: "<MID>", -3: "<SUF>"}
    assert "".join(names.get(token) or chr(token) for token in tokens) == made


def test_both_orders_by_hand():
    cut = fim.draw_cut(6, "d", given_settings())
    a, b, c = "abcdef"[: cut.start], "abcdef"[cut.start : cut.stop], "abcdef"[cut.stop :]
    assert fim.rearrange_text("abcdef", "d", given_settings(spm_rate=0)) == f"<PRE>{a}<SUF>{c}<MID>{b}"
    assert fim.rearrange_text("abcdef", "d", given_settings(spm_rate=1)) == f"<PRE><SUF>{c}<MID>{a}{b}"


def test_rates_and_places_are_drawn_evenly_from_seed_and_id_alone():
    chosen = given_settings(rate=0.3, spm_rate=0.25)
    cuts = [fim.draw_cut(9, str(i), chosen) for i in range(6000)]
    made = [cut for cut in cuts if cut]
    assert abs(len(made) / 6000 - 0.3) < 0.03
    assert abs(sum(cut.order == "spm" for cut in made) / len(made) - 0.25) < 0.05
    ends = [place for cut in made for place in (cut.start, cut.stop)]
    assert all(abs(ends.count(place) / len(ends) - 0.1) < 0.03 for place in range(10))
    assert cuts != [fim.draw_cut(9, str(i), given_settings(rate=0.3, spm_rate=0.25, seed=1)) for i in range(6000)]
    documents = [make_document(f"text {i}", source="s", path=str(i)) for i in range(40)]
    stage = fim.fill_in_the_middle(chosen)
    together = stage(to_batch(documents)).batch.column("text").to_pylist()
    assert together == [stage(to_batch([d])).batch.column("text").to_pylist()[0] for d in documents]
    assert 0 < sum(text.startswith("<PRE>") for text in together) < 40
    assert stage(to_batch([])).reasons == []


def test_what_cannot_be_told_apart_stays_or_is_refused():
    assert fim.rearrange_text("a <MID> b", "d", given_settings()) == "a <MID> b"
    assert fim.rearrange_tokens([5, 2, 5], "d", given_settings(), ids=(1, 2, 3)) == [5, 2, 5]
    with pytest.raises(ValueError, match="wanted three texts of which none is part of another"):
        given_settings(suffix="<PRE>")
    with pytest.raises(ValueError, match="rate is 2"):
        given_settings(rate=2)
    with pytest.raises(ValueError, match="wanted three different ones"):
        fim.rearrange_tokens([5], "d", given_settings(), ids=(1, 1, 3))
