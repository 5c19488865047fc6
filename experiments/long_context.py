"""Long-context continuation of a checkpoint: 200K tokens a row, rotary base raised by the dynamic-NTK formula.

    python -m experiments.long_context --init MODEL --data.folder tokens/ tokens/ --data.tokenizer MODEL --mesh.fsdp 8
    python -m experiments.long_context --init MODEL --data.folder a/ b/ --data.tokenizer MODEL --data.seq-len 65536

Hardware: 64 GPUs of 80 GB; not yet run on GPU
Time: not measured; derived: 280 H100 hours at an assumed 17 % MFU

InternLM2 reaches 200K without such training: it is trained at 32k, and dynamic NTK raises the rotary base while serving
(the report, section 1). This recipe trains on at that base, so that it holds at every length and needs no scaling:
theta' = theta x (factor x length / trained - (factor - 1))^(H / (H - 2)), with theta, factor and trained length of the
checkpoint (factor 2 where it names none); 11.95 million for InternLM2-7B at 204,800 tokens.
Half of the rows are documents of up to 32,768 tokens, as the report does at 32k; the folder is named twice. Numbers of
steps and rows, rate and mesh are our choice.
Expected result: not run yet; the loss of late positions of a long row should fall below that of early ones.
"""

from dataclasses import replace

from experiments.command_line import launch
from experiments.continue_7b import CONFIG as PARENT
from experiments.continue_7b import with_architecture
from experiments.pretraining import Pretrain, pretrain
from experiments.training import Trained
from internjax.model.config import INTERNLM2_7B, DynamicNTK, ModelConfig, NoScaling
from internjax.model.rope import ntk_theta
from internjax.sharding import MeshConfig
from internjax.train.optimizer import AdamW, Cosine


def stretched(model: ModelConfig, length: int) -> ModelConfig:
    """Returns `model` for rows of `length` tokens; itself where it was trained for them."""
    if length <= model.max_position_embeddings:
        return model
    factor = model.rope_scaling.factor if isinstance(model.rope_scaling, DynamicNTK) else 2.0
    theta = ntk_theta(model.rope_theta, factor, length, model.max_position_embeddings, model.head_dim)
    return replace(model, rope_theta=theta, rope_scaling=NoScaling(), max_position_embeddings=length)


CONFIG = replace(
    PARENT,
    run="long_context",
    model=replace(stretched(INTERNLM2_7B, 204_800), remat="full", attention="ring"),
    data=replace(
        PARENT.data, batch_size=8, seq_len=204_800, weight=(0.5, 0.5), min_tokens=(0, 32_769), max_tokens=(32_768, 0)
    ),
    num_steps=500,
    optimizer=AdamW(peak_lr=2e-5),
    schedule=Cosine(warmup_steps=50, final_fraction=0.1),
    accumulate=1,
    mesh=MeshConfig(fsdp=-1, sequence=8),
)


def run(config: Pretrain) -> Trained:
    """Returns the run of the continuation."""
    config = with_architecture(config, default=CONFIG.model)
    return pretrain(replace(config, model=stretched(config.model, config.data.seq_len)))


if __name__ == "__main__":
    launch(run, CONFIG)
