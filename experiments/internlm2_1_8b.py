"""Pre-training of InternLM2-1.8B, first phase; as internlm2_7b, at the smallest size and with its normalised head.

    python -m experiments.internlm2_1_8b --data.folder tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 8

Hardware: 8 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 17,000 H100 hours at an assumed 40 % MFU

Differs from internlm2_7b in the model, whose output head is normalised (InternEvo's configuration of this size), and in
the micro-batches: 32 of 32 rows, 4 on each GPU.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b
from experiments.command_line import launch
from experiments.pretraining import pretrain
from internjax.model.config import INTERNLM2_1_8B

_PARENT = internlm2_7b.CONFIG.model

CONFIG = replace(
    internlm2_7b.CONFIG,
    run="internlm2_1_8b",
    model=replace(
        INTERNLM2_1_8B,
        norm_head=True,
        rope_theta=_PARENT.rope_theta,
        rope_scaling=_PARENT.rope_scaling,
        max_position_embeddings=_PARENT.max_position_embeddings,
        remat=_PARENT.remat,
        attention=_PARENT.attention,
    ),
    accumulate=32,
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
