"""One description gives two documents that say the same; nothing in them comes from outside or runs."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from internjax import chart, report
from internjax.chart import Lines
from internjax.figures import Bar, Bars, Slider, Stop
from internjax.report import Code, Number, Numbers, Sample, Samples, Section, Table, Text

EVIL = '<script>alert(1)</script><img src="http://x.example/a" onerror=b>\x00\x1b[31m"\'&'
VOID = {"meta", "line", "br", "img", "input"}


class Checker(HTMLParser):
    """Collects tags, attributes and text; fails where tags do not nest."""

    def __init__(self, document):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(document)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def everything(word):
    return [
        Section(word, [Numbers([Number(word, word, baseline=word, verdict=word, outcome="good")]), Text(word)]),
        Section(
            "Second", [Code(word), Table([word], [[word]], caption=word), Samples([Sample(word, word)], caption=word)]
        ),
        Section("Third", [Lines(word, {word: [(0, 1), (1, 2)]}, word, word, baselines={word: 1.5})]),
        Section("Fourth", [Bars(word, [Bar(word, 4, 1, word)], word, word, caption=word)]),
    ]


def test_every_text_is_escaped():
    document = report.page(EVIL, everything(EVIL), subtitle=EVIL)
    checker = Checker(document)
    assert not {"script", "img", "link", "iframe"} & set(checker.tags)
    assert not [name for name, _ in checker.attributes if name.startswith("on") or name in ("src", "srcset")]
    assert all(value.startswith("#") for name, value in checker.attributes if name == "href")
    assert "\x00" not in document and "\x1b" not in document
    assert "".join(checker.text).count("alert(1)") >= 15  # shown, not run


def test_page_is_self_contained_and_follows_the_reader():
    document = report.page("Title", everything("word"))
    assert "http" not in document and "@import" not in document and "url(" not in document
    assert "prefers-color-scheme:dark" in document and 'name="viewport"' in document
    names = [value for name, value in Checker(document).attributes if name == "id"]
    links = [value for name, value in Checker(document).attributes if name == "href"]
    assert links == [f"#{name}" for name in names] and len(names) == 4


def test_both_forms_say_the_same():
    sections = [
        Section("Result", [Numbers([Number("Bits", 1.7934, "bigram 1.92", "better", "good"), Number("Speed", 2951)])]),
        Section(
            "Ledger", [Table(["stage", "kept"], [["rules", 11520], ["near | far", None]], caption="Why `dropped`")]
        ),
        Section("Loss", [Lines("Loss", {"train": [(0, 4.0), (1, 2.5)]}, "step", "nats", baselines={"bigram": 3.0})]),
        Section("Words", [Text("One.\n\nTwo."), Code("make test"), Samples([Sample("base", "x = `1`")])]),
    ]
    page = "".join(Checker(report.page("Run", sections, subtitle="2 cores")).text)
    twin = report.markdown("Run", sections, subtitle="2 cores")
    shown = ("1.793", "bigram 1.92", "✓ better", "2,951", "11,520", "bigram", "One.", "make test", "x = `1`", "2 cores")
    for text in shown:
        assert text in page and text in twin, text
    lines = twin.splitlines()
    assert lines[0] == "# Run" and "## Ledger" in lines
    assert "| Bits | 1.793 | bigram 1.92 | ✓ better |" in lines
    assert "| near \\| far | – |" in lines
    assert "| train | 2 | 4.000 | 2.500 | 2.500 | 4.000 | █▁ |" in lines


def test_values_of_a_wide_table_keep_their_names_where_its_head_is_not_shown():
    columns = [f"column {index} {EVIL}" for index in range(report.MOST_COLUMNS + 1)]
    document = report.page("t", [Section("s", [Table(columns, [[1] * len(columns)] * 2), Table(columns[1:], [])])])
    names = [value for name, value in Checker(document).attributes if name == "data-name"]
    assert names == [report.printable(name) for name in columns] * 2
    assert document.count('<table class="wide">') == 1 and ".wide thead{display:none}" in document


def test_bars_have_one_scale_and_both_numbers():
    bars = Bars("Kept", [Bar("a", 200, 50, "50 of 200"), Bar("b", 100, 0, "none of 100")], "in", "kept")
    document = report.page("t", [Section("s", [bars])])
    assert re.findall(r'class="(whole|part)" style="width:([\d.]+)%"', document) == [
        ("whole", "100.00"), ("part", "25.00"), ("whole", "50.00"), ("part", "0.00"),
    ]  # fmt: skip
    assert "| a | 50 | 200 | 50 of 200 |" in report.markdown("t", [Section("s", [bars])])


def test_a_slider_brings_its_numbers_and_the_page_its_script_once():
    stops = [Stop(value, share, f"{EVIL} {value}") for value, share in ((0.5, 0.2), (1, 0.4), (3000, 1.0))]
    sections = [Section("s", [Slider(EVIL, stops, 1, caption=EVIL), Slider("b", stops, 0)])]
    document = report.page("t", sections)
    checker = Checker(document)
    assert (
        checker.tags.count("script") == 1
        and not {"img", "link"} & set(checker.tags)
        and "http" not in script_of(document)
    )
    assert not [name for name, _ in checker.attributes if name.startswith("on") or name == "src"]
    data = [json.loads(value) for name, value in checker.attributes if name == "data-stops"]
    assert data[0] == [["0.5", 0.2, f"{EVIL} 0.5"], ["1", 0.4, f"{EVIL} 1"], ["3,000", 1.0, f"{EVIL} 3000"]] == data[1]
    assert [value for name, value in checker.attributes if name == "data-now"] == ["1", "0"]
    assert "1 (in use)" in report.markdown("t", sections) and "script" not in report.page("t", everything("word"))


def script_of(document):
    return re.search(r"<script>(.*?)</script>", document, re.DOTALL)[1]


def test_markdown_means_only_itself():
    twin = report.markdown("a*b", everything("**x** <b> [l](u) | `c|d` # \n next"))
    assert twin.startswith("# a\\*b\n")
    assert "\\*\\*x\\*\\* \\<b\\> \\[l\\](u)" in twin
    row = next(line for line in twin.splitlines() if line.startswith("| \\*\\*x") and "1.500" in line)
    assert row.replace("\\|", "").count("|") == 8
    fenced = report.markdown("t", [Section("s", [Samples([Sample("a", "```\ncode\n````")])])])
    assert "`````text\n```\ncode\n````\n`````" in fenced


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.79341, "1.793"),
        (0.0412, "0.04120"),
        (12345.678, "12,346"),
        (3.1e-7, "3.100e-07"),
        (-0.5, "-0.5000"),
        (0.0, "0"),
        (1234567, "1,234,567"),
        (True, "yes"),
        (None, "–"),
        (float("nan"), "not a number"),
        (-math.inf, "−∞"),
        (np.float32(0.25), "0.2500"),
        (np.int64(7), "7"),
        ("as it is", "as it is"),
    ],
)
def test_values_are_written_plainly(value, text):
    assert report.format_value(value) == text


def test_tiles_drop_zeros_that_say_nothing():
    tiles = report.page("t", [Section("s", [Numbers([Number("a", 0.93), Number("b", 2.0), Number("c", 3.1e-7)])])])
    for text in ("<strong>0.93</strong>", "<strong>2</strong>", "<strong>3.1e-07</strong>"):
        assert text in tiles
    assert "<strong>1,000</strong>" in report.page("t", [Section("s", [Numbers([Number("a", 1000.0)])])])


def path_of(figure):
    return figure.split('<path d="')[-1].split('"')[0]


def test_chart_puts_points_where_they_belong():
    figure = chart.svg(Lines("t", {"a": [(0, 0), (5, 50), (10, 100)]}, "x", "y"))
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    top, bottom = chart.TOP, chart.HEIGHT - chart.BOTTOM
    height = bottom - top
    low, high = bottom - height * 6 / 112, top + height * 6 / 112  # 6 % of room below and above
    expected = f"M{left:.1f} {low:.1f}L{(left + right) / 2:.1f} {(low + high) / 2:.1f}L{right:.1f} {high:.1f}"
    assert path_of(figure) == expected
    for tick in ("0", "25", "50", "75", "100"):
        assert f">{tick}</text>" in figure


def test_logarithmic_axes():
    figure = chart.svg(Lines("t", {"a": [(10, 1), (100, 0.1), (1000, 0.01)]}, "x", "y", log_x=True, log_y=True))
    xs = [float(pair.split()[0]) for pair in path_of(figure)[1:].split("L")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert all(f">{tick}</text>" in figure for tick in ("10", "100", "1000", "0.1"))


def test_gaps_and_thinning_keep_what_matters():
    broken = Lines("t", {"a": [(0, 1), (1, math.nan), (2, 3), (3, math.inf), (4, 2)]}, "x", "y")
    assert path_of(chart.svg(broken)).count("M") == 3
    spike = [(step, 100.0 if step == 7777 else 1.0) for step in range(20_000)]
    kept = chart._thin(spike)
    assert (7777, 100.0) in kept and kept[0] == spike[0] and kept[-1] == spike[-1]
    assert len(kept) <= chart.MAX_POINTS + 4 and kept == sorted(kept)


@pytest.mark.parametrize("points", [[(0, 0)], [(3, 5), (4, 5)], [(1, -2e-9), (2, 3e-9)], [(0, 1e12), (1, 3e12)]])
def test_odd_ranges_are_drawn(points):
    for log_x in (False, True):
        if log_x and points[0][0] <= 0:
            continue
        figure = chart.svg(Lines("t", {"a": points}, "x", "y", log_x=log_x))
        Checker(figure)
        assert "nan" not in path_of(figure) and figure.count("</text>") >= 3


def test_array_scalars_are_points():
    array = np.arange(3, dtype=np.float32)
    assert chart.svg(Lines("t", {"a": list(zip(array, array))}, "x", "y"))


def test_write_replaces_both_files(tmp_path):
    report.write(tmp_path / "run", "One", everything("earlier"))
    report.write(tmp_path / "run", "Two", everything("second \ud800"))
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["report.html", "report.md"]
    for name in names:
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert "second" in text and "earlier" not in text


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Number("a", 1, outcome="great"), "outcome is 'great'; give one of"),
        (lambda: Table(["a", "b"], [[1]]), "row 0 has 1 cells; the table has 2 columns"),
        (lambda: Lines("t", {"a": [(0, math.nan)]}, "x", "y"), "has no finite point; leave it out"),
        (lambda: Lines("t", {"a": [(0, 1)]}, "x", "y", log_x=True), "logarithmic axis; set log_x=False"),
        (lambda: Bars("t", [], "in"), "has no bar; leave it out"),
        (lambda: Bars("t", [Bar("a", -1, 0, "")], "in"), "give lengths of 0 or more"),
        (lambda: Slider("t", [Stop(2, 0, ""), Stop(1, 0, "")], 0), "give ascending values and the number of one"),
        (lambda: Slider("t", [Stop(1, 0, "")], 1), "give ascending values and the number of one"),
        (lambda: report.page("t", [Section("s", ["text"])]), "a section holds a str; give one of the blocks"),
        (lambda: report.markdown("t", [Section("s", ["text"])]), "a section holds a str; give one of the blocks"),
    ],
)
def test_bad_descriptions_say_what_is_wanted(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
