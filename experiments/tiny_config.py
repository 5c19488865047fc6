"""The numbers of the tiny chain, and how a stage says that it cannot be run."""

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.training import run_path
from internjax.hf.open import Model, open_model
from internjax.model.config import TINY, ModelConfig
from internjax.model.lora import LoraConfig
from internjax.train.optimizer import AdamW, Cosine


@dataclasses.dataclass(frozen=True)
class Tiny:
    """The numbers of the chain; benchmarks/results/tiny_sweep.json compares them with others at equal training time."""

    run: str | None = None
    """Folder of the chain: a path, or a name under runs/. By default tiny, and tiny-NAME for your own file NAME."""
    data: str | None = None
    """Your own file (JSONL, text, parquet) or folder instead of the standard library."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """A row of your file that cannot be read ends the run with its place and reason, or is named, counted, left out."""
    only: str | None = None
    """Run this stage alone."""
    from_stage: str | None = None
    """Run this stage and all after it. On the command line also --from."""
    fresh: bool = False
    """Remove the chain's folder first."""
    seed: int = 0
    """Decides weights, order of the data and every draw."""
    held_out: float = 0.1
    """Share of files kept for evaluation. With less, the library has not 256 functions of held-out files to ask for."""
    model: ModelConfig = dataclasses.replace(TINY, unroll_layers=TINY.num_layers)
    """vocab_size is the size of the tokenizer that is trained."""
    seq_len: int = 256
    """Tokens of a row, in pre-training and fine-tuning."""
    batch_size: int = 4
    """Rows of a batch of pre-training."""
    pretrain_steps: int = 700
    """Batches of pre-training."""
    pretrain: AdamW = AdamW(peak_lr=5e-3, weight_decay=0.1)
    """Optimizer of pre-training."""
    schedule: Cosine = Cosine(warmup_steps=60, final_fraction=0.1)
    """Learning rate over pre-training, as a share of the peak."""
    sft_steps: int = 120
    """Batches of fine-tuning."""
    sft_batch_size: int = 8
    """Rows of a batch of fine-tuning."""
    sft: AdamW = AdamW(peak_lr=5e-3, weight_decay=0.0)
    """Optimizer of fine-tuning."""
    sft_lora: LoraConfig = LoraConfig(rank=32, alpha=64.0, targets=(*LoraConfig().targets, "head"))
    """Adapters that fine-tuning learns."""
    max_prompt_tokens: int = 64
    """Longest prompt of reward model and RLHF; functions whose prompt is longer are left out."""
    max_new_tokens: int = 48
    """Longest answer in RLHF and evaluation."""
    reward_steps: int = 80
    """Batches of eight pairs that the reward model learns from."""
    num_iterations: int = 4
    """PPO iterations of each of the two RLHF rounds."""
    num_prompts: int = 64
    """Prompts of an iteration."""
    actor_rate: float = 3e-4
    """Learning rate of the policy in RLHF."""
    critic_rate: float = 1e-3
    """Learning rate of the critic."""
    num_evaluated: int = 256
    """Held-out prompts of the gold score, each asked once; fewer where there are not so many."""

    def __post_init__(self):
        if self.num_prompts % 2 or self.num_prompts < 2:
            raise ValueError(f"num_prompts must be even, for two minibatches; given {self.num_prompts}")


def folder(config: Tiny) -> Path:
    """Returns the folder of the chain."""
    if config.run is not None:
        return run_path(config.run)
    return run_path("tiny" if config.data is None else f"tiny-{Path(config.data).resolve().stem}")


def opened(config: Tiny, path: Path, *, quantize: Literal["int8", "int4"] | None = None) -> Model:
    """Returns a model of the chain, computed as the chain's are: how a model is computed is not part of its folder."""
    model = open_model(path, quantize=quantize)
    how = dataclasses.replace(model.config, unroll_layers=config.model.unroll_layers)
    return dataclasses.replace(model, config=how)


class Skip(Exception):
    """A stage that the given data cannot feed; the message is the reason."""
