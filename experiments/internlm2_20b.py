"""Pre-training of InternLM2-20B, first phase; as internlm2_7b, with 5M tokens a batch and tensor parallelism.

    python -m experiments.internlm2_20b --data.folder tokens/ --data.tokenizer tokenizer/ --mesh.fsdp 16 --mesh.tensor 4

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 180,000 H100 hours at an assumed 40 % MFU

Differs from internlm2_7b in the model, in the batch (5M tokens: the report), in the number of steps (as many tokens:
our choice), and in the mesh with its micro-batches: 20 of 64 rows, 4 on each of 16 shards.
Expected result: no run of this length yet, so no loss is given.
"""

from dataclasses import replace

from experiments import internlm2_7b
from experiments.command_line import launch
from experiments.pretraining import pretrain
from internjax.model.config import INTERNLM2_20B
from internjax.sharding import MeshConfig

_PARENT = internlm2_7b.CONFIG.model

CONFIG = replace(
    internlm2_7b.CONFIG,
    run="internlm2_20b",
    model=replace(
        INTERNLM2_20B,
        rope_theta=_PARENT.rope_theta,
        rope_scaling=_PARENT.rope_scaling,
        max_position_embeddings=_PARENT.max_position_embeddings,
        remat=_PARENT.remat,
        attention=_PARENT.attention,
    ),
    data=replace(internlm2_7b.CONFIG.data, batch_size=1280),
    num_steps=400_000,
    accumulate=20,
    mesh=MeshConfig(fsdp=-1, tensor=4),
)

if __name__ == "__main__":
    launch(pretrain, CONFIG)
