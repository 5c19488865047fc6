"""Supervised fine-tuning of all parameters of InternLM2-7B on conversations.

    python -m experiments.sft_7b --data chats.jsonl
    python -m experiments.sft_7b --data a.jsonl b.jsonl --reading.weight 0.7 0.3 --reading.validation-share 0.01

Hardware: 8 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 33 H100 hours for 1B tokens at an assumed 40 % MFU

AdamW, one epoch, peak rate 4e-5: the InternLM2 report, section 4.1. It says nothing about batch, length and schedule;
our choice is 64 packed rows of 4,096 tokens and cosine to a tenth.
Expected result: not run yet; the loss of held-out answers (--reading.validation-share) should fall.
"""

from dataclasses import replace

from experiments import finetune as parent
from experiments.command_line import launch
from experiments.finetuning import finetune
from internjax.sharding import MeshConfig
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.optimizer import AdamW, Cosine

CONFIG = replace(
    parent.CONFIG,
    run="sft_7b",
    model="hf:internlm/internlm2-7b",
    method="full",
    seq_len=4096,
    batch_size=64,
    accumulate=8,
    remat="full",
    attention="chunked",
    optimizer=AdamW(peak_lr=4e-5, weight_decay=0.0),
    schedule=Cosine(warmup_steps=50, final_fraction=0.1),
    mesh=MeshConfig(fsdp=-1),
    checkpoint=CheckpointConfig(every=200, max_to_keep=2),
)


if __name__ == "__main__":
    launch(finetune, CONFIG)
