"""Pre-training as a stage: one frozen config and one run function.

It reads token folders and leaves a run folder whose `model/` every other command can open. The same function serves the
tiny chain on a laptop and the recipes for large models: only the values differ.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from data_pipelines.loading import batches
from data_pipelines.mixing import Mixture, make_sources, open_mixture
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
from internjax import sharding
from internjax.hf.open import open_model
from internjax.hf.resolve import resolve
from internjax.hf.save import save_architecture, save_model
from internjax.model import decoder, lora
from internjax.model.config import ModelConfig, num_params
from internjax.sharding import MeshConfig, process_rows
from internjax.text.tokenizer import Tokenizer, differing_id, load_tokenizer
from internjax.train import processes
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.checks import check_run
from internjax.train.guard import Guard
from internjax.train.loop import Data, Every
from internjax.train.loss_scale import LossScale, scaled
from internjax.train.losses import Loss, next_token
from internjax.train.memory import Job
from internjax.train.optimizer import AdamW, Cosine, Optimizer, Schedule, make_optimizer
from internjax.train.profile import ProfileConfig
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig

_MAY_DIFFER = (
    "remat",
    "unroll_layers",
    "attention",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "initializer_range",
)
"""Fields of an architecture that a continued pre-training may change: no array has another shape or meaning."""


@dataclasses.dataclass(frozen=True)
class TokenData:
    """Rows of packed tokens from one or more token folders. Every tuple is empty or has one value for each folder."""

    folder: tuple[str, ...] = ()
    """Token folders (manifest.json, *.bin, *.idx); written by data_pipelines.tokens."""
    weight: tuple[float, ...] = ()
    """Shares of the rows, relative to each other; without them each folder has its share of all tokens."""
    min_tokens: tuple[int, ...] = ()
    """A document with fewer tokens is left out; 0 is no limit."""
    max_tokens: tuple[int, ...] = ()
    """A document with more tokens is left out; 0 is no limit."""
    max_epochs: tuple[float, ...] = ()
    """How often a folder may be read; a run that would read it more often is refused. 0 is no limit."""
    tokenizer: str = ""
    """Folder of the tokenizer that wrote it: exported with the model."""
    batch_size: int = 8
    """Rows of a batch over all devices."""
    seq_len: int = 4096
    """Tokens of a row."""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pre-training, or continued pre-training when `init` names a model."""

    run: str
    """Run folder: a path, or a name under runs/."""
    model: ModelConfig
    data: TokenData
    num_steps: int
    """Updates of the run."""
    init: str | None = None
    """MODEL to start from, its adapters merged; fresh parameters without one."""
    allow_unknown: tuple[str, ...] = ()
    """Fields of that model's config.json that are read as if they were absent."""
    optimizer: Optimizer = AdamW()
    schedule: Schedule = Cosine(warmup_steps=100)
    accumulate: int = 1
    """Micro-batches per update."""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: Guard = Guard()
    tracking: TrackingConfig = TrackingConfig()
    prompts: Prompts = Prompts()
    held_out: HeldOut = HeldOut()
    profile: ProfileConfig = ProfileConfig()
    preflight: bool = True
    """Look at mesh, memory, attention, masks, files and disk before step 0."""
    dry_run: bool = False
    """Stop after plan and preflight; no run folder is made."""
    seed: int = 0
    """Of initial weights, order of the data and dropout."""
    fresh: bool = False
    """Remove an existing run folder first."""


def pretrain(
    config: Pretrain,
    *,
    callbacks: Sequence[Every] = (),
    loss: Callable[[ModelConfig], Loss] = next_token,
    data: Data | None = None,
) -> Trained:
    """Returns the run folder of a pre-training: checkpoints, metrics, and model/ in Hugging Face form.

    `loss` makes the loss of a model; `data` (position -> batches from there on) stands in for `config.data.folder`, in
    batches of `config.data.batch_size` rows of `config.data.seq_len` tokens (in a job of several processes the rows of
    `sharding.process_rows`). With it, `config.data.tokenizer` may be left out; model/ then has none.
    """
    folder = run_path(config.run)
    if (done := finished(config, folder)) is not None:
        return done
    with mesh_of(config.mesh) as mesh:
        return _pretrain(config, folder, mesh, callbacks, loss(config.model), data)


def _pretrain(config: Pretrain, folder: Path, mesh: Mesh | None, callbacks, loss: Loss, data: Data | None) -> Trained:
    begun = time.time()
    # All that can be wrong is read before the folder is made, or an earlier one removed.
    batch_size = config.data.batch_size
    check_run(
        config.model,
        mesh=config.mesh,
        num_devices=jax.device_count(),
        batch_size=batch_size,
        seq_len=config.data.seq_len,
        accumulate=config.accumulate,
        schedule=config.schedule,
        num_steps=config.num_steps,
    )
    tokenizer = _fitting_tokenizer(config, optional=data is not None)
    rows = _pretraining_rows(config, tokenizer) if data is None else None
    data = batches(rows, batch_size=batch_size, only_rows=process_rows(mesh, batch_size)) if data is None else data
    job = Job(config.model, batch_size, config.data.seq_len, config.mesh, config.accumulate, optimizer=config.optimizer)
    task = Task(job, tokenizer, config.num_steps, rows, data, mesh, conversations=False)
    checked = plan_and_check(config, task, folder, base=None)
    callbacks = [*callbacks, *held_out_callbacks(config.held_out, task)]
    if config.dry_run:
        return dry(folder)
    optimizer = make_optimizer(config.optimizer, config.schedule, config.num_steps)
    if config.model.dtype == "float16":
        optimizer = scaled(optimizer, LossScale())
    step = make_step(loss, optimizer, accumulate=config.accumulate, mesh=mesh)
    params, axes = initial_params(config, mesh)
    state = init_state(
        params, optimizer, seed=config.seed, mesh=mesh, axes=axes, optimizer_state=config.mesh.optimizer_state
    )
    print(f"attention back end {config.model.attention}, {num_params(config.model):,} parameters, mesh {mesh}")
    with opened(config, folder, begun=begun) as run:
        keep(checked, folder)
        if processes.index() == 0:
            save_architecture(folder, config=config.model, tokenizer=tokenizer)
        state = run_training(config, task, run, state, step, callbacks)
        params = exported(state.trainable)
        if params is not None:
            save_model(
                run.model,
                config=config.model,
                params=params,
                tokenizer=tokenizer,
                provenance={"data": list(config.data.folder), "num_steps": config.num_steps, "seed": config.seed},
                overwrite=True,
            )
        return ended(run, {"num_params": num_params(config.model), "num_traces": step.num_traces})


def _pretraining_rows(config: Pretrain, tokenizer: Tokenizer) -> Mixture:
    data = config.data
    num_rows = config.num_steps * data.batch_size
    sources = make_sources(
        data.folder,
        weights=data.weight,
        min_tokens=data.min_tokens,
        max_tokens=data.max_tokens,
        max_epochs=data.max_epochs,
    )
    rows = open_mixture(
        sources,
        seq_len=data.seq_len,
        packing="concat",
        seed=config.seed,
        tokenizer_sha256=tokenizer.fingerprint,
        num_rows=num_rows,
    )
    for share in rows.shares(num_rows):
        print(share)
    return rows


def _fitting_tokenizer(config: Pretrain, *, optional: bool) -> Tokenizer | None:
    """Returns the tokenizer of the run; None where it is optional and not named."""
    for name, value in (("folder", config.data.folder), ("tokenizer", config.data.tokenizer)):
        if not value and not optional:
            raise ValueError(f"no data.{name} given; name a folder: --data.{name} FOLDER")
    if not config.data.tokenizer:
        return None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model's embedding "
            f"{config.model.vocab_size} rows; set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if config.init is not None:
        _check_same_text(config, tokenizer)
    return tokenizer


def _check_same_text(config: Pretrain, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the model to start from knows other text under the tokenizer's ids."""
    folder = resolve(config.init).folder
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return
    known = load_tokenizer(folder)
    if (found := differing_id(known, tokenizer)) is not None:
        raise ValueError(
            f"{config.init} was trained with another tokenizer than {config.data.tokenizer}: id {found} is "
            f"{known.token(found)!r} there and {tokenizer.token(found)!r} here. Write the token folders with the "
            f"tokenizer of {folder}"
        )


def initial_params(config: Pretrain, mesh: Mesh | None) -> tuple[dict, dict]:
    """Returns the parameters that a pre-training starts from, on their shardings, and their logical axes."""
    axes = decoder.logical_axes(config.model)
    if config.init is not None:
        model = open_model(config.init, mesh=mesh, allow_unknown=config.allow_unknown)
        found = dataclasses.replace(model.config, dtype=config.model.dtype, param_dtype=config.model.param_dtype)
        differing = [
            f"{field.name} {getattr(found, field.name)!r} there, {getattr(config.model, field.name)!r} here"
            for field in dataclasses.fields(found)
            if field.name not in _MAY_DIFFER and getattr(found, field.name) != getattr(config.model, field.name)
        ]
        if differing:
            raise ValueError(f"{config.init} is another architecture than this config: {'; '.join(differing)}")
        # Released checkpoints are bfloat16; trained is what the config says.
        dtype = jax.numpy.dtype(config.model.param_dtype)
        params = model.params if model.lora is None else lora.merge(model.params, model.lora)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params), axes
    key = jax.random.key(config.seed)
    if mesh is None:
        return decoder.init(config.model, key), axes
    with sharding.use(mesh):
        return _init_on(mesh, config.model)(key), axes


@functools.lru_cache(maxsize=4)
def _init_on(mesh: Mesh, config: ModelConfig) -> Callable[[jax.Array], dict]:
    """Returns key -> fresh parameters on their shardings: one program for all runs of a process."""
    places = sharding.shardings(decoder.logical_axes(config), decoder.abstract_params(config), mesh)
    return jax.jit(functools.partial(decoder.init, config), out_shardings=places)
