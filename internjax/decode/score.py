"""Log-probabilities of given tokens, by the forward pass that training uses.

B batch, T time, S scored tokens, C chunk of S, D embed, F frequencies, V vocabulary.
"""

from typing import NamedTuple

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


class LastScores(NamedTuple):
    """log p of each token, float32, and whether it was the model's most likely one: both `[B, S]`."""

    logprobs_BS: jax.Array
    is_top_BS: jax.Array


def last_scores(
    params: dict,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    num_scored: int,
    config: ModelConfig,
    lora: Lora | None = None,
    inv_freq_BF: jax.Array | None = None,
    chunk_size: int = 256,
) -> LastScores:
    """Returns the scores of the last `num_scored` tokens of rows that are padded on the right; a pure function to jit.

    Each is scored given all tokens of its row before it, so rows must hold at least `num_scored` + 1 tokens. What pads
    a row has no influence. Frequencies default to those of sequences declared to be T long.
    """
    B, T = tokens_BT.shape
    assert 0 < num_scored < T, f"{num_scored} tokens to score in rows of {T}; the first of a row has nothing before it"
    if inv_freq_BF is None:
        inv_freq_BF = rope.inv_freq(config, length=T)[None]
    before_BS = lengths_B[:, None] - num_scored - 1 + jnp.arange(num_scored)
    targets_BS = jnp.take_along_axis(tokens_BT, before_BS + 1, axis=1)
    C = min(chunk_size, num_scored)

    def chunk(inputs):
        hidden_BCD, targets_BC = inputs
        logits_BCV = decoder.unembed(params, hidden_BCD, config=config, lora=lora)
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1), chosen_BC >= logits_BCV.max(axis=-1)

    def cut(x_BS):
        padded = jnp.pad(x_BS, ((0, 0), (0, -num_scored % C)) + ((0, 0),) * (x_BS.ndim - 2))
        return padded.reshape(B, -1, C, *x_BS.shape[2:]).swapaxes(0, 1)

    with jax.named_scope("score"):
        hidden_BTD = decoder.forward(params, tokens_BT, config=config, inv_freq_BF=inv_freq_BF, lora=lora).hidden_BTD
        # Only what is scored is unembedded: a quarter of a window of 4096 of which 1024 count.
        hidden_BSD = jnp.take_along_axis(hidden_BTD, before_BS[..., None], axis=1)
        found = jax.lax.map(chunk, (cut(hidden_BSD), cut(targets_BS)))
    return LastScores(*(x.swapaxes(0, 1).reshape(B, -1)[:, :num_scored] for x in found))
