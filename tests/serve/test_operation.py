"""How a server is run: who is let in, what it says of itself, how it ends, and what clients cannot do to it."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from internjax.decode.device import Compiled
from serve.__main__ import build_parser, read_keys
from serve.openai import create_app
from serve.operation.guards import Limits, Operation
from serve.operation.health import Starting
from serve.operation.request_log import JSONLines, TextLines
from serve.server import QuietConnections, Server, start_server, take_port

TEXT = "The answer is 6."
ASK = {"model": "tiny", "prompt": "SECRET", "max_tokens": 500}


@pytest.fixture
def served(scripted):
    """served(script, ...) -> a running server with `engine` and `doors`, closed after the test."""
    servers = []

    def start(script=TEXT, *, seconds_per_event=0.0, api_key=None, drain_seconds=1.0, **how):
        pipeline = scripted(script, seconds_per_event=seconds_per_event)
        operation = Operation(**how)
        server = start_server(
            pipeline, model_name="tiny", api_key=api_key, drain_seconds=drain_seconds, operation=operation
        )
        server.engine, server.doors = pipeline.engine, server._app.state.doors
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


def endless(request):
    return [70] * 500


def post(server, body=None, *, path="/v1/completions", **how) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(ASK if body is None else body).encode()
    headers = {"Content-Type": "application/json"} | how.pop("headers", {})
    return httpx.post(server.url + path, content=content, headers=headers, timeout=20, **how)


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20)


def head(num_bytes: int, *lines: bytes) -> bytes:
    start = [b"POST /v1/completions HTTP/1.1", b"Host: x", b"Content-Type: application/json", *lines]
    return b"\r\n".join([*start, b"Content-Length: %d" % num_bytes, b"", b""])


def asking(server, **fields) -> socket.socket:
    """A connection on which a request was sent."""
    body = json.dumps(ASK | fields).encode()
    connection = connect(server)
    connection.sendall(head(len(body)) + body)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


# Places.


@pytest.mark.parametrize("stream", [False, True])
def test_more_than_run_wait_more_than_wait_are_refused_and_who_leaves_makes_room(served, eventually, stream):
    server = served(endless, seconds_per_event=0.02, limits=Limits(max_running=1, max_waiting=1))
    with asking(server, stream=stream), httpx.Client() as other:
        eventually(lambda: len(server.engine.active) == 1)
        with asking(server, stream=stream):
            eventually(lambda: server.doors.num_waiting == 1)
            refused = post(server)
            assert error_of(refused, 429)["code"] == "rate_limit_exceeded" and int(refused.headers["Retry-After"]) > 0
            assert other.get(f"{server.url}/v1/models").status_code == 200, "what takes no place is answered"
        eventually(lambda: server.doors.num_waiting == 0)  # it left the queue
        assert len(server.engine.requests) == 1, "one that waited was begun"
        with asking(server, stream=stream):
            eventually(lambda: server.doors.num_waiting == 1)
            behind = len(server.engine.requests)
            next(iter(server.engine.active)).abort()  # the first is done: the next gets its place
            eventually(lambda: len(server.engine.requests) == behind + 1 and server.doors.num_waiting == 0)
            assert server.doors.num_running == 1
    eventually(lambda: not server.engine.active and server.doors.num_running == server.doors.num_inside == 0)
    server.engine.script = lambda request: [70] * 16
    assert post(server, ASK | {"max_tokens": 16}).status_code == 200


def test_who_waits_is_served_in_order_of_arrival(served, eventually):
    def script(request):
        return [70] * (500 if request.tokens == (5,) else 3)

    server = served(script, seconds_per_event=0.01, limits=Limits(max_running=1, max_waiting=9))
    with contextlib.ExitStack() as stack:
        for index in range(5):
            stack.enter_context(asking(server, max_tokens=3 if index else 500, prompt=[5 + index]))
            eventually(lambda index=index: server.engine.requests and server.doors.num_waiting == index)
        next(iter(server.engine.active)).abort()
        eventually(lambda: len(server.engine.requests) == 5 and not server.engine.active)
    assert [request.tokens[0] for request in server.engine.requests] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("limits", [Limits(max_running=0), Limits(max_waiting=-1), Limits(body_bytes=0)])
def test_limits_that_let_nobody_in_are_refused(scripted, limits):
    with pytest.raises(ValueError, match="limits are positive"):
        create_app(scripted(TEXT), model_name="tiny", operation=Operation(limits))


# Bodies and heads.


def test_a_body_that_trickles_in_is_refused_and_one_that_stops_is_forgotten(served, eventually):
    server = served(limits=Limits(body_seconds=0.2))
    with connect(server) as slow:
        slow.sendall(head(100) + b'{"model": ')
        answer = read_all(slow)  # closed: what is left of the body is not waited for
        assert b"408 Request Timeout" in answer and b"within 0.2 seconds" in answer
    server = served()
    with connect(server) as partial:
        partial.sendall(head(100) + b'{"model": ')
        eventually(lambda: server.doors.num_inside == 1)
    eventually(lambda: server.doors.num_inside == 0)
    assert not server.engine.requests and post(server).status_code == 200


def test_a_body_over_the_limit_is_refused_by_what_it_says_or_by_what_it_is(served):
    server = served(limits=Limits(body_bytes=1000))
    assert "more than 1000 bytes" in error_of(post(server, b"x" * 1001), 413)["message"]
    assert error_of(post(server, b"x" * 1000), 400)["message"].startswith("the body is not JSON")

    def pieces():
        yield from [b"x" * 400] * 3

    with httpx.Client() as client:
        error_of(client.post(f"{server.url}/v1/completions", content=pieces()), 413)
    with connect(server) as connection:  # it says so much, and is answered before it sends anything
        connection.sendall(head(10**9))
        assert b"413" in connection.recv(1000)
    with connect(server) as connection:  # of so many digits that the server under us would still take
        connection.sendall(head(10**19))
        assert b"413" in connection.recv(1000)


def test_a_refused_client_that_is_still_sending_hears_why(served, eventually):
    server = served(endless, seconds_per_event=0.02, limits=Limits(max_running=1, max_waiting=0))
    with asking(server):
        eventually(lambda: server.doors.num_running == 1)
        with connect(server) as connection:
            connection.sendall(head(10 << 20, b"Connection: close"))
            connection.sendall(b"x" * (10 << 20))
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 429") and answer.endswith(b"}}")
        with connect(server) as connection:  # it waits to be told that it may send
            connection.sendall(head(10, b"Expect: 100-continue", b"Connection: close"))
            assert read_all(connection).startswith(b"HTTP/1.1 429")


def test_what_is_no_http_behind_a_head_is_no_fault_of_the_server(served, eventually, caplog):
    server = served(endless, seconds_per_event=0.02, limits=Limits(max_running=1, max_waiting=0))
    caplog.set_level(logging.INFO)
    with asking(server):
        eventually(lambda: server.doors.num_running == 1)
        for method in (b"POST", b"GET"):  # both are answered without their body
            with connect(server) as connection:
                lines = b" /v1/models HTTP/1.1", b"Host: x", b"Transfer-Encoding: chunked", b"", b"zz", b""
                connection.sendall(method + b"\r\n".join(lines))
                assert read_all(connection).startswith(b"HTTP/1.1 400")
        eventually(lambda: caplog.text.count("route=/v1/models") == 2)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


HOSTILE = {
    "a huge header": head(2, b"X-Long: " + b"x" * 40_000) + b"{}",
    "a path of 40 KB": b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": head(2, *(b"X-%d: %s" % (i, b"y" * 100) for i in range(400))) + b"{}",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n",
    "two lengths": head(2, b"Content-Length: 3") + b"{}",
    "a negative length": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "no chunk": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a path of other bytes": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
}


def test_hostile_heads_end_their_connection_and_nothing_else(served, eventually):
    server = served()
    for name, sent in HOSTILE.items():
        with connect(server) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
            answer = read_all(connection)
            # Where more is sent than is read, the client's system may drop the answer.
            is_long = len(sent) > 30_000
            assert answer.startswith(b"HTTP/1.1 400") or (is_long and answer[:12] in (b"", b"HTTP/1.1 431")), name
    with connect(server) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost")  # and gone
    with connect(server) as connection:
        one = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n"
        connection.sendall((one + b"\r\n") * 2 + one + b"Connection: close\r\n\r\n")
        assert read_all(connection).count(b'"object":"list"') == 3, "pipelined requests are answered each"
    eventually(lambda: server.doors.num_inside == 0)
    assert post(server).json()["choices"][0]["text"] == TEXT


def test_numbers_that_are_none_and_text_that_is_none_are_refused(served):
    server = served()
    for body in (b'{"model": "tiny", "prompt": "x", "top_p": Infinity}', b'{"model": "tiny", "prompt": "\xff\xfe"}'):
        error_of(post(server, body), 400)
    for name in ("../x", "\u202e", "x" * 10_000):
        assert error_of(post(server, ASK | {"model": name}), 404)["param"] == "model"
    assert not server.engine.requests


def test_connections_that_say_nothing_are_ended(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Connection:
        def __init__(self, cycle, *, closing=False):
            self.cycle, self.ended = cycle, []
            self.transport = SimpleNamespace(abort=lambda: self.ended.append(True), is_closing=lambda: closing)

    done, running = SimpleNamespace(response_complete=True), SimpleNamespace(response_complete=False)
    silent, kept, answered = Connection(None), Connection(done), Connection(running)
    stuck = Connection(running, closing=True)
    quiet, all_of_them = QuietConnections(10.0), {silent, kept, answered, stuck}
    for now[0] in (0.0, 6.0):
        quiet.end(all_of_them)
    kept.cycle = SimpleNamespace(response_complete=True)  # it has had another request since
    now[0] = 12.0
    quiet.end(all_of_them)
    assert [bool(each.ended) for each in (silent, kept, answered, stuck)] == [True, False, False, True]


def test_a_client_that_does_not_read_is_given_up(scripted):
    """The answer is left, its pages are free, and the place is given back."""
    pipeline = scripted(endless)
    app = create_app(pipeline, model_name="tiny", operation=Operation(Limits(send_seconds=0.05)))
    sent = []

    async def receive():
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": json.dumps(ASK | {"stream": True}).encode()}
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if len(sent) == 4:
            await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert sent == ["body", "http.response.start", "http.response.body", "http.response.body"]
    assert not pipeline.engine.active and app.state.doors.num_running == app.state.doors.num_inside == 0


# Health.


def get(server, path: str) -> tuple[int, str]:
    response = httpx.get(server.url + path, timeout=20)
    return response.status_code, response.json().get("status")


def test_a_server_answers_before_its_model_is_there(scripted, caplog, eventually):
    starting = Starting("tiny")
    with Server(starting, take_port("127.0.0.1", 0), model_name="tiny", drain_seconds=1) as server:
        with caplog.at_level(logging.INFO, logger="serve"):
            for path, status in (("/health", 503), ("/ready", 503), ("/live", 200)):
                assert get(server, path) == (status, "loading")
        starting.compiled(Compiled("draw", 1.0, 3, 9))
        assert get(server, "/health") == (503, "compiling 4 of 9")
        starting.compiled(Compiled("admit", 1.0, 9, 9))
        assert get(server, "/health") == (503, "compiling 9 of 9")
        with caplog.at_level(logging.INFO, logger="serve"):
            refused = post(server)
            eventually(lambda: len(lines_of(caplog)) == 1)
        assert "not there yet (compiling 9 of 9" in error_of(refused, 503)["message"]
        assert int(refused.headers["Retry-After"]) > 0 and refused.headers["X-Request-Id"]
        server.use(create_app(scripted(TEXT), model_name="tiny"))
        assert get(server, "/health") == (200, "ok") and post(server).status_code == 200


def test_an_engine_that_hangs_is_told(served):
    server = served(stuck_seconds=5)
    server.engine.silent = 4.0
    assert [get(server, path) for path in ("/health", "/ready", "/live")] == [(200, "ok")] * 3
    server.engine.silent = 6.0
    assert [get(server, path) for path in ("/health", "/ready", "/live")] == [(503, "stuck")] * 3
    assert [get(server, f"/v2/health/{path}")[0] for path in ("ready", "live")] == [503, 503]
    assert "not gone on with it for 6 seconds" in httpx.get(f"{server.url}/health").json()["fault"]
    server.engine.silent, server.engine.fault = 0.0, "out of memory"
    assert error_of(post(server), 503)["message"] == "out of memory"
    assert post(server, {"prompt": "x"}, path="/tokenize").status_code == 200
    assert [get(server, path) for path in ("/ready", "/live")] == [(503, "failed")] * 2


# The end.


@pytest.mark.parametrize("stream", [False, True])
def test_answers_under_way_may_finish_while_others_are_refused(served, eventually, stream):
    server = served(endless, seconds_per_event=0.02, drain_seconds=20, limits=Limits(max_running=1, max_waiting=5))
    with asking(server, stream=stream) as running:
        eventually(lambda: server.engine.active)
        with asking(server) as waiting:
            eventually(lambda: server.doors.num_waiting == 1)
            closing = threading.Thread(target=server.close)
            closing.start()
            assert b"503 Service Unavailable" in (answer := waiting.recv(2000)) and b"takes no more" in answer
        assert [get(server, path) for path in ("/health", "/ready")] == [(503, "draining")] * 2
        assert get(server, "/live")[0] == 200 and get(server, "/v2/health/ready")[0] == 503
        refused = post(server)
        assert error_of(refused, 503)["code"] == "unavailable" and refused.headers["Retry-After"]
        server.engine.seconds_per_event = 0  # its answer is soon complete
        whole = read_all(running)
        assert b"200 OK" in whole and (b"[DONE]" in whole) == stream
    closing.join(timeout=20)
    assert not closing.is_alive() and not server.alive


def test_whose_body_came_in_while_the_server_closed_does_not_wait_for_a_place(served, eventually):
    server = served(endless, seconds_per_event=0.02, drain_seconds=20, limits=Limits(max_running=1, max_waiting=5))
    with asking(server) as running, connect(server) as sending:
        eventually(lambda: server.engine.active)
        body = json.dumps(ASK).encode()
        sending.sendall(head(len(body)) + body[:-1])
        eventually(lambda: server.doors.num_inside == 2)
        closing = threading.Thread(target=server.close)
        closing.start()
        eventually(lambda: server.doors.closed is not None)
        sending.sendall(body[-1:])
        assert b"503 Service Unavailable" in (answer := sending.recv(2000)) and b"takes no more" in answer
        server.engine.seconds_per_event = 0
        assert b"200 OK" in read_all(running)
    closing.join(timeout=20)
    assert not closing.is_alive()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_not_complete_in_the_drain_time_says_so(served, eventually, stream):
    server = served(endless, seconds_per_event=0.02, drain_seconds=0.05)
    with asking(server, stream=stream) as running:
        eventually(lambda: server.engine.active)
        if stream:
            running.recv(100)
        server.close()
        rest = read_all(running)
    assert b"the server stops and the answer was not complete" in rest
    assert (b"503 Service Unavailable" in rest) == (not stream) and b"[DONE]" not in rest
    eventually(lambda: not server.engine.active)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "x", "n": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/responses", {"input": "x"}),
    ],
)
def test_an_answer_that_the_engine_does_not_go_on_with_is_none(served, eventually, caplog, path, asked, stream):
    """As where it is closed under the server."""
    server = served(endless, seconds_per_event=0.02)
    with connect(server) as running:
        body = json.dumps({"model": "tiny", "stream": stream} | asked).encode()
        running.sendall(head(len(body), b"Connection: close").replace(b"/v1/completions", path.encode()) + body)
        eventually(lambda: server.engine.active)
        next(iter(server.engine.active)).abort()
        told = read_all(running)
    assert b"the engine was closed before the answer was complete" in told and b'"code": "unavailable"' in told
    if stream:
        last = told.decode().rstrip().rpartition("data: ")[2]
        assert json.loads(last.partition("\n")[0])["error"]["type"] == "server_error" and b"[DONE]" not in told
    else:
        assert told.startswith(b"HTTP/1.1 503") and b"retry-after" in told
    assert b'"finish_reason": "stop"' not in told and b"completed" not in told.replace(b'"completed_at"', b"")
    eventually(lambda: not server.engine.active and server.doors.num_inside == 0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# Keys and origins.


def test_any_of_several_keys_opens_all_but_what_tells_of_the_server(served):
    server = served(api_key=("one", "two"))
    for key in ("one", "two"):
        assert post(server, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"bearer {key}"}).status_code == 200
    for value in ("Bearer three", "Bearer", "Basic one", "one", "Bearer one two", "Bearer onetwo"):
        refused = post(server, headers={"Authorization": value})
        assert error_of(refused, 401)["code"] == "invalid_api_key"
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/openapi.json", "/tokenize", "/nowhere", "/v2x"):
        error_of(httpx.get(server.url + path), 401)
    assert httpx.get(f"{server.url}/v2/models/tiny").status_code == 401
    assert httpx.get(f"{server.url}/v2/models/tiny", headers={"Authorization": "Bearer two"}).status_code == 200
    for path in ("/health", "/ready", "/live", "/v2/health/live"):
        assert httpx.get(server.url + path).status_code == 200


def test_keys_come_from_flags_and_a_file_and_no_error_names_one(tmp_path):
    file = tmp_path / "keys"

    def keys(text: str | None, *flags: str):
        if text is not None:
            file.write_text(text)
            flags = (*flags, "--api-key-file", str(file))
        return read_keys(build_parser().parse_args(["MODEL", *flags]))

    assert keys(None) == ()
    assert keys("sesame\n\n  open \n", "--api-key", "one", "--api-key", "two") == ("one", "two", "sesame", "open")
    for text, flags in (("\n", ()), (None, ("--api-key", "")), ("se same\n", ()), (None, ("--api-key", "a\tsesame"))):
        with pytest.raises(ValueError, match="key") as caught:
            keys(text, *flags)
        assert "same" not in str(caught.value)


def test_numbers_that_leave_nothing_are_refused_where_nothing_would_run(capsys):
    flags = build_parser().parse_args(["MODEL", "--max-sessions", "0", "--max-responses", "0", "--max-waiting", "0"])
    assert (flags.max_sessions, flags.max_responses, flags.max_waiting) == (0, 0, 0)
    for flag, value, said in (
        ("--max-concurrent", "0", "1 or more, given 0"),
        ("--max-waiting", "-1", "0 or more, given -1"),
        ("--drain-seconds", "0", "seconds over 0, given 0"),
    ):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["MODEL", f"{flag}={value}"])
        assert said in capsys.readouterr().err


def test_pages_of_other_origins_may_ask_only_if_they_are_named(served):
    chat = "https://chat.example.org"
    closed, named = served(), served(api_key="key", origins=(chat,))
    assert "Access-Control-Allow-Origin" not in post(closed, headers={"Origin": chat}).headers
    asked = {"Origin": chat, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert httpx.options(f"{closed.url}/v1/completions", headers=asked).status_code == 405
    allowed = httpx.options(f"{named.url}/v1/completions", headers=asked)  # a browser asks this without a key
    assert allowed.status_code == 200 and allowed.headers["Access-Control-Allow-Origin"] == chat
    assert httpx.options(f"{named.url}/v1/completions", headers=asked | {"Origin": "https://x.org"}).status_code == 400
    answer = post(named, headers={"Origin": chat, "Authorization": "Bearer key"})
    assert answer.headers["Access-Control-Allow-Origin"] == chat and answer.status_code == 200


# Ids and the log.


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1.2/3:4", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("", False)]
)
def test_a_request_has_the_id_that_its_client_gave_or_one_of_our_own(served, caplog, eventually, given, kept):
    server = served()
    with caplog.at_level(logging.INFO, logger="serve"):
        response = post(server, headers={"X-Request-Id": given})
        found = response.headers["X-Request-Id"]
        assert found == given if kept else len(found) == 32
        eventually(lambda: f"request={found} " in caplog.text)


def lines_of(caplog) -> list[dict]:
    return [json.loads(JSONLines().format(record)) for record in caplog.records if record.name == "serve"]


def test_the_log_has_one_line_of_every_request_and_never_what_was_said(served, caplog, eventually):
    server = served(api_key="s3same")
    key = {"Authorization": "Bearer s3same"}
    with caplog.at_level(logging.INFO, logger="serve"):
        post(server, ASK | {"user": "ada\nx", "n": 2}, headers=key)
        post(server, ASK | {"stream": True}, headers=key)
        post(server, ASK | {"temperature": -1}, headers=key)
        post(server, headers={"Authorization": "Bearer s3cret"})
        httpx.get(f"{server.url}/v1/models/tiny", headers=key)
        httpx.get(f"{server.url}/nowhere/SECRET", headers=key)
        httpx.get(f"{server.url}/health")
        eventually(lambda: len(lines_of(caplog)) == 6)
    whole, stream, wrong, refused, model, nowhere = lines = lines_of(caplog)
    assert [line["route"] for line in lines] == ["/v1/completions"] * 4 + ["/v1/models/{name:path}", "other"]
    assert [line["status"] for line in lines] == [200, 200, 400, 401, 200, 404]
    assert whole["user"] == "ada\nx" and whole["finish"] == "stop,stop" and whole["n"] == 2
    assert whole["completion"] == 2 * stream["completion"] > 0 and whole["prompt"] == stream["prompt"] > 0
    assert (whole["outcome"], stream["outcome"]) == ("answered", "streamed") and whole["seconds"] > 0
    assert "completion" not in wrong and len({line["request"] for line in lines}) == 6
    texts = [TextLines("%(message)s").format(record) for record in caplog.records if record.name == "serve"]
    assert "user='ada\\nx'" in texts[0] and not any("\n" in text for text in texts)
    for word in ("SECRET", TEXT, "s3same", "s3cret", "nowhere"):
        assert word not in caplog.text and word not in str(lines)


@pytest.mark.parametrize("name", ["user", "safety_identifier"])
def test_a_name_in_the_log_is_short(served, caplog, eventually, name):
    server = served()
    turn = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    text = {"model": "tiny", "prompt": "hi", "input": "hi"}
    paths = {"chat/completions": turn, "responses": {"model": "tiny", "input": "hi"}}
    if name == "user":
        paths |= {path: {key: text[key] for key in ("model", field)} for path, field in _WITH_USER.items()}
    with caplog.at_level(logging.INFO, logger="serve"):
        for path, body in paths.items():
            error = error_of(post(server, body | {name: "x" * 513}, path=f"/v1/{path}"), 400)
            assert (error["param"], error["code"]) == (name, "invalid_value"), path
        assert post(server, turn | {name: "y" * 512}, path="/v1/chat/completions").status_code == 200
        eventually(lambda: len(lines_of(caplog)) == len(paths) + 1)
    assert lines_of(caplog)[-1]["user"] == "y" * 512 and "xxx" not in caplog.text


_WITH_USER = {"completions": "prompt", "embeddings": "input"}


def test_what_clients_send_is_logged_only_where_it_is_asked_for(served, caplog, eventually):
    server = served(log_prompts=True)
    with caplog.at_level(logging.INFO, logger="serve"):
        post(server)
        post(server, b"\xff" * 30_000)
        eventually(lambda: len(lines_of(caplog)) == 2)
    first, second = lines_of(caplog)
    assert json.loads(first["text"]) == ASK and second["text"] == "\ufffd" * 20_000


def test_errors_in_the_log_name_their_request(served, caplog):
    server = served(lambda request: [70])  # ends with neither stop nor length
    with caplog.at_level(logging.INFO, logger="serve"):
        error_of(post(server, headers={"X-Request-Id": "mine"}), 500)
    (failed,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert failed.exc_info and "failed" in failed.getMessage()
