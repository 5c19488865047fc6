"""A tokenizer, and an engine that answers from a script: what the model says is exact, everything around it is real."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import openai
import pytest

from internjax.decode.engine import Stats
from internjax.decode.request import PromptLogprobs, Session
from internjax.decode.sample import Limits
from internjax.decode.timing import Clock, Timings
from internjax.hf.generation import GenerationConfig
from internjax.hf.open import Model
from internjax.model.config import ModelConfig
from internjax.text.chat import stop_ids
from internjax.text.tokenizer import Tokenizer, train_tokenizer
from serve.pipeline import Pipeline
from serve.server import start_server
from tests.browser import browser, find_browser
from tests.weights import random_params

MAX_CONTEXT = 1024


class ScriptedEvent(NamedTuple):
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: str | None
    error: str | None = None
    top_logprobs: tuple | None = None
    prompt: PromptLogprobs | None = None


def scores_of(ids, num_top: int):
    """Log-probabilities that depend on the id alone, and most likely tokens: the one drawn, then those behind it."""
    top = [tuple(((token + i) % 340, -token / 1000 - i) for i in range(num_top)) for token in ids]
    return tuple(-token / 1000 for token in ids), tuple(top)


class ScriptedHandle:
    num_shared = 0

    def __init__(self, engine, request, session=None):
        self._engine, self._request, self._session = engine, request, session
        self._said, self.aborted, self._over = [], False, False
        self._aborted = threading.Event()

    def events(self) -> Iterator[ScriptedEvent]:
        if self._over:
            return
        self._over = True
        try:
            yield from self._events()
        finally:
            if self._session is not None:
                self._session.end([*self._session.tokens, *self._request.tokens, *self._said])

    def _events(self) -> Iterator[ScriptedEvent]:
        ids = list(self._engine.script(self._request))[: self._request.max_new_tokens]
        finish = "length" if len(ids) == self._request.max_new_tokens else None
        for index, token_id in enumerate(ids):
            if token_id in self._request.stop_ids:
                ids, finish = ids[: index + 1], "stop"
                break
        sizes = itertools.cycle(self._engine.chunks)
        asked = self._request.logprobs
        try:
            if self._request.prompt_logprobs is not None:
                values, top = scores_of(self._request.tokens, self._request.prompt_logprobs)
                prompt = PromptLogprobs((None, *values[1:]), ((), *top[1:]))
                yield ScriptedEvent((), None, None, prompt=prompt)
            while True:
                if self._engine.seconds_per_event:
                    self._aborted.wait(self._engine.seconds_per_event)
                if self._aborted.is_set():
                    yield ScriptedEvent((), None, "aborted")
                    return
                size = next(sizes)
                now, ids = tuple(ids[:size]), ids[size:]
                self._said += now
                logprobs, top = (None, None) if asked is None else scores_of(now, asked)
                if not ids and finish is None:  # the script is at its end and says neither stop nor length
                    yield ScriptedEvent(now, logprobs, "error", "the script ran out", top)
                    return
                yield ScriptedEvent(now, logprobs, None if ids else finish, None, top)
                if not ids:
                    return
        finally:
            self._engine.active.discard(self)

    def abort(self) -> None:
        self.aborted = True
        self._aborted.set()
        self._engine.active.discard(self)


class ScriptedEngine:
    """`script(request) -> ids`; `chunks` are the numbers of ids in successive events."""

    max_context, num_pages, page_size, limits, adapters = MAX_CONTEXT, 1000, 16, Limits(), ()
    silent, num_host_pages = 0.0, 0
    config = SimpleNamespace(vocab_size=340)  # for guides, which the script need not follow

    def __init__(self, script: Callable, *, chunks=(1,), seconds_per_event=0.0):
        self.script, self.chunks, self.seconds_per_event = script, chunks, seconds_per_event
        self.requests: list = []
        self.active: set = set()
        self.fault: str | None = None

    def open_session(self, max_length: int | None = None) -> Session:
        return Session(max_length or self.max_context, np.zeros(0))

    def submit(self, request, *, session: Session | None = None) -> ScriptedHandle:
        if self.fault:
            raise RuntimeError(self.fault)
        handle = ScriptedHandle(self, request, session)
        if session is not None:
            session.take(handle)
        self.active.add(handle)
        self.requests.append(request)
        return handle

    def silent_seconds(self) -> float:
        return self.silent

    def stats(self) -> Stats:
        return Stats(**dict.fromkeys(Stats._fields, 0))._replace(num_active=len(self.active))

    def timings(self) -> Timings:
        return Clock().read()

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    corpus = [
        "def gcd(a, b): return the greatest common divisor of two numbers.\nThe answer is 6, héllo wörld 你好.\n"
    ] * 20
    return train_tokenizer(corpus, vocab_size=340)


@pytest.fixture
def scripted(tokenizer):
    """scripted(script, chunks=...) -> Pipeline over a ScriptedEngine. A text as script is said, then ended."""

    def make(script, *, chunks=(1,), seconds_per_event=0.0) -> Pipeline:
        if isinstance(script, str):
            said = [*tokenizer.encode(script, allow_special=True), tokenizer.eos_id]
            engine = ScriptedEngine(lambda request: said, chunks=chunks, seconds_per_event=seconds_per_event)
        else:
            engine = ScriptedEngine(script, chunks=chunks, seconds_per_event=seconds_per_event)
        return Pipeline.over(engine, tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny_model(tokenizer) -> Model:
    """A random model with InternLM2's architecture."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        d_model=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        initializer_range=0.2,
        dtype="float32",
    )
    params = random_params(config)
    generation = GenerationConfig(eos_ids=stop_ids(tokenizer))
    return Model(config, params, tokenizer, generation, lora=None, source=None)


@pytest.fixture
def eventually():
    """eventually(condition): waits for it for at most ten seconds, and fails if it does not come true."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it did not happen in 10 seconds"
            time.sleep(0.01)

    return wait


@pytest.fixture
def serve(scripted):
    """serve(script, ...) -> (openai client, pipeline), over a server that is closed after the test."""
    servers = []

    def start(script="The answer is 6, héllo 你好.", *, chunks=(1,), seconds_per_event=0.0, api_key=None, **how):
        pipeline = scripted(script, chunks=chunks, seconds_per_event=seconds_per_event)
        server = start_server(pipeline, model_name="tiny", api_key=api_key, drain_seconds=1, **how)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=api_key or "none", max_retries=0, timeout=20)
        servers.append((server, client))
        return client, pipeline

    yield start
    for server, client in servers:
        client.close()
        server.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A page of a headless browser."""
    if find_browser() is None:
        pytest.skip("no Chromium is installed")
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page
