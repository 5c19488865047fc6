"""The whole chain on a laptop: data, pre-training, fine-tuning, COOL RLHF, evaluation, export, serving, an agent.

    python -m experiments.tiny                     # or: make quickstart
    python -m experiments.tiny --data my.jsonl     # on your own text or conversations
    python -m experiments.tiny --only rlhf         # one stage, anew (an unfinished one goes on where it stopped)
    python -m experiments.tiny --from export       # that stage and all after it
    python -m experiments.tiny --fresh             # everything anew

Hardware: 2 CPU cores and 8 GB of memory; a GPU is used where there is one
Time: 3 to 8 minutes

The corpus is the standard library of the Python that runs this. Every stage has a folder under runs/tiny/ (those that
train are run folders) and can be run alone; runs/tiny/report.html shows what came out. Your own file's chain is in
runs/tiny-NAME/.

Expected result: held-out bits per byte below the bigram's, executed calls from 0 to about 90 %, more gold after RLHF.
"""

import dataclasses
import json
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.readers import existing
from experiments import tiny_models, tiny_report, tiny_rlhf, tiny_use
from experiments.command_line import guarded, parse, typed
from experiments.tiny_config import Skip, Tiny, folder
from internjax.train.tracking import differing_fields, python, to_json


class Stage(NamedTuple):
    """One link of the chain: run(config, root) works in root/NAME and returns what the report needs."""

    name: str
    title: str
    run: Callable[[Tiny, Path], dict[str, Any]]


def stages() -> tuple[Stage, ...]:
    """Returns the chain in its order."""
    return (
        Stage("data", "documents, rules, duplicates, order, split", tiny_models.data),
        Stage("tokenizer", "byte-level BPE and token folders", tiny_models.tokenizer),
        Stage("pretrain", "next-token pre-training", tiny_models.pretrain),
        Stage("sft", "supervised fine-tuning with adapters", tiny_models.sft),
        Stage("reward", "conditional reward model", tiny_rlhf.reward),
        Stage("rlhf", "two COOL RLHF rounds with PPO", tiny_rlhf.rlhf),
        Stage("evaluate", "bits per byte, tasks, executed calls", tiny_use.evaluate),
        Stage("export", "Hugging Face folders in both layouts, with proof", tiny_use.export),
        Stage("quantize", "int8 and int4 weights", tiny_use.quantize),
        Stage("serve", "OpenAI-compatible server, asked by the openai client", tiny_use.serve),
        Stage("agent", "one ReAct turn with a sandboxed Python tool", tiny_use.agent),
    )


def chosen_stages(config: Tiny, names: Sequence[str]) -> list[str]:
    """Returns the names to run; raises ValueError for an unknown one."""
    for given in (config.only, config.from_stage):
        if given is not None and given not in names:
            raise ValueError(f"no stage {given!r}; the stages are {', '.join(names)}")
    if config.only is not None and config.from_stage is not None:
        raise ValueError("--only and --from exclude each other; give one")
    if config.only is not None:
        return [config.only]
    return list(names)[list(names).index(config.from_stage) if config.from_stage else 0 :]


def run(config: Tiny) -> Path:
    """Runs the chain, or what is left of it, and returns the path of its report."""
    root = folder(config)
    chain = stages()
    names = [stage.name for stage in chain]
    wanted = chosen_stages(config, names)
    if config.data is not None:
        existing(config.data)
    if config.fresh and root.exists():
        if not (root / "chain.json").is_file():
            raise ValueError(f"--fresh would remove {root}, which is no folder of this chain (it has no chain.json)")
        shutil.rmtree(root)
    missing = [name for name in names[: names.index(wanted[0])] if result(root, name) is None]
    if missing:
        raise ValueError(f"{wanted[0]} stands on {missing[0]}, which has not run in {root}; give --from {missing[0]}")
    _remember(config, root, names)
    named = config.only is not None or config.from_stage is not None
    stale = set() if named else set(stale_stages(root, names))
    if not named and not stale and all(result(root, stage.name) is not None for stage in chain):
        print(f"The chain in {root} is complete. Report: {root / 'report.html'}")
        print(f"Run it anew with: {repetition(config)}")
        _print_next(root)
        return root / "report.html"
    if stale:
        print(
            f"Made before a stage that they stand on was run anew, so run anew: {', '.join(stale_stages(root, names))}."
        )
    started = time.perf_counter()
    ran = False
    for number, stage in enumerate(chain, 1):
        if stage.name not in wanted:
            continue
        done = result(root, stage.name)
        # A finished stage is run anew when it was asked for by name, or when one that it stands on was.
        if done is not None and (named or ran or stage.name in stale):
            shutil.rmtree(root / stage.name)
            done = None
        if done is None:
            ran = True
            print(f"\n[{number}/{len(chain)}] {stage.name}: {stage.title}", flush=True)
            _run_stage(stage, config, root)
        else:
            print(f"[{number}/{len(chain)}] {stage.name}: done")
    tiny_report.write(root, names, repetition=repetition(config), stale=stale_stages(root, names))
    # Of this process and of the largest that it started: what compiles the data chain beside it, sandboxes.
    peaks = [resource.getrusage(who).ru_maxrss / (1 << 20) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    spent = f"{time.perf_counter() - started:.0f} s, peak memory at most {sum(peaks):.1f} GB"
    print(f"\n{spent}. Report: {root / 'report.html'}")
    _print_next(root)
    return root / "report.html"


def result(root: Path, stage: str) -> dict[str, Any] | None:
    """Returns what a stage reported, or None where it has not ended."""
    path = root / stage / "stage.json"
    return json.loads(path.read_text()) if path.is_file() else None


def stale_stages(root: Path, names: Sequence[str]) -> list[str]:
    """Returns the stages that ended before one that they stand on was run anew."""
    ended = {name: found.get("ended", 0.0) for name in names if (found := result(root, name)) is not None}
    order = list(ended)
    return [name for i, name in enumerate(order) if any(ended[before] > ended[name] for before in order[:i])]


def repetition(config: Tiny) -> str:
    """Returns the command that runs the whole of a chain anew."""
    whole = dataclasses.replace(config, only=None, from_stage=None, fresh=True)
    return " ".join([python(), "-m", "experiments.tiny", *typed(whole, CONFIG)])


def _run_stage(stage: Stage, config: Tiny, root: Path) -> None:
    started = time.perf_counter()
    try:
        summary = stage.run(config, root)
    except Skip as reason:
        print(f"skipped: {reason}")
        summary = {"skipped": str(reason)}
    own = root / stage.name
    own.mkdir(parents=True, exist_ok=True)
    summary["seconds"], summary["ended"] = round(time.perf_counter() - started, 1), time.time()
    part = own / ".stage.json.part"
    part.write_text(json.dumps(summary, indent=1) + "\n")
    part.rename(own / "stage.json")
    print(f"{stage.name}: {summary['seconds']} s", flush=True)


def _remember(config: Tiny, root: Path, names: Sequence[str]) -> None:
    """Keeps the chain's config in its folder, and refuses to go on with another one once a stage has ended."""
    ways = ("run", "only", "from_stage", "fresh")
    now = {name: value for name, value in to_json(config).items() if name not in ways}
    path = root / "chain.json"
    if path.is_file() and any(result(root, name) is not None for name in names):
        lines = differing_fields(now, json.loads(path.read_text()))
        if lines:
            raise ValueError(
                f"{root} holds a chain with another config:\n  " + "\n  ".join(lines) + "\nGive the same config, "
                f"another --run NAME, or start anew: {repetition(config)}"
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now, indent=1) + "\n")


def _print_next(root: Path) -> None:
    final = next((name for name in ("rlhf", "sft", "pretrain") if (root / name / "model").is_dir()), "pretrain")
    print("\nNext:")
    print(f"  {python()} -m serve.chat {shlex.quote(str(root / final))}")
    print(f"  {python()} -m experiments.finetune --model YOUR_CHECKPOINT --data YOUR_CHATS.jsonl --run my_run")


CONFIG = Tiny()


def main() -> None:
    args = [arg.replace("--from", "--from-stage", 1) if arg.split("=")[0] == "--from" else arg for arg in sys.argv[1:]]
    guarded(run, parse(CONFIG, args))


if __name__ == "__main__":
    main()
