"""Losses: what is minimised, as sums over a batch together with the weight to divide them by.

A loss returns sums, not means. Micro-batches and data-parallel shards are added up, and the step divides once: the
result is the mean over all tokens of the global batch, however it was cut. B batch, T time, D embed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from internjax.kernels.ring_attention import zigzag
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.lora import LoraConfig, apply_config


class LossOutput(NamedTuple):
    """Sums over a batch. The step minimises total / weight and logs every metric divided by weight."""

    total: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]
    broken_L: jax.Array | None = None
    """Tokens at which the output of each layer is not finite, where the loss knows: the guard names the layer."""


Loss = Callable[[Any, Any, Any, jax.Array], LossOutput]
"""(trainable, frozen, batch, rng) -> LossOutput. Gradients are taken with respect to `trainable` alone."""


def next_token(
    model_config: ModelConfig,
    *,
    lora_config: LoraConfig | None = None,
    chunk_size: int = 512,
    neftune_alpha: float = 0.0,
) -> Loss:
    """Returns the loss of predicting the next token of a `Batch`: -sum(mask * log p(target)), weight sum(mask).

    Without `lora_config` the trainable part is the parameter tree and the frozen part is None; with it, the trainable
    part is the adapter collection (`init_lora`) and the frozen part the base's parameters, quantised or not.
    neftune_alpha adds noise to the embeddings (`internjax.model.neftune`); leave it out where nothing is learned.
    """
    if model_config.head != "lm":
        raise ValueError(f"next_token needs a model with head='lm'; given head={model_config.head!r}")

    def loss(trainable, frozen, batch, rng) -> LossOutput:
        params, lora = (trainable, None) if lora_config is None else (frozen, apply_config(trainable, lora_config))
        draws = bool(neftune_alpha) or (lora is not None and bool(lora.dropout))
        if model_config.attention == "ring" and not draws:
            # A sum over tokens does not mind their order, the ring does. Draws go by a token's place in its row, which
            # has to be the same on every mesh.
            batch = jax.tree.map(zigzag, batch)
        forward = decoder.forward(
            params,
            batch.tokens,
            config=model_config,
            positions_BT=batch.positions,
            segments_BT=batch.segments,
            lora=lora,
            dropout_rng=rng if draws else None,
            embedding_noise=neftune_alpha,
        )
        logprobs_BT = decoder.target_logprobs(
            params, forward.hidden_BTD, batch.targets, config=model_config, lora=lora, chunk_size=chunk_size
        )
        mask_BT = batch.loss_mask.astype(jnp.float32)
        # A masked target may have a log-probability of -inf; 0 * inf would poison the sum.
        total = -jnp.sum(jnp.where(mask_BT > 0, logprobs_BT, 0.0) * mask_BT)
        return LossOutput(total, jnp.sum(mask_BT), {}, jnp.sum(~forward.finite_LBT, axis=(1, 2)))

    return loss
