"""What 4 bits cost by each method: perplexity, KL divergence and top token on held-out text after equal calibration.

    python -m experiments.benchmarks.quantization --model tiny/pretrain --calibration runs/tiny/data/train.jsonl \\
        --length 256

Hardware: 2 CPU cores for the tiny chain's model, after the chain has run; one GPU for others
Time: four minutes on 2 CPU cores, most of it compilation

Every method sees the same rows and is judged on the same others, the last that are read. Round-to-nearest is the
measure of all: the ratio is the mean divergence of a method over that of round-to-nearest with zero points in the
same groups.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks import record
from internjax.compile_cache import keep_programs
from internjax.hf.open import open_model
from serve import quantize
from serve.quality import compare

METHODS: dict[str, tuple[str, ...]] = {
    "rtn": ("--method", "rtn"),
    "rtn symmetric": ("--method", "rtn", "--symmetric"),
    "awq, rounding nearest": ("--method", "awq", "--rounding", "nearest"),
    "awq": ("--method", "awq"),
    "gptq": ("--method", "gptq"),
    "gptq with zeros": ("--method", "gptq", "--no-symmetric"),
    "gptq with zeros, act order": ("--method", "gptq", "--no-symmetric", "--act-order"),
    "rtn 8 bits": ("--method", "rtn", "--bits", "8"),
}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the methods as text, the least divergence first."""
    lines = [f"{'method':28}{'perplexity':>12}{'KL':>10}{'KL p99':>9}{'top 1':>8}{'ratio':>8}"]
    for name, each in sorted(found.items(), key=lambda item: item[1]["kl_mean"]):
        numbers = f"{each['perplexity_increase']:+11.3f}%{each['kl_mean']:10.5f}{each['kl_p99']:9.4f}"
        lines.append(f"{name:28}{numbers}{each['top1_agreement']:8.2%}{each['kl_over_rtn']:8.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.quantization", description=__doc__)
    parser.add_argument("--model", required=True, help="MODEL with a tokenizer")
    parser.add_argument("--calibration", required=True, help="text, or JSONL with text or messages")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=128, help="rows to calibrate on")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "quantization.json")
    args = parser.parse_args(arguments)
    keep_programs()
    about, model = record.environment(), open_model(args.model)
    common = ["--group", args.group, "--calibration-samples", args.samples, "--calibration-length", args.length]
    common = [args.model, "unused", "--calibration", args.calibration, *map(str, common)]
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(("rtn", *args.methods)):
        flags = quantize.build_parser().parse_args([*common, *METHODS[name]])
        text = quantize.read_text(flags, model)
        start = time.perf_counter()
        params = quantize.quantized_params(model, text.calibration, flags, on_layer=lambda layer: None)
        seconds = time.perf_counter() - start
        quality = compare(model.params, params, quantize.in_batches(text.held_out, 8), config=model.config)
        found[name] = quality._asdict() | {"perplexity_increase": quality.perplexity_increase}
        found[name] |= {"kl_over_rtn": quality.kl_mean / found["rtn"]["kl_mean"], "seconds": round(seconds, 1)}
        print(f"{name}: KL {quality.kl_mean:.5f}, perplexity +{quality.perplexity_increase:.3f} %", flush=True)
    print(table(found))
    result = {
        "what": "a quantised model against the one it was made of, on held-out text: divergence in nats per token",
        "setting": {
            "model": Path(args.model).name,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
            "group": args.group,
            "calibration_rows": list(text.calibration.shape),
            "held_out_rows": list(text.held_out.shape),
        },
        **about,
        "methods": found,
    }
    record.write(args.output, result)


if __name__ == "__main__":
    main()
