"""How many pages of cache fit beside the weights, from shapes alone; all bytes are those of one device.

B slots, S longest context, C prompt tokens read at once, T tokens of a row in one step, K key/value heads, H head dim,
N query heads, V vocabulary, D embed, F ffn, R rows of whole texts.
"""

import functools
import os

import jax
import jax.numpy as jnp

from internjax.decode.embed import num_rows, row_widths
from internjax.decode.generate import decoding_params
from internjax.decode.programs import SCORED_AT_ONCE, read_shapes
from internjax.kernels.attention import QUERY_CHUNK
from internjax.kernels.paged_attention import key_block
from internjax.model.cache import CacheDType, paged_cache
from internjax.model.config import ModelConfig


def weight_bytes(params: dict, config: ModelConfig) -> int:
    """Returns the bytes of the parameters where they lie, and of those that decoding holds once more in its dtype."""

    def share(leaf) -> int:
        return leaf.addressable_shards[0].data.nbytes if isinstance(leaf, jax.Array) else leaf.nbytes

    cast = jax.eval_shape(functools.partial(decoding_params, config=config), params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(cast), strict=True)
    return sum(
        share(leaf) + (0 if leaf.dtype == new.dtype else share(leaf) // leaf.dtype.itemsize * new.dtype.itemsize)
        for leaf, new in pairs
    )


def page_bytes(config: ModelConfig, page_size: int, dtype: CacheDType) -> int:
    """Returns the bytes of one page in all layers, scales included, of a cache that is not cut.

    Raises ValueError for a page without tokens.
    """
    if page_size < 1:
        raise ValueError(f"a page must hold at least one token, given a page_size of {page_size}")
    one = functools.partial(paged_cache, config, 1, page_size, batch=1, pages_per_row=1, dtype=dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(one)) if leaf.ndim > 2)


def host_pages(host_bytes: int, *, page_bytes: int, num_engines: int) -> int:
    """Returns how many pages each of `num_engines` may keep in `host_bytes` of the host's memory, which they share.

    Raises ValueError for bytes that hold no page, and for more than the machine has.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if host_bytes > machine:
        asked, has = host_bytes / 2**30, machine / 2**30
        raise ValueError(
            f"{asked:,.2f} GiB of the host's memory are to hold pages, and it has {has:,.2f} GiB in all; ask for less, "
            "so that what else runs there has room"
        )
    num_pages = host_bytes // num_engines // page_bytes
    if host_bytes and not num_pages:
        each = f" for each of {num_engines} replicas" if num_engines > 1 else ""
        raise ValueError(
            f"{host_bytes:,} bytes of the host's memory hold no page: one is {page_bytes:,} bytes{each}. Ask for more, "
            "or for none"
        )
    return num_pages


def work_bytes(
    config: ModelConfig, *, num_slots: int, max_context: int, prefill_chunk: int, num_drafts: int = 0
) -> int:
    """Returns the bytes that a step needs beside weights and pages, at most: what drawing or reading a chunk takes.

    Attention reads one layer's pages of its rows into one array each for keys and values (2 S K H), once more where it
    puts heads before time, and weighs N x T x S scores in float32, three of them at a time; many tokens weigh a block
    of S only. Drawing holds five arrays of B x V float32 and the logits of all T = 1 + drafts tokens, the rows
    themselves two of B x S and the counts of every token. Reading holds a layer's activations of C tokens, or of short
    parts of several prompts, or three arrays of V float32 for each of those scored at once.
    """
    B, S, C, T, itemsize = num_slots, max_context, prefill_chunk, 1 + num_drafts, jnp.dtype(config.dtype).itemsize

    def read_and_scores(num_queries: int) -> tuple[int, int]:
        """Of a row, and of each of its queries."""
        block = key_block(num_queries, S)
        return 2 * 2 * block * config.num_kv_heads * config.head_dim * itemsize, 3 * block * config.num_heads * 4

    logits = 4 * config.vocab_size
    wide = 4 * config.d_model + 3 * config.ffn_dim + 3 * config.num_heads * config.head_dim
    read, scores = read_and_scores(T)
    drawing = B * (read + 5 * logits + num_drafts * (logits + wide * itemsize) + T * scores)
    reading = read_and_scores(C)[0] + 3 * min(C, SCORED_AT_ONCE) * logits
    for R, size in read_shapes(C, num_slots=B, together=True):
        read, scores = read_and_scores(size)
        reading = max(reading, R * (read + size * (scores + wide * itemsize)))
    rows = B * (2 * 4 * S + 5 * config.vocab_size)
    return max(drawing, reading) + rows


def embedding_bytes(config: ModelConfig, longest: int) -> int:
    """Returns the bytes that vectors of texts of up to `longest` tokens need beside the weights, at most.

    Of the widest rows, R of T tokens: attention weighs N x C x T scores of each in float32, three of them at a time,
    for C queries at once, and there are a layer's activations of all tokens.
    """
    itemsize, most = jnp.dtype(config.dtype).itemsize, 0
    wide = 4 * config.d_model + 3 * config.ffn_dim + 3 * config.num_heads * config.head_dim
    for T in row_widths(config, longest) if longest else ():
        scores = 3 * min(T, QUERY_CHUNK) * T * config.num_heads * 4
        most = max(most, num_rows(T) * (scores + T * wide * itemsize))
    return most


def buckets_of(max_context: int) -> tuple[int, ...]:
    """Returns the shorter contexts that are worth programs of their own: 128 tokens, and four times the one before.

    A token drawn attends to less than four times what the longest row holds then, and not to all that one might.
    """
    return tuple(128 * 4**i for i in range(32) if 128 * 4**i < max_context)


def row_buckets_of(num_slots: int) -> tuple[int, ...]:
    """Returns the numbers of slots, fewer than all, that are worth programs of their own: 1, 4, 16 and so on, and half.

    What few answers cost does not grow with the slots, and where half of them answer, half is paid for.
    """
    few = {4**i for i in range(16) if 4 ** (i + 1) <= num_slots}
    return tuple(sorted(few | {num_slots // 2} - {0, 1, 2}))


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
    tensor: int = 1,
    num_drafts: int = 0,
    draft: ModelConfig | None = None,
    longest_embedding: int = 0,
) -> int:
    """Returns how many pages fit into `memory_bytes`; raises ValueError where not even one full context does.

    weight_bytes: of all that stands beside pages. tensor: devices over which the heads of the cache are cut.
    num_drafts: tokens that are tried together. draft: a model that drafts, whose cache has as many pages.
    longest_embedding: tokens of a text that a vector is made of, beside the engine's steps and at the same time.
    """
    sizes = {"num_slots": num_slots, "max_context": max_context, "prefill_chunk": prefill_chunk}
    work = work_bytes(config, **sizes, num_drafts=num_drafts)
    page = page_bytes(config, page_size, cache_dtype) // tensor
    if draft is not None:
        page += page_bytes(draft, page_size, cache_dtype)
        work = max(work, work_bytes(draft, **sizes))
    vectors = embedding_bytes(config, longest_embedding)
    fitting, needed = (memory_bytes - weight_bytes - work - vectors) // page, -(-max_context // page_size)
    if fitting < needed:
        gib = {"memory": memory_bytes, "weights": weight_bytes, "work": work, "one context": needed * page}
        gib |= {"embeddings": vectors} if vectors else {}
        sizes = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in gib.items())
        raise ValueError(
            f"a context of {max_context} tokens does not fit on the device: {sizes}. Ask for a shorter context, fewer "
            f"answers at once, a cache of fewer bits, {'shorter embeddings, ' if vectors else ''}or quantised weights."
        )
    return int(fitting)
