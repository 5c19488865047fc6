"""The step: an own loss in ten lines, accumulation, donation, one trace, the guard against what is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internjax.train.losses import LossOutput
from internjax.train.optimizer import AdamW, Constant, make_optimizer
from internjax.train.step import init_state, make_step


def squared_error(trainable, frozen, batch, rng):
    del rng
    offset = 0.0 if frozen is None else frozen["offset"]
    error = (batch["x"] @ trainable["kernel"] + offset - batch["y"]) * batch["weight"][:, None]
    return LossOutput(jnp.sum(error**2), jnp.sum(batch["weight"]), {"absolute_error": jnp.sum(jnp.abs(error))})


def batch_of(position: int, rows: int = 8):
    rng = np.random.default_rng([7, position])
    return {
        "x": rng.normal(size=(rows, 4)).astype(np.float32),
        "y": rng.normal(size=(rows, 2)).astype(np.float32),
        # Unequal weights: a mean of micro-batch means would differ from the mean over the batch.
        "weight": (np.arange(rows) % 3).astype(np.float32),
    }


def kernel():
    return np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)


OPTIMIZER = make_optimizer(AdamW(peak_lr=0.05), Constant(), num_steps=100)


def test_an_own_loss_is_ten_lines():
    def loss(trainable, frozen, batch, rng):
        error = batch["x"] @ trainable["kernel"] - batch["y"]
        return LossOutput(jnp.sum(error**2), jnp.asarray(error.size, jnp.float32), {})

    optimizer = make_optimizer(AdamW(peak_lr=0.1, weight_decay=0.0), Constant(), num_steps=200)
    state, step = init_state({"kernel": np.zeros((4, 2), np.float32)}, optimizer, seed=0), make_step(loss, optimizer)
    x, wanted = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32), kernel()
    for _ in range(200):
        state, metrics = step(state, {"x": x, "y": x @ wanted})
    assert float(metrics["loss"]) < 1e-4
    np.testing.assert_allclose(state.trainable["kernel"], wanted, atol=0.02)


def test_one_update_is_the_gradient_of_the_weighted_mean():
    batch = batch_of(0)
    state, metrics = make_step(squared_error, optax.sgd(0.5))(init_state({"kernel": kernel()}, optax.sgd(0.5)), batch)
    weight = batch["weight"][:, None]
    error = (batch["x"] @ kernel() - batch["y"]) * weight
    gradient = 2 * batch["x"].T @ (error * weight) / weight.sum()
    np.testing.assert_allclose(state.trainable["kernel"], kernel() - 0.5 * gradient, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (error**2).sum() / weight.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((gradient**2).sum()), rtol=1e-5)
    np.testing.assert_allclose(metrics["absolute_error"], np.abs(error).sum() / weight.sum(), rtol=1e-5)
    assert metrics["weight"] == weight.sum() and bool(metrics["finite"])
    assert "learning_rate" not in metrics  # plain optax reports none


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_n_micro_batches_are_one_batch(accumulate):
    def run(accumulate):
        state, step = (
            init_state({"kernel": kernel()}, OPTIMIZER),
            make_step(squared_error, OPTIMIZER, accumulate=accumulate),
        )
        rows = []
        for position in range(5):
            state, metrics = step(state, batch_of(position))
            rows.append({name: float(value) for name, value in metrics.items()})
        return state, rows

    (whole, whole_rows), (cut, cut_rows) = run(1), run(accumulate)
    np.testing.assert_allclose(cut.trainable["kernel"], whole.trainable["kernel"], rtol=1e-5, atol=1e-6)
    for a, b in zip(whole_rows, cut_rows):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_a_batch_that_cannot_be_cut_is_refused():
    step = make_step(squared_error, OPTIMIZER, accumulate=3)
    with pytest.raises(ValueError, match="8 rows cannot be cut into 3"):
        step(init_state({"kernel": kernel()}, OPTIMIZER), batch_of(0))


def test_the_state_is_donated_and_the_frozen_part_is_not_copied():
    offset = jnp.ones((2,), jnp.float32)
    state = init_state({"kernel": jnp.asarray(kernel())}, OPTIMIZER, frozen={"offset": offset})
    given, frozen_at = state, offset.unsafe_buffer_pointer()
    step = make_step(squared_error, OPTIMIZER)
    for position in range(2):
        state, _ = step(state, batch_of(position))
    gone = jax.tree.leaves((given.trainable, given.opt_state, given.step, given.data_position))
    assert all(leaf.is_deleted() for leaf in gone)
    assert state.frozen["offset"] is offset and not offset.is_deleted()
    assert state.frozen["offset"].unsafe_buffer_pointer() == frozen_at


def test_a_leaf_may_be_trained_and_frozen_at_once():
    shared = jnp.asarray(kernel())

    def loss(trainable, frozen, batch, rng):
        apart = trainable["kernel"] - frozen["kernel"] - 1.0
        return LossOutput(jnp.sum(apart**2), jnp.asarray(1.0), {})

    state = init_state({"kernel": shared}, OPTIMIZER, frozen={"kernel": shared})
    state, _ = make_step(loss, OPTIMIZER)(state, batch_of(0))
    np.testing.assert_array_equal(state.frozen["kernel"], kernel())
    assert not np.array_equal(state.trainable["kernel"], kernel())


def test_the_step_is_traced_once():
    for frozen in (None, {"offset": jnp.ones(2)}):
        state, step = init_state({"kernel": kernel()}, OPTIMIZER, frozen=frozen), make_step(squared_error, OPTIMIZER)
        for position in range(4):
            state, _ = step(state, batch_of(position))
        assert step.num_traces == 1
        assert int(state.step) == 4 and int(state.data_position) == 4


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_left_out(where):
    def loss(trainable, frozen, batch, rng):
        # sqrt has an infinite slope at 0: a finite loss with a gradient that is not.
        bad = (
            jnp.log(batch["bad"] - 1.0)
            if where == "loss"
            else jnp.sqrt(jnp.sum(trainable["kernel"] * (1 - batch["bad"])))
        )
        out = squared_error(trainable, frozen, batch, rng)
        return out._replace(total=out.total + jnp.where(batch["bad"].sum() > 0, bad.sum(), 0.0))

    def with_flag(position, bad):
        return batch_of(position) | {"bad": np.full((1,), bad, np.float32)}

    step, state = make_step(loss, OPTIMIZER), init_state({"kernel": np.abs(kernel())}, OPTIMIZER)
    state, metrics = step(state, with_flag(0, 0.0) if where == "loss" else with_flag(0, 0.5))
    if where == "loss":
        assert bool(metrics["finite"])
    before = jax.device_get((state.trainable, state.opt_state))
    state, metrics = step(state, with_flag(1, 1.0))
    assert not bool(metrics["finite"])
    assert np.isfinite(float(metrics["loss"])) == (where == "gradient")
    after = jax.device_get((state.trainable, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert int(state.step) == 2 and int(state.data_position) == 2


def test_a_batch_without_any_weight_is_flagged():
    state, step = init_state({"kernel": kernel()}, OPTIMIZER), make_step(squared_error, OPTIMIZER)
    state, metrics = step(state, batch_of(0) | {"weight": np.zeros(8, np.float32)})
    assert not bool(metrics["finite"]) and float(metrics["weight"]) == 0
    np.testing.assert_array_equal(state.trainable["kernel"], kernel())


def test_the_rng_of_a_step_follows_from_seed_and_step_alone():
    def loss(trainable, frozen, batch, rng):
        draw = jax.random.uniform(rng)
        return LossOutput(jnp.sum(trainable["kernel"]) * 0.0 + draw, jnp.asarray(1.0), {})

    def draws(seed, state=None):
        state, step = state or init_state({"kernel": kernel()}, OPTIMIZER, seed=seed), make_step(loss, OPTIMIZER)
        seen = []
        for _ in range(3):
            state, metrics = step(state, batch_of(0))
            seen.append(float(metrics["loss"]))
        return seen

    first = draws(0)
    assert len(set(first)) == 3 and draws(0) == first and not set(draws(1)) & set(first)
    later = init_state({"kernel": kernel()}, OPTIMIZER, seed=0)
    later = dataclasses.replace(later, step=jnp.asarray(2, jnp.int32))
    assert draws(0, later)[0] == first[2]


def test_a_loss_may_not_take_the_names_of_the_step():
    def loss(trainable, frozen, batch, rng):
        return squared_error(trainable, frozen, batch, rng)._replace(metrics={"grad_norm": jnp.ones(())})

    with pytest.raises(ValueError, match="grad_norm"):
        make_step(loss, OPTIMIZER)(init_state({"kernel": kernel()}, OPTIMIZER), batch_of(0))


def test_bfloat16_parameters_get_float32_gradients_and_stay_bfloat16():
    state = init_state({"kernel": jnp.asarray(kernel(), jnp.bfloat16)}, OPTIMIZER)
    for accumulate in (1, 2):
        state, metrics = make_step(squared_error, OPTIMIZER, accumulate=accumulate)(state, batch_of(0))
        assert state.trainable["kernel"].dtype == jnp.bfloat16 and metrics["grad_norm"].dtype == jnp.float32
