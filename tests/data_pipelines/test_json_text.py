"""A row whose text is read by the compiled loop is the row that the standard library reads, its errors included."""

import json
import random

import pytest

from data_pipelines import json_text

STRINGS = [
    '"text"', '"content"', '"te\\u0078t"', '"x"', '"a \\" , { \\\\"', '"\\u4e2d\\ud83d\\ude00\\n"', '"\\ud800"',
    '"\\q"', '"\t"', '""', '"long enough for words of eight bytes, \\t\\/\\b\\f\\r, twice over"',
    '"\u4e2d\u6587\u00e9\U0001f600 plain"',
]  # fmt: skip
PIECES = [*STRINGS, "{", "}", "[", "]", ":", ": ", ",", " , ", "1.5", "null", "true", " ", "\0", '"', "\\"]


def outcome(function, raw):
    try:
        return function(raw)
    except ValueError as error:
        return type(error), str(error)


def lines():
    rng = random.Random(4)
    for _ in range(3000):
        keys = rng.choices(STRINGS, [8, 4, 1, 4, *[1] * (len(STRINGS) - 4)], k=rng.randint(0, 4))
        values = [rng.choice([*STRINGS, "1", "null", '{"text": "inner"}', '["text", {"content": "x"}]']) for _ in keys]
        pairs = [key + rng.choice((":", ": ", " :\t")) + value for key, value in zip(keys, values, strict=True)]
        yield "{" + rng.choice((",", ", ")).join(pairs) + "}"
    for _ in range(3000):
        yield '{"text": "' + "".join(rng.choices(PIECES, k=rng.randint(0, 9)))
    yield from ('["text", "a"]', '"text"', "", "{}", '{"text": "a"} {"text": "b"}', '{"text": "a"')


def test_every_line_is_read_as_the_standard_library_reads_it(monkeypatch):
    monkeypatch.setattr(json_text, "LEAST_BYTES", 0)
    by_loop = []
    found = json_text.find_text
    monkeypatch.setattr(json_text, "find_text", lambda *given: by_loop.append(found(*given)) or by_loop[-1])
    for line in lines():
        for raw in (line.encode("utf-8", "surrogatepass"), line.encode("utf-16-le")):
            assert outcome(json_text.parse, raw) == outcome(json.loads, raw), raw
    assert sum(start >= 0 for start, _, _ in by_loop) > 1000
    for broken in (b'{"text": "\xff and more text"}', b'{"text": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"text": "x"}'):
        assert outcome(json_text.parse, broken) == outcome(json.loads, broken)


@pytest.mark.parametrize("point", [0x00, 0x1F, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF])
def test_code_points_come_out_of_escapes(point, monkeypatch):
    monkeypatch.setattr(json_text, "LEAST_BYTES", 0)
    raw = json.dumps({"id": 1, "text": f"a{chr(point)}b" * 5, "n": [2]}).encode()
    assert list(json_text.parse(raw).items()) == list(json.loads(raw).items())
