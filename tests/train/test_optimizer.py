"""The optimizer against Adam written out in NumPy, and the schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from internjax.train.optimizer import (
    AdamW,
    Constant,
    Cosine,
    Linear,
    decay_mask,
    global_norm,
    learning_rate,
    make_optimizer,
)


def params():
    rng = np.random.default_rng(0)
    return {
        "embed": {"embedding": rng.normal(size=(7, 4)).astype(np.float32)},
        "layers": {
            "norm": {"scale": rng.normal(size=(2, 4)).astype(np.float32)},
            "query": {"kernel": rng.normal(size=(2, 4, 4)).astype(np.float32)},
        },
    }


def gradients(step: int):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params())


def adamw_in_numpy(config: AdamW, rates: list[float]):
    """Five lines of the paper per leaf, in float64."""
    flat, tree = jax.tree.flatten(params())
    decayed = [False, False, True]  # embedding, scale, kernel: the order of the flattened tree
    flat = [p.astype(np.float64) for p in flat]
    mean, square = [0.0 * p for p in flat], [0.0 * p for p in flat]
    for t, rate in enumerate(rates, start=1):
        grads = [g.astype(np.float64) for g in jax.tree.leaves(gradients(t))]
        norm = math.sqrt(sum((g**2).sum() for g in grads))
        scale = 1.0 if config.clip_norm is None else min(1.0, config.clip_norm / norm)
        for i, g in enumerate(grads):
            g = g * scale
            mean[i] = config.b1 * mean[i] + (1 - config.b1) * g
            square[i] = config.b2 * square[i] + (1 - config.b2) * g**2
            step = (mean[i] / (1 - config.b1**t)) / (np.sqrt(square[i] / (1 - config.b2**t)) + config.eps)
            flat[i] = flat[i] - rate * (step + (config.weight_decay * flat[i] if decayed[i] else 0.0))
    return jax.tree.unflatten(tree, flat)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_adamw_is_the_formula(clip_norm):
    config = AdamW(peak_lr=0.05, weight_decay=0.3, clip_norm=clip_norm)
    optimizer = make_optimizer(config, Linear(warmup_steps=2), num_steps=6)
    trained, state = params(), optimizer.init(params())
    for t in range(1, 7):
        updates, state = optimizer.update(gradients(t), state, trained)
        trained = optax.apply_updates(trained, updates)
    rates = [float(learning_rate(Linear(2), t, peak_lr=0.05, num_steps=6)) for t in range(6)]
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=3e-6), trained, adamw_in_numpy(config, rates)
    )


def test_only_kernels_and_adapter_factors_decay():
    tree = params() | {"lora": {"query": {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 2), np.float32)}}}
    assert decay_mask(tree) == {
        "embed": {"embedding": False},
        "layers": {"norm": {"scale": False}, "query": {"kernel": True}},
        "lora": {"query": {"a": True, "b": True}},
    }
    optimizer = make_optimizer(AdamW(peak_lr=0.1, weight_decay=0.5), Constant(), num_steps=1)
    updates, _ = optimizer.update(jax.tree.map(np.zeros_like, tree), optimizer.init(tree), tree)
    np.testing.assert_allclose(
        updates["layers"]["query"]["kernel"], -0.05 * tree["layers"]["query"]["kernel"], rtol=1e-6
    )
    assert not np.any(updates["embed"]["embedding"]) and not np.any(updates["layers"]["norm"]["scale"])


def test_schedules_at_hand_computed_steps():
    def rates(schedule, steps, num_steps=12):
        return [float(learning_rate(schedule, step, peak_lr=2.0, num_steps=num_steps)) for step in steps]

    # Warm-up of 4: the first update has a quarter of the peak, the fourth the peak; 8 steps are left to fall.
    np.testing.assert_allclose(rates(Cosine(4, 0.1), [0, 3, 7, 11, 50]), [0.5, 2.0, 1.1, 0.2, 0.2], rtol=1e-6)
    np.testing.assert_allclose(rates(Linear(4, 0.5), [0, 3, 7, 11, 50]), [0.5, 2.0, 1.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates(Constant(4), [0, 1, 3, 11]), [0.5, 1.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates(Constant(), [0]), [2.0])
    cosine_at_quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    np.testing.assert_allclose(rates(Cosine(4, 0.1), [5]), [2 * cosine_at_quarter], rtol=1e-6)


def test_the_rate_of_the_last_update_stands_in_the_state():
    optimizer = make_optimizer(AdamW(peak_lr=1.0), Constant(warmup_steps=4), num_steps=8)
    state = optimizer.init(params())
    for wanted in (0.25, 0.5, 0.75):
        _, state = optimizer.update(gradients(1), state, params())
        assert float(optax.tree_utils.tree_get(state, "learning_rate")) == wanted


def test_bfloat16_moments_are_stored_small_and_stay_close():
    ends = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(AdamW(peak_lr=0.01, moment_dtype=dtype), Constant(), num_steps=20)
        trained, state = params(), optimizer.init(params())
        stored = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim}
        assert stored == {dtype}
        for t in range(20):
            updates, state = optimizer.update(gradients(t), state, trained)
            assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {dtype}
            trained = optax.apply_updates(trained, updates)
        ends[dtype] = trained
    moved = global_norm(jax.tree.map(lambda a, b: a - b, ends["float32"], params()))
    apart = global_norm(jax.tree.map(lambda a, b: a - b, ends["float32"], ends["bfloat16"]))
    assert 0 < float(apart) < 0.02 * float(moved)


def test_global_norm_accumulates_in_float32():
    # 40,000 ones: a bfloat16 accumulator would stop growing at 256.
    assert float(global_norm({"a": jnp.ones(40_000, jnp.bfloat16)})) == 200.0


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: AdamW(b1=1.0), "b1 and b2"),
        (lambda: AdamW(clip_norm=0.0), "clip_norm must be positive"),
        (lambda: AdamW(moment_dtype="float16"), "float16"),
        (lambda: AdamW(eps=0.0), "eps must be positive"),
        (lambda: make_optimizer(AdamW(), Cosine(warmup_steps=11), num_steps=10), "warms up for 11 of 10"),
        (lambda: make_optimizer(AdamW(), Cosine(), num_steps=0), "num_steps must be at least 1"),
        (lambda: make_optimizer(optax.adam(1e-3), Cosine(), num_steps=5), "unknown optimizer"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
