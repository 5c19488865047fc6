"""Pre-training of InternLM2-7B, second phase: 32k tokens, rotary base 1,000,000, half of the rows short documents.

    python -m experiments.internlm2_7b_32k --data.folder tokens/ tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 32

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 16,000 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b: it goes on from that run's last checkpoint, with rows of 32,768 tokens, the rotary base and
limits of the released model, and half of its rows from documents of up to 4,096 tokens (the report: 50 % of the data is
still shorter). The same folder is named twice: first for the short documents, then for the long ones.

The report gives this phase about 9 % of the steps. Our choice, as it states nothing: the optimizer starts anew after
500 steps of warm-up, the rate stays at what the first phase ended with, a batch has as many tokens as before, and the
mesh cuts rows in two. Hours count rows as one document each, which is an upper limit here.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b as parent
from experiments.command_line import launch
from experiments.pretraining import pretrain
from internjax.model.config import INTERNLM2_7B, ModelConfig
from internjax.sharding import MeshConfig
from internjax.train.optimizer import Constant

_FIRST = parent.CONFIG


def lengthened(model: ModelConfig) -> ModelConfig:
    """Returns a first phase's `model` for this phase: rotary base and limits of the releases, rows cut by a ring."""
    return replace(
        model,
        rope_theta=INTERNLM2_7B.rope_theta,
        rope_scaling=INTERNLM2_7B.rope_scaling,
        max_position_embeddings=32_768,
        remat="full",
        attention="ring",
    )


CONFIG = replace(
    _FIRST,
    run="internlm2_7b_32k",
    init="internlm2_7b@500000",
    model=lengthened(_FIRST.model),
    data=replace(
        _FIRST.data, batch_size=128, seq_len=32_768, weight=(0.5, 0.5), min_tokens=(0, 4097), max_tokens=(4096, 0)
    ),
    num_steps=50_000,
    optimizer=replace(_FIRST.optimizer, peak_lr=3e-5),
    schedule=Constant(warmup_steps=500),
    accumulate=4,
    mesh=MeshConfig(fsdp=-1, sequence=2),
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
