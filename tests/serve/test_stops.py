"""Stop strings: any length, any cut of the text, same outcome."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.answering.stops import StopStrings


def run(parts, stops):
    watch = StopStrings(stops)
    shown = "".join(watch.push(part) for part in parts)
    if watch.hit is None:
        shown += watch.flush()
    return shown, watch.hit


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", (), ("one two", None)),
        ("one two", ("xyz",), ("one two", None)),
        ("one two three", (" two",), ("one", " two")),
        ("aab", ("ab",), ("a", "ab")),  # the first a looks like the beginning, and is not
        ("abab!", ("abab!",), ("", "abab!")),
        ("one\n\ntwo", ("\n\n", "\n"), ("one", "\n")),  # the one that is complete first
        ("xabcy", ("bc", "abc"), ("x", "abc")),  # complete together: the one that began first
        ("half of a st", ("stop",), ("half of a st", None)),  # held back, then released
    ],
)
def test_at_every_split(text, stops, expected):
    assert run([text], stops) == expected
    assert run(list(text), stops) == expected
    for cut in range(len(text) + 1):
        assert run([text[:cut], text[cut:]], stops) == expected


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_the_cut_does_not_matter(text, stops, cuts):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    shown, hit = run([text[i:j] for i, j in zip(places, places[1:])], stops)
    assert (shown, hit) == run(list(text), stops)
    assert (hit is None) == (not any(stop in text for stop in stops))
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown + (hit or ""))


def test_nothing_is_held_back_without_need():
    watch = StopStrings(("stop",))
    assert watch.push("a st") == "a "
    assert watch.push("ar") == "star"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""))
