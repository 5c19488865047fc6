"""The OpenAI REST interface over a pipeline: `create_app(pipeline, model_name=...)` is an ASGI application.

/v1/models, /v1/completions, /v1/chat/completions (streaming or not), /health. What a request may hold is in
`serve.requests`. A client that goes away frees its slot and its pages.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.adapter_routes import add_adapter_routes
from serve.chat_completions import add_chat_route
from serve.embeddings import add_embedding_route
from serve.jobs import Job, events, finish_of, lines_of, nth, stream, submit, whole
from serve.kept import KeepLimits, Shelf
from serve.kserve_routes import add_kserve_routes
from serve.pipeline import Delta, Params, Pipeline, Prompt, Result, Token
from serve.protocol import Refusal, completion_logprobs, envelope, params_of, refuse, usage
from serve.requests import ChatRequest, CompletionRequest
from serve.responses import Stored, add_response_routes
from serve.scores import Scorer, add_score_routes, refuse_scores
from serve.session_routes import Sessions, add_session_routes

MAX_BODY_BYTES = 16 << 20
MAX_ANSWERS = 512  # of one request: each has a thread that waits for it

log = logging.getLogger("serve")


def create_score_app(scorer: Scorer, *, model_name: str, api_key: str | None = None) -> FastAPI:
    """The application of a reward model."""
    app = _new_app(api_key)
    add_score_routes(app, scorer, model_name=model_name)
    return app


def _new_app(api_key: str | None) -> FastAPI:
    app = FastAPI(
        title="InternJAX",
        docs_url=None,  # these two pages would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    _add_error_envelopes(app)
    app.add_middleware(_LimitBody)
    if api_key is not None:
        app.add_middleware(_RequireKey, key=api_key)
    return app


def create_app(
    pipeline: Pipeline,
    *,
    model_name: str,
    api_key: str | None = None,
    adapter_root: Path | None = None,
    keep: KeepLimits = KeepLimits(),
) -> FastAPI:
    """The application. With `api_key`, everything under /v1 needs it as bearer token.

    adapter_root: the folder below which clients may have adapters loaded from; None: they may not. keep: how much is
    held for clients, and how long.
    """
    app = _new_app(api_key)
    if model_name in pipeline.adapters:
        raise ValueError(f"the model and an adapter are both named {model_name!r}; give one of them another name")
    if adapter_root is not None:
        add_adapter_routes(app, pipeline, root=adapter_root, model_name=model_name)
    add_kserve_routes(app, pipeline, model_name=model_name, api_key=api_key)
    created = int(time.time())
    sessions = Sessions(most=keep.sessions, seconds=keep.session_seconds)

    def card_of(name: str) -> dict[str, Any]:
        of_base = {} if name == model_name else {"parent": model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "internjax"} | of_base

    def served() -> list[str]:
        return [model_name, *pipeline.adapters]

    def check_model(name: str) -> None:
        _check_model(name, served())

    @app.get("/health")
    def health() -> Response:
        fault, faults = pipeline.fault(), pipeline.faults()
        status = "failed" if fault is not None else "degraded" if any(faults) else "ok"
        state = {"status": status, "model": model_name, "fault": fault}
        if len(faults) > 1:
            state["replicas"] = [{"fault": each} for each in faults]
        return JSONResponse(state, status_code=200 if fault is None else 503)

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
        )
        echoes = [_echo(prompt, pipeline) if body.echo else "" for prompt in prompts]
        job = Job("cmpl-", body, answers, n)
        if body.stream:
            return stream(job, lines_of(job, "text_completion", _completion_chunks(job, echoes)))
        return await whole(request, job, lambda results: _completion(job, results, echoes))

    add_chat_route(app, pipeline, sessions, params_for=params_for)
    add_session_routes(app, pipeline, sessions, check_model=check_model)
    stored: Shelf[Stored] = Shelf(most=keep.responses, seconds=keep.response_seconds, replaces=True)
    add_response_routes(app, pipeline, stored, adapter_of=adapter_of)
    add_embedding_route(app, pipeline, adapter_of=adapter_of)
    refuse_scores(app, model_name)
    return app


def _completion(job: Job, results: Sequence[Result], echoes: Sequence[str]) -> dict[str, Any]:
    choices = []
    for index, (result, echo) in enumerate(zip(results, echoes, strict=True)):
        logprobs = _completion_logprobs(job.body, (*result.prompt, *_behind(echo, result.tokens)))
        choices.append(
            {"index": index, "text": echo + result.text, "logprobs": logprobs, "finish_reason": finish_of(result)}
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
                yield chunk(index, "", finish=finish_of(event))


def _echo(prompt: str | list[int], pipeline: Pipeline) -> str:
    return prompt if isinstance(prompt, str) else pipeline.tokenizer.decode(prompt)


def _check_model(given: str, served: Sequence[str]) -> None:
    if given not in served:
        raise Refusal(
            f"the model {given!r} is not served here; {', '.join(map(repr, served))} "
            f"{'is' if len(served) == 1 else 'are'}",
            param="model",
            status=404,
            code="model_not_found",
        )


class _LimitBody:
    """Refuses to read more of a body than MAX_BODY_BYTES."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send) -> None:
        num_bytes = 0

        async def limited():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body has more than {MAX_BODY_BYTES} bytes; send less")
            return message

        await self._app(scope, limited if scope["type"] == "http" else receive, send)


class _RequireKey:
    """Answers 401 to requests under /v1 that do not carry the key."""

    def __init__(self, app, key: str):
        self._app = app
        self._wanted = b"Bearer " + key.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                message = "the API key is missing or wrong; send the header Authorization: Bearer <key>"
                error = envelope(message, status=401, code="invalid_api_key")
                await JSONResponse(error, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _add_error_envelopes(app: FastAPI) -> None:
    def respond(message: str, status: int, param: str | None = None, code: str | None = None) -> Response:
        # In ASCII, because the message may quote what is no valid UTF-8.
        body = json.dumps(envelope(message, status=status, param=param, code=code))
        return Response(body, status_code=status, media_type="application/json")

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> Response:
        return respond(error.message, error.status, error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = first["loc"][1:]
        param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".") or None
        if first["type"] == "json_invalid":
            return respond(f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}", 400)
        if first["type"] == "extra_forbidden":
            return respond(f"unknown field {param}; it is not part of this request", 400, param, "unknown_parameter")
        given = "" if first["type"] == "missing" else f"; given {first['input']!r:.200}"
        return respond(f"{param or 'the body'}: {first['msg']}{given}", 400, param)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        reason = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
        }
        return respond(reason.get(error.status_code, str(error.detail)), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return respond(f"the server failed: {type(error).__name__}", 500)
