"""Training arithmetic by formula: FLOPs per token and per batch, peaks of devices, model FLOPs utilisation.

FLOPs per token = 6 N' + 6 L d s

with N' the parameters of matrix products (output head included; embedding table and norms are not), L layers,
d = query heads x head dimension, s the length of the segment that the token stands in. 6 N' is 2 per multiply-add in
the forward pass and twice that in the backward one. The attention term takes the causal half (the other convention
writes 12 L d s). Recomputation is never counted: this is the work of the model, not of the machine (PaLM,
arXiv:2204.02311, appendix B, which writes the uncausal form). With adapters, frozen matrices count 4 instead of 6 (no
gradient of the weight), the adapters 6.
"""

from collections.abc import Callable

import numpy as np

from internjax.model.config import ModelConfig, num_matmul_params
from internjax.model.lora import ATTENTION_TARGETS, LoraConfig
from internjax.train import devices
from internjax.train.batch import Batch

PEAK_FLOPS = {device.name: device.peak_flops for device in devices.DEVICES}
"""Dense bfloat16 FLOP/s of one device by its short name; `peak_flops` finds it by jax's `device_kind`."""

FORMULA = "6 x matmul parameters + 6 x layers x d x segment length (causal), per token; recomputation not counted"
LORA_FORMULA = "4 x frozen + 6 x adapter matmul parameters + 6 x layers x d x segment length (causal), per token"


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of one device by jax's `device_kind` or a short name.

    None for CPUs and for devices that the table does not have: no utilisation is claimed for those.
    """
    device = devices.find(device_kind)
    return None if device is None else device.peak_flops


def lora_params(config: ModelConfig, lora_config: LoraConfig) -> int:
    """Returns the number of adapter parameters: rank x (inputs + outputs) per adapted matrix."""
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
    copies = {name: 1 if name == "head" else config.num_layers for name in sides}
    return sum(copies[name] * lora_config.rank * sum(sides[name]) for name in lora_config.targets)


def matmul_flops(config: ModelConfig, *, lora_config: LoraConfig | None = None) -> int:
    """Returns the training FLOPs per token of all products with parameters: 6 N', or 4 N' + 6 adapters."""
    if lora_config is None:
        return 6 * num_matmul_params(config)
    return 4 * num_matmul_params(config) + 6 * lora_params(config, lora_config)


def attention_flops(config: ModelConfig) -> int:
    """Returns 6 L d: times the square of a segment's length, the training FLOPs of its causal attention."""
    return 6 * config.num_layers * config.num_heads * config.head_dim


def training_flops(config: ModelConfig, *, seq_len: int, lora_config: LoraConfig | None = None) -> int:
    """Returns the training FLOPs per token of rows that are one document of `seq_len` tokens each."""
    return matmul_flops(config, lora_config=lora_config) + attention_flops(config) * seq_len


def batch_flops(config: ModelConfig, *, lora_config: LoraConfig | None = None) -> Callable[[Batch], float]:
    """Returns batch -> its training FLOPs, with attention summed over the true segments and padding left out.

    The batch is the rows that are given: a process that holds a share of a global batch gets its share.
    """
    per_token, per_square = matmul_flops(config, lora_config=lora_config), attention_flops(config)

    def flops(batch: Batch) -> float:
        lengths = segment_lengths(np.asarray(batch.segments))
        return float(per_token * int(lengths.sum()) + per_square * int(np.sum(lengths.astype(object) ** 2)))

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
