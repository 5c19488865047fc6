"""OpenAI's wire format: what of a request is refused, what it means to the pipeline, answers as dicts, errors.

Every field of `requests.py` is either honoured or refused with its name and the reason. `null` and a field's default
value always pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from internjax.text.message import Message, from_openai
from serve.answering.calls import function_of
from serve.guided import AnyJSON, CalledFunction, CallOf, Choice, Grammar, GuideError, GuideSpec, JSONSchema, Regex
from serve.operation.refusal import Refusal
from serve.pipeline import Event, Params, Result, Session, Token
from serve.rest.requests import (
    Asking,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DeclaredTool,
    LoadAdapterRequest,
    Refused,
    SessionRequest,
    UnloadAdapterRequest,
)

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions; a chat answer may fill the context


def refuse_aborted(event: Event) -> None:
    """Raises Refusal for the end of an answer that was aborted: one that is waited for ends so where its engine closes,
    and what there is of it is no answer."""
    if isinstance(event, Result) and event.finish == "aborted":
        message = "the engine was closed before the answer was complete; try again"
        raise Refusal(message, status=503, code="unavailable")


REFUSED_OF_COMPLETIONS = {"suffix": Refused("text is continued, not filled in", ("",))}
REFUSED_OF_CHATS = {
    "modalities": Refused("answers are text", (["text"],)),
    "audio": Refused("answers are text"),
    "functions": Refused("use tools", ([],)),
    "function_call": Refused("use tools", ("none",)),
    "metadata": Refused("nothing is stored", ({},)),
    "moderation": Refused("there is no moderation model"),
    "prediction": Refused("there is no speculation on given text"),
    "prompt_cache_key": Refused("there is no prompt cache to steer"),
    "prompt_cache_options": Refused("there is no prompt cache to steer", ({},)),
    "prompt_cache_retention": Refused("there is no prompt cache to steer"),
    "reasoning_effort": Refused("the model has one way to think", ("none",)),
    "service_tier": Refused("there is one tier", ("auto", "default")),
    "store": Refused("nothing is stored", (False,)),
    "verbosity": Refused("ask for the length in the conversation", ("medium",)),
    "web_search_options": Refused("the server has no network"),
}
REFUSED_OF_MESSAGES = {
    "refusal": Refused("the model's protocol has no refusals; send them as content"),
    "audio": Refused("messages are text"),
    "function_call": Refused("use tool_calls"),
    "annotations": Refused("messages are text", ([],)),
}
REFUSED_TOOL_CHOICES = {
    "allowed_tools": "declare only the tools that may be called",
    "custom": "tools are functions with parameters, and the interpreter",
}
REFUSED_OF_ADAPTERS = {
    "load_inplace": Refused("an adapter is not replaced while it is served; unload it first", (False,)),
    "is_3d_lora_weight": Refused("adapters of mixtures of experts are not read", (False,)),
    "lora_int_id": Refused("adapters are known by their names"),
}
REFUSED_OF_STREAMS = {"include_obfuscation": Refused("chunks are sent as they are", (False,))}


def refuse(request: CompletionRequest | ChatRequest) -> None:
    """Raises Refusal for what is asked for and cannot be given."""
    is_chat = isinstance(request, ChatRequest)
    refuse_fields(request, REFUSED_OF_CHATS if is_chat else REFUSED_OF_COMPLETIONS)
    if request.stream_options is not None:
        if not request.stream:
            raise Refusal(
                "stream_options are for streams; set stream to true, or leave them out", param="stream_options"
            )
        refuse_fields(request.stream_options, REFUSED_OF_STREAMS, "stream_options.")
    most = max_tokens_of(request)
    if most is not None and (request.min_tokens or 0) > most:
        raise Refusal(f"min_tokens is {request.min_tokens}, more than max_tokens, {most}", param="min_tokens")
    if guide_of(request) is not None:
        for name in ("ignore_eos", "min_tokens", "bad_words"):
            if getattr(request, name):
                raise Refusal(
                    f"{name} is given, and {param_of('guide', request)}: that alone says what may come next, and where "
                    f"the answer ends. Leave out one of them",
                    param=name,
                )
    if is_chat:
        _refuse_in_chat(request)
        return
    if request.best_of not in (None, request.n or 1):
        raise Refusal(f"best_of is {request.best_of}; all n = {request.n or 1} answers are returned", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise Refusal("max_tokens is 0: nothing is asked for without echo; give at least 1", param="max_tokens")


def _refuse_in_chat(request: ChatRequest) -> None:
    if request.max_tokens == 0:
        raise Refusal("max_tokens is 0; give at least 1", param="max_tokens")
    if request.ignore_eos and request.tools and request.tool_choice != "none":
        raise Refusal("past its end a turn holds no calls; leave out ignore_eos, or tools", param="ignore_eos")
    if guide_of(request) is not None and request.tools and request.tool_choice != "none":
        name = param_of("guide", request)
        raise Refusal(f"a guided turn holds no calls; leave out {name}, or tools", param=name)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise Refusal("max_tokens and max_completion_tokens are both given; give one", param="max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs")
    if request.session_id is not None:
        _refuse_in_session(request)
    elif not request.tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if getattr(request, name) not in (None, "none"):
                raise Refusal(f"{name} is given without tools; give tools, or leave it out", param=name)
    refuse_messages(request.messages)


def _refuse_in_session(request: ChatRequest) -> None:
    if (request.n or 1) > 1:
        raise Refusal(f"a session goes on with one answer, given n = {request.n}; fork it for others", param="n")
    if request.tools:
        raise Refusal("the tools of a session are declared where it begins, in POST /v1/sessions", param="tools")
    for index, message in enumerate(request.messages):
        if message.role == "assistant":
            raise Refusal(
                "messages are the new turn alone, the session holds what was said before; leave out the assistant's",
                param=f"messages[{index}].role",
            )


def call_guide_of(
    choice: Any, declared: Sequence[DeclaredTool], request: Asking, *, param: str = "tool_choice"
) -> CallOf | None:
    """What an answer's call is to follow: one that is forced, or, of functions that are strict, one that may come.

    choice: OpenAI's tool_choice, in the form of chats. Raises Refusal for one that cannot be had.
    """
    tools = [tool.function for tool in declared]
    is_strict = any(tool.strict and tool.name != "interpreter" for tool in tools)
    match choice:
        case None | "auto":
            forced, blamed = False, "tools[].function.strict"
        case "none":
            return None
        case "required":
            forced, blamed = True, param
        case {"type": "function", "function": {"name": str(name), **more_of_it}, **more} if not (more_of_it or more):
            forced, blamed = True, param
            tools = [tool for tool in tools if tool.name == name]
            if not tools:
                names = ", ".join(repr(tool.function.name) for tool in declared) or "none"
                raise Refusal(f"tool_choice names the function {name!r:.100}; declared are: {names}", param=param)
        case {"type": ("allowed_tools" | "custom") as kind}:
            raise Refusal(f"the tool_choice {kind} is refused: {REFUSED_TOOL_CHOICES[kind]}", param=param)
        case _:
            known = '\'none\', \'auto\', \'required\' or {"type": "function", "function": {"name": ...}}'
            raise Refusal(f"tool_choice is {known}, given {choice!r:.200}", param=param)
    if not tools or not (forced or is_strict):
        return None
    for name in ("ignore_eos", "min_tokens", "bad_words"):
        if getattr(request, name, None):
            raise Refusal(
                f"{name} is given, and {blamed}: the form of a call alone says what may come next. Leave out one",
                param=name,
            )
    none = {"type": "object", "properties": {}}
    functions = (CalledFunction(tool.name, tool.parameters or none, bool(tool.strict)) for tool in tools)
    return CallOf(tuple(functions), forced)


def guided_call(params: Params, guide: CallOf | None) -> Params:
    """Params of an answer whose call follows the guide. Raises Refusal where a schema cannot be read."""
    if guide is None:
        return params
    try:
        return replace(params, guide=guide)
    except ValueError as error:
        raise Refusal(str(error), param="tools") from error


def refuse_of_session(request: ChatRequest, session: Session) -> None:
    """Raises Refusal for what the session of a request does not allow."""
    if session.may_call and request.tool_choice == "none":
        raise Refusal(
            "the session told the model of its tools; fork it before, or leave out tool_choice", param="tool_choice"
        )
    asks = request.tool_choice not in (None, "none") or request.parallel_tool_calls is not None
    if not session.may_call and asks:
        name = "parallel_tool_calls" if request.tool_choice is None else "tool_choice"
        raise Refusal(f"{name} is given, and the session has no tools; leave it out", param=name)
    name = "ignore_eos" if request.ignore_eos else None if guide_of(request) is None else param_of("guide", request)
    if session.may_call and name is not None:
        raise Refusal(f"the session has tools, and a turn with {name} holds no calls; leave it out", param=name)


def refuse_session(request: SessionRequest) -> None:
    """Raises Refusal for what a session cannot begin with."""
    refuse_messages(request.messages or ())


def refuse_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises Refusal for what messages cannot hold."""
    for index, message in enumerate(messages):
        place = f"messages[{index}]."
        refuse_fields(message, REFUSED_OF_MESSAGES, place)
        if message.tool_calls and message.role != "assistant":
            raise Refusal(
                f"a {message.role} message has tool_calls; only the assistant's do", param=place + "tool_calls"
            )
        if message.tool_call_id is not None and message.role != "tool":
            raise Refusal(
                f"a {message.role} message has a tool_call_id; only tool messages do", param=place + "tool_call_id"
            )
        if message.content is None and not message.tool_calls:
            raise Refusal(f"the {message.role} message has no content; give a string", param=place + "content")


def refuse_adapter(request: LoadAdapterRequest | UnloadAdapterRequest) -> None:
    """Raises Refusal for what is asked of an adapter and cannot be given."""
    fields = type(request).model_fields
    refuse_fields(request, {name: refused for name, refused in REFUSED_OF_ADAPTERS.items() if name in fields})


def refuse_fields(values: BaseModel, refused: Mapping[str, Refused], place: str = "") -> None:
    """Raises Refusal for the first field that is in the table and has a value that asks for something."""
    for name, (why, neutral) in refused.items():
        value = getattr(values, name)
        if value is not None and not any(_is_same(value, each) for each in neutral):
            known = f"; only {', '.join(map(repr, neutral))} or null is taken" if neutral else ""
            field = place + (type(values).model_fields[name].alias or name)
            raise Refusal(f"{field} is refused: {why}{known}", param=field, code="unsupported_value")


def _is_same(given: Any, wanted: Any) -> bool:
    return isinstance(given, bool) == isinstance(wanted, bool) and given == wanted  # 0 is not False


def max_tokens_of(request: CompletionRequest | ChatRequest) -> int | None:
    """The most tokens that a request wants; None: what the context holds."""
    if request.max_tokens is not None:
        return request.max_tokens
    return request.max_completion_tokens if isinstance(request, ChatRequest) else COMPLETION_MAX_TOKENS


def guide_of(request: CompletionRequest | ChatRequest) -> GuideSpec | None:
    """What an answer to the request is to follow. Schemas of a `response_format` are strict only where it says so."""
    asked, found = request.structured_outputs, []
    if asked is not None:
        kinds = (JSONSchema, asked.json_), (Regex, asked.regex), (Choice, asked.choice), (Grammar, asked.grammar)
        found = [kind(tuple(given) if kind is Choice else given) for kind, given in kinds if given is not None]
        if len(found) != 1:
            raise Refusal(
                f"structured_outputs has {len(found)} of json, regex, choice and grammar; give one",
                param="structured_outputs",
            )
    wanted = getattr(request, "response_format", None)
    if wanted is not None and wanted.type != "json_schema" and wanted.json_schema is not None:
        raise Refusal("json_schema is for the type json_schema; leave it out", param="response_format.json_schema")
    match wanted and wanted.type:
        case "json_object":
            found.append(AnyJSON())
        case "json_schema":
            if wanted.json_schema is None:
                raise Refusal("the type json_schema needs json_schema", param="response_format.json_schema")
            schema = wanted.json_schema.schema_
            found.append(JSONSchema({} if schema is None else schema, strict=bool(wanted.json_schema.strict)))
    if len(found) > 1:
        raise Refusal("response_format and structured_outputs are both given; give one", param="structured_outputs")
    return found[0] if found else None


def params_of(request: CompletionRequest | ChatRequest) -> Params:
    """How an answer to the request is generated. Seeds of any sign and 64 bits are folded into 32."""
    if isinstance(request, ChatRequest):
        logprobs, echoed = (request.top_logprobs or 0) if request.logprobs else None, False
    else:
        logprobs, echoed = request.logprobs, bool(request.echo)
    try:
        return Params(
            max_tokens=max_tokens_of(request),
            seed=None if request.seed is None else request.seed % 2**32,
            stop=tuple(request.stop or ()),
            bad_words=tuple(request.bad_words or ()),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=logprobs if echoed else None,
            guide=guide_of(request),
            **{name: value for name in _AS_GIVEN if (value := getattr(request, name)) is not None},
        )
    except (GuideError, UnicodeEncodeError) as error:  # of all that is read here the guide alone is encoded
        raise Refusal(str(error), param=param_of("guide", request)) from error
    except ValueError as error:
        raise Refusal(str(error)) from error


_AS_GIVEN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
)


def param_of(field: str, request: Asking) -> str:
    """The name in the request of a field of the engine's."""
    logprobs = "logprobs" if isinstance(request, CompletionRequest) else "top_logprobs"
    names = {"stop_ids": "stop_token_ids", "min_new_tokens": "min_tokens"}
    wanted = getattr(request, "response_format", None)
    is_format = wanted is not None and wanted.type != "text"
    given = getattr(request, "structured_outputs", None) is not None
    names["guide"] = "structured_outputs" if given else "response_format" if is_format else "tools"
    if getattr(request, "text", None) is not None and not request.tools:
        names["guide"] = "text.format"
    return (names | {"logprobs": logprobs, "prompt_logprobs": logprobs}).get(field, field)


def messages_of(messages: Sequence[ChatMessage], called: dict[str, str]) -> list[Message]:
    """The conversation in the model's terms: a tool's result is a turn of the environment, named after its tool.

    called: the functions of earlier calls by their ids, to which those of these messages are added.
    """
    turns = []
    for index, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content, "name": message.name}
        if message.tool_calls:
            turn["tool_calls"] = [{"function": c.function.model_dump()} for c in message.tool_calls]
            called |= {c.id: c.function.name for c in message.tool_calls if c.id is not None}
        if message.tool_call_id is not None:
            if message.tool_call_id not in called:
                raise Refusal(
                    f"tool_call_id {message.tool_call_id!r} is no id of earlier tool_calls ({sorted(called)})",
                    param=f"messages[{index}].tool_call_id",
                )
            turn["name"] = called[message.tool_call_id]
        turns.append(turn)
    return from_openai(turns)


def tools_of(declared: Sequence[DeclaredTool] | None) -> list[dict[str, Any]]:
    """The tools that the model is told of, each {name, description, parameters}. Raises Refusal for what is no text."""
    none = {"type": "object", "properties": {}}
    functions = [tool.function for tool in declared or ()]
    told = [{"name": f.name, "description": f.description or "", "parameters": f.parameters or none} for f in functions]
    try:
        json.dumps(told, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(f"tools hold what the model cannot be told: {error}"[:500], param="tools") from error
    return told


def usage(results: Sequence[Result], *, n: int) -> dict[str, Any]:
    """Tokens of a request; `results` are prompt by prompt, n for each; a prompt counts once, by its first answer."""
    prompt = sum(result.num_prompt_tokens for result in results[::n])
    cached = sum(result.num_cached_tokens for result in results[::n])
    answer = sum(len(result.ids) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def tool_calls(result: Result, call_id: str) -> list[dict[str, Any]] | None:
    if result.call is None:
        return None
    return [{"id": call_id, "type": "function", "function": function_of(result.call)._asdict()}]


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """`token` and `bytes` are what the token added to the text: empty for one that only begins a character. Those of
    `top_logprobs` are what each would add, in bytes."""

    def entry(text: str, piece: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(piece)}

    content = [
        entry(t.text, t.text.encode(), t.logprob)
        | {"top_logprobs": [entry(a.piece.decode(errors="replace"), a.piece, a.logprob) for a in t.top]}
        for t in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[Token], *, num_top: int) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens] if num_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _by_text(token: Token) -> dict[str, float] | None:
    """The most likely texts in a token's place, and its own, which OpenAI always adds. None at a prompt's beginning.

    Where several tokens are the same text (parts of characters), the most likely counts.
    """
    if token.logprob is None:
        return None
    found = {a.piece.decode(errors="replace"): a.logprob for a in reversed(token.top)}
    if all(a.id != token.id for a in token.top):
        found = {token.text: token.logprob} | found
    return found
