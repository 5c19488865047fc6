"""The traffic of `experiments.benchmarks.storm`: request `number` is a pure function of the seed and what is served.

A case is one request, or several where one needs what another gave: a session and its turns. Three of ten are
malformed, three of ten are left by their client.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from experiments.benchmarks.storm_client import Exchange, leaving

Wants = Literal["answer", "refusal", "either", "closed"]
"""answer: what was asked for, or that the server is busy. refusal: a 4xx with its envelope. either: one of them.
closed: no proper HTTP, for which 4xx in any form or the end of the connection will do."""


class Served(NamedTuple):
    """What the traffic has to know of a server."""

    model: str
    paths: frozenset[str]
    """Of its description, and "/v2" and "grpc" where these are there."""
    max_body: int
    """Bytes."""


class Step(NamedTuple):
    """One exchange of a case."""

    asked: Exchange
    wants: Wants = "answer"
    is_stream: bool = False
    num_choices: int | None = None
    follows: Callable[[str], bool] | None = None
    """Whether a text that ended by itself is what a guide allows."""
    keeps: bool = False
    """The id in the answer takes the place of KEPT in the steps behind it; without an id they are left out."""
    insists: bool = False
    """Sent again where the server is busy."""


class Case(NamedTuple):
    """A request of the storm, with the requests that belong to it."""

    number: int
    kind: str
    sort: Literal["good", "malformed", "left"]
    steps: tuple[Step, ...]


KEPT = "@kept@"
_WORDS = "the answer is a greatest common divisor of two numbers hello wörld 你好 42 def return".split()
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_ADD = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def case(number: int, served: Served, *, seed: int) -> Case:
    """The case of a number."""
    rng = random.Random(f"storm {seed} {number}")
    sort: Any = rng.choices(("good", "malformed", "left"), (40, 30, 30))[0]
    makers = _MALFORMED if sort == "malformed" else _GOOD
    kinds = {kind: weight for kind, (weight, needs, _) in makers.items() if needs is None or needs in served.paths}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    steps = list(makers[kind][2](rng, served))
    if sort == "left":
        index = rng.randrange(len(steps))
        steps[index] = steps[index]._replace(asked=leaving(steps[index].asked, rng), insists=False)
        steps[index + 1 :] = map(_behind_left, steps[index + 1 :])
    elif rng.random() < 0.1:
        steps = [step._replace(asked=step.asked._replace(is_slow=True)) for step in steps]
    return Case(number, kind, sort, tuple(steps))


def _behind_left(step: Step) -> Step:
    """What is wanted behind a step that was left: the server may still be at it, and a session in use (409)."""
    changes = step.asked.method != "GET" and step.wants == "answer"
    return step._replace(wants="either") if changes else step


def post(path: str, body: Any, *headers: tuple[str, str], **more: Any) -> Exchange:
    """A request with JSON, or with bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Exchange("POST", path, data, (("Content-Type", "application/json"), *headers), **more)


def probes(served: Served) -> list[Exchange]:
    """A few greedy requests, whose tokens are the same at any time."""
    common = {"model": served.model, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True}
    return [
        *(post("/v1/completions", common | {"prompt": p, "logprobs": 0}) for p in ("def gcd(a", "two numbers 你好")),
        post("/v1/chat/completions", common | chat),
    ]


# --- requests that are answered ---------------------------------------------------------------------------------------


def _text(rng: random.Random, *, most: int = 12) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))


def _sampling(rng: random.Random, served: Served) -> dict[str, Any]:
    body: dict[str, Any] = {"model": served.model, "max_tokens": rng.choice((1, 4, 16, 16, 40, 120))}
    choices: dict[str, Any] = {
        "temperature": rng.choice((0, 0.5, 1.0, 2.0)),
        "top_p": rng.choice((0.3, 0.9, 1.0)),
        "top_k": rng.choice((0, 1, 40)),
        "seed": rng.randrange(1000),
        "stop": rng.choice(("\n", ["the", "is"], [])),
        "frequency_penalty": rng.choice((-1.0, 0.5)),
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -100, "7": 2},
        "min_p": 0.05,
        "min_tokens": 1,
        "ignore_eos": True,
        "user": "somebody",
    }
    return body | {name: value for name, value in choices.items() if rng.random() < 0.15}


def _messages(rng: random.Random) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": _text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.choice((0, 0, 0, 1))):
        turns += [{"role": "user", "content": _text(rng)}, {"role": "assistant", "content": _text(rng)}]
    return [*turns, {"role": "user", "content": _text(rng)}]


def _asked(path: str, body: dict[str, Any], rng: random.Random, *, choices: int = 1, **more: Any) -> list[Step]:
    """A request, as a stream or not."""
    is_stream = rng.random() < 0.5
    body = body | {"stream": is_stream} | ({"stream_options": {"include_usage": True}} if is_stream else {})
    chunked = rng.random() < 0.1
    return [Step(post(path, body, is_chunked=chunked), is_stream=is_stream, num_choices=choices, **more)]


def _completion(rng: random.Random, served: Served) -> list[Step]:
    prompt = rng.choice((_text(rng), [1, *rng.choices(range(10, 300), k=rng.randint(1, 60))]))
    return _asked("/v1/completions", _sampling(rng, served) | {"prompt": prompt}, rng)


def _echo(rng: random.Random, served: Served) -> list[Step]:
    body = _sampling(rng, served) | {"prompt": _text(rng), "echo": True, "logprobs": rng.randint(0, 5)}
    body.pop("min_tokens", None)
    return _asked("/v1/completions", body | {"max_tokens": rng.choice((0, 1, 8))}, rng)


def _several(rng: random.Random, served: Served) -> list[Step]:
    prompts, n = [_text(rng) for _ in range(rng.randint(1, 4))], rng.randint(1, 4)
    body = _sampling(rng, served) | {"prompt": prompts, "n": n}
    return _asked("/v1/completions", body, rng, choices=len(prompts) * n)


def _chat(rng: random.Random, served: Served) -> list[Step]:
    body = _sampling(rng, served) | {"messages": _messages(rng)}
    if rng.random() < 0.2:
        body |= {"logprobs": True, "top_logprobs": rng.randint(0, 5)}
    return _asked("/v1/chat/completions", body, rng)


def _chats(rng: random.Random, served: Served) -> list[Step]:
    n = rng.randint(2, 6)
    return _asked("/v1/chat/completions", _sampling(rng, served) | {"messages": _messages(rng), "n": n}, rng, choices=n)


def _tools(rng: random.Random, served: Served) -> list[Step]:
    body = {"model": served.model, "messages": _messages(rng), "tools": [_ADD], "max_tokens": 24}
    return _asked("/v1/chat/completions", body | ({"tool_choice": "none"} if rng.random() < 0.3 else {}), rng)


def _guided(rng: random.Random, served: Served) -> list[Step]:
    def is_json(text: str) -> bool:
        value = json.loads(text)
        return set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y")

    named = {"type": "json_schema", "json_schema": {"name": "pair", "schema": _SCHEMA, "strict": True}}
    guide, follows = rng.choice(
        (
            ({"structured_outputs": {"json": _SCHEMA}}, is_json),
            ({"response_format": named}, is_json),
            ({"structured_outputs": {"regex": "[ab]{1,6}"}}, lambda text: re.fullmatch("[ab]{1,6}", text) is not None),
            ({"structured_outputs": {"choice": ["yes", "no", "你好"]}}, lambda text: text in ("yes", "no", "你好")),
        )
    )
    body = {"model": served.model, "messages": _messages(rng), "max_tokens": 60, "temperature": 1.0} | guide
    return _asked("/v1/chat/completions", body, rng, follows=follows)


def _session(rng: random.Random, served: Served) -> list[Step]:
    created = {"model": served.model, "max_length": 250}
    if rng.random() < 0.5:
        created["messages"] = [{"role": "system", "content": _text(rng, most=4)}]
    steps = [Step(post("/v1/sessions", created), keeps=True, insists=True)]
    for _ in range(rng.randint(1, 3)):
        turn = [{"role": "user", "content": _text(rng, most=3)}]
        body = {"model": served.model, "session_id": KEPT, "messages": turn, "max_tokens": 8, "temperature": 0}
        steps += _asked("/v1/chat/completions", body, rng)
    steps.append(Step(Exchange("GET", f"/v1/sessions/{KEPT}")))
    return [*steps, Step(Exchange("DELETE", f"/v1/sessions/{KEPT}"), insists=True)]


def _response(rng: random.Random, served: Served) -> list[Step]:
    body = {"model": served.model, "input": _text(rng), "max_output_tokens": rng.choice((4, 16, 40)), "store": True}
    is_stream = rng.random() < 0.5
    first = Step(post("/v1/responses", body | {"stream": is_stream}), is_stream=is_stream, keeps=True)
    more = Step(post("/v1/responses", body | {"previous_response_id": KEPT, "store": False}), "either")
    return [first, more, Step(Exchange("DELETE", f"/v1/responses/{KEPT}"), "either", insists=True)]


def _tokenize(rng: random.Random, served: Served) -> list[Step]:
    text = _text(rng, most=60)
    ids = {"tokens": rng.choices(range(300), k=rng.randint(0, 50))}
    return [rng.choice((Step(post("/tokenize", {"prompt": text})), Step(post("/detokenize", ids))))]


def _embeddings(rng: random.Random, served: Served) -> list[Step]:
    texts = [_text(rng) for _ in range(rng.randint(1, 5))]
    return [Step(post("/v1/embeddings", {"model": served.model, "input": texts}))]


def _listed(rng: random.Random, served: Served) -> list[Step]:
    paths = [path for path in ("/v1/sessions", "/tokenizer_info", "/live", "/metrics") if path in served.paths]
    return [Step(Exchange("GET", rng.choice(["/v1/models", f"/v1/models/{served.model}", "/health", *paths])))]


def kserve_inputs(rng: random.Random) -> list[tuple[str, str, list[Any]]]:
    """Name, datatype and values of a request's tensors."""
    found: list[tuple[str, str, list[Any]]] = [("text_input", "BYTES", [_text(rng) for _ in range(rng.randint(1, 3))])]
    found += [("max_tokens", "INT32", [rng.choice((1, 8, 60))])]
    return found + ([("temperature", "FP32", [0.5])] if rng.random() < 0.5 else [])


def _kserve_body(rng: random.Random) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [len(values)], "data": values}
            for name, datatype, values in kserve_inputs(rng)
        ]
    }


def _kserve(rng: random.Random, served: Served) -> list[Step]:
    path, data = f"/v2/models/{served.model}/infer", json.dumps(_kserve_body(rng)).encode()
    if rng.random() < 0.3:
        return [Step(post(path, gzip.compress(data, mtime=0), ("Content-Encoding", "gzip")))]
    return [
        Step(post(path, data)) if rng.random() < 0.8 else Step(Exchange("GET", f"/v2/models/{served.model}/config"))
    ]


def _grpc(rng: random.Random, served: Served) -> list[Step]:
    """Sent by `storm.call`, which knows how: body and headers are not looked at."""
    method = rng.choice(("ModelInfer", "ModelStreamInfer"))
    body = {"inputs": kserve_inputs(rng), "model": served.model}
    return [Step(Exchange("GRPC", method, json.dumps(body).encode()))]


_GOOD: dict[str, tuple[int, str | None, Callable[[random.Random, Served], list[Step]]]] = {
    "completion": (16, None, _completion),
    "echo": (6, None, _echo),
    "several": (8, None, _several),
    "chat": (16, None, _chat),
    "chats": (6, None, _chats),
    "tools": (5, None, _tools),
    "guided": (10, None, _guided),
    "session": (8, "/v1/sessions", _session),
    "response": (6, "/v1/responses", _response),
    "tokenize": (4, "/tokenize", _tokenize),
    "embeddings": (4, "/v1/embeddings", _embeddings),
    "listed": (4, None, _listed),
    "kserve": (6, "/v2", _kserve),
    "grpc": (6, "grpc", _grpc),
}
"""Weight, what has to be served for it, and what makes it."""


# --- requests that are not --------------------------------------------------------------------------------------------

_JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, -(2**70), 1e308, 0.5, float("nan"), float("inf"), "", "x", "\x00",
    "\ud800", "5", "a" * 5000, [], [[]], [None], [1, "a"], {}, {"a": {}}, {"type": "object"}, {"type": "x"}, ["\ud800"],
    [{"role": "user", "content": "\udfff"}], [[0, 0], []], [-1], [10**9],
)  # fmt: skip
_FIELDS = (
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "logprobs",
    "top_logprobs", "logit_bias", "stream", "stream_options", "response_format", "structured_outputs", "tools", "echo",
    "tool_choice", "bad_words", "min_tokens", "stop_token_ids", "ignore_eos", "frequency_penalty", "user", "best_of",
    "session_id", "max_completion_tokens", "typical_p", "min_p", "repetition_penalty", "unheard_of", "suffix", "input",
)  # fmt: skip


def _base(rng: random.Random, served: Served) -> tuple[str, dict[str, Any]]:
    common = {"model": served.model, "max_tokens": 4}
    return rng.choice(
        (
            ("/v1/completions", common | {"prompt": "a"}),
            ("/v1/chat/completions", common | {"messages": [{"role": "user", "content": "a"}]}),
        )
    )


def _mutated(rng: random.Random, served: Served) -> list[Step]:
    """Some field, or some part of one, has some value. It may even be a good one."""
    path, body = _base(rng, served)
    bodies: list[tuple[str, dict[str, Any]]] = [(path, body)]
    for other, fields in (
        ("/v1/sessions", {"model": served.model, "messages": []}),
        ("/v1/responses", {"model": served.model, "input": "a", "max_output_tokens": 4}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
        ("/v1/embeddings", {"model": served.model, "input": "a"}),
    ):
        if other in served.paths:
            bodies.append((other, fields))
    path, body = rng.choice([*bodies, bodies[0], bodies[0]])
    for _ in range(rng.randint(1, 2)):
        body = body | {rng.choice((*_FIELDS, *body)): rng.choice(_JUNK)}
    if "messages" in body and rng.random() < 0.3:
        message = {"role": "user", "content": "a"} | {rng.choice(("role", "content", "name", "x")): rng.choice(_JUNK)}
        body["messages"] = [message]
    return [Step(post(path, body), "either", keeps=path in ("/v1/sessions", "/v1/responses")), *_ending(path)]


def _ending(path: str) -> list[Step]:
    kept = path in ("/v1/sessions", "/v1/responses")
    return [Step(Exchange("DELETE", f"{path}/{KEPT}"), "either", insists=True)] if kept else []


def _wrong_field(rng: random.Random, served: Served) -> list[Step]:
    path, body = _base(rng, served)
    wrong = rng.choice(
        (
            {"max_tokens": "5"}, {"max_tokens": -1}, {"max_tokens": 2**40}, {"max_tokens": 1.5},
            {"max_tokens": 100_000},
            {"temperature": -1}, {"temperature": 3}, {"temperature": float("nan")}, {"temperature": "hot"},
            {"top_p": 0}, {"top_p": 1.1}, {"n": 0}, {"n": 129}, {"n": "2"}, {"stop": [""]}, {"stop": 5},
            {"seed": 2**64}, {"logit_bias": {"x": 1}}, {"logit_bias": {"0": 101}}, {"logit_bias": [1]},
            {"unheard_of": 1}, {"stream": "yes"}, {"stream_options": {"include_usage": True}},
            {"stop_token_ids": [-1]}, {"min_tokens": 5}, {"bad_words": [""]}, {"repetition_penalty": 0},
            {"model": None}, {"model": 5}, {"model": "nobody"}, {"model": "nobody" * 1000},
            {"structured_outputs": {"regex": "("}}, {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            {"structured_outputs": {"json": {"type": "nothing"}}}, {"structured_outputs": {"grammar": "start: ("}},
            {"structured_outputs": {"choice": []}}, {"structured_outputs": {"json": "{"}}, {"best_of": 4},
            {"suffix": "x"}, {"functions": [{}]}, {"audio": {}}, {"prompt": {}, "messages": {}}, {"top_logprobs": 3},
        )
    )  # fmt: skip
    return [Step(post(path, body | wrong), "refusal")]


def _wrong_chat(rng: random.Random, served: Served) -> list[Step]:
    user = {"role": "user", "content": "a"}
    messages: list[Any] = [
        None, [], "a", {}, [None], [{}], [user | {"role": "king"}], [user | {"content": 5}], [user | {"content": [5]}],
        [user | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [user | {"unheard_of": 1}],
        [{"role": "user"}], [user | {"tool_calls": []} | {"tool_call_id": "c"}],
        [user, {"role": "tool", "content": "a", "tool_call_id": "nobody"}],
    ]  # fmt: skip
    more: list[dict[str, Any]] = [
        {"tool_choice": "required"}, {"tools": [{"type": "function"}]}, {"tools": [_ADD], "tool_choice": "some"},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}}, {"top_logprobs": 3},
        {"modalities": ["audio"]}, {"max_completion_tokens": 0}, {"logprobs": 3}, {"session_id": 5},
        {"tools": [_ADD], "structured_outputs": {"regex": "a"}},
    ]  # fmt: skip
    body = {"model": served.model, "messages": [user], "max_tokens": 4}
    wrong = {"messages": rng.choice(messages)} if rng.random() < 0.5 else rng.choice(more)
    return [Step(post("/v1/chat/completions", body | wrong), "refusal")]


def _no_json(rng: random.Random, served: Served) -> list[Step]:
    path, body = _base(rng, served)
    data = json.dumps(body).encode()
    deep = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    wrong = [b"", b"{", data[:-1], data + data, b"null", b"[]", b"5", b'"a"', b"\xff\xfe" + data, b"\x00" * 10, deep]
    return [Step(post(path, rng.choice(wrong)), "refusal")]


def _too_long(rng: random.Random, served: Served) -> list[Step]:
    path, body = _base(rng, served)
    field = "prompt" if "prompt" in body else "messages"
    text = "a b " * rng.choice((300, 3000, served.max_body // 8))
    value: Any = text if field == "prompt" else [{"role": "user", "content": text}]
    return [Step(post(path, body | {field: value}), "refusal")]


def _large_body(rng: random.Random, served: Served) -> list[Step]:
    path, body = _base(rng, served)
    data = json.dumps(body).encode() + b" " * served.max_body
    if rng.random() < 0.3:  # said, and never sent
        length = ("Content-Length", str(10 ** rng.randint(8, 30)))
        return [Step(Exchange("POST", path, b"{", (length,)), "closed")]
    # The answer may be lost where the client is still sending when the connection is closed.
    return [Step(post(path, data, is_chunked=rng.random() < 0.5), "closed")]


def _nowhere(rng: random.Random, served: Served) -> list[Step]:
    chosen = rng.choice(
        (
            ("GET", "/nowhere"), ("POST", "/v1/nowhere"), ("GET", "/v1/completions"), ("PUT", "/v1/completions"),
            ("DELETE", "/v1/models"), ("POST", "/health"), ("GET", "/v1/models/nobody"), ("GET", "/%00"),
            ("GET", "/v1/models/%ff%fe"), ("PATCH", "/"), ("GET", "/v1/../etc/passwd"), ("POST", "/v1/models/../x"),
        )
    )  # fmt: skip
    return [Step(Exchange(*chosen), "refusal")]


def _no_session(rng: random.Random, served: Served) -> list[Step]:
    name = rng.choice(("nobody", "session_", "%00", "a" * 500))
    body = {"model": served.model, "messages": [{"role": "user", "content": "a"}], "session_id": name}
    asked = (
        post("/v1/chat/completions", body),
        Exchange("GET", f"/v1/sessions/{name}"),
        Exchange("DELETE", f"/v1/sessions/{name}"),
        Exchange("POST", f"/v1/sessions/{name}/fork"),
        post("/v1/sessions", {"model": served.model, "max_length": rng.choice((0, -1, "5", 10**9))}),
    )
    return [Step(rng.choice(asked), "refusal")]


def _no_http(rng: random.Random, served: Served) -> list[Step]:
    data = rng.choice(
        (
            b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n",
            b"GET /nowhere HTTP/9.9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: " + b"a" * 40_000 + b"\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            b"GET /health HTTP/1.1\r\n\x00: a\r\n\r\n",
        )
    )  # fmt: skip
    return [Step(Exchange("", "", data=data), "closed")]


def _wrong_kserve(rng: random.Random, served: Served) -> list[Step]:
    path, body = f"/v2/models/{served.model}/infer", _kserve_body(rng)
    first = body["inputs"][0]
    wrong: Sequence[Exchange] = (
        post(path, b"{"), post(path, b"[]"), post(path, {}), post(path, {"inputs": 5}), post(path, {"inputs": [5]}),
        post(path, {"inputs": [first, first]}), post(path, {"inputs": [first | {"shape": [-1]}]}),
        post(path, {"inputs": [first | {"shape": [10**12]}]}), post(path, {"inputs": [first | {"datatype": "FP99"}]}),
        post(path, {"inputs": [first | {"data": [5]}]}), post(path, {"inputs": [first | {"name": "nobody"}]}),
        post(path, body | {"outputs": [{"name": "nobody"}]}), post(path, body | {"unheard_of": 1}),
        post(path, body, ("Inference-Header-Content-Length", "99999")), post(path, body, ("Content-Encoding", "gzip")),
        post(path, body, ("Inference-Header-Content-Length", "-1")), post(path, body, ("Content-Encoding", "br")),
        post("/v2/models/nobody/infer", body), post(f"/v2/models/{served.model}/versions/9/infer", body),
        Exchange("GET", path), Exchange("GET", "/v2/nowhere"), post(path, b"[" * 100_000),
    )  # fmt: skip
    return [Step(rng.choice(wrong), "refusal")]


_MALFORMED: dict[str, tuple[int, str | None, Callable[[random.Random, Served], list[Step]]]] = {
    "mutated": (40, None, _mutated),
    "wrong field": (15, None, _wrong_field),
    "wrong chat": (10, None, _wrong_chat),
    "no JSON": (8, None, _no_json),
    "too long": (6, None, _too_long),
    "large body": (3, None, _large_body),
    "nowhere": (6, None, _nowhere),
    "no session": (5, "/v1/sessions", _no_session),
    "no HTTP": (5, None, _no_http),
    "wrong KServe": (6, "/v2", _wrong_kserve),
}
