"""Embeddings of a language model and scores of a reward model, over REST, against the core computed by hand."""

import base64
import contextlib
import dataclasses
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from internjax import sharding
from internjax.decode.embed import row_widths
from internjax.hf.save import save_model
from internjax.model import decoder, rope
from internjax.rlhf.reward import from_lm, get_score
from internjax.text.chat import render
from internjax.text.message import Message
from internjax.text.tokenizer import REWARD, Tokenizer
from serve import __main__ as command
from serve import pipeline as pipeline_module
from serve.flags import OF_TEXT
from serve.pipeline import Pipeline
from serve.rest import scores
from serve.rest.batches import batches_of, in_order, portions
from serve.rest.embeddings import Embedder
from serve.rest.scores import Scorer
from serve.server import start_server
from tests.serve.conftest import ScriptedEngine

TEXTS = ["def gcd(a, b):", "The answer is 6, héllo 你好. " * 12, ""]


def serving(model):
    return start_server(model, model_name="tiny", drain_seconds=1)


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(tiny_model):
    with Pipeline(tiny_model, num_slots=1, max_context=256) as pipeline:
        with serving(pipeline) as server, client_of(server) as client:
            yield client


@pytest.fixture(scope="module")
def reward_model(tiny_model):
    params, config = from_lm(tiny_model.params, tiny_model.config, jax.random.key(1))
    return dataclasses.replace(tiny_model, params=params, config=config)


@pytest.fixture(scope="module")
def rewarding(reward_model):
    scorer = Scorer(reward_model, conditions={"kind": "Be kind."}, max_context=128)
    with serving(scorer) as server, client_of(server) as client:
        yield client


def by_hand(model, ids) -> np.ndarray:
    """The mean of the last hidden states of one row, without padding and without the first token."""
    inv_freq_BF = rope.inv_freq(model.config, length=len(ids))[None]
    with sharding.use(sharding.mesh_of(model.params)):
        out = decoder.forward(model.params, jnp.asarray([ids]), config=model.config, inv_freq_BF=inv_freq_BF)
    mean = np.asarray(out.hidden_BTD[0, min(1, len(ids) - 1) :]).mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_vectors_are_the_mean_of_the_last_states_in_both_encodings(client, tiny_model, tokenizer):
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    for entry, each in zip(answer.data, ids, strict=True):
        np.testing.assert_allclose(entry.embedding, by_hand(tiny_model, each), atol=2e-6)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    assert answer.usage.total_tokens == sum(map(len, ids))
    packed = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="base64")
    found = [np.frombuffer(base64.b64decode(entry.embedding), "<f4") for entry in packed.data]
    np.testing.assert_array_equal(found, np.float32([entry.embedding for entry in answer.data]))
    alone = client.embeddings.create(model="tiny", input=ids[0], dimensions=32)  # as the client asks by itself
    np.testing.assert_allclose(alone.data[0].embedding, answer.data[0].embedding, atol=2e-6)
    assert client.embeddings.create(model="tiny", input=[ids[0], [5]]).data[1].index == 1


def test_a_program_for_each_width_and_no_more(tiny_model, tokenizer):
    embedder = Embedder(tiny_model, longest=256)
    texts = [[1, *tokenizer.encode(text)] for text in TEXTS]
    first = embedder(texts)
    count = embedder.num_compiled
    assert 1 <= count <= 3 == len(row_widths(tiny_model.config, 256))
    np.testing.assert_allclose(embedder([texts[0]] * 20 + [texts[1][:200]])[19], first[0], atol=2e-6)
    assert embedder.num_compiled == count
    assert row_widths(tiny_model.config, 300) == (64, 128, 256, 300)
    assert row_widths(tiny_model.config, 100) == (64, 100)


@pytest.mark.parametrize(
    ("extra", "param", "status"),
    [
        ({"dimensions": 8}, "dimensions", 400),
        ({"encoding_format": "hex"}, "encoding_format", 400),
        ({"input": []}, "input", 400),
        ({"input": [[5] * 257]}, "input", 400),
        ({"input": [[9999]]}, "input", 400),
        ({"input": "x", "n": 1}, "n", 400),
        ({"model": "other"}, "model", 404),
    ],
)
def test_what_cannot_be_embedded_is_refused(client, extra, param, status):
    response = httpx.post(f"{client.base_url}embeddings", json={"model": "tiny", "input": "x"} | extra)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_room_for_the_longest_text_is_left_beside_the_pages(tiny_model, monkeypatch):
    seen = []

    class Planned(Exception):
        pass

    def plan(config, **sizes):
        seen.append(sizes["longest_embedding"])
        raise Planned

    monkeypatch.setattr(pipeline_module, "fitting_pages", plan)
    monkeypatch.setattr(pipeline_module, "_memory_bytes", lambda: 1 << 30)
    for asked in (None, 64, 1000, 0):
        with pytest.raises(Planned):
            Pipeline(tiny_model, max_context=128, longest_embedding=asked)
    assert seen == [128, 64, 128, 0]


def test_vectors_of_shorter_texts_than_the_context_or_of_none(tiny_model, tokenizer):
    pipeline = Pipeline.over(ScriptedEngine(None), tokenizer, model=tiny_model)
    for longest, said in ((64, "an input has 65 tokens, of up to 64 there are vectors"), (0, "it was started without")):
        pipeline.longest_embedding = longest
        with serving(pipeline) as server:
            response = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": [5] * 65})
            assert response.status_code == 400 and said in response.json()["error"]["message"]


def test_an_input_that_cannot_fit_is_refused_before_it_is_tokenised(client):
    body = {"model": "tiny", "input": ["x", "a" * 100_000]}
    error = httpx.post(f"{client.base_url}embeddings", json=body).json()["error"]
    assert "100000 characters" in error["message"] and error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("part", ["embeddings", "scores"])
def test_programs_that_are_compiled_at_first_use_are_counted(tiny_model, reward_model, tokenizer, part):
    def num_programs() -> list[float]:
        text = httpx.get(f"{server.url}/metrics").text
        names = ("programs_compiled", "recompiled_programs_total")
        of_part = [f'internjax_{name}{{replica="{part}"}} ' for name in names]
        return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(tuple(of_part))]

    def ask(text: str) -> None:
        body = {"input": text} if part == "embeddings" else {"pairs": [{"prompt": text, "answer": "b"}]}
        route = "embeddings" if part == "embeddings" else "score"
        assert httpx.post(f"{server.url}/v1/{route}", json={"model": "tiny"} | body, timeout=60).status_code == 200

    of_text = Pipeline.over(ScriptedEngine(None), tokenizer, model=tiny_model)
    with serving(of_text if part == "embeddings" else Scorer(reward_model)) as server:
        assert num_programs() == [0, 0]
        for text, count in (("x", 1), ("y", 1), ("two numbers" * 30, 2), ("z", 2)):
            ask(text)
            assert num_programs() == [count, count]


class Gate:
    """In the place of `read` of an Embedder or a Scorer: what is read waits to be let through, one at a time."""

    def __init__(self, monkeypatch, kind):
        self.num_begun, self._read, self._passes = 0, kind.read, threading.Semaphore(0)
        monkeypatch.setattr(kind, "read", lambda *arguments: self._wait(*arguments))

    def _wait(self, *arguments):
        self.num_begun += 1
        assert self._passes.acquire(timeout=20)
        return self._read(*arguments)

    def let(self, count: int) -> None:
        self._passes.release(count)


@pytest.fixture(params=["embeddings", "scores"])
def long_work(request, monkeypatch, tiny_model, reward_model, tokenizer):
    """(what is served, a gate before each of its batches, the route, a body that is read in ten batches)"""
    if request.param == "embeddings":
        pipeline = Pipeline.over(ScriptedEngine(None), tokenizer, model=tiny_model)
        return pipeline, Gate(monkeypatch, Embedder), "embeddings", {"model": "tiny", "input": ["x"] * 80}
    pairs = [{"prompt": "a", "answer": "b"}] * 80
    return Scorer(reward_model), Gate(monkeypatch, Scorer), "score", {"model": "tiny", "pairs": pairs}


@contextlib.contextmanager
def asking(server, route, body):
    """A connection on which a request was sent."""
    sent = json.dumps(body).encode()
    head = (
        f"POST /v1/{route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head.encode() + sent)
        yield connection


def test_who_leaves_is_not_read_for_any_more(long_work, eventually, caplog):
    served, gate, route, body = long_work
    with serving(served) as server, caplog.at_level(logging.INFO, logger="serve"):
        doors = server._app.state.doors
        with asking(server, route, body):
            eventually(lambda: gate.num_begun == 1)
        gate.let(1)
        eventually(lambda: doors.num_inside == 0)
        assert gate.num_begun == 1
        eventually(lambda: "client gone" in caplog.text)
        gate.let(10)
        assert len(httpx.post(f"{server.url}/v1/{route}", json=body, timeout=20).json()["data"]) == 80
        assert gate.num_begun == 11


def test_requests_take_turns(long_work, eventually):
    served, gate, route, body = long_work
    with serving(served) as server, ThreadPoolExecutor(2) as pool:
        long = pool.submit(httpx.post, f"{server.url}/v1/{route}", json=body, timeout=20)
        eventually(lambda: gate.num_begun == 1)
        few = {name: given if name == "model" else given[:1] for name, given in body.items()}
        short = pool.submit(httpx.post, f"{server.url}/v1/{route}", json=few, timeout=20)
        eventually(lambda: gate.num_begun == 2)
        gate.let(4)
        assert len(short.result().json()["data"]) == 1 and not long.done()
        gate.let(7)
        assert len(long.result().json()["data"]) == 80 and gate.num_begun == 11


def test_the_end_of_a_server_does_not_wait_for_what_is_read(long_work, eventually):
    served, gate, route, body = long_work
    server = start_server(served, model_name="tiny", drain_seconds=0.1)
    with asking(server, route, body) as connection:
        eventually(lambda: gate.num_begun == 1)
        server.close()  # while the first batch is still read
        assert connection.recv(1000).startswith(b"HTTP/1.1 503") and not server.alive
    gate.let(10)
    assert gate.num_begun == 1


def test_texts_are_read_in_few_batches_and_tokenised_in_portions():
    lengths = [64, 1, 65, 4096, 64, 2048, 1000] + [3] * 8
    found = batches_of(lengths, (64, 128, 2048, 4096))
    assert [(batch.width, batch.places) for batch in found] == [
        (64, [0, 1, 4, 7, 8, 9, 10, 11]), (64, [12, 13, 14]), (128, [2]), (2048, [5, 6]), (4096, [3])
    ]  # fmt: skip
    values = in_order(found, [np.array(batch.places) for batch in found])
    assert values.tolist() == [*range(15)]
    assert portions(["aa", "b", "cccc", "d", "", "eee"], len, most=3) == [["aa", "b"], ["cccc"], ["d", ""], ["eee"]]
    assert portions([], len) == []


def scored(client, **fields) -> list[float]:
    answer = client.post("score", body={"model": "tiny"} | fields, cast_to=object)
    assert [entry["index"] for entry in answer["data"]] == [*range(len(answer["data"]))]
    return [entry["score"] for entry in answer["data"]]


def test_scores_are_the_reward_model_s_under_the_condition(rewarding, reward_model, tokenizer):
    def expected(prompt, answer, *before):
        turns = [*before, Message("user", prompt), Message("assistant", answer)]
        ids = render(turns, tokenizer).ids
        how = {"config": reward_model.config, "reward_token_id": tokenizer.special[REWARD]}
        with sharding.use(sharding.mesh_of(reward_model.params)):
            return get_score(reward_model.params, ids, **how)

    pairs = [("hi", "The answer is 6"), ("a longer prompt " * 5, "no"), ("hi", "two numbers")]
    asked = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    plain = scored(rewarding, pairs=asked)
    np.testing.assert_allclose(plain, [expected(*pair) for pair in pairs], atol=1e-5)
    kind = scored(rewarding, pairs=asked, condition="kind")
    before = Message("system", "Be kind.")
    np.testing.assert_allclose(kind, [expected(*pair, before) for pair in pairs], atol=1e-5)
    assert not np.allclose(kind, plain, atol=1e-5) and len({*plain}) == 3
    assert scored(rewarding, pairs=asked, condition_prompt="Be kind.") == kind
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is 6"}]
    np.testing.assert_allclose(scored(rewarding, messages=turns), plain[:1], atol=1e-5)
    assert [model.id for model in rewarding.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({}, "messages"),
        ({"pairs": [{"prompt": "a", "answer": "b"}], "condition": "rude"}, "condition"),
        ({"pairs": [{"prompt": "a", "answer": "b"}], "condition": "kind", "condition_prompt": "x"}, "condition"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages[0].role"),
        ({"pairs": [{"prompt": "a", "answer": "b " * 300}]}, "pairs"),
        ({"pairs": [{"prompt": "a"}]}, "pairs[0].answer"),
    ],
)
def test_what_cannot_be_scored_is_refused(rewarding, extra, param):
    response = httpx.post(f"{rewarding.base_url}score", json={"model": "tiny"} | extra)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


@pytest.mark.parametrize("field", ["messages", "pairs", "condition_prompt"])
def test_what_no_context_holds_is_refused_before_it_is_scored(rewarding, monkeypatch, field):
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    texts = dict.fromkeys(("messages", "pairs", "condition_prompt"), "x") | {field: "a" * 100_000}
    pairs = [{"prompt": "x", "answer": "x"}, {"prompt": "x", "answer": texts["pairs"]}]
    turns = [{"role": "user", "content": texts["messages"]}, {"role": "assistant", "content": "x"}]
    place, asked = ("messages", turns) if field == "messages" else ("pairs", pairs)
    body = {"model": "tiny", place: asked, "condition_prompt": texts["condition_prompt"]}
    response = httpx.post(f"{rewarding.base_url}score", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, place, "context_length_exceeded")
    assert "characters; the context holds 128 tokens" in error["message"]


def test_each_kind_of_model_refuses_what_the_other_does(client, rewarding, tiny_model):
    with pytest.raises(openai.BadRequestError, match="tiny gives text, and scores come from a reward model"):
        scored(client, pairs=[{"prompt": "a", "answer": "b"}])
    for ask in (
        lambda: rewarding.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}]),
        lambda: rewarding.completions.create(model="tiny", prompt="x"),
        lambda: rewarding.responses.create(model="tiny", input="x"),
        lambda: rewarding.embeddings.create(model="tiny", input="x"),
    ):
        with pytest.raises(openai.BadRequestError, match="tiny is a reward model"):
            ask()
    with pytest.raises(ValueError, match="scalar"):
        Scorer(tiny_model)


def test_a_reward_model_that_hangs_or_whose_device_is_lost_is_told(reward_model, monkeypatch, eventually):
    """As an engine is: what is computed for long is stuck; a batch that fails is an error, a lost device the end."""
    now, hanging, scorer = [100.0], threading.Event(), Scorer(reward_model, max_context=128)
    score = scorer._compute
    monkeypatch.setattr(scores, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def status(server, path="health") -> tuple[int, str]:
        response = httpx.get(f"{server.url}/{path}")
        return response.status_code, response.json()["status"]

    def hang(*arguments, **how):
        hanging.set()
        go_on.wait(20)
        return score(*arguments, **how)

    with serving(scorer) as server, client_of(server) as client:
        asked = {"model": "tiny", "pairs": [{"prompt": "a", "answer": "b"}]}
        now[0] = 1000.0
        assert status(server) == (200, "ok"), "nothing is computed: it may be silent"
        go_on = threading.Event()
        monkeypatch.setattr(scorer, "_compute", hang)
        asking = threading.Thread(target=lambda: scored(client, pairs=asked["pairs"]))
        asking.start()
        hanging.wait(20)
        assert status(server) == (200, "ok")
        now[0] += 121.0
        assert [status(server, path) for path in ("health", "ready", "live")] == [(503, "stuck")] * 3
        go_on.set()
        asking.join(timeout=20)
        assert status(server) == (200, "ok")

        def fail(*arguments, **how):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(scorer, "_compute", fail)
        assert httpx.post(f"{client.base_url}score", json=asked).status_code == 500
        assert status(server) == (200, "ok"), "the device computes: another batch may fit"
        monkeypatch.setattr(scores.jax, "device_put", fail)
        assert httpx.post(f"{client.base_url}score", json=asked).status_code == 500
        assert [status(server, path) for path in ("ready", "live")] == [(503, "failed")] * 2
        refused = httpx.post(f"{client.base_url}score", json=asked)
        assert refused.status_code == 503 and "the device computes no more" in refused.text


def test_the_command_serves_a_reward_model(reward_model, tiny_model, tmp_path, capsys, monkeypatch):
    for name, model in (("reward", reward_model), ("text", tiny_model)):
        save_model(tmp_path / name, config=model.config, params=model.params, tokenizer=model.tokenizer)
    flags = ["--condition", "kind=Be kind.", "--max-context", "128"]
    parse = command.build_parser().parse_args
    scorer = command.open_served(parse([str(tmp_path / "reward"), *flags]))
    assert isinstance(scorer, Scorer) and scorer.conditions == {"kind": "Be kind."}
    assert "up to 128 tokens; conditions: kind" in capsys.readouterr().out
    turns = [Message("user", "hi"), Message("assistant", "no")]
    ours = Scorer(reward_model, max_context=128)
    assert scorer([scorer.ids_of(turns)]) == pytest.approx(ours([ours.ids_of(turns)]), abs=1e-6)
    with pytest.raises(ValueError, match="is for a reward model"):
        command.open_served(parse([str(tmp_path / "text"), *flags]))
    of_text = {"--kv": "int8", "--mode": "exact", "--drafts": 3, "--max-batch": 4, "--num-pages": 9, "--page-size": 8}
    of_text |= {"--host-memory": 1, "--max-adapters": 1, "--adapter-rank": 4, "--adapter": "a=b", "--adapter-root": "x"}
    of_text |= {"--speculate": "lookup", "--replicas": 2, "--grpc-port": 0, "--max-embedding": 9, "--max-pause": 9}
    of_text |= {"--max-sessions": 9, "--session-seconds": 9, "--max-responses": 9, "--response-seconds": 9}
    of_text |= {"--response-memory": 1, "--paged-attention": "mosaic"}
    assert {flag.removeprefix("--").replace("-", "_") for flag in of_text} == {*OF_TEXT}
    monkeypatch.setattr(command, "open_weights", lambda args: reward_model)
    for flag, value in of_text.items():
        with pytest.raises(ValueError, match=f"there is no {flag}; leave it out"):
            command.open_served(parse([str(tmp_path / "reward"), f"{flag}={value}"]))
    with pytest.raises(ValueError, match="there is no --max-batch, --mode"):
        command.open_served(parse([str(tmp_path / "reward"), "--mode", "exact", "--max-batch", "4"]))
