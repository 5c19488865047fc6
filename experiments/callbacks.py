"""What is looked at while a run trains: fixed prompts, held-out text, tasks. Each function returns an `Every`.

    callbacks = [
        sample_prompts(Prompts(texts=("import",)), model, tokenizer, run=run),
        held_out_loss(HeldOut("tokens/held_out"), model, tokenizer, mesh=mesh, batch_size=8, seq_len=4096),
    ]

All results are deterministic functions of the state: they go to metrics.jsonl and samples/STEP.jsonl, and a resumed run
writes the same. B batch, T time, N new tokens.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.loading import open_rows, row_batch
from data_pipelines.packing import Packing
from eval.model import as_chat, as_text, local
from eval.run import evaluate
from eval.task import Task
from internjax import sharding
from internjax.decode.generate import ERROR, FINISH_NAMES, generate
from internjax.decode.sample import make_sampling
from internjax.model.config import ModelConfig
from internjax.model.lora import Lora, LoraConfig, apply_config
from internjax.text.tokenizer import Tokenizer
from internjax.train import processes
from internjax.train.batch import Batch
from internjax.train.freezing import join, joined
from internjax.train.loop import Every
from internjax.train.losses import next_token
from internjax.train.step import TrainState, put_batch
from internjax.train.tracking import Run

_SHOWN_CHARS = 200


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts that are continued during training, always the same ones."""

    texts: tuple[str, ...] = ()
    """Prompts; none leaves this out. A fine-tuning asks each as a user's turn, a pre-training continues it as text."""
    every: int = 500
    """Steps between samples; the last step always has some."""
    max_new_tokens: int = 64
    """Longest continuation."""
    temperature: float = 0.0
    """0 takes the most likely token; above, each prompt draws from a seed of its own, the same every time."""

    def __post_init__(self):
        if self.every < 1 or self.max_new_tokens < 1 or any(not text for text in self.texts):
            raise ValueError(f"every and max_new_tokens must be at least 1 and no prompt empty; given {self}")


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Token folder whose loss is measured during training."""

    folder: str = ""
    """Token folder that nothing is trained on; none leaves this out."""
    every: int = 500
    """Steps between measurements; after the last step there always is one."""
    num_batches: int = 16
    """Batches of it that are read: the same ones every time, the first of the order of seed 0."""

    def __post_init__(self):
        if self.every < 1 or self.num_batches < 1:
            raise ValueError(f"every and num_batches must be at least 1; given {self}")


class Weights(NamedTuple):
    """What a state computes with: the tree that is trained, or adapters on the frozen base."""

    params: dict
    lora: Lora | None


def weights_of(state: TrainState, lora_config: LoraConfig | None) -> Weights:
    """Returns the weights of a state as decoding and evaluation take them."""
    if lora_config is None:
        return Weights(join(state.trainable, state.frozen), None)
    return Weights(state.frozen, apply_config(state.trainable, lora_config))


def sample_prompts(
    config: Prompts,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    run: Run | None = None,
    lora_config: LoraConfig | None = None,
    chat: bool = False,
) -> Every:
    """Returns the callback that continues the prompts; they are shown, and kept in RUN/samples/STEP.jsonl and W&B.

    `chat` asks each prompt as a user's turn of a conversation. Raises ValueError for a prompt that leaves no room.
    """
    encoded = [(as_chat if chat else as_text)(text, "", tokenizer) for text in config.texts]
    if not encoded:
        raise ValueError("no prompt given; name some in texts, or leave the callback out")
    B, T = len(encoded), max(len(ids.context) for ids in encoded)
    if T + config.max_new_tokens > model_config.max_position_embeddings:
        raise ValueError(
            f"the longest prompt has {T} tokens and max_new_tokens is {config.max_new_tokens}, together more than the "
            f"model's {model_config.max_position_embeddings} positions; shorten one of them"
        )
    prompts_BT = np.zeros((B, T), np.int32)
    lengths_B = np.array([len(ids.context) for ids in encoded], np.int32)
    for b, ids in enumerate(encoded):
        prompts_BT[b, : lengths_B[b]] = ids.context
    sampling = make_sampling(B, temperature=config.temperature, seed=list(range(B)))

    def call(state: TrainState, step: int) -> None:
        weights = weights_of(state, lora_config)
        generation = _on_host(
            generate(
                weights.params,
                prompts_BT,
                lengths_B,
                config=model_config,
                sampling=sampling,
                max_new_tokens=config.max_new_tokens,
                stop_ids=encoded[0].stop,
                lora=weights.lora,
            )
        )
        rows = []
        for b, prompt in enumerate(config.texts):
            ids, finish = generation.tokens_BN[b, : generation.lengths_B[b]].tolist(), int(generation.finish_B[b])
            text = tokenizer.decode(ids) if finish != ERROR else "(the logits are not finite)"
            rows.append({"prompt": prompt, "text": text, "tokens": len(ids), "finish": FINISH_NAMES[finish]})
        if processes.index() == 0:
            _show(rows, step)
        if run is not None:
            run.sample(step, rows)

    return Every(config.every, call)


def held_out_loss(
    config: HeldOut,
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    mesh: Mesh | None = None,
    lora_config: LoraConfig | None = None,
    packing: Packing = "concat",
) -> Every:
    """Returns the callback that measures `eval/loss` (nats per token) and `eval/bits_per_byte` on a token folder.

    Bits per byte are left out where only part of the tokens count (conversations). A folder that is too small for
    `num_batches` is read once, to its last row. Raises ValueError where it holds not one row, or was written by another
    tokenizer.
    """
    rows = open_rows(config.folder, seq_len=seq_len, packing=packing, seed=0, tokenizer_sha256=tokenizer.fingerprint)
    num_batches = min(config.num_batches, -(-rows.num_rows // batch_size))
    own = sharding.process_rows(mesh, batch_size)
    if lora_config is not None:  # what is dropped in training is not in what is measured
        lora_config = dataclasses.replace(lora_config, dropout=0.0)
    num_rows = min(num_batches * batch_size, rows.num_rows)
    num_bytes = _bytes_of((row_batch(rows, [index]) for index in range(num_rows)), tokenizer)

    def call(state: TrainState, step: int) -> dict[str, float]:
        total = weight = 0.0
        for number in range(num_batches):
            wanted = np.array([number * batch_size + row for row in own])
            batch = row_batch(rows, np.minimum(wanted, num_rows - 1).tolist())
            # What fills the last batch up is not counted.
            mask_BT = np.where((wanted < num_rows)[:, None], batch.loss_mask, 0.0).astype(batch.loss_mask.dtype)
            placed = put_batch(batch._replace(loss_mask=mask_BT), mesh)
            sums = jax.device_get(_summed(state.trainable, state.frozen, placed, model_config, lora_config))
            total, weight = total + float(sums[0]), weight + float(sums[1])
        found = {"eval/loss": total / weight}
        return found | ({"eval/bits_per_byte": total / math.log(2) / num_bytes} if num_bytes else {})

    return Every(config.every, call)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _summed(trainable: Any, frozen: Any, batch: Batch, config: ModelConfig, lora_config: LoraConfig | None) -> tuple:
    """Returns the sum of the losses and of their weights."""
    loss = next_token(config, lora_config=lora_config)
    loss = joined(loss) if lora_config is None else loss
    return loss(trainable, frozen, batch, jax.random.key(0))[:2]


def evaluate_tasks(
    tasks: Sequence[Task],
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    *,
    every: int,
    batch_size: int = 16,
    max_length: int | None = None,
    lora_config: LoraConfig | None = None,
    chat: bool = False,
) -> Every:
    """Returns the callback that scores tasks; the value of each goes to `eval/TASK`. Meant for small tasks.

    Raises ValueError in a job of several processes, which scores checkpoints with `python -m eval RUN@STEP` instead.
    """
    if processes.count() > 1:
        raise ValueError(
            "tasks are scored by one process, and this job has several; "
            "score its checkpoints with: python -m eval RUN@STEP"
        )
    encode = as_chat if chat else as_text

    def call(state: TrainState, step: int) -> dict[str, float]:
        weights = weights_of(state, lora_config)
        model = local(
            _Trained(model_config, weights.params, tokenizer, weights.lora),
            batch_size=batch_size,
            max_length=max_length,
            encode=encode,
        )
        return {f"eval/{result.task}": result.interval.value for result in evaluate(model, tasks)}

    return Every(every, call)


class _Trained(NamedTuple):
    """A model as `eval.model.local` takes it."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    lora: Lora | None


def _bytes_of(given: Iterable[Batch], tokenizer: Tokenizer) -> int:
    """Returns the bytes of text behind all targets, or 0 where some do not count."""
    total = 0
    for batch in given:
        if not np.array_equal(batch.loss_mask > 0, batch.segments > 0):
            return 0
        for targets_T, segments_T in zip(batch.targets, batch.segments, strict=True):
            for segment in range(1, int(segments_T.max()) + 1):
                total += len(tokenizer.decode(targets_T[segments_T == segment].tolist()).encode())
    return total


def _on_host(tree: Any) -> Any:
    """Returns the arrays on this host, those too that are spread over other processes."""
    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def _show(rows: Sequence[dict[str, Any]], step: int) -> None:
    print(f"samples after step {step}:", file=sys.stderr)
    for row in rows:
        text = row["text"] if len(row["text"]) <= _SHOWN_CHARS else row["text"][:_SHOWN_CHARS] + " ..."
        print(f"  {row['prompt']!r} -> {text!r}", file=sys.stderr)
    sys.stderr.flush()
