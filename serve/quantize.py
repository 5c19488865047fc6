"""python -m serve.quantize SRC DST: a model in 4 or 8 bits, as a Hugging Face folder that says what the bits cost.

DST holds AWQ's or GPTQ's tensors, tokenizer and generation config, and quantization_report.json and .md: both models
compared on a part of FILE that was not calibrated on, and along the quantised model's own greedy answers. Past a limit
nothing is written. Exit status: 0, or 1 with one message.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from internjax.hf.open import Model
    from internjax.hf.quantized import Quantization
    from internjax.text.tokenizer import Tokenizer
    from serve.quality import Answers, Quality

REPORT = "quantization_report"
HELD_OUT_ROWS = 32
"""Rows of FILE that both models are compared on, at most; at most a fifth of it."""
PROMPT_TOKENS, ANSWER_TOKENS = 64, 512
"""Of plain text, with which a long answer begins; of the answer."""
SHOWN_ANSWERS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        return quantize(args)
    except (ValueError, OSError) as error:
        print(f"serve.quantize: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve.quantize", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("model", metavar="SRC", help="Hugging Face folder, adapter folder, BASE+ADAPTER, run folder, hf:ORG/NAME")
    add("folder", metavar="DST", help="folder to write; `python -m serve DST` answers from it")
    add("--method", choices=("awq", "gptq", "rtn"), default="awq", help="rtn: to nearest (default: %(default)s)")
    add("--bits", type=int, choices=(4, 8), default=4, help="8 with gptq and rtn (default: %(default)s)")
    add("--group", type=int, default=128, help="inputs that share a scale, -1: all of them (default: %(default)s)")
    add("--symmetric", action=argparse.BooleanOptionalAction, help="no zero points (default: gptq, and rtn in 8 bits)")
    add("--act-order", action="store_true", help="gptq: the inputs that matter most are rounded first")
    add("--rounding", choices=("nearest", "gptq"), help="awq: how values are rounded on its scales (default: gptq)")
    text = parser.add_argument_group("text, to calibrate on and to compare on")
    text.add_argument("--calibration", metavar="FILE", required=True, help="text, or JSONL with text or messages")
    text.add_argument("--calibration-samples", type=int, default=128, help="rows of tokens (default: %(default)s)")
    text.add_argument("--calibration-length", type=int, help="tokens of a row (default: 2048, or what was trained)")
    text.add_argument("--batch-size", type=int, default=8, help="rows at once, at most (default: %(default)s)")
    text.add_argument("--answers", type=int, default=8, help="greedy answers to compare (default: %(default)s)")
    text.add_argument(
        "--answer-length", type=int, help="tokens of an answer (default: 512, or half of what was trained)"
    )
    limits = parser.add_argument_group("limits, past which nothing is written")
    limits.add_argument("--max-perplexity-increase", type=float, default=3.0, help="in percent (default: %(default)s)")
    limits.add_argument("--max-kl", type=float, default=0.1, help="mean nats, also in answers (default: %(default)s)")
    limits.add_argument("--min-agreement", type=float, default=0.85, help="of the top token (default: %(default)s)")
    limits.add_argument("--accept-any", action="store_true", help="write it in any case; the report tells")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of what is not quantised (default: as in SRC)")
    add("--layout", help="names of the tensors (default: the first that holds the model)")
    add("--shard-size", default="5GB", help="largest weight file (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace DST if it is a model folder")
    add("--allow-unknown", nargs="+", default=(), metavar="FIELD", help="of config.json, left unread")
    return parser


def quantize(args: argparse.Namespace) -> int:
    """Quantises as the flags say, and returns the exit status."""
    from internjax.compile_cache import keep_programs
    from internjax.hf.folder import check_target
    from internjax.hf.open import open_model
    from internjax.hf.provenance import provenance_of
    from internjax.hf.resolve import CONFIG
    from internjax.hf.save import proof_logits, save_model

    quantization = quantization_of(args)  # what flags alone show to be impossible, before anything is read
    check_target(Path(args.folder).absolute(), overwrite=args.overwrite, marker=CONFIG)
    keep_programs()
    start = time.monotonic()
    model = _whole(open_model(args.model, allow_unknown=args.allow_unknown), args.model)
    _check_widths(model, quantization, args.layout)
    text = read_text(args, model)
    print(
        f"calibration on {text.calibration.shape[0]} rows of {text.calibration.shape[1]} tokens, comparison on "
        f"{text.held_out.shape[0]} rows and {len(text.prompts)} answers of up to {text.answer_length} tokens",
        flush=True,
    )
    params = quantized_params(model, text.calibration, args, on_layer=Bar(model.config.num_layers))
    source_logits = proof_logits(model.config, model.params)
    report = measure(model, params, text, args)
    report["seconds"] = round(time.monotonic() - start, 1)
    print(report_text(report).partition("\n## Answers")[0], flush=True)
    if report["past"] and not args.accept_any:
        raise ValueError(
            f"{args.folder} is not written: {'; '.join(report['past'])}. Take a smaller --group, another --method or "
            "--bits 8, more or other calibration text, raise the limit, or --accept-any"
        )
    save_model(
        args.folder,
        config=model.config,
        params=params,
        tokenizer=model.tokenizer,
        generation=model.generation,
        layout=args.layout,
        dtype=args.dtype,
        shard_size=args.shard_size,
        provenance=provenance_of(model.source) | {"quantised from": args.model, "quantised by": report["method"]},
        overwrite=args.overwrite,
        source_logits=source_logits,
        quantization=quantization,
        texts={
            f"{REPORT}.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
            f"{REPORT}.md": report_text(report),
        },
    )
    print(f"written: {args.folder}, with {REPORT}.md; python -m serve {args.folder} answers")
    return 0


def quantization_of(args: argparse.Namespace) -> Quantization:
    """Returns how the folder will be packed; raises ValueError for flags that do not go together."""
    from internjax.hf.quantized import Quantization

    symmetric = args.symmetric
    if symmetric is None:
        symmetric = args.method == "gptq" or (args.method == "rtn" and args.bits == 8)
    wrong = []
    if args.method == "awq" and (args.bits != 4 or symmetric):
        wrong.append("AWQ's layout has 4 bits and zero points: leave --bits 8 and --symmetric to gptq and rtn")
    if args.act_order and args.method != "gptq":
        wrong.append("--act-order is a choice of --method gptq")
    if args.rounding is not None and args.method != "awq":
        wrong.append("--rounding is a choice of --method awq")
    if args.group < 1 and args.group != -1:
        wrong.append(f"--group is {args.group}; give a positive number, or -1 for one group")
    for name in ("calibration_samples", "batch_size", "answers", "answer_length"):
        if (value := getattr(args, name)) is not None and value < 1:
            wrong.append(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if wrong:
        raise ValueError("; ".join(wrong))
    if args.method == "awq" or (args.method == "rtn" and args.bits == 4 and not symmetric):
        return Quantization("awq", group=args.group)
    # Readers of GPTQ's first format disagree over a zero point of 0, which only asymmetric weights have.
    return Quantization("gptq", bits=args.bits, group=args.group, symmetric=symmetric, zeros_less_one=symmetric)


def _whole(model: Model, source: str) -> Model:
    """Returns the model with its adapters merged; raises ValueError for one that cannot be quantised."""
    import dataclasses

    from internjax.hf.convert import merge_in_place

    if model.quantization is not None:
        raise ValueError(f"{source} is quantised already ({model.quantization}); give the model it was made of")
    if model.config.head != "lm":
        raise ValueError(f"{source} scores texts and has no next token to compare; give a language model")
    if model.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, and text is to be read; add the tokenizer's files")
    if model.lora is not None:
        merge_in_place(model.params, model.lora)
        print(f"adapters of {source} are merged before it is quantised")
    return dataclasses.replace(model, lora=None)


def _check_widths(model: Model, quantization: Quantization, layout: str | None) -> None:
    """Raises ValueError where groups or words do not fit the model, before it is worked on."""
    from internjax.hf.families import fitting_layout, layout_family
    from internjax.hf.quantized import is_packed, packed_shapes

    family = layout_family(layout or fitting_layout(model.config))
    for row in family.rows(model.config):
        if is_packed(row, quantization, model.config):
            packed_shapes(row, quantization, model.config)


# --- text ------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Token ids."""

    calibration: np.ndarray
    """`[N, T]`"""
    held_out: np.ndarray
    """`[N, T]`, the end of what was read."""
    prompts: list[list[int]]
    """What answers begin with, from the part held out."""
    answer_length: int


def read_text(args: argparse.Namespace, model: Model) -> Text:
    """Returns rows of the file's tokens, document after document; raises ValueError where there are too few."""
    import numpy as np

    length = args.calibration_length or min(2048, model.config.max_position_embeddings)
    if length < 2:
        raise ValueError(f"--calibration-length is {length}; a row needs at least 2 tokens")
    context = model.config.max_position_embeddings
    answer_length = args.answer_length or min(ANSWER_TOKENS, context // 2)
    room = context - answer_length
    if room < 1:
        raise ValueError(
            f"--answer-length is {answer_length}; an answer and its prompt must fit the {context} tokens that the "
            "model was trained for"
        )
    wanted = (args.calibration_samples + HELD_OUT_ROWS) * length
    ids: list[int] = []
    starts: list[tuple[int, list[int]]] = []
    for document, prompt in _documents(Path(args.calibration), model.tokenizer):
        if 0 < len(prompt) <= room:
            starts.append((len(ids), prompt))
        ids += document
        if len(ids) >= wanted:
            break
    num_rows = min(len(ids), wanted) // length
    held_out = min(HELD_OUT_ROWS, num_rows // 5)
    if held_out < 1:
        raise ValueError(
            f"{args.calibration} has {len(ids):,} tokens, which are {num_rows} rows of {length}; at least 5 are "
            "needed, four to calibrate on and one to compare on. Give more text, or a smaller --calibration-length"
        )
    rows = np.array(ids[: num_rows * length], np.int32).reshape(num_rows, length)
    first = num_rows - held_out
    prompts = [prompt for start, prompt in starts if start >= first * length][: args.answers]
    # Of text without turns, and where too few conversations begin in the part held out.
    begin = max(1, min(PROMPT_TOKENS, length // 2, room))
    evenly = np.linspace(0, held_out * length - begin, args.answers - len(prompts)).astype(int)
    prompts += [rows[first:].reshape(-1)[start : start + begin].tolist() for start in evenly]
    return Text(rows[:first][: args.calibration_samples], rows[first:], prompts, answer_length)


def in_batches(rows: np.ndarray, most: int) -> np.ndarray:
    """Returns the rows `[N, T]` as equal batches `[N / B, B, T]`, of as many rows as divide N, at most `most`."""
    size = next(size for size in range(most, 0, -1) if len(rows) % size == 0)
    return rows.reshape(-1, size, rows.shape[1])


def _documents(file: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the token ids of each document, and of the prompt that a conversation begins with (else none)."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    with open(file, encoding="utf-8") as stream:
        if file.suffix not in (".jsonl", ".json"):
            while block := stream.readlines(1 << 20):
                yield begin + tokenizer.encode("".join(block)), []
                begin = []
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield _document(json.loads(line), tokenizer, begin)
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error


def _document(row: Any, tokenizer: Tokenizer, begin: list[int]) -> tuple[list[int], list[int]]:
    from internjax.text.chat import from_openai, render

    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return begin + tokenizer.encode(row["text"]), []
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError('give JSON objects with "text", or with "messages" as OpenAI has them')
    messages = from_openai(row["messages"])
    roles = [message.role for message in messages]
    asked = messages[: roles.index("assistant")] if "assistant" in roles else []
    prompt = render(asked, tokenizer, add_generation_prompt=True).ids if asked else []
    return render(messages, tokenizer).ids, prompt


# --- weights and measures --------------------------------------------------------------------------------------------


class Bar:
    """Says which layer is done: a bar on a terminal, lines elsewhere."""

    def __init__(self, num_layers: int):
        self._num_layers, self._start, self._bar = num_layers, time.monotonic(), None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=num_layers, unit="layer", desc="quantised")

    def __call__(self, layer: int) -> None:
        if self._bar is not None:
            self._bar.update(1)
            if layer == self._num_layers:
                self._bar.close()
            return
        print(f"layer {layer}/{self._num_layers}  {time.monotonic() - self._start:.0f} s", file=sys.stderr, flush=True)


def quantized_params(
    model: Model, calibration: np.ndarray, args: argparse.Namespace, *, on_layer: Callable[[int], Any]
) -> dict:
    """Returns the parameters with the kernels of the layers quantised by the method; the head stays whole."""
    import functools

    from internjax.model import awq, gptq
    from internjax.model.calibrate import quantize_layers

    quantization = quantization_of(args)
    how = {"scheme": quantization.scheme, "group": args.group, "symmetric": quantization.symmetric}
    if args.method == "rtn":
        quantize_layer, rows = functools.partial(_round_layer, **how), []
    else:
        rows = in_batches(calibration, args.batch_size)
        if args.method == "awq":
            config = {"config": model.config, "group": args.group, "rounding": args.rounding or "gptq"}
            quantize_layer = functools.partial(awq.quantize_layer, **config)
        else:
            quantize_layer = functools.partial(gptq.quantize_layer, act_order=args.act_order, **how)
    return quantize_layers(model.params, rows, config=model.config, quantize_layer=quantize_layer, on_layer=on_layer)


def _round_layer(layer: dict, statistics: None, *, scheme: str, group: int, symmetric: bool) -> dict:
    """Returns one layer's parameters with every kernel rounded to nearest."""
    import jax

    from internjax.model.quantize import quantize_array

    def leaf(path, value):
        if path[-1].key != "kernel":
            return value
        size = value.shape[0] if group == -1 else group
        return quantize_array(value, scheme=scheme, group=size, symmetric=symmetric, scale_dtype="float16")

    return jax.tree_util.tree_map_with_path(leaf, layer)


def measure(model: Model, params: dict, text: Text, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report: JSON values. `past` names the limits that are exceeded."""
    import jax

    from serve.quality import answers, compare

    quality = compare(model.params, params, in_batches(text.held_out, args.batch_size), config=model.config)
    how = {"max_new_tokens": text.answer_length, "stop_ids": model.generation.eos_ids}
    answered = answers(model.params, params, text.prompts, config=model.config, **how)
    num_bytes = [sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in (model.params, params)]
    quantization = quantization_of(args)
    extra = {"awq": f", rounding {args.rounding or 'gptq'}", "gptq": ", act order" if args.act_order else ""}
    return {
        "format": 1,
        "source": args.model,
        "method": f"{args.method}{extra.get(args.method, '')}",
        "packing": str(quantization),
        "symmetric": quantization.symmetric,
        "computed": f"{model.config.dtype} on {jax.devices()[0].device_kind}",
        "bytes": {"before": num_bytes[0], "after": num_bytes[1]},
        "calibration": {"file": Path(args.calibration).name, "rows": list(text.calibration.shape)},
        "held_out": {"rows": list(text.held_out.shape)} | _numbers(quality),
        "answers": _numbers(answered.quality)
        | {"first_differences": answered.first_differences, "lengths": answered.lengths}
        | {"shown": _shown(model, text, answered)},
        "limits": {
            "perplexity_increase": args.max_perplexity_increase,
            "kl_mean": args.max_kl,
            "top1_agreement": args.min_agreement,
        },
        "past": _past(quality, answered.quality, args),
    }


def _numbers(quality: Quality) -> dict[str, Any]:
    return quality._asdict() | {"perplexity_increase": quality.perplexity_increase}


def _past(held_out: Quality, answered: Quality, args: argparse.Namespace) -> list[str]:
    found = []
    # Written so that a number that is none is past every limit.
    if not held_out.perplexity_increase <= args.max_perplexity_increase:
        found.append(f"perplexity +{held_out.perplexity_increase:.2f} % (limit {args.max_perplexity_increase:g} %)")
    for where, quality in (("held-out text", held_out), ("its own answers", answered)):
        if not quality.kl_mean <= args.max_kl:
            found.append(f"mean KL {quality.kl_mean:.4f} on {where} (limit {args.max_kl:g})")
    if not held_out.top1_agreement >= args.min_agreement:
        found.append(f"top token agrees at {held_out.top1_agreement:.1%} (limit {args.min_agreement:.0%})")
    return found


def _shown(model: Model, text: Text, answered: Answers) -> list[dict[str, str]]:
    said = zip(text.prompts, answered.before, answered.after, strict=True)
    names = ("prompt", "before", "after")
    return [
        {name: model.tokenizer.decode(ids, skip_special=False) for name, ids in zip(names, each, strict=True)}
        for each in list(said)[:SHOWN_ANSWERS]
    ]


def report_text(report: dict[str, Any]) -> str:
    """Returns the report to read, in Markdown."""
    held, answered, limits = report["held_out"], report["answers"], report["limits"]
    sizes = report["bytes"]
    parted = [num for num in answered["first_differences"] if num is not None]
    same = len(answered["first_differences"]) - len(parted)
    middle = f", in the median after {sorted(parted)[len(parted) // 2]} tokens" if parted else ""
    lines = [
        f"# Quantised: {report['packing']} by {report['method']}",
        "",
        f"Of {report['source']}; {sizes['before'] / 2**20:,.1f} MiB became {sizes['after'] / 2**20:,.1f} MiB. "
        f"Compared as computed in {report['computed']}, calibrated on {report['calibration']['rows'][0]} rows of "
        f"{report['calibration']['rows'][1]} tokens of {report['calibration']['file']}.",
        "",
        "| | held-out text | its own greedy answers | limit |",
        "|---|---|---|---|",
        f"| tokens | {held['num_tokens']:,} | {answered['num_tokens']:,} | |",
        f"| perplexity before, after | {held['perplexity_before']:.4f}, {held['perplexity_after']:.4f} | "
        f"{answered['perplexity_before']:.4f}, {answered['perplexity_after']:.4f} | |",
        f"| perplexity increase | {held['perplexity_increase']:.2f} % | {answered['perplexity_increase']:.2f} % | "
        f"{limits['perplexity_increase']:g} % on text |",
        f"| mean KL (nats) | {held['kl_mean']:.5f} | {answered['kl_mean']:.5f} | {limits['kl_mean']:g} |",
        f"| 99th percentile of KL | {held['kl_p99']:.5f} | {answered['kl_p99']:.5f} | |",
        f"| same top token | {held['top1_agreement']:.2%} | {answered['top1_agreement']:.2%} | "
        f"{limits['top1_agreement']:.0%} on text |",
        "",
        f"Of {len(answered['lengths'])} greedy answers of up to {max(answered['lengths'])} tokens {same} are those of "
        f"the model it was made of; {len(parted)} part from them{middle}.",
        "",
        "Past the limits: " + ("; ".join(report["past"]) or "nothing") + ".",
        "",
        "## Answers",
        "",
    ]
    for each in answered["shown"]:
        lines += [f"### {' '.join(each['prompt'].split())[-80:]}", ""]
        lines += [f"- {name}: {' '.join(each[name].split())[:400]}" for name in ("before", "after")] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
