"""The stages in a job of two processes: what one process would train, and a run folder that is whole."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.callbacks import HeldOut
from experiments.pretraining import pretrain
from internjax.hf.open import open_model
from internjax.train.tracking import completed, read_rows
from tests.experiments.conftest import pretraining

PROGRAM = Path(__file__).with_name("process_stages.py")
ROOT = PROGRAM.parent.parent.parent


@pytest.mark.slow
def test_two_processes_pretrain_and_finetune_as_one(corpus, tmp_path):
    command = [sys.executable, "-m", "experiments.launch.local", "--processes", "2", "--devices", "2", "--"]
    ran = subprocess.run(
        [*command, sys.executable, str(PROGRAM), str(corpus), str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]

    measured = HeldOut(str(corpus / "tokens"), every=12, num_batches=1)
    alone = pretrain(pretraining(corpus, tmp_path / "alone", held_out=measured))
    given, wanted = (read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "run", alone.folder))
    assert len(given) == len(wanted) == 12
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in given], [row[name] for row in wanted], rtol=1e-4)
    np.testing.assert_allclose(given[-1]["eval/loss"], wanted[-1]["eval/loss"], rtol=1e-4)
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 1

    for run in ("run", "tuned"):
        assert completed(tmp_path / run) is not None and (tmp_path / run / "report.html").is_file()
    kernels = [open_model(tmp_path / run).params["layers"]["ffn"]["up"]["kernel"] for run in ("run", "alone", "tuned")]
    np.testing.assert_allclose(kernels[0], kernels[1], atol=1e-4)
    assert np.abs(kernels[2] - kernels[0]).max() > 1e-3
    assert open_model(tmp_path / "tuned" / "adapter").lora is not None
