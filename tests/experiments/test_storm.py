"""The storm: a short one over a real server, and that each of its demands can fail."""

import asyncio
import contextlib
import json
from collections import Counter

import pytest

from experiments.benchmarks import storm
from experiments.benchmarks.storm_checks import Fault, Figures, checks, fault_of, new_tally, series_of, told
from experiments.benchmarks.storm_client import PLACES, Exchange, Heard, exchange
from experiments.benchmarks.storm_traffic import Case, Served, Step, case, post
from internjax.hf.open import open_model
from serve.operation.guards import Limits, Operation
from serve.pipeline import Pipeline
from serve.server import start_server

SERVED = Served("tiny", frozenset({"/v1/sessions", "/v1/responses", "/tokenize", "/v2", "grpc"}), 1 << 20)
ENVELOPE = json.dumps({"error": {"message": "no", "type": "t", "param": None, "code": None}}).encode()


def test_a_short_storm_over_a_real_server(tmp_path, capsys):
    """In this process, whose start takes longer than the storm."""
    storm.write_model(tmp_path / "tiny")
    output = tmp_path / "storm.json"
    operation = Operation(Limits(body_bytes=1 << 20, max_running=24, max_waiting=8))
    with Pipeline(open_model(tmp_path / "tiny"), num_slots=4, num_pages=48) as pipeline:
        with start_server(pipeline, model_name="tiny", grpc_port=0, operation=operation) as server:
            where = ["--url", server.url, "--grpc", server.grpc_address, "--max-body", "1"]
            status = storm.main([*where, "--requests", "120", "--seconds", "60", "--output", str(output)])
            shown = capsys.readouterr().out
            assert storm.main([*where, "--only", "7"]) == 0
    assert status == 0 and "ok          no hangs" in shown, shown
    result = json.loads(output.read_text())
    assert {check["name"] for check in result["checks"] if check["passed"]} == {
        "no undeclared 5xx",
        "no hangs",
        "errors have their envelope",
        "answers are as asked for",
        "pages and slots are back",
        "nothing runs or waits",
        "nothing was compiled",
        "/metrics tell what was sent",
        "greedy tokens are the same",
        "sessions are gone",
    }
    assert result["sent"]["sort: good"] > 30 and result["statuses"]["200"] > 20 and result["statuses"]["400"] > 10
    assert "request 7 of seed 0" in capsys.readouterr().out


def test_traffic_is_a_function_of_the_seed_and_what_is_served():
    cases = [case(number, SERVED, seed=3) for number in range(1500)]
    again = [case(number, SERVED, seed=3) for number in range(1500)]
    assert [[step.asked for step in one.steps] for one in cases] == [
        [step.asked for step in one.steps] for one in again
    ]
    assert case(5, SERVED, seed=3) != case(5, SERVED, seed=4)
    sorts = Counter(one.sort for one in cases)
    assert 350 < sorts["malformed"] < 550 and 350 < sorts["left"] < 550
    assert {step.asked.leaves for one in cases for step in one.steps} == {None, *PLACES}
    assert {"session", "response", "grpc", "guided", "no HTTP", "large body"} <= {one.kind for one in cases}
    less = SERVED._replace(paths=frozenset())
    assert not {"session", "grpc", "kserve", "no session"} & {case(n, less, seed=3).kind for n in range(500)}


def test_turns_of_a_session_are_to_be_answered_unless_one_before_was_left():
    found = Counter()
    for number in range(3000):
        one = case(number, SERVED, seed=3)
        if one.kind == "session":
            left = [index for index, step in enumerate(one.steps) if step.asked.leaves is not None]
            for index, step in enumerate(one.steps):
                is_behind = bool(left) and index > left[0] and step.asked.method != "GET"
                assert step.wants == ("either" if is_behind else "answer"), step
                found[step.asked.path.partition("@")[0], step.wants] += 1
    paths = ("/v1/chat/completions", "/v1/sessions/")
    assert all(found[path, wants] > 10 for path in paths for wants in ("answer", "either")), found


# --- an answer --------------------------------------------------------------------------------------------------------

ASKED = post("/v1/completions", {})
GOOD = Step(ASKED, num_choices=1)
CHOICE = {"index": 0, "text": "ab", "finish_reason": "stop"}


def heard(status, body=ENVELOPE, **headers) -> Heard:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Heard("complete", status, headers, body)


def stream(*events) -> Heard:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    return Heard("complete", 200, {"content-type": "text/event-stream"}, body)


@pytest.mark.parametrize(
    ("step", "came", "what"),
    [
        (GOOD, heard(200, {"choices": [CHOICE]}), None),
        (GOOD, heard(200, b"{"), "no JSON"),
        (GOOD, heard(200, {"choices": []}), "1 answers were asked for"),
        (GOOD, heard(200, {"choices": [CHOICE | {"finish_reason": None}]}), "ends with"),
        (GOOD, heard(200, {"choices": [CHOICE | {"finish_reason": "aborted"}]}), "ends with"),
        (GOOD._replace(follows=str.isdigit), heard(200, {"choices": [CHOICE]}), "does not follow"),
        (GOOD, heard(500), "status 500"),
        (GOOD, heard(503), "without Retry-After"),
        (GOOD, heard(503, **{"retry-after": "2"}), None),
        (GOOD, heard(429, b"busy", **{"retry-after": "2"}), "envelope"),
        (GOOD, heard(400), "refused with 400"),
        (GOOD, heard(302), "status 302"),
        (GOOD, Heard("hung", why="no end"), "hung"),
        (GOOD, Heard("broken", why="reset"), "the connection broke"),
        (GOOD, Heard("left", 500), "status 500"),
        (GOOD, Heard("left", 200), None),
        (Step(ASKED, "refusal"), heard(400), None),
        (Step(ASKED, "refusal"), heard(400, b"no"), "envelope"),
        (Step(ASKED, "refusal"), heard(400, {"error": "no"}), "envelope"),
        (Step(ASKED, "refusal"), heard(200, {}), "should be refused"),
        (Step(post("/v2/x", {}), "refusal"), heard(400, {"error": "no"}), None),
        (Step(ASKED, "either"), heard(422, {"detail": []}), "envelope"),
        (Step(ASKED, "closed"), Heard("broken"), None),
        (Step(ASKED, "closed"), heard(200, {}), "should be refused"),
        (GOOD._replace(is_stream=True), stream({"choices": [CHOICE]}, "[DONE]"), None),
        (GOOD._replace(is_stream=True), stream({"choices": [CHOICE]}), "does not end with"),
        (GOOD._replace(is_stream=True), stream({"error": {"message": "x"}}), "ends with an error"),
        (GOOD._replace(is_stream=True), stream("{", "[DONE]"), "no JSON"),
        (GOOD._replace(is_stream=True), stream({"choices": [CHOICE, CHOICE]}, "[DONE]"), "ends with"),
        (GOOD._replace(is_stream=True), heard(200, {"choices": [CHOICE]}), "none came"),
    ],
)  # fmt: skip
def test_answers_are_judged(step, came, what):
    found = fault_of(step, came)
    assert found is None if what is None else what in found, found


# --- figures ----------------------------------------------------------------------------------------------------------

METRICS = """# HELP internjax_pages_free x
internjax_pages_free{replica="0"} 30.0
internjax_pages_free{replica="1"} 18.0
internjax_pages_used{replica="0"} 0.0
internjax_programs_compiled{replica="0"} 8.0
internjax_answers_running{replica="0"} 0.0
internjax_http_requests_total{method="GET",route="/",status="200"} 5.0
internjax_http_requests_total{method="POST",route="/x",status="200"} 1e1
internjax_grpc_requests_total{code="OK",method="ModelInfer"} 0.0
internjax_generated_tokens_total{replica="0"} 100.0
internjax_answers_total{finish="error",replica="0"} 0.0
"""
START = Figures(series_of(METRICS), rss_bytes=100_000_000, threads=30, files=20)
TOKENS = [["a", "b"]]


def with_series(**changes) -> Figures:
    grown = {"http_requests_total:200": 17, "generated_tokens_total": 108}
    return START._replace(series=START.series | grown | {key.replace("__", ":"): v for key, v in changes.items()})


def tally_of(*faults):
    tally = new_tally()
    for status, tokens in ((200, 5), (200, 3)):
        answer = {"choices": [CHOICE], "usage": {"completion_tokens": tokens}}
        told(tally, Case(0, "k", "good", (GOOD,)), 0, GOOD, heard(status, answer))
    tally.faults.extend(Fault(7, "k", 0, what) for what in faults)
    return tally


def failed(tally=None, end=None, **more) -> set[str]:
    given = {"tokens": (TOKENS, TOKENS), "sessions_left": 0, "log": ""} | more
    found = checks(tally or tally_of(), START, START, end or with_series(), **given)
    return {check.name for check in found if check.passed is False}


def test_series_are_summed_and_told_by_status():
    assert START.series["pages_free"] == 48 and START.series["http_requests_total"] == 15
    assert START.series["http_requests_total:200"] == 15 and START.series["answers_total:error"] == 0


def test_each_demand_can_fail_and_fails_alone():
    assert failed() == set()
    for what, name in (
        ("status 500: x", "no undeclared 5xx"),
        ("hung: no end", "no hangs"),
        ("status 400 without an error's envelope", "errors have their envelope"),
        ("the connection broke", "answers are as asked for"),
    ):
        assert failed(tally_of(what)) == {name}
    for changes, name in (
        ({"pages_free": 47}, "pages and slots are back"),
        ({"answers_running": 1}, "nothing runs or waits"),
        ({"programs_compiled": 9}, "nothing was compiled"),
        ({"http_requests_total__200": 16}, "/metrics tell what was sent"),
        ({"http_requests_total__500": 1}, "/metrics tell what was sent"),
        ({"generated_tokens_total": 107}, "/metrics tell what was sent"),
        ({"answers_total__error": 1}, "/metrics tell what was sent"),
        ({"grpc_requests_total__OK": 1}, "/metrics tell what was sent"),
    ):
        assert failed(end=with_series(**changes)) == {name}
    for changes, name in (
        ({"rss_bytes": 102_000_001}, "memory stays"),
        ({"threads": 41}, "threads end"),
        ({"files": 21}, "files are closed"),
    ):
        assert failed(end=with_series()._replace(**changes)) == {name}
    assert failed(tokens=(TOKENS, [["a", "c"]])) == failed(tokens=([[]], [[]])) == {"greedy tokens are the same"}
    assert failed(sessions_left=1) == {"sessions are gone"}
    assert failed(log="Traceback (most recent call last):\n  x") == {"no traceback in the log"}


# --- the client, against servers that misbehave -----------------------------------------------------------------------

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


async def _with_server(answer: bytes, *exchanges: Exchange, hangs=False, seconds=20.0) -> list[Heard]:
    """What is heard from a server that says the same to all, then closes, or hangs."""
    held = []

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        held.append(writer)
        if not hangs:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        return [await exchange(each, url, seconds=seconds) for each in exchanges]
    finally:
        server.close()
        for writer in held:
            writer.close()


@pytest.mark.parametrize(
    ("answer", "end", "status"),
    [
        (ANSWER, "complete", 200),
        (ANSWER[:-1], "broken", 200),
        (b"", "broken", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "complete", 200),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", "broken", 200),
    ],
)
def test_the_client_hears_how_an_answer_ends(answer, end, status):
    (came,) = asyncio.run(_with_server(answer, ASKED))
    assert (came.end, came.status) == (end, status) and (end != "complete" or came.json() == {})


def test_a_server_that_says_nothing_hangs():
    (came,) = asyncio.run(_with_server(b"", ASKED, hangs=True, seconds=0.05))
    assert came.end == "hung" and fault_of(GOOD, came).startswith("hung")


def test_clients_leave_at_every_place():
    left = [ASKED._replace(leaves=place, when=0.3) for place in PLACES]
    assert {came.end for came in asyncio.run(_with_server(ANSWER, *left))} == {"left"}
