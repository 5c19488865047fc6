"""What stands before the routes: OpenAI's error envelope for every failure, a limit for bodies, the API key."""

from __future__ import annotations

import hmac
import json

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from serve.protocol import Refusal, envelope

MAX_BODY_BYTES = 16 << 20


def add_guards(app: FastAPI, *, api_key: str | None = None) -> None:
    """Gives the application its error envelopes and its guards. With `api_key`, everything under /v1 needs it."""
    _add_error_envelopes(app)
    app.add_middleware(_LimitBody)
    if api_key is not None:
        app.add_middleware(_RequireKey, key=api_key)


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
