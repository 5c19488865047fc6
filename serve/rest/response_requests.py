"""Requests of OpenAI's Responses interface as checked values, and what their items mean as messages of a chat."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WithJsonSchema

from serve.answering.params import Params
from serve.guided import AnyJSON, GuideError, GuideSpec, JSONSchema
from serve.operation.refusal import Refusal
from serve.rest.protocol import refuse_fields
from serve.rest.replies import TokenLogprob
from serve.rest.requests import (
    Asking,
    CalledTool,
    ChatMessage,
    Count,
    DeclaredTool,
    Fields,
    Function,
    FunctionCall,
    Refused,
    ShortText,
    Temperature,
    ToolChoice,
    ToolName,
)

TEXT_LOGPROBS = "message.output_text.logprobs"

Items = Annotated[
    Any,  # read by `messages_of_items`, which can say what of an item is refused
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
]


class TextFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    name: ToolName | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Fields):
    format: TextFormat | None = None
    verbosity: Any = None


class ResponseTool(Fields):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: Any = None
    defer_loading: Any = None
    output_schema: Any = None
    async_: Annotated[Any, Field(alias="async")] = None


class ResponseStreamOptions(Fields):
    include_obfuscation: Any = None


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ResponseQuery(Fields):
    """What a client may ask for with a response that is kept."""

    include: Any = None
    include_obfuscation: Any = None
    starting_after: Any = None
    stream: Any = None


class ResponseRequest(Asking):
    input: Items
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    text: TextConfig | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    previous_response_id: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    metadata: Metadata | None = None
    safety_identifier: ShortText | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """Not OpenAI's, nor is it refused elsewhere: chats have it."""
    access_programs: Any = None
    background: Any = None
    background_options: Any = None
    context_management: Any = None
    conversation: Any = None
    image: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    prompt: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning: Any = None
    service_tier: Any = None
    truncation: Any = None


REFUSED_OF_RESPONSES = {
    "access_programs": Refused("the server runs no programs"),
    "background": Refused("an answer is made while its client waits", (False,)),
    "background_options": Refused("an answer is made while its client waits"),
    "context_management": Refused("what is too long is refused, not shortened", ([],)),
    "conversation": Refused("use previous_response_id, or a session of /v1/chat/completions"),
    "image": Refused("answers are text"),
    "max_tool_calls": Refused("an answer holds one call, and the client runs it"),
    "moderation": Refused("there is no moderation model"),
    "prompt": Refused("no prompts are stored; send the input"),
    "prompt_cache_key": Refused("there is no prompt cache to steer"),
    "prompt_cache_options": Refused("there is no prompt cache to steer", ({},)),
    "prompt_cache_retention": Refused("there is no prompt cache to steer"),
    "reasoning": Refused("the model has one way to think", ({}, {"effort": "none"})),
    "service_tier": Refused("there is one tier", ("auto", "default")),
    "truncation": Refused("what is too long is refused, not shortened", ("disabled",)),
}
REFUSED_OF_TEXTS = {"verbosity": Refused("ask for the length in the conversation", ("medium",))}
REFUSED_OF_RESPONSE_TOOLS = {
    "allowed_callers": Refused("the model alone calls", (["direct"],)),
    "async_": Refused("the client runs a call and sends its output in the next request", (False,)),
    "defer_loading": Refused("the model is told of all tools at once", (False,)),
    "output_schema": Refused("say in the description what the function gives back"),
}
_AS_IT_WAS = "a response that is kept is shown whole, as it was"
REFUSED_OF_QUERIES = {
    "include": Refused(_AS_IT_WAS),
    "include_obfuscation": Refused(_AS_IT_WAS, ("false",)),
    "starting_after": Refused(_AS_IT_WAS),
    "stream": Refused(_AS_IT_WAS, ("false",)),
}
REFUSED_OF_RESPONSE_STREAMS = {"include_obfuscation": Refused("events are sent as they are", (False,))}


_GIVEN_BACK = ("tools", "text", "tool_choice", "instructions", "metadata", "user", "safety_identifier")


def refuse_response(request: ResponseRequest) -> None:
    """Raises Refusal for what is asked for and cannot be given."""
    refuse_fields(request, REFUSED_OF_RESPONSES)
    if request.text is not None:
        refuse_fields(request.text, REFUSED_OF_TEXTS, "text.")
    for index, tool in enumerate(request.tools or ()):
        refuse_fields(tool, REFUSED_OF_RESPONSE_TOOLS, f"tools[{index}].")
    if request.stream_options is not None:
        if not request.stream:
            raise Refusal(
                "stream_options are for streams; set stream to true, or leave them out", param="stream_options"
            )
        refuse_fields(request.stream_options, REFUSED_OF_RESPONSE_STREAMS, "stream_options.")
    unknown = [each for each in request.include or () if each != TEXT_LOGPROBS]
    if unknown:
        raise Refusal(f"include knows {TEXT_LOGPROBS!r} alone, given {unknown[0]!r:.100}", param="include")
    for name in _GIVEN_BACK:
        try:
            json.dumps(request.model_dump(include={name}), allow_nan=False, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise Refusal(f"{name} holds what cannot be sent as JSON: {error}", param=name) from error
    if request.top_logprobs and not request.include:
        raise Refusal(f"top_logprobs needs include to hold {TEXT_LOGPROBS!r}", param="top_logprobs")
    if not request.tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(request, name) not in (None, "none", "auto" if name == "tool_choice" else True):
                raise Refusal(f"{name} is given without tools; give tools, or leave it out", param=name)
    elif request.tool_choice != "none" and guide_of_text(request) is not None:
        raise Refusal("a guided answer holds no calls; leave out text.format, or tools", param="text.format")


def guide_of_text(request: ResponseRequest) -> GuideSpec | None:
    """What the text of an answer is to follow. A schema is strict only where it says so."""
    wanted = None if request.text is None else request.text.format
    if wanted is None:
        return None
    for name in () if wanted.type == "json_schema" else ("name", "description", "schema_", "strict"):
        if getattr(wanted, name) is not None:
            name = TextFormat.model_fields[name].alias or name
            raise Refusal(f"{name} is for the type json_schema; leave it out", param=f"text.format.{name}")
    if wanted.type != "json_schema":
        return AnyJSON() if wanted.type == "json_object" else None
    if wanted.name is None or wanted.schema_ is None:
        missing = "name" if wanted.name is None else "schema"
        raise Refusal(f"the type json_schema needs a {missing}", param=f"text.format.{missing}")
    return JSONSchema(wanted.schema_, strict=bool(wanted.strict))


def params_of_response(request: ResponseRequest) -> Params:
    """How the answer is generated."""
    given = {name: getattr(request, name) for name in ("temperature", "top_p")}
    try:
        return Params(
            max_tokens=request.max_output_tokens,
            seed=None if request.seed is None else request.seed % 2**32,
            logprobs=(request.top_logprobs or 0) if request.include else None,
            guide=guide_of_text(request),
            **{name: value for name, value in given.items() if value is not None},
        )
    except GuideError as error:
        raise Refusal(str(error), param="text.format") from error


def declared_of(request: ResponseRequest) -> list[DeclaredTool]:
    """The tools as chats declare them; none where none may be called."""
    tools = () if request.tool_choice == "none" else request.tools or ()
    names = ("name", "description", "parameters", "strict")
    return [
        DeclaredTool(type="function", function=Function(**{name: getattr(tool, name) for name in names}))
        for tool in tools
    ]


def chat_choice_of(choice: Any) -> Any:
    """The tool_choice in the form of chats: {"type": "function", "name": ...} has its name further in."""
    match choice:
        case {"type": "function", "name": name, **more} if not more:
            return {"type": "function", "function": {"name": name}}
        case {"type": str(kind)} if kind not in ("function", "allowed_tools", "custom"):
            raise Refusal(f"the tool_choice {kind!r:.100} is refused: tools are functions", param="tool_choice")
    return choice


# Items.


ItemId = Annotated[str, Field(pattern="^(msg|fc|fco)_[0-9a-zA-Z]{1,128}$")]


class InputText(Fields):
    type: Literal["input_text", "output_text", "text"]
    text: str
    logprobs: list[TokenLogprob] | None = None
    annotations: Any = None
    prompt_cache_breakpoint: Any = None


class MessageItem(Fields):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText]
    id: ItemId | None = None
    status: Literal["completed", "incomplete"] | None = None
    phase: Any = None


class CallItem(Fields):
    type: Literal["function_call"]
    call_id: ShortText
    name: str
    arguments: str
    id: ItemId | None = None
    status: Literal["completed"] | None = None
    namespace: Any = None
    caller: Any = None
    async_: Annotated[Any, Field(alias="async")] = None


class CallOutputItem(Fields):
    type: Literal["function_call_output"]
    call_id: ShortText
    output: str | list[InputText]
    id: ItemId | None = None
    status: Literal["completed"] | None = None
    name: Any = None
    namespace: Any = None
    caller: Any = None


_BY_NAME = Refused("functions have names alone")
_CALLER = Refused("the model alone calls", ({"type": "direct"},))
REFUSED_OF_MESSAGE_ITEMS = {"phase": Refused("the model's messages have none")}
REFUSED_OF_CALL_ITEMS = {
    "namespace": _BY_NAME,
    "caller": _CALLER,
    "async_": Refused("the client runs a call and sends its output in the next request", (False,)),
}
REFUSED_OF_OUTPUT_ITEMS = {"namespace": _BY_NAME, "caller": _CALLER, "name": Refused("its call has the name")}
REFUSED_OF_TEXT_PARTS = {
    "annotations": Refused("texts have none", ([],)),
    "prompt_cache_breakpoint": Refused("there is no prompt cache to steer"),
}
KINDS = {
    "message": (MessageItem, REFUSED_OF_MESSAGE_ITEMS),
    "function_call": (CallItem, REFUSED_OF_CALL_ITEMS),
    "function_call_output": (CallOutputItem, REFUSED_OF_OUTPUT_ITEMS),
}


def messages_of_items(given: Any, called: Container[str]) -> list[ChatMessage]:
    """A response's input as a chat's messages. A call behind the assistant's text is part of the same turn.

    called: ids of the calls before.
    """
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    if not isinstance(given, list) or not given:
        raise Refusal("input is a string or a list of items, not empty", param="input")
    turns: list[ChatMessage] = []
    ids: set[str] = set()
    for index, item in enumerate(given):
        match _item(item, f"input[{index}]"):
            case MessageItem(role=role, content=content):
                turns.append(ChatMessage(role=role, content=_text(content)))
            case CallItem(call_id=call_id, name=name, arguments=arguments):
                ids.add(call_id)
                call = CalledTool(id=call_id, function=FunctionCall(name=name, arguments=arguments))
                if turns and turns[-1].role == "assistant" and not turns[-1].tool_calls:
                    turns[-1] = turns[-1].model_copy(update={"tool_calls": [call]})
                else:
                    turns.append(ChatMessage(role="assistant", tool_calls=[call]))
            case CallOutputItem(call_id=call_id) if call_id not in ids and call_id not in called:
                raise Refusal(f"{call_id!r:.100} is the call_id of no call before", param=f"input[{index}].call_id")
            case CallOutputItem(call_id=call_id, output=output):
                turns.append(ChatMessage(role="tool", tool_call_id=call_id, content=_text(output)))
    return turns


def _item(given: Any, place: str) -> MessageItem | CallItem | CallOutputItem:
    kind = given.get("type", "message") if isinstance(given, Mapping) else None
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(map(repr, KINDS))
        raise Refusal(f"{place} is of the type {kind!r:.100}, and an item is one of {known}", param=place)
    fields, refused = KINDS[kind]
    try:
        item = fields.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = next((part for part in first["loc"] if isinstance(part, str)), "")
        raise Refusal(f"{place}.{field}: {first['msg']}", param=f"{place}.{field}") from error
    refuse_fields(item, refused, f"{place}.")
    for name in ("content", "output"):
        parts = getattr(item, name, None)
        for index, part in enumerate(parts if isinstance(parts, list) else ()):
            refuse_fields(part, REFUSED_OF_TEXT_PARTS, f"{place}.{name}[{index}].")
    return item


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
