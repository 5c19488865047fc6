"""GenerationConfig: how a model wants to be sampled from and where it stops, as its folder says."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internjax.hf.fields import GENERATION
from internjax.text.chat import stop_ids
from internjax.text.tokenizer import Tokenizer

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults for generation; a request may overrule each of them."""

    eos_ids: tuple[int, ...]
    """Generation stops behind any of these."""
    bos_id: int | None = None
    pad_id: int | None = None
    do_sample: bool = False
    """False: the most probable token; temperature and the rest are not used."""
    temperature: float = 1.0
    top_k: int = 0
    """Tokens to choose from; 0 is all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further fields of the source's file: kept for export, not applied here."""


_SAME_NAME = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_BOOKKEEPING = {"_from_model_config", "transformers_version", "use_cache", "cache_implementation"}
# Values under which a field that is not applied here changes nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "max_length": 20,
}


def default_generation(tokenizer: Tokenizer) -> GenerationConfig:
    """Returns greedy generation that stops where the tokenizer's chat turns and texts end."""
    return GenerationConfig(eos_ids=stop_ids(tokenizer), bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)


def read_generation(folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer | None) -> GenerationConfig:
    """Returns the generation config of a model folder: its generation_config.json, else what config.json holds of it.

    The stop ids are those of the file together with the tokenizer's (a chat model stops at the end of its turn).
    Prints the fields that would change sampling and are not applied here. `config` is the parsed config.json.
    """
    values = {name: config[name] for name in (*GENERATION, *_ids()) if name in config}
    path = folder / FILE
    if path.is_file():
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(own, dict), "it is no object"
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); restore it or remove it") from error
        values = {name: values[name] for name in _ids() if name in values} | own
    eos = values.get("eos_token_id")
    found = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if tokenizer is not None:
        found |= set(stop_ids(tokenizer))
    same = {name: values[name] for name in _SAME_NAME if values.get(name) is not None}
    if same.get("do_sample"):
        same = {"top_k": 50} | same  # transformers' default where a file that samples does not say
    known = {*_SAME_NAME, *_ids(), *_BOOKKEEPING}
    extra = {name: value for name, value in values.items() if name not in known and value is not None}
    unapplied = {name: value for name, value in extra.items() if not _neutral(name, value)}
    if unapplied:
        listed = ", ".join(f"{name}={value}" for name, value in sorted(unapplied.items()))
        print(f"{path}: kept for export, not applied by this decoder: {listed}")
    return GenerationConfig(
        eos_ids=tuple(sorted(found)),
        bos_id=values.get("bos_token_id"),
        pad_id=values.get("pad_token_id"),
        extra=extra,
        **same,
    )


def generation_to_hf(generation: GenerationConfig) -> dict[str, Any]:
    """Returns the generation_config.json: values that are not the defaults, the ids always."""
    eos = list(generation.eos_ids)
    ids = {"bos_token_id": generation.bos_id, "eos_token_id": eos, "pad_token_id": generation.pad_id}
    values = {name: value for name, value in ids.items() if value not in (None, [])}
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationConfig)}
    for name in _SAME_NAME:
        if getattr(generation, name) != defaults[name] or (name == "top_k" and generation.do_sample):
            values[name] = getattr(generation, name)
    return dict(generation.extra) | values


def _neutral(name: str, value: Any) -> bool:
    return value is False or value in ([], {}) or (name in _NEUTRAL and value == _NEUTRAL[name])


def _ids() -> tuple[str, ...]:
    return ("bos_token_id", "eos_token_id", "pad_token_id")
