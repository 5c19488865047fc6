"""/v1/score: how much a reward model likes an answer, under a condition. Beyond OpenAI.

    {"model": ..., "messages": [...], "condition": "helpful"}                 one conversation, one score
    {"model": ..., "pairs": [{"prompt": "...", "answer": "..."}, ...]}        one score for each

A condition is a system prompt that the reward model alone reads, in front of the conversation (InternLM2's conditional
reward model). The score stands at the reward token behind the last turn. Rows have a few widths (powers of two), and a
program is compiled for each when it is first needed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
from fastapi import FastAPI, Request
from pydantic import Field

from internjax import sharding
from internjax.decode.embed import in_chunks, row_widths
from internjax.hf.open import Model
from internjax.rlhf.reward import check_scalar, score
from internjax.text.chat import render
from internjax.text.message import Message
from internjax.text.tokenizer import REWARD, longest_token
from serve.operation.bodies import aside
from serve.operation.refusal import Refusal
from serve.operation.request_log import note
from serve.pipeline import ContextTooLong, refuse_long
from serve.rest.batches import Batch, Workers, batches_of, in_order, padded, read_each
from serve.rest.protocol import messages_of, refuse_messages
from serve.rest.requests import ChatMessage, Fields, ShortText

MAX_PAIRS = 2048
_OTHER_ROUTES = {
    "/v1/chat/completions": "text",
    "/v1/completions": "text",
    "/v1/responses": "text",
    "/v1/sessions": "text",
    "/v1/embeddings": "vectors",
}


class PromptAnswer(Fields):
    prompt: str
    answer: str


class ScoreRequest(Fields):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    pairs: Annotated[list[PromptAnswer], Field(min_length=1, max_length=MAX_PAIRS)] | None = None
    condition: str | None = None
    condition_prompt: Annotated[str, Field(min_length=1)] | None = None
    user: ShortText | None = None


class Scorer:
    """A reward model that scores conversations. Safe for several threads, one of which computes at a time."""

    def __init__(self, model: Model, *, conditions: Mapping[str, str] | None = None, max_context: int | None = None):
        """conditions: system prompts by name. max_context None: what the model was trained for."""
        check_scalar(model.config)
        if model.tokenizer is None or REWARD not in model.tokenizer.special:
            raise ValueError(f"the model's tokenizer has no reward token {REWARD}: where would the score stand?")
        self.conditions = dict(conditions or {})
        self.max_context = max_context or model.config.max_position_embeddings
        self._model, self._mesh = model, sharding.mesh_of(model.params)
        self._widths = row_widths(model.config, self.max_context)
        self._longest_token = longest_token(model.tokenizer)
        self._compute = jax.jit(partial(score, config=in_chunks(model.config)))
        self._computing, self._counting = threading.Lock(), threading.Lock()
        self._num_calls, self._beat, self._fault = 0, time.monotonic(), None

    @property
    def num_compiled(self) -> int:
        return self._compute._cache_size()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def fault(self) -> str | None:
        """Why no more requests are taken, or None if they are."""
        return self._fault

    def faults(self) -> list[str | None]:
        """The same of every replica, of which there is one."""
        return [self._fault]

    def silent_seconds(self) -> float:
        """For how long there has been work and no batch of it has begun or ended; 0 where there is none."""
        with self._counting:
            return time.monotonic() - self._beat if self._num_calls else 0.0

    def ids_of(self, messages: Sequence[Message], *, condition: str | None = None) -> list[int]:
        """What the model reads of a conversation, with the reward token. condition: a system prompt."""
        before = [] if condition is None else [Message("system", condition)]
        ids, end = render([*before, *messages], self._model.tokenizer).ids, self._model.tokenizer.special[REWARD]
        return ids if ids[-1:] == [end] else [*ids, end]

    def refuse_long(self, messages: Sequence[Message], *, condition: str | None = None) -> None:
        """Raises ContextTooLong, before anything is tokenised, for a conversation that no context can hold."""
        texts = [condition or "", *(text for message in messages for text in message.texts)]
        refuse_long(texts, longest_token=self._longest_token, max_context=self.max_context)

    def __call__(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """Returns float32 `[len(sequences)]`, one score for each, read batch by batch. sequences: see `ids_of`."""
        batches = self.batches(sequences)
        return in_order(batches, [read() for read in read_each(sequences, batches, self.read)])

    def batches(self, sequences: Sequence[Sequence[int]]) -> list[Batch]:
        """Which conversations are read at once."""
        return batches_of([*map(len, sequences)], self._widths)

    def read(self, sequences: Sequence[Sequence[int]], width: int) -> np.ndarray:
        """Returns float32 `[len(sequences)]` of a batch."""
        tokens, lengths = padded(sequences, width)
        with self._at_work(), self._computing, sharding.use(self._mesh):
            self._beat = time.monotonic()
            try:
                scores = self._compute(self._model.params, tokens, lengths, lora=self._model.lora)
                return np.asarray(scores)[: len(sequences)]
            except Exception as error:
                self._fault = self._found_fault(error)
                raise
            finally:
                self._beat = time.monotonic()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        with self._counting:
            self._beat = self._beat if self._num_calls else time.monotonic()
            self._num_calls += 1
        try:
            yield
        finally:
            with self._counting:
                self._num_calls -= 1

    def _found_fault(self, error: Exception) -> str | None:
        """What is wrong where even a small computation fails; None where only this batch could not be scored."""
        try:
            for device in self._mesh.local_devices:
                np.asarray(jax.device_put(np.zeros(1), device) + 1)
        except Exception as again:
            return f"the device computes no more: {again} (after {type(error).__name__}: {error})"
        return None


def add_score_routes(app: FastAPI, scorer: Scorer, *, model_name: str) -> None:
    """Adds what a server of a reward model answers; requests for text are refused."""
    created = int(time.time())
    card = {"id": model_name, "object": "model", "created": created, "owned_by": "internjax"}
    workers = Workers("scores")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_model(name, model_name)
        return card

    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> dict[str, Any]:
        _check_model(body.model, model_name)
        conversations, place = await aside(len(await request.body()), lambda: _conversations(body))
        condition = _condition(body, scorer)
        try:
            for messages in conversations:  # all of them before the first is tokenised
                scorer.refuse_long(messages, condition=condition)
            sequences = await workers.map(
                partial(scorer.ids_of, condition=condition),
                conversations,
                request,
                size_of=lambda messages: _num_chars(messages) + len(condition or ""),
            )
        except ContextTooLong as error:
            raise Refusal(str(error), param=place, code="context_length_exceeded") from error
        except ValueError as error:
            raise Refusal(str(error), param=place) from error
        longest = max(map(len, sequences))
        if longest > scorer.max_context:
            raise Refusal(
                f"a conversation has {longest} tokens with its condition and the reward token, the context holds "
                f"{scorer.max_context}; shorten it",
                param=place,
                code="context_length_exceeded",
            )
        scores = await workers.read(sequences, scorer.batches(sequences), scorer.read, request)
        num_tokens = sum(map(len, sequences))
        note(user=body.user, n=len(sequences), prompt=num_tokens, outcome="scored")
        return {
            "object": "list",
            "model": model_name,
            "data": [{"object": "score", "index": i, "score": float(value)} for i, value in enumerate(scores)],
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    def refusing(what: str) -> Callable:
        async def refused() -> None:
            raise Refusal(f"{model_name} is a reward model: it gives scores (POST /v1/score), no {what}", param="model")

        return refused

    for path, what in _OTHER_ROUTES.items():
        app.post(path, include_in_schema=False)(refusing(what))


def refuse_scores(app: FastAPI, model_name: str) -> None:
    """Adds the route to a server of a language model, which has no scores to give."""

    @app.post("/v1/score", include_in_schema=False)
    async def refused() -> None:
        raise Refusal(
            f"{model_name} gives text, and scores come from a reward model (one with a scalar head); serve that",
            param="model",
        )


def _conversations(body: ScoreRequest) -> tuple[list[list[Message]], str]:
    """What is scored, and the field that holds it."""
    if (body.messages is None) == (body.pairs is None):
        given = "both are" if body.pairs else "neither is"
        raise Refusal(f"give messages, one conversation, or pairs of prompt and answer; {given}", param="messages")
    if body.pairs is not None:
        return [[Message("user", pair.prompt), Message("assistant", pair.answer)] for pair in body.pairs], "pairs"
    refuse_messages(body.messages)
    if body.messages[-1].role != "assistant":
        last = len(body.messages) - 1
        raise Refusal("an answer is scored; end messages with the assistant's", param=f"messages[{last}].role")
    try:
        return [messages_of(body.messages, {})], "messages"
    except ValueError as error:
        raise Refusal(str(error), param="messages") from error


def _num_chars(messages: Sequence[Message]) -> int:
    return sum(len(text) for message in messages for text in message.texts)


def _condition(body: ScoreRequest, scorer: Scorer) -> str | None:
    if body.condition is not None and body.condition_prompt is not None:
        raise Refusal("condition, a name, and condition_prompt, a text, are both given; give one", param="condition")
    if body.condition is None:
        return body.condition_prompt
    if body.condition not in scorer.conditions:
        known = ", ".join(map(repr, scorer.conditions)) or "none (--condition NAME=TEXT)"
        raise Refusal(
            f"there is no condition {body.condition!r:.100}; known: {known}. Or give its text as condition_prompt",
            param="condition",
        )
    return scorer.conditions[body.condition]


def _check_model(given: str, served: str) -> None:
    if given != served:
        raise Refusal(
            f"the model {given!r:.100} is not served here; {served!r} is",
            param="model",
            status=404,
            code="model_not_found",
        )
