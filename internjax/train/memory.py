"""Bytes on one device by role: the state and the batch exactly, what a step needs besides by estimate.

Exact: shapes and shardings of `step.abstract_state`, the very tree that a run allocates. Estimates: what jax's own
differentiation saves for the backward pass (read off the traced loss, before the compiler fuses or recomputes any of
it), and working sets by formula. Nothing is allocated and no device is needed.

B rows, T time, D embed, F ffn, N query heads, V vocabulary, L layers, C loss chunk.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from internjax import sharding
from internjax.kernels.attention import QUERY_CHUNK
from internjax.kernels.cudnn_attention import MAX_SEGMENTS
from internjax.kernels.ring_attention import KEY_BLOCK
from internjax.model import decoder, lora, quantize
from internjax.model.cache import CacheDType
from internjax.model.config import ModelConfig, in_shape
from internjax.model.lora import LoraConfig
from internjax.model.quantize import Quantised
from internjax.sharding import MeshConfig
from internjax.train.batch import Batch
from internjax.train.freezing import joined, split
from internjax.train.losses import next_token
from internjax.train.optimizer import AdamW, Constant, Optimizer, make_optimizer
from internjax.train.step import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained, and how: all that memory and time follow from."""

    model: ModelConfig
    batch_size: int
    """Rows of a batch over all devices."""
    seq_len: int
    mesh: MeshConfig = MeshConfig()
    accumulate: int = 1
    """Micro-batches per update."""
    optimizer: Optimizer = AdamW()
    lora: LoraConfig | None = None
    """Adapters are trained and the model's own parameters frozen."""
    quantised: Quantised | None = None
    """The frozen kernels are quantised (QLoRA); wants `lora`."""
    chunk_size: int = 512
    """Time steps whose logits are held at once."""
    freeze: tuple[str, ...] = ()
    """Patterns of the parameters that a full run does not train (train.freezing)."""

    def __post_init__(self):
        if self.quantised is not None and self.lora is None:
            raise ValueError("quantised kernels cannot be trained; give lora as well (QLoRA), or leave quantised out")
        if self.freeze and self.lora is not None:
            raise ValueError(f"freeze={self.freeze} is for full runs; under adapters the whole model is frozen")
        if self.lora is None and getattr(self.optimizer, "lora_plus_ratio", 1.0) != 1.0:
            raise ValueError("lora_plus_ratio is the rate of adapters, and none are trained; set it to 1")
        for name in ("batch_size", "seq_len", "accumulate", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, given {getattr(self, name)}")

    @property
    def method(self) -> Literal["full", "lora", "qlora"]:
        return "full" if self.lora is None else "lora" if self.quantised is None else "qlora"


class Role(NamedTuple):
    """What a part of one device's memory is for."""

    name: str
    bytes: int
    exact: bool
    """From shapes and shardings alone; an estimate otherwise."""
    note: str


def abstract_mesh(shape: tuple[int, int, int, int]) -> AbstractMesh:
    """Returns a mesh of devices that are not there: shapes are cut by it, nothing can be placed on it."""
    return AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES))


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or shapes with shardings."""

    def size(leaf):
        placed = getattr(leaf, "sharding", None)
        shape = leaf.shape if placed is None else placed.shard_shape(leaf.shape)
        return int(np.prod(shape, dtype=np.int64)) * jnp.dtype(leaf.dtype).itemsize

    # Random keys are two words each and no memory worth counting; their dtype has no numpy twin.
    leaves = (leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    return sum(map(size, leaves))


class Weights(NamedTuple):
    """Abstract parameters, and the logical axes of each leaf."""

    params: dict
    axes: dict


@functools.lru_cache(maxsize=64)
def abstract_weights(config: ModelConfig, quantised: Quantised | None = None) -> Weights:
    """Returns shapes and axes of a model's parameters, quantised or not."""
    params, axes = decoder.abstract_params(config), decoder.logical_axes(config)
    if quantised is None:
        return Weights(params, axes)
    params = jax.eval_shape(functools.partial(quantize.quantize_params, **dataclasses.asdict(quantised)), params)
    return Weights(params, quantize.logical_axes(params, axes))


@functools.lru_cache(maxsize=64)
def abstract_adapters(config: ModelConfig, lora_config: LoraConfig) -> Weights:
    """Returns shapes and axes of the adapters of a model."""
    base = abstract_weights(config)
    weights = jax.eval_shape(functools.partial(lora.init_lora, lora_config, base.params), jax.random.key(0))
    return Weights(weights, lora.logical_axes(weights, base.axes))


def job_state(job: Job, mesh: Any) -> TrainState:
    """Returns the abstract state of a job on a mesh (abstract or of devices); raises ValueError where it does not fit.

    It is what `init_state` allocates: shapes, dtypes and shardings of every leaf.
    """
    # Which schedule is chosen changes no shape.
    optimizer = make_optimizer(job.optimizer, Constant(), 1)
    model = in_shape(job.model)
    base = abstract_weights(model, job.quantised)
    placed = {"mesh": mesh, "optimizer_state": job.mesh.optimizer_state}
    if job.lora is None:
        parts, axes = split(base.params, job.freeze), split(base.axes, job.freeze)
        return abstract_state(
            parts.trainable,
            optimizer,
            frozen=parts.frozen or None,
            axes=axes.trainable,
            frozen_axes=axes.frozen or None,
            **placed,
        )
    adapters = abstract_adapters(model, job.lora)
    return abstract_state(
        adapters.params, optimizer, frozen=base.params, axes=adapters.axes, frozen_axes=base.axes, **placed
    )


def abstract_batch(job: Job, mesh: Any = None) -> Batch:
    """Returns the shapes of a batch, on the mesh where one is given."""
    placed = None if mesh is None else sharding.batch_sharding(mesh)
    ids, mask = (
        jax.ShapeDtypeStruct((job.batch_size, job.seq_len), dtype, sharding=placed)
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(ids, ids, mask, ids, ids)


# --- what differentiation saves --------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What the backward pass is given by the forward pass, for one row of T tokens and all layers."""

    per_row: int
    """Bytes that depend on the batch."""
    weight_copies: int
    """Bytes that do not: parameters in the dtype of the computation, kept per layer (remat="none")."""


def _traced_as(config: ModelConfig) -> ModelConfig:
    """Returns the config with an attention that can be traced anywhere: flash back ends save what `chunked` saves."""
    return config if config.attention == "xla" else dataclasses.replace(config, attention="chunked")


def saved_for_backward(
    config: ModelConfig,
    seq_len: int,
    *,
    lora_config: LoraConfig | None,
    quantised: Quantised | None,
    chunk_size: int,
    freeze: tuple[str, ...] = (),
) -> Saved:
    """Returns what jax saves between the forward and the backward pass of `next_token`, from a trace of its vjp."""
    saved = _traced_saved(in_shape(_traced_as(config)), seq_len, lora_config, quantised, chunk_size, freeze)
    if config.attention != "cudnn_packed" or config.remat != "none":
        return saved
    # It keeps its statistics once per document that a row may have; the trace has another back end.
    statistics = 4 * config.num_layers * config.num_heads * seq_len * MAX_SEGMENTS
    return saved._replace(per_row=saved.per_row + statistics)


@functools.lru_cache(maxsize=256)
def _traced_saved(
    config: ModelConfig,
    seq_len: int,
    lora_config: LoraConfig | None,
    quantised: Quantised | None,
    chunk_size: int,
    freeze: tuple[str, ...],
) -> Saved:
    base = abstract_weights(config, quantised).params
    trainable, frozen = base, None
    if lora_config is not None:
        trainable, frozen = abstract_adapters(config, lora_config).params, base
    ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
    batch = Batch(ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32), ids, ids)
    loss = next_token(config, lora_config=lora_config, chunk_size=chunk_size)
    if freeze:
        (trainable, frozen), loss = split(base, freeze), joined(loss)

    def residuals(batch, trainable, frozen):
        _, backward = jax.vjp(lambda part: loss(part, frozen, batch, jax.random.key(0)).total, trainable)
        return jax.tree.leaves(backward)

    with sharding.unconstrained():
        jaxpr = jax.make_jaxpr(residuals)(batch, trainable, frozen).jaxpr
    from_batch = [index < len(batch) for index in range(len(jaxpr.invars))]
    # A residual that is an input is held anyway, and one that is saved twice is held once.
    seen, sizes = set(jaxpr.invars), {True: 0, False: 0}
    for variable, depends in zip(jaxpr.outvars, _tainted(jaxpr, from_batch), strict=True):
        if isinstance(variable, jax.extend.core.Literal) or variable in seen:
            continue
        seen.add(variable)
        if not jnp.issubdtype(variable.aval.dtype, jax.dtypes.prng_key):
            sizes[depends] += variable.aval.size * variable.aval.dtype.itemsize
    return Saved(sizes[True], sizes[False])


def _tainted(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Returns for every output of a jaxpr whether it depends on one of the marked inputs; loops are looked into."""
    marked = {variable for variable, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom):
        return not isinstance(atom, jax.extend.core.Literal) and atom in marked

    for equation in jaxpr.eqns:
        marks = [is_marked(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr")
        if equation.primitive.name == "scan":
            # Inputs are constants, carry, stacked; outputs carry, stacked. They are told apart by rank: the parameters
            # that count them differ between versions of jax.
            body = getattr(inner, "jaxpr", inner)
            num_carry = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.outvars, body.outvars))
            first = sum(a.aval.ndim == b.aval.ndim for a, b in zip(equation.invars, body.invars)) - num_carry
            outs = _tainted(body, marks)
            for _ in range(num_carry):  # what a turn marks in the carry, the next turn reads
                carry = [a or b for a, b in zip(marks[first : first + num_carry], outs[:num_carry])]
                marks[first : first + num_carry] = carry
                outs = _tainted(body, marks)
        elif equation.primitive.name in ("jit", "pjit", "remat", "checkpoint", "remat2") and inner is not None:
            outs = _tainted(getattr(inner, "jaxpr", inner), marks)
        else:
            outs = [any(marks)] * len(equation.outvars)
        marked.update(variable for variable, mark in zip(equation.outvars, outs) if mark)
    return [is_marked(atom) for atom in jaxpr.outvars]


# --- working sets ----------------------------------------------------------------------------------------------------

# Fitted to the temporaries of 12 training steps of small decoders compiled for the CPU in float32 (jax 0.10.2; full and
# LoRA, 2k and 16k vocabulary, remat full and dots): the sums below were within 8 % of nine of them, and up to 25 % too
# high for remat=dots. The terms of logits and head were fitted to 49 more with large heads (8k and 16k vocabulary, 512
# and 1,024 wide, one layer, 1 to 8 shards of data, fsdp and time): within 20 % of most of them. For the ring with 512
# to 4,096 positions on a device and 2 to 8 shards of time they were 26 % too low to 19 % too high (nine steps of two
# layers). A GPU compiler fuses more and keeps bfloat16: there these are estimates until they have been held against
# measurements.
_LAYER_BACKWARD = 1.1
"""Of what one layer saves without remat: alive while its backward pass runs, recomputed values included."""
_SCORE_CHUNKS = 1.0
"""Blocks of attention scores that a chunked backward pass holds beside the layer's saved values."""
_LOGITS = 3.7
"""Copies of one chunk's float32 logits, of a trained head and of a frozen one: values, weights and gradient."""
_HEAD_COPIES = 3.5
"""Float32 copies of a trained head while the loss runs: gradient, one chunk's share of it, and loop carries."""
_WHOLE_GRADIENTS = 1.3
"""Float32 copies of a trained head beside the gathered one on each shard of an fsdp axis: the sum of its gradient over
the chunks, which is cut up only after them. A frozen head is held twice while there are several chunks."""
_UPDATE_LEAVES = 2.0
"""Float32 copies of the largest trained leaf: the update goes leaf by leaf and writes in place. This one is assumed and
not fitted: the CPU compiler keeps 1.8 float32 copies of all trained leaves instead."""


class Memory(NamedTuple):
    """One device's bytes by role, and the working sets of which the largest counts."""

    roles: tuple[Role, ...]
    phases: dict[str, int]
    """Bytes besides the state at three moments: loss over the vocabulary, backward pass of a layer, update."""

    @property
    def total(self) -> int:
        return sum(role.bytes for role in self.roles)

    @property
    def exact(self) -> int:
        return sum(role.bytes for role in self.roles if role.exact)


class Held(NamedTuple):
    """Bytes of the state on one device, by its parts."""

    trainable: int
    optimizer: int
    frozen: int
    gradients: int
    """In the parameters' dtype; with accumulation the float32 sums that the step carries as well."""
    trained_elements: int
    largest_leaf: int
    """Elements of the largest trained leaf."""


def held(job: Job, shape: tuple[int, int, int, int]) -> Held:
    """Returns what the state of a job takes on one device of a mesh: exact but for the gradients, which come and go.

    Raises ValueError as `job_state` does.
    """
    state = job_state(job, abstract_mesh(shape))
    trainable = device_bytes(state.trainable)
    sizes = [int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state.trainable)]
    elements = sum(sizes)
    # Sums may be cut over the replicas too; one part's gradients are not.
    replicas = shape[0] if job.mesh.optimizer_state == "over_data" else 1
    gradients = trainable + (0 if job.accumulate == 1 else 4 * elements // replicas)
    frozen = 0 if state.frozen is None else device_bytes(state.frozen)
    return Held(trainable, device_bytes(state.opt_state), frozen, gradients, elements, max(sizes))


def local_config(config: ModelConfig, tensor: int) -> ModelConfig:
    """Returns the widths that one of `tensor` shards computes; heads that are fewer than shards stay whole."""

    def cut(size):
        return size // tensor if size % tensor == 0 else size

    heads, kv_heads = cut(config.num_heads), cut(config.num_kv_heads)
    if heads % kv_heads:
        heads, kv_heads = config.num_heads, config.num_kv_heads
    sizes = {"vocab_size": cut(config.vocab_size), "ffn_dim": cut(config.ffn_dim)}
    return dataclasses.replace(config, num_heads=heads, num_kv_heads=kv_heads, **sizes)


def rows_per_device(job: Job, shape: tuple[int, int, int, int]) -> int:
    """Returns the rows of a micro-batch on one device; raises ValueError where the batch cannot be cut like that."""
    data, fsdp, sequence, _ = shape
    parts = data * fsdp * job.accumulate
    if job.batch_size % parts:
        raise ValueError(
            f"a batch of {job.batch_size} rows cannot be cut into data {data} x fsdp {fsdp} x accumulate "
            f"{job.accumulate} = {parts} equal parts. Choose a multiple of {parts} as batch size, or other sizes."
        )
    if job.seq_len % sequence:
        raise ValueError(
            f"rows of {job.seq_len} tokens cannot be cut over sequence {sequence} of the mesh. Choose a multiple of "
            f"{sequence} as seq_len, or sequence=1."
        )
    return job.batch_size // parts


def estimate(job: Job, shape: tuple[int, int, int, int], have: Held | None = None, rows: int | None = None) -> Memory:
    """Returns one device's memory during a training step.

    `have` saves taking the state's shapes again; `rows` asks for other rows per device than the batch gives. Raises
    ValueError where the mesh does not divide the model or the batch.
    """
    have = held(job, shape) if have is None else have
    rows = rows_per_device(job, shape) if rows is None else rows
    config, sequence = local_config(job.model, shape[3]), shape[2]
    how = {"lora_config": job.lora, "quantised": job.quantised, "chunk_size": job.chunk_size, "freeze": job.freeze}
    saved = saved_for_backward(config, job.seq_len, **how)
    plain = saved_for_backward(dataclasses.replace(config, remat="none"), job.seq_len, **how)
    activations = rows * saved.per_row // sequence + saved.weight_copies // shape[1]
    phases = {
        "loss": activations + _loss_bytes(job, config, rows, sequence, shape[1]),
        "backward": activations
        + have.gradients
        + _layer_bytes(job, config, rows * plain.per_row // sequence, rows, sequence)
        + _weights_in_use(job, config, shape[1]),
        "update": have.gradients + int(_UPDATE_LEAVES * 4 * have.largest_leaf),
    }
    peak = max(phases.values())
    working = max(peak - have.gradients - activations, 0)
    own_rows = abstract_batch(dataclasses.replace(job, batch_size=rows * job.accumulate))
    batch_bytes = 2 * device_bytes(own_rows) // sequence
    largest = max(phases, key=phases.get)
    name = "parameters" if job.lora is None else "adapters"
    base = "frozen parameters, quantised" if job.quantised is not None else "frozen parameters" if have.frozen else ""
    sums = "float32 sums of the micro-batches, and one's own" if job.accumulate > 1 else "in the parameters' dtype"
    roles = (
        Role(base, have.frozen, True, "") if base else None,
        Role(name, have.trainable, True, ""),
        Role("optimizer state", have.optimizer, True, type(job.optimizer).__name__),
        Role("gradients", have.gradients, False, sums),
        Role("batch", batch_bytes, True, "this step's and the next one's"),
        Role("activations", activations, False, f"saved for the backward pass by remat={job.model.remat}"),
        Role("working set", working, False, f"largest moment: {largest}"),
    )
    return Memory(tuple(role for role in roles if role is not None), phases)


def _loss_bytes(job: Job, config: ModelConfig, rows: int, sequence: int, fsdp: int) -> int:
    """Bytes of one chunk's logits and of the head. Every shard cuts its own time into chunks (decoder._per_shard)."""
    head_trained = job.lora is None and _is_trained(job, "embed" if config.tie_embeddings else "head")
    time = job.seq_len // sequence
    logits = _LOGITS * rows * min(job.chunk_size, time) * config.vocab_size * 4
    head = config.d_model * config.vocab_size
    own = _HEAD_COPIES * 4 * head / fsdp if head_trained else 0
    # Gathered as it is stored, and cast or dequantised in every chunk.
    dtype = config.param_dtype if fsdp > 1 and job.quantised is None else config.dtype
    gathered = head * jnp.dtype(dtype).itemsize if fsdp > 1 or config.dtype != config.param_dtype else 0
    whole = 0
    if fsdp > 1 and head_trained:
        whole = _WHOLE_GRADIENTS * 4 * head
    elif fsdp > 1 and time > job.chunk_size:
        whole = gathered
    return int(logits + own + gathered + whole)


def _is_trained(job: Job, name: str) -> bool:
    """Whether a full run trains something under this name of the parameter tree."""
    return name in split(abstract_weights(job.model).axes, job.freeze).trainable


def _layer_bytes(job: Job, config: ModelConfig, saved_by_all: int, rows: int, sequence: int) -> int:
    layer = saved_by_all // config.num_layers
    if config.attention == "xla":
        scores = 0  # they are among the saved values
    elif config.attention == "ring":
        time = job.seq_len // sequence
        scores = 4 * rows * config.num_heads * min(QUERY_CHUNK, time) * min(KEY_BLOCK, time)
    elif config.attention == "chunked" or sequence > 1:
        scores = 4 * rows * config.num_heads * min(QUERY_CHUNK, job.seq_len) * job.seq_len // sequence
    else:
        scores = 0  # a flash kernel holds blocks on the chip; what cuDNN works with in the backward pass is not known
    factor = 1.0 if config.remat == "none" else _LAYER_BACKWARD
    return int(max(factor * layer, layer + _SCORE_CHUNKS * scores))


def _weights_in_use(job: Job, config: ModelConfig, fsdp: int) -> int:
    """Bytes of a layer's kernels where the arithmetic reads a copy: gathered, cast or dequantised."""
    itemsize = jnp.dtype(config.dtype).itemsize
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sides = (config.d_model * query, config.d_model * key, config.d_model * config.ffn_dim)
    layer = 2 * (sides[0] + sides[1]) + 3 * sides[2]
    if job.quantised is not None:
        return 2 * max(sides) * itemsize  # one dequantised while the next is made
    gathered = 2 * layer * itemsize if fsdp > 1 else 0  # this layer's, and the next one's on its way
    gradient = layer * itemsize if fsdp > 1 and job.lora is None and _is_trained(job, "layers") else 0
    cast = layer * itemsize if config.dtype != config.param_dtype and fsdp == 1 else 0
    return gathered + gradient + cast


def cache_bytes(config: ModelConfig, rows: int, length: int, *, dtype: CacheDType, tensor: int = 1) -> int:
    """Returns the bytes of a key/value cache of `rows` rows of `length` positions on one of `tensor` shards."""
    from internjax.model.cache import dense_cache

    local = local_config(config, tensor)
    return device_bytes(jax.eval_shape(functools.partial(dense_cache, local, rows, length, dtype=dtype)))
