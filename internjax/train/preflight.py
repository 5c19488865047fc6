"""Preflight: what goes wrong silently is looked for before step 0, in the user's own run.

    report = preflight.run(Subject(job=job, batch=first_batch, tokenizer=tokenizer, ...), cache=Path("runs/.preflight"))
    preview.keep(report, run_folder)

Every check returns what it found or raises ValueError with a remedy; all failures come together as one ValueError.
Checks that compile something are remembered by device, versions, shapes and the sources that they run.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from internjax import sharding
from internjax.kernels import cudnn_attention
from internjax.model import decoder
from internjax.model.lora import apply_config, initialise
from internjax.train import attention_probe, devices, memory, preview
from internjax.train.attention_probe import relative_difference
from internjax.train.batch import Batch
from internjax.train.devices import GIB
from internjax.train.memory import Job
from internjax.train.preview import Report, Result

if TYPE_CHECKING:
    from internjax.text.tokenizer import Tokenizer

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference to the reference, as a share of the reference's largest value, by dtype of the computation."""
MEMORY_MARGIN = 1.2
"""A plan is an estimate: it refuses a run beyond this multiple of the memory, or if the exact part alone is beyond."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is about to be trained."""

    job: Job
    batch: Batch
    """The first batch, as NumPy arrays: the rows of this process."""
    mesh: Mesh | None = None
    tokenizer: "Tokenizer | None" = None
    manifests: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Manifest (`tokenizer_sha256`, `vocab_size`) of every token folder that is read, by folder."""
    conversations: bool = False
    """The data is rendered conversations: prompts must not be learned."""
    checkpoints: Path | None = None
    """Folder that checkpoints go to; it need not exist."""
    params: dict | None = None
    """The frozen base of a run with adapters, on the mesh."""
    seed: int = 0


class Check(NamedTuple):
    """call(subject) -> what was found (passed); it raises ValueError (failed) or Skipped."""

    name: str
    call: Callable[[Subject], str]
    key: Callable[[Subject], Any] | None = None
    """What the finding depends on besides devices, versions and sources; None: it is looked at every time."""


class Skipped(Exception):
    """Raised by a check that has nothing to look at; its text says why."""


def run(
    subject: Subject,
    *,
    cache: Path | None = None,
    checks: Sequence[Check] | None = None,
    show: Callable[[str], None] = print,
    colour: bool = False,
) -> Report:
    """Returns the report of all checks, after showing it; raises one ValueError that names every check that failed.

    `cache` is a folder for findings that need not be made twice; None looks at everything again. In a job of several
    processes all take part, and nothing is remembered.
    """
    if jax.process_count() > 1:
        cache = None  # processes that remember different things would wait for each other
    results = tuple(_result(check, subject, cache) for check in (CHECKS if checks is None else checks))
    shown = () if subject.tokenizer is None else preview.samples(subject.batch, subject.tokenizer)
    report = Report(results, shown)
    show(preview.text(report, colour=colour))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        found = "\n".join(f"  {index}. {each.name}: {each.message}" for index, each in enumerate(failed, 1))
        raise ValueError(f"preflight found {len(failed)} {'problem' if len(failed) == 1 else 'problems'}:\n{found}")
    return report


def _result(check: Check, subject: Subject, cache: Path | None) -> Result:
    started = time.perf_counter()
    path = None if cache is None or check.key is None else cache / f"{_key(check, subject)}.json"
    if path is not None and path.is_file():
        try:
            message = json.loads(path.read_text())["message"]
            return Result(check.name, "passed", message, time.perf_counter() - started, cached=True)
        except (ValueError, KeyError):
            path.unlink(missing_ok=True)  # half a file: look again
    try:
        status, message = "passed", check.call(subject)
    except Skipped as why:
        status, message = "skipped", str(why)
    except ValueError as error:
        status, message = "failed", str(error)
    if path is not None and status == "passed":
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps({"check": check.name, "message": message}))
        new.replace(path)
    return Result(check.name, status, message, time.perf_counter() - started)


def _key(check: Check, subject: Subject) -> str:
    shape = None if subject.mesh is None else dict(subject.mesh.shape)
    devices = sorted({device.device_kind for device in jax.devices()})
    about = (check.name, devices, jax.device_count(), shape, jax.__version__, _sources(), check.key(subject))
    return hashlib.sha256(repr(about).encode()).hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Returns the hash of all code that a cached check runs."""
    core = Path(__file__).parent.parent
    digest = hashlib.sha256((core / "sharding.py").read_bytes())
    for room in ("kernels", "model", "train"):
        for path in sorted((core / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


# --- the mesh and the memory -----------------------------------------------------------------------------------------


def _shape(subject: Subject) -> tuple[int, int, int, int]:
    return (1, 1, 1, 1) if subject.mesh is None else tuple(subject.mesh.shape[axis] for axis in sharding.MESH_AXES)


def check_mesh(subject: Subject) -> str:
    """Whether the axes of the mesh divide rows, time and the model's widths."""
    job, config = subject.job, subject.job.model
    data, fsdp, sequence, tensor = _shape(subject)
    rows = f"data {data} x fsdp {fsdp} x accumulate {job.accumulate}"
    divided = [
        ("batch size", job.batch_size, rows, data * fsdp * job.accumulate),
        ("seq_len", job.seq_len, "sequence", sequence),
        ("width of the model", config.d_model, "fsdp", fsdp),
        ("query heads", config.num_heads, "tensor", tensor),
        ("key/value heads", config.num_kv_heads, "tensor", tensor),
        ("feed-forward width", config.ffn_dim, "tensor", tensor),
        ("vocabulary", config.vocab_size, "tensor", tensor),
    ]
    wrong = []
    for what, size, axis, parts in divided:
        if size % parts:
            sizes = f"{axis} = {parts}" if " x " in axis else f"{axis} {parts}"
            wrong.append(f"{what} {size} is not divided by {sizes}; {_nearest(what, size, parts)}")
    if not wrong:
        try:
            memory.held(job, (data, fsdp, sequence, tensor))
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))
    cut = ", ".join(f"{axis} {size}" for axis, size in zip(sharding.MESH_AXES, _shape(subject)) if size > 1)
    return f"{cut or 'one device'} divides rows, time and widths"


def _nearest(what: str, size: int, parts: int) -> str:
    if what in ("batch size", "seq_len"):
        below, above = size // parts * parts, -(-size // parts) * parts
        return f"take {f'{below} or ' if below else ''}{above}, or another mesh"
    fitting = [number for number in range(1, parts) if size % number == 0]
    return f"take a mesh with {max(fitting)} or another divisor of {size} there"


def check_memory(subject: Subject) -> str:
    """Whether the planned bytes fit the device that is there."""
    limit = memory_limit()
    if limit is None:
        raise Skipped(f"{jax.devices()[0].device_kind} states no memory limit")
    found = memory.estimate(subject.job, _shape(subject))
    planned = f"{found.total / GIB:.1f} GiB planned ({found.exact / GIB:.1f} exact), {limit / GIB:.1f} GiB given to jax"
    if found.exact > limit or found.total > MEMORY_MARGIN * limit:
        raise ValueError(
            f"{planned} per device. Recompute more (remat full), use more micro-batches (accumulate), shard over more "
            "devices, or give jax more of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9); `python -m "
            "experiments.plan` tries them"
        )
    return planned + (", tight" if found.total > 0.9 * limit else "")


def memory_limit() -> int | None:
    """Returns the bytes that jax may use on the first device of this process, None where that is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


# --- dtype, attention and adapters -----------------------------------------------------------------------------------


def check_dtype(subject: Subject) -> str:
    """Whether the device computes in the dtype that is asked for."""
    device, dtype = jax.local_devices()[0], subject.job.model.dtype
    if devices.compute_dtype(device, dtype) != dtype:
        major, minor = devices.compute_capability(device)
        raise ValueError(
            f"{device.device_kind} (compute capability {major}.{minor}) has no bfloat16: every product would be "
            "converted. Compute in float16 with a loss scale"
        )
    capability = devices.compute_capability(device)
    about = "" if capability is None else f" (compute capability {capability[0]}.{capability[1]})"
    return f"{device.device_kind}{about} computes in {dtype}"


def check_attention(subject: Subject) -> str:
    """Whether the attention back end gives the reference's numbers on packed rows, forward and backward."""
    config = subject.job.model
    if problem := devices.attention_problem(jax.local_devices()[0], config.attention):
        raise ValueError(problem)
    if config.attention == "cudnn_packed":
        cudnn_attention.check_rows(subject.batch.segments)
    with _meshed(subject.mesh):
        found = attention_probe.differences(config, _shape(subject), place=_everywhere(subject.mesh))
    tolerance = TOLERANCE[config.dtype]
    wrong = {name: size for name, size in found.items() if not size <= tolerance}
    if wrong:
        sizes = ", ".join(f"{name} by {size:.2g}" for name, size in wrong.items())
        raise ValueError(
            f"attention={config.attention} differs from the reference on packed rows ({sizes} of the largest value; "
            f"{config.dtype} allows {tolerance:g}): documents of a row would see each other, or gradients be wrong. "
            "Use attention=chunked or xla on this device"
        )
    window = attention_probe.window_of(config)
    seen = "" if window is None else f" with a window of {window}"
    seen += " with ALiBi" if config.positions == "alibi" else ""
    return f"{config.attention} equals the reference on packed rows{seen}, within {max(found.values()):.1e}"


def _meshed(mesh: Mesh | None):
    return sharding.use(mesh) if mesh is not None else sharding.unconstrained()


def _everywhere(mesh: Mesh | None) -> NamedSharding | None:
    """Returns where inputs and results of a check live: on every device, so that every process can read them."""
    return None if mesh is None else sharding.replicated(mesh)


def check_adapters(subject: Subject) -> str:
    """Whether fresh adapters change nothing: the logits with and without them."""
    job, params = subject.job, subject.params
    if job.lora is None:
        raise Skipped("the run has no adapters")
    if params is None:
        raise Skipped("the base's parameters were not given")
    # Not of the batch: each process has other rows, and this is computed by all of them together.
    tokens = (7919 * np.arange(16, dtype=np.int32)[None] + 1) % job.model.vocab_size
    # The first layer stands for all of them: PiSSA needs a second base.
    params = params | {"layers": _first_layer(params["layers"])}
    config = dataclasses.replace(job.model, attention="xla", num_layers=1, unroll_layers=1)
    base, weights = jax.jit(functools.partial(initialise, job.lora))(params, jax.random.key(subject.seed))
    adapters = apply_config(weights, dataclasses.replace(job.lora, dropout=0.0))
    place = _everywhere(subject.mesh)

    @functools.partial(jax.jit, out_shardings=place)
    def with_and_without(base, params, tokens, adapters):
        adapted = decoder.logits(base, tokens, config=config, lora=adapters)
        return adapted, decoder.logits(params, tokens, config=config)

    with _meshed(subject.mesh):
        tokens, adapters = jax.device_put((tokens, adapters), place)
        adapted, plain = jax.device_get(with_and_without(base, params, tokens, adapters))
    found, tolerance = relative_difference(adapted, plain), TOLERANCE[job.model.dtype]
    if not found <= tolerance:
        raise ValueError(
            f"the logits with fresh adapters differ from the base's by {found:.2g} of the largest (allowed "
            f"{tolerance:g}): the run would not start from its base. What an adapter adds must be what the base lacks"
        )
    return f"fresh adapters change no logit (largest difference {found:.1e})"


@jax.jit
def _first_layer(layers: dict) -> dict:
    return jax.tree.map(lambda leaf: leaf[:1], layers)


# --- data ------------------------------------------------------------------------------------------------------------


def check_tokens(subject: Subject) -> str:
    """Whether tokenizer, token folders, model and the first batch speak of the same ids."""
    tokenizer, vocab_size = subject.tokenizer, subject.job.model.vocab_size
    wrong = []
    for folder, manifest in subject.manifests.items():
        if tokenizer is not None and manifest["tokenizer_sha256"] != tokenizer.fingerprint:
            wrong.append(
                f"{folder} was written by the tokenizer {manifest['tokenizer_sha256'][:12]}, the run's is "
                f"{tokenizer.fingerprint[:12]}: its ids mean other text. Give the tokenizer that wrote it, or write "
                "the folder anew"
            )
        if manifest.get("vocab_size", 0) > vocab_size:
            wrong.append(
                f"{folder} has ids up to {manifest['vocab_size'] - 1}, the model's embedding {vocab_size} rows. "
                f"Set model.vocab_size to at least {manifest['vocab_size']}"
            )
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        wrong.append(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {vocab_size} rows. Use the tokenizer "
            "that the model was made for"
        )
    batch = subject.batch
    ids = np.concatenate([np.asarray(field).ravel() for field in (batch.tokens, batch.targets)])
    limit = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high >= limit:
        wrong.append(
            f"ids of the first batch lie in {low}..{high}, allowed are 0..{limit - 1}. The token folder belongs to "
            "another tokenizer: write it anew"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
    return f"ids of the first batch lie in {low}..{high}, {limit} are known; {len(subject.manifests)} folders agree"


def check_loss_mask(subject: Subject) -> str:
    """Whether the first batch learns something, and of conversations not everything."""
    mask, real = np.asarray(subject.batch.loss_mask), np.asarray(subject.batch.segments) > 0
    learned, total = int(((mask > 0) & real).sum()), int(real.sum())
    if ((mask != 0) & ~real).any():
        raise ValueError(
            f"{int(((mask != 0) & ~real).sum())} padded positions of the first batch have a loss mask: they would be "
            "learned. Set loss_mask to 0 where segments is 0"
        )
    if learned == 0:
        raise ValueError(
            f"the loss mask of the first batch is zero on all {total} tokens: nothing would be learned. Look at the "
            "preview; the data has no assistant turns, or its template marks none"
        )
    if subject.conversations and learned == total:
        raise ValueError(
            f"all {total} tokens of the first batch are learned, prompts included, though the data is conversations: "
            "the template marks no assistant turns. Write the token folder anew with a template that does"
        )
    return f"{learned} of {total} tokens are learned ({learned / total:.0%})"


# --- disk ------------------------------------------------------------------------------------------------------------


def check_checkpoints(subject: Subject) -> str:
    """Whether the checkpoint folder can be written and holds two checkpoints."""
    folder = subject.checkpoints
    if folder is None:
        raise Skipped("the run writes no checkpoints")
    existing = Path(folder).absolute()
    while not existing.is_dir():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {existing} ({error.strerror}), where checkpoints go. Choose another --run "
            "folder, or change its permissions"
        ) from error
    one = checkpoint_bytes(subject.job)
    wanted, free = 2 * one, shutil.disk_usage(existing).free
    have = _committed(Path(folder))
    wanted -= min(have, 1) * one  # a third is written before the oldest goes
    if free < wanted:
        raise ValueError(
            f"{existing} has {free / GIB:.1f} GiB free, and checkpoints of {one / GIB:.1f} GiB need "
            f"{wanted / GIB:.1f} GiB. Free some space, or choose another --run folder"
        )
    return f"{existing} is writable, {free / GIB:.1f} GiB free for checkpoints of {one / GIB:.2f} GiB"


def checkpoint_bytes(job: Job) -> int:
    """Returns the bytes of one checkpoint, all shards together: what is trained and the optimizer's state."""
    state = memory.job_state(job, None)
    return memory.device_bytes((state.trainable, state.opt_state))


def _committed(folder: Path) -> int:
    from internjax.train.checkpoint import committed_steps

    return len(committed_steps(folder))


def _attention_key(subject: Subject):
    config = subject.job.model
    rows = cudnn_attention.most_documents(subject.batch.segments) if config.attention == "cudnn_packed" else None
    heads = (config.head_dim, config.num_heads, config.num_kv_heads)
    return (config.attention, config.dtype, *heads, config.window, config.positions, rows)


def _adapters_key(subject: Subject):
    return (subject.job.model, subject.job.lora, subject.job.quantised, subject.seed)


CHECKS = (
    Check("mesh", check_mesh, key=lambda subject: subject.job),
    Check("memory", check_memory, key=lambda subject: (subject.job, memory_limit())),
    Check("dtype", check_dtype),
    Check("attention", check_attention, key=_attention_key),
    Check("adapters", check_adapters, key=_adapters_key),
    Check("tokens", check_tokens),
    Check("loss mask", check_loss_mask),
    Check("checkpoints", check_checkpoints),
)
