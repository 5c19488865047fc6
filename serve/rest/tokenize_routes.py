"""Text to token ids and back, as the server reads it: vLLM's POST /tokenize and /detokenize, and GET /tokenizer_info.

The ids of a prompt are those that /v1/completions reads, the ids of a conversation those that /v1/chat/completions
reads. No engine is asked. What no context can hold is refused before it is read: a text of too many characters, as it
is for an answer, and more ids than a context has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Field

from serve.operation.refusal import Refusal
from serve.pipeline import ContextTooLong, Pipeline
from serve.rest.protocol import Refused, messages_of, refuse, refuse_fields, tools_of
from serve.rest.requests import ChatMessage, ChatRequest, DeclaredTool, Fields


class TokenizeRequest(Fields):
    """A text or a conversation. What cannot be honoured has the type Any."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[DeclaredTool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    continue_final_message: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    mm_processor_kwargs: Any = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


REFUSED_OF_TOKENIZE = {
    "continue_final_message": Refused("a turn is not gone on with; leave it out, or give false", (False,)),
    "chat_template": Refused("the model's own is used; leave it out"),
    "chat_template_kwargs": Refused("the template takes none; leave them out", ({},)),
    "mm_processor_kwargs": Refused("messages are text; leave them out", ({},)),
}
TOO_LONG = "context_length_exceeded"
_OF_PROMPTS, _OF_CHATS = ("add_special_tokens",), ("tools", "add_generation_prompt")


def add_tokenize_routes(app: FastAPI, pipeline: Pipeline, *, check_model: Callable[[str], None]) -> None:
    """Adds the three routes. check_model: raises Refusal for a model that is not served."""
    tokenizer = pipeline.tokenizer

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            check_model(body.model)
        _refuse(body)
        ids = _ids_of_prompt(body, pipeline) if body.messages is None else _ids_of_chat(body, pipeline)
        texts = [tokenizer.token(token_id) or "" for token_id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": pipeline.max_context, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        if body.model is not None:
            check_model(body.model)
        if len(body.tokens) > pipeline.max_context:
            raise Refusal(
                f"{len(body.tokens)} ids are given; the context holds {pipeline.max_context}. Send them in parts",
                param="tokens",
                code=TOO_LONG,
            )
        for index, token_id in enumerate(body.tokens):
            if token_id >= tokenizer.vocab_size:
                message = f"token id {token_id} does not exist; ids are 0..{tokenizer.vocab_size - 1}"
                raise Refusal(message, param=f"tokens[{index}]")
        return {"prompt": tokenizer.decode(body.tokens, skip_special=False)}

    @app.get("/tokenizer_info")
    def tokenizer_info() -> dict[str, Any]:
        def token(token_id: int | None) -> str | None:
            return None if token_id is None else tokenizer.token(token_id)

        return {
            "tokenizer_class": tokenizer.config.get("tokenizer_class", "PreTrainedTokenizerFast"),
            "chat_template": tokenizer.chat_template,
            "vocab_size": tokenizer.vocab_size,
            "bos_token": token(tokenizer.bos_id),
            "eos_token": token(tokenizer.eos_id),
            "pad_token": token(tokenizer.pad_id),
            "special_tokens": dict(tokenizer.special),
            "model_max_length": pipeline.max_context,
            "fingerprint": tokenizer.fingerprint,
        }


def _refuse(body: TokenizeRequest) -> None:
    if (body.prompt is None) == (body.messages is None):
        given = "neither prompt nor messages is" if body.prompt is None else "prompt and messages are both"
        raise Refusal(f"{given} given; give one of them", param="prompt")
    refuse_fields(body, REFUSED_OF_TOKENIZE)
    for name in _OF_CHATS if body.messages is None else ():
        if getattr(body, name) is not None:
            raise Refusal(f"{name} is for messages; leave it out", param=name)
    if body.messages is not None and body.add_special_tokens:
        raise Refusal(
            "add_special_tokens is for a prompt: a conversation has its special tokens already", param=_OF_PROMPTS[0]
        )


def _ids_of_prompt(body: TokenizeRequest, pipeline: Pipeline) -> list[int]:
    try:
        ids = pipeline.prompt_ids(body.prompt)
        return ids[1:] if body.add_special_tokens is False else ids
    except ContextTooLong as error:
        raise Refusal(str(error), param="prompt", code=TOO_LONG) from error
    except ValueError as error:  # a lone surrogate
        raise Refusal(str(error), param="prompt") from error


def _ids_of_chat(body: TokenizeRequest, pipeline: Pipeline) -> list[int]:
    # What is refused of a conversation in a chat is refused here.
    chat = ChatRequest.model_construct(model="", messages=body.messages, tools=body.tools)
    refuse(chat)
    try:
        turns, tools = messages_of(body.messages, {}), tools_of(body.tools)
    except ValueError as error:
        raise Refusal(str(error), param="messages") from error
    if tools and not pipeline.calls_tools:
        raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
    generation = body.add_generation_prompt is not False
    try:
        return pipeline.chat_ids(turns, tools=tools, add_generation_prompt=generation)
    except ContextTooLong as error:
        raise Refusal(str(error), param="messages", code=TOO_LONG) from error
    except ValueError as error:
        raise Refusal(str(error), param="messages") from error
