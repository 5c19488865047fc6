"""Pre-training of InternLM2-1.8B, third phase: 24.4B tokens that enhance capabilities; as internlm2_7b_enhance.

    python -m experiments.internlm2_1_8b_enhance --data.folder stem/ special/ selected/ --data.tokenizer tokenizer/

Hardware: 8 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 540 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b_enhance in the model, which goes on from internlm2_1_8b_32k, and in its micro-batches: 16 of 4
rows.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_1_8b_32k as parent
from experiments import internlm2_7b_enhance
from experiments.command_line import launch
from experiments.pretraining import pretrain

CONFIG = replace(
    internlm2_7b_enhance.CONFIG,
    run="internlm2_1_8b_enhance",
    init="internlm2_1_8b_32k@50000",
    model=parent.CONFIG.model,
    accumulate=16,
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
