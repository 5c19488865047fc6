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
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import contest, record
from experiments.benchmarks.contest import Contender
from internjax.model.config import INTERNLM2_1_8B, INTERNLM2_7B, TINY, ModelConfig
from internjax.train.batch import Batch
from internjax.train.flops import formula, training_flops

PEAK_LR, CLIP = 1e-4, 1.0


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

    return Contender(run, contest.peak_bytes)


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
    return torch_contender(model, setting, compiled=compiled)


def torch_contender(model: Any, setting: Setting, *, compiled: bool) -> Contender:
    """Returns the step of a transformers model on torch: the parameters that ask for gradients are trained."""
    import torch

    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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

    return Contender(run, lambda: torch.cuda.max_memory_allocated() if cuda else contest.peak_rss())


def worker(name: str, setting: Setting, folder: Path) -> None:
    """Is the contender `name`, in a process of its own."""
    if name in ("scanned", "unrolled"):
        contest.work(lambda: _internjax(setting, folder, unroll=name == "unrolled"))
    else:
        contest.work(lambda: _torch(setting, folder, compiled=name == "torch-compile"))


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], name: str, *, num_blocks: int, block: int) -> dict[str, Any]:
    """Returns the figures of the contenders `names` on a setting."""
    setting = SETTINGS[name]
    tolerance = 1e-3 if setting.model.dtype == "float32" else 3e-2
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_model(setting.model, folder)
        start = ["-m", "experiments.benchmarks.train_step", "--setting", name, "--folder", str(folder), "--worker"]
        answers = contest.measure(
            {who: contest.Entry([*start, who]) for who in names},
            num_blocks=num_blocks,
            block=block,
            check=lambda losses: contest.require_equal(losses, tolerance=tolerance),
        )
    tokens, length = setting.batch_size * setting.seq_len, setting.seq_len // setting.num_segments
    flops = training_flops(setting.model, seq_len=length) * tokens
    return {who: contest.figures(each, tokens=tokens, flops=flops) for who, each in answers.items()}


def write_model(model: ModelConfig, folder: Path) -> None:
    """Writes random weights as a Hugging Face folder that every contender starts from."""
    from internjax.hf.save import save_model

    config, params = random_model(model)
    save_model(folder, config=config, params=params, tokenizer=None)


def random_model(model: ModelConfig) -> tuple[ModelConfig, dict]:
    """Returns the model as every framework has it, and random weights on the host's CPU; the same ones every time."""
    import jax

    from internjax.model import decoder

    plain = dataclasses.replace(model, attention="xla", remat="none")
    with jax.default_device(jax.devices("cpu")[0]):
        return plain, jax.jit(lambda key: decoder.init(plain, key))(jax.random.key(0))


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
    # This process looks at the card as well, and must leave it to the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    about = record.environment()
    found = measure(args.contenders, args.setting, num_blocks=args.blocks, block=args.steps)
    ours = [who for who in found if not who.startswith("torch")]
    peers = [who for who in found if who.startswith("torch")]
    best = min(ours or found, key=lambda who: found[who].get("median_seconds", float("inf")))
    result = {
        "what": "seconds of one training step (forward, backward, clip, AdamW), medians of interleaved blocks",
        "setting": {"name": args.setting, **SETTINGS[args.setting]._asdict()},
        "formula": formula(SETTINGS[args.setting].model),
        **about,
        "contenders": found,
        "ratio": contest.ratio(found, ours=best, peers=peers),
    }
    result["setting"]["model"] = dataclasses.asdict(SETTINGS[args.setting].model)
    contest.show(found)
    print(f"torch over {best}: {result['ratio']}")
    record.write(args.output or record.RESULTS / f"train_step_{args.setting}.json", result)


if __name__ == "__main__":
    main()
