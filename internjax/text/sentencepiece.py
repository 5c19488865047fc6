"""SentencePiece's tokenizer.model as tokenizer.json, for folders that hold only the former (InternLM2's).

Reads the protobuf by hand: a model is a list of pieces (text, score, kind) and a few settings.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
SPACE = "▁"


def tokenizer_spec(model: bytes) -> dict:
    """The contents of tokenizer.json that encodes as the BPE model does.

    SentencePiece merges the pair whose joined piece scores highest: so each way to cut a piece in two is a merge, in
    the order of the scores. User-defined pieces are matched before anything else.
    """
    try:
        pieces, trainer, normalizer = _read(model)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"tokenizer.model is no SentencePiece model ({error!r}); fetch it anew") from error
    _refuse_unreadable(pieces, trainer, normalizer)
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        if kind == NORMAL:
            cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
            parts = [(left, right) for left, right in cuts if left in vocab and right in vocab]
            merges += [(-score, vocab[left], vocab[right], left, right) for left, right in parts]
    merges.sort()
    prefix = bool(normalizer.get(3, 1))  # add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] * prefix + [replace]
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(index, text, kind)
            for index, (text, _, kind) in enumerate(pieces)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next((text for text, _, kind in pieces if kind == UNKNOWN), None),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(kind == BYTE for _, _, kind in pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for _, _, _, left, right in merges],
        },
    }


def _added_token(index: int, text: str, kind: int) -> dict:
    """User-defined pieces are matched in the normalised text ("▁▁" means two spaces), control tokens as they stand."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return {"id": index, "content": text, "normalized": kind == USER_DEFINED, "special": kind != USER_DEFINED} | flags


def _refuse_unreadable(pieces: list, trainer: dict, normalizer: dict) -> None:
    remedy = "Write tokenizer.json with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
    if trainer.get(3, 1) != BPE:
        kind = {1: "unigram", 3: "word", 4: "char"}.get(trainer.get(3, 1), "unknown")
        raise ValueError(f"tokenizer.model is a {kind} model; BPE is read. {remedy}")
    if normalizer.get(2) or normalizer.get(4, 1):
        what = "a table of characters" if normalizer.get(2) else "remove_extra_whitespaces"
        raise ValueError(f"tokenizer.model normalises with {what}; only the identity is read. {remedy}")
    if normalizer.get(3, 1) and any(kind == USER_DEFINED for _, _, kind in pieces):
        raise ValueError(f"tokenizer.model has user-defined pieces and a dummy prefix, which is not read. {remedy}")


def _read(model: bytes) -> tuple[list[tuple[str, float, int]], dict, dict]:
    """(text, score, kind) of each piece, the trainer's and the normaliser's settings by field number."""
    pieces, settings = [], {2: {}, 3: {}}
    for number, value in _fields(model):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number in settings:
            settings[number] = dict(_fields(value))
    if not pieces:
        raise IndexError("it holds no pieces")
    return pieces, settings[2], settings[3]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value (an int, or bytes) of each field of a protobuf message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2 or size is not None:
            if size is None:
                size, at = _varint(message, at)
            if at + size > len(message):
                raise IndexError("it is cut short")
            value, at = message[at : at + size], at + size
        else:
            raise IndexError(f"wire type {kind}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
