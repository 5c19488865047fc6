"""Which of the shipped experiments fit a card: the table behind `python -m experiments.plan --recipes`."""

import dataclasses
import re
from typing import Any, NamedTuple

from experiments import jobs

# Published checkpoints whose architecture stands in this folder, so that nothing is downloaded to be planned.
_PUBLISHED = re.compile(r"(?:hf|modelscope):.*/internlm2[^/]*[-_](1_8b|7b|20b)(?:[-_].*)?$", re.IGNORECASE)


class Row(NamedTuple):
    """One experiment on the device."""

    name: str
    method: str
    fits: bool | None
    """None where it could not be planned."""
    gib: float | None
    """What one device holds, of the experiment as it is or as `how` changes it."""
    how: str
    """What has to be changed, or why it does not fit."""


def rows(device: Any, *, num_devices: int, memory_share: float | None = None) -> list[Row]:
    """Returns a row for every Pretrain and Finetune of this folder, those that fit first."""
    from experiments.finetuning import Finetune
    from experiments.pretraining import Pretrain

    found = []
    for name in jobs.names():
        config = jobs.module(name).CONFIG
        config = with_known_model(config) if isinstance(config, Finetune) else config
        # An experiment without a model of its own takes the user's: there is nothing to plan yet.
        if isinstance(config, Pretrain) or (isinstance(config, Finetune) and config.model):
            found.append(_row(name, config, device, num_devices, memory_share))
    return sorted(found, key=lambda row: (-(row.fits or 0), row.gib or 0.0))


def with_known_model(config: Any) -> Any:
    """Returns a Finetune with the experiment of its published model's size in place of that, where there is one."""
    published = _PUBLISHED.match(config.model)
    return config if published is None else dataclasses.replace(config, model=f"internlm2_{published[1].lower()}")


def _row(name: str, config: Any, device: Any, num_devices: int, memory_share: float | None) -> Row:
    from internjax.train import devices, plan

    try:
        job = jobs.on_device(jobs.job_of(config), device)
    except (ValueError, OSError) as error:
        return Row(name, getattr(config, "method", "full"), None, None, f"cannot be planned here: {error}")
    changes: dict[str, Any] = {}
    if devices.attention_problem(device, job.model.attention):
        changes["attention"] = "chunked"
        job = dataclasses.replace(job, model=dataclasses.replace(job.model, attention="chunked"))
    how = {} if memory_share is None else {"memory_share": memory_share}
    try:
        found = plan.make_plan(_on_mesh(job, num_devices), num_devices=num_devices, device=device, **how)
    except ValueError as error:
        return Row(name, job.method, None, None, str(error))
    mended = plan.mended(found)
    if mended is None:
        said = " ".join(["Not one row: more --devices.", *plan.remedies(found)[1:]])
        return Row(name, job.method, False, found.memory.total / devices.GIB, said)
    text = ", ".join(f"{key}={value}" for key, value in (changes | mended.changes).items())
    return Row(name, job.method, True, mended.bytes / devices.GIB, f"with {text}" if text else "as it is")


def _on_mesh(job: Any, num_devices: int) -> Any:
    """Returns the job sharded over all devices, whatever cluster its experiment was written for."""
    mesh = dataclasses.replace(job.mesh, data=1, fsdp=num_devices, sequence=1, tensor=1)
    attention = "chunked" if job.model.attention == "ring" else job.model.attention
    return dataclasses.replace(job, mesh=mesh, model=dataclasses.replace(job.model, attention=attention))


def table(device: Any, *, num_devices: int, memory_share: float | None = None) -> str:
    """Returns the rows as text, with what the device is."""
    from internjax.train import devices, plan

    limit = device.memory * (plan.MEMORY_SHARE if memory_share is None else memory_share) / devices.GIB
    major, minor = device.compute_capability
    lines = [
        f"{num_devices} x {device.name}: {device.memory / devices.GIB:.1f} GiB, {limit:.1f} of them for jax; compute "
        f"capability {major}.{minor}, {devices.compute_dtype(device)}, {device.peak_flops / 1e12:.0f} TFLOP/s",
        "",
        f"{'experiment':26}{'method':8}{'fits':6}{'GiB':>7}  how",
    ]
    for row in rows(device, num_devices=num_devices, memory_share=memory_share):
        fits = "?" if row.fits is None else "yes" if row.fits else "no"
        size = "" if row.gib is None else f"{row.gib:.1f}"
        lines.append(f"{row.name:26}{row.method:8}{fits:6}{size:>7}  {row.how}")
    return "\n".join(lines)
