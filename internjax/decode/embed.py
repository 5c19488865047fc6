"""Vectors of texts, from the hidden states of a language model.

B batch, T time, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from internjax.model import decoder, rope
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora

ROW_TOKENS, MAX_ROWS = 4096, 8
"""Of the rows that are read at once, unless one alone is longer; rows, at most."""


def mean_embeddings(
    params: dict,
    tokens_BT: jax.Array,
    starts_B: jax.Array,
    lengths_B: jax.Array,
    *,
    config: ModelConfig,
    lora: Lora | None = None,
) -> jax.Array:
    """Returns the mean of the final normed hidden states from each row's start on, of length 1, float32 `[B, D]`.

    The mean, and not the last state: that one is trained to tell the next token, and says more of it than of the text.
    Rows are padded on the right, which has no influence; `starts_B` leaves out what begins every text. A pure function
    to jit.
    """
    config = in_chunks(config)
    T = tokens_BT.shape[1]
    inv_freq_BF = rope.inv_freq(config, length=T)[None]
    with jax.named_scope("embed"):
        hidden_BTD = decoder.forward(params, tokens_BT, config=config, inv_freq_BF=inv_freq_BF, lora=lora).hidden_BTD
        at_T = jnp.arange(T)
        counts_BT = (at_T >= starts_B[:, None]) & (at_T < lengths_B[:, None])
        mean_BD = jnp.einsum("btd,bt->bd", hidden_BTD.astype(jnp.float32), counts_BT.astype(jnp.float32))
        return mean_BD / jnp.linalg.norm(mean_BD, axis=-1, keepdims=True)


def in_chunks(config: ModelConfig) -> ModelConfig:
    """Returns the config with attention in chunks of queries where it has the reference, whose memory grows with T * T.

    The numbers are the same.
    """
    return dataclasses.replace(config, attention="chunked") if config.attention == "xla" else config


def num_rows(width: int) -> int:
    """Returns how many rows of so many tokens are read at once."""
    return min(MAX_ROWS, max(1, ROW_TOKENS // width))


def row_widths(config: ModelConfig, longest: int) -> tuple[int, ...]:
    """Returns the widths that rows of up to `longest` tokens are padded to: powers of two from 64, and the ends.

    Rows that fit what the model was trained for are not wider than that, so that padding leaves dynamic frequencies.
    """
    ends = {min(config.max_position_embeddings, longest), longest}
    return tuple(sorted({*ends, *(1 << power for power in range(6, 31) if 1 << power < min(ends))}))
