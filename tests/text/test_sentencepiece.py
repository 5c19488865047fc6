"""tokenizer.model is read as SentencePiece 0.2.3 reads it: its own ids are in sentencepiece_golden.json.

Two BPE models of 420 pieces: without a dummy prefix and with user-defined pieces (InternLM2's kind), and with a dummy
prefix (Llama's kind).
"""

import base64
import json
from pathlib import Path

import pytest

from internjax.text import chat
from internjax.text import tokenizer as tok
from internjax.text.sentencepiece import tokenizer_spec

GOLDEN = json.loads(Path(__file__).with_name("sentencepiece_golden.json").read_text(encoding="utf-8"))
MODELS = [base64.b64decode(golden["model"]) for golden in GOLDEN]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


def folder_of(path, model, config):
    (path / "tokenizer.model").write_bytes(model)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("index", [0, 1])
def test_ids_and_texts_are_sentencepieces(index, tmp_path):
    tokenizer = tok.load_tokenizer(folder_of(tmp_path, MODELS[index], CONFIG))
    assert tokenizer.vocab_size == 420 and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert len(GOLDEN[index]["ids"]) >= 7
    for text, ids in GOLDEN[index]["ids"].items():
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_mixed_chinese_english_code_and_emoji_are_sentencepieces(tmp_path):
    """A model that has pieces for all of them; made by make_sentencepiece_golden.py."""
    golden = json.loads(Path(__file__).with_name("sentencepiece_mixed.json").read_text(encoding="utf-8"))
    tokenizer = tok.load_tokenizer(folder_of(tmp_path, base64.b64decode(golden["model"]), CONFIG))
    assert len(golden["rows"]) > 60
    for text, wanted in golden["rows"].items():
        assert tokenizer.encode(text) == wanted["ids"], text
        assert tokenizer.decode(wanted["ids"], skip_special=False) == wanted["text"], text
    used = {token_id for row in golden["rows"].values() for token_id in row["ids"]}
    pieces = {tokenizer.token(token_id) for token_id in used}
    assert {"模型", "训练", "▁the", "▁▁▁▁", "[UNUSED_TOKEN_131]", "<0xF0>"} <= pieces and len(used) > 250
    assert {"<unk>", "<s>", "</s>", tok.REWARD} <= set(tokenizer.special)
    # Every special token, said to be one, is its id and nothing else.
    for text, token_id in tokenizer.special.items():
        assert tokenizer.encode(text, allow_special=True) == [token_id]
        assert tokenizer.encode(f"训练{text}x", allow_special=True).count(token_id) == 1


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_readers_elsewhere_get_the_first_token_as_with_the_original_class(tmp_path, add_bos):
    from transformers import AutoTokenizer

    config = CONFIG | {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    config |= {} if add_bos is None else {"add_bos_token": add_bos}
    tokenizer = tok.load_tokenizer(folder_of(tmp_path, MODELS[0], config))
    tok.save_tokenizer(tokenizer, tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    text, ids = next(iter(GOLDEN[0]["ids"].items()))
    assert tokenizer.encode(text) == ids
    assert theirs(text)["input_ids"] == ([] if add_bos is False else [1]) + ids


def test_saved_as_json_it_stays_the_same(tmp_path):
    from transformers import AutoTokenizer

    config = CONFIG | {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]}, "tokenizer_class": "X"}
    tokenizer = tok.load_tokenizer(folder_of(tmp_path, MODELS[0], config))
    tok.save_tokenizer(tokenizer, tmp_path / "saved")
    assert tok.load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=False)
    for text, ids in GOLDEN[0]["ids"].items():
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_spare_pieces_become_chat_markers(tmp_path):
    """As InternLM2's chat folders do it: the config gives spare pieces the markers' names."""
    spare = ["<|im_start|>", "<|im_end|>"]
    spec = tokenizer_spec(MODELS[0])
    ids = [spec["model"]["vocab"][f"[UNUSED_TOKEN_{index}]"] for index in range(2)]
    names = {str(token_id): {"content": name, "special": True} for token_id, name in zip(ids, spare)}
    tokenizer = tok.load_tokenizer(folder_of(tmp_path, MODELS[0], CONFIG | {"added_tokens_decoder": names}))
    assert [tokenizer.special[name] for name in spare] == ids
    assert tokenizer.encode("<|im_end|>", allow_special=True) == ids[1:]
    assert not set(ids) & set(tokenizer.encode("<|im_start|><|im_end|>"))
    assert chat.stop_ids(tokenizer) == (2, ids[1])


def test_what_cannot_be_read_is_refused(tmp_path):
    def varint_field(number, value):
        return bytes([number << 3, value])

    def message(number, body):
        return bytes([number << 3 | 2, len(body)]) + body

    piece = message(1, message(1, b"a"))
    identity = message(3, varint_field(3, 0) + varint_field(4, 0))
    bpe = message(2, varint_field(3, 2))
    assert tokenizer_spec(piece + bpe + identity)["model"]["vocab"] == {"a": 0}
    cases = {
        "is a unigram model; BPE is read": piece + identity,
        "normalises with remove_extra_whitespaces": piece + bpe,
        "normalises with a table of characters": piece + bpe + message(3, message(2, b"x") + varint_field(4, 0)),
        "user-defined pieces and a dummy prefix": message(1, message(1, b"a") + varint_field(3, 4))
        + bpe
        + message(3, varint_field(4, 0)),
        "is no SentencePiece model": MODELS[0][:-1],
        r"no SentencePiece model .*no pieces": b"",
    }
    for complaint, model in cases.items():
        with pytest.raises(ValueError, match=complaint):
            tokenizer_spec(model)
    with pytest.raises(ValueError, match=f"{tmp_path}.*no SentencePiece model"):
        tok.load_tokenizer(folder_of(tmp_path, b"\xff\xff", CONFIG))
