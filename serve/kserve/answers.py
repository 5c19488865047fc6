"""Answers to requests of the KServe v2 protocol: the responses of a `Job`, as its outputs are wanted."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

from internjax.decode.request import RequestError
from serve.answering.streams import events_of, submitted
from serve.guided import GuideError
from serve.kserve.requests import OUTPUTS, Job
from serve.kserve.tensors import Tensor
from serve.operation.refusal import Refusal
from serve.operation.request_log import note, sane_id
from serve.pipeline import Answer, ContextTooLong, Delta, Result, Token
from serve.rest.protocol import chat_logprobs, completion_logprobs, param_of, refuse_aborted, tool_calls
from serve.rest.requests import ChatRequest, CompletionRequest

log = logging.getLogger("serve")


class Response(NamedTuple):
    """A response for either front. `is_last`: no more of them come for its request."""

    model_name: str
    id: str
    outputs: list[Tensor]
    is_last: bool


async def answer(job: Job, *, send: Callable[[Response], Awaitable[None]] | None = None) -> Response:
    """The last response to a request; those before it, if it streams, go to `send`.

    Left in any way, its answers are aborted. Raises Refusal where they break off.
    """
    results, outcome = [], "client gone"
    try:
        async with asyncio.timeout(job.seconds):
            results = await _results(job, await _submitted(job), send)
        outcome = "streamed" if job.streams else "answered"
    except TimeoutError as error:
        outcome = "timeout"
        raise Refusal(f"the timeout of {job.seconds:g} s was over before the answer", status=504) from error
    except Refusal:
        outcome = "refused"
        raise
    except GuideError as error:
        outcome = "failed"
        raise Refusal(str(error)) from error
    except Exception as error:
        outcome = "failed"
        log.exception("%r failed", job.request.id)
        raise Refusal(f"the answer broke off: {error}", status=500) from error
    finally:
        note(
            answer=sane_id(job.request.id),
            user=job.bodies[0].user or getattr(job.bodies[0], "safety_identifier", None),
            n=len(job.starts),
            finish=",".join(result.finish for result in results),
            prompt=sum(result.num_prompt_tokens for result in results),
            completion=sum(len(result.ids) for result in results),
            outcome=outcome,
        )
    return Response(job.request.model_name, job.request.id, _outputs(job, results), is_last=True)


async def _submitted(job: Job) -> list[Answer]:
    """The answers, all of them or none."""
    try:
        return await submitted(job.starts)
    except ContextTooLong as error:
        raise Refusal(str(error)) from error
    except RequestError as error:
        name = param_of(error.field, job.bodies[0])
        raise Refusal(str(error) if name in str(error) else f"{name}: {error}", param=name) from error
    except ValueError as error:
        raise Refusal(str(error)) from error
    except RuntimeError as error:
        raise Refusal(f"the engine takes no more requests: {error}", status=503) from error


async def _results(job: Job, answers: list[Answer], send: Callable[[Response], Awaitable[None]] | None) -> list[Result]:
    """The results of all answers; of one that streams, its text goes to `send` as it comes."""

    async def tell(text: str, tokens: Sequence[Token]) -> None:
        told = {"text_output": text.encode()}
        told["logprobs"] = _logprobs(job.bodies[0], tokens) if "logprobs" in job.wanted else b""
        outputs = [Tensor(name, "BYTES", job.shape, [told[name]]) for name in job.wanted if name in told]
        if outputs:
            await send(Response(job.request.model_name, job.request.id, outputs, is_last=False))

    try:
        if job.streams and job.echoes[0]:
            await tell(job.echoes[0], ())
        async with aclosing(events_of(answers)) as events:
            async for _, event in events:
                refuse_aborted(event)
                if job.streams and isinstance(event, Delta):
                    await tell(event.text, event.tokens)
    finally:
        for each in answers:  # one that was left before its events were asked for runs still
            each.abort()
    return [each.last for each in answers]


def _outputs(job: Job, results: Sequence[Result]) -> list[Tensor]:
    """What is wanted of the answers; in a stream without what was told before."""

    def tensor(name: str) -> Tensor:
        kind, values = OUTPUTS[name].datatype, []
        for result, body, echo in zip(results, job.bodies, job.echoes, strict=True):
            values.append(_output(name, result, body, echo, is_told=job.streams))
        if name != "output_ids":
            return Tensor(name, kind, job.shape, values)
        longest = max(map(len, values))
        rows = [token_id for ids in values for token_id in (*ids, *[-1] * (longest - len(ids)))]
        return Tensor(name, kind, (len(values), longest), rows)

    return [tensor(name) for name in job.wanted]


def _output(
    name: str,
    result: Result,
    body: CompletionRequest | ChatRequest,
    echo: str,
    *,
    is_told: bool,
) -> Any:
    match name:
        case "text_output":
            return b"" if is_told else (echo + result.text).encode()
        case "finish_reason":
            return result.finish.encode()
        case "tool_calls":
            return json.dumps(tool_calls(result, f"call_{uuid.uuid4().hex}") or []).encode()
        case "num_prompt_tokens":
            return result.num_prompt_tokens
        case "num_generated_tokens":
            return len(result.ids)
        case "output_ids":
            return result.ids
        case "logprobs":
            return _logprobs(body, () if is_told else result.tokens)


def _logprobs(body: CompletionRequest | ChatRequest, tokens: Sequence[Token]) -> bytes:
    if isinstance(body, ChatRequest):
        return json.dumps(chat_logprobs(tokens)).encode()
    return json.dumps(completion_logprobs(tokens, num_top=body.logprobs)).encode()
