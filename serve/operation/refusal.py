"""A request that is answered with an error, and how OpenAI's interface says it."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is answered with an error. `param` is the field at fault."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        """"invalid_value", "unknown_parameter" and "unsupported_value": the field `param` alone is at fault, and the
        description (/openapi.json) says so."""


def envelope(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error body. A message that quotes much of the request is cut."""
    message = message if len(message) <= 2_000 else f"{message[:2_000]} ..."
    kind = {401: "authentication_error", 404: "not_found_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
