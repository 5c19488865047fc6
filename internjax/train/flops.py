"""Training arithmetic by formula: FLOPs per token and per batch, peaks of devices, model FLOPs utilisation.

FLOPs per token = 6 N' + 6 L d s

with N' the parameters of matrix products (output head included; embedding table and norms are not), L layers,
d = query heads x head dimension, s the length of the segment that the token stands in. 6 N' is 2 per multiply-add in
the forward pass and twice that in the backward one. The attention term is 12 L d for every key that a query sees, in
the causal convention (the other one writes 12 L d s): s^2 / 2 keys in a segment, half of the diagonal left out. Under a
sliding window of w < s tokens the query at position p sees min(p + 1, w) keys, which is w s - w^2 / 2 in a segment with
the same half of the diagonal left out, and the term is 6 L d (2 w - w^2 / s). Recomputation is never counted: this is
the work of the model, not of the machine (PaLM, arXiv:2204.02311, appendix B, which writes the uncausal form).

A frozen matrix has no gradient of its weights and counts 4 instead of 6; 2, the forward pass alone, where nothing that
is trained lies below it. With adapters the frozen matrices count 4, the adapters 6.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from internjax.model import decoder
from internjax.model.config import ModelConfig, num_matmul_params
from internjax.model.lora import ATTENTION_TARGETS, LoraConfig
from internjax.train import devices
from internjax.train.batch import Batch
from internjax.train.freezing import split

PEAK_FLOPS = {device.name: device.peak_flops for device in devices.DEVICES}
"""Dense bfloat16 FLOP/s of one device by its short name; `peak_flops` finds it by jax's `device_kind`."""


def formula(config: ModelConfig, *, lora_config: LoraConfig | None = None, freeze: tuple[str, ...] = ()) -> str:
    """Returns the formula of `training_flops` in words."""
    matmul = "4 x frozen + 6 x adapter matmul parameters" if lora_config is not None else "6 x matmul parameters"
    matmul = "6 x trained + 4 x frozen matmul parameters (2 where nothing below is trained)" if freeze else matmul
    w = config.window
    length = "segment length" if w is None else f"({2 * w} - {w}^2 / segment length; window {w})"
    return f"{matmul} + 6 x layers x d x {length} (causal), per token; recomputation not counted"


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one device by jax's `device_kind` or a short name.

    None for CPUs and for devices that the table does not have: no utilisation is claimed for those.
    """
    device = devices.find(device_kind)
    return None if device is None else device.peak_flops


def lora_params(config: ModelConfig, lora_config: LoraConfig) -> int:
    """Returns the number of adapter parameters: rank x (inputs + outputs) per adapted matrix, DoRA's magnitudes too."""
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sides = {
        "query": (config.d_model, query),
        "key": (config.d_model, key),
        "value": (config.d_model, key),
        "output": (query, config.d_model),
        "gate": (config.d_model, config.ffn_dim),
        "up": (config.d_model, config.ffn_dim),
        "down": (config.ffn_dim, config.d_model),
        "head": (config.d_model, config.vocab_size if config.head == "lm" else 1),
    }
    assert set(ATTENTION_TARGETS) < set(sides)

    def of(target: str) -> int:
        magnitudes = sides[target][1] if lora_config.kind == "dora" else 0
        return (1 if target == "head" else config.num_layers) * (lora_config.rank * sum(sides[target]) + magnitudes)

    return sum(map(of, lora_config.targets))


class _Trained(NamedTuple):
    """What is trained of a model with parts frozen, and how far down gradients go."""

    matmul_params: int
    """Parameters of matrix products that are trained."""
    into_head: bool
    """Something below the head is trained: gradients go through it."""
    into_layers: bool
    """Something in the layers, which are one loop, or below them is trained."""


@functools.lru_cache(maxsize=64)
def _trained(config: ModelConfig, freeze: tuple[str, ...]) -> _Trained:
    kept = split(decoder.abstract_params(config), freeze).trainable
    matrices = [kept.get("layers", {}), kept.get("embed", {}) if config.tie_embeddings else kept.get("head", {})]
    # Kernels of layers are stacked; a bias of all layers has two dimensions, and that of the head one.
    layers, head = map(jax.tree.leaves, matrices)
    num_params = sum(leaf.size for leaf in layers if leaf.ndim == 3) + sum(leaf.size for leaf in head if leaf.ndim == 2)
    into_layers = bool({"embed", "layers"} & set(kept))
    return _Trained(num_params, into_layers or "norm" in kept, into_layers)


def gradients_reach_layers(config: ModelConfig, freeze: tuple[str, ...]) -> bool:
    """Whether the layers have a backward pass with these parameters frozen."""
    return not freeze or _trained(config, freeze).into_layers


def matmul_flops(config: ModelConfig, *, lora_config: LoraConfig | None = None, freeze: tuple[str, ...] = ()) -> int:
    """Returns the training FLOPs per token of all products with parameters: 6 N', or 4 N' + 6 adapters.

    `freeze` are patterns of parameters that are not trained (`train.freezing`).
    """
    num_params = num_matmul_params(config)
    if lora_config is not None:
        # DoRA's magnitudes multiply columns; no product has them.
        return 4 * num_params + 6 * lora_params(config, dataclasses.replace(lora_config, kind="lora"))
    if not freeze:
        return 6 * num_params
    trained = _trained(config, freeze)
    head = config.d_model * (config.vocab_size if config.head == "lm" else 1)
    backward = head * trained.into_head + (num_params - head) * trained.into_layers
    return 2 * (num_params + trained.matmul_params + backward)


def attention_flops(
    config: ModelConfig, lengths: int | Sequence[int] | np.ndarray, *, freeze: tuple[str, ...] = ()
) -> int:
    """Returns the training FLOPs of attention within segments of these lengths: 6 L d (s^2 - (s - w)^2) of each.

    w is the window, or s without one; see the top of this file. A third, the forward pass alone, where what is trained
    lies above the layers.
    """
    lengths = np.atleast_1d(np.asarray(lengths)).astype(object)  # Python's integers: squares of a batch pass 64 bits
    beyond = 0 if config.window is None else np.maximum(lengths - config.window, 0)
    factor = 6 if gradients_reach_layers(config, freeze) else 2
    return factor * config.num_layers * config.num_heads * config.head_dim * int(np.sum(lengths**2 - beyond**2))


def training_flops(
    config: ModelConfig, *, seq_len: int, lora_config: LoraConfig | None = None, freeze: tuple[str, ...] = ()
) -> float:
    """Returns the training FLOPs per token of rows that are one document of `seq_len` tokens each."""
    per_token = matmul_flops(config, lora_config=lora_config, freeze=freeze)
    return per_token + attention_flops(config, seq_len, freeze=freeze) / seq_len


def batch_flops(
    config: ModelConfig, *, lora_config: LoraConfig | None = None, freeze: tuple[str, ...] = ()
) -> Callable[[Batch], float]:
    """Returns batch -> its training FLOPs, with attention summed over the true segments and padding left out.

    The batch is the rows that are given: a process that holds a share of a global batch gets its share.
    """
    per_token = matmul_flops(config, lora_config=lora_config, freeze=freeze)

    def flops(batch: Batch) -> float:
        lengths = segment_lengths(np.asarray(batch.segments))
        return float(per_token * int(lengths.sum()) + attention_flops(config, lengths, freeze=freeze))

    return flops


def segment_lengths(segments_BT: np.ndarray) -> np.ndarray:
    """Returns the number of tokens of every segment of every row, int64; segment 0 is padding and left out."""
    segments_BT = np.asarray(segments_BT, np.int64)
    width = int(segments_BT.max(initial=0)) + 1
    offsets_B1 = np.arange(len(segments_BT), dtype=np.int64)[:, None] * width
    counts = np.bincount((segments_BT + offsets_B1).ravel(), minlength=len(segments_BT) * width)
    counts = counts.reshape(-1, width)[:, 1:]
    return counts[counts > 0]


def mfu(flops: float, seconds: float, num_devices: int, device_kind: str) -> float | None:
    """Returns flops / (seconds x devices x peak), the share of the peak that was useful work; None without a peak."""
    peak = peak_flops(device_kind)
    if peak is None or seconds <= 0:
        return None
    return flops / (seconds * num_devices * peak)
