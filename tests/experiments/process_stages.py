"""Pre-trains and fine-tunes in a job of several processes: the program that test_processes.py starts.

python process_stages.py CORPUS OUTPUT
"""

import sys
from pathlib import Path

from experiments.callbacks import HeldOut, Prompts
from experiments.command_line import guarded
from experiments.finetuning import finetune
from experiments.pretraining import pretrain
from internjax.sharding import MeshConfig
from tests.experiments.conftest import finetuning, pretraining

MESH = MeshConfig(fsdp=2, tensor=2)


def main(folders: tuple[Path, Path]) -> None:
    corpus, output = folders
    watched = dict(
        mesh=MESH,
        prompts=Prompts(texts=("assert",), every=12, max_new_tokens=4),
        held_out=HeldOut(str(corpus / "tokens"), every=12, num_batches=1),
    )
    trained = pretrain(pretraining(corpus, output / "run", **watched))
    finetune(finetuning(corpus, trained.folder, output / "tuned", mesh=MESH, num_steps=4))


if __name__ == "__main__":
    guarded(main, (Path(sys.argv[1]), Path(sys.argv[2])))
