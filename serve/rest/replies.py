"""What the server sends, as classes for its description; a field without a default is always there. Nothing is checked
against them while it runs: the tests ask the server and compare."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from serve.rest.requests import Fields

ListOf = Literal["list"]
Finish = Literal["stop", "length", "tool_calls"]
NOT_SENT: Any = None
"""Default of a field that is left out of some replies, and never null."""


class ErrorTold(Fields):
    message: Annotated[str, Field(min_length=1)]
    type: Literal["invalid_request_error", "authentication_error", "not_found_error", "server_error"]
    param: str | None
    """The field of the request at fault."""
    code: str | None


class Error(Fields):
    """Of every failure."""

    error: ErrorTold


class Fault(Fields):
    fault: str | None


class HealthTold(Fields):
    status: str
    model: str
    fault: str | None
    replicas: list[Fault] = NOT_SENT


class ModelCard(Fields):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str = NOT_SENT
    """The model of an adapter."""


class ModelList(Fields):
    object: ListOf
    data: list[ModelCard]


class CachedTokens(Fields):
    cached_tokens: int


class Usage(Fields):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PromptUsage(Fields):
    prompt_tokens: int
    total_tokens: int


class CompletionLogprobs(Fields):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Fields):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish


class Completion(Fields):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPart(Fields):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class CompletionChunk(Fields):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPart]
    usage: Usage | None = NOT_SENT


class TopLogprob(Fields):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Fields):
    content: list[TokenLogprob]
    refusal: None


class CallMade(Fields):
    name: str
    arguments: str


class ToolCalled(Fields):
    id: str
    type: Literal["function"]
    function: CallMade


class AssistantMessage(Fields):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCalled] = NOT_SENT


class ChatChoice(Fields):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class SessionGoneOn(Fields):
    id: str
    notice: str | None


class ChatCompletion(Fields):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    session: SessionGoneOn = NOT_SENT


class CallPiece(Fields):
    name: str = NOT_SENT
    arguments: str


class CallDelta(Fields):
    index: int
    id: str = NOT_SENT
    type: Literal["function"] = NOT_SENT
    function: CallPiece


class AssistantDelta(Fields):
    role: Literal["assistant"] = NOT_SENT
    content: str = NOT_SENT
    tool_calls: list[CallDelta] = NOT_SENT


class ChatPart(Fields):
    index: int
    delta: AssistantDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Fields):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPart]
    usage: Usage | None = NOT_SENT
    session: SessionGoneOn = NOT_SENT


class SessionTold(Fields):
    id: str
    object: Literal["session"]
    created: int
    expires_at: int | float
    model: str
    max_length: int
    num_tokens: int
    in_use: bool
    notice: str | None


class SessionShown(SessionTold):
    messages: list[dict[str, Any]]


class SessionList(Fields):
    object: ListOf
    data: list[SessionTold]


class SessionDeleted(Fields):
    id: str
    object: Literal["session.deleted"]
    deleted: Literal[True]


class Reason(Fields):
    reason: Literal["max_output_tokens"]


class OutputText(Fields):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Fields):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText]


class OutputCall(Fields):
    id: str
    type: Literal["function_call"]
    call_id: str
    status: Literal["completed"]
    name: str
    arguments: str


class InputDetails(Fields):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Fields):
    reasoning_tokens: int


class ResponseUsage(Fields):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseTold(Fields):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: Reason | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, None]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage
    user: str | None


class ResponseEvent(BaseModel):
    """One of OpenAI's typed events, numbered."""

    type: Annotated[str, Field(pattern=r"^response\.[a-z_.]+$")]
    sequence_number: Annotated[int, Field(ge=0)]


class ResponseDeleted(Fields):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class EmbeddingTold(Fields):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """In base64 float32, little-endian."""


class EmbeddingList(Fields):
    object: ListOf
    model: str
    data: list[EmbeddingTold]
    usage: PromptUsage


class ScoreTold(Fields):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(Fields):
    object: ListOf
    model: str
    data: list[ScoreTold]
    usage: PromptUsage


class Tokens(Fields):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(Fields):
    prompt: str


class TokenizerTold(Fields):
    tokenizer_class: str
    chat_template: str | None
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    special_tokens: dict[str, int]
    model_max_length: int
    fingerprint: str
