"""How one family's tensors correspond to the parameter tree: the types that each family's table is written in.

O output features, I input features of a matrix; Hugging Face stores it as [O, I], the tree as a kernel [I, O].
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from internjax.model.config import ModelConfig

LAYER = "{layer}"


def _alone(rows: np.ndarray, config: ModelConfig) -> list[np.ndarray]:
    del config
    return [rows]


def _only(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    del config
    return parts[0]


class Row(NamedTuple):
    """One line of a table: the tensor `name` (LAYER stands for the layer's index) holds the leaves `leaves`.

    Where it holds several, `split` cuts them out of its rows and `fuse` is the inverse. Both work on anything whose
    first axis is output features: a weight [O, I] or the B factor of an adapter [O, r].
    """

    name: str
    leaves: tuple[str, ...]
    split: Callable[[np.ndarray, ModelConfig], list[np.ndarray]] = _alone
    fuse: Callable[[list[np.ndarray], ModelConfig], np.ndarray] = _only

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name


class Family(NamedTuple):
    """One architecture of Hugging Face: its config both ways, and its table."""

    name: str
    config_from_hf: Callable[..., ModelConfig]
    """(config.json, *, allow_unknown=()) -> ModelConfig; raises ValueError for what cannot be honoured."""
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], tuple[Row, ...]]
    head: str
    """Name of the language-model head; with tied embeddings a checkpoint may repeat the table under this name."""


# Buffers that old checkpoints carry; they are computed from the config.
IGNORED_TENSORS = r"(.*\.)?rotary_emb\.inv_freq"


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by dotted path, without the leading axis of stacked layers."""
    d_model, ffn = config.d_model, config.ffn_dim
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "embed.embedding": (config.vocab_size, d_model),
        "layers.attention_norm.scale": (d_model,),
        "layers.attention.query.kernel": (d_model, query),
        "layers.attention.key.kernel": (d_model, key),
        "layers.attention.value.kernel": (d_model, key),
        "layers.attention.output.kernel": (query, d_model),
        "layers.ffn_norm.scale": (d_model,),
        "layers.ffn.gate.kernel": (d_model, ffn),
        "layers.ffn.up.kernel": (d_model, ffn),
        "layers.ffn.down.kernel": (ffn, d_model),
        "norm.scale": (d_model,),
    }
    if not config.tie_embeddings:
        shapes["head.kernel"] = (d_model, config.vocab_size if config.head == "lm" else 1)
    return shapes


def is_kernel(leaf: str) -> bool:
    """Whether a leaf is a matrix that Hugging Face stores transposed (the naming law)."""
    return leaf.endswith(".kernel")


def tensor_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape that the tensor of `row` must have."""
    shapes = leaf_shapes(config)
    parts = [shapes[leaf][::-1] if is_kernel(leaf) else shapes[leaf] for leaf in row.leaves]
    return (sum(part[0] for part in parts), *parts[0][1:])


def tensor_names(row: Row, config: ModelConfig) -> list[str]:
    """Returns the tensor's name for every layer, or its one name."""
    if not row.per_layer:
        return [row.name]
    return [row.name.replace(LAYER, str(layer)) for layer in range(config.num_layers)]


def get_leaf(tree: Mapping[str, Any], path: str) -> Any:
    """Returns the leaf at a dotted path."""
    for name in path.split("."):
        tree = tree[name]
    return tree


def set_leaf(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Puts a leaf at a dotted path, making the dicts on the way."""
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = leaf
