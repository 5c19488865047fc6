"""Plans an experiment before it is paid for: memory, time, traffic and meshes of its config, on any device, from a CPU.

    python -m experiments.plan internlm2_20b --devices 64 --device h100 --mesh.fsdp 16 --mesh.tensor 4
    python -m experiments.plan sft_lora_7b --model internlm2_7b --device 4090 --devices 1 --batch-size 1 --accumulate 16
    python -m experiments.plan internlm2_1_8b --devices 8 --device h200 --meshes 10 --json plan.json
    python -m experiments.plan internlm2_7b --devices 16 --rlhf --device h100
    python -m experiments.plan --recipes --device 3090

Hardware: any, for jobs of any
Time: seconds; a minute with --compile

What is not an option of the plan is a field of the experiment, as on its own command line. Nothing is allocated and no
device is needed. Exit code: 0 when it fits (or no device is named), 1 when it does not, 2 for a mistake.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments import jobs

RESULTS = Path(__file__).parent / "benchmarks" / "results" / "plan_error.json"


class Planned(NamedTuple):
    """What is asked for: the job, how many devices, and the tokens of the whole run where they are known."""

    job: Any
    num_devices: int
    tokens: float | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # The plan is about devices that are not here: whatever this machine has stays untouched.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    options, rest = _parser().parse_known_args(arguments)
    try:
        return _run(options, rest)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan", description=__doc__.splitlines()[0], allow_abbrev=False, add_help=False
    )
    parser.add_argument("experiment", nargs="?", help="an experiment with a CONFIG: internlm2_20b, sft_lora_7b, ...")
    parser.add_argument("-h", "--help", action="store_true", help="show this, and the fields of the experiment named")
    parser.add_argument("--device", help="h200, h100, a100-80, a100-40, 4090, ...; without it nothing is timed")
    parser.add_argument("--devices", type=int, help="how many (default: what the mesh says, else 8)")
    parser.add_argument("--efficiency", type=float, help="share of the peak that products reach (default 0.5)")
    parser.add_argument("--memory-share", type=float, help="share of a device's memory that jax may take (default 0.9)")
    parser.add_argument("--tokens", type=float, help="token budget (default: the experiment's steps)")
    parser.add_argument("--quantise", choices=("int8", "int4", "nf4"), help="frozen kernels in few bits (QLoRA)")
    parser.add_argument("--group", type=int, default=64, help="input rows that share a scale with --quantise")
    parser.add_argument("--meshes", type=int, default=5, help="how many meshes worth trying to list; 0: none")
    parser.add_argument("--recipes", action="store_true", help="say which experiments fit --devices (1) of --device")
    parser.add_argument("--rlhf", action="store_true", help="plan PPO's four models of this size instead")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens of a prompt with --rlhf")
    parser.add_argument("--compile", action="store_true", help="compile the step for as many CPU devices, as a check")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    return parser


def _refuse_unread(options: argparse.Namespace) -> None:
    """Raises ValueError for options that the kind of plan asked for does not read."""
    unread = {"recipes": ["rlhf"], "rlhf": []}
    for kind, names in unread.items():
        names += ["efficiency", "tokens", "quantise", "compile", *(["json"] if kind == "recipes" else [])]
        given = [f"--{name}" for name in names if getattr(options, name) not in (None, False)]
        if getattr(options, kind) and given:
            raise ValueError(f"--{kind} reads no {', '.join(given)}; leave that out, or --{kind}")


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    from internjax.train import devices, plan

    _refuse_unread(options)
    if options.recipes:
        return _recipes(options, rest)
    if options.help or options.experiment is None:
        _parser().print_help()
        if options.experiment is None:
            print(f"\nexperiments: {', '.join(jobs.names())}")
            return 0 if options.help else 2
        rest = ["--help"]
    config = _config(options.experiment, rest)
    device = None if options.device is None else devices.named(options.device)
    planned = _planned(config, options, device)
    given = {"efficiency": options.efficiency, "memory_share": options.memory_share}
    how = {name: value for name, value in given.items() if value is not None}
    if options.rlhf:
        return _rlhf(planned, device, options)
    found = plan.make_plan(planned.job, num_devices=planned.num_devices, device=device, **how)
    print(plan.describe(found))
    if planned.tokens and (hours := found.gpu_hours(planned.tokens)) is not None:
        days = hours / found.num_devices / 24
        print(f"\n{planned.tokens:.3g} tokens: {hours:,.0f} device hours, {days:,.1f} days on {found.num_devices}")
    others = []
    if device is not None and options.meshes:
        others = plan.meshes(planned.job, num_devices=planned.num_devices, device=device, top=options.meshes, **how)
        _print_meshes(others)
    compiled = _compiled(planned) if options.compile else None
    print(f"\n{measured_error()}")
    print(plan.verdict(found))
    if options.json is not None:
        _write(options.json, found, planned, others, compiled)
    return 1 if found.fits is False else 0


def _recipes(options: argparse.Namespace, rest: list[str]) -> int:
    from experiments import plan_recipes
    from internjax.train import devices

    if options.experiment is not None or rest or options.device is None:
        given = " ".join(filter(None, (options.experiment, *rest))) or "no --device"
        raise ValueError(f"--recipes goes with a --device and plans all experiments as they are; given {given}")
    device, num_devices = devices.named(options.device), options.devices or 1
    print(plan_recipes.table(device, num_devices=num_devices, memory_share=options.memory_share))
    print(f"\n{measured_error()}")
    return 0


def _config(name: str, rest: list[str]) -> Any:
    from experiments.command_line import parse
    from experiments.finetuning import Finetune
    from experiments.pretraining import Pretrain

    config = jobs.module(name).CONFIG
    if not isinstance(config, Pretrain | Finetune):
        raise ValueError(f"{name} is a {type(config).__name__}; plans are made of Pretrain and Finetune configs")
    return parse(config, rest)


def _planned(config: Any, options: argparse.Namespace, device: Any) -> Planned:
    from internjax.model.quantize import Quantised
    from internjax.train import devices

    quantised = None if options.quantise is None else Quantised(options.quantise, options.group)
    job = jobs.job_of(config, quantised=quantised)
    if device is not None and (note := devices.dtype_note(device, job.model.dtype)):
        print(note)
        job = jobs.on_device(job, device)
    tokens = options.tokens or (config.num_steps or 0) * job.batch_size * job.seq_len or None
    return Planned(job, options.devices or _devices_of(config.mesh), tokens)


def _devices_of(mesh: Any) -> int:
    sizes = [mesh.data, mesh.fsdp, mesh.sequence, mesh.tensor]
    if -1 not in sizes:
        return sizes[0] * sizes[1] * sizes[2] * sizes[3]
    fixed = -sizes[0] * sizes[1] * sizes[2] * sizes[3]
    return 8 if 8 % fixed == 0 else fixed


def measured_error(path: Path = RESULTS) -> str:
    """Returns what comparing plans with measured peaks gave, or that it was not done."""
    if not path.is_file():
        return "not compared with a GPU yet: the estimates above are unproven there"
    values = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in values["cells"] if cell.get("peak_bytes")]
    errors = [cell["planned_bytes"] / cell["peak_bytes"] - 1 for cell in cells]
    if not errors:
        return f"{path.name} holds no measured cell: the estimates above are unproven on a GPU"
    worst = max(errors, key=abs)
    within = sum(abs(error) <= 0.05 for error in errors)
    return (
        f"measured on {values['device']}: {within} of {len(errors)} cells within 5 % of the peak, worst {worst:+.1%} "
        f"({path.name})"
    )


def _print_meshes(plans: list[Any]) -> None:
    from internjax.train.devices import GIB

    if not plans:
        print("\nno mesh of these devices holds this job, with any number of micro-batches")
        return
    print("\nmeshes worth trying (they fit; fastest first)")
    head = ("data", "fsdp", "sequence", "tensor", "accumulate", "GiB", "s/step", "MFU")
    print("  " + "".join(f"{name:>{width}}" for name, width in zip(head, (5, 6, 10, 8, 12, 8, 9, 7))) + "  bound by")
    for each in plans:
        data, fsdp, sequence, tensor = each.shape
        print(
            f"  {data:5}{fsdp:6}{sequence:10}{tensor:8}{each.job.accumulate:12}{each.memory.total / GIB:8.1f}"
            f"{each.step_seconds:9.3f}{each.mfu:7.1%}  {each.bound}"
        )


def _rlhf(planned: Planned, device: Any, options: argparse.Namespace) -> int:
    from internjax.rlhf.config import PPOConfig
    from internjax.rlhf.plan import PPOJob, estimate
    from internjax.train.devices import GIB
    from internjax.train.plan import MEMORY_SHARE

    job = planned.job
    if job.quantised is not None or job.freeze:
        raise ValueError(
            "PPO's models are planned whole and unquantised, and this experiment freezes or quantises some of one. "
            "Plan a full fine-tuning, or --method lora"
        )
    shards = job.mesh.shape(planned.num_devices)[0] * job.mesh.shape(planned.num_devices)[1]
    rows = max(64, shards)
    critic_lora = None if job.lora is None else dataclasses.replace(job.lora, targets=(*job.lora.targets, "head"))
    config = PPOConfig(minibatch_size=rows, accumulate=max(1, rows // shards))
    found = estimate(
        PPOJob(
            model=job.model,
            prompt_length=options.prompt_length,
            ppo=config,
            num_prompts=rows,
            actor_lora=job.lora,
            critic_lora=critic_lora,
            mesh=job.mesh,
        ),
        num_devices=planned.num_devices,
    )
    print(f"PPO, {rows} responses of {config.max_new_tokens} tokens to prompts of {options.prompt_length}, one device:")
    for role in found.roles:
        print(
            f"  {role.name:32}{role.bytes / GIB:9.2f}  {'exact' if role.exact else 'estimate':9} {role.note}".rstrip()
        )
    print(f"  {'total':32}{found.total / GIB:9.2f}  {found.exact / GIB:.2f} of it exact")
    print("  moments: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.phases.items()))
    print(measured_error())
    if options.json is not None:
        roles = [role._asdict() for role in found.roles]
        options.json.write_text(json.dumps({"roles": roles, "phases": found.phases, "total": found.total}, indent=1))
    if device is None:
        print("name a --device to hold it against")
        return 0
    limit = int(device.memory * (options.memory_share or MEMORY_SHARE))
    fits = found.total <= limit
    remedy = "" if fits else ". Use more devices, adapters (--method lora of a fine-tuning), or remat full"
    print(f"{'fits' if fits else 'does not fit'}: {found.total / GIB:.1f} of {limit / GIB:.1f} GiB{remedy}")
    return 0 if fits else 1


def _compiled(planned: Planned) -> dict[str, int]:
    """Returns the CPU compiler's sizes of the step on one device, taken in a process with that many fake devices."""
    from internjax.train.devices import GIB

    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # Sizes are settled before machine code is made: it need not be good, and nobody runs it.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={planned.num_devices} --xla_backend_optimization_level=0",
    }
    # Jobs are values: the other process gets this one's as text and evaluates nothing but their constructors.
    done = subprocess.run(
        [sys.executable, "-m", "experiments.plan_compile", str(planned.num_devices)],
        input=json.dumps(_job_json(planned.job)),
        env=env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise ValueError(f"the step could not be compiled: {done.stderr.strip().splitlines()[-1:]}")
    sizes = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\nthe CPU compiler's figure for one device, not a GPU's (no fused attention, bfloat16 computed in float32): "
        f"arguments {sizes['argument'] / GIB:.2f} GiB, temporaries {sizes['temp'] / GIB:.2f}, outputs "
        f"{sizes['output'] / GIB:.2f} of which {sizes['alias'] / GIB:.2f} take the arguments' place; compiled in "
        f"{sizes['seconds']:.1f} s"
    )
    return sizes


def _job_json(job: Any) -> dict[str, Any]:
    from internjax.model.config import to_json

    values = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    values |= {"model": to_json(job.model), "optimizer": {"type": type(job.optimizer).__name__, **vars(job.optimizer)}}
    for name in ("mesh", "lora", "quantised"):
        values[name] = None if values[name] is None else dataclasses.asdict(values[name])
    return values


def _write(path: Path, found: Any, planned: Planned, others: list[Any], compiled: dict | None) -> None:
    values = {
        "job": _job_json(found.job),
        "num_devices": found.num_devices,
        "mesh": found.shape,
        "device": None if found.device is None else found.device.name,
        "roles": [role._asdict() for role in found.memory.roles],
        "phases": found.memory.phases,
        "total_bytes": found.memory.total,
        "limit_bytes": found.limit,
        "fits": found.fits,
        "largest_batch": found.largest_batch,
        "flops_per_step": found.flops,
        "executed_flops_per_step": found.executed_flops,
        "traffic": [each._asdict() for each in found.traffic],
        "step_seconds": found.step_seconds,
        "mfu": found.mfu,
        "efficiency": found.efficiency,
        "bound": found.bound,
        "tokens": planned.tokens,
        "device_hours": None if planned.tokens is None else found.gpu_hours(planned.tokens),
        "meshes": [
            {"mesh": p.shape, "accumulate": p.job.accumulate, "step_seconds": p.step_seconds, "bytes": p.memory.total}
            for p in others
        ],
        "compiled": compiled,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
