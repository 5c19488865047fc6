"""From the experiments of this folder to what is planned: their configs, and the job that each of them is."""

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any


def names() -> list[str]:
    """Returns the experiments of this folder that have a CONFIG, found without importing them."""
    folder = Path(__file__).parent
    files = sorted(folder.glob("*.py"))
    return [path.stem for path in files if re.search("^CONFIG =", path.read_text(encoding="utf-8"), re.MULTILINE)]


def module(name: str) -> Any:
    """Returns the module of an experiment by its name; raises ValueError where there is none."""
    name = name.removeprefix("experiments.").removesuffix(".py")
    if name not in names():
        raise ValueError(f"no experiment {name!r} with a CONFIG; there are: {', '.join(names())}")
    return importlib.import_module(f"experiments.{name}")


def job_of(config: Any, *, quantised: Any = None) -> Any:
    """Returns what a Pretrain or Finetune config trains; `quantised` says how QLoRA keeps its base."""
    from experiments.finetuning import adapters_of, base_of
    from experiments.pretraining import Pretrain
    from internjax.train.memory import Job

    if isinstance(config, Pretrain):
        batch_size, seq_len, lora, model = config.data.batch_size, config.data.seq_len, None, config.model
        freeze = ()
    else:
        batch_size, seq_len, freeze = config.batch_size, config.seq_len, config.freeze
        lora, quantised = adapters_of(config), quantised or base_of(config)
        model = architecture(config.model, allow_unknown=config.allow_unknown)
        model = dataclasses.replace(model, remat=config.remat, attention=config.attention)
        if config.dtype != "auto":
            model = dataclasses.replace(model, dtype=config.dtype)
        if config.method == "full":
            model = dataclasses.replace(model, param_dtype=config.param_dtype)
    return Job(
        model=model,
        batch_size=batch_size,
        seq_len=seq_len,
        mesh=config.mesh,
        accumulate=config.accumulate,
        optimizer=config.optimizer,
        lora=lora,
        quantised=quantised,
        freeze=freeze,
    )


def on_device(job: Any, device: Any) -> Any:
    """Returns the job in the dtype that the device computes in."""
    from internjax.train.devices import compute_dtype

    return dataclasses.replace(job, model=dataclasses.replace(job.model, dtype=compute_dtype(device, job.model.dtype)))


def architecture(model: str, *, allow_unknown: tuple[str, ...] = ()) -> Any:
    """Returns the ModelConfig of a MODEL, read from its config and the headers of its weights, or of an experiment.

    A name of a pre-training experiment stands for its architecture in bfloat16, so that a fine-tuning is planned before
    anything is downloaded. The computation is in bfloat16.
    """
    import jax.numpy as jnp

    from experiments.pretraining import Pretrain
    from internjax.hf.open import read_config
    from internjax.hf.resolve import CONFIG, read_json, resolve
    from internjax.hf.weights import list_tensors

    if model in names() and isinstance(found := module(model).CONFIG, Pretrain):
        return dataclasses.replace(found.model, param_dtype="bfloat16", dtype="bfloat16")
    if not model:
        raise ValueError("no model given; name a folder, or a size by its experiment: --model internlm2_7b")
    if model.startswith(("hf:", "modelscope:")):
        raise ValueError(f"{model} would be downloaded to be planned; name its size instead: --model internlm2_7b")
    folder, config = resolve(model).folder, read_config(model, allow_unknown=allow_unknown)
    try:
        stored = {"F32": "float32", "F16": "float16"}.get(next(iter(list_tensors(folder).values())).dtype, "bfloat16")
    except (ValueError, StopIteration):  # a folder of config and tokenizer alone
        stored = str(jnp.dtype(read_json(folder / CONFIG).get("torch_dtype") or "bfloat16"))
    return dataclasses.replace(config, param_dtype=stored, dtype="bfloat16")
