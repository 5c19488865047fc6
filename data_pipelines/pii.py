"""Personal data masked: e-mail, phone, public IP addresses, Chinese identity numbers, payment cards, IBANs.

Each is replaced by the placeholder of its kind, the same everywhere ("[EMAIL]"), so the result depends on nothing but
the text, and masking twice changes nothing. Numbers must have their right form and, where there is one, their check
digits: versions, dates, floats, hexadecimal and code stay. No document is dropped; `meta` holds the counts.

    Stage("mask_personal_data", "batch", masked())
"""

import functools
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from data_pipelines.document import SCHEMA, Outcome, text_buffer, with_text

PLACEHOLDERS = {
    "email": b"[EMAIL]",
    "phone": b"[PHONE]",
    "ip": b"[IP_ADDRESS]",
    "chinese_id": b"[ID_NUMBER]",
    "card": b"[CARD_NUMBER]",
    "iban": b"[IBAN]",
}
"""Kind -> what stands in its place."""
KINDS = tuple(PLACEHOLDERS)
FIELD = "personal_data_masked"
"""Of a document's meta: kind -> how often it was masked."""

# Bytes, not characters: \w is ASCII alone, so that a Chinese character beside a number is a boundary.
BEFORE = rb"(?<![\w.+/])(?<!\d[-,:])"
AFTER = rb"(?!\w)(?![-.,:/]\d)"
LOCAL_PART = re.compile(rb"[A-Za-z0-9](?:[A-Za-z0-9._%+-]*[A-Za-z0-9_%+-])?$")
MAIL_DOMAIN = re.compile(
    rb"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,24}))(?![\w@(\[=]|[.-]\w|:[\w.~-]*/)"
)
CREDENTIALS = re.compile(rb"://[^\s/?#]*$")
"""Before an @: user and password of a URL, not the name of a mailbox."""
COUNTRY_DOMAINS = frozenset(
    """ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc
    cd cf cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga
    gb gd ge gf gg gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo
    jp ke kg kh ki km kn kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr
    ms mt mu mv mw mx my mz na nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re
    ro rs ru rw sa sb sc sd se sg sh si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr
    tt tv tw tz ua ug uk us uy uz va vc ve vg vi vn vu wf ws ye yt za zm zw""".split()
)
OTHER_DOMAINS = frozenset(
    """com net org edu gov mil int info biz name pro mobi jobs travel museum coop aero asia cat tel post xyz online site
    top club shop app dev blog tech store email cloud live world space website agency company group team work life news
    today digital media studio design solutions services network systems support center academy education school
    university institute foundation international global business consulting finance health care vip wang ltd icu
    example test invalid""".split()
)
"""Of the domains with more than two letters the usual ones: `x@weights.transpose` is code."""
E164 = re.compile(BEFORE + rb"\+\d(?: ?\(\d{1,4}\)|[ .-]?\d)*")
CHINESE_MOBILE = re.compile(
    BEFORE + rb"(?:(?:00)?86[ -]?)?1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])([ -]?)\d{4}\1\d{4}" + AFTER
)
COUNTRY_CODE = re.compile(
    rb"1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|21[1-368]|2[2346]\d|25[0-8]|29[0179]|35\d|37\d|38[0-35-79]"
    rb"|42[013]|50\d|59\d|67[02-9]|68\d|69[0-2]|80[08]|85[02356]|87[08]|88[0-36]|96\d|97[0-79]|99[2-68]"
)
NORTH_AMERICAN = re.compile(rb"1[2-9]\d\d[2-9]\d{6}")
CHINESE = re.compile(rb"86(?:1[3-9]\d{9}|0?[2-9]\d{8,10})")
OCTET = rb"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = re.compile(rb"(?<![\w.+-])(?<!\w/)(?<!\d:)" + rb"\.".join([OCTET] * 4) + rb"(?![\w-])(?!\.\w)")
IPV6 = re.compile(rb"(?<![\w.:])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:])(?!\.\d)")
VERSION = re.compile(
    rb"(?:\b(?:v|ver|version|release|rev|build)\.?[\s:=]*|\xe7\x89\x88\xe6\x9c\xac\S{0,3}\s?|[=<>~!^]=\s*)$", re.I
)
CHINESE_ID = re.compile(
    BEFORE + rb"(?:1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[123]|91)\d{4}"
    rb"(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx]" + AFTER
)  # fmt: skip
CARD = re.compile(
    BEFORE + rb"(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|3[47]\d\d([ -])\d{6}\2\d{5}"
    rb"|3[068]\d\d([ -])\d{6}\3\d{4}|\d{13,19})" + AFTER
)  # fmt: skip
CARD_NUMBER = re.compile(
    rb"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    rb"|(?:6011|65\d\d|64[4-9]\d)\d{12,15}|62\d{14,17}|35(?:2[89]|[3-8]\d)\d{12}"
)
IBAN_LENGTHS: Mapping[bytes, int] = {
    item[:2].encode(): int(item[2:])
    for item in """AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29
    ES24 FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21
    LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24
    SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20""".split()
}
"""ISO 13616: characters of an IBAN by country."""
LEAST_OCTET = 32
"""An address of version 4 whose four numbers all lie below is taken for a version or the number of a section."""


class Masked(NamedTuple):
    """counts: kind -> how often it was masked."""

    text: str
    counts: Counter[str]


class Span(NamedTuple):
    start: int
    stop: int
    kind: str


def masked(kinds: Sequence[str] = KINDS) -> Callable[[pa.RecordBatch], Outcome]:
    """Returns the stage that masks these kinds of personal data and drops nothing.

    A changed row has the counts in its detail and in its meta, {"personal_data_masked": {"email": 2}}; `count_masked`
    adds them up.
    """
    wanted = _known(kinds)

    def apply(batch: pa.RecordBatch) -> Outcome:
        rows = _candidate_rows(batch)
        column = batch.column("text")
        changed = {row: found for row in rows if (found := mask_text(column[row].as_py(), wanted)).counts}
        details = [None if row not in changed else _told(changed[row].counts) for row in range(batch.num_rows)]
        if changed:
            texts, metas = column.to_pylist(), batch.column("meta").to_pylist()
            for row, found in changed.items():
                texts[row], metas[row] = found.text, _with_counts(metas[row], found.counts)
            place = SCHEMA.get_field_index("meta")
            batch = with_text(batch, texts).set_column(place, SCHEMA.field("meta"), pa.array(metas, pa.string()))
        return Outcome(batch, [None] * batch.num_rows, details)

    return apply


def mask_text(text: str, kinds: Sequence[str] = KINDS) -> Masked:
    """Returns the text with a placeholder for each piece of personal data, and how many of each kind there were.

    Repeated until nothing is found: what stood glued to one number may be a number by itself once that is gone.
    """
    from data_pipelines import pii_scan

    wanted, counts = _known(kinds), Counter()
    raw = text.encode("utf-8", "surrogatepass")
    while True:
        data = np.frombuffer(raw, np.uint8)
        places = np.empty(len(data), np.int64)
        spans = find(raw, places[: pii_scan.candidates(data, 0, len(data), places)].tolist(), wanted)
        if not spans:
            return Masked(raw.decode("utf-8", "surrogatepass"), counts)
        pieces, end = [], 0
        for span in spans:
            pieces += [raw[end : span.start], PLACEHOLDERS[span.kind]]
            end = span.stop
        counts.update(span.kind for span in spans)
        raw = b"".join([*pieces, raw[end:]])


def count_masked(batch: pa.RecordBatch) -> dict[str, int]:
    """Returns kind -> number masked over the rows of a batch, read from their meta."""
    counts: Counter[str] = Counter()
    for meta in batch.column("meta").to_pylist():
        if f'"{FIELD}"' in meta:
            counts.update(_counts_in(json.loads(meta)))
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def find(raw: bytes, places: Sequence[int], kinds: Sequence[str] = KINDS) -> list[Span]:
    """Returns the personal data that begins (e-mail: whose @ stands) at one of these places, in order."""
    spans: list[Span] = []
    end = 0
    for place in places:
        if place < end:
            continue
        span = _at(raw, place, end)
        if span and span.kind in kinds:
            spans.append(span)
            end = span.stop
    return spans


def _at(raw: bytes, place: int, end: int) -> Span | None:
    byte = raw[place]
    if byte == 64:
        return _email(raw, place, end)
    if byte == 43:
        stop = _phone(raw, place)
        return Span(place, stop, "phone") if stop else None
    if byte >= 65:
        stop = _iban(raw, place)
        return Span(place, stop, "iban") if stop else None
    for kind, check in (
        ("chinese_id", _chinese_id), ("card", _card), ("phone", _chinese_mobile), ("ip", _ipv4), ("ip", _ipv6)
    ):  # fmt: skip
        stop = check(raw, place)
        if stop:
            return Span(place, stop, kind)
    return None


def _email(raw: bytes, at: int, end: int) -> Span | None:
    domain = MAIL_DOMAIN.match(raw, at)
    if not domain or domain[2].decode().lower() not in (COUNTRY_DOMAINS if len(domain[2]) == 2 else OTHER_DOMAINS):
        return None
    local = LOCAL_PART.search(raw[max(end, at - 64) : at])
    if not local or CREDENTIALS.search(raw[max(end, at - 256) : at]):
        return None
    return Span(at - len(local[0]), domain.end(), "email")


def _phone(raw: bytes, at: int) -> int | None:
    """Where an E.164 number ends that starts with this +: the longest run of its groups that a country can have."""
    found = E164.match(raw, at)
    if not found:
        return None
    for stop in range(min(found.end(), at + 32), at + 8, -1):
        if not AFTER_NUMBER.match(raw, stop) or raw[stop - 1] in b" .-(":
            continue
        separators = set(re.sub(rb"[+\d]", b"", raw[at:stop]))
        digits = re.sub(rb"\D", b"", raw[at:stop])
        # A float has one point; numbers with points have them between all groups.
        if 46 in separators and (len(separators) > 1 or not DOTTED.fullmatch(raw, at, stop)):
            continue
        if _is_international(digits):
            return stop
    return None


AFTER_NUMBER = re.compile(AFTER)
DOTTED = re.compile(rb"\+\d{1,4}(?:(?:\.\d{2,5}){2,5}|(?:\.\d{1,5}){4,5})")


def _is_international(digits: bytes) -> bool:
    if digits[:1] == b"1":
        return bool(NORTH_AMERICAN.fullmatch(digits))
    if digits[:2] == b"86":
        return bool(CHINESE.fullmatch(digits))
    return 9 <= len(digits) <= 15 and bool(COUNTRY_CODE.match(digits))


def _chinese_mobile(raw: bytes, at: int) -> int | None:
    found = CHINESE_MOBILE.match(raw, at)
    return found and found.end()


def _ipv4(raw: bytes, at: int) -> int | None:
    found = IPV4.match(raw, at)
    if not found or VERSION.search(raw[max(0, at - 24) : at]):
        return None
    if max(map(int, found[0].split(b"."))) < LEAST_OCTET:
        return None
    address = ipaddress.IPv4Address(found[0].decode())
    return found.end() if address.is_global and not address.is_multicast else None


def _ipv6(raw: bytes, at: int) -> int | None:
    """2000::/3 alone is public; with at least three colons `values[2000::2]` is none."""
    found = IPV6.match(raw, at)
    try:
        return found.end() if found and ipaddress.IPv6Address(found[0].decode()).is_global else None
    except ValueError:
        return None


def _chinese_id(raw: bytes, at: int) -> int | None:
    """GB 11643: the last of 18 characters is the check of ISO 7064, MOD 11-2."""
    found = CHINESE_ID.match(raw, at)
    if not found:
        return None
    total = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(found[0][:17].decode()))
    return found.end() if "10X98765432"[total % 11] == found[0][17:].decode().upper() else None


def _card(raw: bytes, at: int) -> int | None:
    """ISO 7812: a known issuer, its length, and the check digit of Luhn's formula."""
    found = CARD.match(raw, at)
    if not found:
        return None
    digits = re.sub(rb"\D", b"", found[0])
    if not CARD_NUMBER.fullmatch(digits):
        return None
    doubled = (sum(divmod(2 * (digit - 48), 10)) for digit in digits[-2::-2])
    return found.end() if (sum(doubled) + sum(digit - 48 for digit in digits[::-2])) % 10 == 0 else None


def _iban(raw: bytes, at: int) -> int | None:
    """ISO 13616: the length of its country, and the number of country, check and account is 1 modulo 97."""
    length = IBAN_LENGTHS.get(raw[at : at + 2])
    found = length and _iban_of_length(length).match(raw, at)
    if not found:
        return None
    compact = found[0].replace(b" ", b"").decode()
    return found.end() if int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1 else None


@functools.cache
def _iban_of_length(length: int) -> re.Pattern[bytes]:
    groups, rest = divmod(length - 4, 4)
    tail = b" ?[A-Z0-9]{%d}" % rest if rest else b""
    return re.compile(rb"(?<![\w])[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){%d}%s(?!\w)" % (groups, tail))


def _known(kinds: Sequence[str]) -> tuple[str, ...]:
    unknown = [kind for kind in kinds if kind not in PLACEHOLDERS]
    if unknown or not kinds:
        raise ValueError(f"kinds of personal data are {list(kinds)}; give some of {', '.join(KINDS)}")
    return tuple(kinds)


def _candidate_rows(batch: pa.RecordBatch) -> list[int]:
    """Rows with a candidate: most have none, and are not decoded."""
    from data_pipelines import pii_scan

    data, offsets = text_buffer(batch)
    places = np.empty(int(np.diff(offsets).max(initial=0)), np.int64)
    bounds = zip(offsets[:-1], offsets[1:], strict=True)
    return [row for row, (start, stop) in enumerate(bounds) if pii_scan.candidates(data, start, stop, places)]


def _with_counts(meta: str, counts: Mapping[str, int]) -> str:
    values = json.loads(meta)
    total = Counter(counts)
    total.update(_counts_in(values))
    values[FIELD] = {kind: total[kind] for kind in KINDS if total[kind]}
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def _counts_in(values: Mapping[str, Any]) -> dict[str, int]:
    """What an earlier masking counted; a field of that name that is something else counts nothing."""
    found = values.get(FIELD)
    return {kind: found[kind] for kind in KINDS if isinstance(found.get(kind), int)} if isinstance(found, dict) else {}


def _told(counts: Mapping[str, int]) -> str:
    return "masked: " + ", ".join(f"{kind} x{counts[kind]}" for kind in KINDS if counts.get(kind))
