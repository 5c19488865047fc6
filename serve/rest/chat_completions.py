"""/v1/chat/completions: the assistant's next turn, of a conversation that is sent whole or of a session's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from internjax.text.chat import CallDelta, CallEnd, CallStart
from serve.answering.calls import CallPieces, Piece
from serve.operation.bodies import aside
from serve.operation.refusal import Refusal
from serve.pipeline import Delta, Params, Pipeline, Result
from serve.rest.jobs import Job, events, is_brief, lines_of, nth, stream, submit, whole
from serve.rest.kept import owner_of
from serve.rest.protocol import (
    call_guide_of,
    chat_logprobs,
    guided_call,
    messages_of,
    refuse,
    refuse_of_session,
    tool_calls,
    tools_of,
    usage,
)
from serve.rest.requests import ChatRequest
from serve.rest.session_routes import Sessions, Turn


def add_chat_route(
    app: FastAPI, pipeline: Pipeline, sessions: Sessions, *, params_for: Callable[[ChatRequest], Params]
) -> None:
    """Adds the route. params_for: raises Refusal for a model that is not served, or options that cannot be."""

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        num_bytes = len(await request.body())
        await aside(num_bytes, lambda: refuse(body))
        params = params_for(body)
        turn = None if body.session_id is None else sessions.take(body, owner=owner_of(request))
        job = await _job(pipeline, body, params, turn, num_bytes)
        if body.stream:
            return stream(job, lines_of(job, "chat.completion.chunk", _chunks(job)))
        return await whole(request, job, lambda results: _completion(job, results))


async def _job(pipeline: Pipeline, body: ChatRequest, params: Params, turn: Turn | None, num_bytes: int) -> Job:
    """The answers to a chat request under way: to its conversation, or to the new turn of a session.

    num_bytes: of the request.
    """
    n = body.n or 1
    try:
        try:
            messages = await aside(num_bytes, lambda: messages_of(body.messages, turn.held.called if turn else {}))
            declared = turn.held.tools if turn else () if body.tool_choice == "none" else body.tools or ()
            tools = tools_of(declared)
        except ValueError as error:
            raise Refusal(str(error), param="messages") from error
        if tools and not pipeline.calls_tools:
            raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
        params = guided_call(params, call_guide_of(body.tool_choice, declared, body))
        if turn is not None:
            refuse_of_session(body, turn.held.session)
            starts = [lambda: turn.held.session.chat(messages, params)]
        else:
            starts = [lambda i=i: pipeline.chat(messages, nth(params, i), tools=tools) for i in range(n)]
        history = [] if turn is None else [range(turn.held.session.num_tokens)]
        brief = not tools and is_brief([*history, *[message.content for message in messages] * n], params)
        answers = await submit(starts, body, param="messages", brief=brief)
    except BaseException:
        if turn is not None:
            turn.release()
        raise
    if turn is None:
        return Job("chatcmpl-", body, answers, n)
    job = Job("chatcmpl-", body, answers, repeated=turn.described(), ended=lambda results: turn.done(results, job))
    return job


def _completion(job: Job, results: Sequence[Result]) -> dict[str, Any]:
    choices = []
    for index, result in enumerate(results):
        calls = tool_calls(result, job.call_id(index))
        message = {"role": "assistant", "content": result.text or (None if calls else ""), "refusal": None}
        choices.append(
            {
                "index": index,
                "message": message | ({"tool_calls": calls} if calls else {}),
                "logprobs": chat_logprobs(result.tokens) if job.body.logprobs else None,
                "finish_reason": result.finish,
            }
        )
    return job.object("chat.completion", choices) | {"usage": usage(results, n=job.n)}


async def _chunks(job: Job) -> AsyncIterator[dict[str, Any]]:
    begun: set[int] = set()

    def chunk(index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None) -> dict[str, Any]:
        if index not in begun:  # who speaks is said with the first words: a part of its own would hold up others' first
            begun.add(index)
            delta = {"role": "assistant", "content": ""} | delta
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return job.object("chat.completion.chunk", [choice])

    open_calls: dict[int, CallPieces] = {}
    async for index, event in events(job):
        match event:
            case Delta(text, tokens):
                yield chunk(index, {"content": text}, chat_logprobs(tokens) if job.body.logprobs else None)
            case CallStart(kind):
                open_calls[index] = CallPieces(kind)
            case CallDelta(text):
                if any(piece := open_calls[index].push(text)):
                    yield chunk(index, {"tool_calls": [_call_delta(piece, job.call_id(index))]})
            case CallEnd(call):
                piece = open_calls[index].close(call)
                yield chunk(index, {"tool_calls": [_call_delta(piece, job.call_id(index))]})
            case Result():
                yield chunk(index, {}, finish=event.finish)


def _call_delta(piece: Piece, call_id: str) -> dict[str, Any]:
    """The id comes with the name, before any arguments.

    A call that is cut off (by max_tokens) leaves arguments that are no JSON, and its text as content: nothing to run.
    """
    if piece.name is None:
        return {"index": 0, "function": {"arguments": piece.arguments}}
    return {"index": 0, "id": call_id, "type": "function", "function": piece._asdict()}
