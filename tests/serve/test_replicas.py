"""Replicas behind one server: what clients see of them, and of one that stops."""

import httpx
import openai
import pytest

from internjax import sharding
from internjax.text.message import Message
from serve.bench import runs as bench_runs
from serve.bench.targets import engine_target
from serve.pipeline import Params, Pipeline
from serve.server import start_server

SIZES = {"num_slots": 2, "max_context": 128, "page_size": 16, "prefill_chunk": 16}
GREEDY = Params(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    compiled = []
    with Pipeline(tiny_model, **SIZES, replicas=2, on_program=compiled.append) as pipeline:
        assert sorted(program.number for program in compiled) == list(range(1, len(compiled) + 1))
        assert {program.count for program in compiled} == {len(compiled)}
        yield pipeline


@pytest.fixture(scope="module")
def one(tiny_model):
    with Pipeline(tiny_model, **SIZES) as pipeline:
        yield pipeline


def test_prompts_and_sessions_are_answered_as_by_one(pipeline, one):
    prompts = [[5 + i] * (3 * i + 1) for i in range(12)]
    assert [each.ids for each in pipeline(prompts, GREEDY)] == [each.ids for each in one(prompts, GREEDY)]
    assert all(engine.stats().num_drawn_tokens for engine in pipeline.engine.engines)
    assert pipeline.max_context == one.max_context and pipeline.engine.num_slots == 4
    sessions = [target.session(max_length=120) for target in (pipeline, one)]
    for text in ("hello", "and now?"):
        first, second = (session.chat(Message("user", text), GREEDY).result() for session in sessions)
        assert (first.ids, first.num_cached_tokens) == (second.ids, second.num_cached_tokens)
    assert second.num_cached_tokens > 12


def test_a_benchmark_asks_all_of_them(pipeline):
    engines = pipeline.engine.engines
    target, before = engine_target(pipeline.engine), [engine.stats().num_drawn_tokens for engine in engines]
    cell = bench_runs.measure_cell(target, batch=4, prompt=20, completion=6, rounds=1)
    drawn = [engine.stats().num_drawn_tokens - count for engine, count in zip(engines, before)]
    assert sum(drawn) == 2 * 4 * 6 and min(drawn) > 0 and cell.throughput > 0 and target.max_context == 128
    turns = bench_runs.measure_sessions(pipeline.engine, turns=3, new_tokens=20, answer=4, rounds=1)
    assert [turn.history for turn in turns] == [0, 24, 48]


def test_a_prompt_comes_back_and_health_tells_of_a_replica_that_stopped(pipeline):
    prompt = list(range(40, 100))
    with start_server(pipeline, model_name="tiny", drain_seconds=1) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

            def ask() -> int:
                answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0)
                return answer.usage.prompt_tokens_details.cached_tokens

            before = [engine.stats().num_prompt_tokens for engine in pipeline.engine.engines]
            assert [ask() for _ in range(3)] == [0, 59, 59]
            (home,) = [
                engine
                for engine, count in zip(pipeline.engine.engines, before)
                if engine.stats().num_prompt_tokens > count
            ]
            health = httpx.get(f"{server.url}/health")
            assert health.json() == {
                "status": "ok",
                "model": "tiny",
                "fault": None,
                "replicas": [{"fault": None}, {"fault": None}],
            }
            home.close()
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()["status"], health.json()["fault"]) == (200, "degraded", None)
            assert sum("is closed" in (each["fault"] or "") for each in health.json()["replicas"]) == 1
            assert httpx.get(f"{server.url}/ready").status_code == 200
            figures, number = httpx.get(f"{server.url}/metrics").text, pipeline.engine.engines.index(home)
            for replica, engine in enumerate(pipeline.engine.engines):
                assert f'internjax_engine_fault{{replica="{replica}"}} {float(replica == number)}' in figures
                drawn = engine.stats().num_drawn_tokens
                assert f'internjax_generated_tokens_total{{replica="{replica}"}} {float(drawn)}' in figures
            assert [ask() for _ in range(3)] == [0, 59, 59]
            pipeline.close()
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()["status"]) == (503, "failed")
            assert "all 2 engines have stopped" in health.json()["fault"]


def test_more_replicas_than_devices_are_refused(tiny_model):
    with pytest.raises(ValueError, match="9 replicas on 1 devices each are asked for; this process sees 8"):
        Pipeline(tiny_model, replicas=9)
    assert sharding.mesh_of(tiny_model.params).size == 1
