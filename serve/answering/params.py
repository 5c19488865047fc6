"""How one answer is generated: `Params`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from internjax.decode.sample import SamplingParams
from serve.guided import GuideSpec, grammars_of


@dataclass(frozen=True)
class Params:
    """How one answer is generated; what the numbers do is in `SamplingParams`.

    Log-probabilities are the model's at the answer's temperature (1 if greedy), before penalties, bias and truncation.
    """

    max_tokens: int | None = None  # None: until the context is full; 0: the prompt is only read
    min_tokens: int = 0  # until so many are drawn, no stop id is drawn and no stop string seen; a tool call ends it
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int | str, float] = field(default_factory=dict)  # by token id, also in decimal digits
    bad_words: tuple[str, ...] = ()  # banned as they are tokenised at the start, behind a space, and behind a newline
    seed: int | None = None  # None: a random one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # beside those of the model
    ignore_eos: bool = False  # those of the model do not end the answer; a chat answer is then text, without calls
    logprobs: int | None = None  # of the tokens drawn, with so many most likely ones in the place of each
    prompt_logprobs: int | None = None  # likewise of the prompt
    guide: GuideSpec | None = None  # what the answer follows; not with ignore_eos, min_tokens, bad_words
    adapter: str | None = None  # one that is loaded, by name; None: the model as it was opened

    def __post_init__(self):
        if self.max_tokens is not None and not _is_count(self.max_tokens):
            raise ValueError(f"max_tokens must be a whole number >= 0, or None, given {self.max_tokens!r}")
        if not _is_count(self.min_tokens):
            raise ValueError(f"min_tokens must be a whole number >= 0, given {self.min_tokens!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must not pass max_tokens, given {self.min_tokens} and {self.max_tokens}")
        for name in ("stop", "bad_words"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(given):
                raise ValueError(f"{name} must be a tuple of strings that are not empty, given {given!r}")
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            if given is not None and not _is_count(given):
                raise ValueError(f"{name} must be a number of most likely tokens (0: none), or None, given {given!r}")
        if self.guide is not None:
            grammars_of(self.guide)  # which refuses what is none
            for name in ("ignore_eos", "min_tokens", "bad_words"):
                if given := getattr(self, name):
                    raise ValueError(
                        f"{name} is {given!r}, and a guide is given: the guide alone says what may come next, and "
                        f"where the answer ends. Leave out {name}, or the guide"
                    )
        sampling_of(self)  # which refuses what cannot be sampled with


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def sampling_of(params: Params, *, bad_words: tuple[tuple[int, ...], ...] = ()) -> SamplingParams:
    return SamplingParams(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=tuple((_token_id(token), bias) for token, bias in params.logit_bias.items()),
        bad_words=bad_words,
        min_new_tokens=params.min_tokens,
        seed=secrets.randbits(32) if params.seed is None else params.seed,
    )


def _token_id(token: int | str) -> int:
    if isinstance(token, str) and not (token.isascii() and token.isdigit()):
        raise ValueError(f"logit_bias must be given by token ids, given {token!r}; encode a text to learn its ids")
    return int(token)


def with_sampling(params: Params, sampling: Mapping[str, Any] | None) -> Params:
    """`params` with the given fields replaced. Raises ValueError for a name that is none of them."""
    known = [each.name for each in fields(Params)]
    unknown = sorted(set(sampling or {}) - set(known))
    if unknown:
        raise ValueError(f"sampling has unknown fields {unknown}; give any of {known}")
    return replace(params, **(sampling or {}))
