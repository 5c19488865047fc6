"""The ring over the sequence axis against the reference back end: packed rows, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from internjax import sharding
from internjax.kernels import attention as chunked
from internjax.kernels import ring_attention as module
from internjax.kernels.attention import attention
from internjax.sharding import MeshConfig, make_mesh

B, T, N, K, H = 4, 32, 4, 2, 8


@pytest.fixture(autouse=True)
def no_mesh_afterwards():
    yield
    make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@functools.cache
def inputs(seed: int = 0):
    """Returns q, k, v and packed rows: documents that end inside shards and at their ends, padding, a row of one."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    lengths = [[32], [8, 8, 16], [3, 10, 14], [1, 1, 20, 5]]
    segments, positions = np.zeros((2, B, T), np.int32)
    for row, documents in enumerate(lengths):
        begin = 0
        for segment, length in enumerate(documents, 1):
            segments[row, begin : begin + length] = segment
            positions[row, begin : begin + length] = np.arange(length)
            begin += length
    return q, k, v, positions, segments


def value_and_gradients(backend: str, *, causal=True, window=None, dtype=np.float32):
    q, k, v, positions, segments = inputs()

    def loss(qkv):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
            causal=causal, window=window, backend=backend,
        )  # fmt: skip
        out = jnp.where((segments != 0)[..., None, None], out, 0.0)
        return (out.astype(jnp.float32) * jnp.cos(jnp.arange(H))).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuple(x.astype(dtype) for x in (q, k, v)))
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (out, *grads))


@functools.cache
def reference(**how):
    return value_and_gradients("xla", **how)


MESHES = {
    "one device": MeshConfig(fsdp=1),
    "sequence 8": MeshConfig(fsdp=1, sequence=8),
    "data 2, sequence 2, tensor 2": MeshConfig(data=2, fsdp=1, sequence=2, tensor=2),
    "fsdp 2, sequence 4": MeshConfig(fsdp=2, sequence=4),
    "data 4, fsdp 2: rows that are not divided": MeshConfig(data=4, fsdp=2),
    "tensor 2": MeshConfig(fsdp=1, tensor=2),
}


def on(config: MeshConfig):
    num_devices = config.data * config.fsdp * config.sequence * config.tensor
    return sharding.use(make_mesh(config, jax.devices()[:num_devices]))


@pytest.mark.parametrize("name", MESHES)
def test_the_ring_is_the_reference(name, monkeypatch):
    monkeypatch.setattr(module, "QUERY_CHUNK", 3)  # whole chunks and one that is filled up
    monkeypatch.setattr(module, "KEY_BLOCK", 3)
    wanted = reference()
    with on(MESHES[name]):
        given = value_and_gradients("ring")
    for one, other, what in zip(given, wanted, ("output", "dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=2e-5, err_msg=what)


def test_keys_that_no_query_sees_are_left_out(monkeypatch):
    """NaN there would come through a product with weights of 0: it stays out where the block is not computed at all."""
    monkeypatch.setattr(module, "QUERY_CHUNK", 4)
    monkeypatch.setattr(module, "KEY_BLOCK", 4)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    positions, ones = np.arange(T)[None], np.ones((1, T), np.int32)
    documents = (np.arange(T) // 8)[None].astype(np.int32) + 1

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(q, k, v, broken, segments):
        out = attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, backend="ring",
        )  # fmt: skip
        return jnp.where(broken[None, :, None, None], 0.0, out).sum(), out

    def finite(broken, segments):
        k_bad, v_bad = (np.where(broken[None, :, None, None], np.float32(np.nan), x) for x in (k, v))
        with on(MeshConfig(fsdp=1, sequence=2)):
            grads, out = gradients(q, k_bad, v_bad, broken, segments)
        return [np.isfinite(np.asarray(x)).all(axis=(0, 2, 3)) for x in (out, *grads)]

    late = np.arange(T) >= 20
    out, dq, _, _ = finite(late, ones)  # the earlier keys are seen by the queries that are broken themselves
    assert (out == ~late).all() and (dq == ~late).all()
    second = documents[0] == 2
    assert all((each == ~second).all() for each in finite(second, documents))


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_a_zigzag_gives_every_device_the_same_work(num_devices):
    with on(MeshConfig(fsdp=1, sequence=num_devices)):
        zigzag = jax.jit(module.zigzag)
        given = np.asarray(zigzag(np.arange(2 * T)[None]))[0]
        assert (zigzag(np.arange(T + 8)[None]) == np.arange(T + 8)).all() or (T + 8) % (2 * num_devices) == 0
    assert sorted(given) == list(range(2 * T))
    halves = given.reshape(num_devices, 2, -1)
    # Blocks with a key that is not after the last query, in each round: what a device computes.
    first, last = halves.min(axis=-1), halves.max(axis=-1)
    work = [
        [(first[(device - turn) % num_devices][None] <= last[device][:, None]).sum() for device in range(num_devices)]
        for turn in range(num_devices)
    ]
    assert work == [[3] * num_devices] + [[2] * num_devices] * (num_devices - 1)  # of 4 each


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, 5), (False, 3)])
def test_the_ring_follows_the_same_mask(causal, window):
    wanted = reference(causal=causal, window=window)
    with on(MeshConfig(fsdp=1, sequence=4)):
        given = value_and_gradients("ring", causal=causal, window=window)
    for one, other in zip(given, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=2e-5)


def test_half_precision_sums_in_float32():
    wanted, exact = reference(dtype=jnp.bfloat16), reference()
    with on(MeshConfig(fsdp=1, sequence=4)):
        given = value_and_gradients("ring", dtype=jnp.bfloat16)
    for one, other, true in zip(given, wanted, exact, strict=True):
        assert np.abs(one - true).max() < 1.5 * np.abs(other - true).max() + 1e-3


def test_queries_that_see_nothing_get_zero_and_no_gradient():
    q, k, v, positions, segments = inputs()

    def total(qkv):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
            backend="ring",
        )  # fmt: skip
        return jnp.where((segments == 0)[..., None, None], out, 0.0).sum(), out

    with on(MeshConfig(fsdp=1, sequence=4)):
        grads, out = jax.jit(jax.grad(total, has_aux=True))((q, k, v))
    assert (np.asarray(out)[segments == 0] == 0).all() and (segments == 0).any()
    assert all((np.asarray(grad) == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", ["xla", "chunked"])
def test_the_other_back_ends_are_right_where_time_is_cut(backend):
    wanted = reference()
    q, k, v, positions, segments = inputs()
    mesh = make_mesh(MeshConfig(fsdp=2, sequence=2, tensor=2))
    heads = jax.sharding.NamedSharding(mesh, sharding.partition_spec(("batch", "sequence", "act_heads", None)))
    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put((q, k, v, positions, segments), (heads, heads, heads, rows, rows))

    def loss(qkv, positions, segments):
        out = attention(
            *qkv, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
            backend=backend,
        )  # fmt: skip
        out = jnp.where((segments != 0)[..., None, None], out, 0.0)
        return (out * jnp.cos(jnp.arange(H))).sum(), out

    with sharding.use(mesh):
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(placed[:3], *placed[3:])
    for one, other in zip((out, *grads), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6, rtol=2e-5)


def test_memory_is_that_of_a_share_of_time(monkeypatch):
    """Forward and backward together: no device gathers the keys of others, or keeps what every round brought."""

    def temporaries(num_devices: int) -> int:
        with on(MeshConfig(fsdp=1, sequence=num_devices)):
            mesh = jax.sharding.get_abstract_mesh()
            heads = sharding.partition_spec(("batch", "sequence", None, None))
            q = jax.ShapeDtypeStruct((1, 4096, N, 64), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, heads))
            positions = jax.ShapeDtypeStruct((1, 4096), jnp.int32, sharding=sharding.batch_sharding(mesh))

            def loss(qkv, positions):
                return attention(*qkv, q_positions_BT=positions, k_positions_BS=positions, backend="ring").sum()

            compiled = jax.jit(jax.grad(loss)).lower((q, q, q), positions).compile()
        text = compiled.as_text()
        assert ("collective-permute" in text) == (num_devices > 1) and "all-gather" not in text
        return compiled.memory_analysis().temp_size_in_bytes

    monkeypatch.setattr(module, "QUERY_CHUNK", 64)
    one, two, eight = map(temporaries, (1, 2, 8))
    assert two < one and eight < 0.4 * two


def elements(jaxpr) -> int:
    """Returns the elements of the largest array that is made anywhere in a jaxpr."""
    found = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    inner = [value for equation in jaxpr.eqns for value in jax.tree.leaves(list(equation.params.values()))]
    return max(found + [elements(getattr(each, "jaxpr", each)) for each in inner if hasattr(each, "eqns")], default=0)


@pytest.mark.parametrize("backend", ["ring", "chunked"])
def test_no_masks_are_kept_through_a_loop_over_layers(monkeypatch, backend):
    """Positions are the same in every layer: what depends on them alone is not to be made for all blocks at once."""
    for where in (module, chunked):
        monkeypatch.setattr(where, "QUERY_CHUNK", 64)
    positions, segments = jnp.arange(1024)[None], jnp.ones((1, 1024), jnp.int32)

    def loss(x):
        def layer(x, _):
            how = {"q_segments_BT": segments, "k_segments_BS": segments, "backend": backend}
            return attention(x, x, x, q_positions_BT=positions, k_positions_BS=positions, **how), None

        return jax.lax.scan(layer, x, length=2)[0].sum()

    with on(MeshConfig(fsdp=1, sequence=2)):
        largest = elements(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 1024, 1, 8))).jaxpr)
    assert largest < 512 * 512, "a device's queries against its keys, at least"


def test_what_the_ring_cannot_do_is_refused_by_name():
    q, k, v, positions, _ = inputs()
    call = functools.partial(attention, backend="ring")
    where = {"q_positions_BT": positions, "k_positions_BS": positions}
    with pytest.raises(
        ValueError, match=r"'ring' cannot do attention without a mesh .*use\(mesh\).*'chunked' or 'xla'"
    ):
        call(q, k, v, **where)
    with on(MeshConfig(fsdp=1, sequence=8)):
        with pytest.raises(ValueError, match="'ring' cannot do ALiBi slopes"):
            call(q, k, v, **where, alibi_slopes_N=np.ones(N, np.float32))
        with pytest.raises(ValueError, match="sequence 8 of the mesh does not divide 30 time steps.*multiple of 8"):
            call(q[:, :30], k[:, :30], v[:, :30], q_positions_BT=positions[:, :30], k_positions_BS=positions[:, :30])
        with pytest.raises(ValueError, match="given 16 queries, 32 keys"):
            call(q[:, :16], k, v, q_positions_BT=positions[:, :16], k_positions_BS=positions)
        with pytest.raises(
            ValueError, match=r"'cudnn' cannot do.*cuts time \(sequence 8\).*'ring', 'chunked' or 'xla'"
        ):
            call(q, k, v, **where, backend="cudnn")
    with on(MeshConfig(fsdp=1, tensor=4)):
        with pytest.raises(ValueError, match="tensor 4 of the mesh does not divide 4 query and 2 key/value heads"):
            call(q, k, v, **where)
