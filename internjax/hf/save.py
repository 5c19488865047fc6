"""save_model: a Hugging Face folder with proof that it reads back as what was written."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from internjax import sharding
from internjax.hf.adapter import CONFIG as ADAPTER_CONFIG
from internjax.hf.adapter import adapter_json
from internjax.hf.card import model_card
from internjax.hf.families import Layout, family_of, fitting_layout, layout_family
from internjax.hf.fields import without
from internjax.hf.folder import new_folder
from internjax.hf.generation import FILE as GENERATION_FILE
from internjax.hf.generation import GenerationConfig, default_generation, generation_to_hf
from internjax.hf.loading import load_params, plan_tensors
from internjax.hf.open import Model, logits
from internjax.hf.quantized import FIELD, Quantization, quantization_to_hf, read_quantization
from internjax.hf.resolve import ABOUT, ARCHITECTURE, CONFIG
from internjax.hf.weights import list_tensors, write_model, write_text
from internjax.model.config import DType, ModelConfig, to_json
from internjax.model.lora import Lora, LoraConfig
from internjax.model.quantize import QuantArray
from internjax.text.tokenizer import REWARD, Tokenizer, save_tokenizer

NUM_PROOF_TOKENS = 16
NUM_PROOF_LOGITS = 8
# Reading back is exact but for the order of sums in products of other shapes on other devices.
TOLERANCE = 1e-4


class Proof(NamedTuple):
    """What was measured after the folder had been read back, in float32 on fixed token ids."""

    token_ids: list[int]
    max_logit_difference: float
    """Between the parameters as written (in the saved dtype) and as read back."""
    max_logit_difference_to_source: float
    """Between the parameters as given and as read back: what the saved dtype rounds off."""
    logits: list[list[float]]
    """Of each token, the first few, to compare with anywhere."""


def save_model(
    folder: str | os.PathLike,
    *,
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer | None,
    generation: GenerationConfig | None = None,
    layout: Layout | None = None,
    dtype: DType | None = None,
    shard_size: str | int = "5GB",
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    source_logits: np.ndarray | None = None,
    use_up: bool = False,
    quantization: Quantization | None = None,
    texts: Mapping[str, str] = {},
) -> Proof:
    """Writes a Hugging Face folder, reads it back, and returns the proof, which also stands in its internjax.json.

    layout: by default the first that holds the model, one that stock transformers loads where there is any ("llama" for
    InternLM2, whose own "internlm2" has fused names). dtype None keeps every tensor's own. A norm_head is written as
    normalised rows where the layout has no place for it. provenance (JSON values: data, run, steps, scores) goes into
    internjax.json and the model card. The folder appears by an atomic rename when the proof holds; an existing one is
    replaced only with `overwrite` and only if it is a model folder. source_logits: `proof_logits` of what the
    parameters were made of, where that is something else (a base and its adapters). use_up: the buffers of `params` are
    deleted once they are written, so that one model is in memory at a time, not two. quantization: how QuantArrays are
    packed; they are written as they are, or refused. texts: further files beside the weights, by name.
    """
    layout = fitting_layout(config) if layout is None else layout
    family = layout_family(layout)
    if dtype is not None and dtype not in get_args(DType):
        raise ValueError(f"weights are stored as {', '.join(get_args(DType))}; given {dtype!r}")
    given_config, given_params = config, params
    if not family.norm_head:
        config, params = bake_norm_head(config, params)
    values = family.config_to_hf(config) | token_ids(config, tokenizer, layout)
    if quantization is not None:
        values[FIELD] = quantization_to_hf(quantization)
    saved = jnp.dtype(dtype) if dtype is not None else None
    plans = plan_tensors(params, family, config, dtype=saved, quantization=quantization)
    values["torch_dtype"] = str(saved or params["embed"]["embedding"].dtype)
    if generation is None and tokenizer is not None:
        generation = default_generation(tokenizer)
    provenance = _plain_json(provenance or {})
    if source_logits is None:
        source_logits = proof_logits(given_config, given_params)
    with new_folder(folder, overwrite=overwrite, marker=CONFIG) as new:
        write_model(new, plans, shard_size=shard_size)
        _write_texts(new, values, tokenizer, generation)
        for name, text in texts.items():
            write_text(new / name, text)
        proof = prove(new, config, params, source_logits, dtype=saved, use_up=use_up)
        about = {
            "format": 1,
            "made_by": f"internjax {_version()}",
            "layout": layout,
            "model_config": to_json(config),
            "provenance": provenance,
            "proof": proof._asdict(),
        }
        write_text(new / "README.md", model_card(Path(folder).name, config, about, values))
        about["files"] = file_hashes(new)
        write_text(new / ABOUT, json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return proof


def save_architecture(
    run: str | os.PathLike,
    *,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    lora_config: LoraConfig | None = None,
    base: str | os.PathLike | None = None,
) -> None:
    """Writes RUN/architecture: what `open_model` reads the run's checkpoints by (a model folder without weights).

    With `lora_config` the checkpoints hold an adapter of `base`, and the folder says so as PEFT does. With `base` alone
    they hold some of a model's parameters, and the model folder `base` has those that were frozen.
    """
    if lora_config is not None and base is None:
        raise ValueError("an adapter's checkpoints stand on a model; give its folder as base")
    folder = Path(run) / ARCHITECTURE
    if lora_config is not None:
        with new_folder(folder, overwrite=True, marker=ADAPTER_CONFIG) as new:
            write_text(new / ADAPTER_CONFIG, adapter_json(lora_config, base, model_config=config))
        return
    layout = fitting_layout(config)
    plain = config if layout_family(layout).norm_head else dataclasses.replace(config, norm_head=False)
    values = layout_family(layout).config_to_hf(plain) | token_ids(config, tokenizer, layout)
    with new_folder(folder, overwrite=True, marker=CONFIG) as new:
        _write_texts(new, values, tokenizer, None if tokenizer is None else default_generation(tokenizer))
        # A checkpoint keeps the head as it is trained, and most layouts have no field for norm_head.
        about = {"format": 1, "model_config": to_json(config)}
        about |= {} if base is None else {"frozen": str(Path(base).absolute())}
        write_text(new / ABOUT, json.dumps(about, indent=1) + "\n")


def prove(
    folder: Path, config: ModelConfig, params: dict, source: np.ndarray, *, dtype: np.dtype | None, use_up: bool = False
) -> Proof:
    """Returns the proof of a folder against what it was written from; raises ValueError where it fails.

    `source` are the proof's logits of the model as given, before anything was cast or normalised for writing. use_up:
    `params` are deleted before the folder is read.
    """
    values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    family, quantization = family_of(values), read_quantization(values)
    read_config = family.config_from_hf(without(values, [FIELD]))
    differing = [f"{name}: {read} read, {wrote} written" for name, read, wrote in _differing(read_config, config)]
    if differing:
        raise ValueError(f"{folder} reads back with another config ({'; '.join(differing)}); nothing was kept")
    if dtype is not None:
        cast = functools.partial(_cast, dtype=dtype, use_up=use_up)
        params = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    written, mesh = proof_logits(config, params), sharding.mesh_of(params)
    if use_up:
        jax.tree.map(lambda leaf: leaf.delete(), params)
    del params  # a cast copy need not live beside the one that is read back
    mesh = mesh if mesh.size > 1 else None
    back = load_params(list_tensors(folder), family, config, where=folder, mesh=mesh, quantization=quantization)
    read = proof_logits(config, back)
    difference = float(np.abs(read - written).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(written).max())):
        raise ValueError(
            f"{folder} reads back with logits that differ by {difference:g} from those written; nothing was kept. "
            "Check that the parameters are finite, and the disk"
        )
    sample = [[float(value) for value in row[:NUM_PROOF_LOGITS]] for row in read[0]]
    return Proof(proof_token_ids(config), difference, float(np.abs(read - source).max()), sample)


def _cast(leaf: jax.Array | QuantArray, *, dtype: np.dtype, use_up: bool) -> jax.Array | QuantArray:
    if isinstance(leaf, QuantArray) or leaf.dtype == dtype:
        return leaf
    cast = leaf.astype(dtype)
    if use_up:
        leaf.delete()
    return cast


# Fields of ModelConfig that say how to compute, not what; config.json does not hold them.
_HOW = {"dtype", "param_dtype", "remat", "unroll_layers", "attention", "paged_attention", "quant_matmul"}


def _differing(first: ModelConfig, second: ModelConfig) -> list[tuple[str, Any, Any]]:
    pairs = [(f.name, getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(ModelConfig)]
    return [pair for pair in pairs if pair[0] not in _HOW and pair[1] != pair[2]]


def proof_token_ids(config: ModelConfig) -> list[int]:
    """Returns the fixed token ids of the proof, spread over the vocabulary."""
    return [(7919 * index + 1) % config.vocab_size for index in range(NUM_PROOF_TOKENS)]


def proof_logits(
    config: ModelConfig, params: dict, *, token_ids: list[int] | None = None, lora: Lora | None = None
) -> np.ndarray:
    """Returns float32 logits `[1, T, V]` of the proof's token ids, or of those given; adapters act."""
    exact = dataclasses.replace(config, dtype="float32", attention="xla", remat="none")
    model = Model(exact, params, None, GenerationConfig(()), lora, None)
    with jax.default_matmul_precision("highest"):
        return np.asarray(logits(model, [token_ids or proof_token_ids(config)]))


def bake_norm_head(config: ModelConfig, params: dict) -> tuple[ModelConfig, dict]:
    """Returns the same model without norm_head: every vocabulary row of the head is divided by its length."""
    if not config.norm_head:
        return config, params
    plain = dataclasses.replace(config, norm_head=False)
    kernel = params["head"]["kernel"]
    if isinstance(kernel, QuantArray):
        raise ValueError(
            "the head is quantised and its rows are normalised in the forward pass, for which this layout has no "
            "place; keep the head whole (head=False)"
        )
    rows = kernel.astype(jnp.float32)
    rows = rows * jax.lax.rsqrt(jnp.sum(jnp.square(rows), axis=0, keepdims=True) + 1e-12)
    return plain, params | {"head": {"kernel": rows.astype(kernel.dtype)}}


def token_ids(config: ModelConfig, tokenizer: Tokenizer | None, layout: Layout) -> dict[str, Any]:
    """Returns the config.json fields that name special tokens; refuses a tokenizer larger than the embedding."""
    if tokenizer is None:
        return {}
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}; give the tokenizer that the "
            "model was trained with"
        )
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if config.head == "scalar" and layout == "internlm2" and REWARD in tokenizer.special:
        ids["reward_token_id"] = tokenizer.special[REWARD]
    return ids


def file_hashes(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file of a folder but its internjax.json."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != ABOUT:
            with open(path, "rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def _write_texts(folder: Path, values: dict, tokenizer: Tokenizer | None, generation: GenerationConfig | None) -> None:
    write_text(folder / CONFIG, json.dumps(values, indent=2) + "\n")
    if generation is not None:
        write_text(folder / GENERATION_FILE, json.dumps(generation_to_hf(generation), indent=2) + "\n")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _plain_json(provenance: Mapping[str, Any]) -> dict:
    try:
        return json.loads(json.dumps(dict(provenance)))
    except TypeError as error:
        raise ValueError(f"provenance holds a value that JSON cannot hold ({error}); give text and numbers") from error


def _version() -> str:
    try:
        return version("internjax")
    except PackageNotFoundError:
        return "(checkout)"
