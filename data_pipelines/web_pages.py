"""The main text of web pages: of HTML files, and of the responses in WARC archives (also .gz and .zst, and WET).

Text is extracted by resiliparse (its main-content heuristics), WARC records are read by fastwarc. Of a WARC archive,
responses and resources with HTML become documents, and so do the plain texts of WET files; what else was fetched is
set aside as "file:record: not a page: ...", and records that hold no content (requests, warcinfo) are passed over.
"""

import gzip
import io
import re
import zlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines import readers
from data_pipelines.document import Document, make_document
from data_pipelines.readers import BadRow, File, UntilDamage, opened, read_bytes, set_aside

HTML_TYPES = {"text/html", "application/xhtml+xml"}
MAX_SUM_OF_DEPTHS = 20_000_000
"""Over the tags of a page, how deep each is nested: extraction takes time in proportion, about two seconds at this."""
NUM_TAGS_LOOKED_AT = 2000
"""Pages with fewer tags cannot be nested so deep that it matters."""
TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)[^<>]*?(/?)>")
# Elements that have no end tag, or whose end tag may be left out, or that the parser closes by itself.
NOT_NESTED = frozenset(
    "area base br col embed hr img input link meta param source track wbr p li dt dd tr td th thead tbody tfoot "
    "caption colgroup option optgroup rt rp html head body a b big code em font i nobr s "
    "small strike strong tt u".split()
)


GZIP_MAGIC = b"\x1f\x8b\x08"
SECOND_RECORD = b"\r\n\r\nWARC/1."
HEAD_BYTES = 1 << 16
"""For the heads of a record, beside its content of at most MAX_ROW_BYTES."""


class Page(NamedTuple):
    """title: None where the page has none."""

    text: str
    title: str | None


def page_of(raw: bytes, *, charset: str | None = None) -> Page:
    """The main text and the title of an HTML page. Raises ValueError with the reason where it cannot be parsed.

    Encoding: UTF-8 where the bytes are that, else the charset that the server named, else the page's own `meta` tag,
    else what resiliparse detects.
    """
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.html import HTMLTree

    html = decoded(raw, charset=charset)
    if sum_of_depths(html) > MAX_SUM_OF_DEPTHS:
        raise ValueError("its tags are nested too deep for a page that people read")
    try:
        tree = HTMLTree.parse(html)
        text = extract_plain_text(tree, main_content=True, alt_texts=False).strip()
        title = " ".join((tree.title or "").split())
    except BaseException as error:
        # The library has kinds of its own, and a panic of its Rust is not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the page cannot be parsed ({type(error).__name__}: {error})") from error
    return Page(text, title or None)


def decoded(raw: bytes, *, charset: str | None = None) -> str:
    """The bytes of a page as text; the order in which encodings are tried is that of `page_of`."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    encoding = charset and map_encoding_to_html5(charset, fallback_utf8=False)
    return bytes_to_str(raw, encoding or detect_encoding(raw, from_html_meta=True))


def sum_of_depths(html: str) -> int:
    """Over all tags, how many elements are open where they stand; 0 for pages with few tags."""
    if html.count("<") < NUM_TAGS_LOOKED_AT:
        return 0
    steps = [0 if alone or name.lower() in NOT_NESTED else -1 if end else 1 for end, name, alone in TAG.findall(html)]
    return int(np.maximum(np.cumsum(steps), 0).sum()) if steps else 0


def html_document(file: File, *, on_bad_row: BadRow = None) -> Iterator[Document]:
    """The main text of an HTML file as one document; its title goes to meta."""
    with opened(file) as content:
        raw = read_bytes(content, readers.MAX_ROW_BYTES + 1)
    if len(raw) > readers.MAX_ROW_BYTES:
        set_aside(f"{file.path}:1: one page of more than {readers.MAX_ROW_BYTES} bytes", on_bad_row)
        return
    try:
        page = page_of(raw)
    except ValueError as error:
        set_aside(f"{file.path}: {error}", on_bad_row)
        return
    meta = {"title": page.title} if page.title else {}
    if file.repository:
        meta["repository"] = file.repository
    yield make_document(page.text, source=file.path.parent.name or "file", path=file.name, meta=meta)


# --- WARC ------------------------------------------------------------------------------------------------------------


def warc_documents(file: File, *, on_bad_row: BadRow = None) -> Iterator[Document]:
    """A document per page of a WARC archive: path is its address; meta has date, title and the record it stands in.

    A record is in memory at a time. Of a .warc.gz whose records are packed one by one, as crawlers write it, a damaged
    record is set aside and the next ones are read; of other archives what comes before the damage is kept.
    """
    number = 0
    if file.stream is None and file.path.suffix.lower() == ".gz":
        with file.path.open("rb", buffering=readers.BUFFER_BYTES) as raw:
            readers.follow(file, raw)
            for content, damage in _unpacked_pieces(raw):
                if damage is not None:
                    number += 1
                    set_aside(f"{file.path}:{number}: cut off or damaged here ({damage}); copy it again", on_bad_row)
                else:
                    number = yield from _stream_documents(content, file, number, on_bad_row, goes_on=True)
    else:
        with opened(file) as stream:
            number = yield from _stream_documents(UntilDamage(stream), file, 0, on_bad_row, goes_on=False)
    if not number:
        set_aside(f"{file.path}: there is no WARC record in it", on_bad_row)


def _stream_documents(
    whole: Any, file: File, number: int, on_bad_row: BadRow, *, goes_on: bool
) -> Generator[Document, None, int]:
    """The documents of a stream of records, `number` of the archive being before it; returns how many are behind it.

    goes_on: whether records of the archive may follow where this stream is damaged.
    """
    from fastwarc.warc import ArchiveIterator

    is_cut_off = False
    try:
        for record in ArchiveIterator(whole, parse_http=False, stream_detect=False):
            number += 1
            place = f"{file.path}:{number}"
            try:
                yield from _record_document(record, file, number)
            except EOFError as error:
                is_cut_off = True
                what = "this record is cut off" if goes_on else "the archive is cut off in this record"
                set_aside(f"{place}: {what}, {error}", on_bad_row)
            except ValueError as error:
                address = record.headers.get("WARC-Target-URI", "").strip("<>")
                set_aside(f"{place}: {error} ({address})", on_bad_row)
    except OSError as error:
        number += 1
        where = "here" if goes_on else "from this record on"
        set_aside(f"{file.path}:{number}: damaged {where} ({error}); copy it again", on_bad_row)
        return number
    damage = getattr(whole, "damage", None)
    if damage and not is_cut_off:
        number += 1
        set_aside(f"{file.path}:{number}: cut off or damaged here ({damage}); copy it again", on_bad_row)
    return number


class Piece(NamedTuple):
    """A stream of what was packed, or why it cannot be had."""

    content: Any
    damage: Exception | None


def _unpacked_pieces(raw: BinaryIO) -> Iterator[Piece]:
    """What each member of a gzip file holds. A damaged one gives no content, and the next is looked for behind it.

    One that is larger than a record may be, or is damaged and holds several (the whole archive, packed as one), is
    streamed to the end of the file.
    """
    start, is_searching = 0, False
    while True:
        raw.seek(start)
        unpack, pieces, size, stop, damage = zlib.decompressobj(wbits=31), [], 0, start, None
        while not unpack.eof and size <= readers.MAX_ROW_BYTES + HEAD_BYTES:
            packed = raw.read(1 << 14)
            if not pieces and not packed.strip(b"\0"):  # the end; some writers fill a block with zeros
                if not packed:
                    return
                start = stop = stop + len(packed)
                continue
            if not packed:
                damage = EOFError("Compressed file ended before the end-of-stream marker was reached")
                break
            stop += len(packed)
            try:
                pieces.append(unpack.decompress(packed))
            except zlib.error as error:
                damage = error
                break
            size += len(pieces[-1])
        held = b"".join(pieces)
        if damage is not None and SECOND_RECORD not in held:
            if not is_searching:
                yield Piece(None, damage)
            start, is_searching = _next_member(raw, start + 1), True
        elif not unpack.eof:
            raw.seek(start)
            yield Piece(UntilDamage(gzip.GzipFile(fileobj=raw)), None)
            return
        else:
            yield Piece(io.BytesIO(held), None)
            start, is_searching = stop - len(unpack.unused_data), False


def _next_member(raw: BinaryIO, start: int) -> int:
    """Where, from `start` on, bytes look like the beginning of a gzip member; the end of the file where none do."""
    raw.seek(start)
    held = b""
    while block := raw.read(1 << 16):
        held += block
        if (found := held.find(GZIP_MAGIC)) >= 0:
            return start + found
        start, held = start + len(held) - len(GZIP_MAGIC), held[-len(GZIP_MAGIC) :]
    return start + len(held)


def _record_document(record: Any, file: File, number: int) -> Iterator[Document]:
    """The page in a record; none where the record is no content. Raises what `_record_page` raises."""
    from fastwarc.warc import WarcRecordType

    headers = record.headers
    if "Content-Length" not in headers:
        raise EOFError("in its head")
    if record.record_type not in (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion):
        return
    text, title = _record_page(record)
    date, place = headers.get("WARC-Date"), f"{file.name}:{number}"
    meta = {"record": place} | ({"date": date} if date else {}) | ({"title": title} if title else {})
    address = headers.get("WARC-Target-URI", "").strip("<>")
    yield make_document(text, source=file.path.stem, path=address or place, meta=meta)


def _record_page(record: Any) -> Page:
    """Raises ValueError where the record holds no page, EOFError where it is cut off."""
    from fastwarc.warc import WarcRecord, WarcRecordType

    wanted, most = record.content_length, readers.MAX_ROW_BYTES
    if wanted > most:
        raise ValueError(f"a record of {wanted} bytes, more than {most}")
    raw = read_bytes(record.reader, wanted)
    if len(raw) < wanted:
        raise EOFError(f"{len(raw)} of {wanted} bytes are there")
    kind, charset = record.headers.get("Content-Type", "").partition(";")[0].strip().lower(), None
    if record.is_http:
        # In a record of its own: after an error in one of the archive's, its iterator would not go on.
        answer = WarcRecord()
        answer.is_http = True
        answer.set_bytes_content(raw)
        try:
            answer.parse_http(auto_decode="all")
            raw = read_bytes(answer.reader, most + 1)
        except OSError as error:
            raise ValueError(f"what was sent cannot be decoded ({error})") from error
        status = answer.http_headers.status_code if answer.http_headers else None
        if status != 200:
            raise ValueError(f"not a page: HTTP status {status}" if status else "not a page: no HTTP response")
        kind, charset = (answer.http_content_type or "").lower(), answer.http_charset
    is_text = record.record_type == WarcRecordType.conversion and kind == "text/plain"
    if not is_text and kind not in HTML_TYPES:
        raise ValueError(f"not a page: content of type {kind or 'unknown'}")
    if len(raw) > most:
        raise ValueError(f"one page of more than {most} bytes")
    return Page(raw.decode("utf-8", "replace"), None) if is_text else page_of(raw, charset=charset)
