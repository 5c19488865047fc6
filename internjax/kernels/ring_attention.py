"""Attention over a sequence that is cut over the mesh axis `sequence`: keys and values travel, queries stay.

Each device holds a stretch of time. In every round it attends its queries to the keys and values at hand and passes
those on to its neighbour; after as many rounds as there are devices each query has met every key. The softmax is built
up in float32 from the maximum and the sum of what was seen so far (Liu et al., arXiv 2310.01889; Milakov and
Gimelshein, arXiv 1805.02867). The backward pass goes round once more, with the gradients of keys and values travelling
along, and computes the weights again from the logarithm of each query's sum: a device keeps its own stretch of q, k, v
and output, never those of others.

1. Positions and segments travel with the keys, and a block is masked by them alone. Where a device lies in the ring
   says nothing about what is earlier: a row holds several documents, each counting its positions from 0.
2. Blocks that are masked as a whole are computed like any other. Under a causal mask about half of them are; leaving
   them out would not shorten a round, which lasts as long as its slowest device.

B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, H head dim, C chunks of queries, Q
queries of a chunk. Inside the ring T and S are what one device holds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from internjax.kernels.mask import MASKED, visible
from internjax.sharding import axis_size, partition_spec

AXIS = "sequence"
QUERY_CHUNK = 512


class _Ring(NamedTuple):
    """What the compiled ring depends on besides its arrays."""

    mesh: Any
    rows: PartitionSpec
    """Of `[B, T]` arrays."""
    q_heads: PartitionSpec
    """Of `[B, T, N, H]`."""
    kv_heads: PartitionSpec
    causal: bool
    window: int | None
    scale: float


class _Keys(NamedTuple):
    """What travels."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array


class _Softmax(NamedTuple):
    """What is known of each query's softmax so far, float32, in chunks of queries."""

    max_CBKGQ: jax.Array
    sum_CBKGQ: jax.Array
    out_CBKGQH: jax.Array


def ring_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    causal: bool,
    window: int | None,
    scale: float,
) -> jax.Array:
    """Returns attention outputs `[B, T, N, H]` under the mesh that is set; a query that sees no key gets 0.

    Equal to the other back ends up to rounding; memory per device grows with its share of T. Rows that the mesh does
    not divide are computed on every row shard. Raises ValueError when it does not divide time or heads, or when there
    are not as many keys as queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _check_sizes(mesh, q_BTNH.shape, k_BSKH.shape)
    batch, time = partition_spec(("batch", AXIS))
    batch = batch if q_BTNH.shape[0] % axis_size(mesh, batch) == 0 else None
    heads = partition_spec(("act_heads",))[0]
    spec = PartitionSpec(batch, time, heads, None)
    ring = _Ring(mesh, PartitionSpec(batch, time), spec, spec, causal, window, scale)
    keys = _Keys(k_BSKH, v_BSKH, k_positions_BS, k_segments_BS)
    with jax.named_scope("ring_attention"):
        return _attend(ring, q_BTNH, q_positions_BT, q_segments_BT, *keys)


def _check_sizes(mesh: Any, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
    (_, T, N, _), (_, S, K, _) = q_shape, k_shape
    num_shards, tensor = mesh.shape[AXIS], mesh.shape["tensor"]
    if T != S:
        raise ValueError(f"the ring is self-attention: as many keys as queries are wanted, given {T} queries, {S} keys")
    if T % num_shards:
        raise ValueError(
            f"{AXIS} {num_shards} of the mesh does not divide {T} time steps. Pad rows to a multiple of {num_shards}, "
            "or use attention='chunked'."
        )
    if N % tensor or K % tensor:
        raise ValueError(
            f"tensor {tensor} of the mesh does not divide {N} query and {K} key/value heads. Choose a mesh whose "
            "tensor axis divides both, or use attention='chunked'."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, q, q_positions, q_segments, k, v, k_positions, k_segments):
    return _attend_forward(ring, q, q_positions, q_segments, k, v, k_positions, k_segments)[0]


def _attend_forward(ring: _Ring, *arrays):
    statistics = PartitionSpec(*ring.q_heads[:3])
    out, log_sum = _mapped(ring, _forward, out_specs=(ring.q_heads, statistics))(*arrays)
    return out, (*arrays, out, log_sum)


def _attend_backward(ring: _Ring, residuals, grad):
    *arrays, out, log_sum = residuals
    # sum_s weight_s * d weight_s, which the derivative of the softmax subtracts, is the product of output and gradient.
    shared = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
    statistics = PartitionSpec(*ring.q_heads[:3])
    dq, dk, dv = _mapped(
        ring,
        _backward,
        more_specs=(ring.q_heads, statistics, statistics),
        out_specs=(ring.q_heads, ring.kv_heads, ring.kv_heads),
    )(*arrays, grad, log_sum, shared)
    return dq, None, None, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _mapped(ring: _Ring, function, *, more_specs: tuple = (), out_specs):
    in_specs = (ring.q_heads, ring.rows, ring.rows, ring.kv_heads, ring.kv_heads, ring.rows, ring.rows, *more_specs)
    # Derivatives never pass through the map (both directions are written out), so nothing has to track what varies
    # over which axis.
    return jax.shard_map(
        functools.partial(function, ring),
        mesh=ring.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def _pass_on(tree: Any) -> Any:
    """Returns what the neighbour before this device holds."""
    size = jax.lax.axis_size(AXIS)
    if size == 1:
        return tree
    return jax.lax.ppermute(tree, AXIS, [(device, (device + 1) % size) for device in range(size)])


def _forward(ring: _Ring, q_BTNH, q_positions_BT, q_segments_BT, *keys):
    keys = _Keys(*keys)
    T, K = q_BTNH.shape[1], keys.k_BSKH.shape[2]
    q_CBKGQH = _chunks(_grouped(q_BTNH, K), T)
    rows = (_chunks(q_positions_BT, T), _chunks(q_segments_BT, T))
    empty = jnp.zeros(q_CBKGQH.shape[:-1], jnp.float32)
    softmax = _Softmax(empty + MASKED, empty, jnp.zeros(q_CBKGQH.shape, jnp.float32))

    def meet(softmax, keys):
        return jax.lax.map(lambda chunk: _extended(ring, *chunk, keys), (softmax, q_CBKGQH, *rows))

    def round_(carry, _):
        softmax, keys = carry
        # Sending needs nothing that is computed in this round, so the two can go on at once.
        return (meet(softmax, keys), _pass_on(keys)), None

    (softmax, keys), _ = jax.lax.scan(round_, (softmax, keys), length=jax.lax.axis_size(AXIS) - 1)
    softmax = meet(softmax, keys)
    sum_CBKGQ = jnp.where(softmax.sum_CBKGQ == 0, 1.0, softmax.sum_CBKGQ)
    out_CBKGQH = (softmax.out_CBKGQH / sum_CBKGQ[..., None]).astype(q_BTNH.dtype)
    log_sum_CBKGQ = softmax.max_CBKGQ + jnp.log(sum_CBKGQ)
    return _ungrouped(_whole(out_CBKGQH, T)), _ungrouped(_whole(log_sum_CBKGQ, T))


def _logits(ring: _Ring, q_BKGQH, q_positions_BQ, q_segments_BQ, keys: _Keys):
    """Returns (logits `[B, K, G, Q, S]` float32, mask `[B, 1, 1, Q, S]`) of one block."""
    mask_BQS = visible(
        q_positions_BT=q_positions_BQ,
        k_positions_BS=keys.positions_BS,
        q_segments_BT=q_segments_BQ,
        k_segments_BS=keys.segments_BS,
        causal=ring.causal,
        window=ring.window,
    )
    logits = jnp.einsum("bkgqh,bskh->bkgqs", q_BKGQH, keys.k_BSKH, preferred_element_type=jnp.float32) * ring.scale
    return logits, mask_BQS[:, None, None]


def _extended(ring: _Ring, softmax: _Softmax, q_BKGQH, q_positions_BQ, q_segments_BQ, keys: _Keys) -> _Softmax:
    """Returns the softmax of one chunk of queries with the keys at hand taken in."""
    logits, mask = _logits(ring, q_BKGQH, q_positions_BQ, q_segments_BQ, keys)
    highest = jnp.maximum(softmax.max_CBKGQ, jnp.max(logits, axis=-1, initial=MASKED, where=mask))
    weights = jnp.where(mask, jnp.exp(logits - highest[..., None]), 0.0)
    before = jnp.exp(softmax.max_CBKGQ - highest)
    out = jnp.einsum(
        "bkgqs,bskh->bkgqh", weights.astype(keys.v_BSKH.dtype), keys.v_BSKH, preferred_element_type=jnp.float32
    )
    return _Softmax(
        highest,
        softmax.sum_CBKGQ * before + jnp.sum(weights, axis=-1),
        softmax.out_CBKGQH * before[..., None] + out,
    )


def _backward(ring: _Ring, q_BTNH, q_positions_BT, q_segments_BT, k, v, k_positions, k_segments, grad, log_sum, shared):
    keys = _Keys(k, v, k_positions, k_segments)
    T, K = q_BTNH.shape[1], k.shape[2]
    chunks = tuple(_chunks(_grouped(x, K), T) for x in (q_BTNH, grad, log_sum, shared))
    chunks += (_chunks(q_positions_BT, T), _chunks(q_segments_BT, T))

    def meet(dq_CBKGQH, dkv, keys):
        def chunk(dkv, xs):
            dq_BKGQH, *of_queries = xs
            found = _block_gradients(ring, *of_queries, keys)
            return jax.tree.map(jnp.add, dkv, (found.dk, found.dv)), dq_BKGQH + found.dq

        dkv, dq_CBKGQH = jax.lax.scan(chunk, dkv, (dq_CBKGQH, *chunks))
        return dq_CBKGQH, dkv

    def round_(carry, _):
        dq, dkv, keys = carry
        dq, dkv = meet(dq, dkv, keys)
        return (dq, _pass_on(dkv), _pass_on(keys)), None

    dkv = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    begin = (jnp.zeros(chunks[0].shape, jnp.float32), dkv, keys)
    (dq, dkv, keys), _ = jax.lax.scan(round_, begin, length=jax.lax.axis_size(AXIS) - 1)
    dq, dkv = meet(dq, dkv, keys)
    dk, dv = _pass_on(dkv)  # the last step home
    return _ungrouped(_whole(dq, T)).astype(q_BTNH.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


class _Gradients(NamedTuple):
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array


def _block_gradients(
    ring: _Ring, q_BKGQH, grad_BKGQH, log_sum_BKGQ, shared_BKGQ, q_positions_BQ, q_segments_BQ, keys: _Keys
) -> _Gradients:
    """Returns the float32 gradients that one chunk of queries and the keys at hand give each other."""
    logits, mask = _logits(ring, q_BKGQH, q_positions_BQ, q_segments_BQ, keys)
    weights = jnp.where(mask, jnp.exp(logits - log_sum_BKGQ[..., None]), 0.0)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    d_weights = product("bkgqh,bskh->bkgqs", grad_BKGQH, keys.v_BSKH)
    d_logits = (weights * (d_weights - shared_BKGQ[..., None]) * ring.scale).astype(q_BKGQH.dtype)
    return _Gradients(
        dq=product("bkgqs,bskh->bkgqh", d_logits, keys.k_BSKH),
        dk=product("bkgqs,bkgqh->bskh", d_logits, q_BKGQH),
        dv=product("bkgqs,bkgqh->bskh", weights.astype(grad_BKGQH.dtype), grad_BKGQH),
    )


def _grouped(x_BTN: jax.Array, num_kv_heads: int) -> jax.Array:
    """Returns `[B, K, G, T, ...]` of `[B, T, N, ...]`: heads that read the same keys side by side."""
    B, T, N = x_BTN.shape[:3]
    x = x_BTN.reshape(B, T, num_kv_heads, N // num_kv_heads, *x_BTN.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _ungrouped(x_BKGT: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x_BKGT, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _chunks(x: jax.Array, T: int) -> jax.Array:
    """Returns chunks of queries on a leading axis; time is axis 3 of grouped arrays and axis 1 of `[B, T]`.

    The last chunk is filled up with zeros: queries of segment 0, which see nothing.
    """
    axis = 1 if x.ndim == 2 else 3
    size = min(QUERY_CHUNK, T)
    padding = [(0, -T % size if dim == axis else 0) for dim in range(x.ndim)]
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(x_CBKGQ: jax.Array, T: int) -> jax.Array:
    """Returns `[B, K, G, T, ...]` of chunks of queries."""
    x = jnp.moveaxis(x_CBKGQ, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :T]
