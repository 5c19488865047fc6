"""How many pages of cache fit beside the weights, from shapes alone.

B slots, S longest context, C prompt tokens read at once, K key/value heads, H head dim, N query heads, V vocabulary,
D embed, F ffn.
"""

import functools

import jax
import jax.numpy as jnp

from internjax.model.cache import CacheDType, paged_cache
from internjax.model.config import ModelConfig


def page_bytes(config: ModelConfig, page_size: int, dtype: CacheDType) -> int:
    """Returns the bytes of one page in all layers, scales included."""
    one = functools.partial(paged_cache, config, 1, page_size, batch=1, pages_per_row=1, dtype=dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(one)) if leaf.ndim > 2)


def work_bytes(config: ModelConfig, *, num_slots: int, max_context: int, prefill_chunk: int) -> int:
    """Returns the bytes that a step needs beside weights and pages, at most: what drawing or reading a chunk takes.

    Attention reads one layer's pages of its rows into one array each for keys and values (2 S K H), once more where it
    puts heads before time, and weighs N x S scores in float32, three of them at a time. Drawing holds five arrays of
    B x V float32, the rows themselves two of B x S. Reading holds a layer's activations of C tokens.
    """
    B, S, C, itemsize = num_slots, max_context, prefill_chunk, jnp.dtype(config.dtype).itemsize
    read = 2 * 2 * S * config.num_kv_heads * config.head_dim * itemsize
    scores = 3 * S * config.num_heads * 4
    drawing = B * (read + scores + 5 * 4 * config.vocab_size)
    wide = 4 * config.d_model + 3 * config.ffn_dim + 3 * config.num_heads * config.head_dim
    reading = read + C * (scores + wide * itemsize)
    rows = B * (2 * 4 * S + config.vocab_size)
    return max(drawing, reading) + rows


def fitting_pages(
    config: ModelConfig,
    *,
    memory_bytes: int,
    weight_bytes: int,
    num_slots: int,
    max_context: int,
    prefill_chunk: int,
    page_size: int,
    cache_dtype: CacheDType,
    draft: ModelConfig | None = None,
) -> int:
    """Returns how many pages fit into `memory_bytes`; raises ValueError where not even one full context does.

    draft: a model that drafts, whose cache has as many pages.
    """
    work = work_bytes(config, num_slots=num_slots, max_context=max_context, prefill_chunk=prefill_chunk)
    page = page_bytes(config, page_size, cache_dtype)
    page += 0 if draft is None else page_bytes(draft, page_size, cache_dtype)
    fitting, needed = (memory_bytes - weight_bytes - work) // page, -(-max_context // page_size)
    if fitting < needed:
        gib = {"memory": memory_bytes, "weights": weight_bytes, "work": work, "one context": needed * page}
        sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in gib.items())
        raise ValueError(
            f"a context of {max_context} tokens does not fit on the device: {sizes}. Ask for a shorter context, fewer "
            "answers at once, a cache of fewer bits, or quantised weights."
        )
    return int(fitting)
