"""Text to token ids and back: one `Tokenizer` over Hugging Face `tokenizers`, read from and written to HF folders.

Three promises beyond the library's:
- markers (`<|im_start|>`, `</s>`, ...) that occur in a text are plain text, unless the caller says `allow_special`;
- nothing is added in silence: no BOS, no dummy token, no truncation;
- decoding is a table of bytes per id, so that a stream of ids gives exactly the text of the whole (`StreamDecoder`).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from internjax.text.sentencepiece import tokenizer_spec

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
REWARD = "[UNUSED_TOKEN_130]"
PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
ACTION_END, ACTION_START = "<|action_end|>", "<|action_start|>"
IM_END, IM_START = "<|im_end|>", "<|im_start|>"
FIRST_TOKENS = (UNK, BOS, EOS)  # ids 0, 1, 2
# The last ids, in InternLM2's order.
LAST_TOKENS = (REWARD, PLUGIN, INTERPRETER, ACTION_END, ACTION_START, IM_END, IM_START)
SPECIAL_TOKENS = FIRST_TOKENS + LAST_TOKENS

NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

# The text form of `chat.render`, for everyone who reads the saved folder through transformers. Beyond role and content
# a message may carry: name ("interpreter", "plugin" become markers, other names stay text), call {name, content}
# as `chat.to_dict` writes it, or OpenAI's tool_calls; the role "tool" is InternLM2's "environment".
# `tools` becomes the system turn that declares them.
INTERNLM2_TEMPLATE = r"""
{%- macro call_marker(name) -%}{{ '<|action_start|><|' + name + '|>\n' }}{%- endmacro -%}
{{- bos_token -}}
{%- if tools -%}
{{- '<|im_start|>system name=<|plugin|>\n' + (tools | tojson) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set role = 'environment' if message['role'] == 'tool' else message['role'] -%}
{%- set name = 'plugin' if message['role'] == 'tool' else (message['name'] or '') -%}
{%- if name in ('interpreter', 'plugin') and role in ('system', 'assistant', 'environment') -%}
{%- set name = '<|' + name + '|>' -%}
{%- endif -%}
{{- '<|im_start|>' + role + (' name=' + name if name else '') + '\n' -}}
{%- if role == 'assistant' -%}
{%- generation -%}
{{- message['content'] or '' -}}
{%- if message['call'] -%}
{{- call_marker(message['call']['name']) -}}
{%- if message['call']['name'] == 'interpreter' -%}
{{- '```python\n' + message['call']['content'] + '\n```' -}}
{%- else -%}
{{- message['call']['content'] -}}
{%- endif -%}
{{- '<|action_end|>' -}}
{%- elif message['tool_calls'] -%}
{%- set function = message['tool_calls'][0]['function'] -%}
{%- set arguments = function['arguments'] -%}
{{- call_marker('plugin') + '{"name": ' + (function['name'] | tojson) + ', "parameters": ' -}}
{{- (arguments if arguments is string else (arguments | tojson)) + '}<|action_end|>' -}}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endgeneration -%}
{{- '\n' -}}
{%- else -%}
{{- message['content'] + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
""".strip()

# Where a pre-token ends; merges never cross it. Decided here:
# 1. A word takes one character before it along (space, dot, quote, underscore), so that `.append` can be one token.
# 2. Every digit stands alone: a small model copies and computes with numbers it has not seen.
# 3. A newline always ends its pre-token. So a turn's header ("user\n") and the content after it never share a token:
#    tokenising them apart or in one string (as transformers does) gives the same ids.
# 4. Of a run of spaces the last one goes to the word behind it: an indentation is one token at every depth.
_PRE_TOKEN = (
    r"[^\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+\n?"
    r"|[^\S\n]*\n"
    r"|[^\S\n]+(?!\S)"
    r"|[^\S\n]+"
)
_MAX_PIECE_CHARS = 32
_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class _Decoding(NamedTuple):
    """How ids become bytes: the bytes of each id, and whether one leading space is an artefact of the tokenizer."""

    pieces: tuple[bytes, ...]
    visible_pieces: tuple[bytes, ...]  # special tokens are empty
    strip_leading_space: bool


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Immutable and safe to use from several threads. Build it with `train_tokenizer` or `load_tokenizer`."""

    vocab_size: int  # highest id + 1, special tokens included
    bos_id: int | None
    eos_id: int
    pad_id: int
    special: Mapping[str, int]  # every special token of the folder, by text
    chat_template: str | None
    fingerprint: str  # sha256 of the id mapping (tokenizer.json, whatever its formatting)
    source: str = field(repr=False)  # tokenizer.json
    config: Mapping[str, Any] = field(repr=False)  # tokenizer_config.json, without the template
    _decoding: _Decoding = field(repr=False)
    _plain: Any = field(repr=False)  # two backends: which tokens are matched in a text is a state of the object, and
    _marked: Any = field(repr=False)  # switching it on a shared one is not thread-safe

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Token ids of `text`; nothing is added. Markers in it are plain text unless `allow_special`."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Token ids of each text, on all cores (TOKENIZERS_PARALLELISM=false keeps it on one)."""
        backend = self._marked if allow_special else self._plain
        try:
            return [row.ids for row in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise ValueError(_why_not_encodable(texts)) from error

    def encode_with_offsets(self, text: str, *, allow_special: bool = False) -> Encoded:
        """Token ids of `text`, and the (start, end) characters of it that each id stands for."""
        backend = self._marked if allow_special else self._plain
        try:
            row = backend.encode(text, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(_why_not_encodable([text])) from error
        return Encoded(row.ids, row.offsets)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary are empty (padded heads)."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return decoder.push(ids) + decoder.flush()

    def bytes_of(self, token_id: int) -> bytes:
        """What an id adds to a text, wherever it stands; markers spelled out. Part of a character in some."""
        return self._decoding.pieces[token_id] if token_id < len(self._decoding.pieces) else b""

    def __reduce__(self):  # a backend forgets in pickling that it treats markers as text
        return _build, (self.source, dict(self.config), self.chat_template)

    def token(self, token_id: int) -> str | None:
        """The piece behind an id as the vocabulary spells it, or None where the vocabulary has a hole."""
        return self._marked.id_to_token(token_id)


def differing_id(first: Tokenizer, second: Tokenizer) -> int | None:
    """Returns the first id that is another piece of text in the second tokenizer, None where there is none.

    Markers may differ: a chat model's tokenizer gives them spare ids of its base's.
    """
    markers = {*first.special.values(), *second.special.values()}
    shared = (each for each in range(min(first.vocab_size, second.vocab_size)) if each not in markers)
    return next((each for each in shared if first.token(each) != second.token(each)), None)


def longest_token(tokenizer: Tokenizer) -> int | None:
    """The most characters of a text that one token stands for; None where that has no bound.

    It has none where an unknown token, a token that takes spaces along, or a change of the text before it is split may
    stand for any number of them.
    """
    spec = json.loads(tokenizer.source)
    normalizer = spec.get("normalizer") or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    keeps = all(step["type"] == "Prepend" or step == space for step in steps)
    decoder = spec.get("decoder") or {"type": "none"}
    keeps &= decoder["type"] == "ByteLevel" or bool(spec["model"].get("byte_fallback"))
    takes_spaces = any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"] if not token["special"])
    return max(map(len, tokenizer._decoding.pieces)) if keeps and not takes_spaces else None


class StreamDecoder:
    """Text of ids that arrive in parts: the pushes and the flush together are `decode` of the whole.

    A character whose bytes are spread over several ids is held back until it is complete; each push costs only its ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, behind_text: bool = False):
        """behind_text: the ids go on from others, so that the space which some tokenizers put before the first word of
        a text is there for the reader."""
        decoding = tokenizer._decoding
        self._pieces = decoding.visible_pieces if skip_special else decoding.pieces
        self._strip_leading_space = self._strip_next = decoding.strip_leading_space and not behind_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete."""
        return self._clean(self._utf8.decode(b"".join(map(self._piece, ids))))

    def flush(self) -> str:
        """What was held back (U+FFFD for bytes that no longer can become a character). The decoder starts anew."""
        text = self._clean(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        self._strip_next = self._strip_leading_space
        return text

    def _piece(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative; ids start at 0 (cut padding off before decoding)")
        return self._pieces[token_id] if token_id < len(self._pieces) else b""

    def _clean(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with InternLM2's special tokens and exactly `vocab_size` ids.

    Every string round-trips, because all 256 bytes are pieces. The same texts give the same tokenizer. Where the texts
    do not hold enough repeated pieces, spare `[UNUSED_TOKEN_n]` ids fill up, as in InternLM2's own vocabulary.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; at least {MIN_VOCAB_SIZE} are needed ({NUM_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens). Give a larger vocab_size"
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PRE_TOKEN), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_TOKENS),
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=_MAX_PIECE_CHARS,
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    num_spare = vocab_size - len(LAST_TOKENS) - backend.get_vocab_size()
    spare = (name for n in range(num_spare + 200) if (name := f"[UNUSED_TOKEN_{n}]") != REWARD)
    names = [next(spare) for _ in range(num_spare)] + list(LAST_TOKENS)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "pad_token": EOS,
        "additional_special_tokens": list(LAST_TOKENS),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    return _build(backend.to_str(), config, INTERNLM2_TEMPLATE)


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json (else tokenizer.model), its config and chat template."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file() and not (folder / "tokenizer.model").is_file():
        if folder.is_dir():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
        else:
            found = "no such folder"
        raise ValueError(
            f"{folder} has no tokenizer.json or tokenizer.model (found: {found}). Give a folder with both files; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder) writes tokenizer.json and tokenizer_config.json"
        )
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    template = config.pop("chat_template", None)
    if isinstance(template, list):  # several by name, as older folders hold them
        by_name = {entry["name"]: entry["template"] for entry in template}
        if "default" not in by_name:
            raise ValueError(
                f"{folder}/tokenizer_config.json names chat templates {sorted(by_name)} and none is 'default'; "
                "rename the one to use to 'default'"
            )
        template = by_name["default"]
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        else:
            spec = tokenizer_spec((folder / "tokenizer.model").read_bytes())
            spec["post_processor"] = _first_token(spec, config)
            source = json.dumps(spec, ensure_ascii=False)
        return _build(source, config, template)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def save_tokenizer(tokenizer: Tokenizer, folder: str | os.PathLike) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, for AutoTokenizer (no remote code)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in tokenizer.config.items() if key != "auto_map"}
    if "auto_map" in tokenizer.config:  # the class lives in remote code, which the folder no longer names
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    roles = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens")
    special_tokens_map = {role: config[role] for role in roles if config.get(role)}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    _write(folder / "tokenizer.json", tokenizer.source)
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "special_tokens_map.json", json.dumps(special_tokens_map, indent=2, ensure_ascii=False) + "\n")
    # A template file left from an earlier tokenizer would win over the one just written.
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def _first_token(spec: dict, config: Mapping[str, Any]) -> dict | None:
    """What puts the first token before a text for those who read tokenizer.json elsewhere; `encode` adds nothing.

    The classes that come with tokenizer.model (InternLM2's, Llama's) add it unless the config says otherwise.
    """
    token = _token_text(config.get("bos_token"))
    if token not in spec["model"]["vocab"] or not config.get("add_bos_token", True):
        return None
    first = [
        [{"SpecialToken": {"id": token, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1)
    ]
    named = {"id": token, "ids": [spec["model"]["vocab"][token]], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": first[0],
        "pair": first[0] + first[1],
        "special_tokens": {token: named},
    }


def _build(source: str, config: dict, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a tokenizer.json text and a tokenizer_config dict."""
    from tokenizers import Tokenizer as Backend

    spec = _with_renamed_tokens(json.loads(source), config)
    if spec["renamed"]:
        source = json.dumps(spec["spec"], ensure_ascii=False)
    spec = spec["spec"]
    named = {role: _token_text(config.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    if named["eos_token"] is None:
        raise ValueError("tokenizer_config.json has no eos_token; add the token that ends a text, such as '</s>'")
    marked = Backend.from_str(source)
    for role, token in named.items():
        if token is not None and marked.token_to_id(token) is None:
            raise ValueError(f"{role} is {token!r}, which tokenizer.json does not hold; name a token of its vocabulary")
    always = set(SPECIAL_TOKENS) | {token for token in named.values() if token is not None}
    for entry in spec["added_tokens"]:
        looks_like_marker = entry["content"].startswith("<|") and entry["content"].endswith("|>")
        entry["special"] = entry["special"] or looks_like_marker or entry["content"] in always
    plain = Backend.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    for backend in (plain, marked):
        backend.no_truncation()
        backend.no_padding()
    special = {entry["content"]: entry["id"] for entry in spec["added_tokens"] if entry["special"]}
    vocab = marked.get_vocab(with_added_tokens=True)
    ids = {role: None if token is None else marked.token_to_id(token) for role, token in named.items()}
    return Tokenizer(
        vocab_size=max(vocab.values()) + 1,
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        pad_id=ids["eos_token"] if ids["pad_token"] is None else ids["pad_token"],
        special=special,
        chat_template=chat_template,
        fingerprint=_fingerprint(source),
        source=source,
        config=config,
        _decoding=_decoding_table(vocab, special, spec["decoder"]),
        _plain=plain,
        _marked=marked,
    )


def _with_renamed_tokens(spec: dict, config: dict) -> dict:
    """tokenizer.json with the tokens that only tokenizer_config.json names.

    InternLM2's chat folders give their markers this way: `<|im_start|>` is a new name for the spare piece with its id.
    """
    known = {entry["id"]: entry["content"] for entry in spec["added_tokens"]}
    vocab = spec["model"]["vocab"]
    renamed = False
    for key, entry in config.get("added_tokens_decoder", {}).items():
        token_id = int(key)
        if known.get(token_id) == entry["content"]:
            continue
        if isinstance(vocab, dict):
            old = next((piece for piece, piece_id in vocab.items() if piece_id == token_id), None)
            if old is not None and old != entry["content"]:
                spec["model"]["vocab"] = vocab = {entry["content"] if p == old else p: i for p, i in vocab.items()}
        flags = {flag: bool(entry.get(flag, False)) for flag in _ADDED_TOKEN_FLAGS}
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] != token_id]
        spec["added_tokens"].append({"id": token_id, "content": entry["content"]} | flags)
        renamed = True
    spec["added_tokens"].sort(key=lambda token: token["id"])
    return {"spec": spec, "renamed": renamed}


def _decoding_table(vocab: Mapping[str, int], special: Mapping[str, int], decoder: dict | None) -> _Decoding:
    """Bytes of every id, for both kinds of pieces: GPT-2's byte alphabet, SentencePiece's "▁" and <0xNN>."""
    parts = (decoder or {}).get("decoders", [decoder or {"type": "none"}])
    kinds = {part["type"] for part in parts}
    if kinds == {"ByteLevel"}:
        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        strip_leading_space = False

        def piece_bytes(piece: str) -> bytes:
            try:
                return bytes([byte_of[char] for char in piece])
            except KeyError:  # an added token outside the alphabet stands for itself
                return piece.encode()

    elif kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        byte_fallback = "ByteFallback" in kinds
        strip_leading_space = any(
            (part["type"] == "Strip" and part["start"] > 0)
            or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
            for part in parts
        )

        def piece_bytes(piece: str) -> bytes:
            if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()

    else:
        raise ValueError(
            f"tokenizer.json decodes with {sorted(kinds)}; ByteLevel and SentencePiece kinds "
            "(Replace, ByteFallback, Fuse, Strip, Metaspace) are read. Use a BPE tokenizer of one of these kinds"
        )
    pieces = [b""] * (max(vocab.values()) + 1)
    for piece, token_id in vocab.items():
        pieces[token_id] = piece_bytes(piece)
    hidden = set(special.values())
    visible = tuple(b"" if token_id in hidden else piece for token_id, piece in enumerate(pieces))
    return _Decoding(tuple(pieces), visible, strip_leading_space)


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte 0..255 in byte-level vocabularies (GPT-2's mapping)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(NUM_BYTES)]


def _fingerprint(source: str) -> str:
    canonical = json.dumps(json.loads(source), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _token_text(entry: str | Mapping | None) -> str | None:
    """A token of tokenizer_config.json, which is written as text or as an object with flags."""
    return entry["content"] if isinstance(entry, Mapping) else entry


def _why_not_encodable(texts: Sequence[str]) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"text {index} is a {type(text).__name__}; only str can be encoded"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"text {index} holds a lone surrogate at character {error.start}, which is no Unicode text; "
                "read the bytes with errors='replace'"
            )
    return "the texts cannot be encoded; give a list of str"


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from where the folder came from") from error


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
