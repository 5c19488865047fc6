"""Fine-tuning as a stage: one frozen config and one run function.

It reads a checkpoint and files of conversations, and leaves a run folder with the adapter and the model that every
other command can open. The same function serves a laptop and the recipes for large models: only the values differ.
"""

import dataclasses
import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from data_pipelines.loading import Rows, batches, open_rows
from data_pipelines.sources import existing
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
from internjax.hf.open import Model, open_model
from internjax.hf.save import save_architecture, save_model
from internjax.kernels.attention import Backend
from internjax.model import decoder, lora
from internjax.model.lora import LoraConfig
from internjax.sharding import MeshConfig, process_rows
from internjax.text import chat
from internjax.text.tokenizer import Tokenizer
from internjax.train import processes
from internjax.train.checkpoint import CheckpointConfig
from internjax.train.checks import check_run
from internjax.train.guard import Guard
from internjax.train.loop import Every
from internjax.train.losses import next_token
from internjax.train.memory import Job
from internjax.train.optimizer import AdamW, Cosine, Optimizer, Schedule, make_optimizer
from internjax.train.profile import ProfileConfig
from internjax.train.step import init_state, make_step
from internjax.train.tracking import TrackingConfig


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Supervised fine-tuning of a checkpoint on conversations."""

    run: str = "finetune"
    """Run folder: a path, or a name under runs/."""
    model: str = ""
    """MODEL: a Hugging Face folder, an adapter folder, BASE+ADAPTER, a run folder, RUN@STEP, hf:ORG/NAME."""
    data: tuple[str, ...] = ()
    """Files of conversations; the format is detected (Alpaca, OpenAI messages, ShareGPT, MOSS, prompt/completion)."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """A row that is no conversation ends the run before it begins, or is left out and counted."""
    seq_len: int = 2048
    """Tokens of a packed row; a conversation that is longer is left out and counted."""
    batch_size: int = 8
    """Rows of a batch over all devices."""
    num_epochs: float = 1.0
    """Passes over the data; sets the number of steps where num_steps is not given."""
    num_steps: int | None = None
    """Updates of the run; None: num_epochs of the data."""
    method: Literal["full", "lora"] = "lora"
    """All parameters are trained, or adapters on the frozen model."""
    lora: LoraConfig = LoraConfig()
    """Adapters of method=lora."""
    merge: bool = True
    """Write the merged model beside the adapter, as the run's model/."""
    optimizer: Optimizer = AdamW(peak_lr=2e-4, weight_decay=0.0)
    schedule: Schedule = Cosine(warmup_steps=10)
    """A warm-up longer than a tenth of the run is shortened to it."""
    accumulate: int = 1
    """Micro-batches per update."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes per layer: nothing, all but matrix products, everything."""
    attention: Backend = "xla"
    """Attention back end; see internjax.kernels.attention."""
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: Guard = Guard()
    tracking: TrackingConfig = TrackingConfig()
    prompts: Prompts = Prompts()
    held_out: HeldOut = HeldOut()
    profile: ProfileConfig = ProfileConfig()
    preflight: bool = True
    """Look at mesh, memory, attention, masks, adapters, files and disk before step 0."""
    dry_run: bool = False
    """Stop after plan and preflight; no run folder is made."""
    token_cache: str = "runs/.tokens"
    """Where tokenised conversations are kept, by the hash of files, tokenizer and template."""
    seed: int = 0
    """Of initial weights, order of the data and dropout."""
    fresh: bool = False
    """Remove an existing run folder first."""

    def __post_init__(self):
        if self.method == "full" and self.lora != LoraConfig():
            raise ValueError(f"method=full trains no adapters, but lora is set to {self.lora}; use --method lora")
        if self.method == "full" and not self.merge:
            raise ValueError("merge=False leaves the adapter alone, and method=full has none; use --method lora")


def chat_tokens(config: Finetune, tokenizer: Tokenizer) -> Path:
    """Returns the token folder of a fine-tuning's conversations, written now or found by its hash.

    Prints the detected formats, what was left out and why, and one rendered sample.
    """
    from data_pipelines import formats
    from data_pipelines.tokens import MANIFEST, TokenDocument, write_tokens

    if not config.data:
        raise ValueError("no data given; name at least one file of conversations: --data my.jsonl")
    digest = hashlib.sha256(f"{tokenizer.fingerprint} {tokenizer.chat_template} {config.bad_rows}".encode())
    for name in config.data:
        digest.update(hashlib.sha256(existing(name).read_bytes()).digest())
    folder = Path(config.token_cache) / digest.hexdigest()[:16]
    if (folder / MANIFEST).is_file():
        return folder
    bad: list[str] = []
    documents, found = [], {}
    for name in config.data:
        found[name] = formats.detect_file(name)
        for sample in formats.conversations(name, format=found[name], on_bad_row=bad.append):
            try:
                rendered = chat.render(sample.messages, tokenizer)
            except ValueError as error:
                bad.append(f"{sample.place}: {error}")
                continue
            documents.append(TokenDocument(sample.place, list(rendered.ids), list(rendered.mask)))
    if bad and config.bad_rows == "refuse":
        others = f" (and {len(bad) - 1} more rows)" if bad[1:] else ""
        raise ValueError(f"{bad[0]}{others}. Mend the file, or leave such rows out with --bad-rows skip")
    for message in bad[:5]:
        print(f"left out: {message}", file=sys.stderr)
    if not documents:
        raise ValueError(
            f"{', '.join(config.data)} hold no conversation; the first reason: {bad[0] if bad else 'empty'}"
        )
    print(f"{len(documents)} conversations from {found}, {len(bad)} rows left out")
    write_tokens(folder, documents, tokenizer=tokenizer, about={"formats": found, "left_out": len(bad)})
    first = documents[0]
    learned = [token for token, learn in zip(first.ids, first.mask, strict=True) if learn]
    print(f"first sample: {tokenizer.decode(first.ids, skip_special=False)!r}")
    print(f"  learned of it: {tokenizer.decode(learned, skip_special=False)!r}")
    return folder


def finetune(config: Finetune, *, callbacks: Sequence[Every] = ()) -> Trained:
    """Returns the run folder of a fine-tuning: adapter/ (PEFT layout) for lora, and the whole model as model/."""
    if not config.model:
        raise ValueError("no model given; name one: --model FOLDER (a Hugging Face folder or a run)")
    folder = run_path(config.run)
    if (done := finished(config, folder)) is not None:
        return done
    with mesh_of(config.mesh) as mesh:
        return _finetune(config, folder, mesh, callbacks)


def _finetune(config: Finetune, folder: Path, mesh: Mesh | None, callbacks: Sequence[Every]) -> Trained:
    begun = time.time()
    # All that can be wrong is read before the folder is made, or an earlier one removed.
    model = _whole_model(config, mesh)
    rows = _conversation_rows(config, model)
    num_steps = config.num_steps or max(1, round(config.num_epochs * rows.plan(0).num_rows / config.batch_size))
    warmup = min(config.schedule.warmup_steps, max(1, num_steps // 10))
    schedule = dataclasses.replace(config.schedule, warmup_steps=warmup)
    check_run(
        model.config,
        mesh=config.mesh,
        num_devices=jax.device_count(),
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        accumulate=config.accumulate,
        schedule=schedule,
        num_steps=num_steps,
    )
    optimizer = make_optimizer(config.optimizer, schedule, num_steps)
    data = batches(rows, batch_size=config.batch_size, only_rows=process_rows(mesh, config.batch_size))
    job = Job(
        model.config,
        config.batch_size,
        config.seq_len,
        config.mesh,
        config.accumulate,
        optimizer=config.optimizer,
        lora=config.lora if config.method == "lora" else None,
    )
    task = Task(job, model.tokenizer, num_steps, rows, data, mesh, conversations=True)
    checked = plan_and_check(config, task, folder, base=model.params)
    callbacks = [*callbacks, *held_out_callbacks(config, task)]
    if config.dry_run:
        return dry(folder)
    state, loss = _finetune_state(config, model, optimizer, mesh)
    step = make_step(loss, optimizer, accumulate=config.accumulate, mesh=mesh)
    with opened(config, folder, begun=begun) as run:
        keep(checked, folder)
        base = _base(config, model, folder)
        _save_architecture(config, model, folder, base)
        state = run_training(config, task, run, state, step, callbacks)
        _export_finetuned(folder, config, model, state.trainable, base)
        read = rows.plan(0)
        return ended(
            run,
            {
                "method": config.method,
                "base": config.model,
                "num_left_out": read.num_left_out,
                "num_rows": read.num_rows,
            },
        )


def _whole_model(config: Finetune, mesh: Mesh | None) -> Model:
    """Returns the model with its adapters, if any, merged: what is trained next stands on them."""
    model = open_model(config.model, mesh=mesh)
    how = dataclasses.replace(model.config, remat=config.remat, attention=config.attention)
    model = dataclasses.replace(model, config=how)
    if model.tokenizer is None:
        raise ValueError(
            f"{config.model} has no tokenizer.json, so conversations cannot be tokenised; add the tokenizer's files"
        )
    if model.lora is None:
        return model
    return dataclasses.replace(model, params=lora.merge(model.params, model.lora), lora=None)


def _conversation_rows(config: Finetune, model: Model) -> Rows:
    # One process renders and writes them; a mistake in a row ends all of them.
    folder = processes.first("conversations", lambda: str(chat_tokens(config, model.tokenizer)))
    rows = open_rows(
        folder,
        seq_len=config.seq_len,
        packing="whole",
        seed=config.seed,
        tokenizer_sha256=model.tokenizer.fingerprint,
    )
    if left_out := rows.plan(0).num_left_out:
        print(f"{left_out} conversations are longer than {config.seq_len} tokens and were left out", file=sys.stderr)
    return rows


def _finetune_state(config: Finetune, model: Model, optimizer, mesh: Mesh | None):
    axes = decoder.logical_axes(model.config)
    if config.method == "full":
        state = init_state(
            model.params, optimizer, seed=config.seed, mesh=mesh, axes=axes, optimizer_state=config.mesh.optimizer_state
        )
        return state, next_token(model.config)
    weights = lora.init_lora(config.lora, model.params, jax.random.key(config.seed))
    state = init_state(
        weights,
        optimizer,
        frozen=model.params,
        seed=config.seed,
        mesh=mesh,
        axes=lora.logical_axes(weights, axes),
        frozen_axes=axes,
        optimizer_state=config.mesh.optimizer_state,
    )
    return state, next_token(model.config, lora_config=config.lora)


def _base(config: Finetune, model: Model, folder: Path) -> Path:
    """Returns the folder that the new adapter stands on: the model's own, or RUN/base where that is not the model."""
    source = model.source
    if config.method == "full" or (source.checkpoints is None and not source.adapters):
        return source.folder
    if not processes.first("base", (folder / "base").is_dir):
        print(f"{config.model} is written to {folder / 'base'}: the new adapter stands on it")
        params = exported(model.params)
        if params is not None:
            save_model(
                folder / "base",
                config=model.config,
                params=params,
                tokenizer=model.tokenizer,
                generation=model.generation,
                provenance={"from": config.model},
            )
    return folder / "base"


def _save_architecture(config: Finetune, model: Model, folder: Path, base: Path) -> None:
    """Writes what `open_model(RUN@STEP)` reads the run's checkpoints by; process 0 of a job does."""
    if processes.index() != 0:
        return
    if config.method == "full":
        save_architecture(folder, config=model.config, tokenizer=model.tokenizer)
    else:
        save_architecture(folder, config=model.config, tokenizer=model.tokenizer, lora_config=config.lora, base=base)


def _export_finetuned(folder: Path, config: Finetune, model: Model, trained: dict, base: Path) -> None:
    """Writes the adapter (method=lora) and, unless merge is off, the whole model."""
    # All processes take part in what is computed on the mesh, and process 0 writes.
    adapter, params = None, trained
    if config.method == "lora":
        params = lora.merge(model.params, lora.apply_config(trained, config.lora)) if config.merge else None
        adapter = exported(trained)
    params = None if params is None else exported(params)
    if adapter is not None:
        save_adapter(folder / "adapter", config.lora, adapter, base=base, model_config=model.config, overwrite=True)
    if params is not None:
        save_model(
            folder / "model",
            config=model.config,
            params=params,
            tokenizer=model.tokenizer,
            generation=model.generation,
            provenance={"base": config.model, "data": list(config.data), "method": config.method, "seed": config.seed},
            overwrite=True,
        )
