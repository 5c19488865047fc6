"""Memory of PPO's four models: what is held equals the arrays of a run on 8 devices, with adapters and without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from internjax import sharding
from internjax.model.config import TINY
from internjax.model.lora import LoraConfig, init_lora
from internjax.rlhf import plan, ppo
from internjax.rlhf.config import PPOConfig
from internjax.sharding import MeshConfig
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from tests.weights import random_params

MODEL = dataclasses.replace(
    TINY, vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)
SCALAR = dataclasses.replace(MODEL, head="scalar")
SETTINGS = PPOConfig(minibatch_size=8, max_new_tokens=8)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def on_one_device(tree):
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device == jax.devices()[0])
    return total


@pytest.mark.parametrize("adapters", [False, True], ids=["whole models", "adapters"])
def test_what_is_held_is_what_a_run_allocates(adapters):
    mesh = sharding.make_mesh(MESH)
    try:
        lora = LoraConfig(rank=2, targets=("query", "down", "head")) if adapters else None
        optimizer = make_optimizer(AdamW(), Constant(), 1)
        run = ppo.make_ppo(
            SETTINGS,
            MODEL,
            SCALAR,
            stop_ids=(2,),
            actor_optimizer=optimizer,
            critic_optimizer=optimizer,
            actor_lora=lora,
            critic_lora=lora,
            seed=0,
            mesh=mesh,
        )
        params, scalar = (random_params(config) for config in (MODEL, SCALAR))
        if adapters:
            actor, critic = (init_lora(lora, base, jax.random.key(1)) for base in (params, scalar))
            state = ppo.init(run, actor, critic, actor_base=params, critic_base=scalar)
        else:
            state = ppo.init(run, params, scalar)
        reference = None if adapters else ppo.put_params(params, MODEL, mesh)
        reward = ppo.put_params(scalar, SCALAR, mesh)
    finally:
        sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    job = plan.PPOJob(MODEL, 8, SETTINGS, num_prompts=8, actor_lora=lora, critic_lora=lora, mesh=MESH)
    roles = {role.name: role.bytes for role in plan.estimate(job, num_devices=8).roles if role.exact}
    what = "adapters" if adapters else "parameters"
    assert roles.pop("reference") == on_one_device(reference)
    assert roles.pop("reward model") == on_one_device(reward)
    for name, held in (("actor", state.actor), ("critic", state.critic)):
        assert roles.pop(f"{name}: {what}") == on_one_device(held.trainable)
        assert roles.pop(f"{name}: optimizer state") == on_one_device(held.opt_state)
        if adapters:
            assert roles.pop(f"{name}: base") == on_one_device(held.frozen)
    assert roles == {}


def test_longer_responses_take_more_of_every_moment_and_rows_must_divide():
    def phases(**changes):
        settings = dataclasses.replace(SETTINGS, **changes)
        return plan.estimate(plan.PPOJob(MODEL, 8, settings, num_prompts=8, mesh=MESH), num_devices=8).phases

    short, long = phases(), phases(max_new_tokens=500)
    assert set(short) == {"drawing", "scoring", "updating the actor", "updating the critic"}
    assert all(long[name] > short[name] for name in short)
    with pytest.raises(ValueError, match=r"the number of prompts 6 is no multiple of the mesh's 4 row shards"):
        plan.estimate(plan.PPOJob(MODEL, 8, SETTINGS, num_prompts=6, mesh=MESH), num_devices=8)
