import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import pii
from data_pipelines.document import make_document, to_batch, to_documents

EXAMPLES = [
    ("email", "Write to joe.o'neil+x@mail.example.co.uk.", "Write to joe.o'[EMAIL]."),
    ("email", "mailto:a_b@x-y.org?subject=1", "mailto:[EMAIL]?subject=1"),
    ("email", "联系我们：service@例.com 或 info@abc.cn。", "联系我们：service@例.com 或 [EMAIL]。"),
    ("phone", "Call +1 (415) 555-2671 now", "Call [PHONE] now"),
    ("phone", "+44 20 7946 0958, +4915112345678; +33.1.42.68.53.00", "[PHONE], [PHONE]; [PHONE]"),
    ("phone", "+1 415 555 2671 2024-01-02", "[PHONE] 2024-01-02"),
    ("phone", "电话13812345678，或 138-1234-5678 / +86 138 1234 5678", "电话[PHONE]，或 [PHONE] / [PHONE]"),
    ("ip", "from 85.214.132.117:8080 and http://8.8.8.88/x", "from [IP_ADDRESS]:8080 and http://[IP_ADDRESS]/x"),
    ("ip", "[2a00:1450:4001:81b::200e]:443", "[[IP_ADDRESS]]:443"),
    ("chinese_id", "身份证11010519491231002X。440524188001010014", "身份证[ID_NUMBER]。[ID_NUMBER]"),
    ("card", "4111 1111 1111 1111, 378282246310005 6011-1111-1111-1117", "[CARD_NUMBER], [CARD_NUMBER] [CARD_NUMBER]"),
    ("iban", "IBAN DE89 3704 0044 0532 0130 00 BIC; GB82WEST12345698765432", "IBAN [IBAN] BIC; [IBAN]"),
]


@pytest.mark.parametrize(("kind", "text", "masked"), EXAMPLES)
def test_each_kind_is_masked_by_its_placeholder(kind, text, masked):
    found = pii.mask_text(text)
    assert found.text == masked
    assert found.counts == {kind: masked.count(pii.PLACEHOLDERS[kind].decode())}
    others = [other for other in pii.KINDS if other != kind]
    assert pii.mask_text(text, others).text == text


@pytest.mark.parametrize(
    "text",
    [
        "git@github.com:org/repo.git and https://user:secret@host.example.com/x",
        "@property @app.route x@weights.transpose logo@2x.png a@b.at[0] pkg@1.2.3 @user@",
        "10.0.0.200 127.0.0.1 192.168.1.77 172.16.0.99 169.254.1.200 224.0.0.200 256.100.1.1 01.200.3.4",
        "v85.0.18.52 version 8.0.8.52 Chrome/85.0.8.52 jax==85.0.8.52 lib-85.0.8.52 85.0.18.52.7 版本：85.0.18.52",
        "Section 3.1.2.4, 1.2.3.4, 12.30.1.2",
        "fe80:0:0::1 ::1 std::vector abc::def::a 2001:db8:0::1 values[2000::2] 12:34:56 aa:bb:cc:dd:ee:ff",
        "2024-01-02T13:45:06+08:00 20240102134506123 2024/01/02 1700000000000 1700000000000000000",
        "+1.23456789 -1.5e+4412345678 3.13812345678 13812345678.5 13,812,345,678 +1234567890",
        "110105194912310021 11010519491331002X 990105194912310029",  # check digit, month, province
        "4111111111111112 1234567812345670 4111 1111-1111 1111 0.4111111111111111 4111111111111111.5",
        "DE89370400440532013001 DE8937040044053201300 XX89370400440532013000 aDE89370400440532013000",
        "id 13812345678a a13812345678 138123456789 /13812345678 0x13812345678 11012345678",
        "commit 13812345678abcdef0 sha1 DA39A3EE5E6B4B0D3255BFEF95601890AFD80709",
    ],
)
def test_what_only_looks_alike_stays(text):
    assert pii.mask_text(text) == (text, {})


CODE = st.sampled_from(
    ["x = y[1:2]", "f(a, b)", "0x{:08x}", "a@b", "for i in range(10):", "1e-5", "#fff", "u'\\u4e2d'", "i++", "+x", "::"]
)
HARMLESS = st.one_of(
    st.integers(0, 999).map(str),
    st.tuples(*[st.integers(0, 99)] * 3).map("{0[0]}.{0[1]}.{0[2]}".format),
    st.tuples(*[st.integers(0, 31)] * 4).map(lambda parts: ".".join(map(str, parts))),
    st.tuples(*[st.integers(0, 255)] * 4).map(lambda parts: "v" + ".".join(map(str, parts))),
    st.dates().map(str),
    st.datetimes().map(lambda moment: moment.isoformat()),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(allow_nan=False, allow_infinity=False).map("{:+.6f}".format),
    st.binary(min_size=1, max_size=20).map(lambda raw: "0x" + raw.hex()),
    st.uuids().map(str),
    CODE,
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(HARMLESS, max_size=8), separator=st.sampled_from([", ", "\n", "; ", "的", " = "]))
def test_versions_dates_floats_hexadecimal_and_code_are_not_masked(parts, separator):
    text = separator.join(parts)
    assert pii.mask_text(text) == (text, {})


NEAR_MISSES = st.lists(
    st.sampled_from(
        [
            "13812345678", "+8613812345678", "+", "86", "-", ".", " ", "@", "a@b.com", "x.cn", "8.8.8.88", "2a00:", ":",
            "1", "4111111111111111", "11010519491231002X", "DE89370400440532013000", "/", "v", "的", "[EMAIL]", "\n", "://",
        ]
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(pieces=NEAR_MISSES)
def test_masking_twice_changes_nothing_and_the_scan_misses_nothing(pieces):
    text = "".join(pieces)
    once = pii.mask_text(text)
    assert pii.mask_text(once.text) == (once.text, {})
    raw = once.text.encode()
    assert pii.find(raw, range(len(raw))) == []  # every place of the text, not the candidates alone
    assert pii.find(text.encode(), range(len(text.encode()))) == [] or once.counts


@settings(max_examples=15, deadline=None)
@given(number=st.from_regex(r"\A[0-9]{4}(19|20)[0-9]{2}(0[1-9]|1[0-2])(0[1-9]|1[0-9]|2[0-8])[0-9]{3}\Z"))
def test_one_of_eleven_check_digits_makes_an_identity_number(number):
    assert sum(pii.mask_text("11" + number + check).counts["chinese_id"] for check in "0123456789X") == 1


def test_the_stage_changes_texts_counts_in_meta_and_drops_nothing():
    texts = ["nothing", "a@b.com, c@d.org, 85.214.132.117", "", "中13812345678"]
    batch = to_batch([make_document(t, source="s", path="p", meta={"url": "u"}) for t in texts])
    outcome = pii.masked()(batch)
    documents = to_documents(outcome.batch)
    assert [d.text for d in documents] == ["nothing", "[EMAIL], [EMAIL], [IP_ADDRESS]", "", "中[PHONE]"]
    assert list(outcome.reasons) == [None] * 4
    assert list(outcome.details) == [None, "masked: email x2, ip x1", None, "masked: phone x1"]
    assert documents[1].meta == {"url": "u", "personal_data_masked": {"email": 2, "ip": 1}}
    assert documents[0].meta == {"url": "u"} and outcome.batch.column("id").equals(batch.column("id"))
    assert pii.count_masked(outcome.batch) == {"email": 2, "phone": 1, "ip": 1}
    assert pii.masked()(outcome.batch).batch.equals(outcome.batch)
    sliced = pii.masked(["phone"])(batch.slice(3))
    assert json.loads(sliced.batch.column("meta")[0].as_py())["personal_data_masked"] == {"phone": 1}
    assert pii.masked()(to_batch([])).reasons == []


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="give some of email, phone"):
        pii.masked(["name"])


def test_the_scan_stays_inside_its_document():
    from data_pipelines import pii_scan

    data, places = np.frombuffer(b"85.214.132.117@", np.uint8), np.zeros(16, np.int64)
    assert [pii_scan.candidates(data, 0, stop, places) for stop in (0, 4, 14, 15)] == [0, 0, 4, 5]
