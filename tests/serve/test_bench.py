"""The benchmark counts what it says: figures by hand, runs of a tiny engine, the files, and a server asked by HTTP."""

import contextlib
import csv
import json
import math
import time

import jax
import numpy as np
import pytest

from internjax.model.cache import paged_cache
from internjax.model.quantize import quantize_params
from serve.bench import __main__ as bench
from serve.bench import page as bench_page
from serve.bench import runs as bench_runs
from serve.bench.runs import copy_bandwidth, mix_lengths, step_bytes, weight_bytes
from serve.bench.targets import Target, Timing, engine_target
from serve.pipeline import Pipeline
from serve.server import start_server

CONTEXT = 64


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    with Pipeline(tiny_model, num_slots=2, max_context=CONTEXT, tokens_per_dispatch=2, prefill_chunk=16) as pipeline:
        yield pipeline


def scripted(*timings: Timing) -> Target:
    left = iter(timings)
    return Target(lambda prompt, num_new: next(left), last_id=99)


def test_figures_by_hand():
    """Two rows: 2 tokens at 1.0 and 2 more at 1.4; 1 token at 1.2, 3 more at 1.8; the warm-up is not counted."""
    warm = Timing(0.0, (90.0,), (4,), 5)
    rows = [Timing(0.0, (1.0, 1.4), (2, 2), 5), Timing(0.2, (1.2, 1.8), (1, 3), 5)]
    target = scripted(warm, warm, *rows)
    cell = bench_runs.measure_cell(target, batch=2, prompt=5, completion=4, rounds=1, bandwidth=100.0, step_bytes=40)
    assert cell.throughput == pytest.approx(8 / 1.8) and len(cell.throughputs) == 1
    assert cell.decode_throughput == pytest.approx(2 / 0.2)  # from 1.2, when both draw, to 1.4, when one is done
    assert (cell.first_token.ave, cell.first_token.min, cell.first_token.max) == (1.0, 1.0, 1.0)
    # Gaps of 0.2 s for each of five tokens.
    assert cell.per_token.p50 == pytest.approx(0.2) and cell.per_token.ave == pytest.approx(0.2)
    assert cell.ceiling.throughput == 5.0 and cell.ceiling.fraction == pytest.approx(2.0)

    alone = Timing(0.0, (1.0,), (4,), 5)
    cell = bench_runs.measure_cell(scripted(alone, alone), batch=1, prompt=5, completion=4, rounds=1)
    assert (cell.per_token, cell.decode_throughput, cell.ceiling) == (None, None, None)

    slow = Timing(0.0, (0.0, 1.0, 3.0), (1, 99, 1), 5)  # one token of a hundred took 2 s, the others 1 / 99
    latency = bench_runs.per_token_latency([slow])
    assert latency.p99 == pytest.approx(1 / 99) and latency.max == 2.0 and latency.ave == pytest.approx(0.03)


def test_a_step_reads_weights_and_the_cache_of_its_rows(tiny_model):
    config, params = tiny_model.config, tiny_model.params
    read = sum(leaf.nbytes for name in ("layers", "norm", "head") for leaf in jax.tree.leaves(params[name]))
    assert weight_bytes(params, config) == read
    few_bits = weight_bytes(jax.eval_shape(lambda: quantize_params(params, scheme="int8", group=16)), config)
    assert few_bits < read / 2
    for kv in ("float32", "int4"):
        cache = paged_cache(config, 1, 12, batch=1, pages_per_row=1, dtype=kv)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache) if leaf.ndim > 2)
        assert step_bytes(7, config, batch=3, prompt=8, completion=8, kv=kv) == 7 + 3 * held
    assert copy_bandwidth(2**16, rounds=3) > 0


def test_lengths_of_a_mix_are_log_normal_and_fit():
    lengths = mix_lengths(20_000, max_context=100_000, seed=1)
    prompts, answers = map(np.array, zip(*lengths))
    assert prompts.mean() == pytest.approx(161, rel=0.05) and answers.mean() == pytest.approx(338, rel=0.05)
    assert np.log(answers).std() == pytest.approx(0.9, rel=0.05)
    short = mix_lengths(500, max_context=128, seed=1)
    assert all(1 <= prompt <= 64 and 1 <= answer and prompt + answer <= 128 for prompt, answer in short)
    assert short == mix_lengths(500, max_context=128, seed=1) != mix_lengths(500, max_context=128, seed=2)


def test_requests_that_are_due_count_from_then_on():
    sent = []

    def ask(prompt, num_new):
        sent.append(prompt)
        now = time.perf_counter()
        return Timing(now, (now + 1,), (num_new,), len(prompt))

    target = Target(ask, last_id=9, max_context=40)
    load = bench_runs.measure_load(target, num_requests=20, rate=1000.0, seed=3)
    assert len(set(sent)) > 10 and load.num_requests == 20 and load.rate == 1000.0
    assert load.prompt_tokens == sum(map(len, sent[1:])) and load.output_tokens >= 20
    assert load.first_token.min >= 1.0  # waiting to be sent is counted
    assert load.total_throughput > load.output_throughput > load.requests_per_second > 0

    def broken(prompt, num_new):
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        bench_runs.ask_together(Target(broken, last_id=9), [((5,), 1)] * 3)


def test_an_engine_is_measured(pipeline):
    engine = pipeline.engine
    target, before = engine_target(engine), engine.stats()
    cell = bench_runs.measure_cell(target, batch=2, prompt=20, completion=12, rounds=2)
    stats = engine.stats()
    assert stats.num_shared_tokens == before.num_shared_tokens  # prompts differ, between rounds too
    assert stats.num_prompt_tokens - before.num_prompt_tokens == 3 * 2 * 20
    assert len(cell.throughputs) == 2 and 0 < cell.throughput and cell.decode_throughput > 0
    assert 0 < cell.first_token.min <= cell.first_token.p50 <= cell.first_token.p99 <= cell.first_token.max
    hit = bench_runs.measure_prefix(target, prefix=40, rounds=2)
    assert hit.num_shared >= 32 and hit.ratio == hit.warm / hit.cold
    turns = bench_runs.measure_sessions(engine, turns=3, new_tokens=8, answer=4, rounds=1)
    assert [(turn.turn, turn.history) for turn in turns] == [(1, 0), (2, 12), (3, 24)] and turns[0].ratio == 1.0
    assert engine.stats().num_compiled == before.num_compiled
    with pytest.raises(ValueError, match="prompt of 60 and an answer of 8 tokens make 68; the context holds 64"):
        bench_runs.measure_cell(target, batch=1, prompt=60, completion=8)


FLAGS = "--prompt 16 --completion 6 --rounds 1 --requests 4 --prefix 20".split()


def test_the_command_writes_what_it_measured(pipeline, tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "open_weights", lambda args: tiny_model)
    monkeypatch.setattr(bench, "start_pipeline", lambda model, args: contextlib.nullcontext(pipeline))
    monkeypatch.setattr(bench, "_copied_bytes", lambda: 2**16)
    flags = ["some/model", "--output", str(tmp_path), "--batch", "1", "2", "--turns", "2", "--turn-tokens", "8"]
    flags += ["--replicas", "2"]
    monkeypatch.setattr("sys.argv", ["serve/bench/__main__.py", *flags])
    assert bench.main([*flags, *FLAGS]) == 0
    said = json.loads((tmp_path / "bench.json").read_text())
    assert [cell["batch"] for cell in said["cells"]] == [1, 2] and said["copy_bytes_per_second"] > 0
    first, second = (cell["ceiling"]["step_bytes"] for cell in said["cells"])
    assert first == second > 2 * said["weight_bytes"] > 0  # of two replicas, the fullest has one row in both cells
    assert said["cells"][0]["memory_bytes"] > 10**6 and said["memory"] == "of the host"
    assert said["packages"]["jax"] and said["devices"].endswith(" x cpu") and " some/model --output " in said["command"]
    with (tmp_path / "bench.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    columns = "batch,prompt_tokens,completion_tokens,throughput(out tok/s),mem(GB),FTL(ave)(s),FTL(min)(s),FTL(max)(s)"
    assert ",".join(rows[0]).startswith(f"{columns},50%(s),75%(s),95%(s),99%(s),decode(out tok/s)")
    assert [row[:3] for row in rows[1:]] == [["1", "16", "6"], ["2", "16", "6"]]
    assert float(rows[1][3]) == pytest.approx(said["cells"][0]["throughput"], rel=1e-5)
    with (tmp_path / "load.csv").open(newline="") as file:
        (load,) = csv.DictReader(file)
    assert (load["num_prompts"], float(load["RPM"])) == ("4", pytest.approx(60 * float(load["RPS"]), rel=1e-4))
    page = (tmp_path / "bench.html").read_text()
    assert page.count("<svg") >= 4 and "<script" not in page and "src=" not in page
    assert all(f">{title}</h2>" in page for title in ("Static grid", "Mixed lengths", "Prefix hits", "Sessions"))
    capsys.readouterr()
    assert bench.main(["m", "--output", str(tmp_path / "none"), *FLAGS, "--completion", "60"]) == 1
    error = capsys.readouterr().err
    assert "a prompt of 16 and an answer of 60 tokens make 76; the context holds 64" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "none").exists()


def test_what_was_measured_before_a_failure_is_written(pipeline, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("planted")

    monkeypatch.setattr(bench_runs, "measure_load", fail)
    with start_server(pipeline, model_name="tiny") as server:
        flags = ["--url", server.url, "--output", str(tmp_path), "--batch", "1", *FLAGS, "--requests", "4"]
        assert bench.main([*flags, "--max-context", "48"]) == 1
    assert "serve.bench: planted" in capsys.readouterr().err
    said = json.loads((tmp_path / "bench.json").read_text())
    assert len(said["cells"]) == 1 and said["loads"] == []


@pytest.mark.parametrize("key", [("--api-key", "secret"), ("--api-k=secret",)], ids=["two words", "one word"])
def test_a_server_is_measured(pipeline, tmp_path, capsys, monkeypatch, key):
    with start_server(pipeline, model_name="tiny", api_key="secret") as server:
        flags = ["--url", server.url, "--output", str(tmp_path), "--batch", "2", *FLAGS, "--max-context", "48"]
        monkeypatch.setattr("sys.argv", ["bench", *flags, *key])  # what the command is written down from
        assert bench.main([*flags, *key]) == 0
        text = (tmp_path / "bench.json").read_text()
        said = json.loads(text)
        assert "secret" not in text and "***" in said["command"]
        assert said["turns"] == [] and said["copy_bytes_per_second"] is None
        (cell,) = said["cells"]
        assert cell["throughput"] > 0 and cell["ceiling"] is None
        capsys.readouterr()
        assert bench.main([*flags, "--api-key", "wrong"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve.bench: the server at {server.url}: ") and "401" in line


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "give MODEL"),
        (("m", "--url", "u"), "give MODEL"),
        (("m", "--model", "n"), "give its --url"),
        (("--url", "u", "--quantize", "int8", "--num-pages", "3"), "--quantize, --num-pages"),
        (("m", "--batch", "9", "--max-batch", "4", "--replicas", "2"), "--batch 9"),
        (("m", "--rate", "0"), "--rate"),
        (("m", "--prompt", "0"), "1 or more"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main([*flags, "--output", "nowhere"])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_rows_of_tables_have_all_columns():
    latency = bench_runs.Latency(*map(float, range(7)))
    cell = bench_runs.Cell(1, 2, 3, 4.0, (4.0,), None, latency, None, None, None)
    row = dict(zip(bench_page.CELL_COLUMNS, bench_page.cell_row(cell), strict=True))
    assert row["FTL(max)(s)"] == 2.0 and row["FTL(99%)(s)"] == 6.0 and row["99%(s)"] is None
    load = bench_runs.Load(9, None, 5, 6, 3.0, 3.0, 2.0, 3.7, latency, latency)
    row = dict(zip(bench_page.LOAD_COLUMNS, bench_page.load_row(load, 8), strict=True))
    assert (row["RPM"], row["50%(s)"], row["throughput(total tok/s)"]) == (180.0, 3.0, 3.7)
    assert not math.isnan(row["FTL(50%)(s)"])
