"""Who a benchmark asks: an engine in this process, or a server. Every request notes when its tokens arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from internjax.decode.engine import Engine
from internjax.decode.request import Request, Session
from internjax.decode.router import Router
from internjax.decode.sample import SamplingParams
from internjax.train.progress import memory_in_use
from serve.client import api_address

FIRST_ID = 3
"""Of random prompts: the ids below are special in most vocabularies."""


class Timing(NamedTuple):
    """One request: when it was sent, when something of its answer arrived, and how many tokens that was."""

    start: float
    arrivals: tuple[float, ...]
    """Seconds of time.perf_counter."""
    counts: tuple[float, ...]
    num_prompt: int
    num_shared: int | None = None
    """Prompt tokens that did not have to be read, where that is known."""

    @property
    def num_new(self) -> float:
        return sum(self.counts)

    @property
    def first_token(self) -> float:
        """Seconds until the first tokens were there."""
        return self.arrivals[0] - self.start


class Target(NamedTuple):
    """Who is asked: ask(prompt, number of new tokens) returns when all of them are there."""

    ask: Callable[[Sequence[int], int], Timing]
    last_id: int
    """The largest token id of a random prompt."""
    max_context: int | None = None
    """None: not known; a server refuses what it has no room for."""
    memory: Callable[[], int | None] = lambda: None
    """Bytes in use: the device's peak, or what this process holds where devices do not tell. None: not known."""


def engine_target(engine: Engine | Router) -> Target:
    """Returns an engine that runs as who is asked."""
    return Target(
        lambda prompt, num_new: ask_engine(engine, prompt, num_new),
        last_id=engine.config.vocab_size - 1,
        # The last token drawn needs no place in the cache.
        max_context=min(engine.max_context, engine.num_pages * engine.page_size + 1),
        memory=lambda: memory_in_use().num_bytes,
    )


def ask_engine(
    engine: Engine | Router, prompt: Sequence[int], num_new: int, *, session: Session | None = None
) -> Timing:
    """Returns how a greedy request was answered; raises RuntimeError where it ended with an error."""
    request = Request(tuple(prompt), num_new, SamplingParams(temperature=0.0))
    arrivals, counts = [], []
    start = time.perf_counter()
    handle = engine.submit(request, session=session)
    for event in handle.events():
        if event.error is not None:
            raise RuntimeError(f"the engine failed: {event.error}")
        if event.ids:
            arrivals.append(time.perf_counter())
            counts.append(len(event.ids))
    if sum(counts) != num_new:
        raise RuntimeError(f"the engine ended a request after {sum(counts)} of {num_new} tokens")
    return Timing(start, tuple(arrivals), tuple(counts), len(prompt), handle.num_shared)


def server_target(url: str, *, model: str | None, api_key: str, last_id: int = 255, timeout: float = 600.0) -> Target:
    """Returns an OpenAI-compatible server as who is asked: /v1/completions with token ids, streamed.

    `url` is with or without /v1. `model` None: the first that it offers. Tokens are counted from `usage` and spread
    evenly over the pieces of text that came. How an answer is kept from ending early is found by asking: `ignore_eos`,
    else `min_tokens`, else not at all.
    """
    import openai

    client = openai.OpenAI(base_url=api_address(url), api_key=api_key, timeout=timeout, max_retries=0)
    offered = [each.id for each in client.models.list().data] if model is None else [model]
    if not offered:
        raise RuntimeError(f"the server at {url} offers no model; name the one to ask with --model")
    name = offered[0]
    lasting = _lasting_fields(client, name)

    def ask(prompt: Sequence[int], num_new: int) -> Timing:
        arrivals, usage = [], None
        start = time.perf_counter()
        stream = client.completions.create(
            model=name,
            prompt=list(prompt),
            max_tokens=num_new,
            temperature=0.0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=lasting(num_new),
        )
        for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].text:
                arrivals.append(time.perf_counter())
        if usage is None:
            raise RuntimeError("the server sent no usage, so its tokens cannot be counted (stream_options)")
        arrivals = arrivals or [time.perf_counter()]  # an answer without any text was there when it ended
        each = usage.completion_tokens / len(arrivals)
        return Timing(start, tuple(arrivals), (each,) * len(arrivals), usage.prompt_tokens)

    return Target(ask, last_id=last_id)


def _lasting_fields(client: Any, name: str) -> Callable[[int], Mapping[str, Any]]:
    """Returns what keeps an answer of so many tokens from ending early with this server."""
    import openai

    ways = (lambda n: {"ignore_eos": True}, lambda n: {"min_tokens": n})
    for way in ways:
        try:
            client.completions.create(model=name, prompt=[FIRST_ID], max_tokens=1, extra_body=way(1))
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            continue
        return way
    print("the server knows neither ignore_eos nor min_tokens: answers may end early, and are counted as they are")
    return lambda n: {}
