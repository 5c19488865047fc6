"""The input benchmark on a small corpus: every cell is filled, and what it reads is the mixture it says."""

import json

import pytest

from experiments.benchmarks import input_pipeline


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path):
    sizes = ["--repetitions", "2", "--tokens", "300000", "--measured", "25000", "--documents", "2500"]
    input_pipeline.main([*sizes, "--output", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(cell["packing"], cell["batch_size"]) for cell in found["cells"]] == [
        (packing, batch_size) for packing in ("concat", "whole") for batch_size in (8, 256)
    ]
    for cell in found["cells"]:
        assert len(cell["ours_raw"]) == len(cell["grain_raw"]) == 2 and min(cell["ours_raw"] + cell["grain_raw"]) > 0
    assert {cell["packing"]: cell["filled"] > 0.99 for cell in found["planning"]} == {"concat": True, "whole": True}
    assert found["versions"].keys() >= {"numpy", "grain"} and len(found["load"]["before"]) == 3


def test_what_is_wanted_is_five_times_half_the_peak_of_the_1_8b():
    # 6 x 1,699,479,552 matmul parameters + 6 x 24 layers x 2048 x 4096 = 11.405 GFLOP per token.
    assert input_pipeline.wanted_tokens_per_second() == pytest.approx(5 * 0.5 * 989e12 / 11.405e9, rel=1e-3)
