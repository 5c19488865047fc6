"""OpenAI's requests as checked values: every field that it documents, and those beyond it, with its type and range.

What cannot be honoured has the type Any here; `protocol.py` refuses it by name. Fields that stand in no class are
unknown, and refused by the check itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema


class Fields(BaseModel):
    """Checked without conversions; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Refused(NamedTuple):
    """Why a documented field is refused, unless its value is one that asks for nothing."""

    why: str
    neutral: tuple = ()


class TextPart(Fields):
    """A part of a message's content, as `_as_text` checks it."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = None


REFUSED_OF_PARTS = {"prompt_cache_breakpoint": Refused("there is no prompt cache to steer")}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""

    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and all(type(token_id) is int for token_id in item)

    if isinstance(value, str) or (is_ids(value) and value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(p, str) for p in value) or all(is_ids(p) for p in value)):
        return value
    raise ValueError(
        "give a string, a list of strings, a list of token ids, or a list of lists of token ids, not empty"
    )


def _as_text(value: Any) -> str | None:
    """The text of a message's content: a string, null, or text parts."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise ValueError(f"a content part of type {kind!r} cannot be read; only text parts can")
            for name, refused in REFUSED_OF_PARTS.items():
                if part.get(name) is not None:
                    raise ValueError(f"{name} of a part is refused: {refused.why}")
            if {*part} - {*REFUSED_OF_PARTS} != {"type", "text"} or not isinstance(part["text"], str):
                raise ValueError('a text part is {"type": "text", "text": "..."} and nothing else')
        return "".join(part["text"] for part in value)
    raise ValueError("give a string or a list of text parts")


_TEXT = {"type": "string", "minLength": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31}, "minItems": 1}
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]] | None,
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}, {"type": "null"}]}),
]
Prompts = Annotated[
    Any,
    BeforeValidator(_as_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}}
    | dict.fromkeys(REFUSED_OF_PARTS, {"enum": [None]}),
    "required": ["type", "text"],
    "additionalProperties": False,
}
Content = Annotated[
    Any,
    BeforeValidator(_as_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}),
]
ToolChoice = Annotated[
    Any,  # checked by `serve.rest.protocol`, which can say what of it is refused
    WithJsonSchema(
        {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]},
    ),
]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]
Words = list[Annotated[str, Field(min_length=1)]]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(json_schema_extra={"additionalProperties": False}),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
ShortText = Annotated[str, Field(max_length=512)]
"""What is logged, or kept beside a conversation, and no part of what the context bounds."""


class StreamOptions(Fields):
    include_usage: bool | None = None
    include_obfuscation: Any = None


class NamedSchema(Fields):
    name: ToolName
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(Fields):
    """What the answer is to follow, one of them; as vLLM has it."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class Asking(Fields):
    """A request for answers, of any kind."""

    model: str
    stream: bool | None = None
    user: ShortText | None = None


class Sampled(Asking):
    """What requests for answers share. From `top_k` on it is not OpenAI's; its clients send it as `extra_body`."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    bad_words: Words | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionRequest(Sampled):
    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    best_of: int | None = None
    suffix: Any = None


class FunctionCall(Fields):
    name: str
    arguments: str


class CalledTool(Fields):
    id: ShortText | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: ShortText | None = None
    refusal: Any = None
    audio: Any = None
    function_call: Any = None
    annotations: Any = None


class Function(Fields):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class DeclaredTool(Fields):
    type: Literal["function"]
    function: Function


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    tools: list[DeclaredTool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    safety_identifier: ShortText | None = None
    response_format: ResponseFormat | None = None
    modalities: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    metadata: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    session_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Not OpenAI's: of a session whose new turn `messages` are."""


class SessionRequest(Fields):
    """Not OpenAI's: a conversation that the server is to hold."""

    model: str
    messages: list[ChatMessage] | None = None
    tools: list[DeclaredTool] | None = None
    max_length: Count | None = None


AdapterName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class LoadAdapterRequest(Fields):
    """vLLM's: the adapter of a folder becomes a model of this name."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1)]
    load_inplace: Any = None
    is_3d_lora_weight: Any = None


class UnloadAdapterRequest(Fields):
    """vLLM's."""

    lora_name: str
    lora_int_id: Any = None
