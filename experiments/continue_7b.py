"""Continued pre-training of InternLM2-7B on a domain corpus, with general text among it against forgetting.

    python -m experiments.continue_7b --init MODEL --data.folder domain/ general/ --data.tokenizer MODEL
    python -m experiments.continue_7b --init mine --data.folder a/ b/ --data.tokenizer mine/ --num-steps 500

Hardware: 8 GPUs of 80 GB for a 7B model; not yet run on GPU
Time: not measured; derived: 70 H100 hours at an assumed 40 % MFU

Architecture, rotary base and length come from the checkpoint; the model in CONFIG says how it is computed. Two folders:
four fifths of the rows from the first, one fifth from the second; for others give --data.weight as many numbers.
Rate, schedule and shares are our choice: a tenth of the rate of pre-training, and a decay at the end, so that the same
run can be made longer from its last checkpoint before the decay.
Expected result: not run yet; the loss on the domain should fall and that on general text stay.
"""

import dataclasses
from dataclasses import replace

from experiments.command_line import launch
from experiments.pretraining import Pretrain, TokenData, pretrain
from experiments.training import Trained
from internjax.hf.open import read_config
from internjax.model.config import INTERNLM2_7B, ModelConfig
from internjax.sharding import MeshConfig
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.optimizer import WSD, AdamW

HOW = ("dtype", "param_dtype", "remat", "unroll_layers", "attention")
"""Fields of a model that say how it is computed; all others come from the checkpoint."""

CONFIG = Pretrain(
    run="continue_7b",
    init="hf:internlm/internlm2-7b",
    model=replace(INTERNLM2_7B, remat="dots", attention="chunked"),
    data=TokenData(batch_size=256, seq_len=4096, weight=(0.8, 0.2)),
    num_steps=2000,
    optimizer=AdamW(peak_lr=3e-5),
    schedule=WSD(warmup_steps=100, decay_fraction=0.2, shape="sqrt"),
    accumulate=16,
    mesh=MeshConfig(fsdp=-1),
    checkpoint=CheckpointConfig(every=200, max_to_keep=3),
)


def with_architecture(config: Pretrain, *, default: ModelConfig) -> Pretrain:
    """Returns `config` with the model of its checkpoint, computed as `config` says.

    `default` is the recipe's own model: another field that the user changed from it would be overruled, and is refused.
    """
    if config.init is None:
        raise ValueError("no checkpoint given to go on from; name one: --init MODEL")
    changed = [
        f"model.{field.name} {getattr(config.model, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in HOW and getattr(config.model, field.name) != getattr(default, field.name)
    ]
    if changed:
        raise ValueError(
            f"the architecture comes from {config.init}, but the command sets {', '.join(changed)}. Leave that out; "
            f"what may be set is {', '.join(HOW)}."
        )
    how = {name: getattr(config.model, name) for name in HOW}
    return replace(config, model=replace(read_config(config.init, allow_unknown=config.allow_unknown), **how))


def continued(config: Pretrain, *, default: ModelConfig) -> Trained:
    """Returns the run of a continued pre-training whose recipe names the model `default`."""
    return pretrain(with_architecture(config, default=default))


def run(config: Pretrain) -> Trained:
    """Returns the run of the continued pre-training."""
    return continued(config, default=CONFIG.model)


if __name__ == "__main__":
    launch(run, CONFIG)
