"""Log-probabilities of given tokens, by the forward pass that training uses. B batch, T time, F frequencies."""

import jax
import jax.numpy as jnp

from internjax.model import decoder, rope
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora


def logprobs(
    params: dict,
    tokens_BT: jax.Array,
    *,
    config: ModelConfig,
    lora: Lora | None = None,
    temperature: float | jax.Array = 1.0,
    positions_BT: jax.Array | None = None,
    segments_BT: jax.Array | None = None,
    inv_freq_BF: jax.Array | None = None,
    chunk_size: int = 512,
) -> jax.Array:
    """Returns log p(token | the tokens before it) `[B, T]`, float32, of logits / temperature; a pure function to jit.

    The first token of a row, the first of every packed segment, and padding (segment 0) get 0. `temperature` is one
    number or one per row `[B]`. Frequencies default to those of sequences declared to be T long. The vocabulary is
    held for `chunk_size` time steps at once.
    """
    B, T = tokens_BT.shape
    if inv_freq_BF is None:
        inv_freq_BF = rope.inv_freq(config, length=T)[None]
    with jax.named_scope("score"):
        hidden_BTD = decoder.forward(
            params,
            tokens_BT,
            config=config,
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            inv_freq_BF=inv_freq_BF,
            lora=lora,
        ).hidden_BTD
        logprobs_BT = decoder.target_logprobs(
            params,
            hidden_BTD[:, :-1],
            tokens_BT[:, 1:],
            config=config,
            lora=lora,
            chunk_size=chunk_size,
            temperature=temperature,
        )
    if segments_BT is not None:
        continues_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] != 0)
        logprobs_BT = jnp.where(continues_BT, logprobs_BT, 0.0)
    return jnp.concatenate([jnp.zeros((B, 1), logprobs_BT.dtype), logprobs_BT], axis=1)
