"""Pre-training of InternLM2-1.8B, second phase: 32k tokens; as internlm2_7b_32k.

    python -m experiments.internlm2_1_8b_32k --data.folder tokens/ tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 4

Hardware: 8 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 4,700 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b_32k in the model, which goes on from internlm2_1_8b, and in its micro-batches: 32 of 4 rows.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_1_8b as parent
from experiments import internlm2_7b_32k
from experiments.command_line import launch
from experiments.pretraining import pretrain

CONFIG = replace(
    internlm2_7b_32k.CONFIG,
    run="internlm2_1_8b_32k",
    init="internlm2_1_8b@500000",
    model=internlm2_7b_32k.lengthened(parent.CONFIG.model),
    accumulate=32,
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
