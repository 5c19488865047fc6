"""The report of the tiny chain: one screen of numbers with their baselines, then what lies behind them."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from internjax import report
from internjax.chart import Lines
from internjax.report import Code, Number, Numbers, Sample, Samples, Section, Table, Text
from internjax.train.tracking import read_rows

NAMES = {"pretrain": "base", "sft": "fine-tuned", "rlhf": "after RLHF"}
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


def write(root: Path, names: Sequence[str], *, repetition: str, stale: Sequence[str] = ()) -> None:
    """Writes report.html and report.md from what the stages left in `root`.

    repetition: the command that runs it all anew. stale: stages made before one that they stand on was run anew.
    """
    results = {name: _read(root / name / "stage.json") for name in names}
    results = {name: result for name, result in results.items() if result is not None}
    sections = [
        _first_screen(results, stale),
        *_data(results),
        *_training(root, results),
        *_sft(results),
        *_alignment(results),
        *_evaluation(results),
        *_use(results),
        _repeat(results, names, repetition),
    ]
    corpus = results.get("data", {})
    subtitle = f"Corpus: {corpus.get('source', 'not read yet')}, fingerprint `{corpus.get('fingerprint', '')[:16]}`."
    report.write(root, "InternJAX: the tiny chain", sections, subtitle=subtitle)


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def _share(interval: dict[str, float]) -> str:
    return f"{interval['value']:.0%} [{interval['low']:.0%}, {interval['high']:.0%}]"


def _better(good: bool) -> dict[str, str]:
    return {"verdict": "better", "outcome": "good"} if good else {"verdict": "not better", "outcome": "bad"}


def _first_screen(results: dict[str, dict], stale: Sequence[str]) -> Section:
    numbers: list[Number] = []
    evaluation, rlhf = results.get("evaluate", {}), results.get("rlhf", {})
    if "tasks" in evaluation:
        bits, others = evaluation["tasks"]["pretrain"]["held_out_text"]["value"], evaluation["baselines"]
        numbers.append(
            Number(
                "Held-out bits per byte",
                round(bits, 3),
                baseline=f"bigram {others['bigram']:.3f}, unigram {others['unigram']:.3f}",
                **_better(bits < others["bigram"]),
            )
        )
    for key, label in (("executed", "Executed calls"), ("right", "Right answers")):
        protocol = evaluation.get("interpreter", {})
        if "sft" in protocol:
            after, before = protocol["sft"][key], protocol["pretrain"][key]
            numbers.append(
                Number(
                    f"{label} after fine-tuning",
                    f"{after['value']:.0%}",
                    baseline=f"before {before['value']:.0%}, of {protocol['sft']['count']}",
                    **_better(after["low"] > before["high"]),
                )
            )
    if "held_out_accuracy" in results.get("reward", {}):
        accuracy = results["reward"]["held_out_accuracy"]
        worst = min(accuracy.values())
        numbers.append(
            Number("Reward model, worse condition", f"{worst:.0%}", baseline="chance 50%", **_better(worst > 0.5))
        )
    if "evaluations" in rlhf:
        first, last = rlhf["evaluations"][0]["gold"], rlhf["evaluations"][-1]["gold"]
        numbers.append(
            Number(
                "Gold after RLHF",
                _share(last),
                baseline=f"before {_share(first)}",
                **_better(last["low"] > first["high"]),
            )
        )
    if "llama" in results.get("export", {}):
        worst = max(row["max_logit_difference"] for row in results["export"].values() if isinstance(row, dict))
        fine = worst <= 1e-5
        numbers.append(
            Number(
                "Export read back, logits",
                f"{worst:.1g}",
                baseline="tolerance 1e-5",
                verdict="equal" if fine else "differs",
                outcome="good" if fine else "bad",
            )
        )
    if "calls" in results.get("serve", {}):
        calls = results["serve"]["calls"]
        first_token, whole = calls["stream"]["first_token_seconds"], calls["chat"]["seconds"]
        numbers.append(
            Number(
                "First token of a streamed answer",
                f"{first_token * 1000:.1f} ms",
                baseline=f"the same answer not streamed, {calls['chat']['num_tokens']} tokens: {whole * 1000:.1f} ms",
                **_better(first_token < whole),
            )
        )
    blocks: list[Any] = [Numbers(numbers)]
    if stale:
        blocks.insert(0, Text(f"Made before a stage that they stand on was run anew: {', '.join(stale)}."))
    if "prompt" in evaluation:
        blocks.append(_followed(evaluation["prompt"]))
    return Section("At a glance", blocks)


def _followed(prompt: dict[str, Any]) -> Samples:
    said = [Sample(NAMES[name], text) for name, text in prompt["said"].items()]
    return Samples(
        [Sample("prompt", prompt["prompt"]), *said, Sample("the library", prompt["library"])],
        caption="One held-out prompt through the chain.",
    )


def _data(results: dict[str, dict]) -> list[Section]:
    found = results.get("data")
    if found is None or "skipped" in found:
        return []
    rows = [
        [stage, reason, count]
        for stage, reasons in found["ledger"]["dropped"].items()
        for reason, count in reasons.items()
    ]
    text = (
        f"{found['num_documents']:,} documents read, {found['num_kept']:,} kept, {found['num_held_out']:,} of them "
        f"held out by file ({found['held_out_bytes'] / 1e3:,.0f} kB beside "
        f"{found['train_bytes'] / 1e3:,.0f} kB for training)."
    )
    tokenizer = results.get("tokenizer", {})
    if "vocab_size" in tokenizer:
        text += (
            f" The tokenizer has {tokenizer['vocab_size']:,} ids; {tokenizer['train_tokens']:,} training tokens at "
            f"{tokenizer['bytes_per_token']:.2f} bytes each."
        )
    sources = Table(["source", "documents kept"], sorted(found["by_source"].items()))
    dropped = (
        Table(["stage", "reason", "documents"], rows, caption="Ledger: every removed document has a reason.")
        if rows
        else Text("Ledger: no document was removed.")
    )
    return [Section("Data", [Text(text), sources, dropped])]


def _training(root: Path, results: dict[str, dict]) -> list[Section]:
    if "loss" not in results.get("pretrain", {}):
        return []
    found, rows = results["pretrain"], read_rows(root / "pretrain" / "metrics.jsonl")
    loss = [(row["step"], row["loss"]) for row in rows]
    norm = [(row["step"], row["grad_norm"]) for row in rows]
    blocks: list[Any] = [
        Text(
            f"{found['num_params']:,} parameters, {found['num_steps']:,} steps, "
            f"{found.get('tokens_per_second', 0):,.0f} tokens/s (median, compilation left out)."
        ),
        Lines("Training loss", {"loss": loss}, x_label="step", y_label="nats per token"),
        Lines("Gradient norm", {"norm": norm}, x_label="step", y_label="global norm", log_y=True),
    ]
    if "baselines" in results.get("evaluate", {}):
        others = results["evaluate"]["baselines"]
        bits = results["evaluate"]["tasks"]["pretrain"]["held_out_text"]["value"]
        table = [["this model", bits, ""]] + [
            [name, value, "model wins" if bits < value else "model loses"] for name, value in others.items()
        ]
        blocks.append(
            Table(
                ["predictor", "bits per byte", "verdict"],
                table,
                caption="The same held-out bytes. Unigram and interpolated bigram are fitted on exactly the tokens "
                "that the model has seen; zlib and xz compress the held-out bytes alone.",
            )
        )
    return [Section("Pre-training", blocks)]


def _sft(results: dict[str, dict]) -> list[Section]:
    found = results.get("sft")
    if found is None:
        return []
    if "skipped" in found:
        return [Section("Fine-tuning", [Text(f"Skipped: {found['skipped']}")])]
    blocks: list[Any] = [
        Text(
            f"Adapters on conversations, {found['num_steps']} steps; loss {found['first_loss']:.2f} to "
            f"{found['loss']:.2f} nats per learned token."
        )
    ]
    protocol = results.get("evaluate", {}).get("interpreter", {})
    if protocol:
        rows = [[NAMES[name], _share(row["executed"]), _share(row["right"])] for name, row in protocol.items()]
        count = next(iter(protocol.values()))["count"]
        blocks.append(
            Table(
                ["model", "well-formed call that ran", "right answer"],
                rows,
                caption=f"{count} held-out problems, greedy; 95 % Wilson intervals.",
            )
        )
        last = list(protocol.values())[-1]["samples"][:5]
        columns = ["question", "call", "output", "answer", "wanted"]
        blocks.append(Table(columns, [[sample[name] for name in columns] for sample in last], caption="As written."))
    return [Section("Fine-tuning", blocks)]


def _alignment(results: dict[str, dict]) -> list[Section]:
    sections = []
    found = results.get("reward", {})
    if "curve" in found:
        accuracy = [(row["step"], row["accuracy"]) for row in found["curve"]]
        table = Table(["condition", "held-out accuracy"], sorted(found["held_out_accuracy"].items()))
        text = Text(f"{found['num_pairs']} pairs, {found['num_held_out_pairs']} held out (of held-out files).")
        chart = Lines(
            "Pairs ranked right", {"training": accuracy}, x_label="step", y_label="share", baselines={"chance": 0.5}
        )
        sections.append(Section("Reward model", [text, table, chart]))
    elif "skipped" in found:
        sections.append(Section("Reward model", [Text(f"Skipped: {found['skipped']}")]))
    found = results.get("rlhf", {})
    if "skipped" in found:
        sections.append(Section("COOL RLHF", [Text(f"Skipped: {found['skipped']}")]))
    elif "evaluations" in found:
        sections.append(Section("COOL RLHF", _rounds(found)))
    return sections


def _rounds(found: dict[str, Any]) -> list[Any]:
    rows = [
        [
            row["name"],
            _share(row["gold"]),
            _share_of(row["reward"]),
            _share_of(row["own_reward"]),
            _share_of(row["length"]),
            row["ended"],
            row["distinct"],
            row["kl"],
        ]
        for row in found["evaluations"]
    ]
    curve = found["curve"]
    steps = range(1, len(curve) + 1)

    def line(name: str) -> list[tuple[int, float]]:
        return [(step, row[name]) for step, row in zip(steps, curve, strict=True)]

    difference = found["logprob_difference"]
    compared = f"over the {found['num_compared']:,} drawn tokens of all iterations"
    alarms = [f"round {i}: {name} ({why})" for i, row in enumerate(found["alarms"], 1) for name, why in row.items()]
    return [
        Text(
            f"{found['num_rounds']} rounds of {found['num_iterations']} iterations, "
            f"{found['num_prompts']} prompts each. Largest difference between the log-probabilities of rollout and "
            f"trainer {compared}: {f'{difference:.2g}' if difference else '0, they are equal bit by bit'}. "
            f"Between the rounds the reward model learned {sum(found['num_pairs'])} pairs against what the policy had "
            f"learned to write (training prompts, the preferences' own judgement). "
            f"Alarms: {'; '.join(alarms) or 'none'}."
        ),
        Table(
            ["policy", "gold", "reward", "own reward", "length (tokens)", "ended", "distinct", "KL to fine-tuned"],
            rows,
            caption=f"{found['num_evaluated']} held-out prompts, one drawn completion each; 95 % intervals. Gold: a "
            "program that nothing was trained on or chosen by. Reward: by the first reward model, so that rows "
            "compare; own reward: by the model that the round was trained for.",
        ),
        Lines("Reward of the rollouts", {"reward": line("score")}, x_label="iteration", y_label="score"),
        Lines("KL to the reference", {"KL": line("kl")}, x_label="iteration", y_label="nats per response"),
        Lines("Length of the rollouts", {"length": line("length")}, x_label="iteration", y_label="tokens"),
        Samples(
            [
                Sample(f"{'gold' if sample['gold'] else 'not gold'}: {sample['prompt']}", sample["completion"])
                for sample in found["samples"][:6]
            ],
            caption="Held-out prompts and what the last policy drew, as written.",
        ),
    ]


def _share_of(interval: dict[str, float]) -> str:
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _evaluation(results: dict[str, dict]) -> list[Section]:
    found = results.get("evaluate", {}).get("tasks")
    if not found:
        return []
    rows = [
        [NAMES[name], task, row["metric"], _share_of(row), row["num_items"], row["chance"]]
        for name, scores in found.items()
        for task, row in scores.items()
    ]
    columns = ["model", "task", "metric", "value [95 %]", "items", "chance"]
    return [Section("Evaluation", [Table(columns, rows, caption="Items are made of held-out library facts.")])]


def _use(results: dict[str, dict]) -> list[Section]:
    sections = []
    if "llama" in results.get("export", {}):
        rows = [
            [name, row["max_logit_difference"], row["num_files"], f"{row['bytes'] / 1e6:.1f} MB"]
            for name, row in results["export"].items()
            if isinstance(row, dict)
        ]
        columns = ["layout", "largest logit difference after reading back", "files verified", "weights"]
        sections.append(Section("Export", [Table(columns, rows)]))
    found = results.get("quantize")
    if found is not None:
        rows = [
            [name, row["bits_per_byte"], f"{row['bytes'] / 1e6:.1f} MB"]
            for name, row in found.items()
            if isinstance(row, dict)
        ]
        sections.append(Section("Quantised weights", [Table(["weights", "held-out bits per byte", "size"], rows)]))
    if "calls" in results.get("serve", {}):
        calls = results["serve"]["calls"]
        rows = [[name, f"{call['seconds'] * 1000:.0f} ms", call["text"]] for name, call in calls.items()]
        sections.append(Section("Server", [Table(["request", "median time", "answer, as written"], rows)]))
    found = results.get("agent", {})
    if "skipped" in found:
        sections.append(Section("Agent", [Text(f"Skipped: {found['skipped']}")]))
    elif "react" in found:
        samples = [
            Sample(f"{name}: {message['role']}", message["content"] or message["call"] or "")
            for name in ("react", "interpreter")
            for message in found[name]["messages"]
            if message["role"] != "system"
        ]
        text = Text(
            f"Question: {found['question']} (wanted: {found['wanted']}). Whatever the tiny model said is shown."
        )
        sections.append(Section("Agent", [text, Samples(samples)]))
    return sections


def _repeat(results: dict[str, dict], names: Sequence[str], repetition: str) -> Section:
    times = [[name, results[name]["seconds"]] for name in names if name in results]
    blocks: list[Any] = [
        Table(["stage", "seconds"], [*times, ["all", sum(row[1] for row in times)]]),
        Table(["package", "version"], [["python", platform.python_version()], *([p, version(p)] for p in PACKAGES)]),
        Text("To repeat:"),
        Code(repetition),
    ]
    return Section("Times, versions, repetition", blocks)
