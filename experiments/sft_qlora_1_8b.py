"""Supervised fine-tuning of InternLM2-1.8B with adapters over four-bit weights; as sft_qlora_7b.

    python -m experiments.sft_qlora_1_8b --data chats.jsonl

Hardware: one GPU of 6 GB; not yet run on GPU
Time: not measured; derived: 5 H100 hours for 1B tokens at an assumed 40 % MFU, without reading four bits

Differs from sft_qlora_7b in the model.
Expected result: not run yet; held-out loss close to sft_lora_1_8b's.
"""

from dataclasses import replace

from experiments import sft_qlora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_qlora_1_8b", model="hf:internlm/internlm2-1_8b")


if __name__ == "__main__":
    launch(finetune, CONFIG)
