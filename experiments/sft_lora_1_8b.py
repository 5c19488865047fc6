"""Supervised fine-tuning of InternLM2-1.8B with adapters; as sft_lora_7b.

    python -m experiments.sft_lora_1_8b --data chats.jsonl

Hardware: one GPU of 24 GB; not yet run on GPU
Time: not measured; derived: 5 H100 hours for 1B tokens at an assumed 40 % MFU

Differs from sft_lora_7b in the model, and in micro-batches of 2 rows.
Expected result: not run yet; the loss of held-out answers should fall.
"""

from dataclasses import replace

from experiments import sft_lora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_lora_1_8b", model="hf:internlm/internlm2-1_8b", accumulate=8)


if __name__ == "__main__":
    launch(finetune, CONFIG)
