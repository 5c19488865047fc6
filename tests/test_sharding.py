"""Meshes, the rules table, and the traps around logical constraints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from internjax import sharding
from internjax.model import decoder, quantize
from internjax.model.config import INTERNLM2_20B, ModelConfig
from internjax.model.quantize import quantize_params
from internjax.sharding import MeshConfig

SMALL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, dtype="float32"
)


@pytest.fixture(autouse=True)
def forget_mesh(monkeypatch):
    monkeypatch.setattr(sharding, "_configured_mesh", None)


def test_minus_one_takes_the_remaining_devices():
    assert MeshConfig().shape(8) == (1, 8, 1, 1)
    assert MeshConfig(data=2, fsdp=-1, tensor=2).shape(8) == (2, 2, 1, 2)
    assert MeshConfig(data=-1, fsdp=4).shape(8) == (2, 4, 1, 1)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=3), MeshConfig(data=3), MeshConfig(data=-1), MeshConfig(fsdp=0)])
def test_meshes_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError):
        config.shape(8)


def test_parameters_and_logits_of_a_sharded_forward_are_where_the_rules_say():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = decoder.init(SMALL, jax.random.key(0))
    inputs = jnp.arange(32).reshape(4, 8)
    sharding._configured_mesh = None
    want = decoder.logits(params, inputs, config=SMALL)
    places = sharding.shardings(decoder.logical_axes(SMALL), params, mesh)
    with sharding.use(mesh):
        placed = jax.device_put(params, places)
        query = placed["layers"]["attention"]["query"]["kernel"]
        assert query.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert query.addressable_shards[0].data.shape == (2, 16, 16)
        hidden = jax.jit(lambda p, t: decoder.forward(p, t, config=SMALL).hidden_BTD)(placed, inputs)
        assert hidden.sharding.spec[0] == ("data", "fsdp")
        got = jax.jit(lambda p, t: decoder.logits(p, t, config=SMALL))(placed, inputs)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_forgotten_mesh_is_an_error_and_not_a_silent_no_op():
    sharding.make_mesh(MeshConfig())
    with pytest.raises(RuntimeError, match="none is set"):
        sharding.constrain(jnp.zeros((8, 4)), ("batch", None))


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(MeshConfig())
    with sharding.use(mesh):
        out = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(jnp.zeros((1, 4)))
        assert out.sharding.is_fully_replicated
        out = jax.jit(lambda x: sharding.constrain(x, ("batch", None)))(jnp.zeros((8, 4)))
        assert not out.sharding.is_fully_replicated


def test_a_mesh_that_does_not_divide_a_parameter_names_it():
    mesh = sharding.make_mesh(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(ValueError, match=r"key.*kernel.*size 8 does not divide.*kv_heads, 20"):
        config = dataclasses.replace(SMALL, num_kv_heads=2, head_dim=10)
        sharding.shardings(decoder.logical_axes(config), decoder.abstract_params(config), mesh)


def test_the_fields_of_a_quantised_kernel_are_sharded_like_the_kernel():
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = quantize_params(decoder.init(SMALL, jax.random.key(0)), scheme="int4", group=8)
    places = sharding.shardings(quantize.logical_axes(params, decoder.logical_axes(SMALL)), params, mesh)
    placed = jax.device_put(params, places)
    kernel = placed["layers"]["attention"]["query"]["kernel"]
    assert kernel.values.addressable_shards[0].data.shape == (2, 4, 16)
    assert kernel.scales.addressable_shards[0].data.shape == (2, 1, 16)
    sharding._configured_mesh = None
    inputs = jnp.arange(32).reshape(4, 8)
    want = decoder.logits(params, inputs, config=SMALL)
    with sharding.use(mesh):
        got = jax.jit(lambda p, t: decoder.logits(p, t, config=SMALL))(placed, inputs)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "spec", "wanted"),
    [
        ((2, 32, 64), P(None, "fsdp", "tensor"), P(None, ("fsdp", "data"), "tensor")),
        ((64, 32), P("tensor", "fsdp"), P(("tensor", "data"), "fsdp")),
        ((2, 6, 64), P(None, "fsdp", None), P("data", "fsdp", None)),  # 6 is not divided by 2 x 2
        ((3, 32), P(), P(None, "data")),  # the last dimension where no other can be cut
        ((3, 5), P(), P()),
        ((), P(), P()),
        ((32,), P(("data", "fsdp")), P(("data", "fsdp"))),
    ],
)
def test_a_leaf_is_cut_over_the_replicas_where_they_divide_it(shape, spec, wanted):
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 2), sharding.MESH_AXES)
    assert sharding.over_data(NamedSharding(mesh, spec), shape).spec == wanted
    alone = jax.sharding.AbstractMesh((1, 4, 1, 2), sharding.MESH_AXES)
    assert sharding.over_data(NamedSharding(alone, spec), shape).spec == spec


def test_collisions_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="two dimensions on the mesh axis 'tensor'"):
        sharding.partition_spec(("heads", "ffn"))
    with pytest.raises(ValueError, match="unknown logical axis 'head'"):
        sharding.partition_spec(("head",))


def test_every_parameter_of_the_20b_is_sharded_on_its_mesh():
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 2), sharding.MESH_AXES)
    shapes = decoder.abstract_params(INTERNLM2_20B)
    places = sharding.shardings(decoder.logical_axes(INTERNLM2_20B), shapes, mesh)
    per_device = [np.prod(place.shard_shape(leaf.shape)) for leaf, place in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True
    )]  # fmt: skip
    assert sum(per_device) < 1.001 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 8


@pytest.mark.parametrize(
    "config", [None, MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, sequence=2, tensor=2)]
)
def test_looking_tokens_up_is_the_same_on_every_mesh(config):
    table = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 64, size=(8, 400)).astype(np.int32)
    tokens[0, 0], tokens[:, 100:] = 64, 7  # one beyond the table, and one that is very common

    def loss(table, tokens):
        rows = decoder._look_up(table, tokens, dtype=jnp.bfloat16)
        return jnp.where(jnp.isnan(rows), 0, rows).astype(jnp.float32).sum(), rows

    run = jax.jit(jax.grad(loss, has_aux=True))
    if config is None:
        grad, rows = run(table, tokens)
    else:
        mesh = sharding.make_mesh(config)
        placed = jax.device_put(table, sharding.shardings(("vocab", "embed"), table, mesh))
        with sharding.use(mesh):
            grad, rows = run(placed, jax.device_put(tokens, sharding.batch_sharding(mesh)))
        assert grad.sharding.is_equivalent_to(placed.sharding, 2)
    rows = np.asarray(rows, np.float32)
    assert np.isnan(rows[0, 0]).all() and np.isfinite(rows[0, 1:]).all()
    known = tokens < 64
    np.testing.assert_array_equal(rows[known], np.asarray(table.astype(jnp.bfloat16), np.float32)[tokens[known]])
    # Added up in the table's float32: in bfloat16 counting by ones stops at 256.
    counts = np.bincount(tokens[known], minlength=64)
    np.testing.assert_array_equal(np.asarray(grad), np.broadcast_to(counts[:, None], (64, 32)))
    assert counts[7] > 2400
