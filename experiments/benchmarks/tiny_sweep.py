"""A sweep over the tiny chain's width, vocabulary, sequence length and rate: bits per byte at equal time.

    python -m experiments.benchmarks.tiny_sweep --seconds 60

Hardware: 2 CPU cores
Time: about twice --seconds for each of the settings

Every setting trains for the same wall time (compilation left out) with its own cosine schedule, then predicts the same
held-out text. Beside it stands the interpolated bigram fitted on exactly the tokens that the setting has seen.
"""

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.loading import batches, open_rows
from experiments import tiny_models, tiny_use
from experiments.tiny_config import Tiny
from internjax.model import decoder
from internjax.model.config import TINY, num_params
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Cosine, make_optimizer
from internjax.train.step import init_state, make_step

RESULTS = Path(__file__).parent / "results" / "tiny_sweep.json"


class Setting(NamedTuple):
    """What is varied; everything else is the chain's."""

    vocab_size: int = TINY.vocab_size
    d_model: int = TINY.d_model
    num_layers: int = TINY.num_layers
    ffn_dim: int = TINY.ffn_dim
    seq_len: int = 256
    batch_size: int = 4
    peak_lr: float = 5e-3
    initializer_range: float = TINY.initializer_range


SETTINGS = (
    Setting(),
    Setting(peak_lr=2.5e-3),
    Setting(peak_lr=1e-2),
    Setting(vocab_size=1024),
    Setting(d_model=192, num_layers=4, ffn_dim=512, peak_lr=3e-3),
    Setting(seq_len=128, batch_size=8),
    Setting(batch_size=16),
    Setting(initializer_range=0.02),
)


def configured(setting: Setting) -> Tiny:
    """Returns the chain's config with the setting's values."""
    model = dataclasses.replace(
        TINY,
        vocab_size=setting.vocab_size,
        d_model=setting.d_model,
        num_layers=setting.num_layers,
        num_heads=setting.d_model // TINY.head_dim,
        num_kv_heads=1,
        ffn_dim=setting.ffn_dim,
        initializer_range=setting.initializer_range,
        unroll_layers=setting.num_layers,
    )
    return Tiny(
        model=model,
        seq_len=setting.seq_len,
        batch_size=setting.batch_size,
        pretrain=AdamW(peak_lr=setting.peak_lr, weight_decay=0.1),
    )


def measure(setting: Setting, root: Path, *, seconds: float) -> dict[str, Any]:
    """Returns what a setting reaches in `seconds` of training steps."""
    config = configured(setting)
    tiny_models.tokenizer(config, root)
    rows = open_rows(root / "tokenizer" / "train", seq_len=setting.seq_len, packing="concat", seed=0)
    data = batches(rows, batch_size=setting.batch_size)
    speed = _steps_per_second(config, data)
    num_steps = max(20, int(seconds * speed))
    state, elapsed = _train(config, data, num_steps)
    held_out = tiny_use.held_out_texts(root)
    config = dataclasses.replace(config, pretrain_steps=num_steps)
    return setting._asdict() | {
        "num_params": num_params(config.model),
        "num_steps": num_steps,
        "seconds": round(elapsed, 1),
        "tokens_per_second": round(num_steps * setting.batch_size * setting.seq_len / elapsed),
        "bits_per_byte": tiny_use.bits_per_byte(config, state.trainable, root, held_out),
        "bigram_bits_per_byte": tiny_use.baselines(config, root, held_out).bigram,
    }


def _started(config: Tiny, num_steps: int):
    optimizer = make_optimizer(config.pretrain, Cosine(warmup_steps=min(60, num_steps // 4)), num_steps)
    state = init_state(decoder.init(config.model, jax.random.key(0)), optimizer)
    return state, make_step(next_token(config.model), optimizer)


def _steps_per_second(config: Tiny, data) -> float:
    state, step = _started(config, 40)
    stream, times = data(0), []
    for _ in range(12):
        started = time.perf_counter()
        state, metrics = step(state, next(stream))
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - started)
    return 1 / float(np.median(times[2:]))


def _train(config: Tiny, data, num_steps: int):
    state, step = _started(config, num_steps)
    stream = data(0)
    state, _ = step(state, next(stream))
    started = time.perf_counter()
    for _ in range(num_steps - 1):
        state, metrics = step(state, next(stream))
    jax.block_until_ready(metrics)
    return state, time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.tiny_sweep", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="training time of every setting")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = tiny_models.data(Tiny(), root)
        for setting in SETTINGS:
            rows.append(measure(setting, root, seconds=args.seconds))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "what": "held-out bits per byte after equal training time; lower is better",
        "seconds": args.seconds,
        "corpus": corpus["fingerprint"],
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "settings": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
