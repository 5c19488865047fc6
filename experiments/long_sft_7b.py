"""Supervised fine-tuning of all parameters of InternLM2-7B on long conversations: rows of 32,768 tokens.

    python -m experiments.long_sft_7b --data long.jsonl chats.jsonl

Hardware: 8 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 49 H100 hours for 1B tokens at an assumed 40 % MFU, rows as one document each

Differs from sft_7b in rows of 32,768 tokens (short conversations are packed, each sees itself alone), 8 of them per
update, and in the mesh, which cuts rows in two; cut in four, a GPU would hold half of the state.
Expected result: not run yet; the loss of late turns of a long conversation should fall below the base's.
"""

from dataclasses import replace

from experiments import sft_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune
from internjax.sharding import MeshConfig

CONFIG = replace(
    parent.CONFIG,
    run="long_sft_7b",
    seq_len=32_768,
    batch_size=8,
    accumulate=2,
    attention="ring",
    mesh=MeshConfig(fsdp=-1, sequence=2),
)


if __name__ == "__main__":
    launch(finetune, CONFIG)
