"""A model behind any OpenAI-compatible server, as agents and judges take one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from internjax.text.message import Chat, Message, from_openai, to_openai


def api_address(url: str) -> str:
    """A server's address as OpenAI's client wants it, given with or without /v1."""
    base = url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"


def remote_chat(url: str, model: str, *, api_key: str = "none", timeout: float = 600.0) -> Chat:
    """chat(messages, *, tools, stop, sampling) -> Message, asked over HTTP. `url` is the server's, with or without /v1.

    `sampling` holds fields of the request (temperature, max_tokens, seed, ...).
    """
    import openai

    client = openai.OpenAI(base_url=api_address(url), api_key=api_key, timeout=timeout)

    def chat(
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping] = (),
        stop: Sequence[str] = (),
        sampling: Mapping[str, Any] | None = None,
    ) -> Message:
        fields: dict[str, Any] = dict(sampling or {})
        if tools:
            fields["tools"] = [{"type": "function", "function": dict(tool)} for tool in tools]
        if stop:
            fields["stop"] = list(stop)
        reply = client.chat.completions.create(model=model, messages=_turns(messages), extra_body=fields)
        message = reply.choices[0].message.model_dump()
        return _readable({key: message.get(key) for key in ("role", "content", "tool_calls")})

    return chat


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI's turns, with the ids that tie a tool's result to its call."""
    turns = to_openai(messages)
    last = None
    for index, turn in enumerate(turns):
        if "tool_calls" in turn:
            last = f"call_{index}"
            turn["tool_calls"] = [turn["tool_calls"][0] | {"id": last}]
        elif turn["role"] == "tool" and last is not None:
            turn["tool_call_id"] = last
            turn.pop("name", None)
    return turns


def _readable(turn: dict[str, Any]) -> Message:
    """The assistant's message. A call whose arguments are not JSON stays text: nobody can run it."""
    try:
        (message,) = from_openai([turn])
    except ValueError:
        calls = json.dumps(turn.pop("tool_calls"), ensure_ascii=False)
        (message,) = from_openai([turn | {"content": f"{turn['content'] or ''}{calls}"}])
    return message
