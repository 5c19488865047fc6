"""Fine-tuning methods at equal steps: held-out loss of each on real text, from one pre-trained tiny model.

    python -m experiments.benchmarks.methods
    python -m experiments.benchmarks.methods --methods lora dora --steps 100 --rates 2e-3

Hardware: 2 CPU cores
Time: 8 minutes, most of it the methods' steps; --pretrain-steps and --steps scale it

Bytes are the tokens. The base is trained on source code of Python's standard library, then every method trains on
another kind of text, the language reference that Python ships for its `help` (pydoc_data.topics), and is judged on a
part of it that nobody saw. Same batches, same number of steps, AdamW without weight decay; each method has the same
learning rates to choose from, and its best one counts (all are written down).
"""

import argparse
import dataclasses
import functools
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import record
from internjax.model import decoder, lora, quantize
from internjax.model.config import TINY, ModelConfig
from internjax.model.lora import LoraConfig
from internjax.train.batch import Batch
from internjax.train.losses import Loss, next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step

MODEL = dataclasses.replace(TINY, vocab_size=256)
BATCH_SIZE, SEQ_LEN = 8, 256
LORA = LoraConfig(rank=8, alpha=16.0)
GROUP = 64
"""Input rows that share a scale of a quantised base."""


class Method(NamedTuple):
    """How the base is adapted; adapters None: all of it is trained."""

    adapters: LoraConfig | None = LORA
    scheme: str | None = None
    """Of the base's kernels."""
    double: bool = False
    """The scales of the base's kernels are quantised too."""
    lora_plus_ratio: float = 1.0


METHODS = {
    "full": Method(adapters=None),
    "lora": Method(),
    "rslora": Method(dataclasses.replace(LORA, scaling="rslora")),
    "dora": Method(dataclasses.replace(LORA, kind="dora")),
    "pissa": Method(dataclasses.replace(LORA, initialisation="pissa")),
    "lora+": Method(lora_plus_ratio=16.0),
    "qlora-nf4": Method(scheme="nf4", double=True),
    "qlora-int4": Method(scheme="int4"),
}


# --- text ------------------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """Bytes as int32 ids."""

    code: np.ndarray
    learned: np.ndarray
    held_out: np.ndarray


def read_texts(*, max_code_bytes: int = 4_000_000) -> Texts:
    """Returns source code of the standard library, and the language reference cut into nine parts and one."""
    library = Path(sysconfig.get_paths()["stdlib"])
    code, size = [], 0
    for path in sorted(library.glob("*.py")):
        code.append(path.read_bytes())
        size += len(code[-1])
        if size > max_code_bytes:
            break
    from pydoc_data.topics import topics

    reference = b"\n\n".join(topics[name].encode() for name in sorted(topics))
    ids = np.frombuffer(reference, np.uint8).astype(np.int32)
    # One contiguous part: pieces next to each other share sentences.
    cut = len(ids) * 9 // 10
    return Texts(np.frombuffer(b"\n".join(code), np.uint8).astype(np.int32), ids[:cut], ids[cut:])


def batch_at(ids: np.ndarray, position: int, *, seed: int) -> Batch:
    """Returns rows that begin at random places of the text."""
    starts = np.random.default_rng((seed, position)).integers(0, len(ids) - SEQ_LEN - 1, BATCH_SIZE)
    return _rows(np.stack([ids[start : start + SEQ_LEN + 1] for start in starts]))


def held_out_batches(ids: np.ndarray) -> list[Batch]:
    """Returns all of a text as rows, but for what does not fill the last batch."""
    rows = len(ids) // (SEQ_LEN + 1) // BATCH_SIZE * BATCH_SIZE
    cut = ids[: rows * (SEQ_LEN + 1)].reshape(-1, BATCH_SIZE, SEQ_LEN + 1)
    return [_rows(each) for each in cut]


def _rows(ids: np.ndarray) -> Batch:
    positions = np.broadcast_to(np.arange(SEQ_LEN, dtype=np.int32), (BATCH_SIZE, SEQ_LEN))
    ones = np.ones_like(positions)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), positions, ones)


# --- training --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One method at one rate."""

    rate: float
    loss: float
    """On the held-out text after the last step, nats per byte."""
    first_loss: float
    """The same before the first one."""
    num_trained: int
    milliseconds: float
    """Of a step, the median."""


def pretrain(config: ModelConfig, text: np.ndarray, *, num_steps: int) -> dict:
    """Returns parameters trained on the text."""
    optimizer = make_optimizer(AdamW(peak_lr=3e-3), Cosine(warmup_steps=min(50, num_steps)), num_steps)
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))
    state, step = init_state(params, optimizer), make_step(next_token(config), optimizer)
    for position in range(num_steps):
        state, metrics = step(state, batch_at(text, position, seed=1))
        if position % 100 == 0:
            print(f"base: step {position} of {num_steps}, loss {float(metrics['loss']):.3f}")
    return state.trainable


def train(config: ModelConfig, method: Method, base: dict, texts: Texts, *, rate: float, num_steps: int) -> Run:
    """Returns what one method reaches from the base at one rate."""
    adamw = AdamW(peak_lr=rate, weight_decay=0.0, lora_plus_ratio=method.lora_plus_ratio)
    optimizer = make_optimizer(adamw, Cosine(warmup_steps=min(10, num_steps)), num_steps)
    if method.scheme is not None:
        base = quantize.quantize_params(base, scheme=method.scheme, group=GROUP, double=method.double)
    trainable, frozen = jax.tree.map(jnp.copy, base) if method.adapters is None else None, None
    if method.adapters is not None:
        frozen, trainable = lora.initialise(method.adapters, base, jax.random.key(2))
    loss = next_token(config, lora_config=method.adapters)
    judge = _judge(loss, held_out_batches(texts.held_out))
    state, step = init_state(trainable, optimizer, frozen=frozen), make_step(loss, optimizer)
    first, seconds = judge(state.trainable, state.frozen), []
    for position in range(num_steps):
        started = time.perf_counter()
        state, _ = step(state, batch_at(texts.learned, position, seed=3))
        jax.block_until_ready(state.step)
        seconds.append(time.perf_counter() - started)
    num_trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    reached = judge(state.trainable, state.frozen)
    return Run(rate, reached, first, num_trained, round(1e3 * float(np.median(seconds)), 2))


def _judge(loss: Loss, batches: Sequence[Batch]) -> Callable[[Any, Any], float]:
    """Returns (trainable, frozen) -> the mean loss over the batches."""
    compiled = jax.jit(lambda trainable, frozen, batch: loss(trainable, frozen, batch, jax.random.key(0))[:2])

    def judge(trainable, frozen) -> float:
        sums = np.sum([jax.device_get(compiled(trainable, frozen, batch)) for batch in batches], axis=0)
        return float(sums[0] / sums[1])

    return judge


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the methods' best runs as text, the lowest loss first."""
    lines = [f"{'method':12}{'trained':>9}{'rate':>9}{'before':>9}{'after':>9}{'ms':>8}   held-out nats per byte"]
    for name, each in sorted(found.items(), key=lambda item: item[1]["best"]["loss"]):
        best = each["best"]
        numbers = f"{best['num_trained']:9,}{best['rate']:9.0e}{best['first_loss']:9.4f}{best['loss']:9.4f}"
        lines.append(f"{name:12}{numbers}{best['milliseconds']:8.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.methods", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 2e-3, 8e-3], help="peak learning rates")
    parser.add_argument("--steps", type=int, default=200, help="of every method")
    parser.add_argument("--pretrain-steps", type=int, default=800, help="of the base")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "methods.json")
    args = parser.parse_args(arguments)
    about, texts = record.environment(), read_texts()
    base = pretrain(MODEL, texts.code, num_steps=args.pretrain_steps)
    found: dict[str, dict[str, Any]] = {}
    for name in args.methods:
        runs = [
            train(MODEL, METHODS[name], base, texts, rate=rate, num_steps=args.steps)._asdict() for rate in args.rates
        ]
        best = min(runs, key=lambda run: run["loss"])
        found[name] = {"best": best, "runs": runs}
        print(f"{name}: {best['first_loss']:.4f} -> {best['loss']:.4f} at {best['rate']:g}", flush=True)
    print(table(found))
    result = {
        "what": "held-out loss (nats per byte) of fine-tuning methods at equal steps; the best of equal learning rates",
        "setting": {
            "model": dataclasses.asdict(MODEL),
            "batch_size": BATCH_SIZE,
            "seq_len": SEQ_LEN,
            "steps": args.steps,
            "pretrain_steps": args.pretrain_steps,
            "bytes": {name: len(ids) for name, ids in texts._asdict().items()},
            "adapters": dataclasses.asdict(LORA),
        },
        **about,
        "methods": found,
    }
    record.write(args.output, result)


if __name__ == "__main__":
    main()
