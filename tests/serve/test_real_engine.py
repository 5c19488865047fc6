"""The whole way with the real engine and a random model: client, HTTP, pipeline, slots, pages, and back."""

import contextlib
import dataclasses
import functools
import json
import queue
import socket
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import httpx
import jax
import numpy as np
import openai
import pytest
import tritonclient.grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from internjax.decode.rounds import Rounds
from internjax.model import decoder
from internjax.text.message import Message
from serve.pipeline import ContextTooLong, Params, Pipeline, chat_callable
from serve.server import start_server

NUM_SLOTS = 4
SIZES = {"num_slots": NUM_SLOTS, "max_context": 128, "tokens_per_dispatch": 2}


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    with Pipeline(tiny_model, **SIZES) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def client(pipeline):
    with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client


def is_idle(pipeline) -> bool:
    stats = pipeline.engine.stats()
    return stats.num_free_pages == stats.num_pages and stats.num_active == stats.num_waiting == 0


def ask(client, index: int) -> str:
    """One of four kinds of request, as text; greedy ones and sampled ones with a seed."""
    kind = index % 4
    sampling = {"temperature": 0.0 if index % 2 else 1.0, "seed": index, "max_tokens": 5 + index}
    if kind == 0:
        return client.completions.create(model="tiny", prompt=f"def f{index}", **sampling).choices[0].text
    if kind == 1:
        stream = client.completions.create(model="tiny", prompt=[7, index], stream=True, **sampling)
        return "".join(chunk.choices[0].text for chunk in stream)
    messages = [{"role": "user", "content": f"number {index}"}]
    if kind == 2:
        return client.chat.completions.create(model="tiny", messages=messages, **sampling).choices[0].message.content
    stream = client.chat.completions.create(model="tiny", messages=messages, stream=True, **sampling)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def test_concurrent_clients_get_what_each_would_get_alone(client, pipeline, eventually):
    alone = [ask(client, index) for index in range(16)]
    assert len(set(alone)) > 8
    num_compiled = pipeline.engine.stats().num_compiled
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: ask(client, index), range(16)))
    assert together == alone
    assert pipeline.engine.stats().num_compiled == num_compiled
    eventually(lambda: is_idle(pipeline))


def figures(client) -> dict:
    """The samples of /metrics by name and labels, as Prometheus' own parser reads them."""
    text = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families) and all(f.documentation for f in families)
    return {
        (sample.name.removeprefix("internjax_"), *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def grown(client, before: dict) -> dict:
    """What has changed, the name and the values of labels joined."""
    after = figures(client)
    return {
        " ".join([name, *(value for _, value in labels)]): value - before.get((name, *labels), 0)
        for (name, *labels), value in after.items()
        if value != before.get((name, *labels), 0) and not name.startswith("process")
    }


def test_metrics_are_what_was_sent_and_what_came_back(client, pipeline, eventually):
    client.completions.create(model="tiny", prompt=[3], max_tokens=1)
    eventually(lambda: is_idle(pipeline))
    before, ids = figures(client), list(range(40, 80))
    for n in (1, 2):  # the second time the prompt's whole pages are there
        answer = client.completions.create(model="tiny", prompt=ids, max_tokens=6, n=n, extra_body={"ignore_eos": True})
        assert answer.usage.completion_tokens == 6 * n
    stopped = client.completions.create(model="tiny", prompt=[70], max_tokens=50, logit_bias={"71": 100}, stop="zz")
    word = stopped.choices[0].text
    client.completions.create(model="tiny", prompt=[70], max_tokens=50, logit_bias={"71": 100}, stop=word[:2])
    httpx.get(f"{client.base_url}models/tiny")
    httpx.get(str(client.base_url).replace("/v1/", "/v2/models/tiny/versions/1"))
    for path in ("a", "b", "c"):
        httpx.request("BREW", f"{client.base_url}{path}")
    eventually(lambda: is_idle(pipeline))
    new = grown(client, before)
    posted = "/v1/completions 200"
    assert new[f"http_requests_total POST {posted}"] == 4 == new["http_request_duration_seconds_count /v1/completions"]
    assert new["http_requests_total GET /v1/models/{name:path} 200"] == 1
    assert new["http_requests_total GET /v2/models/{name:path}/versions/{version} 200"] == 1
    assert new["http_requests_total other other 404"] == 3, "what clients make up is no label"
    assert new["prompt_tokens_total 0"] == 3 * len(ids) + 2
    assert new["prefix_hit_tokens_total 0"] == 2 * (len(ids) - 1)
    assert new["generated_tokens_total 0"] >= 3 * 6 + 50
    assert (new["answers_total length 0"], new["answers_total stop 0"]) == (3 + 1, 1), new
    assert new["time_to_first_token_seconds_count 0"] == new["queue_seconds_count 0"] == 5
    assert new["answer_seconds_count 0"] == 5 and new["answer_seconds_sum 0"] > 0
    assert not any(name.startswith(("recompiled", "preemptions", "programs", "answers_running")) for name in new)
    after = figures(client)
    stats, replica = pipeline.engine.stats(), ("replica", "0")
    assert (
        after["pages", replica] == after["pages_free", replica] == stats.num_pages and after["pages_used", replica] == 0
    )
    assert after["recompiled_programs_total", replica] == after["engine_fault", replica] == 0
    assert after["slots", replica] == NUM_SLOTS and after["adapters",] == 0 == after["requests_running",]
    assert after["info", ("model", "tiny")] == 1 and after["process_resident_memory_bytes",] > 0


def test_metrics_are_consistent_after_aborts(client, pipeline, eventually):
    before = figures(client)
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt="x", stream=True, max_tokens=100, n=6, stop=["\0"])
        next(iter(stream))
        running = figures(client)
        assert running["answers_running", ("replica", "0")] <= NUM_SLOTS and running["requests_running",] == 1
        stream.close()
        eventually(lambda: is_idle(pipeline))
    eventually(lambda: figures(client)["requests_running",] == 0)
    new = grown(client, before)
    ended = {name.split()[1]: count for name, count in new.items() if name.startswith("answers_total")}
    assert sum(ended.values()) == 18 and ended["aborted"] > 0 and "error" not in ended
    assert new["http_requests_total POST /v1/completions 200"] == 3
    assert figures(client)["pages_free", ("replica", "0")] == pipeline.engine.num_pages


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_while_prompts_are_read_or_wait_free_their_pages(
    client, pipeline, eventually, monkeypatch, stream
):
    read, held = Rounds._read_prompts, threading.Event()

    def held_up(self):
        held.wait(20)
        read(self)

    before = figures(client)
    monkeypatch.setattr(Rounds, "_read_prompts", held_up)
    body = json.dumps({"model": "tiny", "prompt": [5] * 40, "max_tokens": 60, "stream": stream, "n": 3}).encode()
    lines = "POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(socket.create_connection((client.base_url.host, client.base_url.port)))
            connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        eventually(lambda: pipeline.engine.stats().num_active + pipeline.engine.stats().num_waiting == 6)
        assert (
            pipeline.engine.stats().num_waiting and pipeline.engine.stats().num_free_pages < pipeline.engine.num_pages
        )
    eventually(lambda: figures(client)["requests_running",] == 0)  # the clients are gone; the engine is held
    held.set()
    eventually(lambda: is_idle(pipeline))
    new = grown(client, before)
    assert new["answers_total aborted 0"] == 6 and "generated_tokens_total 0" not in new


def test_a_stream_that_is_left_frees_its_pages(client, pipeline, eventually):
    stream = client.completions.create(
        model="tiny", prompt="x", stream=True, max_tokens=100, n=NUM_SLOTS, extra_body={"top_k": 0}
    )
    next(iter(stream))
    stream.close()
    eventually(lambda: is_idle(pipeline))


def test_over_grpc_as_in_this_process(pipeline, eventually):
    """The same tokens; a stream of requests that is cancelled, and a call past its deadline, free their pages."""
    prompts, params = ["def f", "The answer is", "6"], Params(max_tokens=12, temperature=0.0)

    def inputs(**given) -> list:
        kinds = {str: ("BYTES", object), int: ("INT32", "i4"), float: ("FP32", "f4"), bool: ("BOOL", "?")}
        found = []
        for name, values in given.items():
            datatype, dtype = kinds[type(values[0])]
            found.append(tritonclient.grpc.InferInput(name, [len(values)], datatype))
            found[-1].set_data_from_numpy(np.array(values, dtype))
        return found

    with start_server(pipeline, model_name="tiny", grpc_port=0, drain_seconds=1) as server:
        with tritonclient.grpc.InferenceServerClient(server.grpc_address) as client:
            answer = client.infer("tiny", inputs(text_input=prompts, max_tokens=[12], temperature=[0.0]))
            assert [text.decode() for text in answer.as_numpy("text_output")] == [
                result.text for result in pipeline(prompts, params)
            ]
            told = queue.Queue()
            client.start_stream(lambda result, error: told.put(error or result))
            asked = inputs(text_input=["x"], max_tokens=[100], stream=[True], ignore_eos=[True])
            for index in range(2 * NUM_SLOTS):
                client.async_stream_infer("tiny", asked, request_id=str(index))
            assert told.get(timeout=20).get_response().outputs
            client.stop_stream(cancel_requests=True)
            eventually(lambda: is_idle(pipeline))
            with pytest.raises(InferenceServerException, match="Deadline"):
                client.infer(
                    "tiny", inputs(text_input=["x"] * 40, max_tokens=[100], ignore_eos=[True]), client_timeout=0.05
                )
            eventually(lambda: is_idle(pipeline))


def test_stop_strings_end_real_answers(pipeline, eventually):
    params = Params(max_tokens=60, temperature=0.0, logprobs=0)
    whole = pipeline.complete("The answer is", params).result()
    assert len(whole.text) > 10 and whole.finish in ("length", "stop")
    assert "".join(token.text for token in whole.tokens) == whole.text
    assert all(token.logprob <= 0 for token in whole.tokens)
    stop = whole.text[4:7]
    cut = pipeline.complete("The answer is", dataclasses.replace(params, stop=(stop,))).result()
    assert (cut.text, cut.stop, cut.finish) == (whole.text[: whole.text.index(stop)], stop, "stop")
    eventually(lambda: is_idle(pipeline))


def test_scoring_clients_get_the_models_own_log_probabilities(client, pipeline, tiny_model):
    """As lm-eval's local-completions asks: ids, echo, one token more, and is the continuation what greedy draws."""
    ids = np.random.default_rng(0).integers(0, tiny_model.config.vocab_size, 90).tolist()
    answer = client.completions.create(
        model="tiny", prompt=[ids, ids[:3]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    logits_TV = jax.jit(functools.partial(decoder.logits, config=tiny_model.config))(tiny_model.params, np.array([ids]))
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV[0]))
    for choice, length in zip(answer.choices, (90, 3)):
        found = choice.logprobs
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
        wanted = [logprobs_TV[i, ids[i + 1]] for i in range(length - 1)]
        np.testing.assert_allclose(found.token_logprobs[1:length], wanted, atol=1e-4)
        best = [max(top.values()) for top in found.top_logprobs[1:]]
        np.testing.assert_allclose(best, logprobs_TV[:length].max(axis=-1), atol=1e-4)
        assert found.token_logprobs[-1] == best[-1], "a greedy token is not the most likely one to the last bit"


def test_banned_and_biased_tokens(pipeline):
    params = Params(max_tokens=30, temperature=0.0)
    free = pipeline.complete("The answer is", params).result()
    word = free.text.split()[1][:3]
    banned = dataclasses.replace(params, bad_words=(word,), logit_bias={free.ids[0]: -100})
    held = pipeline.complete("The answer is", banned).result()
    assert held.ids[0] != free.ids[0] and f" {word}" not in held.text
    assert pipeline.complete("x", dataclasses.replace(params, logit_bias={70: 100})).result().ids == (70,) * 30


def test_the_context_is_the_limit(pipeline):
    result = pipeline.complete([5] * 120, Params(temperature=0.0)).result()
    assert result.num_prompt_tokens + len(result.ids) <= 128
    with pytest.raises(ContextTooLong, match="holds 128 tokens; the prompt has 120 and 9"):
        pipeline.complete([5] * 120, Params(max_tokens=9))


def test_a_small_cache_is_the_limit_too(tiny_model):
    with Pipeline(tiny_model, num_slots=1, num_pages=2, page_size=16, max_context=128) as pipeline:
        assert pipeline.max_context == 33
        assert len(pipeline.complete([5] * 30, Params(max_tokens=3, temperature=0.0)).result().ids) <= 3
        with pytest.raises(ContextTooLong, match="holds 33 tokens"):
            pipeline.complete([5] * 30, Params(max_tokens=4))


def test_an_agent_s_chat_over_the_real_engine(pipeline):
    chat = chat_callable(pipeline, Params(max_tokens=8))
    first = chat([Message("user", "hi")], sampling={"seed": 3})
    assert first.role == "assistant"
    assert chat([Message("user", "hi")], sampling={"seed": 3}) == first


def test_closing_ends_answers_under_way_and_is_seen_by_the_health_check(tiny_model):
    pipeline = Pipeline(tiny_model, **SIZES)
    assert pipeline.fault() is None
    answer = pipeline.complete("x", Params(max_tokens=120, seed=1))
    results = []
    reader = threading.Thread(target=lambda: results.append(answer.result()))
    reader.start()
    pipeline.close()
    reader.join(timeout=20)
    assert results[0].finish in ("aborted", "stop")
    assert "closed" in pipeline.fault()


def test_an_engine_that_is_closed_under_its_server_answers_nothing_more(tiny_model, eventually, monkeypatch):
    read, held = Rounds._read_prompts, threading.Event()

    def held_up(self):
        held.wait(20)
        read(self)

    monkeypatch.setattr(Rounds, "_read_prompts", held_up)
    asked = {"model": "tiny", "prompt": [5], "max_tokens": 100, "ignore_eos": True}
    with Pipeline(tiny_model, **SIZES) as pipeline, start_server(pipeline, model_name="tiny") as server:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=asked, timeout=20)
            eventually(lambda: pipeline.engine.stats().num_active == 1)
            closing = pool.submit(pipeline.close)
            eventually(lambda: pipeline.fault() is not None)
            held.set()
            closing.result()
            assert answer.result().status_code == 503
        assert "before the answer was complete" in answer.result().json()["error"]["message"]
        assert httpx.get(f"{server.url}/live").status_code == 503


def test_a_model_that_cannot_talk_is_refused(tiny_model):
    with pytest.raises(ValueError, match="no tokenizer"):
        Pipeline(dataclasses.replace(tiny_model, tokenizer=None))
    scalar = dataclasses.replace(tiny_model.config, head="scalar")
    with pytest.raises(ValueError, match="gives scores"):
        Pipeline(dataclasses.replace(tiny_model, config=scalar))


def test_sizes_that_cannot_be_are_refused_and_those_that_do_no_good_are_told(tiny_model, monkeypatch):
    for wrong, message in (
        ({"page_size": 0}, "a page must hold at least one token"),
        ({"host_bytes": 100}, "100 bytes of the host's memory hold no page"),
        ({"host_bytes": 1 << 60}, "GiB of the host's memory are to hold pages"),
        ({"num_pages": 0}, "engine sizes must be positive.*num_pages=0"),
    ):
        with pytest.raises(ValueError, match=message), warnings.catch_warnings(action="error"):
            Pipeline(tiny_model, **SIZES | wrong)
    with pytest.raises(ValueError), pytest.warns(UserWarning, match="trained for 256 and has no rope scaling"):
        Pipeline(tiny_model, max_context=257, num_pages=0)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    with pytest.raises(ValueError), pytest.warns(UserWarning, match=r"\(--memory-fraction\) is 0\.5 and has no effect"):
        Pipeline(tiny_model, **SIZES, num_pages=0)
