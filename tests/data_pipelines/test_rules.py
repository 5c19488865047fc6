import importlib
import itertools
import random
import re
import sys
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines import blocks, kernels, rules, text_counts, words
from data_pipelines.code_rules import CodeRules, code_rules
from data_pipelines.dedup import plain_text
from data_pipelines.document import make_document, text_buffer, to_batch, with_text

GOOD = """The river that runs through the town was once the only road to the sea. Boats came up with the tide and
went back with the ebb, and the people of the town lived by what they carried. When the railway came, the boats
stayed away, but the river did not mind. It has its own business with the sea, and it keeps to it.

Today you can walk along the bank from the mill to the old harbour. Few do so in winter. Those who have tried it
say that the light on the water is worth the cold, and that they would be glad to go again.
"""
CHINESE = (
    "这条河流过小镇，曾经是通往大海的唯一道路。船只随着潮水而来，又随着潮水而去，镇上的人们靠船运为生。"
    "后来铁路修通了，船就不来了，但是河水并不在意。它与大海之间有自己的事情，一直守着。今天你可以沿着河岸从磨坊走到旧港口。"
)


def batch_of(*texts, language="und"):
    return to_batch([make_document(t, source="s", path=f"f:{i}", language=language) for i, t in enumerate(texts)])


def reason(text, settings=rules.WEB):
    return rules.text_rules(settings)(batch_of(text)).reasons[0]


def test_good_text_stays_in_both_languages():
    assert rules.text_rules(rules.WEB)(batch_of(GOOD, CHINESE)).details == [None, None]


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ("few_words", "Too short."),
        ("replacement_characters", GOOD + "\ufffd" * 5),
        ("control_characters", GOOD + "\x01" * 5),
        ("few_letters", GOOD + " 1234567890" * 100),
        ("much_punctuation", GOOD + " ;-)" * 120),
        ("few_alphabetic_words", GOOD + " 2024" * 70),
        ("few_stop_words", "Green ideas sleep furiously; colourless dreams never wake. " * 8),
        ("hash_signs", GOOD.replace("the", "#the")),
        ("ellipses", GOOD.replace(" the", "... the")),
        ("bullet_lines", "\n".join(f"- {line}" for line in GOOD.replace(", ", ".\n").splitlines() if line)),
        ("few_sentences", re.sub("[.]", ",", GOOD)),
        ("lines_without_end_mark", "\n".join(re.sub(r"\.$", "", line) for line in GOOD.splitlines()) + "\n"),
        ("short_lines", re.sub(r"(\S+) (\S+) (\S+) ", r"\1 \2 \3\n", GOOD)),
        ("braces", GOOD + "{"),
        ("lorem_ipsum", GOOD + "Lorem Ipsum dolor."),
        ("duplicate_lines", GOOD + "The end of the story is here.\n" * 8),
    ],
)
def test_each_rule_drops_its_document_with_its_reason(expected, text):
    details = rules.text_rules(rules.WEB)(batch_of(text)).details[0]
    assert expected in {part.partition(":")[0] for part in details.split("; ")}, details


def test_first_failing_rule_is_the_reason_and_all_are_in_the_detail():
    outcome = rules.text_rules(rules.WEB)(batch_of("Too short {"))
    assert outcome.reasons == ["few_words"]
    assert outcome.details[0].startswith("few_words: 2 is below 50; ") and "braces: 1 is above 0" in outcome.details[0]


def test_verdicts_do_not_depend_on_the_batch():
    texts = [GOOD, "...", "", CHINESE, "a.", "... b " * 40, GOOD * 3, "\n\n"]
    together = rules.text_rules(rules.WEB)(batch_of(*texts))
    alone = [rules.text_rules(rules.WEB)(batch_of(text)).details[0] for text in texts]
    assert list(together.details) == alone
    assert rules.text_rules(rules.WEB)(batch_of()).reasons == []


# --- the kernels against plain Python --------------------------------------------------------------------------------

TEXTS = st.text(alphabet=st.sampled_from(list("aA9_ .,\n\t-\"'") + list("的いé。！\u2026\ufffd\u3000😀ß")), max_size=60)


HAN = "[\u3040-\u9fff]"
OTHER = "[^\x00-\xbf\u2000-\u207f\u3000-\u9fff\uff00-\uffff]"


def plain_words(text):
    return re.findall(f"[A-Za-z0-9_]+|{HAN}|{OTHER}+", text)


def plain_hash(word):
    """`kernels.hash_bytes` of a word, in plain Python."""

    def times(value, factor):
        return value * factor & 0xFFFFFFFFFFFFFFFF

    def mixed(value):
        value = times(value ^ value >> 32, kernels.MIX)
        value = times(value ^ value >> 29, kernels.MIX_AGAIN)
        return value ^ value >> 32

    raw = bytes(byte | 0x20 for byte in word.encode()) if word.isascii() else word.encode()
    value = times(len(raw), kernels.MIX) if len(raw) > 8 else 0
    for at in range(0, len(raw) - 8, 8):
        value = mixed(value ^ int.from_bytes(raw[at : at + 8], "little"))
    return mixed(value ^ int.from_bytes(raw[-8:], "little"))


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=4))
@example(["a" * 64, "Word_" * 13 + " " + "的" * 30 + "ß" * 40, "x " * 31 + "yz" + "_" * 200, "- " * 32 + "w" * 63])
def test_words_equal_a_regular_expression(texts):
    words = rules.find_words(batch_of(*texts))
    found = [plain_words(text) for text in texts]
    assert np.diff(words.starts).tolist() == [len(row) for row in found]
    lowered = [re.sub("[A-Z]", lambda m: m.group().lower(), word) for row in found for word in row]
    assert words.hashes.tolist() == [plain_hash(word) for word in lowered]
    assert words.lengths.tolist() == [len(word.encode()) for word in lowered]


def test_words_are_found_once_and_those_of_rows_are_the_ones_of_their_texts(monkeypatch):
    words.forget()
    searched = []
    monkeypatch.setattr(words, "_found", lambda batch, found=words._found: searched.append(batch) or found(batch))
    before = batch_of("a b c", "", "中文 d", "e_f 1", "g")
    rows = np.array([0, 2, 3])
    after = before.filter(pa.array([True, False, True, True, False]))
    wanted = [words._found(batch) for batch in (before, after, after.slice(1))]
    searched.clear()
    first = rules.find_words(before)
    words.follow(before, rows, after)
    words.follow(after, np.array([1, 2]), after.slice(1))
    spans = words.find_spans(after.slice(1))
    hashes = [spans.hashes[start:stop].tolist() for start, stop in zip(spans.starts, spans.stops, strict=True)]
    assert hashes == [wanted[2].hashes[a:b].tolist() for a, b in itertools.pairwise(wanted[2].starts)]
    again = rules.find_words(after.slice(1))
    assert len(searched) == 1 and searched[0] is before
    for found, known in ((first, wanted[0]), (again, wanted[2])):
        assert all(np.array_equal(one, other) for one, other in zip(found, known, strict=True))
    words.follow(before, rows, after)  # of words that are no longer known
    found = rules.find_words(after)
    assert len(searched) == 2 and all(np.array_equal(one, other) for one, other in zip(found, wanted[1], strict=True))


def test_words_and_lines_that_differ_in_the_upper_bytes_alone_have_different_hashes():
    """There a product that is not mixed again is undone by the eight bytes that follow."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = [f"Sixteen{a}let{b}ers{c}" for a in letters for b in letters for c in letters]
    assert len(set(rules.find_words(batch_of(" ".join(lines))).hashes.tolist())) == len(lines)
    checks = {check.reason: check for check in rules.text_checks(batch_of("\n".join(lines)), rules.WEB)}
    assert checks["duplicate_lines"].values_D.tolist() == [0]


def plain_counts(text):
    """Kinds of characters as `text_counts` names them, by their definitions."""
    ascii_letters = [c for c in text if c.isascii() and c.isalpha()]
    controls = [c for c in text if (ord(c) < 32 or ord(c) == 127) and c not in "\t\n\r"]
    digits, white = [c for c in text if c.isascii() and c.isdigit()], [c for c in text if c in " \t\r"]
    known = [*ascii_letters, *controls, *digits, *white, *re.findall("[的\n]", text)]
    return {
        "CHARACTERS": len(text),
        "HAN": text.count("的"),
        "LETTERS": len(ascii_letters) + text.count("的"),
        "DIGITS": len(digits),
        "CONTROLS": len(controls),
        "NEWLINES": text.count("\n"),
        "HASHES": text.count("#"),
        "BRACES": text.count("{"),
        "PUNCTUATION": len(text) - len(known),
        "ELLIPSES": len(re.findall(r"\.{3,}|\u2026", text)),
        "SENTENCES": len(re.findall(r"[.!?](?=[ \n\t\"']|\Z)|。", text)),
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(alphabet=st.sampled_from(list("aZ9 .!?\n\t\"'#{的。\u2026\x00\x7f\r,")), max_size=200), max_size=4)
)
@example(["." * size for size in (62, 63, 64, 65, 66, 128)])
@example(["a" * size + end for size in (60, 61, 62, 63, 126, 127) for end in ("...", '." b', "。", "")])
def test_counts_of_characters_equal_plain_python(texts):
    data, offsets = text_buffer(batch_of(*texts))
    found = np.zeros((len(texts), text_counts.NUM_COUNTS))
    text_counts.counts(data, offsets, found)
    for row, text in zip(found, texts, strict=True):
        wanted = plain_counts(text)
        assert {name: row[getattr(text_counts, name)] for name in wanted} == wanted


SCRIPTS = st.text(st.sampled_from(list("aZ9_ \n.-éßяжעבกข的\u201c\u00ab\U0001f600")), max_size=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(SCRIPTS, min_size=1, max_size=4))
@example(
    ["größer und Příliš žluťoučký kůň", "слово", "é", "aé", "éa", "的é的a", "\u201cé\u201d", "x" * 64 + "é" + "y" * 64]
)
def test_the_mean_length_of_words_is_in_characters_whatever_the_script(texts):
    found = np.zeros((len(texts), text_counts.NUM_COUNTS))
    batch = batch_of(*texts)
    text_counts.counts(*text_buffer(batch), found)
    checks = {check.reason: check.values_D for check in rules.text_checks(batch, rules.REFERENCE)}
    for row, text in enumerate(texts):
        words = re.findall(f"(?:[A-Za-z0-9_]|{OTHER})+|{HAN}", text)
        mean = sum(map(len, words)) / max(len(words), 1)
        spaced = found[row, text_counts.HAN] < 0.3 * max(found[row, text_counts.LETTERS], 1)
        assert checks["long_words"][row] == (pytest.approx(mean) if spaced else 0)
        assert checks["short_words"][row] == (pytest.approx(mean) if spaced else np.inf)


RUSSIAN = "Документация описывает устройство программы и способы её применения. Каждая функция получает значения."
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy. Dokumentace popisuje, jak se program používá a co vrací funkce."


@pytest.mark.parametrize("text", [RUSSIAN, CZECH])
def test_documentation_in_other_languages_passes(text):
    outcome = rules.text_rules(rules.REFERENCE)(batch_of(text))
    assert list(outcome.reasons) == [None], outcome.details


def test_an_example_with_many_closing_brackets_is_documentation():
    kinds = "bucket queue topic table function cluster".split()
    rows = (
        f'    {{\n        "{kind}": {{\n            "made": 20{n}\n        }}\n    }},\n'
        for n, kind in enumerate(kinds)
    )
    text = "**To list resources**\n\nThis example lists all resources of an account. ::\n\n" + "".join(rows)
    (check,) = (c for c in rules.text_checks(batch_of(text), rules.REFERENCE) if c.reason == "duplicate_lines")
    assert 0.4 < check.values_D[0] < 0.6
    assert list(rules.text_rules(rules.REFERENCE)(batch_of(text)).reasons) == [None]
    (reason,) = rules.text_rules(rules.REFERENCE)(batch_of(text * 2)).reasons
    assert reason == "duplicate_lines", "the whole example again"


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4))
def test_line_measures_equal_plain_python(texts):
    batch = batch_of(*texts)
    checks = {check.reason: check.values_D for check in rules.text_checks(batch, rules.WEB)}
    for row, text in enumerate(texts):
        lines = [line for line in (line.strip("".join(map(chr, range(33)))) for line in text.split("\n")) if line]
        again = sum(count - 1 for count in Counter(lines).values())
        assert checks["duplicate_lines"][row] == pytest.approx(again / max(len(lines), 1))
        ends = sum(line.endswith(tuple(".!?\"'\u2026\u201d。」！？")) for line in lines)
        assert checks["lines_without_end_mark"][row] == pytest.approx(ends / max(len(lines), 1))
        assert checks["long_line"][row] == max(map(len, text.split("\n")))
        assert checks["replacement_characters"][row] * max(len(text), 1) == pytest.approx(text.count("\ufffd"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "cc"]), max_size=40), st.sampled_from([2, 3, 4, 5, 6, 10]))
def test_ngram_shares_equal_plain_python(words, n):
    found = rules.find_words(batch_of(" ".join(words)))
    total = sum(map(len, words))
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    top = max((count * len("".join(gram)) for gram, count in Counter(grams).items() if count > 1), default=0)
    repeats = rules.repetition(found)
    assert n > 4 or repeats.top_D3[0, n - 2] == pytest.approx(min(top / total, 1) if total else 0)
    seen, inside, i = set(), 0, 0
    while i < len(grams):
        known = grams[i] in seen
        seen.add(grams[i])
        inside += len("".join(grams[i])) * known
        i += n if known else 1
    if n > 4:
        share = rules.duplicate_ngram_shares(found, repeats, np.array([0]))[0, n - 5]
        assert share == pytest.approx(inside / total if total else 0)
        assert repeats.cover_D[0] >= share - 1e-12


# --- edits and code --------------------------------------------------------------------------------------------------


def test_normalise():
    assert rules.normalise_text("\ufeffe\u0301\r\na\u200b \x07\t\n\n\n\n\n\nb") == "é\na\n\n\nb\n"
    assert rules.normalise_code("\ufeffif x:\r\n\ty  \n") == "if x:\n\ty  \n"
    assert rules.clean_lines("Enable JavaScript now.\nWater is wet [12].\nOur Privacy Policy") == "Water is wet ."
    outcome = rules.edit(rules.normalise_text)(batch_of("\u200b\n", "x"))
    assert list(outcome.reasons) == ["empty", None]


FUNCTION = "def area(width, height):\n    return width * height\n"


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (None, FUNCTION),
        ("empty", " \n"),
        ("generated", "# Auto-generated by a script\n" + FUNCTION),
        ("generated", '"""Codec generated from \'MAPPINGS/X.TXT\' with gencodec.py."""\n' + FUNCTION),
        ("generated", "#   This file was automatically generated from modular.py.\n" + FUNCTION),
        ("generated", "# Autogenerated\n" + FUNCTION),
        ("generated", "# f:0 is made by hand, but: DO NOT EDIT!\n" + FUNCTION),
        ("generated", "# Do not edit this file directly.\n" + FUNCTION),
        (None, '"""Drives a parser with tables generated by hand."""\n' + FUNCTION),
        (None, "# version.py is auto-generated with the tag when building\n" + FUNCTION),
        (None, '"""Overwrites auto-generated documentation."""\n' + FUNCTION),
        (None, '"""Triangles, automatically generated using a Delaunay triangulation."""\n' + FUNCTION),
        (None, '"""Syntax errors are generated by :meth:`.Script.get_syntax_errors`."""\n' + FUNCTION),
        (None, '__version__ = "2.0"  # DO NOT EDIT THIS LINE MANUALLY\n' + FUNCTION),
        (None, "# Copy so we do not modify the page with updates.\n" + FUNCTION),
        (None, FUNCTION * 20 + "# do not edit\n"),
        ("minified", "x = 1; " * 200 + "\n"),
        ("few_letters_and_digits", "(((((((((((((((1)))))))))))))))\n"),
        ("does_not_parse", "print 'two'\n"),
        # A newer Python than that which reads it.
        (None, "def first[T](values: list[T]) -> T:\n    return values[0]\n"),
        (None, "class Box[T]:\n    async def open[S](self, key: S) -> T:\n        return self.of(key)\n"),
        (None, "type Pairs[T] = list[tuple[T, T]]\ntype Names = list[str]\n"),
        (None, 'def greet(names):\n    return f"{names["first"]} and {f\'{names}\'}"\n'),
        ("does_not_parse", "def first(values:\n    return values[0]\n"),
        ("data_only", "TABLE = [\n" + "    1000001,\n" * 300 + "]\n" + FUNCTION),
        (None, "TABLE = [\n" + "    1,\n" * 30 + "]\n" + FUNCTION),
        (None, "__all__ = [\n" + "    'some_long_name',\n" * 300 + "]\n" + FUNCTION),
        ("huge_file", "# abc def\n" * 200_000),
    ],
)
def test_code_rules(expected, text):
    outcome = code_rules(CodeRules())(batch_of(text, language="python"))
    assert outcome.reasons == [expected]
    assert (outcome.details[0] is None) == (expected is None)
    assert failed(outcome) == FAILED.get(expected, set())


FAILED = {"data_only": {"table_share"}, "few_letters_and_digits": {"letters_and_digits"}, "huge_file": {"characters"}}


def failed(outcome):
    """The measures by which the first row goes; lines and white space count as minified."""
    return {check.reason for check in outcome.checks if check.fails()[0]} - {"longest_line", "mean_line", "white_space"}


NUMBERS = "const int table[] = {\n" + "    0x1F, -12, 3.5e-7, 'c', \"text, with\", true,\n" * 100 + "};\n"
SCRIPT = "export function area(width, height) {\n  return width * height;\n}\n"


@pytest.mark.parametrize(
    ("expected", "language", "path", "text"),
    [
        (None, "c", "a.c", "int main() { return 0; }\n"),
        ("data_only", "c", "a.c", NUMBERS),
        (None, "c", "a.c", NUMBERS + "int f(void) { return table[0]; }\n" * 120),
        (None, "c", "a.c", "int values[] = {\n    1, 2,\n};\n"),
        ("data_only", "json", "a.json", '{"name": 1}\n' * 200),
        (None, "json", "a.json", '{"name": 1}\n'),
        (
            "generated",
            "go",
            "a.go",
            "// " + "licence " * 60 + "\n// Code generated by mockgen. DO NOT EDIT.\npackage a\n",
        ),
        ("generated", "java", "A.java", "// Generated by the protocol buffer compiler.\nclass A {}\n"),
        ("generated", "csharp", "A.Designer.cs", "class A {}\n"),
        ("generated", "python", "x/a_pb2.py", FUNCTION),
        ("generated", "python", "x/Version.py", "# version.py is auto-generated by make\n" + FUNCTION),
        ("minified", "javascript", "x/a.min.js", SCRIPT),
        ("minified", "javascript", "a.js", "\n".join(["a=b(c,d);e.f=g[h]||function(i){j(k)}"] * 40)),
        (None, "javascript", "a.js", SCRIPT * 20),
    ],
)
def test_code_rules_of_other_languages(expected, language, path, text):
    batch = to_batch([make_document(text, source="s", path=path, domain="code", language=language)])
    outcome = code_rules(CodeRules())(batch)
    assert outcome.reasons == [expected] and failed(outcome) == FAILED.get(expected, set())
    assert expected == "minified" or not any(check.fails()[0] for check in outcome.checks[1:4])


@pytest.mark.parametrize(
    ("definition", "rows"),
    [
        (rules.normalise_text, rules.normalise_rows),
        (rules.clean_lines, rules.clean_rows),
        (plain_text, rules.plain_rows),
    ],
)
def test_compiled_edits_are_what_their_definitions_say(definition, rows):
    points = [*range(0x3400), *range(0x3400, 0xD800, 37), *range(0xE000, 0x20000, 37), 0x20000, 0x40000, 0x10FFFF]
    texts = [f"ab{c} \nA{c}x {c}\r\n\n\n\n\n{c}\n" for c in map(chr, points)]
    rng = random.Random(0)
    pool = (
        "ab \n\r\t.\u00e9e\u0301\u3000\u00a0\u200b中文、[1] [edit] javaScript Use cookies \uff21ÀßÉ\x00\x1f\u0085\u017f"
    )
    texts += ["".join(rng.choices(pool, k=rng.randint(0, 40))) for _ in range(3000)]
    texts += [
        "see [12], [edit], [citation needed] [edit x] [1",
        "JavaScript\nkept [3]\n\nterms of use",
        "[\uff11] x",
        "pr\u0131vacy policy\npr\u0131de\nuses coo\u212aie\u017f\nuse\u2122 cookies\ncook\u0130es, use cook\u0130es",
        "",
    ]
    batch = with_text(batch_of("").take(pa.array([0] * len(texts))), texts)
    edited = rows(batch)
    for text, is_hard, start, stop in zip(texts, edited.hard, edited.offsets[:-1], edited.offsets[1:], strict=True):
        assert is_hard or bytes(edited.data[start:stop]) == definition(text).encode(), repr(text)
    assert not rows(batch_of("aé中。カ한")).hard.any(), "common text is compiled"
    assert rules.edit(definition, rows)(batch).batch.column("text").to_pylist() == list(map(definition, texts))


def test_compiled_loops_follow_what_they_call_in_other_files(tmp_path, monkeypatch):
    """A loop read from the cache would hold the functions of another file as they were."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lines = ["from data_pipelines.blocks import compiled", "from called import number", "@compiled", "def loop():"]
    (tmp_path / "caller.py").write_text("\n".join([*lines, "    return number()"]))
    found = []
    for version in (1, 1, 2):
        text = f"from data_pipelines.blocks import inlined\n@inlined\ndef number():\n    return {version}\n"
        (tmp_path / "called.py").write_text(text)
        for name in ("caller", "called"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        blocks.digest_of_loops.cache_clear()
        loop = importlib.import_module("caller").loop
        found.append((loop(), loop.stats.cache_hits.total()))
    assert found == [(1, 0), (1, 1), (2, 0)]
    assert len(list(tmp_path.rglob("*.nbc"))) == 1, "what is stale is written over"
