"""Adapters of every kind: identity at step 0, merge, gradients, several side by side, targets, refusals."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.model import decoder, quantize
from internjax.model.config import ModelConfig
from internjax.model.lora import (
    Lora,
    LoraConfig,
    adapted,
    apply_config,
    init_lora,
    initialise,
    logical_axes,
    merge,
    of_original_base,
    select,
    stack,
    with_gains,
)
from tests.weights import random_params

SMALL = ModelConfig(
    vocab_size=61, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32"
)
INPUTS = np.arange(18, dtype=np.int32).reshape(2, 9)
KINDS = {
    "lora": LoraConfig(rank=4, alpha=8.0),
    "rslora": LoraConfig(rank=4, alpha=8.0, scaling="rslora"),
    "dora": LoraConfig(rank=4, alpha=8.0, kind="dora"),
    "pissa": LoraConfig(rank=4, alpha=8.0, initialisation="pissa", targets=("query", "down", "head")),
    "all at once": LoraConfig(rank=3, alpha=5.0, scaling="rslora", kind="dora", initialisation="pissa"),
}


@functools.cache
def base_params():
    return random_params(SMALL)


@pytest.fixture
def params():
    return base_params()


@functools.cache
def quantised(scheme, **how):
    return jax.jit(functools.partial(quantize.quantize_params, scheme=scheme, **how))(base_params())


@functools.cache
def started(kind):
    return initialise(KINDS[kind], base_params(), jax.random.key(1))


def trained(weights, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.05 * rng.standard_normal(leaf.shape, np.float32), jax.device_get(weights))


def logits(params, lora=None, **inputs):
    """One program for all adapters of one structure."""
    return np.asarray(decoder.logits(params, INPUTS, config=SMALL, lora=lora, **inputs))


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_fresh_adapters_are_exactly_the_identity(params, scheme):
    base = params if scheme is None else quantised(scheme, group=16)
    config = LoraConfig(rank=4)
    lora = apply_config(init_lora(config, base, jax.random.key(1)), config)
    np.testing.assert_array_equal(logits(base, lora), logits(base))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_starts_at_the_given_model(params, kind):
    start = started(kind)
    same = all(a is b for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(params), strict=True))
    assert same == (KINDS[kind].initialisation == "zero")
    want = logits(params)
    exact = kind in ("lora", "rslora")
    got = logits(start.params, apply_config(start.weights, KINDS[kind]))
    np.testing.assert_allclose(got, want, rtol=0, atol=0 if exact else 2e-6)
    if not same:  # PiSSA moved something into the adapters
        assert np.abs(logits(start.params) - want).max() > 1e-2


@pytest.mark.parametrize("scheme", ["int4", "nf4"])
def test_dora_over_a_quantised_base_starts_at_it(scheme):
    base = quantised(scheme, group=16, double=True)
    config = dataclasses.replace(KINDS["dora"], targets=("value", "down"))
    lora = apply_config(init_lora(config, base, jax.random.key(1)), config)
    np.testing.assert_allclose(logits(base, lora), logits(base), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_every_kind_is_exact(params, kind):
    start = started(kind)
    lora = apply_config(trained(start.weights), KINDS[kind])
    want = logits(start.params, lora)
    np.testing.assert_allclose(logits(merge(start.params, lora)), want, rtol=0, atol=1e-5)
    assert np.abs(want - logits(params)).max() > 1e-2
    if kind == "rslora":
        assert lora.scale == 4.0


def test_dora_is_its_formula_and_its_norm_is_constant_backward():
    """m (x W + s x A B) / |W + s A B|, with the length of every column held fixed by differentiation."""
    rng = np.random.default_rng(0)
    kernel, a, b, x = (rng.standard_normal(shape, np.float32) for shape in ((6, 5), (6, 2), (2, 5), (3, 6)))
    node = {"a": a, "b": b, "magnitude": rng.uniform(0.5, 2.0, 5).astype(np.float32)}

    def loss(node, x):
        lora = with_gains(Lora({"head": node}, 0.7), {"head": {"kernel": kernel}})
        return jnp.sum(jnp.sin(adapted(x @ kernel, x, lora.weights["head"], scale=0.7)))

    norms = np.linalg.norm(kernel + 0.7 * a @ b, axis=0)  # a number here, not a function of the factors

    def plain(node, x):
        return jnp.sum(jnp.sin(node["magnitude"] / norms * (x @ (kernel + 0.7 * node["a"] @ node["b"]))))

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(node, x) for f in (loss, plain))
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5), got, want)


def test_pissa_factors_are_the_largest_singular_values():
    """Of a kernel with more columns and rows than the search is wide, whose singular values fall off."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(size, 40)))[0] for size in (50, 70))
    singular = 3 * 0.8 ** np.arange(40)
    kernel = jnp.asarray((left * singular) @ right.T, jnp.float32)
    config = LoraConfig(rank=4, alpha=8.0, initialisation="pissa", targets=("head",))
    node = jax.device_get(init_lora(config, {"head": {"kernel": kernel}}, jax.random.key(1))["head"])
    want = (left[:, :4] * singular[:4]) @ right[:, :4].T
    np.testing.assert_allclose(config.scale * node["a"] @ node["b"], want, atol=1e-5)
    np.testing.assert_allclose(node["a"].T @ node["a"], np.diag(singular[:4] / config.scale), atol=1e-5)
    np.testing.assert_allclose(node["b"] @ node["b"].T, np.diag(singular[:4] / config.scale), atol=1e-5)


@pytest.mark.parametrize("kind", ["pissa", "all at once"])
def test_a_trained_pissa_adapter_is_one_of_twice_the_rank_on_the_original(params, kind):
    config, start = KINDS[kind], started(kind)
    weights = trained(start.weights)
    plain = of_original_base(config, weights, start.weights)
    assert (plain.config.rank, plain.config.initialisation) == (2 * config.rank, "zero")
    assert plain.config.scale == pytest.approx(config.scale)
    want = logits(start.params, apply_config(weights, config))
    np.testing.assert_allclose(logits(params, apply_config(plain.weights, plain.config)), want, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="only PiSSA changes the base"):
        of_original_base(KINDS["lora"], weights, weights)


def test_pissa_wants_full_precision_and_enough_singular_values(params):
    config = LoraConfig(rank=4, initialisation="pissa", targets=("key",))
    with pytest.raises(ValueError, match=r"layers.attention.key in full precision.*\(int4\)"):
        initialise(config, quantised("int4", group=16), jax.random.key(0))
    with pytest.raises(ValueError, match=r"rank 17 wants as many .* \(32, 16\) has 16"):
        initialise(dataclasses.replace(config, rank=17), params, jax.random.key(0))


def test_shapes_are_enough_for_shapes(params):
    config = KINDS["all at once"]
    shapes = jax.eval_shape(lambda: params)
    of_shapes = jax.eval_shape(lambda key: init_lora(config, shapes, key), jax.random.key(0))
    given = jax.eval_shape(lambda: init_lora(config, params, jax.random.key(0)))
    assert of_shapes == given


def test_a_sharded_quantised_model_with_dora_is_the_unsharded_one(monkeypatch):
    monkeypatch.setattr(sharding, "_configured_mesh", None)
    config = dataclasses.replace(KINDS["dora"], targets=("query", "value", "down"))
    base = dict(quantised("nf4", group=8))
    weights = trained(init_lora(config, base, jax.random.key(1)))

    def computed(params, lora):
        hidden_BTD = decoder.forward(params, inputs, config=SMALL, lora=lora).hidden_BTD
        return decoder.target_logprobs(params, hidden_BTD, inputs, config=SMALL)

    inputs = np.arange(32, dtype=np.int32).reshape(4, 8)
    want = jax.jit(computed)(base, apply_config(weights, config))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    axes = decoder.logical_axes(SMALL)
    with sharding.use(mesh):
        placed = jax.device_put(weights, sharding.shardings(logical_axes(weights, axes), weights, mesh))
        layers = {"layers": base["layers"]}
        layer_axes = quantize.logical_axes(layers, {"layers": axes["layers"]})
        base |= jax.device_put(layers, sharding.shardings(layer_axes, layers, mesh))
        got = jax.jit(computed)(base, apply_config(placed, config))
    magnitude = placed["layers"]["attention"]["query"]["magnitude"]
    assert magnitude.addressable_shards[0].data.shape == (2, 16)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_several_adapters_side_by_side_are_each_alone(params):
    """Of different kinds, ranks, scales and targets; one program for every mixture, rows without one untouched."""
    configs = [KINDS["rslora"], LoraConfig(rank=2, kind="dora", targets=("query", "head")), LoraConfig(rank=5)]
    loras = []
    for index, config in enumerate(configs):
        weights = trained(init_lora(config, params, jax.random.key(index)), seed=index + 10)
        loras.append(apply_config(weights, config))
    tokens = np.arange(40, dtype=np.int32).reshape(4, 10) % SMALL.vocab_size
    plain = jax.jit(lambda lora: decoder.logits(params, tokens, config=SMALL, lora=lora))
    alone = [np.asarray(plain(lora)) for lora in (*loras, None)]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in itertools.combinations(alone, 2))
    stacked = jax.jit(stack)(loras, params)
    assert stacked["layers"]["attention"]["query"]["a"].shape == (2, 3, 32, 5)
    mixed = jax.jit(lambda ids: decoder.logits(params, tokens, config=SMALL, lora=select(stacked, ids)))
    for ids in ([0, 1, 2, -1], [-1, 2, 2, 0]):
        got = np.asarray(mixed(np.array(ids)))
        for row, adapter in enumerate(ids):
            np.testing.assert_allclose(got[row], alone[adapter][row], rtol=0, atol=2e-6)
    assert mixed._cache_size() == 1
    with pytest.raises(ValueError, match=r"lie in 0..2, -1 for none; given \[3, 0, 0, 0\]"):
        select(stacked, [3, 0, 0, 0])
    with pytest.raises(ValueError, match="2 adapter ids are given for a batch of 4 rows"):
        mixed(np.array([0, 1]))
    with pytest.raises(ValueError, match="merge one of them"):
        merge(params, select(stacked, [0, 1, 2, 0]))
    axes = logical_axes(stacked, decoder.logical_axes(SMALL))["layers"]["attention"]["query"]
    assert axes == {
        "a": ("layers", None, "embed", "rank"),
        "b": ("layers", None, "rank", "heads"),
        "scale": ("layers", None),
        "gain": ("layers", None, "heads"),
    }


@pytest.mark.parametrize("targets", [("query", "head"), ("down",)])
def test_merged_parameters_equal_the_adapted_model(params, targets):
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    lora = apply_config(trained(init_lora(config, params, jax.random.key(1))), config)
    assert lora.scale == 2.0
    want = logits(params, lora)
    np.testing.assert_allclose(logits(merge(params, lora)), want, atol=1e-5)
    assert np.abs(want - logits(params)).max() > 1e-2


def test_gradients_reach_every_adapter_of_a_quantised_base():
    base = quantised("int4", group=16)
    config = LoraConfig(rank=4)
    weights = trained(init_lora(config, base, jax.random.key(1)))

    def loss(weights):
        return decoder.logits(base, INPUTS, config=SMALL, lora=apply_config(weights, config))[..., 0].sum()

    assert all((np.abs(leaf).max(axis=(1, 2)) > 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(weights)))


def test_dropout_acts_only_with_a_key(params):
    config = LoraConfig(rank=4, dropout=0.5)
    lora = apply_config(trained(init_lora(config, params, jax.random.key(1))), config)
    plain = Lora(lora.weights, lora.scale)
    want = logits(params, plain)
    np.testing.assert_array_equal(logits(params, lora), want)
    dropped = logits(params, lora, dropout_rng=jax.random.key(2))
    again = logits(params, lora, dropout_rng=jax.random.key(2))
    assert np.abs(dropped - want).max() > 1e-3
    np.testing.assert_array_equal(dropped, again)


def test_axes_follow_the_kernel(params):
    weights = init_lora(LoraConfig(rank=4, targets=("output",)), params, jax.random.key(0))
    axes = logical_axes(weights, decoder.logical_axes(SMALL))
    assert axes == {
        "layers": {"attention": {"output": {"a": ("layers", "heads", "rank"), "b": ("layers", "rank", "embed")}}}
    }


def test_an_adapter_of_another_base_is_refused(params):
    config = LoraConfig(rank=4, targets=("up",))
    wide = {"layers": {"ffn": {"up": {"a": jnp.ones((2, 64, 4)), "b": jnp.ones((2, 4, 48))}}}}
    with pytest.raises(ValueError, match="another base"):
        merge(params, apply_config(wide, config))
    with pytest.raises(ValueError, match="the base does not"):
        merge(params, apply_config({"layers": {"moe": {"up": {}}}}, config))


def test_unknown_targets_and_ranks_are_refused():
    with pytest.raises(ValueError, match="q_proj"):
        LoraConfig(targets=("q_proj",))
    with pytest.raises(ValueError, match="rank"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="scaling must be one of lora, rslora; given 'rs'"):
        LoraConfig(scaling="rs")
    with pytest.raises(ValueError, match="initialisation must be one of zero, pissa"):
        LoraConfig(initialisation="olora")
    with pytest.raises(ValueError, match="must be positive; given alpha=0"):
        LoraConfig(initialisation="pissa", alpha=0.0)
