"""/openapi.json says what is really sent: replies and streams, errors in their one form, what a field is refused for.

FastAPI describes requests by their classes; `describe` adds to that what it cannot know. A route that stands in no
table here is an error of `openapi()`: nothing is served and not described.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.rest import replies
from serve.rest.conformance import ROUTES
from serve.rest.replies import Error

_REF = "#/components/schemas/{model}"
_EVENTS = "Server-sent events, where `stream` is true; here one of them"


class Reply(NamedTuple):
    """What a route answers."""

    sent: type[BaseModel] | None
    """None: plain text."""
    errors: tuple[int, ...] = ()
    """Statuses of its own; those of all routes that take a body are added."""
    chunk: type[BaseModel] | None = None
    """What the events of a stream hold, where one can be asked for."""
    links: Mapping[str, str] = {}
    """Operations that take the id in the reply, and their parameter's name."""
    goes_on: tuple[str, str] | None = None
    """The operation whose body takes it, and the field's name."""


_SESSIONS = dict.fromkeys(("show_session", "fork_session", "delete_session"), "session_id")
_RESPONSES = dict.fromkeys(("show_response", "delete_response"), "response_id")
_NEXT_TURN, _NEXT_RESPONSE = ("chat", "session_id"), ("respond", "previous_response_id")
_NO_MODEL, _IN_USE = (404,), (404, 409)
REPLIES: dict[tuple[str, str], tuple[str, Reply]] = {
    ("get", "/health"): ("health", Reply(replies.HealthTold)),
    ("get", "/ready"): ("ready", Reply(replies.HealthTold)),
    ("get", "/live"): ("live", Reply(replies.HealthTold)),
    ("get", "/v1/models"): ("list_models", Reply(replies.ModelList)),
    ("get", "/v1/models/{name}"): ("show_model", Reply(replies.ModelCard, _NO_MODEL)),
    ("post", "/v1/completions"): ("complete", Reply(replies.Completion, _NO_MODEL, chunk=replies.CompletionChunk)),
    ("post", "/v1/chat/completions"): ("chat", Reply(replies.ChatCompletion, _IN_USE, chunk=replies.ChatChunk)),
    ("post", "/v1/responses"): (
        "respond",
        Reply(replies.ResponseTold, _NO_MODEL, chunk=replies.ResponseEvent, links=_RESPONSES, goes_on=_NEXT_RESPONSE),
    ),
    ("get", "/v1/responses/{response_id}"): ("show_response", Reply(replies.ResponseTold, (400, 404))),
    ("delete", "/v1/responses/{response_id}"): ("delete_response", Reply(replies.ResponseDeleted, (404, 429, 503))),
    ("post", "/v1/sessions"): (
        "begin_session",
        Reply(replies.SessionTold, _NO_MODEL, links=_SESSIONS, goes_on=_NEXT_TURN),
    ),
    ("get", "/v1/sessions"): ("list_sessions", Reply(replies.SessionList)),
    ("get", "/v1/sessions/{session_id}"): ("show_session", Reply(replies.SessionShown, _NO_MODEL)),
    ("post", "/v1/sessions/{session_id}/fork"): (
        "fork_session",
        Reply(replies.SessionTold, _IN_USE, links=_SESSIONS, goes_on=_NEXT_TURN),
    ),
    ("delete", "/v1/sessions/{session_id}"): ("delete_session", Reply(replies.SessionDeleted, (404, 409, 429, 503))),
    ("post", "/v1/embeddings"): ("embed", Reply(replies.EmbeddingList, _NO_MODEL)),
    ("post", "/v1/score"): ("score", Reply(replies.ScoreList, _NO_MODEL)),
    ("post", "/v1/load_lora_adapter"): ("load_adapter", Reply(None, _NO_MODEL)),
    ("post", "/v1/unload_lora_adapter"): ("unload_adapter", Reply(None, _IN_USE)),
    ("post", "/tokenize"): ("tokenize", Reply(replies.Tokens, _NO_MODEL)),
    ("post", "/detokenize"): ("detokenize", Reply(replies.Detokenized, _NO_MODEL)),
    ("get", "/tokenizer_info"): ("tokenizer_info", Reply(replies.TokenizerTold)),
}
"""Name of the operation, and what it answers."""
_OF_HEALTH = {"/health", "/ready", "/live"}
_OF_BODIES = (400, 408, 413, 429, 500, 503)
_ERRORS = {
    400: "A field is not as it should be, or cannot be honoured: `param` names it",
    401: "The key is missing or wrong",
    404: "There is no such thing here",
    408: "The body came in too slowly",
    409: "It is in use",
    413: "The body is too large",
    429: "Too much is asked for at once",
    431: "Path and headers are too long",
    500: "The answer failed",
    503: "Nothing is answered now",
}


_ADD = {
    "name": "add",
    "description": "Adds two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
_ASKED = [{"role": "user", "content": "What is 1 + 2?"}]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": _ASKED, "max_tokens": 16, "seed": 0},
        {"messages": _ASKED, "max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": _ASKED, "max_tokens": 16, "tools": [{"type": "function", "function": _ADD}]},
        {"messages": _ASKED, "max_tokens": 16, "logprobs": True, "top_logprobs": 2},
        {"messages": _ASKED, "max_tokens": 16, "response_format": {"type": "json_object"}},
    ],
    "/v1/completions": [
        {"prompt": "def gcd(", "max_tokens": 8, "n": 2},
        {"prompt": ["def gcd(", "import "], "max_tokens": 8, "stream": True},
        {"prompt": "Is 7 prime? ", "structured_outputs": {"choice": ["yes", "no"]}},
        {"prompt": [1, 5, 6], "max_tokens": 0, "echo": True, "logprobs": 1},
    ],
    "/v1/responses": [
        {"input": "What is 1 + 2?", "instructions": "Be brief.", "max_output_tokens": 16},
        {"input": _ASKED, "max_output_tokens": 16, "stream": True, "tools": [{"type": "function"} | _ADD]},
    ],
    "/v1/sessions": [{"messages": [{"role": "system", "content": "Be brief."}], "max_length": 256}],
    "/v1/embeddings": [{"input": ["one text", "another"]}],
    "/tokenize": [{"prompt": "def gcd("}, {"messages": _ASKED, "return_token_strs": True}],
    "/detokenize": [{"tokens": [5, 6, 7]}],
    "/v1/score": [{"pairs": [{"prompt": "What is 1 + 2?", "answer": "3"}]}],
}
"""Bodies that are taken, but for their `model`."""


def describe(app: FastAPI, *, has_key: bool, served: Callable[[], list[str]]) -> None:
    """Makes `app.openapi()`, which is /openapi.json, say it all. served: names of the models that there are now."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        names = tuple(served())
        if names not in found:
            found.clear()
            app.openapi_schema = None
            found[names] = _complete(plain(), has_key=has_key, served=names)
        return found[names]

    app.openapi = openapi


def _complete(document: dict[str, Any], *, has_key: bool, served: tuple[str, ...]) -> dict[str, Any]:
    sent = {Error, *(each for _, reply in REPLIES.values() for each in (reply.sent, reply.chunk) if each)}
    in_order = sorted(sent, key=lambda each: each.__name__)
    _, definitions = models_json_schema([(each, "validation") for each in in_order], ref_template=_REF)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    clash = schemas.keys() & definitions["$defs"].keys()
    assert not clash, f"{clash} name requests and replies"
    for route, parts in ROUTES.items():
        for part in parts:
            _refuse(schemas.get(part.fields.__name__, {}).get("properties", {}), part)
        body = schemas.get(parts[0].fields.__name__)
        if body and "model" in body["properties"]:
            named = [*served] if parts[0].fields.model_fields["model"].is_required() else [*served, None]
            body["properties"]["model"] = {"enum": named}
            body["examples"] = [{"model": served[0]} | example for example in EXAMPLES.get(route, ())]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            name, reply = REPLIES[method, path]
            operation["operationId"] = name
            if path == "/v1/models/{name}":
                operation["parameters"][0]["examples"] = {model: {"value": model} for model in served}
            operation["responses"] = _responses(reply, path=path, takes_body=method == "post", has_key=has_key)
            if has_key and path not in _OF_HEALTH:
                operation["security"] = [{"key": []}]
    schemas |= {name: _without_defaults(schema) for name, schema in definitions["$defs"].items()}
    _whole_bounds(schemas)
    if has_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _refuse(properties: dict[str, Any], part) -> None:
    """Of a field that is refused, only the values that ask for nothing are taken."""
    for name, (why, neutral) in part.refused.items():
        field = part.fields.model_fields[name].alias or name
        if field in properties:
            properties[field] = {"description": f"Refused: {why}", "enum": [*neutral, None]}


def _responses(reply: Reply, *, path: str, takes_body: bool, has_key: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if reply.sent is not None:
        content = {"application/json": {"schema": {"$ref": _REF.format(model=reply.sent.__name__)}}}
    if reply.chunk is not None:
        content["text/event-stream"] = {"schema": _event(reply.chunk)}
    links = {
        operation: {"operationId": operation, "parameters": {name: "$response.body#/id"}}
        for operation, name in reply.links.items()
    }
    if reply.goes_on is not None:
        operation, name = reply.goes_on
        links[operation] = {"operationId": operation, "requestBody": {name: "$response.body#/id"}}
    success = {"description": "What was asked for", "content": content} | ({"links": links} if links else {})
    if path in _OF_HEALTH:
        return {"200": success, "503": success | {"description": "The same, of a server that is not well"}}
    statuses = {*reply.errors, 431, *(_OF_BODIES if takes_body else ()), *((401,) if has_key else ())}
    error = {"application/json": {"schema": {"$ref": _REF.format(model=Error.__name__)}}}
    told = {str(status): {"description": _ERRORS[status], "content": error} for status in sorted(statuses)}
    return {"200": success} | told


def _event(chunk: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream: a chunk, an error where the answer broke off, or the end."""
    kinds = [{"$ref": _REF.format(model=each.__name__)} for each in (chunk, Error)]
    held = {"contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"type": "string", "if": {"const": "[DONE]"}, "else": held}
    return {"type": "object", "description": _EVENTS, "properties": {"data": data}, "required": ["data"]}


def _whole_bounds(schema: Any) -> None:
    """Bounds of integers as integers: as 9.2e18 those of 64 bits are others to some readers."""
    if isinstance(schema, list):
        for each in schema:
            _whole_bounds(each)
    elif isinstance(schema, dict):
        for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if schema.get("type") == "integer" and name in schema:
                schema[name] = int(schema[name])
        for each in schema.values():
            _whole_bounds(each)


def _without_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that may be left out has no default: it is not sent."""
    for each in schema.get("properties", {}).values():
        each.pop("default", None)
    return schema
