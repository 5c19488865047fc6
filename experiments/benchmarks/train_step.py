"""The training step beside transformers on torch: same weights, same batch, same card or cores, one interleaved run.

    python -m experiments.benchmarks.train_step                       # the tiny model on a CPU
    python -m experiments.benchmarks.train_step --setting 1.8b-4k     # on a GPU; --list shows all settings

Hardware: 2 CPU cores for `tiny` and `small`, one 141 GB GPU for the others; needs torch (make parity installs it)
Time: 3 minutes on a CPU; the settings for a GPU have not been run yet

Every contender is a process of its own. They train in turns, a block of steps each, so that whatever else the machine
does meets all of them; the figure is the median over all blocks, and the ratio is one of medians. A step is forward,
backward, clipping and AdamW, blocked until its loss is on the host. Compilation is told by itself. The losses of the
first steps are compared before anything is timed.

MFU = (6 x matmul parameters + 6 x layers x d x segment length) x tokens per second / peak of the device (bf16, dense).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import record
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, TINY, ModelConfig
from internjax.train.batch import Batch
from internjax.train.flops import FORMULA, mfu, training_flops

PEAK_LR, CLIP = 1e-4, 1.0
NUM_CHECKED = 3
"""Steps whose losses all contenders must agree on."""


class Setting(NamedTuple):
    """What is trained. Rows are full; a row holds `num_segments` documents of equal length."""

    model: ModelConfig
    batch_size: int
    seq_len: int
    num_segments: int = 1
    moment_dtype: str = "float32"


def _on_gpu(model: ModelConfig, remat: str) -> ModelConfig:
    return dataclasses.replace(model, remat=remat, attention="cudnn")


SETTINGS = {
    "tiny": Setting(TINY, 4, 256),
    "small": Setting(
        dataclasses.replace(TINY, d_model=192, num_layers=4, num_heads=3, num_kv_heads=3, ffn_dim=512), 16, 256
    ),
    "1.8b-2k": Setting(_on_gpu(INTERNLM2_1_8B, "dots"), 8, 2048),
    "1.8b-4k": Setting(_on_gpu(INTERNLM2_1_8B, "dots"), 4, 4096, num_segments=4),
    "1.8b-8k": Setting(_on_gpu(INTERNLM2_1_8B, "full"), 2, 8192, num_segments=4),
    "1.8b-32k": Setting(_on_gpu(INTERNLM2_1_8B, "full"), 1, 32768),
    "7b-2k": Setting(_on_gpu(INTERNLM2_7B, "full"), 4, 2048, moment_dtype="bfloat16"),
    "7b-4k": Setting(_on_gpu(INTERNLM2_7B, "full"), 2, 4096, num_segments=4, moment_dtype="bfloat16"),
    "7b-8k": Setting(_on_gpu(INTERNLM2_7B, "full"), 1, 8192, num_segments=4, moment_dtype="bfloat16"),
}
CONTENDERS = ("scanned", "unrolled", "torch-eager", "torch-compile")


def batch_at(setting: Setting, position: int) -> Batch:
    """Returns a batch of random tokens; the same for every contender."""
    B, T, length = setting.batch_size, setting.seq_len, setting.seq_len // setting.num_segments
    tokens = np.random.default_rng((7, position)).integers(3, setting.model.vocab_size, (B, T + 1), np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32) % length, (B, T))
    segments = np.broadcast_to(np.arange(T, dtype=np.int32) // length + 1, (B, T))
    mask = (positions < length - 1) if setting.num_segments > 1 else np.ones((B, T), bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask.astype(np.float32), positions, segments)


# --- contenders ------------------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """step(position) trains on that batch and returns its loss once it is on the host; peak_bytes() of memory."""

    step: Callable[[int], float]
    peak_bytes: Callable[[], int]


def _internjax(setting: Setting, folder: Path, *, unroll: bool) -> Contender:
    import jax

    from internjax.hf.open import open_model
    from internjax.train.losses import next_token
    from internjax.train.optimizer import AdamW, Constant, make_optimizer
    from internjax.train.step import init_state, make_step

    config = dataclasses.replace(setting.model, unroll_layers=setting.model.num_layers if unroll else 1)
    adamw = AdamW(peak_lr=PEAK_LR, clip_norm=CLIP, weight_decay=0.0, moment_dtype=setting.moment_dtype)
    optimizer = make_optimizer(adamw, Constant(), num_steps=1_000_000)
    params = jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), open_model(folder).params)
    state = init_state(params, optimizer)
    step = make_step(next_token(config), optimizer)

    def run(position: int) -> float:
        nonlocal state
        state, metrics = step(state, batch_at(setting, position))
        return float(metrics["loss"])

    return Contender(run, lambda: (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use") or _peak_rss())


def _torch(setting: Setting, folder: Path, *, compiled: bool) -> Contender:
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model = model.to(device).train()
    if setting.model.remat == "full":
        model.gradient_checkpointing_enable()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)

    def loss_of(tokens, targets, mask, positions, visible):
        with torch.autocast(device, torch.bfloat16, enabled=setting.model.dtype == "bfloat16"):
            logits = model(input_ids=tokens, position_ids=positions, attention_mask=visible, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * mask.flatten()).sum() / mask.sum()

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def run(position: int) -> float:
        batch = batch_at(setting, position)
        tokens, targets, positions, segments = (
            torch.from_numpy(np.array(leaf)).long().to(device)
            for leaf in (batch.tokens, batch.targets, batch.positions, batch.segments)
        )
        visible = None
        if setting.num_segments > 1:
            same = segments[:, :, None] == segments[:, None, :]
            visible = (same & torch.ones_like(same).tril())[:, None]
        loss = loss_of(tokens, targets, torch.from_numpy(np.array(batch.loss_mask)).to(device), positions, visible)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        return loss.item()

    return Contender(run, lambda: torch.cuda.max_memory_allocated() if cuda else _peak_rss())


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(name: str, setting: Setting, folder: Path) -> None:
    """Trains blocks of steps when told to ("N" on a line of the input) and answers with a line of JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr; stdout is the answers'
    if name in ("scanned", "unrolled"):
        contender = _internjax(setting, folder, unroll=name == "unrolled")
    else:
        contender = _torch(setting, folder, compiled=name == "torch-compile")
    position = 0
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            started = time.perf_counter()
            losses.append(contender.step(position))
            seconds.append(time.perf_counter() - started)
            position += 1
        answer = {"seconds": seconds, "losses": losses, "peak_bytes": contender.peak_bytes()}
        print(json.dumps(answer), file=out, flush=True)


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], name: str, *, num_blocks: int, block: int) -> dict[str, Any]:
    """Returns the figures of the contenders `names` on a setting."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_model(setting, folder)
        workers = {who: _started(who, name, folder) for who in names}
        try:
            first = {who: _ask(process, who, NUM_CHECKED) for who, process in workers.items()}
            _require_equal(first, setting)
            for who, process in workers.items():
                _ask(process, who, 2)  # what a framework still does lazily is done now
            blocks = [{who: _ask(process, who, block) for who, process in workers.items()} for _ in range(num_blocks)]
        finally:
            for process in workers.values():
                process.kill()
    return {who: _figures(setting, first[who], [block[who] for block in blocks]) for who in names}


def write_model(setting: Setting, folder: Path) -> None:
    """Writes random weights as a Hugging Face folder that every contender starts from."""
    import jax

    from internjax.hf.save import save_model
    from internjax.model import decoder

    plain = dataclasses.replace(setting.model, attention="xla", remat="none")
    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.jit(lambda key: decoder.init(plain, key))(jax.random.key(0))
    save_model(folder, config=plain, params=params, tokenizer=None)


def _started(who: str, setting: str, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.benchmarks.train_step", "--setting", setting]
    command += ["--worker", who, "--folder", str(folder)]
    # Two frameworks share one card: neither may take all of it at the start.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(process: subprocess.Popen, who: str, num_steps: int) -> dict[str, Any]:
    process.stdin.write(f"{num_steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"error: the contender {who} ended with code {process.wait()}; its message stands above")
    return json.loads(line)


def _require_equal(first: dict[str, dict], setting: Setting) -> None:
    tolerance = 1e-3 if setting.model.dtype == "float32" else 3e-2
    losses = {who: answer["losses"] for who, answer in first.items()}
    reference = next(iter(losses.values()))
    if not all(np.allclose(given, reference, atol=tolerance, rtol=0) for given in losses.values()):
        raise SystemExit(f"error: the contenders do not train the same model; losses of the first steps: {losses}")


def _figures(setting: Setting, first: dict, blocks: Sequence[dict]) -> dict[str, Any]:
    import jax

    seconds = sorted(second for block in blocks for second in block["seconds"])
    median, tokens = statistics.median(seconds), setting.batch_size * setting.seq_len
    length = setting.seq_len // setting.num_segments
    used = mfu(training_flops(setting.model, seq_len=length) * tokens, median, 1, jax.devices()[0].device_kind)
    return {
        "first_step_seconds": round(first["seconds"][0], 2),
        "median_seconds": round(median, 5),
        "p99_seconds": round(seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))], 5),
        "tokens_per_second": round(tokens / median),
        "mfu": None if used is None else round(used, 4),
        "peak_bytes": blocks[-1]["peak_bytes"],
        "first_losses": first["losses"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.train_step", description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument("--list", action="store_true", help="show the settings and end")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--blocks", type=int, default=7, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--output", type=Path, help="default: results/train_step_SETTING.json")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.list:
        for name, setting in SETTINGS.items():
            print(f"{name:10} {setting.batch_size} x {setting.seq_len} tokens, {setting.num_segments} per row")
        return
    if args.worker:
        worker(args.worker, SETTINGS[args.setting], args.folder)
        return
    about = record.environment()
    found = measure(args.contenders, args.setting, num_blocks=args.blocks, block=args.steps)
    ours = [who for who in found if not who.startswith("torch")]
    peers = [who for who in found if who.startswith("torch")]
    best = min(ours or found, key=lambda who: found[who]["median_seconds"])
    result = {
        "what": "seconds of one training step (forward, backward, clip, AdamW), medians of interleaved blocks",
        "setting": {"name": args.setting, **SETTINGS[args.setting]._asdict()},
        "formula": FORMULA,
        **about,
        "contenders": found,
        "ratio": {who: round(found[who]["median_seconds"] / found[best]["median_seconds"], 3) for who in peers},
    }
    result["setting"]["model"] = dataclasses.asdict(SETTINGS[args.setting].model)
    for who, figures in found.items():
        used = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
        print(f"{who:14} {figures['median_seconds'] * 1e3:9.1f} ms  {figures['tokens_per_second']:,} tokens/s{used}")
    print(f"torch over {best}: {result['ratio']}")
    record.write(args.output or record.RESULTS / f"train_step_{args.setting}.json", result)


if __name__ == "__main__":
    main()
