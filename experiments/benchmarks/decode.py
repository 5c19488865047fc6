"""Greedy decoding beside transformers on torch: same weights, same prompts, equal tokens, one interleaved run.

    python -m experiments.benchmarks.decode --peer-python PYTHON         # the tiny model on a CPU, batch 1, 8 and 32
    python -m experiments.benchmarks.decode --setting 24m                # a wider model; --list shows all settings
    python -m experiments.benchmarks.decode --batch --guarantees 8       # only what guarantees cost

Hardware: 2 CPU cores that nobody else uses, or one GPU
Needs: torch and transformers in this Python (make parity installs them), or, with --peer-python, in another one that
has jax and flax too
Time: 10 minutes for all contenders on a CPU, most of it torch.compile

Every contender is a process of its own. They generate in turns, so that whatever else the machine does meets all of
them; the figure is the median over all turns. A step is one whole call: reading the prompts and drawing NEW_TOKENS for
every row, until they are on the host. Prompts differ from step to step, and nobody can stop early. The tokens of the
first steps must be equal, for every contender with whole weights, before anything is timed.

generate       internjax.decode.generate, one compiled loop
engine         internjax.decode.engine with as many slots as rows, tokens handed out in blocks as the server does
int8, int4     generate with weights in 8 and 4 bits (other tokens; not compared)
hf-dynamic     transformers generate as it comes: a cache that grows
hf-static      transformers generate with its static cache
hf-compile     the same with torch.compile, as its generate does it

What guarantees cost is measured besides, at one batch size (--guarantees):

drawn, one-key                generate at temperature 1, every row with the key of its seed and position: a request
                              draws the same in any company (L0). one-key: a key for the whole step promises nothing
traffic-fast, traffic-exact   three times as many requests as slots, alike in their first STEM tokens and of mixed
                              lengths, through the engine. exact: no bit depends on other requests (L1)
replay, score                 log-probabilities of given answers, by the step that draws and by the forward pass of
                              training

How far the log-probabilities that the engine reports are from those of that forward pass is measured for the same
traffic, drawn at temperature 1: in both modes, computed in float32 and in bfloat16 (`mismatch`).
"""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import contest, record
from experiments.benchmarks.contest import Contender
from experiments.benchmarks.train_step import write_model
from internjax.model.config import TINY, ModelConfig

Tokens = list[list[int]]


class Setting(NamedTuple):
    """What generates, and how much."""

    model: ModelConfig
    prompt: int = 32
    new_tokens: int = 96


SETTINGS = {
    "tiny": Setting(TINY),
    "24m": Setting(
        dataclasses.replace(TINY, vocab_size=8192, d_model=384, num_layers=8, num_heads=6, num_kv_heads=6, ffn_dim=1024)
    ),
}
EXACT = ("generate", "engine")
OURS = (*EXACT, "int8", "int4")
PEERS = ("hf-dynamic", "hf-static", "hf-compile")
GUARANTEES = ("drawn", "one-key", "traffic-fast", "traffic-exact", "replay", "score")
STEM = 100
"""Tokens that the requests of the traffic begin with: more than a chunk of a prompt, and no multiple of a page."""


def prompts_at(setting: Setting, batch: int, position: int) -> np.ndarray:
    """Returns random prompts `[B, T]`; the same for every contender."""
    rng = np.random.default_rng((11, batch, position))
    return rng.integers(3, setting.model.vocab_size, (batch, setting.prompt), np.int32)


# --- contenders ------------------------------------------------------------------------------------------------------


def _generate(
    setting: Setting, folder: Path, batch: int, *, quantize: str | None = None, temperature: float = 0.0
) -> Callable[[np.ndarray], Tokens]:
    from internjax.decode.generate import generate
    from internjax.decode.sample import make_sampling
    from internjax.hf.open import open_model

    model, lengths_B = open_model(folder, quantize=quantize), np.full(batch, setting.prompt, np.int32)
    sampling = make_sampling(batch, temperature=temperature)

    def run(prompts_BT: np.ndarray) -> Tokens:
        found = generate(
            model.params,
            prompts_BT,
            lengths_B,
            config=model.config,
            sampling=sampling,
            max_new_tokens=setting.new_tokens,
        )
        return np.asarray(found.tokens_BN).tolist()

    return run


def _engine(setting: Setting, folder: Path, batch: int) -> Callable[[np.ndarray], Tokens]:
    from internjax.decode.engine import Engine
    from internjax.decode.request import Request
    from internjax.decode.sample import SamplingParams
    from internjax.hf.open import open_model

    model = open_model(folder)
    length = setting.prompt + setting.new_tokens
    engine = Engine(model.params, model.config, max_context=length, num_slots=batch).start()
    greedy = SamplingParams(temperature=0.0)

    def run(prompts_BT: np.ndarray) -> Tokens:
        requests = [Request(tuple(prompt), setting.new_tokens, greedy) for prompt in prompts_BT.tolist()]
        return [list(handle.result().ids) for handle in [engine.submit(request) for request in requests]]

    return run


def _draw_with_one_key() -> None:
    """Makes every draw that is compiled from now on take one key for the whole step, not one for each row."""
    import jax

    from internjax.decode import sample

    def uniforms(seed_B, positions_B):
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed_B[0]), positions_B[0]), positions_B.shape)

    sample.uniforms = uniforms


def _requests(setting: Setting, prompts_BT: np.ndarray, *, temperature: float, logprobs: int | None = None) -> list:
    """Returns three requests for every prompt, alike in their first STEM tokens and of mixed lengths."""
    from internjax.decode.request import Request
    from internjax.decode.sample import SamplingParams

    rng = np.random.default_rng(prompts_BT[0])
    stem = rng.integers(3, setting.model.vocab_size, STEM).tolist()
    requests = []
    for seed, prompt in enumerate(np.tile(prompts_BT, (3, 1))):
        own, sampling = prompt[: rng.integers(1, setting.prompt + 1)].tolist(), SamplingParams(temperature, seed=seed)
        length = int(rng.integers(1, setting.new_tokens + 1))
        requests.append(Request((*stem, *own), length, sampling, logprobs=logprobs))
    return requests


def _traffic(setting: Setting, folder: Path, batch: int, *, mode: str) -> Callable[[np.ndarray], Tokens]:
    from internjax.decode.engine import Engine
    from internjax.hf.open import open_model

    model = open_model(folder)
    length = STEM + setting.prompt + setting.new_tokens
    engine = Engine(model.params, model.config, max_context=length, num_slots=batch, mode=mode).start()

    def run(prompts_BT: np.ndarray) -> Tokens:
        requests = _requests(setting, prompts_BT, temperature=0.0)
        return [list(handle.result().ids) for handle in [engine.submit(request) for request in requests]]

    return run


def _given_answers(setting: Setting, folder: Path, batch: int, *, replayed: bool) -> Callable[[np.ndarray], Tokens]:
    import jax

    from internjax.decode.generate import replay
    from internjax.decode.sample import make_sampling
    from internjax.decode.score import logprobs
    from internjax.hf.open import open_model

    model, lengths_B = open_model(folder), np.full(batch, setting.prompt, np.int32)
    answer_lengths_B, sampling = np.full(batch, setting.new_tokens, np.int32), make_sampling(batch)
    score = jax.jit(logprobs, static_argnames="config")

    def run(prompts_BT: np.ndarray) -> Tokens:
        # Which tokens they are makes no difference to the time.
        shape = batch, setting.new_tokens
        answers_BN = np.random.default_rng(prompts_BT[0]).integers(3, setting.model.vocab_size, shape, np.int32)
        if replayed:
            given = (prompts_BT, lengths_B, answers_BN, answer_lengths_B)
            found = replay(model.params, *given, config=model.config, sampling=sampling)
        else:
            found = score(model.params, np.concatenate([prompts_BT, answers_BN], axis=1), config=model.config)
        np.asarray(found)
        return []

    return run


def _transformers(setting: Setting, folder: Path, *, static: bool, compiled: bool) -> Callable[[np.ndarray], Tokens]:
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # more threads than cores wait for one another
    dtype = getattr(torch, setting.model.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).eval()
    model.generation_config.eos_token_id = None  # so nothing ends early, and nothing is asked for each token
    how: dict[str, Any] = {"cache_implementation": "static"} if static else {}
    if compiled:
        how["compile_config"] = transformers.CompileConfig(mode="reduce-overhead" if device == "cuda" else "default")
        how["compile_config"]._compile_all_devices = True  # on a CPU its generate would not compile otherwise
    else:
        how["disable_compile"] = True

    def run(prompts_BT: np.ndarray) -> Tokens:
        ids_BT = torch.from_numpy(prompts_BT).long().to(device)
        with torch.inference_mode():
            out = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=setting.new_tokens,
                do_sample=False,
                pad_token_id=0,
                **how,
            )
        if compiled and not hasattr(model, "_compiled_call"):
            raise RuntimeError("transformers did not compile: this contender would be hf-static under another name")
        return out[:, setting.prompt :].tolist()

    return run


def contender(name: str, setting: Setting, folder: Path, batch: int) -> Contender:
    """Returns the contender `name`: a step generates for the prompts at its position and returns their tokens."""
    if name == "engine":
        run = _engine(setting, folder, batch)
    elif name in ("drawn", "one-key"):
        if name == "one-key":
            _draw_with_one_key()
        run = _generate(setting, folder, batch, temperature=1.0)
    elif name.startswith("traffic-"):
        run = _traffic(setting, folder, batch, mode=name.removeprefix("traffic-"))
    elif name in ("replay", "score"):
        run = _given_answers(setting, folder, batch, replayed=name == "replay")
    elif name in OURS:
        run = _generate(setting, folder, batch, quantize=None if name == "generate" else name)
    else:
        run = _transformers(setting, folder, static=name != "hf-dynamic", compiled=name == "hf-compile")
    peak = _torch_peak if name in PEERS else contest.peak_bytes
    return Contender(lambda position: run(prompts_at(setting, batch, position)), peak)


def _torch_peak() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else contest.peak_rss()


# --- the run ---------------------------------------------------------------------------------------------------------


def require_equal_tokens(found: Mapping[str, Sequence[Tokens]]) -> None:
    """Ends the run when contenders with whole weights draw different tokens."""
    exact = {who: np.asarray(tokens) for who, tokens in found.items() if who in EXACT + PEERS}
    reference = next(iter(exact), None)
    for who, tokens in exact.items():
        if tokens.shape != exact[reference].shape:
            raise SystemExit(f"error: {who} drew {tokens.shape} tokens, {reference} {exact[reference].shape}")
        if (differs := np.argwhere(tokens != exact[reference])).size:
            step, row, place = differs[0]
            raise SystemExit(
                f"error: {who} and {reference} draw different tokens: step {step}, row {row}, from token {place} on "
                f"({tokens[step, row, place]} and {exact[reference][step, row, place]})"
            )


def measure(
    names: Sequence[str], name: str, batch: int, *, num_blocks: int, block: int, peer_python: str
) -> dict[str, Any]:
    """Returns the figures of the contenders `names` on a setting, `batch` rows at once."""
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model"
        write_model(setting.model, folder)
        flags = ["--setting", name, "--folder", str(folder), "--batch", str(batch), "--worker"]
        start = ["-m", "experiments.benchmarks.decode", *flags]
        entries = {who: contest.Entry([*start, who]) for who in names}
        entries |= {who: entries[who]._replace(python=peer_python) for who in names if who in PEERS}
        answers = contest.measure(entries, num_blocks=num_blocks, block=block, check=require_equal_tokens)
    return {who: figures(each, setting, batch) for who, each in answers.items()}


def figures(answers: contest.Answers, setting: Setting, batch: int) -> dict[str, Any]:
    """Returns the figures of one contender: seconds of a whole call, and new tokens per second."""
    found = contest.figures(answers, tokens=batch * setting.new_tokens, flops=0.0)
    return {name: value for name, value in found.items() if name not in ("mfu", "first_losses")}


def costs(found: Mapping[str, dict]) -> dict[str, float]:
    """Returns what guarantees cost, as seconds with over seconds without; 1 is nothing. Only of what was measured."""
    pairs = {
        "L0: drawn / one-key": ("drawn", "one-key"),
        "L1: traffic-exact / traffic-fast": ("traffic-exact", "traffic-fast"),
        "replay / drawn": ("replay", "drawn"),
        "replay / score": ("replay", "score"),
    }
    ratios = {
        name: contest.ratio(found, ours=without, peers=[having])
        for name, (having, without) in pairs.items()
        if {having, without} <= found.keys()
    }
    return {name: ratio for name, each in ratios.items() for ratio in each.values()}


def mismatch(setting: Setting, batch: int, *, dtypes: Sequence[str] = ("float32", "bfloat16")) -> dict[str, dict]:
    """Returns, by dtype and mode, how far the engine's log-probabilities of its own tokens are from the trainer's.

    Per token |log p of the engine - log p of `decode.score.logprobs`|, both of the same weights, computed in `dtype`.
    """
    import jax

    from experiments.benchmarks.train_step import random_model
    from internjax.decode.engine import Engine
    from internjax.decode.score import logprobs

    plain, params = random_model(setting.model)
    score = jax.jit(logprobs, static_argnames="config")
    requests = _requests(setting, prompts_at(setting, batch, 0), temperature=1.0, logprobs=0)
    length, found = STEM + setting.prompt + setting.new_tokens, {}
    for dtype in dtypes:
        config, found[dtype] = dataclasses.replace(plain, dtype=dtype), {}
        for mode in ("fast", "exact"):
            engine = Engine(params, config, max_context=length, num_slots=batch, mode=mode)
            handles = [engine.submit(request) for request in requests]
            while engine.tick():
                pass
            results = [handle.result() for handle in handles]
            rows = [[*request.tokens, *result.ids] for request, result in zip(requests, results)]
            tokens_BT = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)  # causal: no influence
            scores_BT = np.asarray(score(params, tokens_BT, config=config))
            differences = np.abs(
                np.concatenate(
                    [
                        scores_T[len(request.tokens) : len(request.tokens) + len(result.ids)] - result.logprobs
                        for scores_T, request, result in zip(scores_BT, requests, results)
                    ]
                )
            )
            found[dtype][mode] = {
                "tokens": differences.size,
                "mean": float(differences.mean()),
                "max": float(differences.max()),
            }
    return found


def show_mismatch(found: Mapping[str, Mapping[str, dict]]) -> None:
    """Prints a line for every dtype and mode."""
    for dtype, by_mode in found.items():
        for mode, each in by_mode.items():
            print(
                f"|log p, engine - trainer|  {dtype:8} {mode:5}  mean {each['mean']:.1e}, max {each['max']:.1e} "
                f"of {each['tokens']:,} tokens",
                flush=True,
            )


def show(found: Mapping[str, dict], batch: int) -> None:
    """Prints a line for every contender."""
    for who, each in found.items():
        said = each.get("failed") or (
            f"{each['median_seconds'] * 1e3:9.1f} ms  {each['tokens_per_second']:8,} tokens/s, "
            f"{each['peak_bytes'] / 1e9:.2f} GB"
        )
        print(f"batch {batch:3}  {who:12} {said}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.decode", description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="tiny")
    parser.add_argument("--list", action="store_true", help="show the settings and end")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32], help="rows at once")
    parser.add_argument("--contenders", nargs="+", choices=OURS + PEERS, default=list(OURS + PEERS))
    note = "rows at which the cost of guarantees is measured; 0: not at all"
    parser.add_argument("--guarantees", type=int, default=8, metavar="BATCH", help=note)
    parser.add_argument("--blocks", type=int, default=7, help="turns of every contender, 5 at least")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    contest.add_peer_python(parser)
    parser.add_argument("--output", type=Path, help="default: results/decode_SETTING.json")
    parser.add_argument("--worker", choices=OURS + PEERS + GUARANTEES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.list:
        for name, (model, prompt, new_tokens) in SETTINGS.items():
            print(f"{name:10} {model.num_layers} x {model.d_model}, {prompt} + {new_tokens} tokens")
        return
    setting = SETTINGS[args.setting]
    if args.worker:
        is_served = args.worker == "engine" or args.worker.startswith("traffic-")
        contest.work(lambda: contender(args.worker, setting, args.folder, args.batch[0]), keeps_memory=not is_served)
        return
    if args.blocks < 5:
        parser.error(f"--blocks {args.blocks}: a median of fewer than 5 turns says little")
    # This process looks at the card as well, and must leave it to the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    about, peer_packages = record.environment(), contest.packages_of(args.peer_python)
    how = {"num_blocks": args.blocks, "block": args.steps, "peer_python": args.peer_python}
    found, ratios, guarantees, apart = {}, {}, {}, {}
    for batch in args.batch:
        found[batch] = measure(args.contenders, args.setting, batch, **how)
        show(found[batch], batch)
        peers = [who for who in found[batch] if who in PEERS]
        ratios[batch] = {
            ours: contest.ratio(found[batch], ours=ours, peers=peers) for ours in args.contenders if ours in OURS
        }
    if args.guarantees:
        guarantees = measure(GUARANTEES, args.setting, args.guarantees, **how)
        # Requests of mixed lengths: seconds alone can be compared.
        guarantees |= {who: each | {"tokens_per_second": None} for who, each in guarantees.items() if "traffic" in who}
        apart = mismatch(setting, args.guarantees)
    result = {
        "what": "seconds of one greedy generate call (prompts read, new tokens drawn), medians of interleaved blocks",
        "setting": {"name": args.setting, **setting._asdict(), "model": dataclasses.asdict(setting.model)},
        "formula": "tokens per second = batch x new tokens / median seconds of a call; ratio = peer's seconds / ours",
        **about,
        "peer_packages": peer_packages,
        "contenders": found,
        "ratio": ratios,
        "guarantees": {
            "batch": args.guarantees,
            "contenders": guarantees,
            "cost": costs(guarantees),
            "mismatch": {"formula": "per token drawn, |log p reported by the engine - log p by score|", **apart},
        },
    }
    show_mismatch(apart)
    print(f"transformers over ours: {ratios}\nwhat guarantees cost: {costs(guarantees)}")
    record.write(args.output or record.RESULTS / f"decode_{args.setting}.json", result)
    everyone = [*found.values(), guarantees]
    if any("failed" in each for by_name in everyone for who, each in by_name.items() if who not in PEERS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
