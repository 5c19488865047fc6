import gzip
import time

import pytest

from data_pipelines import readers, sources, web_pages

PAGE = """<html><head><title>A  &amp; title</title></head><body><nav><a href="/">Home</a></nav>
<article><h1>Heading</h1><p>The first paragraph of the text.</p><img alt="a picture"><p>{}</p></article>
<footer>Imprint</footer><script>var hidden = 1</script></body></html>"""


def record(kind, address, content_type, body):
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{len(body)}>\r\nWARC-Target-URI: {address}\r\n"
        f"WARC-Date: 2020-01-02T03:04:05Z\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body + b"\r\n\r\n"


def response(address, body, *, content_type="text/html; charset=utf-8", status="200 OK", encoding=""):
    line = f"Content-Encoding: {encoding}\r\n" if encoding else ""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\n{line}Content-Length: {len(body)}\r\n\r\n"
    return record("response", address, "application/http;msgtype=response", head.encode() + body)


def page(text):
    return PAGE.format(text).encode()


@pytest.fixture
def records():
    return [
        record("warcinfo", "", "application/warc-fields", b"software: s"),
        record("request", "http://a.org/", "application/http;msgtype=request", b"GET / HTTP/1.1\r\n\r\n"),
        response("http://a.org/", page("Der zweite, aus Köln.")),
        response("http://b.org/gzip", gzip.compress(page("Second.")), encoding="gzip"),
        response("http://c.cn/", page("第二段文字。").decode().encode("gbk"), content_type="text/html; charset=gb2312"),
        response("http://c.org/i.png", b"\x89PNG", content_type="image/png"),
        response("http://d.org/", page("Gone."), status="404 Not Found"),
        response("http://e.org/", b"no gzip", encoding="gzip"),
        record("conversion", "http://f.org/", "text/plain", "A text of a WET file: größer.".encode()),
        record("resource", "http://g.org/", "text/html", page("A resource.")),
        response("http://bomb.org/", gzip.compress(b"<p>" + b"a" * 3_000_000), encoding="gzip"),
        response("http://long.org/", b"a" * 200_000),
        response("http://last.org/", page("Last.")),
    ]


def read(path):
    bad = []
    return sources.read([path], on_bad_row=bad.append), [message.removeprefix(f"{path}:") for message in bad]


@pytest.mark.parametrize("name", ["x.warc", "x.warc.gz"])
def test_pages_of_a_warc_with_address_date_and_title(tmp_path, records, name, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100_000)
    pack = gzip.compress if name.endswith(".gz") else bytes
    (tmp_path / name).write_bytes(b"".join(map(pack, records)))
    found, bad = read(tmp_path / name)
    assert [d.path.removeprefix("http://") for d in found] == [
        "a.org/", "b.org/gzip", "c.cn/", "f.org/", "g.org/", "last.org/"
    ]  # fmt: skip
    first = found[0]
    assert first.text == "Heading\n\nThe first paragraph of the text.\n\nDer zweite, aus Köln."
    assert first.meta == {"date": "2020-01-02T03:04:05Z", "record": f"{name}:3", "title": "A & title"}
    assert (first.domain, first.language) == ("web", "und")
    assert found[2].text.endswith("第二段文字。") and found[3].text == "A text of a WET file: größer."
    assert bad == [
        "6: not a page: content of type image/png (http://c.org/i.png)",
        "7: not a page: HTTP status 404 (http://d.org/)",
        "8: what was sent cannot be decoded (Gzip decompression error: data error) (http://e.org/)",
        "11: one page of more than 100000 bytes (http://bomb.org/)",
        "12: a record of 200083 bytes, more than 100000 (http://long.org/)",
    ]


def test_a_warc_that_is_cut_off_or_damaged_gives_what_comes_before(tmp_path, records):
    raw, packed = b"".join(records), b"".join(map(gzip.compress, records))
    first = len(b"".join(map(gzip.compress, records[:3])))
    garbled = b"".join([*records[:3], b"x" * 30, *records[3:]])
    for name, content, kept, message in (
        ("body.warc", raw[: raw.index(b"\x1f\x8b") + 20], 1, "4: the archive is cut off in this record, "),
        (
            "head.warc",
            raw[: raw.index(b"http://b.org") + 4],
            1,
            "4: the archive is cut off in this record, in its head",
        ),
        ("cut.warc.gz", packed[: first + 250], 1, "4: "),
        ("end.warc.gz", packed[: first - 4], 0, "3: cut off or damaged here (Compressed file"),
        ("whole.warc.gz", gzip.compress(raw)[:-4], 8, "14: cut off or damaged here (Compressed file"),
        ("garbled.warc", garbled, 1, "4: damaged from this record on (Invalid WARC header)"),
        ("text.warc", b"no archive\n", 0, "1: damaged from this record on"),
        ("empty.warc", b"", 0, " there is no WARC record in it"),
    ):
        path, bad = tmp_path / name, []
        path.write_bytes(content)
        (file,) = sources.find_files([path])
        found = list(web_pages.warc_documents(file, on_bad_row=bad.append))
        assert len(found) == kept, name
        assert bad[-1].removeprefix(f"{path}:").startswith(message), (name, bad)
        assert len(bad) == (4 if name.startswith("whole") else 1), (name, bad)


def test_a_damaged_record_of_a_warc_that_is_packed_record_by_record_costs_itself_alone(tmp_path, records):
    packed = [gzip.compress(one) for one in (*records[:5], b"WARC/1.0\r\nno: length\r\n\r\n", b"x" * 99, records[-1])]
    flipped = bytearray(packed[2])
    flipped[-20] ^= 255
    (tmp_path / "x.warc.gz").write_bytes(b"".join([*packed[:2], flipped, *packed[3:], bytes(100)]))
    found, bad = read(tmp_path / "x.warc.gz")
    assert [(d.path, d.meta["record"]) for d in found] == [
        ("http://b.org/gzip", "x.warc.gz:4"), ("http://c.cn/", "x.warc.gz:5"), ("http://last.org/", "x.warc.gz:8")
    ]  # fmt: skip
    assert [message.partition(" (")[0] for message in bad] == [
        "3: cut off or damaged here", "6: this record is cut off, in its head", "7: damaged here"
    ]  # fmt: skip


def test_html_files_in_their_encodings(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    meta = PAGE.replace("<head>", '<head><meta charset="windows-1251">')
    (folder / "a.html").write_bytes(meta.format("Второй абзац.").encode("cp1251"))
    (folder / "b.htm").write_bytes(PAGE.format("二番目の段落、日本語で書かれています。" * 3).encode("shift_jis"))
    (folder / "c.xhtml.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + page("Drittens, in Köln.")))
    (folder / "d.html").write_bytes(b"")
    found, bad = read(folder)
    texts = ["Второй абзац.", "二番目の段落、日本語で書か", "Drittens, in ", ""]
    assert [d.text.rpartition("\n\n")[2][:13] for d in found] == texts
    assert not bad and found[0].meta == {"title": "A & title", "repository": "site"} and found[0].path == "site/a.html"


def test_pages_that_are_nested_too_deep_are_set_aside_at_once(tmp_path):
    (tmp_path / "deep.html").write_text("<div>" * 50_000 + "x")
    (tmp_path / "svg.html").write_text(f"<p>A page.</p>{'<path d=m />' * 9000}{'<br><li>x' * 9000}")
    started = time.monotonic()
    found, bad = read(tmp_path)
    assert time.monotonic() - started < 5
    assert len(found) == 1 and len(bad) == 1 and "deep.html: its tags are nested too deep" in f"{tmp_path}:{bad[0]}"
    assert web_pages.sum_of_depths("<a><b/></a>") == 0
    assert web_pages.sum_of_depths("<div>" * 2000 + "</div>" * 2000) == 2000 * 2001 // 2 + 1999 * 2000 // 2
