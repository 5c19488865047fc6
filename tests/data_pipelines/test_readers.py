"""A row of JSON is what the standard library makes of it, its errors included, one by one and in batches."""

import functools
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from data_pipelines import json_lines, readers
from data_pipelines.chain import Sizes, batches
from data_pipelines.document import to_documents
from data_pipelines.readers import File, parse_json, row_documents

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


BROKEN = [b'{"text": "\xff and more"}', b'{"text": "\xed\xa0\x80"}', b"[" * 9999]
FINE = [
    b'{"text": "one\\ntwo \\"three\\" \\u00e9\\ud83d\\ude00\\u4e2d\\u0041", "id": 3, '
    b'"tags": {"text": ["text", {"text": "x"}]}}',
    '{"path": "a/\\ud800.md", "source": "s", "text": "中文é😀, a\x7f", "licence": null}'.encode(),
    b'\xef\xbb\xbf  { "content" :\t"", "language": "en", "date": "2020", "n": [1, 2.5, NaN]}\r',
    b'{"a": "text", "text": "' + b"x" * 62 + b"\\n" + b"y" * 63 + b"\\\\" + b"z" * 200 + b'"}',
    *(b'{"text": "' + b"a" * size + b'\\t' + b"b" * (64 - size) + b'"}' for size in range(65)),
]  # fmt: skip


def read(how, raw):
    """The documents of the lines, and what was set aside; and how many came in batches."""
    bad = []
    file = File(Path("/nowhere/rows.jsonl"), "rows.jsonl", stream=io.BytesIO(raw))
    found = list(how(file, on_bad_row=bad.append))
    documents = [document for batch in batches(found, Sizes()) for document in to_documents(batch)]
    return (repr(documents), bad), sum(each.num_rows for each in found if isinstance(each, pa.RecordBatch))


def test_lines_in_batches_are_what_they_are_one_by_one():
    for line in [*(line.encode("utf-8", "surrogatepass") for line in lines()), *BROKEN, *FINE]:
        assert read(json_lines.row_batches, line)[0] == read(row_documents, line)[0], line
    together = b"\n".join([*FINE, b"", b" \t", FINE[0]])
    found, in_batches = read(json_lines.row_batches, together)
    assert found == read(row_documents, together)[0] and in_batches == len(FINE) + 1, "no such line is left over"
    for broken in BROKEN:
        one_is_bad = b"\n".join([FINE[0], broken, FINE[1]])
        (documents, bad), in_batches = read(json_lines.row_batches, one_is_bad)
        assert (documents, bad) == read(row_documents, one_is_bad)[0] and in_batches == 0
        assert b"\xed" in broken or bad[0].startswith("/nowhere/rows.jsonl:2: not valid JSON"), "half a pair is read"


@pytest.mark.parametrize("sizes", [Sizes(batch_rows=2), Sizes(batch_bytes=64), Sizes(batch_bytes=700), Sizes()])
def test_blocks_hold_whole_lines(sizes, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 500)
    long = [b'{"text": "' + b"x" * size + b'"}' for size in (1100, 486, 487, 488, 489)]  # 12 bytes more, and a newline
    raw = b"\n".join([b"", FINE[0], *long, FINE[1], b" ", FINE[3], *FINE[4:30], long[0], *BROKEN[:1], FINE[0]])
    second = raw.index(FINE[1])
    for start, stop, first_line in ((0, -1, 1), (0, second, 1), (second, len(raw), 8)):
        found = []
        for how in (row_documents, functools.partial(json_lines.row_batches, sizes=sizes)):
            bad, file = [], File(Path("/nowhere/rows.jsonl"), "rows.jsonl", stream=io.BytesIO(raw))
            rows = how(file, on_bad_row=bad.append, start=start, stop=stop, first_line=first_line)
            found.append(([document for batch in batches(rows, Sizes()) for document in to_documents(batch)], bad))
        assert found[0] == found[1] and len(found[0][0]) >= 3 and "a line of more than 500 bytes" in found[0][1][0]


@pytest.mark.parametrize("sizes", [Sizes(batch_rows=7), Sizes(batch_bytes=300), Sizes()])
def test_batches_that_are_read_are_cut_to_their_sizes(sizes):
    (batch,) = json_lines.row_batches(File(Path("r.jsonl"), "r.jsonl", stream=io.BytesIO(b"\n".join(FINE * 3))))
    found = list(batches([batch, *to_documents(batch)[:2], batch], sizes))
    assert pa.concat_batches(found).equals(pa.concat_batches([batch, batch.slice(0, 2), batch]))
    assert max(each.num_rows for each in found) <= sizes.batch_rows
    assert sizes.batch_bytes > 300 or max(each.num_rows for each in found) < 9
