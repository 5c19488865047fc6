"""Supervised fine-tuning of InternLM2-20B with adapters over four-bit weights; as sft_qlora_7b.

    python -m experiments.sft_qlora_20b --data chats.jsonl

Hardware: one GPU of 24 GB; not yet run on GPU
Time: not measured; derived: 58 H100 hours for 1B tokens at an assumed 40 % MFU, without reading four bits

Differs from sft_qlora_7b in the model.
Expected result: not run yet; a peak of at most 16 GB.
"""

from dataclasses import replace

from experiments import sft_qlora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_qlora_20b", model="hf:internlm/internlm2-20b")


if __name__ == "__main__":
    launch(finetune, CONFIG)
