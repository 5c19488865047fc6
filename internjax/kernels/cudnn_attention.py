"""NVIDIA's fused attention over packed rows: documents of a row as ranges of tokens, no mask of T * S anywhere.

jax's public attention takes no segments, so this file, and no other, calls the private function behind it. What was
read of it, and of the part of XLA that hands it to cuDNN (jax 0.10.2, 0.11.0 - 0.11.2, 0.12.0; XLA's cuda_dnn.cc):

1. Offsets are the first token of every document of a row, `[B, M + 1]`, lengths its tokens, `[B, M]`; -1 where a row
   has fewer than M documents. jax moves what is there to the front and multiplies by the size of a token in int32.
2. Only tokens of a range are written; the rest of the output and of the gradients is memory that nobody set. So padding
   is a document here as well: every token lies in exactly one range.
3. Up to jax 0.11.0 the offsets of keys are multiplied by the number of query heads: right only where keys have as many
   heads. There keys and values are repeated, which costs their memory G times.
4. The kernel sees a batch of B * M sequences of up to T tokens: it keeps float32 statistics `[B * M, N, T]` for the
   backward pass, and may ask for working memory of that shape times H. That is why M is small.

B batch, T time, N query heads, K key/value heads, H head dim, M documents of a row.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from internjax.sharding import axis_size, partition_spec

MAX_SEGMENTS = 32
"""Documents of one row, padding counted as one. A row of more comes out as NaN (and preflight refuses it)."""

_VERSIONS = ((0, 10, 2), (0, 11, 0), (0, 11, 1), (0, 11, 2), (0, 12, 0))
"""Releases of jax whose private function was read."""
_GROUPED_HEADS_SINCE = (0, 11, 1)
_CAPABILITY = (9, 0)
_CUDNN = 90600
"""Oldest cuDNN with which jax tests packed rows."""


def unsupported() -> dict[str, bool]:
    """Returns what stands against packed attention with this jax, GPU and cuDNN, each with whether it holds."""
    known = ", ".join(".".join(map(str, version)) for version in _VERSIONS)
    if _version() not in _VERSIONS:
        return {f"jax {jax.__version__} (its private function was read for {known} only: install one of them)": True}
    if jax.default_backend() != "gpu":
        return {}
    capability, cudnn = _capability(), _cudnn_version()
    name = ".".join(map(str, capability)) or "none"
    return {
        f"compute capability {name} (9.0, Hopper, or newer only)": capability < _CAPABILITY,
        f"cuDNN {cudnn} ({_CUDNN} or newer only)": cudnn < _CUDNN,
    }


def most_documents(segments_BT: np.ndarray) -> int:
    """Returns how many documents the fullest row of a batch has that is still on the host; padding is one of them."""
    segments_BT = np.asarray(segments_BT)
    return 1 + int((segments_BT[:, 1:] != segments_BT[:, :-1]).sum(axis=1).max(initial=0))


def check_rows(segments_BT: np.ndarray) -> None:
    """Raises ValueError where a row of a batch has more documents than the kernel is given room for."""
    found = most_documents(segments_BT)
    if found > MAX_SEGMENTS:
        raise ValueError(
            f"attention=cudnn_packed takes {MAX_SEGMENTS} documents per row, padding counted as one, and a row of this "
            f"batch has {found}: its outputs would be NaN. Use attention=cudnn or chunked, or leave out short documents"
        )


def _version() -> tuple[int, ...]:
    return tuple(jax.__version_info__[:3])


def _capability() -> tuple[int, ...]:
    """Returns the compute capability of the first device, () where it states none as numbers (not NVIDIA's)."""
    parts = str(getattr(jax.local_devices()[0], "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def _cudnn_version() -> int:
    try:
        return _private().check_cudnn_version()
    except RuntimeError:  # there is none
        return 0


def _private() -> Any:
    """Returns jax's private module; nothing else in the project may touch it."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


class Documents(NamedTuple):
    """Ranges of tokens of equal segment, in the order of the row; -1 where a row has fewer than M."""

    starts_BM: jax.Array
    lengths_BM: jax.Array
    valid_B: jax.Array
    """There are at most M, and no segment comes back after another one."""


def documents(segments_BT: jax.Array, max_segments: int) -> Documents:
    """Returns where the documents of each row lie; padding (segment 0) is one of them."""
    T = segments_BT.shape[1]
    changed_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    index_BT = jnp.pad(jnp.cumsum(changed_BT, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    wanted_M = jnp.arange(max_segments, dtype=jnp.int32)
    starts_BM = jnp.sum(index_BT[:, None, :] < wanted_M[:, None], axis=-1, dtype=jnp.int32)
    ends_BM = jnp.sum(index_BT[:, None, :] <= wanted_M[:, None], axis=-1, dtype=jnp.int32)
    there_BM = wanted_M <= index_BT[:, -1:]
    names_BM = jnp.take_along_axis(segments_BT, jnp.minimum(starts_BM, T - 1), axis=1)
    pairs_MM = wanted_M[:, None] < wanted_M
    same_BMM = (names_BM[:, :, None] == names_BM[:, None, :]) & there_BM[:, None, :] & pairs_MM
    return Documents(
        starts_BM=jnp.where(there_BM, starts_BM, -1),
        lengths_BM=jnp.where(there_BM, ends_BM - starts_BM, -1),
        valid_B=(index_BT[:, -1] < max_segments) & ~jnp.any(same_BMM, axis=(1, 2)),
    )


def packed_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BT: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BT: jax.Array,
    causal: bool,
    scale: float,
) -> jax.Array:
    """Returns attention outputs `[B, T, N, H]`, under the mesh that is set; padding attends to padding.

    The kernel knows the order of tokens, not their positions and segments, so those are checked: a row comes out as NaN
    if it has more than MAX_SEGMENTS documents, a document that is interrupted by another, queries and keys of different
    positions or segments, or (causal) positions that do not grow by one within a document. Raises ValueError when there
    are not as many keys as queries, for heads that the mesh does not divide, and for more elements than int32 counts.
    """
    mesh = jax.sharding.get_abstract_mesh()
    _check_sizes(mesh, q_BTNH.shape, k_BTKH.shape)
    changed_BT = q_segments_BT[:, 1:] != q_segments_BT[:, :-1]
    in_order_BT = changed_BT | (q_segments_BT[:, 1:] == 0) | (jnp.diff(q_positions_BT, axis=1) == 1)
    valid_B = jnp.all(q_segments_BT == k_segments_BT, axis=1)
    if causal:
        valid_B &= jnp.all(in_order_BT, axis=1) & jnp.all(q_positions_BT == k_positions_BT, axis=1)
    local = functools.partial(_on_one_device, causal=causal, scale=scale)
    if not mesh.empty and mesh.size > 1:
        batch, heads = partition_spec(("batch", "act_heads"))
        batch = batch if q_BTNH.shape[0] % axis_size(mesh, batch) == 0 else None
        # Each device packs its own rows: what the compiler would have to guess about offsets is stated.
        spec = PartitionSpec(batch, None, heads, None)
        in_specs = (spec, spec, spec, PartitionSpec(batch, None), PartitionSpec(batch))
        local = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False)
    with jax.named_scope("cudnn_packed_attention"):
        return local(q_BTNH, k_BTKH, v_BTKH, q_segments_BT, valid_B)


def _check_sizes(mesh: Any, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> None:
    (_, T, N, _), (_, S, K, _) = q_shape, k_shape
    if T != S:
        raise ValueError(
            f"packed attention is self-attention: as many keys as queries are wanted, given {T} queries, {S} keys. "
            "Use attention='chunked'."
        )
    tensor = 1 if mesh.empty else mesh.shape["tensor"]
    if N % tensor or K % tensor:
        raise ValueError(
            f"tensor {tensor} of the mesh does not divide {N} query and {K} key/value heads. Choose a mesh whose "
            "tensor axis divides both, or use attention='chunked'."
        )


def _on_one_device(q_BTNH, k_BTKH, v_BTKH, segments_BT, valid_B, *, causal: bool, scale: float):
    cudnn = _private()
    B, T, N, H = q_BTNH.shape
    if B * T * N * H >= 2**31:
        raise ValueError(
            f"packed attention counts elements of queries in int32: {B} rows x {T} tokens x {N} heads x {H} on one "
            "device are too many. Use more micro-batches (accumulate), or attention='chunked'."
        )
    if _version() < _GROUPED_HEADS_SINCE:
        k_BTKH, v_BTKH = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    found = documents(segments_BT, MAX_SEGMENTS)
    offsets_BM = jnp.pad(found.starts_BM, ((0, 0), (0, 1)), constant_values=-1)
    out_BTNH = cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=found.lengths_BM,
        kv_seqlen=found.lengths_BM,
        q_offsets=offsets_BM,
        kv_offsets=offsets_BM,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL if causal else cudnn.MaskType.PADDING,
        qkv_layout="BTNH",
    )
    usable_B = valid_B & found.valid_B
    return jnp.where(usable_B[:, None, None, None], out_BTNH, jnp.nan)
