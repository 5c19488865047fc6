"""open_model: from the one argument MODEL to everything that running a model needs.

model = open_model("runs/tiny/sft")
logits_BTV = logits(model, tokens_BT)
"""

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from internjax import sharding
from internjax.hf import adapter
from internjax.hf.families import family_of
from internjax.hf.fields import without
from internjax.hf.generation import GenerationConfig, read_generation
from internjax.hf.loading import load_params
from internjax.hf.quantized import FIELD, Quantization, read_quantization
from internjax.hf.resolve import ABOUT, CONFIG, Source, read_json, resolve
from internjax.hf.weights import list_tensors
from internjax.kernels.quant_matmul import Scheme
from internjax.model import decoder, rope
from internjax.model.config import DType, ModelConfig, from_json, num_params
from internjax.model.lora import Lora, num_adapted, with_gains
from internjax.model.quantize import Quantised
from internjax.text.tokenizer import REWARD, Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is open: what `open_model` returns."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None
    """None where the folder has none."""
    generation: GenerationConfig
    lora: Lora | None
    """Adapters, not merged; `internjax.model.lora.merge` makes them part of the parameters."""
    source: Source
    """Where it came from, the step of a checkpoint included."""
    quantization: Quantization | None = None
    """How the folder's kernels are quantised, where they are."""


def open_model(
    model: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    quantize: Scheme | Quantised | None = None,
    adapters: Iterable[str | os.PathLike] = (),
    dtype: DType | None = None,
    allow_unknown: Iterable[str] = (),
) -> Model:
    """Returns the model that MODEL names (grammar: `internjax.hf.resolve`) and prints what that is.

    Parameters keep the dtype they are stored in; kernels of a quantised folder (AWQ, GPTQ) are QuantArrays. dtype: of
    the computation; by default float32 on CPUs, else bfloat16. mesh: parameters are placed on it by their logical axes.
    quantize: every kernel becomes a QuantArray while it is read (a scheme alone: groups of 128). adapters: adapter
    folders that act together on top. allow_unknown: fields of config.json to read as if they were absent. Raises
    ValueError for all that cannot be honoured, and for folders that are not whole.
    """
    start = time.perf_counter()
    if dtype is not None and dtype not in get_args(DType):
        raise ValueError(f"dtype {dtype!r} is none to compute in; give one of {', '.join(get_args(DType))}")
    source = resolve(model, adapters=adapters)
    values = read_json(source.folder / CONFIG)
    family = family_of(values)
    config = dataclasses.replace(_read_config(source, values, allow_unknown), dtype=dtype or _default_dtype())
    tokenizer = _read_tokenizer(source.folder, config, values)
    generation = read_generation(source.folder, values, tokenizer)
    origin, tensors, quantization = str(source.folder), {}, None
    if source.checkpoints is not None and source.trained_adapter is None:
        from internjax.hf.restore import good_step, stream_params

        step = good_step(source.checkpoints, source.step)
        source = source._replace(step=step)
        params = stream_params(source.checkpoints, step, config, mesh=mesh, quantize=quantize, frozen=source.frozen)
        origin = f"{source.checkpoints}/{step}" + (f" + what {source.frozen} has" if source.frozen else "")
    else:
        tensors = list_tensors(source.folder)
        quantization = read_quantization(values, allow_unknown=allow_unknown)
        how = {"quantize": quantize, "quantization": quantization}
        params = load_params(tensors, family, config, where=source.folder, mesh=mesh, **how)
    loaded = [adapter.load_adapter(folder, model_config=config) for folder in source.adapters]
    for folder, each in zip(source.adapters, loaded, strict=True):
        adapter.check_copies(each, tensors, where=folder)
        named = Path(each.base or "")
        if each.base and named.is_dir() and not named.samefile(source.folder):
            print(f"{folder} was trained on {named}; here it acts on {source.folder}")
    if source.trained_adapter is not None:
        trained, step = _restore_adapter(source, config)
        source = source._replace(step=step)
        loaded.append(trained)
        origin += f" + {source.checkpoints}/{step}"
    config = dataclasses.replace(config, param_dtype=str(params["embed"]["embedding"].dtype))
    lora = _place_lora(adapter.combine(loaded), mesh)
    # Frozen from here on: what DoRA divides by is found once, not with every token.
    lora = None if lora is None else with_gains(lora, params)
    result = Model(config, params, tokenizer, generation, lora, source, quantization)
    origin = " + ".join([origin, *map(str, source.adapters)])
    _print_opened(model, origin, family.name, result, quantize, time.perf_counter() - start)
    return result


def read_config(model: str | os.PathLike, *, allow_unknown: Iterable[str] = ()) -> ModelConfig:
    """Returns the architecture of MODEL; reads its configuration alone, no weights."""
    source = resolve(model)
    return _read_config(source, read_json(source.folder / CONFIG), allow_unknown)


def _read_config(source: Source, values: dict, allow_unknown: Iterable[str]) -> ModelConfig:
    read_quantization(values, allow_unknown=allow_unknown)  # refused before any weight is read
    config = family_of(values).config_from_hf(without(values, [FIELD]), allow_unknown=allow_unknown)
    if source.checkpoints is None or source.trained_adapter is not None:
        return config
    return from_json(read_json(source.folder / ABOUT)["model_config"])


def logits(model: Model, tokens_BT) -> jax.Array:
    """Returns float32 logits `[B, T, V]` of a batch of equally long rows (scores `[B, T, 1]` with a scalar head).

    Adapters are applied. Dynamic rotary scaling sees rows of length T.
    """
    tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
    if tokens_BT.ndim != 2:
        raise ValueError(f"tokens have shape {tokens_BT.shape}; give rows of token ids [B, T]")
    low, high = (int(tokens_BT.min()), int(tokens_BT.max())) if tokens_BT.size else (0, 0)
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"token ids lie in {low}..{high}; the model has ids 0..{model.config.vocab_size - 1}")
    inv_freq_BF = rope.inv_freq(model.config, length=tokens_BT.shape[1])[None]
    with sharding.use(sharding.mesh_of(model.params)):
        return decoder.logits(model.params, tokens_BT, config=model.config, inv_freq_BF=inv_freq_BF, lora=model.lora)


def _default_dtype() -> DType:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _read_tokenizer(folder: Path, config: ModelConfig, values: dict) -> Tokenizer | None:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size} rows; ids "
            "beyond the table have no vector. Use the tokenizer that the model was trained with"
        )
    named = values.get("reward_token_id")
    if named is not None and tokenizer.special.get(REWARD, named) != named:
        raise ValueError(
            f"{folder}: config.json reads the reward at id {named}, the tokenizer's {REWARD} is "
            f"{tokenizer.special[REWARD]}; the two must be of the same model"
        )
    return tokenizer


def _restore_adapter(source: Source, config: ModelConfig) -> tuple[adapter.Adapter, int]:
    """Returns the adapter of a checkpoint and its step."""
    from internjax.train import checkpoint  # Orbax takes as long to import as the rest of this file

    restored = checkpoint.restore_params(source.checkpoints, source.step)
    return adapter.from_collection(source.trained_adapter, restored.params, model_config=config), restored.step


def _place_lora(lora: Lora | None, mesh: Mesh | None) -> Lora | None:
    if lora is None or mesh is None:
        return lora
    return jax.device_put(lora, sharding.replicated(mesh))


def _print_opened(
    asked, origin: str, layout: str, model: Model, quantize: Scheme | Quantised | None, seconds: float
) -> None:
    config = model.config
    weights = quantize.scheme if isinstance(quantize, Quantised) else quantize or config.param_dtype
    weights = weights if model.quantization is None else str(model.quantization)
    extra = "" if model.tokenizer is not None else ", no tokenizer"
    if model.lora is not None:
        extra += f", adapters on {num_adapted(model.lora)} kernels"
    print(
        f"model {asked}: {origin} ({layout} layout, {num_params(config):,} parameters in {weights}, computed in "
        f"{config.dtype}{extra}), {seconds:.1f} s"
    )
