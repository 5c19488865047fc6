"""What the KServe v2 protocol asks of a pipeline, whichever front it comes by: `grpc.py` or `routes.py`.

A model takes n prompts, as `text_input`, `input_ids` or `messages`, and how to go on: single tensors by name, or any
field of OpenAI's request as JSON in `sampling_parameters`. Both become the request that `serve.openai` takes, so that
the same is honoured, and the same refused with the same words. What each tensor is for stands in INPUTS and OUTPUTS,
and in the model's configuration, where clients find it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

from pydantic import ValidationError

from serve.kserve.tensors import Tensor
from serve.operation.health import Health
from serve.operation.keys import is_opened
from serve.operation.refusal import Refusal
from serve.pipeline import Answer, Pipeline
from serve.rest.protocol import Refused, call_guide_of, guided_call, messages_of, params_of, refuse, tools_of
from serve.rest.requests import ChatRequest, CompletionRequest

MAX_PROMPTS = 512  # of one request
VERSION = "1"
NO_STATISTICS = "there are none by the model; counts and times of requests are in /metrics and in the server's log"


class Kind(NamedTuple):
    """A tensor of every model: `datatype` is the one that is told; others of the same kind of number pass as well."""

    datatype: str
    shape: tuple[int, ...]
    what: str


_EACH = "one value, or one for each prompt"
INPUTS = {
    "text_input": Kind("BYTES", (-1,), "n texts that go on: [n] or [n, 1]; this, input_ids or messages is given"),
    "input_ids": Kind("INT32", (-1, -1), "n prompts of token ids that go on, taken as they are"),
    "input_lengths": Kind("INT32", (-1,), "how many ids of each row of input_ids count (default: all)"),
    "messages": Kind("BYTES", (-1,), "n conversations that get a turn, each a JSON list of OpenAI's messages"),
    "tools": Kind("BYTES", (1,), "for messages: a JSON list of OpenAI's tools"),
    "stream": Kind("BOOL", (1,), "in ModelStreamInfer, of one prompt: text as it comes, the rest in the last response"),
    "exclude_input_in_output": Kind("BOOL", (1,), "false: text_output begins with the prompt (default: true)"),
    "sampling_parameters": Kind("BYTES", (-1,), f"a JSON object of more fields of OpenAI's requests; {_EACH}"),
    "stop": Kind("BYTES", (-1,), "strings that end every answer and are no part of it"),
    "max_tokens": Kind("INT32", (-1,), f"default: 16 for texts and ids, for messages what the context holds; {_EACH}"),
    "min_tokens": Kind("INT32", (-1,), f"until so many are drawn nothing ends the answer; {_EACH}"),
    "temperature": Kind("FP32", (-1,), f"0: the most likely token always (default: 1); {_EACH}"),
    "top_p": Kind("FP32", (-1,), f"only the most likely tokens of this probability together; {_EACH}"),
    "top_k": Kind("INT32", (-1,), f"only so many most likely tokens, 0: all; {_EACH}"),
    "min_p": Kind("FP32", (-1,), f"only tokens so many times as likely as the most likely; {_EACH}"),
    "repetition_penalty": Kind("FP32", (-1,), f"divides logits of tokens in prompt or answer; {_EACH}"),
    "frequency_penalty": Kind("FP32", (-1,), f"for every time a token was drawn; {_EACH}"),
    "presence_penalty": Kind("FP32", (-1,), f"for a token that was drawn; {_EACH}"),
    "seed": Kind("INT64", (-1,), f"the same answer again (default: a random one); {_EACH}"),
    "ignore_eos": Kind("BOOL", (-1,), f"the model's own end does not end the answer; {_EACH}"),
}
SAMPLING = [*INPUTS][[*INPUTS].index("max_tokens") :]
"""Inputs that are fields of OpenAI's requests, by the same names."""

OUTPUTS = {
    "text_output": Kind("BYTES", (-1,), "the answers, in the shape of the prompts; in a stream what is new"),
    "finish_reason": Kind("BYTES", (-1,), "stop, length or tool_calls"),
    "tool_calls": Kind("BYTES", (-1,), "a JSON list of OpenAI's tool calls, with messages and tools; else []"),
    "num_prompt_tokens": Kind("INT32", (-1,), "tokens that stood before the answer"),
    "num_generated_tokens": Kind("INT32", (-1,), "tokens drawn, the one that ended the answer included"),
    "output_ids": Kind("INT32", (-1, -1), "if asked for: ids drawn, -1 behind num_generated_tokens of them"),
    "logprobs": Kind("BYTES", (-1,), "if asked for: OpenAI's JSON object of the kind of request"),
}
ONLY_IF_ASKED = ("output_ids", "logprobs")

_ALIKE = {
    "BYTES": ("BYTES",),
    "BOOL": ("BOOL",),
    "INT32": ("INT32", "INT64", "UINT32", "UINT64"),
    "INT64": ("INT64", "INT32", "UINT32", "UINT64"),
    "FP32": ("FP32", "FP64"),
}
REFUSED_PARAMETERS = {
    "sequence_id": Refused("requests stand alone; send the conversation as messages", (0, "")),
    "sequence_start": Refused("requests stand alone; send the conversation as messages", (False,)),
    "sequence_end": Refused("requests stand alone; send the conversation as messages", (False,)),
    "priority": Refused("requests are answered in their order", (0,)),
}
_BY_TENSORS = (
    *("model", "prompt", "messages", "tools", "stream", "stream_options", "n", "best_of", "echo", "suffix"),
    "session_id",
)
"""Fields of requests that sampling_parameters may not hold: tensors say them, and a prompt has one answer; sessions
are REST's."""


class Served(NamedTuple):
    """What the fronts serve. `api_keys`: one of them is needed; none: no key is. `max_bytes`: of a request, after it is
    decompressed. `health`: how the server is."""

    pipeline: Pipeline
    model_name: str
    api_keys: tuple[str, ...]
    max_bytes: int
    health: Callable[[], Health]


class Request(NamedTuple):
    """A request of either front."""

    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[str]


class Job(NamedTuple):
    """A request that can be answered."""

    request: Request
    shape: tuple[int, ...]  # of the prompts, and so of what is told of the answers
    starts: list[Callable[[], Answer]]
    bodies: list[CompletionRequest | ChatRequest]
    echoes: list[str]
    wanted: tuple[str, ...]
    streams: bool
    seconds: float | None  # after which it is given up


def check_key(given: bytes, api_keys: Sequence[str]) -> None:
    """Raises Refusal unless `given` is an Authorization that has one of the keys."""
    if not is_opened(given, api_keys):
        raise Refusal("the API key is missing or wrong; send Authorization: Bearer <key>", status=401)


def check_model(name: str, version: str, served: Served) -> None:
    """Raises Refusal for a model that is not served here."""
    names = [served.model_name, *served.pipeline.adapters]
    if name not in names:
        are = "is" if len(names) == 1 else "are"
        what = f"the model {name!r:.200} is not served here; {', '.join(map(repr, names))} {are}"
        raise Refusal(what, param="model_name", status=404)
    if version not in ("", VERSION):
        what = f"version {version!r:.50} of the model {name!r} is not there; there is {VERSION!r}"
        raise Refusal(what, param="model_version", status=404)


def server_metadata() -> dict[str, Any]:
    try:
        version = metadata.version("internjax")
    except metadata.PackageNotFoundError:  # a checkout that is on the path and not installed
        version = "unknown"
    extensions = ["binary_tensor_data", "model_configuration", "parameters"]
    return {"name": "internjax", "version": version, "extensions": extensions}


def model_metadata(name: str) -> dict[str, Any]:
    def told(kinds: Mapping[str, Kind]) -> list[dict[str, Any]]:
        return [{"name": n, "datatype": kind.datatype, "shape": [*kind.shape]} for n, kind in kinds.items()]

    tensors = {"inputs": told(INPUTS), "outputs": told(OUTPUTS)}
    return {"name": name, "versions": [VERSION], "platform": "internjax"} | tensors


def model_config(name: str) -> dict[str, Any]:
    """Triton's configuration of a model; `parameters` says what each tensor is for."""

    def told(kinds: Mapping[str, Kind], **more: bool) -> list[dict[str, Any]]:
        types = {n: "TYPE_" + kind.datatype.replace("BYTES", "STRING") for n, kind in kinds.items()}
        return [{"name": n, "data_type": types[n], "dims": [*kind.shape]} | more for n, kind in kinds.items()]

    return {
        "name": name,
        "platform": "internjax",
        "backend": "internjax",
        "max_batch_size": 0,
        "input": told(INPUTS, optional=True),
        "output": told(OUTPUTS),
        "parameters": {n: {"string_value": kind.what} for n, kind in (INPUTS | OUTPUTS).items()},
        "model_transaction_policy": {"decoupled": True},
    }


def repository_index(served: Served, *, only_ready: bool = False) -> list[dict[str, str]]:
    health = served.health()
    if only_ready and not health.is_ready:
        return []
    state = {"version": VERSION, "state": "READY" if health.is_ready else "UNAVAILABLE"}
    state["reason"] = "" if health.is_ready else health.why
    return [{"name": name} | state for name in (served.model_name, *served.pipeline.adapters)]


def job_of(request: Request, served: Served, *, may_stream: bool) -> Job:
    """What a request asks for. Raises Refusal for what is not honoured; nothing runs yet."""
    check_model(request.model_name, request.model_version, served)
    given = _inputs(request.inputs)
    wanted = _wanted(request.outputs)
    seconds, more = _parameters(request.parameters)
    prompts, shape = _prompts(given)
    streams = _flag(given, "stream", default=False)
    if streams and not may_stream:
        raise Refusal("stream is true; only ModelStreamInfer of gRPC streams: call that, or leave it out")
    if streams and len(prompts) > 1:
        raise Refusal(f"stream is true with {len(prompts)} prompts; send each as a request of its own, with an id")
    excluded = _flag(given, "exclude_input_in_output", default=True)
    fields = _fields(given, more, len(prompts))
    starts, bodies, echoes = [], [], []
    for prompt, own in zip(prompts, fields, strict=True):
        body = _body(prompt, own, request.model_name, with_logprobs="logprobs" in wanted)
        starts.append(_start(body, served))
        bodies.append(body)
        echoes.append("" if excluded else _echo(body, wanted, served.pipeline))
    return Job(request, shape, starts, bodies, echoes, wanted, streams, seconds)


def _inputs(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs by name, each of a datatype that it may have."""
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name not in INPUTS:
            what = f"there is no input {tensor.name!r:.100}; there are {', '.join(INPUTS)}"
            raise Refusal(what, param=tensor.name)
        if tensor.name in found:
            raise Refusal(f"the input {tensor.name} is given twice; give it once", param=tensor.name)
        if tensor.datatype not in (kinds := _ALIKE[INPUTS[tensor.name].datatype]):
            what = f"{tensor.name} has the datatype {tensor.datatype:.50}; {' or '.join(kinds)} is wanted"
            raise Refusal(what, param=tensor.name)
        found[tensor.name] = tensor
    return found


def _wanted(names: Sequence[str]) -> tuple[str, ...]:
    """The outputs to give: those asked for, in that order, or all but those that are only given if asked for."""
    for name in names:
        if name not in OUTPUTS:
            raise Refusal(f"there is no output {name!r:.100}; there are {', '.join(OUTPUTS)}", param=name)
        if names.count(name) > 1:
            raise Refusal(f"the output {name} is asked for twice; ask once", param=name)
    return tuple(names) or tuple(name for name in OUTPUTS if name not in ONLY_IF_ASKED)


def _parameters(given: Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """The timeout in seconds, and what is left: fields of OpenAI's requests, for all prompts."""
    left = dict(given)
    for name, (why, neutral) in REFUSED_PARAMETERS.items():
        if left.pop(name, neutral[0]) not in neutral:
            raise Refusal(f"the parameter {name} is refused: {why}", param=name)
    final = left.pop("triton_enable_empty_final_response", False)
    if not isinstance(final, bool):  # the last response is marked in any case, and is not empty
        raise Refusal(f"the parameter triton_enable_empty_final_response must be a bool, given {final!r:.100}")
    timeout = left.pop("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        raise Refusal(f"the parameter timeout must be whole microseconds, 0 for none, given {timeout!r:.100}")
    return timeout / 1e6 or None, left


def _prompts(given: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """For each prompt the fields of OpenAI's request that say it; the shape of the answers."""
    kinds = [name for name in ("text_input", "input_ids", "messages") if name in given]
    if len(kinds) != 1:
        there = " and ".join(kinds) or "none"
        raise Refusal(f"of text_input, input_ids and messages {there} are given; give one of them", param="text_input")
    tensor = given[kinds[0]]
    shape, rows = tensor.shape, tensor.shape[0] if tensor.shape else 0
    if kinds[0] == "input_ids":
        if len(shape) != 2 or not len(tensor.values):
            raise Refusal(f"input_ids has the shape {list(shape)}; [prompts, tokens] is wanted", param="input_ids")
    elif len(shape) not in (1, 2) or shape[1:] not in ((), (1,)) or not rows:
        raise Refusal(f"{kinds[0]} has the shape {list(shape)}; [n] or [n, 1] is wanted", param=kinds[0])
    if rows > MAX_PROMPTS:
        raise Refusal(f"{rows} prompts are more than {MAX_PROMPTS}; send several requests", param=kinds[0])
    for name, only in (("input_lengths", "input_ids"), ("tools", "messages")):
        if name in given and kinds[0] != only:
            raise Refusal(f"{name} is given without {only}; leave it out", param=name)
    if kinds[0] == "text_input":
        return [{"prompt": text} for text in _texts(tensor)], shape
    if kinds[0] == "input_ids":
        return [{"prompt": ids} for ids in _rows(tensor, given.get("input_lengths"))], (rows,)
    tools = {"tools": _json(*_texts(given["tools"]), "tools", list)} if "tools" in given else {}
    return [{"messages": _json(text, "messages", list)} | tools for text in _texts(tensor)], shape


def _rows(tensor: Tensor, lengths: Tensor | None) -> list[list[int]]:
    num_rows, width = tensor.shape
    counts = [width] * num_rows if lengths is None else lengths.values
    if len(counts) != num_rows or not all(1 <= count <= width for count in counts):
        what = f"input_lengths must have one number in 1..{width} for each of {num_rows} rows, given {counts!r:.200}"
        raise Refusal(what, param="input_lengths")
    return [tensor.values[row * width : row * width + count] for row, count in enumerate(counts)]


def _texts(tensor: Tensor) -> list[str]:
    try:
        return [value.decode() for value in tensor.values]
    except UnicodeDecodeError as error:
        raise Refusal(f"{tensor.name} holds bytes that are no UTF-8: {error}", param=tensor.name) from error


def _json(text: str, name: str, kind: type[list] | type[dict]) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"{name} is not JSON: {error}", param=name) from error
    if not isinstance(value, kind):
        wanted = "a list" if kind is list else "an object"
        raise Refusal(f"{name} must be {wanted} in JSON, given {text!r:.200}", param=name)
    return value


def _flag(given: Mapping[str, Tensor], name: str, *, default: bool) -> bool:
    if name not in given:
        return default
    if len(given[name].values) != 1:
        raise Refusal(f"{name} has the shape {list(given[name].shape)}; one value is wanted", param=name)
    return given[name].values[0]


def _fields(given: Mapping[str, Tensor], more: Mapping[str, Any], num_prompts: int) -> list[dict[str, Any]]:
    """For each prompt, the fields of OpenAI's request beside those that say the prompt."""
    columns = {name: _column(given[name], given[name].values, num_prompts) for name in SAMPLING if name in given}
    if "stop" in given:
        columns["stop"] = [_texts(given["stop"])] * num_prompts
    objects: list[dict[str, Any]] = [{}] * num_prompts
    if (tensor := given.get("sampling_parameters")) is not None:
        objects = _column(tensor, [_json(text, tensor.name, dict) for text in _texts(tensor)], num_prompts)
    fields = []
    for index, own in enumerate(objects):
        parts = ({name: column[index] for name, column in columns.items()}, own, more)
        names = [name for part in parts for name in part]
        for name in names:
            if name in _BY_TENSORS:
                raise Refusal(f"{name} cannot be a sampling parameter: tensors say it, or it is not given", param=name)
            if names.count(name) > 1:
                what = f"{name} is given twice, of inputs, sampling_parameters and parameters; give it once"
                raise Refusal(what, param=name)
        fields.append({name: value for part in parts for name, value in part.items()})
    return fields


def _column(tensor: Tensor, values: list, num_prompts: int) -> list:
    """The values for each prompt, of a tensor that has one for all or one for each."""
    if len(tensor.shape) > 2 or tensor.shape[1:] not in ((), (1,)) or len(values) not in (1, num_prompts):
        wanted = "[1]" if num_prompts == 1 else f"[1] or [{num_prompts}]"
        what = f"{tensor.name} has the shape {list(tensor.shape)}; {wanted} is wanted, the prompts being {num_prompts}"
        raise Refusal(what, param=tensor.name)
    return values * num_prompts if len(values) == 1 else values


def _body(
    prompt: Mapping[str, Any], fields: Mapping[str, Any], model: str, *, with_logprobs: bool
) -> CompletionRequest | ChatRequest:
    """OpenAI's request of one prompt. Raises Refusal for what that does not take."""
    is_chat = "messages" in prompt
    kind, given = ChatRequest if is_chat else CompletionRequest, {"model": model, **prompt, **fields}
    if with_logprobs:
        given["logprobs"] = True if is_chat else given.get("logprobs", 0)
    elif "logprobs" in given or "top_logprobs" in given:
        raise Refusal("logprobs are given and the output logprobs is not asked for; ask for it", param="logprobs")
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(name for name in kind.model_fields if name not in _BY_TENSORS)
            raise Refusal(f"there is no sampling parameter {param!r:.100}; there are {known}", param=param) from None
        where = "input_ids or text_input" if param == "prompt" else param
        raise Refusal(f"{where}: {first['msg']}; given {first['input']!r:.200}", param=param) from error
    refuse(body)
    return body


def _start(body: CompletionRequest | ChatRequest, served: Served) -> Callable[[], Answer]:
    """What starts the answer to a request of OpenAI's."""
    pipeline = served.pipeline
    try:
        params = replace(params_of(body), adapter=None if body.model == served.model_name else body.model)
        if isinstance(body, CompletionRequest):
            return partial(pipeline.complete, body.prompt[0], params)
        declared = () if body.tool_choice == "none" else body.tools or ()
        tools = tools_of(declared)
        if tools and not pipeline.calls_tools:
            raise Refusal("this model's tokenizer has no markers for tool calls; leave tools out", param="tools")
        params = guided_call(params, call_guide_of(body.tool_choice, declared, body))
        return partial(pipeline.chat, messages_of(body.messages, {}), params, tools=tools)
    except ValueError as error:
        raise Refusal(str(error)) from error


def _echo(body: CompletionRequest | ChatRequest, wanted: Sequence[str], pipeline: Pipeline) -> str:
    """The text of a prompt that is to stand before its answer."""
    if isinstance(body, ChatRequest) or "logprobs" in wanted:
        of_what = "messages" if isinstance(body, ChatRequest) else "logprobs"
        raise Refusal(f"exclude_input_in_output is false with {of_what}; leave it out", param="exclude_input_in_output")
    (prompt,) = body.prompt
    return prompt if isinstance(prompt, str) else pipeline.tokenizer.decode(prompt)
