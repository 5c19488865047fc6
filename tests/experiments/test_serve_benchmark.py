"""The contest of servers, with servers from a script: what they say is known, and so is what must be measured."""

import json
import sys

import numpy as np
import pytest

from experiments.benchmarks import serve, serve_clients
from experiments.benchmarks.serve_clients import Contest, Failed, Service
from internjax.model.config import ModelConfig
from internjax.report import page

SMALL = ModelConfig(
    vocab_size=400, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, ffn_dim=16, dtype="float32"
)
# Says a word for every token that is asked for, three at once. argv: what it does beside, and when.
SERVER = """
import http.server, json, os, sys
does, when, asked = sys.argv[1], int(sys.argv[2]), 0
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        self.whole({}, 200 if self.path == "/health" else 404)
    def whole(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def part(self, text):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(text), text))
    def event(self, delta, finish=None):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\\n\\n"
    def do_POST(self):
        global asked
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/sessions":
            return self.whole({"id": "s1"})
        asked += 1
        if does == "ends" and asked > when:
            print("no memory", flush=True)
            os._exit(3)
        if does == "refuses" and asked > when:
            return self.whole({"detail": "busy"}, 503)
        num = body["max_tokens"] - (does == "early" and asked > when)
        words = [f" {'x' if does == 'differs' else body['messages'][-1]['content'].split()[0]}" for _ in range(num)]
        if not body.get("stream"):
            usage = {"prompt_tokens": len(body["messages"]), "completion_tokens": num}
            return self.whole({"choices": [{"message": {"content": "".join(words)}}], "usage": usage})
        if "session_id" in body:
            assert len(body["messages"]) == 1
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.part(self.event({"role": "assistant", "content": ""}))
        for index in range(0, num, 3):
            self.part(b"".join(self.event({"content": word}) for word in words[index:index + 3]))
        self.part(self.event({}, "length") + b"data: [DONE]\\n\\n")
        self.part(b"")
        self.wfile.flush()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
WORDS = [" ba", " da", " fa", " ga"]
SETTING = serve.Setting(SMALL, prompt=4, new_tokens=6)
NUM_FIRST = 2 * serve.NUM_CHECKED
"""Requests that a contender has answered when its measurement begins."""


def scripted(does: str = "answers", when: int = 0) -> Service:
    return Service([sys.executable, "-I", "-S", "-c", SERVER, does, str(when)], "any")


def run(contenders, folder, **sizes):
    sizes = {"clients": [2], "num_blocks": 2, "num_requests": 4, "num_conversations": 0} | sizes
    return serve.run(SETTING, contenders, WORDS, folder, **sizes)


def test_servers_are_measured_and_one_that_ends_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve_clients, "TOGETHER", 0.0)  # the script's parts come faster than any model's tokens
    # "ends" answers the first requests, the two that warm up and one of the first block.
    contenders = {
        serve.OURS: scripted(),
        "transformers": scripted("ends", NUM_FIRST + 3),
        "transformers-batching": scripted(),
    }
    result = run(contenders, tmp_path, num_conversations=1)
    assert result["failed"] == {"transformers": "ended with code 3: no memory"}
    found = result["contenders"][2]
    assert found["transformers"] == {"failed": "ended with code 3: no memory"}
    for who in (serve.OURS, "transformers-batching"):
        each = found[who]
        assert each["tokens_per_arrival"] == 3 and len(each["tokens_per_second_of_blocks"]) == 2
        assert each["pause"]["p50"] == pytest.approx(3 * each["per_token"]["p50"], abs=2e-6)
        assert 0 < each["first_token"]["p50"] <= each["first_token"]["p99"] < 60
        assert each["cpu_seconds_per_1000_tokens"] >= 0
    ours, theirs = (found[who]["tokens_per_second"] for who in (serve.OURS, "transformers-batching"))
    assert list(result["ratio"][2]) == ["transformers-batching"]
    ratio = result["ratio"][2]["transformers-batching"]["seconds per token"]
    assert ratio == pytest.approx(ours / theirs, rel=1e-2)
    conversations = result["conversations"]["contenders"]
    assert set(conversations) == {serve.OURS, serve.BY_SESSION, "transformers-batching"}
    assert all(len(each["ratio"]) == serve.NUM_TURNS and each["ratio"][0] == 1 for each in conversations.values())
    whole = {"hardware": "", "devices": "", "load": 0, "load_after": 0, "python": "", "packages": {}} | result
    shown = page("servers", serve.sections(whole | {"blocks": 2, "requests_per_block": 4, "peer_packages": {}}))
    assert "Time per token" in shown and "ended with code 3" in shown and "First token of a turn" in shown
    assert json.loads(json.dumps(result))["goals"] == result["goals"] and len(result["goals"]) == 3
    assert "transformers failed: ended with code 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("early", "an answer of 6 tokens had 5 and ended with 'length'"),
        ("refuses", '/v1/chat/completions answered 503: {"detail": "busy"}'),
    ],
)
def test_an_answer_that_is_none_ends_its_contender(tmp_path, does, said):
    result = run({serve.OURS: scripted(), "transformers": scripted(does, NUM_FIRST)}, tmp_path, num_requests=2)
    assert result["failed"] == {"transformers": said} and result["ratio"] == {2: {}}
    assert result["contenders"][2][serve.OURS]["tokens_per_second"] > 0
    assert result["goals"] == [
        "goal: ahead of transformers serve at every point: not measured, there is nothing to compare"
    ]


def test_servers_of_different_models_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="transformers and internjax do not serve the same model: request 0 .* x x x"):
        run({serve.OURS: scripted(), "transformers": scripted("differs")}, tmp_path)
    with pytest.raises(SystemExit, match="do not serve the same model"):  # prompts that are read differently
        serve.require_equal_answers({"a": [serve.First(9, " ba")], "b": [serve.First(10, " ba")]})


def test_a_command_that_does_not_start_is_told(tmp_path):
    with Contest({"a": Service([sys.executable, "-c", "import sys; sys.exit('no torch')"], "m")}, tmp_path) as servers:
        assert servers.failed == {"a": "ended with code 1: no torch"}
        assert servers.turns(lambda server: 1) == {}


def test_what_arrives_is_counted_by_its_words():
    def event(text, finish=None):
        return b'data: {"choices":[{"delta":{"content":"%s"},"finish_reason":%s}]}\n\n' % (text, finish or b"null")

    two = event(b" ba") + event(b" da")
    pieces = [(1.0, event(b"")), (1.5, two[:-9]), (2.0, two[-9:] + event(b" fa")), (2.0001, event(b" ga"))]
    pieces.append((3.0, event(b"", b'"length"')))
    answer = serve_clients._read(serve_clients._Raw(0.5, pieces), 4)
    assert answer.text == " ba da fa ga"  # the second event is there when its last byte is
    assert answer.timing.arrivals == (1.5, 2.0) and answer.timing.counts == (1, 3) and answer.timing.first_token == 1.0
    with pytest.raises(Failed, match="broke off: out of memory"):
        serve_clients._read(serve_clients._Raw(0.0, [(1.0, b'data: {"error": "out of memory"}\n\n')]), 3)


def test_where_ours_is_behind_is_said():
    def figures(speed, first, token, pause):
        latency = [dict.fromkeys(("p50", "p95", "p99"), value) for value in (first, token, pause)]
        return {"tokens_per_second": speed, "first_token": latency[0], "per_token": latency[1], "pause": latency[2]}

    found = {
        serve.OURS: figures(100, 0.2, 0.01, 0.02),
        "transformers": figures(50, 0.4, 0.005, 0.03),
        "other": {"failed": "ended"},
    }
    ahead = {8: serve.ratios(found)}
    assert ahead[8] == {
        "transformers": {"seconds per token": 2.0}
        | dict.fromkeys(("first token p50", "first token p99"), 2.0)
        | dict.fromkeys(("per token p50", "per token p95", "per token p99"), 0.5)
        | dict.fromkeys(("pause p50", "pause p95", "pause p99"), 1.5)
    }
    assert serve.losses(ahead)[0] == "8 clients, per token p50: 0.5 of transformers" and len(serve.losses(ahead)) == 3
    (line,) = serve.goals({8: {"transformers": {"seconds per token": 2.0}}}, {})
    assert line.endswith("at every point: yes")
    turns = {serve.BY_SESSION: {"ratio": [1.0, 1.3]}}
    assert list(serve.goals(ahead, turns))[1].endswith(f"at most {serve.SESSION_GOAL}, {serve.BY_SESSION}: no, 1.3")


def test_the_model_draws_words_alone_and_every_word_is_a_token():
    made = serve.word_model(SMALL)
    assert len(made.words) > 20 and all(word[0] == " " and word[1:].isalpha() for word in made.words)
    ids = made.tokenizer.encode("".join(made.words))
    assert len(ids) == len(made.words) and not set(ids) & set(made.tokenizer.special.values())
    kernel = np.asarray(made.params["head"]["kernel"])
    drawn = np.flatnonzero(kernel.any(axis=0))
    assert sorted(ids) == drawn.tolist()
    hidden = np.random.default_rng(0).normal(size=(200, SMALL.d_model))
    assert np.isin((hidden @ kernel).argmax(axis=1), drawn).all()  # no answer ends early
