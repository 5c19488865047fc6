"""One request under way: its answers started, read whole or sent as a stream, and ended, whatever the client does."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from internjax.decode.request import RequestError
from serve.answering.params import Params
from serve.answering.streams import events_of, submitted
from serve.guided import GuideError
from serve.operation.refusal import Refusal, envelope
from serve.operation.request_log import note
from serve.pipeline import Answer, ContextTooLong, Event, Result
from serve.rest.protocol import param_of, refuse_aborted, usage
from serve.rest.requests import Asking

log = logging.getLogger("serve")


class Job:
    """One request under way: its answers, and what every object sent for it repeats."""

    def __init__(
        self,
        prefix: str,
        body: Asking,
        answers: Sequence[Answer],
        n: int = 1,
        *,
        repeated: Mapping[str, Any] | None = None,
        ended: Callable[[Sequence[Result] | None], None] = lambda results: None,
    ):
        """n: answers to each prompt. repeated: more of what every object repeats. ended: told once how it ended, with
        the results if all answers came to their end, else with None."""
        self._hex = uuid.uuid4().hex
        self.id = prefix + self._hex
        self.created = int(time.time())
        self.body = body
        self.answers = answers
        self.n = n
        self._repeated = dict(repeated or {})
        self._ended: Callable[[Sequence[Result] | None], None] | None = ended
        self._is_over = False

    def object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        known = {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}
        return known | {"choices": choices} | self._repeated

    def call_id(self, index: int) -> str:
        return f"call_{self._hex}_{index}"

    def item_id(self, kind: str) -> str:
        return f"{kind}_{self._hex}"

    @property
    def is_complete(self) -> bool:
        """Whether all answers are there, though not all of them were told yet."""
        return all(answer.last is not None for answer in self.answers)

    def complete(self) -> None:
        """Notes that all answers are there. Before the client is told of the last one: what it saw complete is kept."""
        self._tell([answer.last for answer in self.answers])

    def end(self, outcome: str) -> None:
        """Ends what still runs, and notes how it went for the request's line in the log; once."""
        if self._is_over:
            return
        self._is_over = True
        for answer in self.answers:  # one that was left before its events were asked for runs still
            answer.abort()
        self._tell(None)
        results = [answer.last for answer in self.answers if answer.last is not None]
        note(
            answer=self.id,
            user=self.body.user or getattr(self.body, "safety_identifier", None),
            n=self.n,
            finish=",".join(result.finish for result in results),
            prompt=sum(result.num_prompt_tokens for result in results[:: self.n]),
            completion=sum(len(result.ids) for result in results),
            outcome=outcome,
        )

    def _tell(self, results: Sequence[Result] | None) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(results)


BRIEF = 2000
"""Characters or ids of all prompts of a request that are read in the event loop, in about a millisecond: when several
requests come at once, their threads get in each other's way for longer."""


def is_brief(prompts: Iterable[str | Sequence[int]], params: Params) -> bool:
    """Whether answers to these prompts are started within BRIEF, each of them counted as 100 at least.

    With a guide they are not: it may take long to be compiled.
    """
    return params.guide is None and sum(max(len(prompt), 100) for prompt in prompts) <= BRIEF


async def submit(starts: Sequence[Callable[[], Answer]], body: Asking, *, param: str, brief: bool) -> list[Answer]:
    """The answers, all of them or none. param: the field of the request that holds what is answered."""
    try:
        return await submitted(starts, brief=brief)
    except ContextTooLong as error:
        raise Refusal(str(error), param=param, code="context_length_exceeded") from error
    except ValueError as error:
        own = isinstance(error, RequestError) and error.field != "tokens"
        raise Refusal(str(error), param=param_of(error.field, body) if own else param) from error


def nth(params: Params, index: int) -> Params:
    """Params of the answer `index` of n: seeds count up, so that the answers differ and can be had again."""
    return params if params.seed is None else replace(params, seed=(params.seed + index) % 2**32)


def line_of(chunk: Mapping[str, Any], *, event: str | None = None) -> str:
    """A server-sent event."""
    return (f"event: {event}\n" if event else "") + f"data: {json.dumps(chunk, ensure_ascii=True)}\n\n"


async def events(job: Job) -> AsyncIterator[tuple[int, Event]]:
    """Events of all answers as they come, with the answer's index. Leaving it in any way aborts what still runs.

    Raises Refusal for an answer that the engine did not go on with.
    """
    async with aclosing(events_of(job.answers)) as found:
        num_open = len(job.answers)
        async for index, event in found:
            refuse_aborted(event)
            num_open -= isinstance(event, Result)
            if not num_open:
                job.complete()
            yield index, event


async def lines_of(job: Job, kind: str, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """The chunks as server-sent events; the usage comes last, if it was asked for.

    What comes when all answers are there is sent as one: on a small machine a part costs about what a token does.
    """
    wants_usage, last = bool(job.body.stream_options and job.body.stream_options.include_usage), ""
    async with aclosing(chunks):
        async for chunk in chunks:
            line = line_of(chunk | {"usage": None} if wants_usage else chunk)
            if last or job.is_complete:
                last += line
            else:
                yield line
    if wants_usage:
        results = [answer.last for answer in job.answers]
        last += line_of(job.object(kind, []) | {"usage": usage(results, n=job.n)})
    yield last + "data: [DONE]\n\n"


def stream(job: Job, sent: AsyncIterator[str], *, broken: Callable[[dict[str, Any]], str] = line_of) -> Response:
    """Server-sent events. broken: the one that tells of an error, from its envelope."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for line in sent:
                yield line
            job.end("streamed")
        except Refusal as refusal:  # the status line is gone; the client learns it from the stream
            yield broken(envelope(refusal.message, status=refusal.status, code=refusal.code))
        except Exception as error:
            log.exception("%s failed", job.id)
            status = 400 if isinstance(error, GuideError) else 500
            yield broken(envelope(f"the answer broke off: {error}", status=status))
        finally:
            await sent.aclose()

    return _Streaming(lines(), job)


class _Streaming(StreamingResponse):
    """A stream that ends its job however it ends itself, also when nobody was there for its first line."""

    def __init__(self, lines: AsyncIterator[str], job: Job):
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.end("streamed in part")


async def whole(request: Request, job: Job, body_of: Callable[[Sequence[Result]], dict[str, Any]]) -> Response:
    """The response with all answers, or an empty one when the client has gone."""
    collecting = asyncio.create_task(_results(job))
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            job.end("client gone")
            return Response(status_code=499)
        try:
            results = collecting.result()
        except GuideError as error:
            raise Refusal(str(error), param=param_of("guide", job.body)) from error
        except Refusal:
            raise
        except Exception as error:
            log.exception("%s failed", job.id)
            raise Refusal(f"the answer broke off: {error}", status=500) from error
        response = JSONResponse(body_of(results))
        job.end("answered")
        return response
    finally:
        for task in (collecting, watching):
            task.cancel()
        await asyncio.gather(collecting, watching, return_exceptions=True)
        job.end("failed")


async def _results(job: Job) -> list[Result]:
    async for _ in events(job):
        pass
    return [answer.last for answer in job.answers]


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
