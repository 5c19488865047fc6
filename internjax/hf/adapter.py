"""Adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors, both ways.

PEFT keeps, per adapted module, lora_A.weight [r, I], lora_B.weight [O, r] and with DoRA lora_magnitude_vector [O]; the
tree keeps a [I, r], b [r, O] and magnitude [O]. One module may hold several kernels (InternLM2's wqkv).
"""

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax.hf.families import Layout, family_of, fitting_layout, holding_layouts, layout_family
from internjax.hf.folder import new_folder
from internjax.hf.mapping import Family, Row, get_leaf, is_kernel, leaf_shapes, set_leaf, tensor_names
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
_FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

# Fields of adapter_config.json that say nothing about what is computed, or that the tensors themselves answer.
_BOOKKEEPING = frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying inference_mode layers_pattern "
    "lora_dropout megatron_core peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
# Fields that change the computation, with the value under which it is the one built here.
_FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other initialisations (pissa, olora, loftq) change the base as well, so the adapter alone means something else.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_HONOURED = {"exclude_modules", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}


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
    layout: Layout | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an adapter folder that PEFT loads onto `base`, a Hugging Face folder or a hub name.

    `weights` is the collection that `lora_config` was trained with. A base that is a folder is written as its absolute
    path. layout None: that of the base where it is a folder, else the first that holds the model. Where it fuses
    several kernels in a module, their adapters become one: of the same rank where they share a, else of the sum of
    their ranks. The folder appears by an atomic rename.
    """
    if lora_config.initialisation == "pissa":
        raise ValueError(
            "PiSSA's adapter stands on a residual, not on the model: save what internjax.model.lora.of_original_base "
            "makes of it; or, for the residual as its base, give the config with initialisation='zero'"
        )
    leaves = ("a", "b", "magnitude") if lora_config.kind == "dora" else ("a", "b")
    extra = set(_flat(weights)) - {f"{target}.{leaf}" for target in lora_config.targets for leaf in leaves}
    if extra:
        raise ValueError(f"the adapter has weights of {sorted(extra)}, which its config does not target; give its own")
    family = _written_for(base, layout, model_config)
    plans, ranks = {}, {}
    for row in _kernel_rows(family, model_config):
        _check_fused(row, lora_config)
        nodes = [_node(weights, t, leaves) if t in lora_config.targets else None for t in map(_target, row.leaves)]
        if not any(nodes):
            continue
        module = _module(row, nodes, model_config)
        if module["a"].shape[-1] != lora_config.rank:
            ranks[row.name.removesuffix(".weight").split(".")[-1]] = module["a"].shape[-1]
        for layer, name in enumerate(tensor_names(row, model_config)):
            for leaf in leaves:
                shape = module[leaf].shape[1:] if row.per_layer else module[leaf].shape
                plans[_PREFIX + name.removesuffix("weight") + _FACTORS[leaf]] = Plan(
                    shape[::-1], np.dtype(module[leaf].dtype), _fetcher(module[leaf], layer, row.per_layer)
                )
    values = adapter_json(lora_config, base, model_config=model_config, layout=family.name, ranks=ranks)
    with new_folder(Path(folder), overwrite=overwrite, marker=CONFIG) as new:
        write_file(new / WEIGHTS, plans)
        write_text(new / CONFIG, values)


def _module(row: Row, nodes: list[dict | None], config: ModelConfig) -> dict:
    """Returns the adapter of a whole module from those of its kernels, None for one that has none."""
    present = [jax.tree.map(np.asarray, node) for node in nodes if node is not None]
    shared = len(present) == len(nodes) and all(np.array_equal(node["a"], present[0]["a"]) for node in present)
    widths = [leaf_shapes(config)[leaf][1] for leaf in row.leaves]
    a = present[0]["a"] if shared else np.concatenate([node["a"] for node in present], axis=-1)
    parts, start = [], 0
    for node, width in zip(nodes, widths, strict=True):
        b = np.zeros((*a.shape[:-2], a.shape[-1], width), present[0]["b"].dtype)
        if node is not None:
            rank = node["b"].shape[-2]
            b[..., start : start + rank, :] = node["b"]
            start += 0 if shared else rank
        parts.append(b)
    module = {"a": a, "b": _fused(row, parts, config)}
    if "magnitude" in present[0]:
        module["magnitude"] = _fused(row, [node["magnitude"] for node in present], config)
    return module


def _fused(row: Row, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Returns parts `[..., O]` of the kernels of a row as one; a row fuses along the first axis."""
    return np.moveaxis(row.fuse([np.moveaxis(part, -1, 0) for part in parts], config), 0, -1)


def adapter_json(
    lora_config: LoraConfig,
    base: str | os.PathLike,
    *,
    model_config: ModelConfig,
    layout: Layout | None = None,
    ranks: Mapping[str, int] = {},
) -> str:
    """Returns the text of adapter_config.json for an adapter of `base`; `ranks` of modules that have another one.

    Raises ValueError for an adapter that the base's layout cannot hold.
    """
    rows = _kernel_rows(_written_for(base, layout, model_config), model_config)
    for row in rows:
        _check_fused(row, lora_config)
    if Path(base).is_dir():
        list_tensors(Path(base))  # refuses a folder without weights now, not when the adapter is opened
        base = Path(base).resolve()
    power = 1.0 if lora_config.scaling == "lora" else 0.5
    values = {
        "alpha_pattern": {name: lora_config.alpha * (rank / lora_config.rank) ** power for name, rank in ranks.items()},
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
        "rank_pattern": dict(ranks),
        "target_modules": [
            row.name.removesuffix(".weight").split(".")[-1]
            for row in rows
            if any(_target(leaf) in lora_config.targets for leaf in row.leaves)
        ],
        "task_type": "CAUSAL_LM" if model_config.head == "lm" else "SEQ_CLS",
        "use_dora": lora_config.kind == "dora",
        "use_rslora": lora_config.scaling == "rslora",
    }
    return json.dumps(values, indent=2) + "\n"


def _check_fused(row: Row, config: LoraConfig) -> None:
    targets = [_target(leaf) for leaf in row.leaves]
    missing = [target for target in targets if target not in config.targets]
    if config.kind == "dora" and missing and len(missing) < len(targets):
        raise ValueError(
            f"{row.name} holds {', '.join(targets)}, and a DoRA adapter of it has a magnitude for every column, but "
            f"{missing} has no adapter; target all of them, or train on a base in the llama layout"
        )


def _written_for(base: str | os.PathLike, layout: Layout | None, config: ModelConfig) -> Family:
    """Returns the family whose module names an adapter of `base` has."""
    if layout is None and (Path(base) / "config.json").is_file():
        return family_of(json.loads((Path(base) / "config.json").read_text(encoding="utf-8")))
    return layout_family(layout or fitting_layout(config))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json after checking that all it asks for is built here."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        if rank < 1:
            raise ValueError(f"r is {rank}, at least 1 is wanted")
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
            f"{path}: {', '.join(wrong)} is not supported; supported are LoRA, rsLoRA and DoRA of all layers, without "
            "biases. Merge the adapter into its base with the library that made it; an adapter of PiSSA, OLoRA or "
            "CorDA can be saved with PEFT's path_initial_model_for_weight_conversion"
        )
    return values | {"r": rank, "lora_alpha": alpha}


def load_adapter(folder: str | os.PathLike, *, model_config: ModelConfig) -> Adapter:
    """Returns the adapter of a PEFT folder for a model of `model_config`; module names of every layout are read.

    One B factor over InternLM2's fused wqkv becomes those of query, key and value, which share its A. Ranks and scales
    of single modules (rank_pattern, alpha_pattern) become the largest rank, filled with zeros, and one scale. Raises
    ValueError for keys that match nothing, layers that are missing, modules that are not the targets and shapes of
    another base.
    """
    folder = Path(folder)
    values = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ValueError(f"{folder} has no {WEIGHTS} (found: {found}); save the adapter with safe_serialization=True")
    tensors = read_header(folder / WEIGHTS)
    # PEFT keeps a DoRA vector in a module of its own, whose .weight some versions leave in the name.
    tensors = {key.removesuffix(".weight") if "_magnitude_" in key else key: info for key, info in tensors.items()}
    family = _family_of(tensors, model_config)
    leaves = tuple(_FACTORS) if values.get("use_dora") else ("a", "b")
    modules: list[tuple[Row, list[dict]]] = []
    used: set[str] = set()
    for row in _kernel_rows(family, model_config):
        stems = [_PREFIX + name.removesuffix("weight") for name in tensor_names(row, model_config)]
        keys = [{leaf: stem + _FACTORS[leaf] for leaf in leaves} for stem in stems]
        missing = [key for module in keys for key in module.values() if key not in tensors]
        is_there = len(missing) < len(leaves) * len(keys)
        _check_target(values, stems[0].removeprefix(_PREFIX), is_there=is_there, where=folder)
        if not is_there:
            continue
        if missing:
            raise ValueError(f"{folder / WEIGHTS} has adapters for some layers and lacks {missing[0]}; it is not whole")
        used |= {key for module in keys for key in module.values()}
        modules.append((row, [{leaf: read_tensor(tensors[key]) for leaf, key in each.items()} for each in keys]))
    copies = _base_copies(family.rows(model_config), tensors)
    unmatched = sorted(set(tensors) - used - {key for key, _ in copies})
    if unmatched or not modules:
        example = _kernel_rows(family, model_config)[0].name.removesuffix("weight")
        raise ValueError(
            f"{folder / WEIGHTS} has {len(unmatched)} tensors that match nothing in the {family.name} layout"
            f"{f', the first is {unmatched[0]}' if unmatched else ''}; wanted are names like "
            f"{_PREFIX}{example}lora_A.weight"
        )
    config, weights = _assemble(modules, values, model_config, where=folder)
    named = {name: tensors[key] for key, name in copies}
    return Adapter(config, weights, values.get("base_model_name_or_path") or None, named)


def _check_target(values: dict, stem: str, *, is_there: bool, where: Path) -> None:
    """Raises ValueError where adapter_config.json names a module that has no tensors, or leaves out one that has some:
    PEFT would drop the tensors, or act as if there had been any."""
    targets, module = values.get("target_modules"), stem.removesuffix(".")
    if targets is None or targets == "all-linear":
        return
    is_named = _names(targets, module) and not _names(values.get("exclude_modules") or (), module)
    if is_named != is_there:
        raise ValueError(
            f"{where}: {WEIGHTS} has {'an' if is_there else 'no'} adapter of {module}, and target_modules of {CONFIG} "
            f"is {targets!r}; the two files are not of one adapter. Take both from where it was trained"
        )


def _names(patterns: str | Sequence[str], module: str) -> bool:
    """Returns whether one expression for whole names, or names to end with, mean a module, as PEFT looks them up."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in patterns)


def _assemble(modules: list, values: dict, config: ModelConfig, *, where: Path) -> tuple[LoraConfig, dict]:
    """Returns the config and the collection of modules as they were read, one dict of tensors per layer."""
    scales, ranks = [], []
    power = 0.5 if values.get("use_rslora") else 1.0
    for row, layers in modules:
        for name, tensors in zip(tensor_names(row, config), layers, strict=True):
            name = name.removesuffix(".weight")
            rank = _by_pattern(values.get("rank_pattern"), name, values["r"])
            _check_shapes(row, name, tensors, rank, config, where=where)
            alpha = _by_pattern(values.get("alpha_pattern"), name, values["lora_alpha"])
            scales.append(alpha / rank**power)
            ranks.append(rank)
    rank, scale = max(ranks), statistics.mode(scales)
    same = scale == values["lora_alpha"] / rank**power
    lora_config = LoraConfig(
        rank=rank,
        alpha=values["lora_alpha"] if same else scale * rank**power,
        targets=tuple(_target(leaf) for row, _ in modules for leaf in row.leaves),
        dropout=values.get("lora_dropout") or 0.0,
        scaling="rslora" if values.get("use_rslora") else "lora",
        kind="dora" if values.get("use_dora") else "lora",
    )
    weights: dict = {}
    own = iter(scales)
    for row, layers in modules:
        for tensors in layers:
            factor = next(own) / scale if scale else 1.0
            missing = lora_config.rank - tensors["a"].shape[0]
            tensors["a"] = np.pad(tensors["a"], ((0, missing), (0, 0)))
            tensors["b"] = np.pad(tensors["b"], ((0, 0), (0, missing)))
            if not math.isclose(factor, 1.0):
                tensors["b"] = (tensors["b"].astype(np.float32) * factor).astype(tensors["b"].dtype)
        _take(weights, row, layers, config)
    return lora_config, weights


def _by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches a module's name to its end, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _family_of(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> Family:
    """Returns the layout that knows most of an adapter's modules, of those that hold the model."""

    def num_known(family):
        names = {name for row in _kernel_rows(family, config) for name in tensor_names(row, config)}
        return sum(f"{key.removeprefix(_PREFIX).rsplit('.lora_', 1)[0]}.weight" in names for key in tensors)

    return max((layout_family(layout) for layout in holding_layouts(config)), key=num_known)


def _kernel_rows(family: Family, config: ModelConfig) -> list[Row]:
    """Returns the rows that hold kernels: what an adapter can stand beside."""
    return [row for row in family.rows(config) if is_kernel(row.leaves[0])]


def from_collection(folder: Path, weights: dict, *, model_config: ModelConfig) -> Adapter:
    """Returns a collection (of a checkpoint) as the adapter that the adapter_config.json in `folder` describes."""
    values = read_adapter_config(folder)
    shapes = leaf_shapes(model_config)
    targets = []
    for leaf, (in_features, out_features) in ((leaf, s) for leaf, s in shapes.items() if is_kernel(leaf)):
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
        if ("magnitude" in node) != bool(values.get("use_dora")):
            raise ValueError(
                f"{folder}: the adapter of {leaf} has {sorted(node)}, and {CONFIG} says use_dora = "
                f"{values.get('use_dora', False)}; they are of different runs"
            )
    if not targets:
        raise ValueError(f"{folder}: the checkpoint beside it holds no adapter but {sorted(weights)}")
    config = LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        targets=tuple(targets),
        scaling="rslora" if values.get("use_rslora") else "lora",
        kind="dora" if values.get("use_dora") else "lora",
    )
    return Adapter(config, weights, values.get("base_model_name_or_path"), {})


def combine(adapters: list[Adapter]) -> Lora | None:
    """Returns adapters that act together, as one of the summed rank: the sum of what each adds. None for none."""
    if not adapters:
        return None
    if len(adapters) == 1:
        return apply_config(adapters[0].weights, adapters[0].config)
    if any(adapter.config.kind == "dora" for adapter in adapters):
        raise ValueError(
            "DoRA adapters scale what stands below them and do not add up: merge them one after the other "
            "(internjax.model.lora.merge), or open one of them"
        )
    weights: dict = {}
    for target in dict.fromkeys(target for adapter in adapters for target in adapter.config.targets):
        parts = [(_node(x.weights, target), x.config) for x in adapters if target in x.config.targets]
        a = jnp.concatenate([node["a"] for node, _ in parts], axis=-1)
        b = jnp.concatenate([node["b"] * config.scale for node, config in parts], axis=-2)
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


def _check_shapes(row: Row, name: str, tensors: dict, rank: int, config: ModelConfig, *, where: Path) -> None:
    shapes = leaf_shapes(config)
    in_features = shapes[row.leaves[0]][0]
    out_features = sum(shapes[leaf][1] for leaf in row.leaves)
    a, b, magnitude = tensors["a"], tensors["b"], tensors.get("magnitude")
    found = f"{where}: the adapter of {name} has factors {a.shape} and {b.shape}"
    if (a.shape[1:], b.shape[:1]) != ((in_features,), (out_features,)):
        raise ValueError(
            f"{found}; rank {rank} on this base asks for {(rank, in_features)} and {(out_features, rank)}. It was "
            "trained on another base: name that one as BASE+ADAPTER"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise ValueError(
            f"{found}, {CONFIG} says rank {rank}; the two files are not of one adapter. Take both from where it was "
            "trained"
        )
    if magnitude is not None and magnitude.shape != (out_features,):
        raise ValueError(
            f"{where}: the magnitude of {name} has shape {magnitude.shape}, its {out_features} outputs ask for "
            f"{(out_features,)}. It was trained on another base"
        )


def _take(weights: dict, row: Row, layers: list[dict], config: ModelConfig) -> None:
    """Puts the tensors of one row, one dict per layer, into the collection."""
    for index, leaf in enumerate(row.leaves):
        node = {"a": [tensors["a"].T for tensors in layers]}
        for name in layers[0].keys() - {"a"}:
            node[name] = [row.split(tensors[name], config)[index].T for tensors in layers]
        node = {name: jnp.asarray(np.stack(each) if row.per_layer else each[0]) for name, each in node.items()}
        set_leaf(weights, leaf.removesuffix(".kernel"), node)


def _fetcher(leaf: jax.Array, layer: int, per_layer: bool):
    return lambda: np.asarray(leaf[layer] if per_layer else leaf).T


def _target(leaf: str) -> str:
    return leaf.split(".")[-2]


def _node(weights: Mapping[str, Any], target: str, leaves: tuple[str, ...] = ("a", "b")) -> dict:
    try:
        node = get_leaf(weights, ".".join(target_path(target)))
        return {leaf: node[leaf] for leaf in leaves}
    except KeyError as error:
        raise ValueError(
            f"the adapter's config targets {target!r}, its weights have none ({error}); give its own"
        ) from None


def _flat(weights: dict) -> list[str]:
    paths = jax.tree_util.tree_leaves_with_path(weights)
    return [".".join(str(entry.key) for entry in path[-2:]) for path, _ in paths]
