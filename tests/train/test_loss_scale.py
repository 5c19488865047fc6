"""Loss scaling: the scale by hand, what an overflow leaves alone, restarts to the bit, float16 beside float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internjax import sharding
from internjax.model import quantize
from internjax.model.config import TINY
from internjax.model.lora import LoraConfig, init_lora
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.checkpoint import open_checkpoints
from internjax.train.guard import Guard
from internjax.train.loop import train
from internjax.train.loss_scale import LossScale, scaled
from internjax.train.losses import LossOutput, next_token
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import abstract_state, init_state, make_step
from internjax.train.tracking import TrackingConfig, open_run, read_rows
from tests.weights import random_params


def linear(trainable, frozen, batch, rng):
    """The sum of kernel x factor in float16: the gradient of scale x mean overflows from scale x factor = 65520 on."""
    product = trainable["kernel"].astype(jnp.float16) * batch["factor"].astype(jnp.float16)
    bad = jnp.sum(jnp.where(batch["bad"] > 0, jnp.log(batch["bad"] - 1.0), 0.0))
    return LossOutput(jnp.sum(product.astype(jnp.float32)) + bad, jnp.float32(len(batch["factor"])), {})


def batch_of(factor: float, *, rows: int = 2, bad: float = 0.0):
    return {"factor": np.full((rows, 3), factor, np.float32), "bad": np.full((rows, 1), bad, np.float32)}


def new_state(optimizer, **how):
    return init_state({"kernel": np.ones((1, 3), np.float32)}, optimizer, **how)


def run(optimizer, factors, **how):
    state, step, rows = new_state(optimizer), make_step(linear, optimizer, **how), []
    for factor in factors:
        state, metrics = step(state, batch_of(factor))
        rows.append({name: value.item() for name, value in metrics.items()})
    assert step.num_traces == 1
    return state, rows


def test_the_scale_is_halved_on_overflow_and_doubled_after_good_steps():
    optimizer = scaled(optax.sgd(0.125), LossScale(growth_interval=3))
    state, rows = run(optimizer, [4.0] * 7)
    # 4 x 2^14 is 65536, beyond float16's 65504; 4 x 2^13 is not.
    assert [row["loss_scale"] for row in rows] == [2.0**15, 2.0**14, 2.0**13, 2.0**13, 2.0**13, 2.0**14, 2.0**13]
    assert [row["num_overflows"] for row in rows] == [1, 2, 2, 2, 2, 3, 3]
    assert [np.isfinite(row["grad_norm"]) for row in rows] == [False, False, True, True, True, False, True]
    assert all(row["finite"] and np.isfinite(row["loss"]) for row in rows)
    # A mean over two rows: each of four good steps moves by rate x factor exactly; the scale leaves no trace.
    np.testing.assert_array_equal(state.trainable["kernel"], np.full((1, 3), 1 - 4 * 0.125 * 4, np.float32))
    assert rows[2]["grad_norm"] == pytest.approx(4 * 3**0.5)
    assert int(state.step) == 7 and int(state.opt_state.good_steps) == 1


def test_an_overflow_leaves_parameters_and_optimizer_alone():
    optimizer = scaled(make_optimizer(AdamW(peak_lr=0.05), Constant(warmup_steps=9), 20), LossScale())
    state, _ = run(optimizer, [1.0])
    before, scale = jax.device_get((state.trainable, state.opt_state.inner)), float(state.opt_state.scale)
    state, metrics = make_step(linear, optimizer)(state, batch_of(1000.0))
    after = jax.device_get((state.trainable, state.opt_state.inner))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert float(state.opt_state.scale) == scale / 2 and int(state.data_position) == 2
    assert float(metrics["learning_rate"]) == pytest.approx(0.05 / 9)


def test_what_no_scale_mends_is_not_finite():
    """A loss that is not finite, and a gradient that overflows at the smallest scale, are the guard's."""
    optimizer = scaled(optax.sgd(0.1), LossScale(initial=4.0, minimum=2.0))
    step, state = make_step(linear, optimizer), new_state(optimizer)
    state, metrics = step(state, batch_of(1.0, bad=0.5))
    assert not metrics["finite"] and not np.isfinite(metrics["loss"])
    assert float(state.opt_state.scale) == 4.0 and int(state.opt_state.num_overflows) == 0
    finite, scales = [], []
    for _ in range(3):
        state, metrics = step(state, batch_of(60000.0))
        finite.append(bool(metrics["finite"]))
        scales.append(float(metrics["loss_scale"]))
    assert (finite, scales) == ([True, False, False], [4.0, 2.0, 2.0])
    np.testing.assert_array_equal(state.trainable["kernel"], np.ones((1, 3)))


def test_micro_batches_share_the_scale_and_an_empty_one_adds_nothing():
    def weighted(trainable, frozen, batch, rng):
        out = linear(trainable, frozen, batch, rng)
        return out._replace(
            total=out.total * (batch["factor"][0, 0] > 0), weight=jnp.sum(batch["factor"][:, 0] > 0) * 1.0
        )

    optimizer = scaled(optax.sgd(0.125), LossScale(initial=2.0**10))
    batch = batch_of(4.0, rows=4)
    batch["factor"][1::2] = 0.0  # rows 1 and 3 are the second micro-batch
    state, metrics = make_step(weighted, optimizer, accumulate=2)(new_state(optimizer), batch)
    assert metrics["finite"] and float(metrics["weight"]) == 2.0
    np.testing.assert_array_equal(state.trainable["kernel"], np.full((1, 3), 1 - 0.125 * 4))


def test_a_restart_goes_on_to_the_bit(tmp_path):
    optimizer = scaled(make_optimizer(AdamW(peak_lr=0.05), Constant(), 20), LossScale(growth_interval=2))
    factors = [4.0, 4.0, 4.0, 1.0, 8.0, 2.0]
    whole, _ = run(optimizer, factors)
    state, _ = run(optimizer, factors[:3])
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        restored = checkpoints.restore(new_state(optimizer))
    step = make_step(linear, optimizer)
    for factor in factors[3:]:
        restored, _ = step(restored, batch_of(factor))
    assert int(whole.opt_state.num_overflows) > 2
    for (path, one), two in zip(
        jax.tree_util.tree_leaves_with_path(whole.opt_state), jax.tree.leaves(restored.opt_state)
    ):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes(), path
    assert np.asarray(whole.trainable["kernel"]).tobytes() == np.asarray(restored.trainable["kernel"]).tobytes()


def test_an_overflow_is_no_incident_of_a_run(tmp_path):
    def data(position):
        while True:
            yield batch_of(4.0)

    optimizer = scaled(optax.sgd(0.125), LossScale())
    with open_run(tmp_path / "run", {}, tracking=TrackingConfig(wandb="disabled", progress="none")) as tracked:
        train(
            new_state(optimizer), data, make_step(linear, optimizer), num_steps=4, tracker=tracked, guard=Guard("stop")
        )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["num_overflows"] for row in rows] == [1, 2, 2, 2]
    assert [row["grad_norm"] is None for row in rows] == [True, True, False, False]
    assert all(row["loss"] is not None for row in rows) and not read_rows(tmp_path / "run" / "incidents.jsonl")


def test_the_scale_lives_on_every_device_of_a_mesh():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4), jax.devices()[:4])
    try:
        optimizer = scaled(make_optimizer(AdamW(), Constant(), 9), LossScale())
        state = new_state(optimizer, mesh=mesh)
        abstract = abstract_state(jax.eval_shape(lambda: state.trainable), optimizer, mesh=mesh)
        jax.tree.map(
            lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or pytest.fail(str(x)), state, abstract
        )
        step = make_step(linear, optimizer, mesh=mesh)
        for _ in range(2):
            state, metrics = step(state, jax.device_put(batch_of(4.0, rows=4), sharding.replicated(mesh)))
        assert step.num_traces == 1 and float(metrics["loss_scale"]) == 2.0**14
    finally:
        sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def test_values_that_cannot_be_are_refused():
    optimizer = optax.sgd(0.1)
    assert scaled(optimizer, None) is optimizer
    for wrong in ({"initial": 1000.0}, {"minimum": 0.0}, {"maximum": 2.0}, {"minimum": 2.0**16}):
        with pytest.raises(ValueError, match="powers of two"):
            LossScale(**wrong)
    with pytest.raises(ValueError, match="growth_interval is a number of updates, at least 1; given 0"):
        LossScale(growth_interval=0)


# --- models ----------------------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    TINY, vocab_size=96, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48
)


def token_batch():
    tokens = np.random.default_rng(5).integers(1, 96, (4, 25)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), (4, 24))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones((4, 24), np.float32), positions, np.ones((4, 24), np.int32))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_float16_trains_as_float32_does(method):
    base = jax.device_get(random_params(SMALL, seed=1))
    lora_config = None if method == "full" else LoraConfig(rank=4)
    if method == "qlora":
        base = jax.jit(functools.partial(quantize.quantize_params, scheme="nf4", group=16))(base)
    adapters = None
    if lora_config is not None:
        adapters = jax.device_get(jax.jit(functools.partial(init_lora, lora_config))(base, jax.random.key(2)))

    def losses(dtype, loss_scale):
        optimizer = scaled(make_optimizer(AdamW(peak_lr=1e-2), Constant(), 9), loss_scale)
        loss = next_token(dataclasses.replace(SMALL, dtype=dtype), lora_config=lora_config)
        trainable, frozen = (base, None) if adapters is None else (adapters, base)
        state, step, found = init_state(trainable, optimizer, frozen=frozen), make_step(loss, optimizer), []
        for _ in range(4):
            state, metrics = step(state, token_batch())
            found.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
        return np.asarray(found), int(metrics.get("num_overflows", 0))

    wanted, _ = losses("float32", None)
    found, num_overflows = losses("float16", LossScale())
    assert num_overflows == 0 and wanted[-1, 0] < wanted[0, 0] - 0.1
    np.testing.assert_allclose(found, wanted, rtol=1e-2)
