"""Memory of PPO's four models on one device: actor, reference, reward model and critic, by role and by stage.

What is held is exact (shapes and shardings of what `ppo.init` and `put_params` allocate); the working sets of drawing,
scoring and updating are estimates, as in `train.memory`. With adapters the reference is the actor's own base.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig
from internjax.rlhf.config import ACTOR_OPTIMIZER, CRITIC_OPTIMIZER, PPOConfig
from internjax.rlhf.rollout import ENTROPY_CHUNK
from internjax.sharding import MeshConfig
from internjax.train import memory
from internjax.train.memory import Held, Job, Memory, Role
from internjax.train.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class PPOJob:
    """What the memory of a PPO run follows from."""

    model: ModelConfig
    """Actor and reference."""
    prompt_length: int
    ppo: PPOConfig = PPOConfig()
    num_prompts: int = 64
    """Responses drawn at once, over all devices."""
    scalar_model: ModelConfig | None = None
    """Reward model and critic; None: as the actor, with a scalar head."""
    actor_lora: LoraConfig | None = None
    critic_lora: LoraConfig | None = None
    actor_optimizer: Optimizer = ACTOR_OPTIMIZER
    critic_optimizer: Optimizer = CRITIC_OPTIMIZER
    pretrain_rows: int = 0
    """Rows of pre-training text mixed into one update."""
    mesh: MeshConfig = MeshConfig()

    @property
    def length(self) -> int:
        return self.prompt_length + self.ppo.max_new_tokens

    @property
    def scalar(self) -> ModelConfig:
        if self.scalar_model is not None:
            return self.scalar_model
        return dataclasses.replace(self.model, head="scalar", tie_embeddings=False, norm_head=False)


class _Trained(NamedTuple):
    job: Job
    held: Held


def estimate(job: PPOJob, *, num_devices: int) -> Memory:
    """Returns one device's memory over an iteration; raises ValueError where mesh, models and batch do not divide."""
    shape = job.mesh.shape(num_devices)
    rows = job.ppo.minibatch_size + job.pretrain_rows
    actor = _trained(job, job.model, rows, job.actor_lora, job.actor_optimizer, shape)
    critic = _trained(job, job.scalar, job.ppo.minibatch_size, job.critic_lora, job.critic_optimizer, shape)
    reward = memory.held(_job(job, job.scalar, job.num_prompts, LoraConfig(), job.critic_optimizer), shape).frozen
    reference = 0
    if job.actor_lora is None:
        reference = memory.held(_job(job, job.model, rows, LoraConfig(), job.actor_optimizer), shape).frozen
    phases = {
        "drawing": _drawing(job, shape),
        "scoring": _scoring(job, shape),
        "updating the actor": _updating(actor, shape),
        "updating the critic": _updating(critic, shape),
    }
    largest = max(phases, key=phases.get)
    roles = (
        *_roles("actor", actor),
        Role("reference", reference, True, "" if reference else "the actor's base, without its adapters"),
        *_roles("critic", critic),
        Role("reward model", reward, True, ""),
        Role("working set", phases[largest], False, f"largest moment: {largest}"),
    )
    return Memory(roles, phases)


def _job(job: PPOJob, model: ModelConfig, rows: int, lora: LoraConfig | None, optimizer: Optimizer) -> Job:
    return Job(
        model=model,
        batch_size=rows,
        seq_len=job.length,
        mesh=job.mesh,
        accumulate=job.ppo.accumulate,
        optimizer=optimizer,
        lora=lora,
    )


def _trained(job: PPOJob, model: ModelConfig, rows: int, lora, optimizer: Optimizer, shape) -> _Trained:
    trained = _job(job, model, rows, lora, optimizer)
    return _Trained(trained, memory.held(trained, shape))


def _roles(name: str, trained: _Trained) -> tuple[Role, ...]:
    held, what = trained.held, "parameters" if trained.job.lora is None else "adapters"
    base = (Role(f"{name}: base", held.frozen, True, ""),) if held.frozen else ()
    return (
        *base,
        Role(f"{name}: {what}", held.trainable, True, ""),
        Role(f"{name}: optimizer state", held.optimizer, True, type(trained.job.optimizer).__name__),
    )


def _updating(trained: _Trained, shape) -> int:
    job = trained.job
    rows = memory.rows_per_device(job, shape)
    if job.model.head == "scalar":
        # One score per position: the layers' activations without a vocabulary to speak of.
        plain = dataclasses.replace(job.model, head="lm", vocab_size=8 * shape[3])
        job = dataclasses.replace(job, model=plain)
    return max(memory.estimate(job, shape, trained.held, rows=rows).phases.values())


def _rows(job: PPOJob, num_rows: int, shape, what: str) -> int:
    shards = shape[0] * shape[1]
    if num_rows % shards:
        raise ValueError(
            f"{what} {num_rows} is no multiple of the mesh's {shards} row shards (data {shape[0]} x fsdp {shape[1]}). "
            f"Choose a multiple of {shards}."
        )
    return num_rows // shards


def _drawing(job: PPOJob, shape) -> int:
    """Bytes of the key/value cache, and of one step's logits and the sampler's sorted copy."""
    rows = _rows(job, job.num_prompts, shape, "the number of prompts")
    cache = memory.cache_bytes(job.model, rows, job.length, dtype=job.model.dtype, tensor=shape[3])
    return cache + 2 * 4 * rows * job.model.vocab_size


def _scoring(job: PPOJob, shape) -> int:
    """Bytes of one block: logits, probabilities and their logarithms of a chunk, and a layer's forward pass."""
    block = job.ppo.minibatch_size // job.ppo.accumulate
    rows = _rows(job, block, shape, "minibatch_size / accumulate")
    config = memory.local_config(job.model, shape[3])
    logits = 3 * 4 * rows * min(ENTROPY_CHUNK, job.length) * config.vocab_size
    widest = max(config.ffn_dim, config.d_model) * rows * job.length // shape[2]
    return logits + 4 * widest * jnp.dtype(config.dtype).itemsize
