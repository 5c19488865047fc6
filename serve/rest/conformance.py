"""python -m serve.rest.conformance: writes CONFORMANCE.md, what becomes of every field of every request.

A field is honoured (its part says how), without effect (checked, and changes nothing that the model is told or says),
refused (its table of `Refused` says why), or no row can be written: `rows` raises ValueError for one that is none of
these, or that OpenAI documents and the server does not know. Those that OpenAI does not document are beyond it.
"""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from serve.rest import protocol, requests, response_requests, tokenize_routes
from serve.rest.embeddings import EmbeddingRequest
from serve.rest.requests import Refused
from serve.rest.scores import PromptAnswer, ScoreRequest

PAGE = Path(__file__).parent.parent / "CONFORMANCE.md"

_SAMPLED = {
    "model": "the model, or an adapter by its name; else 404",
    "stream": "server-sent events",
    "stream_options": "with `stream` alone",
    "max_tokens": "refused where it and the prompt pass the context; 0 with `echo` alone",
    "temperature": "0 to 2; 0 is greedy",
    "top_p": "over 0, to 1",
    "n": "1 to 128; in a session 1",
    "stop": "strings of any length, however they fall on tokens",
    "seed": "64 bits, folded to 32; answer i of n has seed + i",
    "user": "in the log; up to 512 characters",
    "frequency_penalty": "-2 to 2",
    "presence_penalty": "-2 to 2",
    "logit_bias": "up to 300 tokens",
    "top_k": "the k most likely; 0: all",
    "min_p": "at least so many times as likely as the most likely",
    "typical_p": "the most typical with this probability together",
    "repetition_penalty": "divides logits of what was there, or multiplies negative ones",
    "bad_words": "sequences of tokens that are never drawn",
    "min_tokens": "no end before",
    "stop_token_ids": "end the answer, beside the model's",
    "ignore_eos": "the model's own ends do not end the answer; not with tools",
    "structured_outputs": "the answer follows it; not with tools",
}
_TOOL_CHOICE = "`none`, `auto`, `required`, a named function; `allowed_tools` and `custom` are refused"
_USAGE = {"include_usage": "a last chunk with the usage"}
_TOOL = {"type": "`function`", "function": "below"}
_FUNCTION = {
    "name": "64 letters, digits, _ and -; `interpreter` is code",
    "description": "told to the model",
    "parameters": "a JSON schema, told to the model",
    "strict": "calls follow the schema; what of it cannot be enforced is refused",
}
_MESSAGE = {
    "role": "`developer` is `system`, `tool` the environment",
    "content": "text, or text parts, below; other parts are refused",
    "name": "in the turn's header",
    "tool_calls": "one call, below; of the assistant",
    "tool_call_id": "of an earlier call, up to 512 characters; of tools",
}


class Part(NamedTuple):
    """The fields of a request, or of an object within one."""

    place: str
    fields: type[BaseModel]
    honoured: Mapping[str, str]
    refused: Mapping[str, Refused] = {}
    documented: tuple[str, ...] = ()
    """OpenAI's own types of it in the package `openai`; none: all of it is beyond OpenAI."""
    idle: Mapping[str, str] = {}
    """Fields that are checked and have no effect; what is taken."""


_MESSAGE_TYPES = tuple(
    f"chat.ChatCompletion{role}MessageParam" for role in ("System", "Developer", "User", "Assistant", "Tool")
)
_MESSAGES = (
    Part("messages[].", requests.ChatMessage, _MESSAGE, protocol.REFUSED_OF_MESSAGES, _MESSAGE_TYPES),
    Part(
        "messages[].content[].",
        requests.TextPart,
        {"type": "`text`", "text": "the texts of all parts are joined"},
        requests.REFUSED_OF_PARTS,
        ("chat.ChatCompletionContentPartTextParam",),
    ),
    Part(
        "messages[].tool_calls[].",
        requests.CalledTool,
        {"id": "what `tool_call_id` names; up to 512 characters", "type": "`function`", "function": "below"},
        {},
        ("chat.ChatCompletionMessageFunctionToolCallParam",),
    ),
    Part(
        "messages[].tool_calls[].function.",
        requests.FunctionCall,
        {"name": "`interpreter` is code", "arguments": "a JSON object; of the interpreter with `code`"},
        {},
        ("chat.chat_completion_message_function_tool_call_param.Function",),
    ),
)
_ITEM_ID = "`msg_`, `fc_` or `fco_` and letters and digits, as outputs have it"
_ITEM_STATUS = "`completed`, as outputs have it"
_ITEMS = (
    Part(
        "input[message].",
        response_requests.MessageItem,
        {
            "type": "`message`; may be left out",
            "role": "`developer` is `system`",
            "content": "a text, or text parts, below; other parts are refused",
        },
        response_requests.REFUSED_OF_MESSAGE_ITEMS,
        (
            "responses.EasyInputMessageParam",
            "responses.response_input_param.Message",
            "responses.ResponseOutputMessageParam",
        ),
        {"id": _ITEM_ID, "status": "`completed`, `incomplete`, as outputs have it"},
    ),
    Part(
        "input[message].content[].",
        response_requests.InputText,
        {"type": "`input_text`, `output_text`, `text`", "text": "the texts of all parts are joined"},
        response_requests.REFUSED_OF_TEXT_PARTS,
        ("responses.ResponseInputTextParam", "responses.ResponseOutputTextParam"),
        {"logprobs": "as outputs have them"},
    ),
    Part(
        "input[function_call].",
        response_requests.CallItem,
        {
            "type": "`function_call`",
            "call_id": "what its output names; up to 512 characters",
            "name": "`interpreter` is code",
            "arguments": "a JSON object; of the interpreter with `code`",
        },
        response_requests.REFUSED_OF_CALL_ITEMS,
        ("responses.ResponseFunctionToolCallParam",),
        {"id": _ITEM_ID, "status": _ITEM_STATUS},
    ),
    Part(
        "input[function_call_output].",
        response_requests.CallOutputItem,
        {
            "type": "`function_call_output`",
            "call_id": "of a call before, here or in the response that is gone on with",
            "output": "a text, or text parts as of messages",
        },
        response_requests.REFUSED_OF_OUTPUT_ITEMS,
        ("responses.response_input_param.FunctionCallOutput",),
        {"id": _ITEM_ID, "status": _ITEM_STATUS},
    ),
)
_TOOLS = (
    Part("tools[].", requests.DeclaredTool, _TOOL, {}, ("chat.ChatCompletionFunctionToolParam",)),
    Part("tools[].function.", requests.Function, _FUNCTION, {}, ("shared_params.FunctionDefinition",)),
)
_STREAM = Part(
    "stream_options.",
    requests.StreamOptions,
    _USAGE,
    protocol.REFUSED_OF_STREAMS,
    ("chat.ChatCompletionStreamOptionsParam",),
)
_OUTPUTS = Part(
    "structured_outputs.",
    requests.StructuredOutputs,
    {
        "json": "a JSON schema",
        "regex": "an expression, matched from end to end",
        "choice": "one of these",
        "grammar": "Lark or GBNF",
    },
)
ROUTES: dict[str, tuple[Part, ...]] = {
    "/v1/chat/completions": (
        Part(
            "",
            requests.ChatRequest,
            _SAMPLED
            | {
                "messages": "below; one at least",
                "max_completion_tokens": "as `max_tokens`; one of them",
                "logprobs": "of the tokens of the text",
                "top_logprobs": "up to 20, with `logprobs`",
                "tools": "functions, below",
                "tool_choice": _TOOL_CHOICE,
                "parallel_tool_calls": "a turn holds one call, whether or not more are allowed",
                "response_format": "`text`, `json_object`, `json_schema`",
                "safety_identifier": "in the log; up to 512 characters",
                "session_id": "`messages` are the new turn of this session",
            },
            protocol.REFUSED_OF_CHATS,
            ("chat.completion_create_params.CompletionCreateParamsStreaming",),
        ),
        *_MESSAGES,
        *_TOOLS,
        _STREAM,
        Part(
            "response_format.",
            requests.ResponseFormat,
            {"type": "`text`, `json_object`, `json_schema`", "json_schema": "below"},
            {},
            ("shared_params.ResponseFormatJSONSchema",),
        ),
        Part(
            "response_format.json_schema.",
            requests.NamedSchema,
            {"schema": "the answer follows it", "strict": "what of it cannot be enforced is refused"},
            {},
            ("shared_params.response_format_json_schema.JSONSchema",),
            {"name": "64 letters, digits, _ and -; the model is not told", "description": "the model is not told"},
        ),
        _OUTPUTS,
    ),
    "/v1/completions": (
        Part(
            "",
            requests.CompletionRequest,
            _SAMPLED
            | {
                "prompt": "a text, texts, ids, lists of ids; up to 512 answers",
                "echo": "the prompt in front, and with `logprobs` its own",
                "logprobs": "0: the tokens drawn; n: and the n most likely, up to 20",
                "best_of": "equal to `n`; else refused",
            },
            protocol.REFUSED_OF_COMPLETIONS,
            ("completion_create_params.CompletionCreateParamsStreaming",),
        ),
        _STREAM,
        _OUTPUTS,
    ),
    "/v1/responses": (
        Part(
            "",
            response_requests.ResponseRequest,
            {
                "model": _SAMPLED["model"],
                "input": "a text, or messages, calls and their outputs, below; other items are refused",
                "instructions": "a system turn in front; of this response alone",
                "max_output_tokens": "cut there, the response is incomplete",
                "temperature": _SAMPLED["temperature"],
                "top_p": _SAMPLED["top_p"],
                "text": "below",
                "tools": "functions, below",
                "tool_choice": _TOOL_CHOICE,
                "parallel_tool_calls": "an answer holds one call, whether or not more are allowed",
                "stream": "typed events",
                "stream_options": "with `stream` alone",
                "store": "false: it is not kept; false in the answer where there was no room",
                "previous_response_id": "goes on behind it; 400 where it is not kept (any more)",
                "include": "`message.output_text.logprobs` alone",
                "top_logprobs": "with that `include`",
                "metadata": "given back with the response",
                "user": "in the log, and given back; up to 512 characters",
                "safety_identifier": "in the log, and given back; up to 512 characters",
                "seed": _SAMPLED["seed"],
            },
            response_requests.REFUSED_OF_RESPONSES,
            ("responses.response_create_params.ResponseCreateParamsStreaming",),
        ),
        *_ITEMS,
        Part(
            "tools[].",
            response_requests.ResponseTool,
            _FUNCTION | {"type": "`function`; tools of other types are refused"},
            response_requests.REFUSED_OF_RESPONSE_TOOLS,
            ("responses.FunctionToolParam",),
        ),
        Part(
            "text.",
            response_requests.TextConfig,
            {"format": "below"},
            response_requests.REFUSED_OF_TEXTS,
            ("responses.ResponseTextConfigParam",),
        ),
        Part(
            "text.format.",
            response_requests.TextFormat,
            {
                "type": "`text`, `json_object`, `json_schema`",
                "schema": "the answer follows it",
                "strict": "what of it cannot be enforced is refused",
            },
            {},
            ("responses.ResponseFormatTextJSONSchemaConfigParam",),
            {
                "name": "needed for a schema: 64 letters, digits, _ and -; the model is not told, and it is given back",
                "description": "the model is not told, and it is given back",
            },
        ),
        Part(
            "stream_options.",
            response_requests.ResponseStreamOptions,
            {},
            response_requests.REFUSED_OF_RESPONSE_STREAMS,
            ("responses.response_create_params.StreamOptions",),
        ),
    ),
    "/v1/embeddings": (
        Part(
            "",
            EmbeddingRequest,
            {
                "model": "the model itself, not an adapter",
                "input": "a text, texts, ids, lists of ids; up to 2048",
                "encoding_format": "`float`, `base64`",
                "dimensions": "the model's own; else refused",
                "user": _SAMPLED["user"],
            },
            {},
            ("EmbeddingCreateParams",),
        ),
    ),
    "/v1/sessions": (
        Part(
            "",
            requests.SessionRequest,
            {
                "model": "whom the session speaks with",
                "messages": "what stands before the first turn; as in chats",
                "tools": "as in chats",
                "max_length": "tokens of the whole session",
            },
        ),
    ),
    "/v1/score": (
        Part(
            "",
            ScoreRequest,
            {
                "model": "a reward model",
                "messages": "one conversation that ends with the assistant's; as in chats",
                "pairs": "of prompt and answer, a score for each",
                "condition": "one of the server's, by name",
                "condition_prompt": "a condition's text",
                "user": _SAMPLED["user"],
            },
        ),
        Part("pairs[].", PromptAnswer, {"prompt": "the user's turn", "answer": "the assistant's, which is scored"}),
    ),
    "/tokenize": (
        Part(
            "",
            tokenize_routes.TokenizeRequest,
            {
                "model": "the model, or an adapter by its name; else 404",
                "prompt": "read as completions read it; or `messages`",
                "messages": "read as chats are; or `prompt`",
                "tools": "with `messages`",
                "add_special_tokens": "with `prompt`; true unless it is false",
                "add_generation_prompt": "with `messages`; true unless it is false",
                "return_token_strs": "the tokens as strings too",
            },
            tokenize_routes.REFUSED_OF_TOKENIZE,
        ),
    ),
    "/detokenize": (
        Part(
            "",
            tokenize_routes.DetokenizeRequest,
            {
                "model": "the model, or an adapter by its name; else 404",
                "tokens": "ids of the vocabulary, as many as a context has",
            },
        ),
    ),
    "/v1/load_lora_adapter": (
        Part(
            "",
            requests.LoadAdapterRequest,
            {"lora_name": "the model's name from then on", "lora_path": "below the server's folder of adapters"},
            {
                name: protocol.REFUSED_OF_ADAPTERS[name]
                for name in requests.LoadAdapterRequest.model_fields
                if name in protocol.REFUSED_OF_ADAPTERS
            },
        ),
    ),
    "/v1/unload_lora_adapter": (
        Part(
            "",
            requests.UnloadAdapterRequest,
            {"lora_name": "of one that is loaded"},
            {"lora_int_id": protocol.REFUSED_OF_ADAPTERS["lora_int_id"]},
        ),
    ),
}


QUERIES: dict[str, tuple[Part, ...]] = {
    "/v1/responses/{response_id}": (
        Part(
            "",
            response_requests.ResponseQuery,
            {},
            response_requests.REFUSED_OF_QUERIES,
            ("responses.response_retrieve_params.ResponseRetrieveParamsStreaming",),
        ),
    ),
}
"""What may stand behind the `?` of a GET. Of other routes nothing is documented."""


class Row(NamedTuple):
    field: str
    state: str
    note: str


def rows(part: Part) -> Iterator[Row]:
    """The rows of a part. Raises ValueError for a field of which nothing is said, or more than there is."""
    known = {info.alias or name: name for name, info in part.fields.model_fields.items()}
    documented = {name for path in part.documented for name in typing.get_type_hints(_openai_type(path))}
    refused = {part.fields.model_fields[name].alias or name: why for name, why in part.refused.items()}
    taken = part.honoured.keys() | part.idle.keys()
    holes = {
        "neither honoured nor refused": {*known} - taken - {*refused},
        "both honoured and refused": taken & {*refused},
        "both honoured and without effect": part.honoured.keys() & part.idle.keys(),
        "no field of the request": (taken | {*refused}) - {*known},
        "documented by OpenAI and not known": documented - {*known},
    }
    for what, names in holes.items():
        if names:
            raise ValueError(f"{part.fields.__name__} ({part.place or 'top'}): {what}: {', '.join(sorted(names))}")
    order = sorted(known, key=lambda name: (name in refused, name in part.idle, name not in documented, name))
    for name in order:
        beyond = "" if name in documented else ", beyond OpenAI"
        if name in refused:
            why, neutral = refused[name]
            asking_nothing = "".join(f", `{value!r}`" for value in neutral)
            yield Row(part.place + name, "refused" + beyond, f"{why}; taken: null{asking_nothing}")
        elif name in part.idle:
            yield Row(part.place + name, "without effect" + beyond, part.idle[name])
        else:
            yield Row(part.place + name, "honoured" + beyond, part.honoured[name])


def page() -> str:
    """The page in Markdown."""
    lines = [
        "# What becomes of every field",
        "",
        "Written by `python -m serve.rest.conformance` from the classes of requests, the tables of what is refused,",
        "and the types of the package `openai`. Refused is a field with status 400 and its name in `param`, unless",
        "its value asks for nothing (`taken`). Without effect is one that is checked, and changes nothing that the",
        "model is told or says. A field that stands in no table is unknown, and refused as well. What `messages` and",
        "`tools` hold is told once, of chats.",
    ]
    for method, routes in (("POST", ROUTES), ("GET", QUERIES)):
        for route, parts in routes.items():
            lines += ["", f"## {method} {route}", "", *_table(parts)]
    return "\n".join(lines) + "\n"


def _table(parts: Iterable[Part]) -> list[str]:
    told = [f"| `{field}` | {state} | {_cell(note)} |" for part in parts for field, state, note in rows(part)]
    return ["| field | | |", "|---|---|---|", *told]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _openai_type(path: str) -> Any:
    """A type of the package `openai`, by its place in `openai.types`."""
    import importlib

    *modules, name = path.split(".")
    return getattr(importlib.import_module(".".join(["openai.types", *modules])), name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve.rest.conformance", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=PAGE, metavar="FILE", help="where it is written (default: the one beside this)"
    )
    args = parser.parse_args(arguments)
    args.output.write_text(page(), encoding="utf-8")
    print(f"written {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
