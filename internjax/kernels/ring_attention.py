"""Attention over a sequence that is cut over the mesh axis `sequence`: keys and values travel, queries stay.

Each device holds a stretch of time. In every round it attends its queries to the keys and values at hand and passes
those on to its neighbour; after as many rounds as there are devices each query has met every key. The softmax is built
up in float32 from the maximum and the sum of what was seen so far (Liu et al., arXiv 2310.01889; Milakov and
Gimelshein, arXiv 1805.02867). The backward pass goes round once more, with the gradients of keys and values travelling
along, and computes the weights again from the logarithm of each query's sum: a device keeps its own stretch of q, k, v
and output, never those of others.

1. Positions and segments travel with the keys, and a block is masked by them alone. Where a device lies in the ring
   says nothing about what is earlier: a row holds several documents, each counting its positions from 0.
2. A block of keys is left out where no query of a chunk may see any of it: the later half under a causal mask, other
   documents in packed rows. What is left out is nothing but zeros added.
3. A round lasts as long as its slowest device. In the order of time the last device has something to compute in every
   round, so that leaving out alone saves work and no time. `zigzag` gives each device an early and a late stretch: in
   every round all then have as much to do, half of what it would be.

B batch, T query time, S key time, N query heads, K key/value heads, G = N / K, H head dim, C chunks of queries, Q
queries of a chunk, M blocks of keys. Inside the ring T and S are what one device holds, and S in a block what it has.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from internjax.kernels.mask import MASKED, tied, visible
from internjax.sharding import axis_size, constrain, partition_spec

AXIS = "sequence"
QUERY_CHUNK = 512
KEY_BLOCK = 2048


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
    """What travels, in blocks on a leading axis; without that axis, one block."""

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
    q_BTNH, q_positions_BT, q_segments_BT = tied(q_BTNH, q_positions_BT, q_segments_BT)
    keys = _Keys(k_BSKH, v_BSKH, k_positions_BS, k_segments_BS)
    with jax.named_scope("ring_attention"):
        return _attend(ring, q_BTNH, q_positions_BT, q_segments_BT, *keys)


def zigzag(x_BT: jax.Array) -> jax.Array:
    """Returns `[B, T]` with time in the order in which the devices of the ring have equal work under a causal mask.

    Of 2 n stretches device i of n gets the i-th from the start and the i-th from the end. Whoever reorders tokens has
    to reorder their positions and segments alike; a sum over them is the same in any order. Where 2 n does not divide
    T the order stays. Under the mesh that is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    num_shards = 1 if mesh.empty else mesh.shape[AXIS]
    B, T = x_BT.shape
    if num_shards == 1 or T % (2 * num_shards):
        return x_BT
    early, late = jnp.moveaxis(x_BT.reshape(B, 2, num_shards, -1), 1, 0)
    return constrain(jnp.stack([early, late[:, ::-1]], axis=2).reshape(B, T), ("batch", AXIS))


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
    T, K = q_BTNH.shape[1], keys[0].shape[2]
    keys = _blocks(_Keys(*keys))
    q_CBKGQH = _chunks(_grouped(q_BTNH, K), T)
    rows = (_chunks(q_positions_BT, T), _chunks(q_segments_BT, T))
    empty = jnp.zeros(q_CBKGQH.shape[:-1], jnp.float32)
    softmax = _Softmax(empty + MASKED, empty, jnp.zeros(q_CBKGQH.shape, jnp.float32))

    def meet(softmax, keys):
        def chunk(xs):
            softmax, *of_queries = xs
            return jax.lax.scan(
                lambda softmax, block: (_extended(ring, softmax, *of_queries, block), None), softmax, keys
            )

        return jax.lax.map(lambda xs: chunk(xs)[0], (softmax, q_CBKGQH, *rows))

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


def _visible(ring: _Ring, q_positions_BQ, q_segments_BQ, keys: _Keys) -> jax.Array:
    """Returns the mask `[B, Q, S]` of one block."""
    return visible(
        q_positions_BT=q_positions_BQ,
        k_positions_BS=keys.positions_BS,
        q_segments_BT=q_segments_BQ,
        k_segments_BS=keys.segments_BS,
        causal=ring.causal,
        window=ring.window,
    )


def _logits(ring: _Ring, q_BKGQH, q_positions_BQ, q_segments_BQ, keys: _Keys):
    """Returns (logits `[B, K, G, Q, S]` float32, mask `[B, 1, 1, Q, S]`) of one block."""
    logits = jnp.einsum("bkgqh,bskh->bkgqs", q_BKGQH, keys.k_BSKH, preferred_element_type=jnp.float32) * ring.scale
    return logits, _visible(ring, q_positions_BQ, q_segments_BQ, keys)[:, None, None]


def _extended(ring: _Ring, softmax: _Softmax, q_BKGQH, q_positions_BQ, q_segments_BQ, keys: _Keys) -> _Softmax:
    """Returns the softmax of one chunk of queries with a block of keys taken in, if it may see any of them."""

    def seen():
        return _taken_in(ring, softmax, q_BKGQH, q_positions_BQ, q_segments_BQ, keys)

    return jax.lax.cond(jnp.any(_visible(ring, q_positions_BQ, q_segments_BQ, keys)), seen, lambda: softmax)


def _taken_in(ring: _Ring, softmax: _Softmax, q_BKGQH, q_positions_BQ, q_segments_BQ, keys: _Keys) -> _Softmax:
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
    keys = _blocks(_Keys(k, v, k_positions, k_segments))
    T, K = q_BTNH.shape[1], k.shape[2]
    chunks = tuple(_chunks(_grouped(x, K), T) for x in (q_BTNH, grad, log_sum, shared))
    chunks += (_chunks(q_positions_BT, T), _chunks(q_segments_BT, T))

    def meet(dq_CBKGQH, dkv, keys):
        def block(dq_CBKGQH, xs):
            keys, *dkv = xs

            def chunk(dkv, xs):
                found = _added(ring, _Gradients(xs[0], *dkv), *xs[1:], keys)
                return (found.dk, found.dv), found.dq

            dkv, dq_CBKGQH = jax.lax.scan(chunk, tuple(dkv), (dq_CBKGQH, *chunks))
            return dq_CBKGQH, dkv

        return jax.lax.scan(block, dq_CBKGQH, (keys, *dkv))

    def round_(carry, _):
        dq, dkv, keys = carry
        dq, dkv = meet(dq, dkv, keys)
        return (dq, _pass_on(dkv), _pass_on(keys)), None

    dkv = (jnp.zeros(keys.k_BSKH.shape, jnp.float32), jnp.zeros(keys.v_BSKH.shape, jnp.float32))
    begin = (jnp.zeros(chunks[0].shape, jnp.float32), dkv, keys)
    (dq, dkv, keys), _ = jax.lax.scan(round_, begin, length=jax.lax.axis_size(AXIS) - 1)
    dq, dkv = meet(dq, dkv, keys)
    dk, dv = map(_unblocked, _pass_on(dkv))  # the last step home
    return _ungrouped(_whole(dq, T)).astype(q_BTNH.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


class _Gradients(NamedTuple):
    dq: jax.Array
    dk: jax.Array
    dv: jax.Array


def _added(ring: _Ring, sums: _Gradients, *block: Any) -> _Gradients:
    """Returns the sums with what one chunk of queries and a block of keys add to them, if any query sees any key."""
    *_, q_positions_BQ, q_segments_BQ, keys = block

    def seen():
        return jax.tree.map(jnp.add, sums, _block_gradients(ring, *block))

    return jax.lax.cond(jnp.any(_visible(ring, q_positions_BQ, q_segments_BQ, keys)), seen, lambda: sums)


def _block_gradients(
    ring: _Ring, q_BKGQH, grad_BKGQH, log_sum_BKGQ, shared_BKGQ, q_positions_BQ, q_segments_BQ, keys: _Keys
) -> _Gradients:
    """Returns the float32 gradients that one chunk of queries and one block of keys give each other."""
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
    size = min(QUERY_CHUNK, -(-T // 2))  # a chunk lies in one of the two stretches that a zigzag gives
    padding = [(0, -T % size if dim == axis else 0) for dim in range(x.ndim)]
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(x_CBKGQ: jax.Array, T: int) -> jax.Array:
    """Returns `[B, K, G, T, ...]` of chunks of queries."""
    x = jnp.moveaxis(x_CBKGQ, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])[:, :, :, :T]


def _blocks(keys: _Keys) -> _Keys:
    """Returns the keys in equal blocks on a leading axis, of KEY_BLOCK or somewhat less; in halves where none divide.

    Their number is even, so that a block lies in one of the two stretches that a zigzag gives.
    """
    S = keys.positions_BS.shape[1]
    num_blocks = next(
        (m for m in range(2, S, 2) if S % m == 0 and KEY_BLOCK // 8 <= S // m <= KEY_BLOCK), 1 + (S % 2 == 0)
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], num_blocks, -1, *x.shape[2:]), 1, 0), keys)


def _unblocked(x_MBSKH: jax.Array) -> jax.Array:
    """Returns `[B, S, K, H]` of blocks of keys."""
    x = jnp.moveaxis(x_MBSKH, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
