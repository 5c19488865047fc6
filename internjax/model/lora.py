"""Low-rank adapters (LoRA, arXiv:2106.09685): the `lora` collection beside the parameters.

L layers, I input features, O output features, r rank.
"""

import dataclasses

import jax
import jax.numpy as jnp

from internjax.model.quantize import QuantArray, dequantize

ATTENTION_TARGETS = ("query", "key", "value", "output")
FFN_TARGETS = ("gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get an adapter, and how large: y = x W + (alpha / rank) * (x A) B."""

    rank: int = 16
    """Columns of A and rows of B."""
    alpha: float = 32.0
    """The product A B is scaled by alpha / rank."""
    targets: tuple[str, ...] = ATTENTION_TARGETS + FFN_TARGETS
    """Matrices that get an adapter: query, key, value, output, gate, up, down, head."""
    dropout: float = 0.0
    """Probability with which an adapter's input is zeroed during training."""

    def __post_init__(self):
        unknown = sorted(set(self.targets) - set(ATTENTION_TARGETS + FFN_TARGETS + ("head",)))
        if unknown or not self.targets:
            known = ", ".join(ATTENTION_TARGETS + FFN_TARGETS + ("head",))
            raise ValueError(f"adapter targets must be among {known}, given {self.targets}")
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"rank must be >= 1 and dropout in [0, 1), given rank={self.rank} dropout={self.dropout}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters ready to apply: the collection mirrors the parameter tree with leaves a `[L, I, r]`, b `[L, r, O]`."""

    weights: dict
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})


def apply_config(weights: dict, config: LoraConfig) -> Lora:
    """Returns the collection with the scale and dropout of its config."""
    return Lora(weights, config.alpha / config.rank, config.dropout)


def target_path(target: str) -> tuple[str, ...]:
    """Returns where the kernel of `target` stands in the parameter tree."""
    if target == "head":
        return ("head",)
    return ("layers", "attention" if target in ATTENTION_TARGETS else "ffn", target)


def _find(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def init_lora(config: LoraConfig, params: dict, rng: jax.Array, *, dtype: str = "float32") -> dict:
    """Returns a fresh collection for `params` (arrays, QuantArrays or their shapes) that changes nothing yet.

    a is uniform in +-1/sqrt(I) (the initialisation of the PEFT library), b is zero, so the adapted model is the base.
    """
    weights: dict = {}
    for index, target in enumerate(config.targets):
        path = target_path(target)
        if path[0] not in params:
            raise ValueError(f"the model has no {'.'.join(path)} to adapt (its head is tied); drop it from the targets")
        *lead, in_features, out_features = _find(params, path)["kernel"].shape
        bound = in_features**-0.5
        key = jax.random.fold_in(rng, index)
        a = jax.random.uniform(key, (*lead, in_features, config.rank), jnp.dtype(dtype), -bound, bound)
        node = weights
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = {"a": a, "b": jnp.zeros((*lead, config.rank, out_features), jnp.dtype(dtype))}
    return weights


def logical_axes(weights: dict, params_axes: dict) -> dict:
    """Returns the logical axes of a collection: a follows its kernel's input axis, b the output axis."""

    def node(tree, axes):
        if "a" in tree:
            *lead, inputs, outputs = axes["kernel"]
            return {"a": (*lead, inputs, "rank"), "b": (*lead, "rank", outputs)}
        return {name: node(child, axes[name]) for name, child in tree.items()}

    return node(weights, params_axes)


def merge(params: dict, lora: Lora) -> dict:
    """Returns parameters with W + scale * A B in place of every adapted W, each in its own dtype.

    Raises ValueError for an adapter whose shape or place does not fit. A quantised W is restored first: the merged
    kernel is an array of the dtype that was quantised.
    """

    def node(tree, adapters, path):
        if "a" in adapters:
            kernel = tree["kernel"]
            kernel = dequantize(kernel) if isinstance(kernel, QuantArray) else kernel
            a, b = adapters["a"].astype(jnp.float32), adapters["b"].astype(jnp.float32)
            if (a.shape[-2], b.shape[-1]) != kernel.shape[-2:]:
                raise ValueError(
                    f"adapter of {'.'.join(path)} maps {a.shape[-2]} to {b.shape[-1]} features, the base kernel maps "
                    f"{kernel.shape[-2]} to {kernel.shape[-1]}: it was trained on another base"
                )
            return tree | {"kernel": (kernel.astype(jnp.float32) + lora.scale * (a @ b)).astype(kernel.dtype)}
        unknown = sorted(set(adapters) - set(tree))
        if unknown:
            raise ValueError(f"the adapter has {unknown} under {'.'.join(path) or 'the root'}, the base does not")
        return tree | {name: node(tree[name], child, (*path, name)) for name, child in adapters.items()}

    return node(params, lora.weights, ())
