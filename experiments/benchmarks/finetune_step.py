"""Adapter steps beside peft on torch: same base, same adapter, same batch, same card or cores, one interleaved run.

    python -m experiments.benchmarks.finetune_step                      # the tiny model on a CPU, LoRA and QLoRA
    python -m experiments.benchmarks.finetune_step --setting 7b-lora    # on a GPU; --list shows all settings
    python -m experiments.benchmarks.finetune_step --setting 7b-qlora   # under a hard limit of 8 GB per process

Hardware: 2 CPU cores for `tiny`, one 141 GB GPU for the others; needs torch, transformers, peft and accelerate, and
bitsandbytes for peft over four bits
Time: 3 minutes on a CPU; the settings for a GPU have not been run yet

Adapters of rank 16 on every linear layer, written once in PEFT's layout and read by every contender. A step is forward,
backward, clipping and AdamW on the adapters. LoRA stands on the checkpoint as it is, QLoRA on NF4 with doubly quantised
scales: ours quantises every matrix, head included; peft's goes through bitsandbytes, which leaves the head in 16 bits.
Where bitsandbytes is not installed its contender ends with that message, and the result says so: there is no other peer
for four bits.

The limit of a setting is the allocator's: XLA_PYTHON_CLIENT_MEM_FRACTION = limit / memory of the card, taken as one
block at the start, so that an allocation beyond it fails (each process proves that first). What the driver and the CUDA
libraries load for themselves comes on top, as on any card. torch gets the same share of the card.

LoRA's MFU counts 4 x frozen + 6 x adapter parameters of matrix products + 6 x layers x d x segment length per token.
"""

import argparse
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks import contest, record, train_step
from experiments.benchmarks.contest import Contender
from experiments.benchmarks.train_step import CLIP, PEAK_LR
from internjax.model.config import INTERNLM2_7B, INTERNLM2_20B, TINY, ModelConfig
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.train.flops import formula, training_flops

LORA = LoraConfig(rank=16, alpha=32.0)
OURS = {"lora": None, "qlora": Quantised("nf4", 64, double=True)}
PEERS = ("peft-lora", "peft-lora-compile", "peft-qlora")
TOLERANCE = {"lora": 2e-2, "qlora": 8e-2}
"""Of losses: bfloat16 rounds in another order, and NF4 blocks are cut in another way."""


class Setting(NamedTuple):
    """What is trained, by whom, and what each process may allocate on the device."""

    step: train_step.Setting
    contenders: tuple[str, ...]
    limit: int | None = None
    """Bytes; None: all of the card."""


def _in_bfloat16(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, remat="full", attention="cudnn", param_dtype="bfloat16")


SETTINGS = {
    "tiny": Setting(
        train_step.Setting(dataclasses.replace(TINY, unroll_layers=TINY.num_layers), 4, 256), (*OURS, *PEERS)
    ),
    "7b-lora": Setting(
        train_step.Setting(_in_bfloat16(INTERNLM2_7B), 1, 4096, num_segments=4),
        ("lora", "peft-lora", "peft-lora-compile"),
    ),
    "7b-qlora": Setting(train_step.Setting(_in_bfloat16(INTERNLM2_7B), 1, 2048), ("qlora", "peft-qlora"), 8 * 10**9),
    "7b-qlora-beside-lora": Setting(train_step.Setting(_in_bfloat16(INTERNLM2_7B), 1, 2048), ("lora", "qlora")),
    "20b-qlora": Setting(train_step.Setting(_in_bfloat16(INTERNLM2_20B), 1, 2048), ("qlora", "peft-qlora"), 16 * 10**9),
}


# --- contenders ------------------------------------------------------------------------------------------------------


def _internjax(setting: Setting, base: Path, adapter: Path, *, quantised: Quantised | None) -> Contender:
    import jax

    from internjax.hf.adapter import load_adapter
    from internjax.hf.open import open_model
    from internjax.train.losses import next_token
    from internjax.train.optimizer import AdamW, Constant, make_optimizer
    from internjax.train.step import init_state, make_step

    if setting.limit is not None:
        prove_limit(setting.limit)
    config = setting.step.model
    opened = open_model(base, quantize=quantised)
    weights = load_adapter(adapter, model_config=config).weights
    adamw = AdamW(peak_lr=PEAK_LR, clip_norm=CLIP, weight_decay=0.0)
    optimizer = make_optimizer(adamw, Constant(), num_steps=1_000_000)
    trained = jax.tree.map(lambda leaf: leaf.astype("float32"), weights)
    state = init_state(trained, optimizer, frozen=opened.params)
    step = make_step(next_token(config, lora_config=LORA), optimizer)

    def run(position: int) -> float:
        nonlocal state
        state, metrics = step(state, train_step.batch_at(setting.step, position))
        return float(metrics["loss"])

    return Contender(run, contest.peak_bytes)


def prove_limit(limit: int) -> None:
    """Ends the process unless the device refuses an allocation just beyond `limit` bytes."""
    import jax
    import jax.numpy as jnp

    try:
        jnp.zeros(limit + (1 << 20), jnp.uint8).block_until_ready()
    except jax.errors.JaxRuntimeError as error:
        assert "RESOURCE_EXHAUSTED" in str(error), error
        return
    raise SystemExit(f"error: the device gave more than the limit of {limit} bytes: nothing would be shown by this run")


def _peft(setting: Setting, base: Path, adapter: Path, *, four_bits: bool, compiled: bool) -> Contender:
    import peft
    import torch
    import transformers

    cuda, config = torch.cuda.is_available(), setting.step.model
    torch.set_num_threads(os.cpu_count() or 1)
    if cuda and setting.limit is not None:
        torch.cuda.set_per_process_memory_fraction(setting.limit / torch.cuda.get_device_properties(0).total_memory)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    how = {"dtype": dtype, "attn_implementation": "sdpa", "device_map": {"": "cuda" if cuda else "cpu"}}
    if four_bits:
        import bitsandbytes  # noqa: F401  said before transformers wraps the message

        how["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **how)
    recompute = config.remat == "full"
    if four_bits:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=recompute)
    elif recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).train()
    return train_step.torch_contender(model, setting.step, compiled=compiled)


def worker(name: str, setting: Setting, folder: Path) -> None:
    """Is the contender `name`, in a process of its own."""
    base, adapter = folder / "base", folder / "adapter"
    if name in OURS:
        contest.work(lambda: _internjax(setting, base, adapter, quantised=OURS[name]))
    else:
        four_bits, compiled = "qlora" in name, name.endswith("compile")
        contest.work(lambda: _peft(setting, base, adapter, four_bits=four_bits, compiled=compiled))


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(names: Sequence[str], name: str, *, num_blocks: int, block: int) -> dict[str, Any]:
    """Returns the figures of the contenders `names` on a setting."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as root:
        write_inputs(setting, Path(root))
        start = ["-m", "experiments.benchmarks.finetune_step", "--setting", name, "--folder", root, "--worker"]
        answers = contest.measure(
            {who: contest.Entry([*start, who], environment(setting)) for who in names},
            num_blocks=num_blocks,
            block=block,
            check=require_equal,
        )
    step = setting.step
    tokens = step.batch_size * step.seq_len
    flops = tokens * training_flops(step.model, seq_len=step.seq_len // step.num_segments, lora_config=LORA)
    return {who: contest.figures(each, tokens=tokens, flops=flops) for who, each in answers.items()}


def require_equal(losses: Mapping[str, list[float]]) -> None:
    """Ends the run when contenders on the same base, whole or in four bits, do not train the same model."""
    for base, tolerance in TOLERANCE.items():
        same = {who: given for who, given in losses.items() if ("qlora" in who) == (base == "qlora")}
        contest.require_equal(same, tolerance=tolerance)


def environment(setting: Setting) -> dict[str, str]:
    """Returns the variables under which jax's allocator has the limit of the setting, as one block from the start."""
    if setting.limit is None:
        return {}
    share = setting.limit / device_memory()
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.6f}", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def device_memory() -> int:
    """Returns the bytes of the first GPU; asked of the driver, since asking jax would take a share of them."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise SystemExit(
            f"error: this setting limits the memory of a GPU, and nvidia-smi found none ({error})"
        ) from error
    return int(said.splitlines()[0]) << 20


def write_inputs(setting: Setting, folder: Path) -> None:
    """Writes random weights and an adapter of the benchmark's kind: FOLDER/base and FOLDER/adapter."""
    import jax

    from internjax.hf.adapter import save_adapter
    from internjax.model import decoder
    from internjax.model.lora import init_lora

    config = dataclasses.replace(setting.step.model, attention="xla", remat="none")
    train_step.write_model(setting.step.model, folder / "base")
    with jax.default_device(jax.devices("cpu")[0]):
        weights = init_lora(LORA, decoder.abstract_params(config), jax.random.key(1))
    save_adapter(folder / "adapter", LORA, weights, folder / "base", model_config=config)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.finetune_step", description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument("--list", action="store_true", help="show the settings and end")
    parser.add_argument("--contenders", nargs="+", choices=(*OURS, *PEERS), help="default: the setting's")
    parser.add_argument("--blocks", type=int, default=7, help="turns of every contender")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn")
    parser.add_argument("--output", type=Path, help="default: results/finetune_step_SETTING.json")
    parser.add_argument("--worker", choices=(*OURS, *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.list:
        for name, each in SETTINGS.items():
            limit = "" if each.limit is None else f", at most {each.limit / 1e9:.0f} GB per process"
            print(f"{name:22} {each.step.batch_size} x {each.step.seq_len} tokens: {', '.join(each.contenders)}{limit}")
        return
    setting = SETTINGS[args.setting]
    if args.worker:
        worker(args.worker, setting, args.folder)
        return
    # This process looks at the card as well, and must leave it to the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    about = record.environment()
    found = measure(args.contenders or setting.contenders, args.setting, num_blocks=args.blocks, block=args.steps)
    ratios = {
        ours: contest.ratio(found, ours=ours, peers=[who for who in found if who.startswith(f"peft-{ours}")])
        for ours in OURS
        if ours in found
    }
    result = {
        "what": "seconds of one adapter step (forward, backward, clip, AdamW), medians of interleaved blocks",
        "setting": {"name": args.setting, "limit": setting.limit, **setting.step._asdict()},
        "lora": dataclasses.asdict(LORA),
        "formula": formula(setting.step.model, lora_config=LORA),
        **about,
        "contenders": found,
        "ratio": ratios,
    }
    result["setting"]["model"] = dataclasses.asdict(setting.step.model)
    contest.show(found)
    print(f"peft over ours: {ratios}")
    record.write(args.output or record.RESULTS / f"finetune_step_{args.setting}.json", result)
    if any("failed" in found[ours] for ours in OURS if ours in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
