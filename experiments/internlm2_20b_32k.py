"""Pre-training of InternLM2-20B, second phase: 32k tokens; as internlm2_7b_32k.

    python -m experiments.internlm2_20b_32k --data.folder tokens/ tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 8

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 41,000 H100 hours at an assumed 25 % MFU

Differs from internlm2_7b_32k in the model, which goes on from internlm2_20b, in the batch of 5M tokens, in the number
of steps (a tenth of that run's), and in the mesh: 8 shards, rows cut in two, 4 tensor slices; 20 micro-batches of 8
rows.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b_32k
from experiments import internlm2_20b as parent
from experiments.command_line import launch
from experiments.pretraining import pretrain
from internjax.sharding import MeshConfig

CONFIG = replace(
    internlm2_7b_32k.CONFIG,
    run="internlm2_20b_32k",
    init="internlm2_20b@400000",
    model=internlm2_7b_32k.lengthened(parent.CONFIG.model),
    data=replace(internlm2_7b_32k.CONFIG.data, batch_size=160),
    num_steps=40_000,
    accumulate=20,
    mesh=MeshConfig(fsdp=-1, sequence=2, tensor=4),
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
