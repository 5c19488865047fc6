"""The key/value cache: pages of slots for all layers, dense or shared between rows, in float, 8 or 4 bits.

B rows, T time, L layers, P pages, S slots of a page, M pages of a row, K key/value heads, H head dim.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from internjax.kernels.mosaic_paged_attention import BLOCK
from internjax.model.config import ModelConfig

CacheDType = Literal["float32", "bfloat16", "float16", "int8", "int4"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Position i of row b lives in page `page_table_BM[b, i // S]`, slot `i % S`.

    Caches of few bits are asymmetric per token and head: x = offset + scale * value, with float16 offsets and scales.
    4-bit values lie two per byte: the first half of the head dimension in the low bits, the second in the high ones.
    A page id >= P is unmapped: writes to it are dropped. The stacked arrays are carried through the layer loop and
    written at [layer, page, slot].
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    page_table_BM: jax.Array
    k_scales_LPSK: jax.Array | None = None
    k_offsets_LPSK: jax.Array | None = None
    v_scales_LPSK: jax.Array | None = None
    v_offsets_LPSK: jax.Array | None = None

    @property
    def page_size(self) -> int:
        return self.k_LPSKH.shape[2]

    @property
    def num_pages(self) -> int:
        return self.k_LPSKH.shape[1]

    @property
    def length(self) -> int:
        """Positions that a row can hold."""
        return self.page_table_BM.shape[1] * self.page_size


def paged_cache(
    config: ModelConfig, num_pages: int, page_size: int, *, batch: int, pages_per_row: int, dtype: CacheDType
) -> KVCache:
    """Returns an empty cache whose rows own no page yet (every table entry is unmapped)."""
    few_bits = dtype in ("int8", "int4")
    width = config.head_dim // 2 if dtype == "int4" else config.head_dim
    shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, width)
    # Distinct arrays throughout: a donated buffer may appear once only.
    scales = [jnp.zeros(shape[:-1], jnp.float16) if few_bits else None for _ in range(4)]
    store = jnp.uint8 if few_bits else jnp.dtype(dtype)
    table = jnp.full((batch, pages_per_row), num_pages, jnp.int32)
    return KVCache(jnp.zeros(shape, store), jnp.zeros(shape, store), table, *scales)


def dense_cache(config: ModelConfig, batch: int, length: int, *, dtype: CacheDType) -> KVCache:
    """Returns an empty cache in which row b owns page b, `length` slots long.

    Rounded up to whole blocks where the config's back end reads blocks.
    """
    if config.paged_attention == "mosaic":
        length += -length % BLOCK
    cache = paged_cache(config, batch, length, batch=batch, pages_per_row=1, dtype=dtype)
    return dataclasses.replace(cache, page_table_BM=jnp.arange(batch, dtype=jnp.int32)[:, None])


class _Quantised(NamedTuple):
    """x = offset + scale * value over the head dimension."""

    values: jax.Array
    scales: jax.Array
    offsets: jax.Array


def _quantize(x: jax.Array, *, bits: int) -> _Quantised:
    """Returns `x` `[..., H]` in `bits` bits: offset = min, scale = (max - min) / (2^bits - 1), rounded as stored."""
    x, levels = x.astype(jnp.float32), 2**bits - 1
    low, high = x.min(axis=-1), x.max(axis=-1)
    # Values are rounded by what will be read back. The floor is the smallest number that float16 holds.
    offsets = low.astype(jnp.float16)
    scales = jnp.maximum((high - offsets.astype(jnp.float32)) / levels, 2.0**-24).astype(jnp.float16)
    x = (x - offsets.astype(jnp.float32)[..., None]) / scales.astype(jnp.float32)[..., None]
    values = jnp.clip(jnp.round(x), 0, levels).astype(jnp.uint8)
    if bits == 4:
        first, second = jnp.split(values, 2, axis=-1)
        values = first | (second << 4)
    return _Quantised(values, scales, offsets)


def write(
    cache: KVCache, layer: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, positions_BT: jax.Array, valid_BT
) -> KVCache:
    """Returns the cache with keys and values of one layer stored at their positions; invalid ones are dropped."""
    table_index = positions_BT // cache.page_size
    page_BT = jnp.take_along_axis(cache.page_table_BM, table_index, axis=1, mode="fill", fill_value=cache.num_pages)
    page_BT = jnp.where(valid_BT, page_BT, cache.num_pages)
    at = (layer, page_BT, positions_BT % cache.page_size)

    def put(pages, values):
        return pages.at[at].set(values.astype(pages.dtype), mode="drop")

    if cache.k_scales_LPSK is None:
        return dataclasses.replace(cache, k_LPSKH=put(cache.k_LPSKH, k_BTKH), v_LPSKH=put(cache.v_LPSKH, v_BTKH))
    bits = 8 * cache.k_LPSKH.shape[-1] // k_BTKH.shape[-1]
    k, v = _quantize(k_BTKH, bits=bits), _quantize(v_BTKH, bits=bits)
    return dataclasses.replace(
        cache,
        k_LPSKH=put(cache.k_LPSKH, k.values),
        v_LPSKH=put(cache.v_LPSKH, v.values),
        k_scales_LPSK=put(cache.k_scales_LPSK, k.scales),
        k_offsets_LPSK=put(cache.k_offsets_LPSK, k.offsets),
        v_scales_LPSK=put(cache.v_scales_LPSK, v.scales),
        v_offsets_LPSK=put(cache.v_offsets_LPSK, v.offsets),
    )
