import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import kernels, safety
from data_pipelines.document import make_document, to_batch


def page(text="text", *, path="p", **meta):
    return make_document(text, source="s", path=path, meta=meta)


def listing(folder, text, name="list.txt"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [path]


# --- domains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "entry"),
    [
        (page(url="https://bad.example/x"), "bad.example"),
        (page(url="HTTP://User:pw@WWW.Bad.Example.:8080?q=good.example"), "bad.example"),
        (page(url="//a.b.c.bad.example"), "bad.example"),
        (page(url="www.bad.example/page"), "bad.example"),
        (page(path="https://one.shared.example/x"), "one.shared.example"),
        (page(url="http://8.8.4.4/"), "8.8.4.4"),
        (page(url="https://bücher.example/"), "xn--bcher-kva.example"),
        (page(url="https://notbad.example/"), None),
        (page(url="https://bad.example.org/"), None),
        (page(url="https://two.shared.example/"), None),
        (page(url="http://9.8.8.4.4/"), None),
        (page(url="see bad.example", path="bad.example/folder/file.txt"), None),
        (page(note="https://bad.example/"), None),
        (page(url=7), None),
    ],
)
def test_a_host_is_blocked_by_itself_and_by_what_is_above_it(document, entry, tmp_path):
    lines = "# list\nBad.Example  # a comment\n\n*.one.shared.example\n8.8.4.4\nbücher.example\r\n8.4.4\n"
    outcome = safety.blocked_domains(listing(tmp_path, lines))(to_batch([document]))
    assert outcome.reasons == [entry and "blocked_domain"]
    assert (outcome.details[0] or "").endswith(f"entry {entry}" if entry else "")


def test_an_equal_hash_is_no_equal_name(tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "_hashes", lambda names: kernels.np.full(len(names), 7, "uint64"))
    stage = safety.blocked_domains(listing(tmp_path, "bad.example\nworse.example\n"))
    assert stage(to_batch([page(url="http://good.example"), page(url="http://worse.example")])).reasons == [
        None,
        "blocked_domain",
    ]


def plain_fnv(text):
    """The 64-bit FNV-1a hash."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def test_hashes_are_fnv():
    names = ["", "a", "例子.example", "b" * 70]
    array = safety.pa.array(["x", *names], "large_string").slice(1)
    assert safety._hashes(array).tolist() == [plain_fnv(name) for name in names]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good.example\n0.0.0.0 ads.example\n", r"1 lines are no domain.*:2: '0.0.0.0 ads.example'"),
        ("https://a.example/\n", "without scheme"),
        ("com\n", "no domain"),
        ("# nothing\n", "one domain per line"),
        (b"a.example\n\xff\xfe.example\n", "not UTF-8"),
    ],
)
def test_lists_of_domains_that_are_none_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        safety.read_domains(listing(tmp_path, text))


# --- words -----------------------------------------------------------------------------------------------------------

EVERY_HIT = safety.WordBounds(max_weight_per_1000_characters=0, max_weight=0)


def words_found(text, lines, tmp_path):
    outcome = safety.blocked_words(listing(tmp_path, lines), EVERY_HIT)(to_batch([page("ass"), page(text)]).slice(1))
    return (outcome.details[0] or ": ").rpartition(": ")[2]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("class assess ass_1 assé éass", ""),
        ("Ass, (ass) ass。ass的ass", "ass x5"),
        ("ass", "ass x1"),
        ("这是赌博网站", "赌博 x1"),
        ("big bad wolf", "big bad wolf x1"),
        ("big bad wolves", "big x1"),
        ("ÉTÉ été étés", "été x2"),
        ("看av片 avx av", "av x1, av片 x1"),
        ("", ""),
    ],
)
def test_latin_words_want_boundaries_and_chinese_ones_do_not(text, found, tmp_path):
    assert words_found(text, "ass\n赌博\nbig\nBig Bad Wolf\nÉté\nav\nav片\n", tmp_path) == found


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab é的_.", max_size=12), max_size=4),
    words=st.lists(st.text(alphabet="abé的", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
)
def test_whole_words_equal_a_slow_search(texts, words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    outcome = safety.blocked_words(listing(folder, "\n".join(words)), EVERY_HIT)(to_batch([page(t) for t in texts]))
    for text, detail in zip(texts, outcome.details, strict=True):
        assert (detail or "weight 0 ").split()[1] == f"{slow_count(text, words)}"


def slow_count(text, words):
    letter = [c in "abé_" for c in text] + [False]
    count, at = 0, 0
    while at < len(text):
        whole = [
            word
            for word in words
            if text.startswith(word, at)
            and not (letter[at] and letter[at - 1])
            and not (letter[at + len(word) - 1] and letter[at + len(word)])
        ]
        count += bool(whole)
        at += max(map(len, whole), default=1)
    return count


def test_weight_per_length_decides_and_the_detail_names_the_heaviest(tmp_path):
    stage = safety.blocked_words(listing(tmp_path, "mild\nrude\t2.5\nmild\t0.5\n"))
    texts = ["rude", "rude mild rude", "mild mild", "rude mild rude" + " fine" * 1200]
    outcome = stage(to_batch([page(text) for text in texts]))
    assert outcome.reasons == ["blocked_words" if at in (0, 1) else None for at in range(4)]
    assert outcome.details[1] == ("weight 6 is above 2, 428.6 per 1000 characters is above 2: rude x2, mild x1")
    (check,) = outcome.checks
    assert check.fails().tolist() == [True, True, False, False] and check.values_D[1] == pytest.approx(6000 / 14)
    assert stage(to_batch([])).reasons == []


@pytest.mark.parametrize("line", ["word\t0", "word\tx", "word\tnan", "word\t1\t2"])
def test_weights_that_are_none_are_refused_with_file_and_line(line, tmp_path):
    with pytest.raises(ValueError, match="list.txt:2: .*behind a tab a weight above 0"):
        safety.read_words(listing(tmp_path, f"good\n{line}\n"))


def test_the_example_of_the_readme_runs(capsys):
    text = (Path(safety.__file__).parent / "README.md").read_text("utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "blocked_words" in code]
    exec(compile(code, "data_pipelines/README.md", "exec"), {})
    assert capsys.readouterr().out == (
        "Ask [EMAIL] {'personal_data_masked': {'email': 1}} {'blocked_domain': 1, 'blocked_words': 1}\n"
    )
