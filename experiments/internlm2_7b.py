"""Pre-training of InternLM2-7B, first phase: 4k tokens, rotary base 50,000 (InternLM2 report, section 3.3).

    python -m experiments.internlm2_7b --data.folder tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 64
    python -m experiments.internlm2_7b --data.folder tokens/ --data.tokenizer tokenizer/ --num-steps 100 --run trial

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 70,000 H100 hours at an assumed 40 % MFU

Peak rate 3e-4, 4M tokens a batch, AdamW .9/.95, weight decay .1, cosine to 10 %: the report. It says that the first
phase takes about 90 % of all steps and the three together 2.0-2.6T tokens: 500,000 steps (2.1T) are our choice within
that. It does not state warm-up and clipping: 2,000 steps and norm 1.0 are our choice, as are mesh, micro-batches and
recomputation. Hours = tokens x FLOPs per token of full rows / (989e12 x MFU).
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments.command_line import launch
from experiments.pretraining import Pretrain, TokenData, pretrain
from internjax.model.config import INTERNLM2_7B, NoScaling
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.optimizer import AdamW, Cosine
from internjax.train.tracking import TrackingConfig

CONFIG = Pretrain(
    run="internlm2_7b",
    model=replace(
        INTERNLM2_7B,
        rope_theta=50_000.0,
        rope_scaling=NoScaling(),
        max_position_embeddings=4096,
        remat="dots",
        attention="chunked",
    ),
    data=TokenData(batch_size=1024, seq_len=4096),
    num_steps=500_000,
    optimizer=AdamW(peak_lr=3e-4, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
    schedule=Cosine(warmup_steps=2000, final_fraction=0.1),
    accumulate=8,
    checkpoint=CheckpointConfig(every=1000, max_to_keep=3),
    tracking=TrackingConfig(log_every=10),
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
