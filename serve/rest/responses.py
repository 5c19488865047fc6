"""OpenAI's Responses: POST /v1/responses, whole or as typed events; GET and DELETE /v1/responses/{id}.

A response is kept for its API key, unless `store` is false, and another goes on behind it with `previous_response_id`.
Its output is the text of the answer and, behind it, the call. An item of the stream is final: a call is sent when it
is complete, because one that is cut off is text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import Response

from internjax.text.message import Message
from serve.answering.answer import Delta, Result, Token
from serve.answering.calls import function_of
from serve.operation.bodies import aside
from serve.operation.refusal import Refusal
from serve.pipeline import Pipeline
from serve.rest.jobs import Job, events, is_brief, line_of, stream, submit, whole
from serve.rest.kept import Shelf, owner_of
from serve.rest.protocol import call_guide_of, chat_logprobs, guided_call, messages_of, tools_of
from serve.rest.response_requests import (
    REFUSED_OF_QUERIES,
    ResponseRequest,
    chat_choice_of,
    declared_of,
    messages_of_items,
    params_of_response,
    refuse_response,
)


class Stored(NamedTuple):
    """A response that is kept, and the conversation behind it, without instructions and tools: each brings its own."""

    response: bytes
    """As JSON: what it takes is known then, and as objects some texts of a request take twenty times as much."""
    messages: tuple[Message, ...]
    called: dict[str, str]


_MESSAGE_BYTES = 500
"""Of a message beside its texts."""


def bytes_of(stored: Stored) -> int:
    """About what it takes of memory. Messages that it shares with the response before are counted for both."""
    texts = [*stored.called, *stored.called.values(), *(text for turn in stored.messages for text in turn.texts)]
    return len(stored.response) + _MESSAGE_BYTES * len(stored.messages) + sum(map(sys.getsizeof, texts))


def add_response_routes(
    app: FastAPI, pipeline: Pipeline, stored: Shelf[Stored], *, adapter_of: Callable[[str], str | None]
) -> None:
    """Adds the routes. adapter_of: what a model's name means; raises Refusal for one that is not served."""

    @app.post("/v1/responses")
    async def create(body: ResponseRequest, request: Request) -> Response:
        num_bytes = len(await request.body())
        await aside(num_bytes, lambda: refuse_response(body))
        adapter, owner = adapter_of(body.model), owner_of(request)
        before = _before(body, stored, owner)
        called = dict(before.called)
        try:
            new = await aside(num_bytes, lambda: messages_of(messages_of_items(body.input, called), called))
            declared = declared_of(body)
            tools = tools_of(declared)
        except ValueError as error:
            raise Refusal(str(error), param="input") from error
        if tools and not pipeline.calls_tools:
            raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
        guide = call_guide_of(chat_choice_of(body.tool_choice), declared, body)
        params = replace(guided_call(params_of_response(body), guide), adapter=adapter)
        conversation = [*before.messages, *new]
        instructed = [] if body.instructions is None else [Message("system", body.instructions)]
        start = [lambda: pipeline.chat([*instructed, *conversation], params, tools=tools)]
        brief = not tools and is_brief([message.content for message in (*instructed, *conversation)], params)
        (answer,) = await submit(start, body, param="input", brief=brief)
        final: dict[str, Any] = {}  # the response, once its answer is there

        def keep(results: Sequence[Result] | None) -> None:
            if results is None:
                return
            (result,) = results
            final.update(_response(job, result))
            if body.store is not False:
                if result.call is not None:
                    called[job.call_id(0)] = function_of(result.call).name
                kept = Stored(_json(final), (*conversation, result.message), called)
                final["store"] = stored.add(kept, owner=owner, key=job.id) is not None

        job = Job("resp_", body, [answer], ended=keep)
        if body.stream:
            return stream(job, _events(job, final), broken=_broken)
        return await whole(request, job, lambda _: final)

    def find(response_id: str, request: Request) -> Stored:
        kept = stored.find(response_id, owner=owner_of(request))
        if kept is None:
            raise _unknown(response_id, stored, status=404, code="response_not_found")
        return kept.value

    @app.get("/v1/responses/{response_id}")
    async def one(response_id: str, request: Request) -> Response:
        for name, (why, neutral) in REFUSED_OF_QUERIES.items():
            value = request.query_params.get(name, request.query_params.get(f"{name}[]"))
            if value is not None and value not in neutral:
                raise Refusal(f"{name} is refused: {why}", param=name)
        return Response(find(response_id, request).response, media_type="application/json")

    @app.delete("/v1/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> dict[str, Any]:
        find(response_id, request)
        stored.remove(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


def _before(body: ResponseRequest, stored: Shelf[Stored], owner: str) -> Stored:
    if body.previous_response_id is None:
        return Stored(b"", (), {})
    kept = stored.find(body.previous_response_id, owner=owner)
    if kept is None:
        code = "previous_response_not_found"
        raise _unknown(body.previous_response_id, stored, status=400, code=code, param="previous_response_id")
    return kept.value


def _unknown(response_id: str, stored: Shelf, *, status: int, code: str, param: str | None = None) -> Refusal:
    return Refusal(
        f"there is no response {response_id!r:.100} of this API key: it never was, was not stored (its `store` says "
        f"so), was deleted, gave way to newer ones ({stored.most} are kept, --max-responses, in "
        f"{stored.max_bytes / 2**30:g} GiB, --response-memory), was not used for {stored.seconds:g} seconds "
        "(--response-seconds), or the server was started anew. Send the whole conversation as input",
        status=status,
        code=code,
        param=param,
    )


def _json(response: dict[str, Any]) -> bytes:
    return json.dumps(response, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


_SHOWN_OF_TOOLS = {"type", "name", "description", "parameters", "strict"}


def _response(job: Job, result: Result | None) -> dict[str, Any]:
    """The response; without a result the one that is in progress."""
    body = job.body
    is_cut = result is not None and result.finish == "length"
    status = "in_progress" if result is None else "incomplete" if is_cut else "completed"
    return {
        "id": job.id,
        "object": "response",
        "created_at": job.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [] if result is None else _output(job, result),
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format(body)},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(include=_SHOWN_OF_TOOLS) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None if result is None else _usage(result),
        "user": body.user,
    }


def _format(body: ResponseRequest) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)


def _usage(result: Result) -> dict[str, Any]:
    read, cached, drawn = result.num_prompt_tokens, result.num_cached_tokens, len(result.ids)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": read - cached},
        "output_tokens": drawn,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + drawn,
    }


def _output(job: Job, result: Result) -> list[dict[str, Any]]:
    """The items of an answer: its text, unless it is a call alone, and its call."""
    items = []
    if result.text or result.call is None:
        status = "incomplete" if result.finish == "length" else "completed"
        items.append(_message(job, status, [_part(job, result.text, result.tokens)]))
    if result.call is not None:
        items.append(_call(job, "completed", *function_of(result.call)))
    return items


def _message(job: Job, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": job.item_id("msg"), "type": "message", "role": "assistant", "status": status, "content": content}


def _part(job: Job, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": _logprobs(job, tokens)}


def _logprobs(job: Job, tokens: Sequence[Token]) -> list[dict[str, Any]]:
    return chat_logprobs(tokens)["content"] if job.body.include else []


def _call(job: Job, status: str, name: str, arguments: str) -> dict[str, Any]:
    known = {"id": job.item_id("fc"), "type": "function_call", "call_id": job.call_id(0), "status": status}
    return known | {"name": name, "arguments": arguments}


async def _events(job: Job, final: dict[str, Any]) -> AsyncIterator[str]:
    """The typed events of a response, numbered. final: the whole of it, when its answer is there."""
    number = 0

    def event(kind: str, **fields: Any) -> str:
        nonlocal number
        number += 1
        return line_of({"type": f"response.{kind}", "sequence_number": number - 1} | fields, event=f"response.{kind}")

    in_text = {"output_index": 0, "content_index": 0, "item_id": job.item_id("msg")}
    is_open = False

    def opened() -> list[str]:
        nonlocal is_open
        if is_open:
            return []
        is_open = True
        return [
            event("output_item.added", output_index=0, item=_message(job, "in_progress", [])),
            event("content_part.added", **in_text, part=_part(job, "", ())),
        ]

    for kind in ("created", "in_progress"):
        yield event(kind, response=_response(job, None))
    async for _, found in events(job):
        match found:
            case Delta(text, tokens):
                for line in opened():
                    yield line
                yield event("output_text.delta", **in_text, delta=text, logprobs=_logprobs(job, tokens))
            case Result():
                for line in opened() if found.call is None else ():
                    yield line
                for line in _closing(job, found, event, in_text):
                    yield line
                yield event(final["status"], response=final)


def _closing(job: Job, result: Result, event: Callable[..., str], in_text: dict[str, Any]) -> list[str]:
    """The events that end the items of an answer, and those of its call."""
    lines = []
    for index, item in enumerate(_output(job, result)):
        if item["type"] == "message":
            (part,) = item["content"]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            lines += [
                event("output_text.done", **in_text, **done),
                event("content_part.done", **in_text, part=part),
            ]
        else:
            place = {"output_index": index, "item_id": item["id"]}
            begun = item | {"status": "in_progress", "arguments": ""}
            arguments = item["arguments"]
            lines += [
                event("output_item.added", output_index=index, item=begun),
                event("function_call_arguments.delta", **place, delta=arguments),
                event("function_call_arguments.done", **place, name=item["name"], arguments=arguments),
            ]
        lines.append(event("output_item.done", output_index=index, item=item))
    return lines


def _broken(envelope: dict[str, Any]) -> str:
    """The event of an answer that broke off; clients look for its `error`."""
    error = envelope["error"]
    known = {"type": "error", "code": error["code"] or error["type"], "message": error["message"], "param": None}
    return line_of(known | envelope, event="error")
