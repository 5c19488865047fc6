"""The pre-training of the tiny chain by itself, shortened: what a sweep runs to look for a rate in minutes.

    python -m experiments.tiny                                # once: makes the token folders in runs/tiny/
    python -m experiments.sweeps.tiny_pretrain --optimizer.peak-lr 3e-3 --run trial
    wandb sweep experiments/sweeps/tiny_lr.yaml               # prints the id for: wandb agent ID

Hardware: 2 CPU cores
Time: half a minute

It differs from the chain's pre-training in its 300 steps (of 700) and a warm-up that is shortened likewise.
"""

from dataclasses import replace
from pathlib import Path

from experiments.command_line import launch
from experiments.pretraining import pretrain
from experiments.tiny_config import Tiny
from experiments.tiny_models import pretrain_config
from internjax.train.optimizer import Cosine

CONFIG = replace(
    pretrain_config(Tiny(), Path("runs/tiny")),
    run="tiny_pretrain",
    num_steps=300,
    schedule=Cosine(warmup_steps=15, final_fraction=0.1),
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
