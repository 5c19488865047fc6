"""Fine-tuning as a stage: one frozen config and one run function.

It reads a checkpoint and files of conversations, and leaves a run folder with the adapter and the model that every
other command can open. The same function serves a laptop and the recipes for large models: only the values differ.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from data_pipelines.conversations import Reading, conversation_rows
from data_pipelines.loading import batches
from experiments.callbacks import HeldOut, Prompts
from experiments.training import (
    Task,
    Trained,
    dry,
    ended,
    exported,
    finished,
    held_out_callbacks,
    keep,
    mesh_of,
    opened,
    plan_and_check,
    run_path,
    run_training,
)
from internjax.hf.adapter import save_adapter
from internjax.hf.hub import check_push, push
from internjax.hf.open import Model, open_model, read_config
from internjax.hf.provenance import run_facts
from internjax.hf.quantized import Quantization, read_quantization
from internjax.hf.resolve import CONFIG, read_json, resolve
from internjax.hf.save import save_architecture, save_model
from internjax.kernels.attention import Backend
from internjax.model import decoder, lora, quantize
from internjax.model.config import DType, ModelConfig
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.sharding import MeshConfig, process_rows
from internjax.train import devices, processes
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.checks import check_run
from internjax.train.freezing import join, joined, split
from internjax.train.guard import Guard
from internjax.train.loop import Every
from internjax.train.loss_scale import LossScale, scaled
from internjax.train.losses import Loss, next_token
from internjax.train.memory import Job
from internjax.train.optimizer import AdamW, Cosine, Optimizer, Schedule, make_optimizer
from internjax.train.profile import ProfileConfig
from internjax.train.step import TrainState, init_state, make_step
from internjax.train.tracking import TrackingConfig

_OPTIONS = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"kind": "dora"},
    "pissa": {"initialisation": "pissa"},
    "qlora": {},
}
"""What a method's name says about its adapters."""


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Supervised fine-tuning of a checkpoint on conversations."""

    run: str = "finetune"
    """Run folder: a path, or a name under runs/."""
    model: str = ""
    """MODEL: a Hugging Face folder, an adapter folder, BASE+ADAPTER, a run folder, RUN@STEP, hf:ORG/NAME or
    modelscope:ORG/NAME."""
    allow_unknown: tuple[str, ...] = ()
    """Fields of the model's config.json that are read as if they were absent."""
    data: tuple[str, ...] = ()
    """Files of conversations, or data sets by name (hf:ORG/NAME, modelscope:ORG/NAME, datasets:NAME; :CONFIG and @SPLIT
    may follow); the format is detected (Alpaca, OpenAI messages, ShareGPT, OASST, MOSS, texts, ...)."""
    reading: Reading = Reading()
    seq_len: int = 2048
    """Tokens of a packed row."""
    batch_size: int = 8
    """Rows of a batch over all devices."""
    num_epochs: float = 1.0
    """Passes over the data; sets the number of steps where num_steps is not given."""
    num_steps: int | None = None
    """Updates of the run; None: num_epochs of the data."""
    method: Literal["full", "lora", "rslora", "dora", "pissa", "qlora"] = "lora"
    """full: all parameters are trained. lora: adapters on the frozen model, of the kind that `lora` says; rslora, dora,
    pissa: with that option; qlora: over the model in nf4 (or in what `quantize` says)."""
    lora: LoraConfig = LoraConfig()
    """Adapters of all methods but full."""
    quantize: Literal["none", "int8", "int4", "nf4"] = "none"
    """What the frozen model is held in under adapters; 4 bits in groups of 64 with scales quantised again."""
    freeze: tuple[str, ...] = ()
    """method=full: parameters that are not trained, as patterns of names (embed.*, layers.attention.*, *norm.scale)."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings of tokens (NEFTune); 5 is its authors' choice, 0 is none."""
    merge: bool = True
    """Write the merged model beside the adapter, as the run's model/."""
    push: str = ""
    """Hub repository (ORG/NAME) that model/, or without merging adapter/, is sent to at the end, that of a complete run
    as well; private."""
    dtype: Literal["auto"] | DType = "auto"
    """Computation; auto: float32 on CPUs, bfloat16 on GPUs that have it, else float16."""
    param_dtype: DType = "float32"
    """method=full: what parameters are trained in (adapters: float32). A small update is lost in 16 bits."""
    loss_scale: LossScale = LossScale()
    """Of a computation in float16."""
    optimizer: Optimizer = AdamW(peak_lr=2e-4, weight_decay=0.0)
    schedule: Schedule = Cosine(warmup_steps=10)
    """A warm-up longer than a tenth of the run is shortened to it."""
    accumulate: int = 1
    """Micro-batches per update."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes per layer: nothing, all but matrix products, everything."""
    unroll_layers: int = 1
    """Layers per iteration of the compiled loop; all of them make a small model a fifth faster on a CPU."""
    attention: Backend = "xla"
    """Attention back end; see internjax.kernels.attention."""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: Guard = Guard()
    tracking: TrackingConfig = TrackingConfig()
    prompts: Prompts = Prompts()
    held_out: HeldOut = HeldOut()
    """Without a folder: the conversations that `reading` keeps for validation, if any."""
    profile: ProfileConfig = ProfileConfig()
    preflight: bool = True
    """Look at mesh, memory, attention, masks, adapters, files and disk before step 0."""
    dry_run: bool = False
    """Stop after plan and preflight; no run folder is made."""
    seed: int = 0
    """Of initial weights, order of the data, dropout and noise."""
    fresh: bool = False
    """Remove an existing run folder first."""

    def __post_init__(self):
        if self.method == "full":
            if self.lora != LoraConfig():
                raise ValueError(f"method=full trains no adapters, but lora is set to {self.lora}; use --method lora")
            if not self.merge:
                raise ValueError("merge=False leaves the adapter alone, and method=full has none; use --method lora")
            if self.quantize != "none":
                raise ValueError(f"quantize={self.quantize} holds a frozen model; method=full trains it: use qlora")
        elif self.freeze:
            raise ValueError(f"freeze={self.freeze} is for method=full; under adapters the whole model is frozen")
        elif self.param_dtype != "float32":
            raise ValueError(f"param_dtype={self.param_dtype} is for method=full; adapters are trained in float32")
        if self.num_epochs <= 0 or (self.num_steps is not None and self.num_steps < 1) or self.neftune_alpha < 0:
            raise ValueError(
                "num_epochs must be above 0, num_steps at least 1 (None: as the epochs say) and neftune_alpha not "
                f"negative; given {self.num_epochs}, {self.num_steps} and {self.neftune_alpha}"
            )
        kept = self.reading.validation or self.reading.validation_share
        if self.held_out.folder and kept:
            raise ValueError(
                f"held_out.folder={self.held_out.folder} is measured, and reading keeps conversations for validation "
                "as well, which would be neither learned nor measured; give one of them"
            )


def adapters_of(config: Finetune) -> LoraConfig | None:
    """Returns the adapters that a config trains; None for method=full."""
    return None if config.method == "full" else dataclasses.replace(config.lora, **_OPTIONS[config.method])


def base_of(config: Finetune) -> Quantised | None:
    """Returns how the frozen model is held; None: as it is stored."""
    scheme = "nf4" if config.method == "qlora" and config.quantize == "none" else config.quantize
    return None if scheme == "none" else Quantised(scheme, group=64, double=scheme != "int8")


def held_base(config: Finetune, quantization: Quantization | None) -> Quantised | None:
    """Returns how the frozen model is held that a config and its folder ask for; a quantised folder's stays as it is.

    Raises ValueError where the folder's weights are to be trained, quantised otherwise, or parted.
    """
    if quantization is None:
        return base_of(config)
    if config.method in ("full", "pissa"):
        raise ValueError(
            f"{config.model} is quantised ({quantization}), and method={config.method} wants whole weights: use qlora, "
            "which trains adapters on them as they are, or the model it was made of"
        )
    if config.quantize != "none":
        raise ValueError(
            f"{config.model} is quantised already ({quantization}), and its adapters train on that: leave "
            f"quantize={config.quantize} out, or give the model it was made of"
        )
    group = 1 << 30 if quantization.group == -1 else quantization.group  # wider than any row: cut to one group of it
    return Quantised(quantization.scheme, group, double=False, head=quantization.head)


def finetune(config: Finetune, *, callbacks: Sequence[Every] = ()) -> Trained:
    """Returns the run folder of a fine-tuning: adapter/ (PEFT layout) for adapters, and the whole model as model/."""
    if not config.model:
        raise ValueError("no model given; name one: --model FOLDER (a Hugging Face folder or a run)")
    folder = run_path(config.run)
    if config.push:
        check_push(config.push)
    if (done := finished(config, folder)) is not None:
        _push(config, folder)
        return done
    with mesh_of(config.mesh) as mesh:
        return _finetune(config, folder, mesh, callbacks)


def _finetune(config: Finetune, folder: Path, mesh: Mesh | None, callbacks: Sequence[Every]) -> Trained:
    begun = time.time()
    # All that can be wrong is read before the folder is made, or an earlier one removed; what values alone show to be
    # impossible, before any weight is read.
    check_run(
        _as_trained(config, read_config(config.model, allow_unknown=config.allow_unknown)),
        mesh=config.mesh,
        num_devices=jax.device_count(),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        accumulate=config.accumulate,
    )
    model = _whole_model(config, mesh)
    read = conversation_rows(
        config.data, model.tokenizer, reading=config.reading, seq_len=config.seq_len, seed=config.seed
    )
    num_steps = config.num_steps or max(1, round(config.num_epochs * read.rows.num_rows / config.batch_size))
    warmup = min(config.schedule.warmup_steps, max(1, num_steps // 10))
    schedule = dataclasses.replace(config.schedule, warmup_steps=warmup)
    optimizer = make_optimizer(config.optimizer, schedule, num_steps)
    if model.config.dtype == "float16":
        optimizer = scaled(optimizer, config.loss_scale)
    data = batches(read.rows, batch_size=config.batch_size, only_rows=process_rows(mesh, config.batch_size))
    masters = model.config.param_dtype if config.method != "full" else config.param_dtype
    job = Job(
        dataclasses.replace(model.config, param_dtype=masters),
        config.batch_size,
        config.seq_len,
        config.mesh,
        config.accumulate,
        optimizer=config.optimizer,
        lora=adapters_of(config),
        quantised=held_base(config, model.quantization),
        freeze=config.freeze,
    )
    task = Task(job, model.tokenizer, num_steps, read.rows, data, mesh, conversations=read.is_chat)
    checked = plan_and_check(config, task, folder, base=model.params)
    held_out = config.held_out
    held_out = dataclasses.replace(held_out, folder=read.validation) if read.validation else held_out
    callbacks = [*callbacks, *held_out_callbacks(held_out, task)]
    if config.dry_run:
        return dry(folder)
    start = _start(config, model, optimizer, mesh)
    step = make_step(start.loss, optimizer, accumulate=config.accumulate, mesh=mesh)
    with opened(config, folder, begun=begun) as run:
        keep(checked, folder)
        base = _base(config, model, start, folder)
        _save_architecture(config, model, folder, base)
        state = run_training(config, task, run, start.state, step, callbacks)
        _export(config, model, start, state, folder)
        if processes.index() == 0:
            left = [name for name in ("adapter", "model") if (folder / name).is_dir()]
            print(f"written: {' and '.join(str(folder / name) for name in left)}; python -m serve {config.run} answers")
        _push(config, folder)
        return ended(run, {"method": config.method, "base": config.model} | read.summary)


def _push(config: Finetune, folder: Path) -> None:
    """Sends what the run left to the hub, where that is asked for; process 0 of a job does."""
    if config.push and processes.index() == 0:
        print(f"pushed to {push(folder / ('model' if config.merge else 'adapter'), config.push)}")


def _as_trained(config: Finetune, model: ModelConfig) -> ModelConfig:
    """Returns the architecture as the run computes it."""
    return dataclasses.replace(
        model, remat=config.remat, attention=config.attention, unroll_layers=config.unroll_layers
    )


def _whole_model(config: Finetune, mesh: Mesh | None) -> Model:
    """Returns the model with its adapters, if any, merged: what is trained next stands on them.

    It is quantised while it is read, unless its own weights are wanted first: to merge, to write or to part them.
    """
    source = resolve(config.model)
    whole_first = config.method == "pissa" or source.checkpoints is not None or bool(source.adapters)
    stored = read_quantization(read_json(source.folder / CONFIG), allow_unknown=config.allow_unknown)
    held = held_base(config, stored)
    if stored is not None and (source.adapters or source.checkpoints is not None):
        raise ValueError(
            f"{config.model} is an adapter on a quantised model, and training goes on from a whole one: merge it with "
            "`python -m internjax.hf convert MODEL FOLDER` and train on FOLDER"
        )
    wanted = None if config.dtype == "auto" else config.dtype
    if wanted is None and jax.default_backend() == "gpu":
        wanted = devices.compute_dtype(jax.devices()[0])
        if note := devices.dtype_note(jax.devices()[0]):
            print(note)
    model = open_model(
        config.model,
        mesh=mesh,
        quantize=None if whole_first or stored is not None else held,
        dtype=wanted,
        allow_unknown=config.allow_unknown,
    )
    model = dataclasses.replace(model, config=_as_trained(config, model.config))
    if model.tokenizer is None:
        raise ValueError(
            f"{config.model} has no tokenizer.json, so conversations cannot be tokenised; add the tokenizer's files"
        )
    if model.lora is None:
        return model
    return dataclasses.replace(model, params=lora.merge(model.params, model.lora), lora=None)


class _Start(NamedTuple):
    """Where training begins."""

    state: TrainState
    loss: Loss
    residual: dict | None
    """What PiSSA leaves of the model: the base of its checkpoints."""
    factors: dict | None
    """PiSSA's first factors, without which its adapter is none of the model."""


def _start(config: Finetune, model: Model, optimizer: optax.GradientTransformation, mesh: Mesh | None) -> _Start:
    axes = decoder.logical_axes(model.config)
    adapters = adapters_of(config)
    common = {"seed": config.seed, "mesh": mesh, "optimizer_state": config.mesh.optimizer_state}
    loss = next_token(model.config, lora_config=adapters, neftune_alpha=config.neftune_alpha)
    if adapters is None:
        params = jax.tree.map(lambda leaf: _master(leaf, config.param_dtype), model.params)
        parts, places = split(params, config.freeze), split(axes, config.freeze)
        state = init_state(
            parts.trainable,
            optimizer,
            frozen=parts.frozen or None,
            axes=places.trainable,
            frozen_axes=places.frozen or None,
            **common,
        )
        return _Start(state, joined(loss), None, None)
    begun = lora.initialise(adapters, model.params, jax.random.key(config.seed))
    frozen, is_pissa = begun.params, adapters.initialisation == "pissa"
    if (how := base_of(config)) is not None and model.quantization is None:
        frozen = quantize.quantize_params(frozen, **dataclasses.asdict(how))
    # The state takes its arrays over.
    factors = jax.tree.map(jnp.copy, begun.weights) if is_pissa else None
    state = init_state(
        begun.weights,
        optimizer,
        frozen=frozen,
        axes=lora.logical_axes(begun.weights, axes),
        frozen_axes=quantize.logical_axes(frozen, axes),
        **common,
    )
    return _Start(state, loss, begun.params if is_pissa else None, factors)


def _master(leaf: jax.Array, dtype: DType) -> jax.Array:
    """Returns a parameter in the precision it is trained in; released ones are bfloat16. The given one is given up."""
    if leaf.dtype == dtype:
        return leaf
    new = leaf.astype(dtype)
    leaf.delete()
    return new


def _base(config: Finetune, model: Model, start: _Start, folder: Path) -> Path:
    """Returns the folder that the run's checkpoints stand on, adapters or a part of a model: the model's own, or
    RUN/base where that is not the model."""
    source = model.source
    is_plain = source.checkpoints is None and not source.adapters and start.residual is None
    if (config.method == "full" and not config.freeze) or is_plain:
        return source.folder
    if not processes.first("base", (folder / "base").is_dir):
        print(f"what the run starts from is written to {folder / 'base'}")
        params = model.params if start.residual is None else start.residual
        if config.method == "full":  # the state has taken the model's own arrays over
            params = join(start.state.trainable, start.state.frozen)
        _save(folder / "base", model, params, {"from": config.model})
    return folder / "base"


def _save(
    folder: Path, model: Model, params: dict, provenance: dict, *, dtype: DType | None = None, use_up: bool = False
) -> None:
    """Writes a model folder; all processes take part, and process 0 writes. use_up: `params` are not needed after."""
    params = exported(params)
    if params is not None:
        save_model(
            folder,
            config=model.config,
            params=params,
            tokenizer=model.tokenizer,
            generation=model.generation,
            dtype=dtype,
            provenance=provenance,
            overwrite=True,
            use_up=use_up,
        )


def _save_architecture(config: Finetune, model: Model, folder: Path, base: Path) -> None:
    """Writes what `open_model(RUN@STEP)` reads the run's checkpoints by; process 0 of a job does."""
    if processes.index() != 0:
        return
    adapters = adapters_of(config)
    if adapters is None:
        stands_on = base if config.freeze else None
        save_architecture(folder, config=model.config, tokenizer=model.tokenizer, base=stands_on)
        return
    # PiSSA's checkpoints are plain adapters of what it left of the model.
    adapters = dataclasses.replace(adapters, initialisation="zero")
    save_architecture(folder, config=model.config, tokenizer=model.tokenizer, lora_config=adapters, base=base)


def _export(config: Finetune, model: Model, start: _Start, state: TrainState, folder: Path) -> None:
    """Writes the adapter, where one was trained, and the whole model, unless merge is off."""
    facts = run_facts(folder)
    facts |= {"base": config.model, "data": list(config.data), "method": config.method, "seed": config.seed}
    if (adapters := adapters_of(config)) is None:
        # As it was stored: the precision that training wants is not what is handed on.
        _save(
            folder / "model",
            model,
            join(state.trainable, state.frozen),
            facts,
            dtype=model.config.param_dtype,
            use_up=True,
        )
        return
    source, base = model.source, folder / "base"
    plain = lora.Plain(dataclasses.replace(adapters, initialisation="zero"), state.trainable)
    if source.checkpoints is None and not source.adapters:
        base = source.folder
        if start.factors is not None:
            plain = lora.of_original_base(adapters, state.trainable, start.factors)
    weights = exported(plain.weights)
    if weights is not None:
        save_adapter(folder / "adapter", plain.config, weights, base=base, model_config=model.config, overwrite=True)
    if config.merge:
        trained, frozen = state.trainable, state.frozen
        if held_base(config, model.quantization) is not None and jax.device_count() == 1:
            # A device that was chosen for a model in few bits may not hold the whole one.
            trained, frozen = jax.device_put((trained, frozen), jax.local_devices(backend="cpu")[0])
        merged = lora.merge(frozen, lora.apply_config(trained, adapters))
        _save(folder / "model", model, quantize.dequantize_params(merged), facts, use_up=True)
