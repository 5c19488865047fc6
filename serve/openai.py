"""The OpenAI REST interface over a pipeline: `create_app(pipeline, model_name=...)` is an ASGI application.

Here: /v1/models and /v1/completions (streaming or not); the other routes have rooms of their own. What a request may
hold is in `serve.rest.requests`. A client that goes away frees its slot and its pages.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from serve.kserve.requests import Served
from serve.kserve.routes import add_kserve_routes
from serve.metrics import Metrics, add_metrics_route
from serve.operation.bodies import BodyRoute
from serve.operation.guards import Doors, Operation, add_guards
from serve.operation.health import add_health_routes, health_of
from serve.operation.keys import keys_of
from serve.operation.refusal import Refusal
from serve.pipeline import Delta, Params, Pipeline, Prompt, Result, Token
from serve.rest.adapter_routes import add_adapter_routes
from serve.rest.chat_completions import add_chat_route
from serve.rest.description import describe
from serve.rest.embeddings import add_embedding_route
from serve.rest.jobs import Job, events, is_brief, lines_of, nth, stream, submit, whole
from serve.rest.kept import KeepLimits, Shelf
from serve.rest.protocol import completion_logprobs, params_of, refuse, usage
from serve.rest.requests import ChatRequest, CompletionRequest
from serve.rest.responses import Stored, add_response_routes, bytes_of
from serve.rest.scores import Scorer, add_score_routes, refuse_scores
from serve.rest.session_routes import Sessions, add_session_routes
from serve.rest.tokenize_routes import add_tokenize_routes
from serve.web import add_page

MAX_ANSWERS = 512  # of one request


def create_score_app(
    scorer: Scorer,
    *,
    model_name: str,
    api_key: str | Sequence[str] | None = None,
    operation: Operation = Operation(),
) -> FastAPI:
    """The application of a reward model; see `create_app`."""
    app = _new_app(scorer, model_name=model_name, api_key=api_key, operation=operation)
    app.state.metrics = Metrics(None, app.state.doors, model_name=model_name)
    app.state.metrics.add_programs("scores", lambda: scorer.num_compiled)
    add_metrics_route(app, app.state.metrics)
    add_score_routes(app, scorer, model_name=model_name)
    describe(app, has_key=bool(keys_of(api_key)), served=lambda: [model_name])
    return app


def _new_app(
    working: Pipeline | Scorer, *, model_name: str, api_key: str | Sequence[str] | None, operation: Operation
) -> FastAPI:
    """An application with guards, that says how it is and nothing else."""
    app = FastAPI(
        title="InternJAX",
        docs_url=None,  # these two pages would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.router.route_class = BodyRoute
    doors = Doors(operation.limits, working.fault)
    app.state.operation, app.state.doors = operation, doors
    app.state.health = lambda: health_of(working, doors, stuck_seconds=operation.stuck_seconds)
    add_guards(app, doors, api_keys=keys_of(api_key), operation=operation)
    add_health_routes(app, app.state.health, model_name=model_name)
    return app


def create_app(
    pipeline: Pipeline,
    *,
    model_name: str,
    api_key: str | Sequence[str] | None = None,
    adapter_root: Path | None = None,
    operation: Operation = Operation(),
    keep: KeepLimits = KeepLimits(),
    web: bool = True,
) -> FastAPI:
    """The application. With `api_key`, or several, all but /health, /live, /ready, /metrics and the chat page needs one
    of them.

    adapter_root: the folder below which clients may have adapters loaded from; None: they may not. keep: how much is
    held for clients, and how long. web: whether the chat page is at `/`. Its `state` has `operation`, `doors`,
    `health`, `metrics`, and `served` for the KServe v2 protocol.
    """
    app = _new_app(pipeline, model_name=model_name, api_key=api_key, operation=operation)
    metrics = app.state.metrics = Metrics(pipeline, app.state.doors, model_name=model_name)
    add_metrics_route(app, metrics)
    if web:
        add_page(app)
    if model_name in pipeline.adapters:
        raise ValueError(f"the model and an adapter are both named {model_name!r}; give one of them another name")
    if adapter_root is not None:
        add_adapter_routes(app, pipeline, root=adapter_root, model_name=model_name)
    keys, health = keys_of(api_key), app.state.health
    app.state.served = Served(pipeline, model_name, keys, operation.limits.body_bytes, health)
    add_kserve_routes(app, app.state.served)
    created = int(time.time())
    sessions = Sessions(most=keep.sessions, seconds=keep.session_seconds)

    def card_of(name: str) -> dict[str, Any]:
        of_base = {} if name == model_name else {"parent": model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "internjax"} | of_base

    def served() -> list[str]:
        return [model_name, *pipeline.adapters]

    def check_model(name: str) -> None:
        _check_model(name, served())

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card_of(name) for name in served()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_model(name, served())
        return card_of(name)

    def params_for(body: ChatRequest | CompletionRequest) -> Params:
        """The parameters of a request, with the adapter that its model names."""
        return replace(params_of(body), adapter=adapter_of(body.model))

    def adapter_of(name: str) -> str | None:
        check_model(name)
        return None if name == model_name else name

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        refuse(body)
        params, n = params_for(body), body.n or 1
        if len(body.prompt) * n > MAX_ANSWERS:
            asked = f"{len(body.prompt)} prompts with n = {n}"
            raise Refusal(f"{asked} are more than {MAX_ANSWERS} answers; send several requests", param="n")
        prompts = [prompt for prompt in body.prompt for _ in range(n)]
        answers = await submit(
            [lambda p=p, i=i: pipeline.complete(p, nth(params, i % n)) for i, p in enumerate(prompts)],
            body,
            param="prompt",
            brief=is_brief(prompts, params),
        )
        echoes = [_echo(prompt, pipeline) if body.echo else "" for prompt in prompts]
        job = Job("cmpl-", body, answers, n)
        if body.stream:
            return stream(job, lines_of(job, "text_completion", _completion_chunks(job, echoes)))
        return await whole(request, job, lambda results: _completion(job, results, echoes))

    add_chat_route(app, pipeline, sessions, params_for=params_for)
    add_session_routes(app, pipeline, sessions, check_model=check_model)
    metrics.add_gauge("sessions", "Sessions that are kept.", lambda: len(sessions))
    stored: Shelf[Stored] = Shelf(
        most=keep.responses,
        seconds=keep.response_seconds,
        replaces=True,
        max_bytes=keep.response_bytes,
        bytes_of=bytes_of,
    )
    add_response_routes(app, pipeline, stored, adapter_of=adapter_of)
    embedder = add_embedding_route(app, pipeline, adapter_of=adapter_of)
    if embedder is not None:
        metrics.add_programs("embeddings", lambda: embedder.num_compiled)
    metrics.add_gauge("responses", "Responses that are kept.", lambda: len(stored))
    metrics.add_gauge("response_bytes", "Memory that they take.", lambda: stored.num_bytes)
    add_tokenize_routes(app, pipeline, check_model=check_model)
    refuse_scores(app, model_name)
    describe(app, has_key=bool(keys_of(api_key)), served=served)
    return app


def _completion(job: Job, results: Sequence[Result], echoes: Sequence[str]) -> dict[str, Any]:
    choices = []
    for index, (result, echo) in enumerate(zip(results, echoes, strict=True)):
        logprobs = _completion_logprobs(job.body, (*result.prompt, *_behind(echo, result.tokens)))
        choices.append(
            {"index": index, "text": echo + result.text, "logprobs": logprobs, "finish_reason": result.finish}
        )
    return job.object("text_completion", choices) | {"usage": usage(results, n=job.n)}


def _behind(echo: str, tokens: Sequence[Token]) -> list[Token]:
    """The tokens of an answer, as they stand behind the echo of its prompt."""
    return [token._replace(offset=len(echo) + token.offset) for token in tokens]


def _completion_logprobs(body: CompletionRequest, tokens: Sequence[Token]) -> dict[str, Any] | None:
    return None if body.logprobs is None else completion_logprobs(tokens, num_top=body.logprobs)


async def _completion_chunks(job: Job, echoes: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, text: str, logprobs: dict | None = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return job.object("text_completion", [choice])

    for index, echo in enumerate(echoes):
        if echo and job.body.logprobs is None:  # else with the log-probabilities, when they are there
            yield chunk(index, echo)
    async for index, event in events(job):
        match event:
            case Prompt(tokens):
                yield chunk(index, echoes[index], _completion_logprobs(job.body, tokens))
            case Delta(text, tokens):
                yield chunk(index, text, _completion_logprobs(job.body, _behind(echoes[index], tokens)))
            case Result():
                yield chunk(index, "", finish=event.finish)


def _echo(prompt: str | list[int], pipeline: Pipeline) -> str:
    return prompt if isinstance(prompt, str) else pipeline.tokenizer.decode(prompt)


def _check_model(given: str, served: Sequence[str]) -> None:
    if given not in served:
        raise Refusal(
            f"the model {given!r:.100} is not served here; {', '.join(map(repr, served))} "
            f"{'is' if len(served) == 1 else 'are'}",
            param="model",
            status=404,
            code="model_not_found",
        )
