"""Pre-training of InternLM2-7B, third phase: 24.4B tokens that enhance capabilities, smaller rate and batch.

    python -m experiments.internlm2_7b_enhance --data.folder stem/ special/ selected/ --data.tokenizer tokenizer/

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 1,900 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b_32k: it goes on from that run's last checkpoint, on three folders: retrieved STEM, retrieved
special domain and selected high-quality data, 15.97B, 2.17B and 6.26B tokens of 24.40B (the report, table 4).

The report says "smaller learning rate and batch size" without numbers. Our choice: half the batch, two thirds of the
rate with cosine to a tenth, 100 steps of warm-up, rows of 32,768 tokens; 11,635 such batches are 24.4B tokens.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b_32k as parent
from experiments.command_line import launch
from experiments.pretraining import pretrain
from internjax.train.optimizer import Cosine

CONFIG = replace(
    parent.CONFIG,
    run="internlm2_7b_enhance",
    init="internlm2_7b_32k@50000",
    data=replace(parent.CONFIG.data, batch_size=64, weight=(15.97, 2.17, 6.26), min_tokens=(), max_tokens=()),
    num_steps=11_635,
    optimizer=replace(parent.CONFIG.optimizer, peak_lr=2e-5),
    schedule=Cosine(warmup_steps=100, final_fraction=0.1),
    accumulate=2,
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
