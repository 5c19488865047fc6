"""Fine-tuning of your own checkpoint on your own conversations; architecture, tokenizer and template come from it.

    python -m experiments.finetune --model MODEL --data my.jsonl --run my_run
    python -m experiments.finetune --model MODEL --data a.jsonl b.json --method full --optimizer.peak-lr 2e-5 --run full
    python -m serve my_run

Hardware: anything; a laptop CPU for models of a few million parameters
Time: depends on model and data
"""

from experiments.command_line import launch
from experiments.finetuning import Finetune, finetune

CONFIG = Finetune()

if __name__ == "__main__":
    launch(finetune, CONFIG)
