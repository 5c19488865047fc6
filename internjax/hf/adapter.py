"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, both ways.

PEFT keeps, per adapted module, lora_A.weight [r, I] and lora_B.weight [O, r]; the tree keeps a [I, r] and b [r, O].
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.hf.folder import new_folder
from internjax.hf.internlm2 import INTERNLM2
from internjax.hf.llama import LLAMA
from internjax.hf.mapping import Row, get_leaf, leaf_shapes, set_leaf, tensor_names
from internjax.hf.weights import (
    DTYPES,
    Plan,
    TensorInfo,
    list_tensors,
    read_header,
    read_tensor,
    write_file,
    write_text,
)
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, LoraConfig, apply_config, target_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of adapter_config.json that say nothing about what is computed, or that the tensors themselves answer.
_BOOKKEEPING = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying inference_mode layers_pattern lora_dropout megatron_core "
    "peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
# Fields that change the computation, with the value under which it is the one built here.
_FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other initialisations (pissa, olora, loftq) change the base as well, so the adapter alone means something else.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_HONOURED = {"r", "lora_alpha", "use_rslora"}


class Adapter(NamedTuple):
    """An adapter that was read."""

    config: LoraConfig
    weights: dict
    base: str | None
    """The base model that it names."""
    copies: dict[str, TensorInfo]
    """Tensors of the base that PEFT saved along (embedding and head, where they are adapted), by the base's names."""


def save_adapter(
    folder: str | os.PathLike,
    lora_config: LoraConfig,
    weights: dict,
    base: str | os.PathLike,
    *,
    model_config: ModelConfig,
    overwrite: bool = False,
) -> None:
    """Writes an adapter folder that PEFT loads onto `base`: a Hugging Face folder in Llama's layout, or a hub name.

    `weights` is the collection that `lora_config` was trained with. A base that is a folder is written as its absolute
    path. The folder appears by an atomic rename.
    """
    folder = Path(folder)
    plans = {}
    for row in LLAMA.rows(model_config):
        target = _target(row.leaves[0])
        if target not in lora_config.targets:
            continue
        node = _node(weights, target)
        for layer, name in enumerate(tensor_names(row, model_config)):
            stem = _PREFIX + name.removesuffix("weight")
            for factor, leaf in (("lora_A", node["a"]), ("lora_B", node["b"])):
                shape = (leaf.shape[-1], leaf.shape[-2])
                plans[f"{stem}{factor}.weight"] = Plan(
                    shape, np.dtype(leaf.dtype), _fetcher(leaf, layer, row.per_layer)
                )
    extra = set(_flat(weights)) - {t for target in lora_config.targets for t in (f"{target}.a", f"{target}.b")}
    if extra:
        raise ValueError(f"the adapter has weights of {sorted(extra)}, which its config does not target; give its own")
    with new_folder(folder, overwrite=overwrite, marker=CONFIG) as new:
        write_file(new / WEIGHTS, plans)
        write_text(new / CONFIG, adapter_json(lora_config, base, model_config=model_config))


def adapter_json(lora_config: LoraConfig, base: str | os.PathLike, *, model_config: ModelConfig) -> str:
    """Returns the text of adapter_config.json for an adapter of `base` in Llama's layout."""
    if Path(base).is_dir():
        list_tensors(Path(base))  # refuses a folder without weights now, not when the adapter is opened
        base = Path(base).resolve()
    values = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_config.alpha,
        "lora_dropout": lora_config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora_config.rank,
        "target_modules": [
            row.name.removesuffix(".weight").split(".")[-1]
            for row in LLAMA.rows(model_config)
            if _target(row.leaves[0]) in lora_config.targets
        ],
        "task_type": "CAUSAL_LM" if model_config.head == "lm" else "SEQ_CLS",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(values, indent=2) + "\n"


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json after checking that all it asks for is built here."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); PEFT writes r and lora_alpha there") from error
    wrong = [
        f"{name} = {value!r}"
        for name, value in values.items()
        if name not in _BOOKKEEPING | _HONOURED
        and (value not in _FIXED[name] if name in _FIXED else value not in (None, False, {}, []))
    ]
    if wrong:
        raise ValueError(
            f"{path}: {', '.join(wrong)} is not supported; supported is plain LoRA (or rsLoRA) of one rank without "
            "biases. Merge the adapter into its base with the library that made it"
        )
    return values | {"r": rank, "lora_alpha": alpha}


def load_adapter(folder: str | os.PathLike, *, model_config: ModelConfig) -> Adapter:
    """Returns the adapter of a PEFT folder for a model of `model_config`; module names of either layout are read.

    One B factor over InternLM2's fused wqkv becomes those of query, key and value, which share its A. Raises ValueError
    for keys that match nothing, layers that are missing and shapes of another base.
    """
    folder = Path(folder)
    values = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ValueError(f"{folder} has no {WEIGHTS} (found: {found}); save the adapter with safe_serialization=True")
    tensors = read_header(folder / WEIGHTS)
    family = INTERNLM2 if any(".attention.w" in name or ".feed_forward." in name for name in tensors) else LLAMA
    weights: dict = {}
    targets: list[str] = []
    used: set[str] = set()
    for row in family.rows(model_config):
        stems = [_PREFIX + name.removesuffix("weight") for name in tensor_names(row, model_config)]
        keys = [(f"{stem}lora_A.weight", f"{stem}lora_B.weight") for stem in stems]
        missing = [key for pair in keys for key in pair if key not in tensors]
        if len(missing) == 2 * len(keys):
            continue
        if missing:
            raise ValueError(f"{folder / WEIGHTS} has adapters for some layers and lacks {missing[0]}; it is not whole")
        used |= {key for pair in keys for key in pair}
        factors = [(read_tensor(tensors[a]), read_tensor(tensors[b])) for a, b in keys]
        _take(weights, row, factors, model_config, rank=values["r"], where=folder)
        targets += [_target(leaf) for leaf in row.leaves]
    copies = _base_copies(family.rows(model_config), tensors)
    unmatched = sorted(set(tensors) - used - {key for key, _ in copies})
    if unmatched or not targets:
        raise ValueError(
            f"{folder / WEIGHTS} has {len(unmatched)} tensors that match nothing in the {family.name} layout"
            f"{f', the first is {unmatched[0]}' if unmatched else ''}; wanted are names like "
            f"{_PREFIX}{family.rows(model_config)[2].name.removesuffix('weight')}lora_A.weight"
        )
    rank, alpha = values["r"], values["lora_alpha"]
    alpha = alpha * rank**0.5 if values.get("use_rslora") else alpha
    config = LoraConfig(rank=rank, alpha=alpha, targets=tuple(targets), dropout=values.get("lora_dropout") or 0.0)
    named = {name: tensors[key] for key, name in copies}
    return Adapter(config, weights, values.get("base_model_name_or_path") or None, named)


def from_collection(folder: Path, weights: dict, *, model_config: ModelConfig) -> Adapter:
    """Returns a collection (of a checkpoint) as the adapter that the adapter_config.json in `folder` describes."""
    values = read_adapter_config(folder)
    shapes = leaf_shapes(model_config)
    targets = []
    for leaf, (in_features, out_features) in ((leaf, s) for leaf, s in shapes.items() if leaf.endswith(".kernel")):
        try:
            node = get_leaf(weights, leaf.removesuffix(".kernel"))
        except KeyError:
            continue
        targets.append(_target(leaf))
        if (node["a"].shape[-2:], node["b"].shape[-2:]) != ((in_features, values["r"]), (values["r"], out_features)):
            raise ValueError(
                f"{folder}: the adapter of {leaf} has factors {node['a'].shape} and {node['b'].shape}; rank "
                f"{values['r']} on this base asks for {(in_features, values['r'])} and {(values['r'], out_features)}"
            )
    if not targets:
        raise ValueError(f"{folder}: the checkpoint beside it holds no adapter but {sorted(weights)}")
    config = LoraConfig(rank=values["r"], alpha=values["lora_alpha"], targets=tuple(targets))
    return Adapter(config, weights, values.get("base_model_name_or_path"), {})


def combine(adapters: list[Adapter]) -> Lora | None:
    """Returns adapters that act together, as one of the summed rank: the sum of what each adds. None for none."""
    if not adapters:
        return None
    if len(adapters) == 1:
        return apply_config(adapters[0].weights, adapters[0].config)
    weights: dict = {}
    for target in dict.fromkeys(target for adapter in adapters for target in adapter.config.targets):
        parts = [(_node(x.weights, target), x.config) for x in adapters if target in x.config.targets]
        a = jnp.concatenate([node["a"] for node, _ in parts], axis=-1)
        b = jnp.concatenate([node["b"] * (config.alpha / config.rank) for node, config in parts], axis=-2)
        set_leaf(weights, ".".join(target_path(target)), {"a": a, "b": b})
    return Lora(weights, 1.0)


def _base_copies(rows: tuple[Row, ...], tensors: Mapping[str, TensorInfo]) -> list[tuple[str, str]]:
    """Returns (key, the base's name) of tensors that are whole weights of the base."""
    names = {row.name for row in rows if not row.per_layer}
    found = [(key, key.removeprefix(_PREFIX).replace(".base_layer.weight", ".weight")) for key in tensors]
    return [(key, name) for key, name in found if key.startswith(_PREFIX) and name in names]


def check_copies(adapter: Adapter, base: Mapping[str, TensorInfo], *, where: Path) -> None:
    """Raises ValueError where an adapter folder carries a weight that is not the base's: it was trained as a whole."""
    for name, info in adapter.copies.items():
        if name not in base or not np.array_equal(
            read_tensor(info), read_tensor(base[name]).astype(DTYPES[info.dtype])
        ):
            raise ValueError(
                f"{where} carries a {name} of its own, which differs from the base's; that is not an adapter. Merge it "
                "with the library that made it, or take its own base"
            )


def _take(weights: dict, row: Row, factors: list, config: ModelConfig, *, rank: int, where: Path) -> None:
    """Puts the factors of one row, one pair per layer, into the collection."""
    shapes = leaf_shapes(config)
    in_features = shapes[row.leaves[0]][0]
    out_features = sum(shapes[leaf][1] for leaf in row.leaves)
    for a, b in factors:
        if a.shape != (rank, in_features) or b.shape != (out_features, rank):
            raise ValueError(
                f"{where}: the adapter of {row.name} has factors {a.shape} and {b.shape}; rank {rank} on this base "
                f"asks for {(rank, in_features)} and {(out_features, rank)}. It was trained on another base"
            )
    split = [row.split(b, config) for _, b in factors]
    for index, leaf in enumerate(row.leaves):
        a, b = [a.T for a, _ in factors], [parts[index].T for parts in split]
        stacked = (np.stack(a), np.stack(b)) if row.per_layer else (a[0], b[0])
        set_leaf(weights, leaf.removesuffix(".kernel"), dict(zip("ab", map(jnp.asarray, stacked))))


def _fetcher(leaf: jax.Array, layer: int, per_layer: bool):
    return lambda: np.asarray(leaf[layer] if per_layer else leaf).T


def _target(leaf: str) -> str:
    return leaf.split(".")[-2]


def _node(weights: Mapping[str, Any], target: str) -> dict:
    try:
        return get_leaf(weights, ".".join(target_path(target)))
    except KeyError:
        raise ValueError(f"the adapter's config targets {target!r}, its weights have none; give its own") from None


def _flat(weights: dict) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(weights)
    return [".".join(str(entry.key) for entry in path[-2:]) for path, _ in paths]
