"""Supervised fine-tuning of InternLM2-7B to call tools: plugin and interpreter turns beside plain conversations.

    python -m experiments.tool_sft_7b --data tools.jsonl chats.jsonl
    python -m experiments.tool_sft_7b --data tools.jsonl chats.jsonl --reading.weight 0.5 0.5 --method full

Hardware: one GPU of 80 GB; not yet run on GPU
Time: not measured; derived: 22 H100 hours for 1B tokens at an assumed 40 % MFU

Differs from sft_lora_7b in rows of 8,192 tokens, as tools answer at length, in the share of the first file (half of
the rows; name as many weights as files), and in keeping the part of a longer conversation that fits. Files hold OpenAI
messages with tools, or MOSS with its commands; calls are learned, what a tool answers is not (`python -m
data_pipelines.preview --data tools.jsonl --model MODEL` shows it in colours).
Expected result: not run yet; calls on held-out problems should be well formed, as the tiny chain's are.
"""

from dataclasses import replace

from data_pipelines.conversations import Reading
from experiments import sft_lora_7b as parent
from experiments.command_line import launch
from experiments.finetuning import finetune

CONFIG = replace(
    parent.CONFIG,
    run="tool_sft_7b",
    reading=Reading(weight=(0.5, 0.5), too_long="truncate"),
    seq_len=8192,
    batch_size=8,
)


if __name__ == "__main__":
    launch(finetune, CONFIG)
