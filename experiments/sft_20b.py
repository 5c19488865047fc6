"""Supervised fine-tuning of all parameters of InternLM2-20B; as sft_7b.

    python -m experiments.sft_20b --data chats.jsonl

Hardware: 32 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 86 H100 hours for 1B tokens at an assumed 40 % MFU

Differs from sft_7b in the model, the number of GPUs, and in micro-batches of 32 rows.
Expected result: not run yet; the loss of held-out answers should fall.
"""

from dataclasses import replace

from experiments import sft_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_20b", model="hf:internlm/internlm2-20b", accumulate=2)


if __name__ == "__main__":
    launch(finetune, CONFIG)
