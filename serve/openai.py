"""The OpenAI REST interface over a pipeline: `create_app(pipeline, model_name=...)` is an ASGI application.

/v1/models, /v1/completions, /v1/chat/completions (streaming or not), and what it is operated by (`serve.health`,
`serve.metrics`). What a request may hold is in `serve.requests`. A client that goes away frees its slot and its pages.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from internjax.decode.request import RequestError
from internjax.text.chat import CallEnd
from serve.adapter_routes import add_adapter_routes
from serve.guards import Doors, Operation, add_guards
from serve.guided import GuideError
from serve.health import add_health_routes
from serve.keys import keys_of
from serve.kserve_routes import add_kserve_routes
from serve.metrics import Metrics, add_metrics_route
from serve.pipeline import Answer, ContextTooLong, Delta, Event, Params, Pipeline, Prompt, Result, Token
from serve.protocol import (
    Refusal,
    chat_logprobs,
    completion_logprobs,
    envelope,
    messages_of,
    param_of,
    params_of,
    refuse,
    tool_calls,
    tools_of,
    usage,
)
from serve.request_log import note
from serve.requests import ChatRequest, CompletionRequest
from serve.streams import events_of, submitted
from serve.tokenize_routes import add_tokenize_routes
from serve.web import add_page

MAX_ANSWERS = 512  # of one request: each has a thread that waits for it

log = logging.getLogger("serve")


def create_app(
    pipeline: Pipeline,
    *,
    model_name: str,
    api_key: str | Sequence[str] | None = None,
    adapter_root: Path | None = None,
    operation: Operation = Operation(),
    web: bool = True,
) -> FastAPI:
    """The application. With `api_key`, or several, all but /health, /live, /ready, /metrics and the chat page needs one
    of them.

    adapter_root: the folder below which clients may have adapters loaded from; None: they may not. web: whether the
    chat page is at `/`. Its `state` has `doors` and `metrics`.
    """
    app = FastAPI(
        title="InternJAX",
        docs_url=None,  # these two pages would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    doors = app.state.doors = Doors(operation.limits, pipeline.fault)
    keys = keys_of(api_key)
    add_guards(app, doors, api_keys=keys, operation=operation)
    add_health_routes(app, pipeline, doors, model_name=model_name, stuck_seconds=operation.stuck_seconds)
    metrics = app.state.metrics = Metrics(pipeline, doors, model_name=model_name)
    add_metrics_route(app, metrics)
    if web:
        add_page(app)
    if model_name in pipeline.adapters:
        raise ValueError(f"the model and an adapter are both named {model_name!r}; give one of them another name")
    if adapter_root is not None:
        add_adapter_routes(app, pipeline, root=adapter_root, model_name=model_name)
    add_kserve_routes(app, pipeline, model_name=model_name, api_keys=keys)
    created = int(time.time())

    def card_of(name: str) -> dict[str, Any]:
        of_base = {} if name == model_name else {"parent": model_name}
        return {"id": name, "object": "model", "created": created, "owned_by": "internjax"} | of_base

    def served() -> list[str]:
        return [model_name, *pipeline.adapters]

    add_tokenize_routes(app, pipeline, check_model=lambda name: _check_model(name, served()))

    def params_for(body: ChatRequest | CompletionRequest) -> Params:
        """The parameters of a request, with the adapter that its model names."""
        _check_model(body.model, served())
        return replace(_params(body), adapter=None if body.model == model_name else body.model)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [card_of(name) for name in served()]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        _check_model(name, served())
        return card_of(name)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        refuse(body)
        params, n = params_for(body), body.n or 1
        if len(body.prompt) * n > MAX_ANSWERS:
            asked = f"{len(body.prompt)} prompts with n = {n}"
            raise Refusal(f"{asked} are more than {MAX_ANSWERS} answers; send several requests", param="n")
        prompts = [prompt for prompt in body.prompt for _ in range(n)]
        answers = await _submit(
            [lambda p=p, i=i: pipeline.complete(p, _nth(params, i % n)) for i, p in enumerate(prompts)],
            body,
            param="prompt",
        )
        echoes = [_echo(prompt, pipeline) if body.echo else "" for prompt in prompts]
        job = _Job("cmpl-", body, answers, n)
        if body.stream:
            return _stream(job, _completion_chunks(job, echoes))
        return await _whole(request, job, lambda results: _completion(job, results, echoes))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        refuse(body)
        params, n = params_for(body), body.n or 1
        try:
            messages, tools = messages_of(body), tools_of(body)
        except ValueError as error:
            raise Refusal(str(error), param="messages") from error
        if tools and not pipeline.calls_tools:
            raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
        answers = await _submit(
            [lambda i=i: pipeline.chat(messages, _nth(params, i), tools=tools) for i in range(n)],
            body,
            param="messages",
        )
        job = _Job("chatcmpl-", body, answers, n)
        if body.stream:
            return _stream(job, _chat_chunks(job))
        return await _whole(request, job, lambda results: _chat_completion(job, results))

    return app


class _Job:
    """One request under way: its answers, and what every object sent for it repeats."""

    def __init__(self, prefix: str, body: ChatRequest | CompletionRequest, answers: Sequence[Answer], n: int):
        self.id = prefix + uuid.uuid4().hex
        self.created = int(time.time())
        self.body = body
        self.answers = answers
        self.n = n

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model, "choices": choices}

    def call_id(self, index: int) -> str:
        return f"call_{self.id.partition('-')[2]}_{index}"

    def log(self, outcome: str, results: Sequence[Result] = ()) -> None:
        """Notes what came of it for the request's line in the log."""
        note(
            answer=self.id,
            user=self.body.user or getattr(self.body, "safety_identifier", None),
            n=self.n,
            finish=",".join(result.finish for result in results),
            prompt=sum(result.num_prompt_tokens for result in results[:: self.n]),
            completion=sum(len(result.ids) for result in results),
            outcome=outcome,
        )


def _completion(job: _Job, results: Sequence[Result], echoes: Sequence[str]) -> dict[str, Any]:
    choices = []
    for index, (result, echo) in enumerate(zip(results, echoes, strict=True)):
        logprobs = _completion_logprobs(job.body, (*result.prompt, *_behind(echo, result.tokens)))
        choices.append(
            {"index": index, "text": echo + result.text, "logprobs": logprobs, "finish_reason": _finish(result)}
        )
    return job.object("text_completion", choices) | {"usage": usage(results, n=job.n)}


def _behind(echo: str, tokens: Sequence[Token]) -> list[Token]:
    """The tokens of an answer, as they stand behind the echo of its prompt."""
    return [token._replace(offset=len(echo) + token.offset) for token in tokens]


def _completion_logprobs(body: CompletionRequest, tokens: Sequence[Token]) -> dict[str, Any] | None:
    return None if body.logprobs is None else completion_logprobs(tokens, num_top=body.logprobs)


def _chat_completion(job: _Job, results: Sequence[Result]) -> dict[str, Any]:
    choices = []
    for index, result in enumerate(results):
        calls = tool_calls(result, job.call_id(index))
        message = {"role": "assistant", "content": result.text or (None if calls else ""), "refusal": None}
        choices.append(
            {
                "index": index,
                "message": message | ({"tool_calls": calls} if calls else {}),
                "logprobs": chat_logprobs(result.tokens) if job.body.logprobs else None,
                "finish_reason": _finish(result),
            }
        )
    return job.object("chat.completion", choices) | {"usage": usage(results, n=job.n)}


async def _completion_chunks(job: _Job, echoes: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, text: str, logprobs: dict | None = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return job.object("text_completion", [choice])

    for index, echo in enumerate(echoes):
        if echo and job.body.logprobs is None:  # else with the log-probabilities, when they are there
            yield chunk(index, echo)
    async for index, event in _events(job):
        match event:
            case Prompt(tokens):
                yield chunk(index, echoes[index], _completion_logprobs(job.body, tokens))
            case Delta(text, tokens):
                yield chunk(index, text, _completion_logprobs(job.body, _behind(echoes[index], tokens)))
            case Result():
                yield chunk(index, "", finish=_finish(event))


async def _chat_chunks(job: _Job) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return job.object("chat.completion.chunk", [choice])

    for index in range(len(job.answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in _events(job):
        match event:
            case Delta(text, tokens):
                yield chunk(index, {"content": text}, chat_logprobs(tokens) if job.body.logprobs else None)
            case Result():
                calls = tool_calls(event, job.call_id(index))
                if calls:  # a call is sent whole, once it is complete: nothing to lose at the border of two chunks
                    yield chunk(index, {"tool_calls": [{"index": 0} | calls[0]]})
                yield chunk(index, {}, finish=_finish(event))


def _stream(job: _Job, chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Server-sent events of the chunks; the usage comes last, if it was asked for."""
    wants_usage = bool(job.body.stream_options and job.body.stream_options.include_usage)

    async def lines() -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield _event(chunk | {"usage": None} if wants_usage else chunk)
            if wants_usage:
                kind = "text_completion" if isinstance(job.body, CompletionRequest) else "chat.completion.chunk"
                results = [answer.last for answer in job.answers]
                yield _event(job.object(kind, []) | {"usage": usage(results, n=job.n)})
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status line is gone; the client learns it from the stream
            log.exception("%s failed", job.id)
            status = 400 if isinstance(error, GuideError) else 500
            yield _event(envelope(f"the answer broke off: {error}", status=status))
        finally:
            await chunks.aclose()
            for answer in job.answers:  # one that was left before its events were asked for runs still
                answer.abort()
            job.log("streamed", [answer.last for answer in job.answers if answer.last is not None])

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _whole(request: Request, job: _Job, body_of: Callable[[Sequence[Result]], dict[str, Any]]) -> Response:
    """The response with all answers, or an empty one when the client has gone."""
    collecting = asyncio.create_task(_results(job))
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            job.log("client gone")
            return Response(status_code=499)
        try:
            results = collecting.result()
        except GuideError as error:
            raise Refusal(str(error), param=param_of("guide", job.body)) from error
        except Exception as error:
            log.exception("%s failed", job.id)
            raise Refusal(f"the answer broke off: {error}", status=500) from error
        job.log("answered", results)
        return JSONResponse(body_of(results))
    finally:
        for task in (collecting, watching):
            task.cancel()
        await asyncio.gather(collecting, watching, return_exceptions=True)


async def _results(job: _Job) -> list[Result]:
    async for _ in _events(job):
        pass
    return [answer.last for answer in job.answers]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: _Job) -> AsyncIterator[tuple[int, Event]]:
    """Events of all answers as they come, with the answer's index. Leaving it in any way aborts what still runs."""
    async with aclosing(events_of(job.answers)) as events:
        async for index, event in events:
            if not isinstance(event, CallEnd):  # the Result holds the call
                yield index, event


async def _submit(
    starts: Sequence[Callable[[], Answer]], body: ChatRequest | CompletionRequest, *, param: str
) -> list[Answer]:
    """The answers, all of them or none."""
    try:
        return await submitted(starts)
    except ContextTooLong as error:
        raise Refusal(str(error), param=param, code="context_length_exceeded") from error
    except ValueError as error:
        own = isinstance(error, RequestError) and error.field != "tokens"
        raise Refusal(str(error), param=param_of(error.field, body) if own else param) from error


def _params(body: ChatRequest | CompletionRequest) -> Params:
    try:
        return params_of(body)
    except GuideError as error:
        raise Refusal(str(error), param=param_of("guide", body)) from error
    except ValueError as error:
        raise Refusal(str(error)) from error


def _nth(params: Params, index: int) -> Params:
    """Params of the answer `index` of n: seeds count up, so that the answers differ and can be had again."""
    return params if params.seed is None else replace(params, seed=(params.seed + index) % 2**32)


def _echo(prompt: str | list[int], pipeline: Pipeline) -> str:
    return prompt if isinstance(prompt, str) else pipeline.tokenizer.decode(prompt)


def _finish(result: Result) -> str:
    return "stop" if result.finish == "aborted" else result.finish


def _check_model(given: str, served: Sequence[str]) -> None:
    if given not in served:
        raise Refusal(
            f"the model {given!r} is not served here; {', '.join(map(repr, served))} "
            f"{'is' if len(served) == 1 else 'are'}",
            param="model",
            status=404,
            code="model_not_found",
        )


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=True)}\n\n"
