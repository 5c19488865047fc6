"""Supervised fine-tuning of InternLM2-7B with adapters: rank 16 on every linear layer.

    python -m experiments.sft_lora_7b --data my.jsonl
    python -m experiments.sft_lora_7b --data my.jsonl --optimizer.peak-lr 1e-4 --run my_sft

Hardware: one GPU of 80 GB; not yet run on GPU
Time: not measured
"""

from dataclasses import replace

from experiments import finetune as parent
from experiments.command_line import launch
from experiments.finetuning import finetune
from internjax.model.lora import LoraConfig

CONFIG = replace(
    parent.CONFIG,
    run="sft_lora_7b",
    model="hf:internlm/internlm2-7b",
    seq_len=4096,
    batch_size=4,
    accumulate=4,
    remat="full",
    attention="chunked",
    lora=LoraConfig(rank=16, alpha=32.0),
)

if __name__ == "__main__":
    launch(finetune, CONFIG)
