"""Sessions over REST: a random model where ids and pages count, a script where the words do."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import openai
import pytest

from internjax.text import chat as protocol
from internjax.text.message import Message
from serve.answering.session import Session
from serve.pipeline import Params, Pipeline
from serve.rest.jobs import Job, stream
from serve.rest.kept import KeepLimits, Shelf
from serve.rest.requests import ChatRequest
from serve.server import start_server

BRIEF, FIRST, SECOND, THIRD = (
    {"role": role, "content": text}
    for role, text in (("system", "Be brief."), ("user", "hello"), ("user", "and now?"), ("user", "say it again"))
)
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 12}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1}}<|action_end|><|im_end|>'


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    with Pipeline(tiny_model, num_slots=2, max_context=256) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def client(pipeline):
    keep = KeepLimits(sessions=8)
    with start_server(pipeline, model_name="tiny", drain_seconds=1, keep=keep) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="mine", max_retries=0, timeout=60) as client:
            yield client
            for session in client.get("sessions", cast_to=object)["data"]:
                client.delete(f"sessions/{session['id']}", cast_to=object)


def begin(client, **fields) -> str:
    return client.post("sessions", body={"model": "tiny"} | fields, cast_to=object)["id"]


def said(client, session: str, *turn, stream=False, **options):
    """The text of the next turn, its usage, and what is told of the session."""
    asked = GREEDY | options | {"messages": [*turn], "extra_body": {"session_id": session}}
    if not stream:
        answer = client.chat.completions.create(**asked)
        return answer.choices[0].message.content, answer.usage, answer.session
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
    assert len({json.dumps(chunk.session) for chunk in chunks}) == 1
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    return text, chunks[-1].usage, chunks[-1].session


def raw(client, method: str, path: str, body=None, key="mine") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.request(method, f"{client.base_url}{path}", json=body, headers=headers, timeout=20)


def refused(response: httpx.Response, status: int, code: str | None, param: str | None = None) -> str:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert (error["code"], error["param"]) == (code, param), error
    return error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_sends_only_what_is_new_and_is_answered_as_if_all_was_sent(client, pipeline, stream):
    session = begin(client, messages=[BRIEF], max_length=200)
    first, usage, told = said(client, session, FIRST, stream=stream)
    assert told == {"id": session, "notice": None}
    before = pipeline.engine.stats()
    second, more, _ = said(client, session, SECOND, stream=stream)
    assert more.prompt_tokens_details.cached_tokens >= usage.total_tokens - 1
    read = pipeline.engine.stats().num_prompt_tokens - before.num_prompt_tokens
    assert read - more.prompt_tokens_details.cached_tokens < more.prompt_tokens - usage.prompt_tokens
    with pipeline.session([Message("system", "Be brief.")], max_length=200) as alone:
        greedy = Params(max_tokens=12, temperature=0.0)
        turns = [Message("user", turn["content"]) for turn in (FIRST, SECOND)]
        assert [first, second] == [alone.chat(turn, greedy).result().text for turn in turns]
    shown = raw(client, "GET", f"sessions/{session}").json()
    assert shown["messages"] == [
        BRIEF, FIRST, {"role": "assistant", "content": first}, SECOND, {"role": "assistant", "content": second}
    ]  # fmt: skip
    assert (shown["max_length"], shown["model"], shown["in_use"]) == (200, "tiny", False)
    assert usage.total_tokens < shown["num_tokens"] <= 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_becomes_part_of_the_session_before_the_next_turn_asks(client, monkeypatch, stream):
    settled, settle = threading.Event(), Session.settle

    def told(session):
        settle(session)
        settled.set()

    monkeypatch.setattr(Session, "settle", told)
    session = begin(client)
    text, _, _ = said(client, session, FIRST, stream=stream)
    assert settled.wait(10)
    messages = raw(client, "GET", f"sessions/{session}").json()["messages"]
    assert messages == [FIRST, {"role": "assistant", "content": text}]
    said(client, session, SECOND, stream=stream)


def test_a_fork_begins_as_the_session_stands_and_goes_its_own_way(client, pipeline):
    session = begin(client)
    said(client, session, FIRST)
    other = raw(client, "POST", f"sessions/{session}/fork").json()["id"]
    assert other != session
    assert said(client, session, SECOND)[0] == said(client, other, SECOND)[0]
    said(client, other, THIRD)
    shown, forked = (raw(client, "GET", f"sessions/{each}").json()["messages"] for each in (session, other))
    assert forked[:4] == shown and len(shown) == 4 and len(forked) == 6
    listed = [each["id"] for each in raw(client, "GET", "sessions").json()["data"]]
    assert {session, other} <= {*listed}
    for each in (session, other):
        deleted = {"id": each, "object": "session.deleted", "deleted": True}
        assert raw(client, "DELETE", f"sessions/{each}").json() == deleted
        refused(raw(client, "GET", f"sessions/{each}"), 404, "session_not_found")
    stats = pipeline.engine.stats()
    assert stats.num_free_pages == stats.num_pages and stats.num_active == stats.num_waiting == 0


def test_a_session_is_its_key_s_alone_and_its_id_cannot_be_guessed(client):
    session = begin(client)
    assert re.fullmatch("session_[0-9a-f]{32}", session) and begin(client) != session
    body = GREEDY | {"messages": [FIRST], "session_id": session}
    for method, path, sent, param in (
        ("GET", f"sessions/{session}", None, None),
        ("DELETE", f"sessions/{session}", None, None),
        ("POST", f"sessions/{session}/fork", None, None),
        ("POST", "chat/completions", body, "session_id"),
    ):
        assert "no session" in refused(raw(client, method, path, sent, key="other"), 404, "session_not_found", param)
    assert raw(client, "GET", "sessions", key="other").json()["data"] == []
    assert raw(client, "GET", f"sessions/{session}").json()["messages"] == []


def test_what_a_session_cannot_do_is_refused_and_leaves_it_as_it_was(client):
    session = begin(client, messages=[BRIEF], max_length=60)
    body = GREEDY | {"messages": [FIRST], "session_id": session}
    for extra, param in (
        ({"n": 2}, "n"),
        ({"tools": [ADD]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"messages": [FIRST, {"role": "assistant", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ):
        refused(raw(client, "POST", "chat/completions", body | extra), 400, None, param)
    refused(raw(client, "POST", "chat/completions", body | {"model": "x"}), 404, "model_not_found", "model")
    long = body | {"max_tokens": 60}
    assert "the session holds 60" in refused(
        raw(client, "POST", "chat/completions", long), 400, "context_length_exceeded", "messages"
    )
    assert raw(client, "GET", f"sessions/{session}").json()["messages"] == [BRIEF]
    assert said(client, session, FIRST)[1].completion_tokens > 0
    for wrong, param in (({"max_length": 257}, "max_length"), ({"max_length": 0}, "max_length"), ({"n": 1}, "n")):
        error = raw(client, "POST", "sessions", {"model": "tiny"} | wrong).json()["error"]
        assert error["param"] == param


@pytest.mark.parametrize("what", ["messages", "tools"])
def test_a_session_does_not_begin_with_what_is_no_text(client, what):
    given = {"messages": [{"role": "user", "content": "\ud800"}], "tools": [ADD | {"function": {"name": "f"}}]}
    given["tools"][0]["function"]["description"] = "é"
    body = json.dumps({"model": "tiny", what: given[what]}).replace("\\u00e9", "\\ud800").encode()
    headers = {"Content-Type": "application/json"}
    error = httpx.post(f"{client.base_url}sessions", content=body, headers=headers).json()["error"]
    assert error["param"] == what


def test_the_notice_of_a_template_that_writes_earlier_turns_anew(client, monkeypatch):
    session = begin(client)
    said(client, session, FIRST)
    render = protocol.render

    def rewriting(ids, earlier, more, tokenizer, **how):
        *before, last = *earlier, *more
        thoughtless = [m if m.role == "user" else Message("assistant", "-") for m in before]
        return render([*thoughtless, last], tokenizer, **how).ids

    monkeypatch.setattr("serve.answering.session.protocol.render_on", rewriting)
    assert "wrote earlier turns anew" in said(client, session, SECOND)[2]["notice"]


def test_a_stream_that_nobody_waited_for_is_ended(scripted):
    """The client left before the first line: the stream's own end is never reached, its job's is."""
    pipeline, told = scripted("a", seconds_per_event=0.01), []
    answer = pipeline.chat([Message("user", "hi")])
    job = Job("x-", ChatRequest(model="tiny", messages=[FIRST]), [answer], ended=told.append)

    async def lines():
        raise AssertionError("a line was asked for")
        yield

    async def gone():
        return {"type": "http.disconnect"}

    async def send(message):
        await asyncio.Event().wait()  # the client takes nothing

    asyncio.run(stream(job, lines())({"type": "http"}, gone, send))
    assert told == [None] and answer.aborted


def test_their_number_is_limited_and_an_unused_one_goes(scripted):
    with start_server(scripted("a"), model_name="tiny", keep=KeepLimits(sessions=1)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="mine", max_retries=0) as client:
            session = begin(client)
            full = raw(client, "POST", "sessions", {"model": "tiny"}, key="other")
            assert "--max-sessions" in refused(full, 429, "too_many_sessions")
            client.delete(f"sessions/{session}", cast_to=object)
            begin(client)
    now = 0.0
    clocks = {"clock": lambda: now, "unix_time": lambda: now}
    shelf = Shelf("x_", most=9, seconds=10, in_use=lambda value: value == "used", **clocks)
    kept, used = (shelf.add(value, owner="me") for value in ("kept", "used"))
    now = 9.0
    assert shelf.find(kept.id, owner="me").expires_at == 19
    now = 18.0
    assert [each.value for each in shelf.of("me")] == ["used", "kept"]
    now = 20.0
    assert shelf.find(kept.id, owner="me") is None and shelf.find(used.id, owner="me").value == "used"


def test_who_sets_the_machine_s_time_ends_nothing():
    passed, told = 5.0, 1000.0
    shelf = Shelf(most=9, seconds=10, clock=lambda: passed, unix_time=lambda: told)
    kept = shelf.add("x", owner="me")
    assert kept.expires_at == 1010
    for told in (10**9, 0.0):
        passed += 4
        assert shelf.of("me")[0].expires_at == told + 10 - (passed - 5)
    assert shelf.find(kept.id, owner="me").expires_at == 10
    passed += 11
    assert shelf.find(kept.id, owner="me") is None
    assert Shelf.__init__.__kwdefaults__["clock"] is time.monotonic


def test_who_holds_most_gives_way():
    sessions = Shelf("x_", most=4, seconds=10, in_use=lambda value: value == "used")
    many = [sessions.add(value, owner="many").id for value in ("used", "a", "b", "c")]
    assert sessions.add("d", owner="many") is None, "nobody has more"
    few = [sessions.add("e", owner="few").id for _ in range(2)]
    assert sessions.add("e", owner="few") is None, "nobody has more"
    assert [each.id for each in sessions.of("many")] == [many[0], many[3]], "one in use stays"
    assert [each.id for each in sessions.of("few")] == few
    stored = Shelf(most=9, seconds=10, replaces=True, max_bytes=10, bytes_of=len)
    little = stored.add("x", owner="little").id
    for size in (4, 4, 5):
        assert stored.add("x" * size, owner="much")
    assert [len(each.value) for each in stored.of("much")] == [4, 5]
    assert stored.find(little, owner="little") and stored.num_bytes == 10
    assert stored.add("x" * 11, owner="little") is None and len(stored) == 3
    assert stored.add("x" * 6, owner="little") is None and len(stored) == 3, "much would have less then"
    assert stored.add("x" * 4, owner="little")
    sizes = {owner: [len(each.value) for each in stored.of(owner)] for owner in ("little", "much")}
    assert sizes == {"little": [1, 4], "much": [5]}
    assert stored.add("x" * 2, owner="third"), "of two who hold as much, the one that was not used for longest goes"
    assert (len(stored.of("much")), len(stored.of("little")), stored.num_bytes) == (0, 2, 7)
    assert Shelf(most=0, seconds=10, replaces=True).add("x", owner="me") is None


def test_a_session_does_not_begin_with_what_no_context_holds(client):
    long = "x" * 100_000
    turn = {
        "role": "assistant",
        "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": json.dumps({"a": long})}}],
    }
    for wrong in (
        {"messages": [FIRST | {"content": long}]},
        {"messages": [FIRST | {"name": long}]},
        {"messages": [turn]},
        {"tools": [ADD | {"function": ADD["function"] | {"description": long}}]},
    ):
        answer = raw(client, "POST", "sessions", {"model": "tiny"} | wrong)
        assert "100" in refused(answer, 400, "context_length_exceeded", "messages")
    answer = raw(client, "POST", "chat/completions", GREEDY | {"messages": [FIRST, turn]})
    assert "characters" in refused(answer, 400, "context_length_exceeded", "messages"), "nor a conversation"
    turn["tool_calls"][0] |= {"id": "x" * 513, "function": {"name": "add", "arguments": "{}"}}
    refused(
        raw(client, "POST", "sessions", {"model": "tiny", "messages": [turn]}),
        400,
        "invalid_value",
        "messages[0].tool_calls[0].id",
    )


def test_the_tools_of_a_session_and_the_results_of_its_calls(serve, tokenizer):
    client, pipeline = serve(CALL)
    session = begin(client, tools=[ADD])
    asked = {"model": "tiny", "extra_body": {"session_id": session}}
    (call,) = client.chat.completions.create(messages=[FIRST], **asked).choices[0].message.tool_calls
    fork = client.post(f"sessions/{session}/fork", cast_to=object)["id"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    client.chat.completions.create(messages=[result], **asked)
    prompt, behind = (list(request.tokens) for request in pipeline.engine.requests)
    assert '"name": "add"' in tokenizer.decode(prompt)
    assert tokenizer.decode(behind, skip_special=False).endswith(
        "<|im_start|>environment name=<|plugin|>\n2<|im_end|>\n<|im_start|>assistant\n"
    )
    told = client.chat.completions.create(model="tiny", messages=[result], extra_body={"session_id": fork})
    assert told.session["id"] == fork
    for extra, param in (({"tool_choice": "none"}, "tool_choice"), ({"ignore_eos": True}, "ignore_eos")):
        with pytest.raises(openai.BadRequestError) as caught:
            sent = {"session_id": session} | extra
            client.chat.completions.create(model="tiny", messages=[FIRST], extra_body=sent)
        assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_the_client_leaves_is_no_part_of_the_session_and_one_at_a_time_is_answered(
    serve, eventually, stream
):
    client, pipeline = serve(lambda request: [70] * 500, seconds_per_event=0.02)
    session = begin(client)
    body = json.dumps(
        {"model": "tiny", "messages": [FIRST], "max_tokens": 500, "stream": stream, "session_id": session}
    ).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer none\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        eventually(lambda: pipeline.engine.active)
        again = GREEDY | {"messages": [SECOND], "session_id": session}
        for method, path, sent, param in (
            ("POST", "chat/completions", again, "session_id"),
            ("POST", f"sessions/{session}/fork", None, None),
            ("DELETE", f"sessions/{session}", None, None),
        ):
            refused(raw(client, method, path, sent, key="none"), 409, "session_in_use", param)
        assert raw(client, "GET", f"sessions/{session}", key="none").json()["in_use"]
    eventually(lambda: not raw(client, "GET", f"sessions/{session}", key="none").json()["in_use"])
    assert raw(client, "GET", f"sessions/{session}", key="none").json()["messages"] == []
    pipeline.engine.script = lambda request: [71, 2]
    assert raw(client, "POST", "chat/completions", again, key="none").status_code == 200
    told = raw(client, "GET", f"sessions/{session}", key="none").json()
    assert [message["role"] for message in told["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_the_engine_does_not_go_on_with_is_no_part_of_the_session(serve, eventually, stream):
    client, pipeline = serve(lambda request: [70] * 500, seconds_per_event=0.02)
    session = begin(client)

    def leave_it():
        eventually(lambda: pipeline.engine.active)
        next(iter(pipeline.engine.active)).abort()

    leaving = threading.Thread(target=leave_it)
    leaving.start()
    with pytest.raises(openai.APIError, match="the engine was closed before the answer was complete"):
        said(client, session, FIRST, stream=stream)
    leaving.join()
    shown = raw(client, "GET", f"sessions/{session}", key="none").json()
    assert shown["messages"] == [] and not shown["in_use"]
    pipeline.engine.script = lambda request: [70, 2]
    said(client, session, SECOND)
    assert raw(client, "GET", f"sessions/{session}", key="none").json()["messages"][0] == SECOND


def test_a_turn_that_fails_is_no_part_of_the_session(serve):
    client, pipeline = serve(lambda request: [70, 71])
    session = begin(client)
    with pytest.raises(openai.InternalServerError):
        said(client, session, FIRST)
    pipeline.engine.script = lambda request: [70, 2]
    said(client, session, SECOND)
    assert raw(client, "GET", f"sessions/{session}", key="none").json()["messages"][0] == SECOND
