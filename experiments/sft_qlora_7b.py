"""Supervised fine-tuning of InternLM2-7B with adapters over four-bit weights: one GPU of 8 GB.

    python -m experiments.sft_qlora_7b --data chats.jsonl
    python -m experiments.sft_qlora_7b --data chats.jsonl --quantize int4 --run my_int4

Hardware: one GPU of 8 GB; not yet run on GPU
Time: not measured; derived: 22 H100 hours for 1B tokens at an assumed 40 % MFU, without the cost of reading four bits

Differs from sft_lora_7b in the base, held in nf4 with scales quantised again, and in rows of 2,048 tokens, one at a
time, 16 of them per update.
Expected result: not run yet; a peak of at most 7.0 GB, and held-out loss close to sft_lora_7b's.
"""

from dataclasses import replace

from experiments import sft_lora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(parent.CONFIG, run="sft_qlora_7b", method="qlora", seq_len=2048, batch_size=16, accumulate=16)


if __name__ == "__main__":
    launch(finetune, CONFIG)
