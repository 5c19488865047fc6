"""Sessions over REST, beyond OpenAI: conversations that the server holds, of which a request sends the new turn only.

    POST   /v1/sessions              {"model", "messages", "tools", "max_length"} -> the session, with its id
    POST   /v1/chat/completions      with "session_id": `messages` are the new turn
    POST   /v1/sessions/{id}/fork    another one that begins as this one stands
    GET    /v1/sessions/{id}         with its messages;  GET /v1/sessions: all of this API key
    DELETE /v1/sessions/{id}

A turn becomes part of the session when its answer is complete; one that the client leaves, or that fails, does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI, Request

from internjax.text.message import to_openai
from serve.answering.answer import Result
from serve.answering.calls import function_of
from serve.answering.readers import MARKER_OF
from serve.operation.bodies import aside
from serve.operation.refusal import Refusal
from serve.pipeline import ContextTooLong, Pipeline, Session
from serve.rest.jobs import BRIEF, Job
from serve.rest.kept import Kept, Shelf, owner_of
from serve.rest.protocol import messages_of, refuse_session, tools_of
from serve.rest.requests import ChatRequest, DeclaredTool, SessionRequest

_SENT_SECONDS = 0.001
"""After so long the end of an answer was sent, and its client thinks of the next turn."""


class Held:
    """A session that is kept, and what of it only its requests know."""

    def __init__(self, session: Session, model: str, tools: Sequence[DeclaredTool], called: Mapping[str, str]):
        """tools: those declared. called: the functions of earlier calls, by the ids that clients know them by."""
        self.session = session
        self.model = model
        self.tools = tuple(tools)
        self.called = dict(called)
        self.created = int(time.time())
        self.busy = False

    def settle(self) -> None:
        """Makes the last answer part of the conversation, unless the next turn is there and does."""
        if not self.busy:
            self.session.settle()


class Turn(NamedTuple):
    """The session of a request while it is answered: nobody else has it. Ends with `done` or `release`."""

    id: str
    held: Held

    def release(self) -> None:
        """Leaves the session as it was before the request; for one that was not begun."""
        self.held.busy = False

    def done(self, results: Sequence[Result] | None, job: Job) -> None:
        """Ends the turn: it becomes part of the session with the answer's result, and leaves no trace without."""
        if results is None:
            self.held.session.drop()
        else:
            (result,) = results
            if result.call is not None:
                self.held.called[job.call_id(0)] = function_of(result.call).name
            elif result.stop is None and len(result.text) <= BRIEF:
                # After a call or a stop string the engine may still be drawing; the loop does not wait for it.
                asyncio.get_running_loop().call_later(_SENT_SECONDS, self.held.settle)
        self.held.busy = False

    def described(self) -> dict[str, Any]:
        """What every object of the answer says of the session."""
        return {"session": {"id": self.id, "notice": self.held.session.notice}}


class Sessions:
    """The sessions of a server."""

    def __init__(self, *, most: int, seconds: float):
        self._shelf: Shelf[Held] = Shelf("session_", most=most, seconds=seconds, in_use=lambda held: held.busy)

    def add(self, held: Held, *, owner: str) -> Kept:
        kept = self._shelf.add(held, owner=owner)
        if kept is None:
            raise Refusal(
                f"{self._shelf.most} sessions are kept already, as many as there may be (--max-sessions), and no other "
                "API key has more of them that could go; delete one, or wait until one has not been used for "
                f"{self._shelf.seconds:g} seconds",
                status=429,
                code="too_many_sessions",
            )
        return kept

    def find(self, session_id: str, *, owner: str, param: str | None = None) -> Kept:
        kept = self._shelf.find(session_id, owner=owner)
        if kept is None:
            raise Refusal(
                f"there is no session {session_id!r:.100} of this API key: it never was, was deleted, gave way to one "
                f"of a key with fewer ({self._shelf.most} are kept, --max-sessions), was not used for "
                f"{self._shelf.seconds:g} seconds (--session-seconds), or the server was started anew. Begin another "
                "one with POST /v1/sessions",
                param=param,
                status=404,
                code="session_not_found",
            )
        return kept

    def idle(self, session_id: str, *, owner: str, param: str | None = None) -> Held:
        """The session, if nothing of it is answered now."""
        held = self.find(session_id, owner=owner, param=param).value
        if held.busy:
            raise Refusal(
                f"a turn of session {session_id} is answered now; wait for its end, or fork the session before",
                param=param,
                status=409,
                code="session_in_use",
            )
        return held

    def take(self, body: ChatRequest, *, owner: str) -> Turn:
        """The session that a request goes on with, for this request alone. In the event loop's thread."""
        held = self.idle(body.session_id, owner=owner, param="session_id")
        if body.model != held.model:
            raise Refusal(
                f"the session speaks with the model {held.model!r}, given {body.model!r}; give that, or begin another",
                param="model",
            )
        held.busy = True
        return Turn(body.session_id, held)

    def remove(self, session_id: str, *, owner: str) -> None:
        self.idle(session_id, owner=owner)
        self._shelf.remove(session_id)

    def __len__(self) -> int:
        return len(self._shelf)

    def of(self, owner: str) -> list[Kept]:
        return self._shelf.of(owner)


def add_session_routes(
    app: FastAPI, pipeline: Pipeline, sessions: Sessions, *, check_model: Callable[[str], None]
) -> None:
    """Adds the routes. check_model: raises Refusal for a model that is not served."""

    # Coroutines, so that what they do with a session that is kept is done in one thread: that of the event loop.
    @app.post("/v1/sessions")
    async def create(body: SessionRequest, request: Request) -> dict[str, Any]:
        check_model(body.model)
        held = await aside(len(await request.body()), lambda: begun(body), most=BRIEF)  # it is tokenised
        return _described(sessions.add(held, owner=owner_of(request)))

    def begun(body: SessionRequest) -> Held:
        refuse_session(body)
        called: dict[str, str] = {}
        try:
            messages, tools = messages_of(body.messages or (), called), tools_of(body.tools)
            if tools and not pipeline.calls_tools:
                raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
        except ValueError as error:
            raise Refusal(str(error), param="messages") from error
        try:
            session = pipeline.session(messages, max_length=body.max_length, tools=tools)
        except ValueError as error:
            raise Refusal(str(error), param="max_length") from error
        try:  # a session is held though it never has a turn, which would find out
            pipeline.refuse_long(text for message in session.messages for text in message.texts)
        except ContextTooLong as error:
            raise Refusal(str(error), param="messages", code="context_length_exceeded") from error
        for message in session.messages:  # so would text that is none, or when it is shown
            try:
                for text in message.texts:
                    pipeline.tokenizer.encode(text)
            except ValueError as error:
                is_told = tools and message.name in MARKER_OF
                raise Refusal(str(error), param="tools" if is_told else "messages") from error
        return Held(session, body.model, body.tools or (), called)

    @app.get("/v1/sessions")
    async def listed(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [_described(kept) for kept in sessions.of(owner_of(request))]}

    @app.get("/v1/sessions/{session_id}")
    async def one(session_id: str, request: Request) -> dict[str, Any]:
        kept = sessions.find(session_id, owner=owner_of(request))
        return _described(kept) | {"messages": to_openai(kept.value.session.messages)}

    @app.post("/v1/sessions/{session_id}/fork")
    async def fork(session_id: str, request: Request) -> dict[str, Any]:
        owner = owner_of(request)
        held = sessions.idle(session_id, owner=owner)
        held.busy = True
        try:  # in a thread, because it may wait until the engine has let go of an answer that was left
            session = await asyncio.to_thread(held.session.fork)
        finally:
            held.busy = False
        other = Held(session, held.model, held.tools, held.called)
        return _described(sessions.add(other, owner=owner))

    @app.delete("/v1/sessions/{session_id}")
    async def delete(session_id: str, request: Request) -> dict[str, Any]:
        sessions.remove(session_id, owner=owner_of(request))
        return {"id": session_id, "object": "session.deleted", "deleted": True}


def _described(kept: Kept) -> dict[str, Any]:
    held, session = kept.value, kept.value.session
    return {
        "id": kept.id,
        "object": "session",
        "created": held.created,
        "expires_at": kept.expires_at,
        "model": held.model,
        "max_length": session.max_length,
        "num_tokens": session.num_tokens,
        "in_use": held.busy,
        "notice": session.notice,
    }
