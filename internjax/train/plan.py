"""Plan before you pay: memory, time and traffic of a training job on devices that are not there.

    job = Job(model_config, batch_size=1024, seq_len=4096, mesh=MeshConfig(fsdp=16, tensor=4))
    plan = make_plan(job, num_devices=64, device=devices.named("h100"))
    print(describe(plan))

Exact figures come from shapes and shardings (memory.py). Time follows from the FLOP formula, the device's data sheet
and one stated efficiency: what share of the peak the products reach while nothing waits. Traffic is counted per axis of
the mesh from what the step has to move; it hides behind arithmetic except for the sums over `tensor`, which a layer
waits for.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from internjax.kernels import ring_attention
from internjax.model.config import num_matmul_params, num_params
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.sharding import MESH_AXES
from internjax.train import flops, memory
from internjax.train.devices import GIB, MIB, Device, attention_problem
from internjax.train.freezing import split
from internjax.train.memory import Held, Job, Memory

EFFICIENCY = 0.5
"""Share of the peak that products reach when nothing waits, recomputation included; published runs of 7B on 8 H100 in
JAX give 46-50 % of useful work (NVIDIA JAX-Toolbox, MaxText page)."""
MEMORY_SHARE = 0.9
"""Share of a device's memory that jax may take: XLA_PYTHON_CLIENT_MEM_FRACTION, whose own default is 0.75."""
JAX_MEMORY_SHARE = 0.75


class Traffic(NamedTuple):
    """What one device sends per step over one axis of the mesh."""

    axis: str
    size: int
    bytes: int
    seconds: float | None
    """At the device's bandwidth; None without a device."""
    path: str
    """link (within a node) or network."""
    what: str


class Plan(NamedTuple):
    """A job on a number of devices, in figures; `describe` prints it."""

    job: Job
    shape: tuple[int, int, int, int]
    device: Device | None
    memory: Memory
    limit: int | None
    """Bytes that a device gives; None without a device."""
    flops: int
    """Useful FLOPs of a step (train.flops), over all devices."""
    executed_flops: int
    """With recomputation and with what the attention back end computes in vain."""
    traffic: tuple[Traffic, ...]
    compute_seconds: float | None
    step_seconds: float | None
    mfu: float | None
    bound: str | None
    """compute, or the axis whose traffic takes longer than it."""
    efficiency: float
    largest_batch: int | None
    """Rows over all devices that still fit, with this mesh and this number of micro-batches; 0 when none does."""

    @property
    def num_devices(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2] * self.shape[3]

    @property
    def tokens_per_step(self) -> int:
        return self.job.batch_size * self.job.seq_len

    @property
    def fits(self) -> bool | None:
        """Whether the planned bytes are within the limit; None without a device."""
        return None if self.limit is None else self.memory.total <= self.limit

    def gpu_hours(self, tokens: float) -> float | None:
        """Returns the device hours of that many tokens, or None without a device."""
        if self.step_seconds is None:
            return None
        return tokens / self.tokens_per_step * self.step_seconds * self.num_devices / 3600


def make_plan(
    job: Job,
    *,
    num_devices: int,
    device: Device | None = None,
    efficiency: float = EFFICIENCY,
    memory_share: float = MEMORY_SHARE,
) -> Plan:
    """Returns the plan of a job; allocates nothing. Raises ValueError where mesh, model, batch and device clash."""
    if not (0 < efficiency <= 1 and 0 < memory_share <= 1):
        raise ValueError(f"efficiency and memory_share lie in (0, 1]; given {efficiency} and {memory_share}")
    if device is not None and (problem := attention_problem(device, job.model.attention)):
        raise ValueError(problem)
    shape = job.mesh.shape(num_devices)
    have = memory.held(job, shape)
    estimated = memory.estimate(job, shape, have)
    limit = None if device is None else int(device.memory * memory_share)
    time = _time(job, shape, device, efficiency, have)
    return Plan(
        job=job,
        shape=shape,
        device=device,
        memory=estimated,
        limit=limit,
        efficiency=efficiency,
        largest_batch=None if limit is None else largest_batch(job, shape, limit, have),
        **time._asdict(),
    )


def largest_batch(job: Job, shape: tuple[int, int, int, int], limit: int, have: Held | None = None) -> int:
    """Returns the rows over all devices that fit into `limit` bytes on each, 0 where not even one row does."""
    have = memory.held(job, shape) if have is None else have

    def fits(rows: int) -> bool:
        return memory.estimate(job, shape, have, rows=rows).total <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * shape[0] * shape[1] * job.accumulate


# --- time ------------------------------------------------------------------------------------------------------------


class _Time(NamedTuple):
    flops: int
    executed_flops: int
    traffic: tuple[Traffic, ...]
    compute_seconds: float | None
    step_seconds: float | None
    mfu: float | None
    bound: str | None


def _time(job: Job, shape, device: Device | None, efficiency: float, have: Held) -> _Time:
    tokens = job.batch_size * job.seq_len
    per_token = flops.matmul_flops(job.model, lora_config=job.lora, freeze=job.freeze)
    useful = tokens * per_token + job.batch_size * flops.attention_flops(job.model, job.seq_len, freeze=job.freeze)
    executed = tokens * executed_flops(job)
    moved = traffic(job, shape, device, have)
    if device is None:
        return _Time(useful, executed, moved, None, None, None, None)
    num_devices = shape[0] * shape[1] * shape[2] * shape[3]
    # The update reads and writes parameters and moments once and reads the gradients.
    update = (2 * have.trainable + 2 * have.optimizer + have.gradients) / device.memory_bandwidth
    compute = executed / (num_devices * device.peak_flops * efficiency) + update
    waited = sum(each.seconds for each in moved if each.axis == "tensor")
    hidden = [each for each in moved if each.axis != "tensor"]
    # All hidden traffic shares the wires of a device.
    step = max(compute + waited, sum(each.seconds for each in hidden))
    slowest = max(moved, key=lambda each: each.seconds, default=None)
    bound = "compute" if step <= compute + waited and waited < compute else f"communication over {slowest.axis}"
    return _Time(useful, executed, moved, compute, step, useful / (step * num_devices * device.peak_flops), bound)


def executed_flops(job: Job) -> int:
    """Returns the FLOPs per token that a device executes: useful ones, recomputation, and masked attention scores.

    Recomputed: the logits always, a layer's products with remat=full, attention with any remat and, once more, where
    its back end keeps no weights (all but xla). Back ends compute all that a mask hides: the half of the causal one,
    and what lies beyond a window; but not cudnn_packed, and ring computes no more of the causal half than half a block
    beside every query. Layers below all that is trained are gone through once.
    """
    config = job.model
    head = config.d_model * (config.vocab_size if config.head == "lm" else 1)
    layers = num_matmul_params(config) - head
    hidden = {
        "cudnn_packed": 0.0,
        "ring": min(1.0, (ring_attention.KEY_BLOCK + ring_attention.QUERY_CHUNK) / job.seq_len),
    }
    causal = flops.attention_flops(dataclasses.replace(config, window=None), 1) // 3 * job.seq_len
    attention = round(causal * (1 + hidden.get(config.attention, 1.0)))
    executed = flops.matmul_flops(config, lora_config=job.lora, freeze=job.freeze) + 2 * head
    if not flops.gradients_reach_layers(config, job.freeze):
        return executed + attention
    executed += 2 * layers if config.remat == "full" else 0
    return executed + attention * (3 + (config.remat != "none") + (config.attention != "xla"))


def traffic(job: Job, shape: tuple[int, int, int, int], device: Device | None, have: Held) -> tuple[Traffic, ...]:
    """Returns what a device sends per step over every axis of more than one device.

    fsdp: parameters gathered before the forward and the backward pass of each micro-batch (a recomputing backward pass
    uses the same copy), gradients scattered. data: gradients summed. sequence: keys and values round the ring, there
    and back with their gradients, once more where remat recomputes attention; gradients summed. tensor: two sums of the
    residual stream per layer and direction, one more where remat=full recomputes, and embedding and head.
    """
    data, fsdp, sequence, tensor = shape
    config, parts = job.model, job.accumulate
    width = jnp.dtype(config.dtype).itemsize
    rows, time = memory.rows_per_device(job, shape), job.seq_len // sequence
    weights = num_params(config) * width // tensor if job.quantised is None else have.frozen * fsdp
    gradients = have.trained_elements * width
    stream = rows * time * config.d_model * width
    local = memory.local_config(config, tensor)
    keys = 2 * rows * time * local.num_kv_heads * config.head_dim * width
    rounds = 3 + (config.remat != "none")
    zero_one = job.mesh.optimizer_state == "over_data"
    replicas = parts * gradients + have.trainable if zero_one else 2 * parts * gradients
    sums = config.num_layers * (4 + (config.remat == "full")) + 2

    def share(size):
        return (size - 1) / size

    volumes = {
        "data": (share(data) * replicas, "gradients summed" + (", parameters gathered" if zero_one else "")),
        "fsdp": (
            share(fsdp) * parts * (2 * weights + gradients * fsdp),
            "parameters gathered twice per micro-batch, gradients scattered",
        ),
        "sequence": (
            share(sequence) * parts * (config.num_layers * rounds * keys * sequence + 2 * gradients),
            "keys and values round the ring, gradients summed",
        ),
        "tensor": (share(tensor) * 2 * parts * sums * stream, "residual stream summed"),
    }
    strides, found = _strides(shape), []
    for axis, size in zip(MESH_AXES, shape, strict=True):
        if size == 1:
            continue
        volume, what = volumes[axis]
        inside = device is None or strides[axis] * size <= device.devices_per_node
        speed = None if device is None else device.link_bandwidth if inside else device.network_bandwidth
        seconds = None if speed is None else volume / speed
        found.append(Traffic(axis, size, int(volume), seconds, "link" if inside else "network", what))
    return tuple(found)


def _strides(shape: tuple[int, int, int, int]) -> dict[str, int]:
    """Returns how far apart neighbours along each axis are, in devices: the last axis changes fastest."""
    _, fsdp, sequence, tensor = shape
    return {"tensor": 1, "sequence": tensor, "fsdp": tensor * sequence, "data": tensor * sequence * fsdp}


# --- search ----------------------------------------------------------------------------------------------------------


def meshes(
    job: Job,
    *,
    num_devices: int,
    device: Device,
    efficiency: float = EFFICIENCY,
    memory_share: float = MEMORY_SHARE,
    top: int = 5,
) -> list[Plan]:
    """Returns plans of the same batch on other meshes, fastest first: all that fit, with the fewest micro-batches.

    Tried are all ways to factor the devices with `tensor` inside a node and at least 1,024 tokens of a row on each
    device. Micro-batches are as few as fit the memory.
    """
    limit = int(device.memory * memory_share)
    found = []
    for shape in _factorisations(num_devices):
        data, fsdp, sequence, tensor = shape
        if tensor > device.devices_per_node or (sequence > 1 and job.seq_len // sequence < 1024):
            continue
        mesh = dataclasses.replace(job.mesh, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor)
        model = job.model if sequence == 1 else dataclasses.replace(job.model, attention="ring")
        tried = dataclasses.replace(job, mesh=mesh, model=model)
        fitting = _fewest_parts(tried, shape, limit)
        if fitting is not None:
            found.append(
                make_plan(
                    fitting, num_devices=num_devices, device=device, efficiency=efficiency, memory_share=memory_share
                )
            )
    return sorted(found, key=lambda plan: plan.step_seconds)[:top]


def _factorisations(num_devices: int) -> Iterator[tuple[int, int, int, int]]:
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    for data, fsdp, sequence in itertools.product(divisors, repeat=3):
        if num_devices % (data * fsdp * sequence) == 0:
            yield data, fsdp, sequence, num_devices // (data * fsdp * sequence)


def _fewest_parts(job: Job, shape, limit: int) -> Job | None:
    """Returns the job with the smallest number of micro-batches that fits, None where none does."""
    shards = shape[0] * shape[1]
    if job.batch_size % shards:
        return None
    rows = job.batch_size // shards
    try:
        # Whether there are sums of micro-batches at all is what changes the state's memory; how many does not.
        have = {several: memory.held(dataclasses.replace(job, accumulate=1 + several), shape) for several in (0, 1)}
    except ValueError:
        return None
    for parts in (parts for parts in range(1, rows + 1) if rows % parts == 0):
        tried = dataclasses.replace(job, accumulate=parts)
        if memory.estimate(tried, shape, have[parts > 1]).total <= limit:
            return tried
    return None


# --- text ------------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """Returns the plan as a table for the terminal, with what is exact and what is estimated."""
    job, lines = plan.job, []
    size = " x ".join(f"{axis} {count}" for axis, count in zip(MESH_AXES, plan.shape) if count > 1) or "one device"
    name = plan.device.name if plan.device else "unnamed device"
    # A model of a laptop would hold 0.00 GiB of everything.
    unit, scale = ("GiB", GIB) if plan.memory.total >= GIB else ("MiB", MIB)
    rows = memory.rows_per_device(job, plan.shape)
    lines += [
        f"{num_params(job.model):,} parameters, {_method(job)}, {plan.num_devices} x {name} ({size})",
        f"batch {job.batch_size} x {job.seq_len} = {plan.tokens_per_step:,} tokens per step, {job.accumulate} "
        f"micro-batches of {rows} rows per device; {job.model.dtype}, remat {job.model.remat}, attention "
        f"{job.model.attention}",
        "",
        f"{'one device holds':34}{unit:>9}",
    ]
    for role in plan.memory.roles:
        kind = "exact" if role.exact else "estimate"
        lines.append(f"  {role.name:32}{role.bytes / scale:9.2f}  {kind:9} {role.note}".rstrip())
    lines.append(f"  {'total':32}{plan.memory.total / scale:9.2f}  {plan.memory.exact / scale:.2f} of it exact")
    moments = ", ".join(f"{name} {size / scale:.2f}" for name, size in plan.memory.phases.items())
    lines.append(f"  moments besides the state (estimates, the largest counts): {moments}")
    lines += ["", *_time_lines(plan), *_traffic_lines(plan)]
    return "\n".join(lines)


def _time_lines(plan: Plan) -> list[str]:
    per_token = plan.flops / plan.tokens_per_step
    formula = flops.formula(plan.job.model, lora_config=plan.job.lora, freeze=plan.job.freeze)
    lines = [f"{plan.flops:.3e} FLOPs per step ({per_token:.4e} per token: {formula})"]
    lines.append(f"  executed, recomputation and masked scores included: {plan.executed_flops:.3e}")
    if plan.step_seconds is not None:
        speed = plan.tokens_per_step / plan.step_seconds
        lines.append(
            f"  {plan.step_seconds:.3f} s per step, {speed:,.0f} tokens/s, {speed / plan.num_devices:,.0f} per device, "
            f"MFU {plan.mfu:.1%} of {plan.device.peak_flops / 1e12:.0f} TFLOP/s; bound by {plan.bound}"
        )
        lines.append(f"  if products reach {plan.efficiency:.0%} of the peak (--efficiency) and hide the traffic")
    return lines


def _method(job: Job) -> str:
    """Returns the method in words: its options, and how many parameters it trains where not all."""
    trained, options = _num_trained(job), []
    if job.lora is not None:
        options += [job.lora.kind, job.lora.scaling, job.lora.initialisation]
    if job.quantised is not None:
        options.append(job.quantised.scheme)
    said = [option for option in options if option not in ("lora", "zero")]
    said += [] if trained == num_params(job.model) else [f"{trained:,} trained"]
    return job.method + (f" ({', '.join(said)})" if said else "")


def _num_trained(job: Job) -> int:
    if job.lora is not None:
        return flops.lora_params(job.model, job.lora)
    kept = split(memory.abstract_weights(job.model).params, job.freeze).trainable
    return sum(leaf.size for leaf in jax.tree.leaves(kept))


def _traffic_lines(plan: Plan) -> list[str]:
    lines = []
    for each in plan.traffic:
        took = "" if each.seconds is None else f"  {each.seconds:7.3f} s over the {each.path}"
        lines.append(f"  {each.axis:9}{each.size:4} {each.bytes / GIB:9.2f} GiB{took}  {each.what}")
    return ["", "sent per device and step", *lines] if lines else []


def verdict(plan: Plan) -> str:
    """Returns the last line of a plan: whether it fits, how far from the limit, and what could be done."""
    if plan.limit is None:
        return f"{plan.memory.total / GIB:.1f} GiB per device; name a --device to hold it against"
    have = f"{plan.memory.total / GIB:.1f} of {plan.limit / GIB:.1f} GiB"
    if plan.fits:
        room = f"the largest batch of this mesh is {plan.largest_batch} rows"
        share = plan.memory.total / plan.device.memory
        hint = ""
        if share > JAX_MEMORY_SHARE:
            hint = f"; set XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 (jax takes {JAX_MEMORY_SHARE} of the memory by itself)"
        return f"fits: {have} per {plan.device.name}; {room}{hint}"
    return f"does not fit: {have} per {plan.device.name}. {' '.join(remedies(plan))}"


class Mended(NamedTuple):
    """What makes a plan fit, and the bytes that one device then holds."""

    changes: dict[str, str | int]
    bytes: int


def mended(plan: Plan) -> Mended | None:
    """Returns the smallest change that makes a plan fit: recomputation, attention in chunks, more micro-batches, fewer
    rows; no change for one that fits. Each was tried. None where not even one row per device fits."""
    job, limit = plan.job, plan.limit
    if limit is None or plan.fits:
        return Mended({}, plan.memory.total)
    changes = {"remat": "full"} if job.model.remat != "full" else {}
    changes |= {"attention": "chunked"} if job.model.attention == "xla" else {}
    for names in [{name: changes[name]} for name in changes] + [changes]:
        tried = dataclasses.replace(job, model=dataclasses.replace(job.model, **names))
        total = memory.estimate(tried, plan.shape).total
        if names and total <= limit:
            return Mended(names, total)
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, **changes))
    fewest = _fewest_parts(job, plan.shape, limit)
    if fewest is not None:
        return Mended(changes | {"accumulate": fewest.accumulate}, memory.estimate(fewest, plan.shape).total)
    if rows := largest_batch(job, plan.shape, limit):
        fewer = dataclasses.replace(job, batch_size=rows)
        return Mended(changes | {"batch size": rows}, memory.estimate(fewer, plan.shape).total)
    return None


def remedies(plan: Plan) -> list[str]:
    """Returns what makes a plan that does not fit fit; each was tried, and the first kind that helps is named."""
    job, limit = plan.job, plan.limit
    if limit is None or plan.fits:
        return []
    if (found := mended(plan)) is not None:
        return [f"Fits with {_listed(found.changes)}."]
    said = ["Not even one row per device fits: shard the state over more devices (--mesh)."]
    least = {"remat": "full", "attention": "chunked" if job.model.attention == "xla" else job.model.attention}
    adapters = dataclasses.replace(
        job, lora=job.lora or LoraConfig(), model=dataclasses.replace(job.model, **least), accumulate=1
    )
    if job.lora is None and memory.estimate(adapters, plan.shape, rows=1).total <= limit:
        return [*said, "Adapters (method lora) would fit."]
    quantised = dataclasses.replace(adapters, quantised=Quantised())
    if job.quantised is None and memory.estimate(quantised, plan.shape, rows=1).total <= limit:
        said.append("Adapters over a base in four bits (method qlora) would fit.")
    return said


def _listed(changes: dict[str, str | int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in changes.items())
