"""Log-probabilities of a given answer, by the engine that would draw it."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from internjax.decode.engine import Engine
from internjax.decode.request import Handle, Request
from internjax.decode.router import Router
from internjax.decode.sample import SamplingParams


class _Given:
    """A guide that lets nothing but the tokens given come next."""

    def __init__(self, tokens: Sequence[int], vocab_size: int):
        self._left, self._num_words = list(reversed(tokens)), -(-vocab_size // 32)

    def mask(self) -> np.ndarray:
        words_W = np.zeros(self._num_words, np.uint32)
        words_W[self._left[-1] // 32] = np.uint32(1) << np.uint32(self._left[-1] % 32)
        return words_W

    def take(self, token: int) -> None:
        assert token == self._left.pop(), "a token came that was not given"


def replay(
    engine: Engine | Router, request: Request, answer: Sequence[int], *, max_length: int | None = None
) -> Handle:
    """Submits what recomputes the log-probabilities of an answer to a request; its result has them and those ids.

    In exact mode and without drafts they are, bit by bit, those that the engine reported with the answer, in whatever
    company and however much is cached: a log-probability knows neither penalties nor bans, so the same step that drew
    the tokens is told that each is the only one which may come. It asks for one token a turn, as every guide does.

    max_length: of the session in which it was drawn; rotary frequencies may depend on it. Default: the request's own.
    Raises ValueError for an empty answer and for tokens that do not exist.
    """
    vocab_size = engine.config.vocab_size
    foreign = [token for token in answer if not 0 <= token < vocab_size]
    if foreign or not answer:
        given = f"{foreign[:5]}" if foreign else "no token"
        raise ValueError(f"an answer to replay has tokens in 0..{vocab_size - 1}, at least one; given {given}")
    again = dataclasses.replace(
        request,
        max_new_tokens=len(answer),
        sampling=SamplingParams(temperature=request.sampling.temperature),
        stop_ids=(),
        logprobs=request.logprobs or 0,
        guide=functools.partial(_Given, tuple(answer), vocab_size),
    )
    length = len(request.tokens) + request.max_new_tokens if max_length is None else max_length
    return engine.submit(again, session=engine.open_session(length))
