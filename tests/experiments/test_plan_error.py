"""The comparison of plans with a GPU: refused without one, and its cells can be trained."""

import dataclasses

import numpy as np
import pytest

from experiments.benchmarks import plan_error
from internjax.model.config import TINY
from internjax.model.quantize import Quantised
from internjax.train.memory import Job


def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path, capsys):
    output = tmp_path / "plan_error.json"
    assert plan_error.main(["--output", str(output)]) == 2
    assert "this machine has cpu" in capsys.readouterr().err and not output.exists()


def test_cells_cover_methods_policies_and_lengths(capsys):
    jobs = plan_error.CELLS.values()
    assert len(jobs) >= 12
    assert {job.method for job in jobs} == {"full", "lora", "qlora"}
    assert {job.model.remat for job in jobs} == {"none", "dots", "full"}
    assert {job.model.attention for job in jobs} == {"xla", "chunked", "cudnn"} and any(j.accumulate > 1 for j in jobs)
    assert plan_error.main(["--list", "--cells", "qlora"]) == 0
    assert capsys.readouterr().out.count("GiB planned") == 2


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_cell_trains(method):
    model = dataclasses.replace(TINY, num_layers=1, vocab_size=64, d_model=32, ffn_dim=32, num_heads=1, head_dim=32)
    adapters = {} if method == "full" else {"lora": plan_error.LoraConfig(rank=2), "quantised": Quantised(group=16)}
    found = plan_error.measure(Job(model, 2, 16, accumulate=2, **adapters))
    assert np.isfinite(found["loss"]) and 0 < found["loss"] < np.log(64) * 1.2
    assert found["state_peak_bytes"] is None  # the CPU keeps no count
