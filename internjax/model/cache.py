"""The key/value cache: pages of slots for all layers, dense or shared between rows, in float or 8 bits.

B rows, T time, L layers, P pages, S slots of a page, M pages of a row, K key/value heads, H head dim.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from internjax.model.config import ModelConfig

CacheDType = Literal["float32", "bfloat16", "float16", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers. Position i of row b lives in page `page_table_BM[b, i // S]`, slot `i % S`.

    8-bit caches are asymmetric per token and head: x = (values - zero) * scale. A page id >= P is unmapped: writes to
    it are dropped. The stacked arrays are carried through the layer loop and written at [layer, page, slot].
    """

    k_LPSKH: jax.Array
    v_LPSKH: jax.Array
    page_table_BM: jax.Array
    k_scales_LPSK: jax.Array | None = None
    k_zeros_LPSK: jax.Array | None = None
    v_scales_LPSK: jax.Array | None = None
    v_zeros_LPSK: jax.Array | None = None

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
    shape = (config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
    # Distinct arrays throughout: a donated buffer may appear once only.
    scales = [jnp.zeros(shape[:-1], jnp.float32) if dtype == "int8" else None for _ in range(4)]
    store = jnp.uint8 if dtype == "int8" else jnp.dtype(dtype)
    table = jnp.full((batch, pages_per_row), num_pages, jnp.int32)
    return KVCache(jnp.zeros(shape, store), jnp.zeros(shape, store), table, *scales)


def dense_cache(config: ModelConfig, batch: int, length: int, *, dtype: CacheDType) -> KVCache:
    """Returns an empty cache in which row b owns page b, `length` slots long."""
    cache = paged_cache(config, batch, length, batch=batch, pages_per_row=1, dtype=dtype)
    return dataclasses.replace(cache, page_table_BM=jnp.arange(batch, dtype=jnp.int32)[:, None])


def _quantize_kv(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (values uint8, scale, zero): scale = (max - min) / 255, zero = -min / scale over the head dimension."""
    x = x.astype(jnp.float32)
    low, high = x.min(axis=-1), x.max(axis=-1)
    # The floor keeps a constant vector finite: its zero point is at most 1e6 in size and it is restored exactly.
    scale = jnp.maximum(jnp.maximum((high - low) / 255.0, 1e-6 * jnp.abs(low)), 1e-30)
    zero = -low / scale
    values = jnp.clip(jnp.round(x / scale[..., None] + zero[..., None]), 0, 255).astype(jnp.uint8)
    return values, scale, zero


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
    k, k_scale, k_zero = _quantize_kv(k_BTKH)
    v, v_scale, v_zero = _quantize_kv(v_BTKH)
    return dataclasses.replace(
        cache,
        k_LPSKH=put(cache.k_LPSKH, k),
        v_LPSKH=put(cache.v_LPSKH, v),
        k_scales_LPSK=put(cache.k_scales_LPSK, k_scale),
        k_zeros_LPSK=put(cache.k_zeros_LPSK, k_zero),
        v_scales_LPSK=put(cache.v_scales_LPSK, v_scale),
        v_zeros_LPSK=put(cache.v_zeros_LPSK, v_zero),
    )
