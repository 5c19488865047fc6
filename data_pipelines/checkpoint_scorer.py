"""A scorer of a language model, for `coherence.py`: log-probabilities by `internjax.decode.score`.

    scorer = checkpoint_scorer(open_model("runs/tiny/pretrain"), window=4096)

Rows are padded to one of two lengths and come in batches of one size, so two programs are compiled, whatever the text.
Both contexts are scored with the rotary frequencies of the whole window: what differs is the context alone.

B batch, T time.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.coherence import Scored, Scorer
from internjax import sharding
from internjax.decode import score as scoring
from internjax.hf.open import Model
from internjax.hf.resolve import Source, resolve
from internjax.model import rope

_last_scores = jax.jit(scoring.last_scores, static_argnames=("num_scored", "config", "chunk_size"))
SAMPLE_BYTES = 1 << 20


def checkpoint_scorer(model: Model, *, window: int, batch_size: int = 4, version: str = "") -> Scorer:
    """Returns the scorer of an opened model, on the mesh that its parameters live on.

    window: longest row. A row without context begins with the token that begins texts, else the one that ends them.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; put its tokenizer.json beside the weights and open it again")
    # A window's scores between all heads and places would not fit into memory at 4096 tokens.
    config = dataclasses.replace(model.config, attention="chunked")
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    inv_freq_BF = rope.inv_freq(config, length=window)[None]
    mesh = sharding.mesh_of(model.params)

    def encode(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text), np.int32)

    def score(rows: Sequence[np.ndarray], num_scored: int, length: int) -> Scored:
        if length == num_scored:
            rows, length = [np.concatenate([[first], row]) for row in rows], length + 1
        found = []
        for tokens_BT, lengths_B in _batches(rows, batch_size, length):
            with sharding.use(mesh):
                scores = _last_scores(
                    model.params, jnp.asarray(tokens_BT), jnp.asarray(lengths_B), num_scored=num_scored, config=config,
                    lora=model.lora, inv_freq_BF=inv_freq_BF,
                )  # fmt: skip
            logprobs_BS, is_top_BS = (np.asarray(x, np.float64) for x in scores)
            found.append((-logprobs_BS.mean(axis=1), is_top_BS.mean(axis=1)))
        losses, accuracies = (np.concatenate(column)[: len(rows)] for column in zip(*found, strict=True))
        return Scored(losses, accuracies)

    return Scorer(str(model.source.folder), version, encode, score)


def _batches(rows: Sequence[np.ndarray], batch_size: int, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows padded on the right, `batch_size` at a time; the last ones are filled up with the last row."""
    for start in range(0, len(rows), batch_size):
        batch = list(rows[start : start + batch_size])
        batch += batch[-1:] * (batch_size - len(batch))
        tokens_BT = np.zeros((batch_size, length), np.int32)
        for row, tokens in enumerate(batch):
            tokens_BT[row, : len(tokens)] = tokens
        yield tokens_BT, np.array([len(tokens) for tokens in batch], np.int32)


@functools.lru_cache(maxsize=8)
def version_of(model: str) -> str:
    """Returns a digest of a model's files: names, sizes, and of each the first and the last MiB."""
    source = resolve(model)
    digest = hashlib.sha256()
    for path in _files(source):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            if size > SAMPLE_BYTES:
                file.seek(max(size - SAMPLE_BYTES, SAMPLE_BYTES), os.SEEK_SET)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _files(source: Source) -> Iterator[Path]:
    for folder in (source.folder, *source.adapters, *filter(None, (source.trained_adapter, source.frozen))):
        yield from (path for path in sorted(folder.iterdir()) if path.is_file())
    if source.checkpoints is not None:
        from internjax.hf.restore import good_step

        step = good_step(source.checkpoints, source.step)
        yield from (path for path in sorted((source.checkpoints / str(step)).rglob("*")) if path.is_file())
