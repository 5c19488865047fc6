"""Continued pre-training of InternLM2-1.8B on a domain corpus; as continue_7b.

    python -m experiments.continue_1_8b --data.folder domain/ general/ --data.tokenizer MODEL

Hardware: 2 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 17 H100 hours at an assumed 40 % MFU

Differs from continue_7b in the model and in micro-batches of 8 rows.
Expected result: not run yet; the loss on the domain should fall and that on general text stay.
"""

from dataclasses import replace

from experiments import continue_7b as parent
from experiments.command_line import launch
from experiments.pretraining import Pretrain
from experiments.training import Trained
from internjax.model.config import INTERNLM2_1_8B

CONFIG = replace(
    parent.CONFIG,
    run="continue_1_8b",
    init="hf:internlm/internlm2-1_8b",
    model=replace(INTERNLM2_1_8B, remat="dots", attention="chunked"),
    accumulate=32,
)


def run(config: Pretrain) -> Trained:
    """Returns the run of the continued pre-training."""
    return parent.continued(config, default=CONFIG.model)


if __name__ == "__main__":
    launch(run, CONFIG)
