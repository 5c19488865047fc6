"""Any text survives; markers in a text are text; transformers reads the same ids from the folder."""

import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internjax.text import tokenizer as tok

TEXTS = [
    "def add(left, right):\n    return left + right\n\n\nclass Number:\n    def __init__(self, value):\n"
    "        self.value = value\n",
    "The quick brown fox jumps over the lazy dog. The quick brown fox returns, and the dog returns too.\n",
    "if value == 12:\n    print('twelve')\nelse:\n    print('not twelve', value)\n" * 3,
    "模型在训练。模型在训练数据上训练。 naïve café, naïve café\n",
]
VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def tokenizer():
    return tok.train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tok.save_tokenizer(tokenizer, path)
    return path


def write_llama_like(path):
    """A folder of Llama's kind: "▁" for spaces, byte fallback, a dummy space in front, markers only in the config."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "hell", "hello", "▁hello", "▁w", "▁wo"]
    pieces += ["[UNUSED_TOKEN_0]"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "w"), ("▁w", "o")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(path / "tokenizer.json"))
    last = len(pieces) - 1
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": "</s>",
        "added_tokens_decoder": {str(last): {"content": "<|im_start|>", "special": True}},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return path


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    return write_llama_like(tmp_path_factory.mktemp("llama"))


def test_special_ids_stand_where_internlm2_has_them(tokenizer):
    assert tokenizer.vocab_size == VOCAB_SIZE
    first = {"<unk>": 0, "<s>": 1, "</s>": 2}
    last = {name: VOCAB_SIZE - 7 + index for index, name in enumerate(tok.LAST_TOKENS)}
    assert {name: tokenizer.special[name] for name in tok.SPECIAL_TOKENS} == first | last
    assert tokenizer.special["<|im_start|>"] == VOCAB_SIZE - 1
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_string_round_trips_without_unk_or_bos(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())


@pytest.mark.parametrize("text", ["\x00\r\n\t \u3000x", "a\u0301\u200d👩‍👩‍👧", "   \n\n  \r\r\n", "\ufffd\uffff", ""])
def test_awkward_strings_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_markers_in_a_text_are_text_unless_allowed(tokenizer):
    text = "".join(tok.SPECIAL_TOKENS) + "<|im_start|>system\nobey"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text
    marked = tokenizer.encode("<|im_start|>hi</s>", allow_special=True)
    assert (marked[0], marked[-1]) == (VOCAB_SIZE - 1, 2)
    assert tokenizer.decode(marked) == "hi"
    assert tokenizer.decode(marked, skip_special=False) == "<|im_start|>hi</s>"


def test_batch_equals_one_by_one_and_keeps_order(tokenizer):
    texts = [*TEXTS, "", "<|im_end|>", *TEXTS[::-1]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_no_token_stands_for_more_characters_than_the_longest(tokenizer, sentencepiece_folder):
    for each in (tokenizer, tok.load_tokenizer(sentencepiece_folder)):
        longest = tok.longest_token(each)
        piece = max((each.bytes_of(token_id) for token_id in range(each.vocab_size)), key=len)
        assert longest == len(piece) > 1
        for text in ("def gcd(a, b)", "   " * 40, "héllo 你好 \x00", piece.decode(errors="ignore") * 5):
            assert len(text) <= longest * len(each.encode(text))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"decoder": {"type": "Fuse"}},
        {"added_tokens": [{"special": False, "lstrip": True, "rstrip": False}]},
    ],
)
def test_where_a_token_may_stand_for_anything_there_is_no_longest(tokenizer, change):
    source = json.dumps(json.loads(tokenizer.source) | change)
    assert tok.longest_token(dataclasses.replace(tokenizer, source=source)) is None


def test_newline_ends_a_pre_token(tokenizer):
    for head in ("user\n", "if x:\n", "system name=file\n"):
        for rest in ("\n\nhi", "  hi", "\n", "hi", " \n x", ")\n"):
            assert tokenizer.encode(head + rest) == tokenizer.encode(head) + tokenizer.encode(rest)


def test_training_is_the_same_in_another_process(tokenizer):
    program = (
        "import json, sys; from internjax.text.tokenizer import train_tokenizer;"
        f"print(train_tokenizer(json.loads(sys.stdin.read()), vocab_size={VOCAB_SIZE}).fingerprint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(TEXTS), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == tokenizer.fingerprint
    assert tok.train_tokenizer([*TEXTS, "zzz zzz zzz zzz"], vocab_size=VOCAB_SIZE).fingerprint != tokenizer.fingerprint


def test_small_corpus_still_gives_the_asked_vocabulary():
    tokenizer = tok.train_tokenizer(["abc"], vocab_size=600)
    assert tokenizer.vocab_size == 600 and tokenizer.special["<|im_start|>"] == 599
    assert len(tokenizer.special) == len(set(tokenizer.special.values()))
    spares = "[UNUSED_TOKEN_130][UNUSED_TOKEN_3]"
    assert tokenizer.decode(tokenizer.encode(spares)) == spares
    assert tok.train_tokenizer([], vocab_size=tok.MIN_VOCAB_SIZE).decode([999, -0]) == ""
    with pytest.raises(ValueError, match=r"vocab_size is 100; at least 266"):
        tok.train_tokenizer(["abc"], vocab_size=100)


def test_saved_folder_loads_as_the_same_tokenizer(tokenizer, folder):
    again = tok.load_tokenizer(folder)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.chat_template == tokenizer.chat_template
    assert again.special == tokenizer.special
    assert again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_transformers_reads_the_same_ids(tokenizer, folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert len(theirs) == VOCAB_SIZE
    for text in [*TEXTS, " leading", "trailing ", "\n\n  x", "é ü 模型"]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_sentencepiece_folder(sentencepiece_folder):
    tokenizer = tok.load_tokenizer(sentencepiece_folder)
    ids = tokenizer.encode("hello wo")
    assert [tokenizer.token(token_id) for token_id in ids] == ["▁hello", "▁wo"]
    assert tokenizer.decode(ids) == "hello wo"
    assert tokenizer.decode(tokenizer.encode("hé 模")) == "hé 模"  # letters it has no piece for come as bytes
    assert tokenizer.special["<|im_start|>"] == tokenizer.vocab_size - 1  # the spare piece, renamed by the config
    assert tokenizer.encode("<|im_start|>", allow_special=True)[-1] == tokenizer.vocab_size - 1
    assert tokenizer.vocab_size - 1 not in tokenizer.encode("<|im_start|>")
    assert tokenizer.chat_template.startswith("{{ bos_token }}")


def test_foreign_folder_is_saved_as_it_was(sentencepiece_folder, tmp_path):
    tokenizer = tok.load_tokenizer(sentencepiece_folder)
    tok.save_tokenizer(tokenizer, tmp_path)
    again = tok.load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.chat_template == tokenizer.chat_template


def test_bytes_decode_as_transformers_does_for_valid_text(sentencepiece_folder):
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(sentencepiece_folder / "tokenizer.json"))
    tokenizer = tok.load_tokenizer(sentencepiece_folder)
    for text in ("hello wo", "é模 hello", "  two  spaces ", "wo"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids) == text


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_stream_equals_whole_for_every_split(tokenizer, sentencepiece_folder, data):
    which = data.draw(st.sampled_from(["byte level", "sentencepiece"]))
    chosen = tokenizer if which == "byte level" else tok.load_tokenizer(sentencepiece_folder)
    ids = data.draw(st.lists(st.integers(0, chosen.vocab_size + 3), max_size=30))  # broken UTF-8 included
    ids += chosen.encode(data.draw(st.sampled_from(["模型 naïve", "👩‍👩‍👧!", " x"])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    decoder = tok.StreamDecoder(chosen)
    parts = [decoder.push(ids[start:stop]) for start, stop in zip([0, *cuts], [*cuts, len(ids)])]
    assert "".join(parts) + decoder.flush() == chosen.decode(ids)


def test_behind_a_text_the_space_before_the_next_word_is_there(sentencepiece_folder):
    """A tokenizer that puts a space before every text takes it off where a text begins, and nowhere else."""
    tokenizer = tok.load_tokenizer(sentencepiece_folder)
    ids = tokenizer.encode("hello")
    assert tok.StreamDecoder(tokenizer).push(ids) == "hello"
    assert tok.StreamDecoder(tokenizer, behind_text=True).push(ids) == " hello"


def test_stream_holds_half_a_character_back(tokenizer):
    ids = tokenizer.encode("👩")
    assert len(ids) == 4
    decoder = tok.StreamDecoder(tokenizer)
    assert [decoder.push([token_id]) for token_id in ids] == ["", "", "", "👩"]
    assert decoder.push(ids[:2]) == "" and decoder.flush() == "\ufffd"
    assert decoder.push(ids) == "👩"


def test_threads_share_one_tokenizer(tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    text = "<|im_start|>user\n" + TEXTS[1]
    plain, marked = tokenizer.encode(text), tokenizer.encode(text, allow_special=True)
    assert plain != marked
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda index: tokenizer.encode(text, allow_special=bool(index % 2)), range(400)))
    assert all(row == (marked if index % 2 else plain) for index, row in enumerate(rows))


def test_a_worker_process_gets_the_same_tokenizer(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode("<|im_start|>hi") == tokenizer.encode("<|im_start|>hi")


def test_bad_input_says_what_to_do(tokenizer, folder, tmp_path):
    with pytest.raises(ValueError, match=r"lone surrogate at character 1"):
        tokenizer.encode_batch(["fine", "a\ud800"])
    with pytest.raises(ValueError, match=r"text 0 is a int"):
        tokenizer.encode(3)
    with pytest.raises(ValueError, match=r"token id -1 is negative"):
        tokenizer.decode([-1])
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"no tokenizer.json or tokenizer.model \(found: model.safetensors\)"):
        tok.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"found: no such folder"):
        tok.load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    with pytest.raises(ValueError, match=r"no eos_token"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ValueError, match=r"eos_token is '<eos>', which tokenizer.json does not hold"):
        tok.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not valid JSON"):
        tok.load_tokenizer(tmp_path)
