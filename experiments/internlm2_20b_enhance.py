"""Pre-training of InternLM2-20B, third phase: 24.4B tokens that enhance capabilities; as internlm2_7b_enhance.

    python -m experiments.internlm2_20b_enhance --data.folder stem/ special/ selected/ --data.tokenizer tokenizer/

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 4,800 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b_enhance in the model, which goes on from internlm2_20b_32k, in the batch (half of 5M tokens),
in the number of steps (24.4B tokens), and in the mesh, that of the second phase with 10 micro-batches of 8 rows.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b_enhance
from experiments import internlm2_20b_32k as parent
from experiments.command_line import launch
from experiments.pretraining import pretrain

CONFIG = replace(
    internlm2_7b_enhance.CONFIG,
    run="internlm2_20b_enhance",
    init="internlm2_20b_32k@40000",
    model=parent.CONFIG.model,
    data=replace(internlm2_7b_enhance.CONFIG.data, batch_size=80),
    num_steps=9308,
    accumulate=10,
    mesh=parent.CONFIG.mesh,
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
