"""Large bodies, whose reading takes long: it is done in a thread, so that the event loop goes on with all streams.

Measured on 8 MiB: a chat of 140,000 messages held up the loop for 1.1 s. What no thread helps with is the decoder of
JSON, which is one call: up to 0.1 s there.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

LARGE_BYTES = 256 << 10
"""From here on: to read so much takes some milliseconds, about as long as a thread to get its turn."""

Value = TypeVar("Value")


async def aside(num_bytes: int, work: Callable[[], Value], *, most: int = LARGE_BYTES) -> Value:
    """What `work` makes of so many bytes; in a thread if they are more than `most`."""
    return await asyncio.to_thread(work) if num_bytes > most else work()


class BodyRoute(APIRoute):
    """A route whose body, where it is large, is decoded and checked in a thread. Errors are those of other bodies."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def read_first(request: Request) -> Response:
            if self.body_field is not None and "json" in request.headers.get("content-type", ""):
                body = await request.body()
                if len(body) > LARGE_BYTES:
                    model = self.body_field.field_info.annotation
                    request = _Read(request, body, await asyncio.to_thread(_checked, model, body))
            return await handle(request)

        return read_first


class _Read(Request):
    """A request whose body is read: FastAPI takes what is checked as it is."""

    def __init__(self, request: Request, body: bytes, value: BaseModel):
        super().__init__(request.scope, request.receive)
        self._given, self._value = body, value

    async def body(self) -> bytes:
        return self._given

    async def json(self) -> BaseModel:
        return self._value


def _checked(model: type[BaseModel], body: bytes) -> BaseModel:
    """The body as the model's. Raises RequestValidationError as FastAPI does."""
    try:
        return model.model_validate(json.loads(body), from_attributes=True)  # as FastAPI has it
    except json.JSONDecodeError as error:
        place = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {}}
        raise RequestValidationError([place | {"ctx": {"error": error.msg}}]) from error
    except ValidationError as error:
        errors = error.errors(include_url=False)
        raise RequestValidationError([each | {"loc": ("body", *each["loc"])} for each in errors]) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "There was an error parsing the body") from error
