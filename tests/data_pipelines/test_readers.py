"""A row of JSON is what the standard library makes of it, its errors included."""

import json
import random

from data_pipelines.readers import parse_json

STRINGS = [
    '"text"', '"te\\u0078t"', '"x"', '"a \\" , { \\\\"', '"\\u4e2d\\ud83d\\ude00\\n"', '"\\ud800"', '"\\q"', '"\t"',
    '""', '"long enough for words of eight bytes, \\t\\/\\b\\f\\r, twice over"', '"\u4e2d\u6587\u00e9\U0001f600 plain"',
    '"\\u0000\\u001f\\u07ff\\u0800\\ud7ff\\ue000\\uffff\\ud800\\udc00\\udbff\\udfff"', '"\\udc00"', '"\\udc00\\ud800"',
    '"\x00"', '"\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U0010ffff"',
]  # fmt: skip
NUMBERS = [
    "0", "-0", "-0.0", "01", "1.", ".5", "1e5", "1E-400", "1e400", "5e-324", "1.7976931348623157e308", "0.1",
    "123456789.123456789", "18446744073709551616", "-9223372036854775809", "1" * 30, "7" * 5000, "NaN", "-Infinity",
]  # fmt: skip
PIECES = [*STRINGS, *NUMBERS, "{", "}", "[", "]", ":", ": ", ",", " , ", "null", "true", " ", "\0", '"', "\\"]


def outcome(function, raw):
    """What comes back, as text in which -0.0 is no 0 and 1.0 no 1; or the error."""
    try:
        return repr(function(raw))
    except (ValueError, RecursionError) as error:
        return type(error), str(error)


def lines():
    rng = random.Random(4)
    for _ in range(3000):
        keys = rng.choices(STRINGS, [8, 1, 4, *[1] * (len(STRINGS) - 3)], k=rng.randint(0, 4))
        values = [rng.choice([*STRINGS, *NUMBERS, '{"text": "inner"}', '["text", {"x": []}]']) for _ in keys]
        pairs = [key + rng.choice((":", ": ", " :\t")) + value for key, value in zip(keys, values, strict=True)]
        yield "{" + rng.choice((",", ", ")).join(pairs) + "}"
    for _ in range(3000):
        yield '{"text": "' + "".join(rng.choices(PIECES, k=rng.randint(0, 9)))
    yield from (*STRINGS, *NUMBERS, "", "{}", '{"text": "a"} {"text": "b"}', '{"text": "a"', '{"a": 1, "a": 2}')


def test_every_line_is_read_as_the_standard_library_reads_it():
    read = 0
    for line in lines():
        for encoding in ("utf-8", "utf-16", "utf-16-le"):
            raw = line.encode(encoding, "surrogatepass")
            wanted = outcome(json.loads, raw)
            assert outcome(parse_json, raw) == wanted, raw
            read += isinstance(wanted, str)
    assert read > 1000
    for broken in (
        b'{"text": "\xff and more"}',
        b'{"text": "\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"text": "x"}',
        b"[" * 9999,
    ):
        assert outcome(parse_json, broken) == outcome(json.loads, broken)
