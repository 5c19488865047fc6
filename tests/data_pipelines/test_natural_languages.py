import pytest

from data_pipelines.document import make_document, to_batch, to_documents
from data_pipelines.natural_languages import SAMPLE, identify_languages, languages_of

ENGLISH = "The harbour was quiet that morning, and the boats lay where the night had left them. "
CHINESE = "清晨的港口很安静，船只停在昨夜留下的地方，几个渔民正在整理他们的网。"
TEXTS = {
    "en": ENGLISH,
    "zh": CHINESE,
    "zh ": "清晨的港口很安靜，船隻停在昨夜留下的地方，幾個漁民正在整理他們的網。",
    "de": "Am Morgen war der Hafen still, und die Boote lagen dort, wo die Nacht sie gelassen hatte.",
    "fr": "Le port était calme ce matin-là, et les bateaux étaient là où la nuit les avait laissés.",
    "ru": "Утром в гавани было тихо, и лодки стояли там, где их оставила ночь.",
    "ja": "朝の港は静かで、船は昨夜のままの場所に並んでいました。",
    "ko": "아침 항구는 조용했고 배들은 밤이 남겨 둔 자리에 있었다.",
    "ar": "كان الميناء هادئا في ذلك الصباح وكانت القوارب راسية في مكانها",
    "he": "הנמל היה שקט באותו בוקר, והסירות עמדו במקומן.",
    "und": "",
    "und ": "hello",
    "und  ": "12 34 56 78 " * 30,
    "und   ": "\x00\x01\n",
}


def identified(*texts, **fields):
    batch = to_batch([make_document(text, source="s", path="p", **fields) for text in texts])
    outcome = identify_languages(batch)
    assert outcome.batch.schema == batch.schema and list(outcome.reasons) == [None] * len(texts)
    return to_documents(outcome.batch)


def test_languages_are_entered_where_there_is_none():
    assert [d.language for d in identified(*TEXTS.values())] == [name.strip() for name in TEXTS]
    assert {d.language for d in identified(ENGLISH, CHINESE, domain="code")} == {"und"}
    assert {d.language for d in identified(ENGLISH, CHINESE, language="fr")} == {"fr"}
    batch = to_batch([make_document(text, source="s", path="p") for text in (ENGLISH, CHINESE, ENGLISH)])
    assert identify_languages(batch.slice(1, 1)).batch.column("language").to_pylist() == ["zh"]
    assert identify_languages(batch.slice(1, 0)).batch.num_rows == 0


@pytest.mark.parametrize("mark", [*"\0\x01\x0b\x0c\x1f\x7f\x80\x9f\ufdd0\uffff\U0001fffe\U0010ffff\ue000"])
def test_characters_that_the_library_refuses_change_nothing(mark):
    assert [d.language for d in identified(f"{ENGLISH}{mark}{ENGLISH}", CHINESE + mark)] == ["en", "zh"]


def test_mixed_texts_have_the_largest_language_and_all_shares():
    # Far longer than the sample, so the shares are those of its pieces.
    half, tenth, names = identified(
        ENGLISH * 80 + CHINESE * 120, (ENGLISH * 9 + CHINESE) * 40, CHINESE * 30 + "Python, HTTP, JSON. "
    )
    assert half.language == "zh" and half.meta["languages"].keys() == {"zh", "en"}
    assert abs(half.meta["languages"]["zh"] - 0.64) < 0.1
    assert tenth.language == "en" and names.language == "zh"
    assert "languages" not in names.meta, "a few foreign names do not make a text mixed"
    (given,) = identified(ENGLISH * 3 + CHINESE * 3)
    assert given.language == "zh" and given.meta["languages"]["en"] > 0.4
    batch = to_batch([make_document(ENGLISH * 3 + CHINESE * 3, source="s", path="p", meta={"a": "ü", "z": 1})])
    (kept,) = to_documents(identify_languages(batch).batch)
    assert kept.meta == {"a": "ü", "languages": given.meta["languages"], "z": 1}


def test_pieces_of_a_long_text_are_cut_between_characters():
    for shift in range(3):
        assert [d.language for d in identified("a" * shift + CHINESE * 40)] == ["zh"]
    assert len((CHINESE * 40).encode()) > SAMPLE.num_bytes
    assert languages_of(CHINESE.encode()[:-1]).language == "zh", "a character that is cut off is passed over"


def test_long_texts_have_the_languages_of_the_whole():
    """ASCII texts are told by a smaller sample, where it finds one language; others by the larger one."""
    plain = {name.strip(): text for name, text in TEXTS.items() if name in ("en", "de", "zh", "ru", "ja")}
    plain["it"] = "Il porto era tranquillo quella mattina, e le barche giacevano dove la notte le aveva lasciate."
    plain["nl"] = "De haven was stil die ochtend, en de boten lagen waar de nacht ze had achtergelaten."
    texts = [(text + "\n") * 60 for text in plain.values()]
    assert [d.language for d in identified(*texts)] == [*plain]
    assert [languages_of(text.encode()).language for text in texts] == [*plain]
    # The first look finds two languages, or none for sure: the larger sample decides, as it does of all other texts.
    mixed, numbers = (plain["it"] * 2 + "\n" + plain["nl"]) * 40, "12 34 56 78\n" * 300
    (found,), (none,) = identified(mixed), identified(numbers)
    assert found.language == "it" and found.meta["languages"].keys() >= {"it", "nl"} and none.language == "und"
