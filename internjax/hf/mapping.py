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
    first axis is output features: a weight [O, I], a bias [O] or the B factor of an adapter [O, r].
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
    norm_head: bool = False
    """Checkpoints hold the rows of a normalised head as they were trained (Baichuan2); others have them normalised."""


# Buffers that old checkpoints carry; they are computed from the config.
IGNORED_TENSORS = r"(.*\.)?rotary_(emb|pos_emb)\.inv_freq"


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by dotted path, without the leading axis of stacked layers."""
    d_model, ffn = config.d_model, config.ffn_dim
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {
        "layers.attention.query": (d_model, query),
        "layers.attention.key": (d_model, key),
        "layers.attention.value": (d_model, key),
        "layers.attention.output": (query, d_model),
        "layers.ffn.gate": (d_model, ffn),
        "layers.ffn.up": (d_model, ffn),
        "layers.ffn.down": (ffn, d_model),
    }
    shapes = {
        "embed.embedding": (config.vocab_size, d_model),
        "layers.attention_norm.scale": (d_model,),
        "layers.ffn_norm.scale": (d_model,),
        "norm.scale": (d_model,),
    }
    for path, shape in matrices.items():
        shapes[f"{path}.kernel"] = shape
        if has_bias(path, config):
            shapes[f"{path}.bias"] = shape[1:]
    if config.qk_norm:
        shapes |= {f"layers.attention.{name}_norm.scale": (config.head_dim,) for name in ("query", "key")}
    if not config.tie_embeddings:
        shapes["head.kernel"] = (d_model, config.vocab_size if config.head == "lm" else 1)
    return shapes


def has_bias(path: str, config: ModelConfig) -> bool:
    """Whether the linear layer at a dotted path adds a bias."""
    part, name = path.split(".")[-2:]
    if part == "ffn":
        return config.ffn_bias
    return config.attention_bias == "all" or (config.attention_bias == "qkv" and name != "output")


def linear_rows(
    name: str,
    paths: tuple[str, ...],
    config: ModelConfig,
    *,
    split: Callable[[np.ndarray, ModelConfig], list[np.ndarray]] = _alone,
    fuse: Callable[[list[np.ndarray], ModelConfig], np.ndarray] = _only,
) -> tuple[Row, ...]:
    """Returns the rows of a linear layer: `name`.weight holds the kernels at `paths`, `name`.bias what they add."""
    rows = (Row(f"{name}.weight", tuple(f"{path}.kernel" for path in paths), split, fuse),)
    if has_bias(paths[0], config):
        rows += (Row(f"{name}.bias", tuple(f"{path}.bias" for path in paths), split, fuse),)
    return rows


def split_rows(rows: np.ndarray, query: int, key: int) -> list[np.ndarray]:
    """Returns the rows of query, key and value, which stand one after the other."""
    assert len(rows) == query + 2 * key, (rows.shape, query, key)
    return [rows[:query], rows[query : query + key], rows[query + key :]]


def fuse_rows(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Returns the rows of several leaves one after the other."""
    del config
    return np.concatenate(parts)


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
