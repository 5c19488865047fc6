"""Supervised fine-tuning of InternLM2-20B with adapters; as sft_lora_7b.

    python -m experiments.sft_lora_20b --data chats.jsonl

Hardware: one GPU of 80 GB; not yet run on GPU
Time: not measured; derived: 58 H100 hours for 1B tokens at an assumed 40 % MFU

Differs from sft_lora_7b in the model, and in micro-batches of one row.
Expected result: not run yet; the loss of held-out answers should fall.
"""

from dataclasses import replace

from experiments import sft_lora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_lora_20b", model="hf:internlm/internlm2-20b", accumulate=16)


if __name__ == "__main__":
    launch(finetune, CONFIG)
