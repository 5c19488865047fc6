"""What values alone show to be impossible, said before anything is read or allocated."""

import math

from internjax.model.config import DynamicNTK, LinearScaling, ModelConfig, YarnScaling
from internjax.sharding import MESH_AXES, MeshConfig
from internjax.train.optimizer import Schedule, check_schedule


def check_run(
    model: ModelConfig,
    *,
    mesh: MeshConfig,
    num_devices: int,
    batch_size: int,
    seq_len: int,
    accumulate: int = 1,
    schedule: Schedule | None = None,
    num_steps: int | None = None,
) -> None:
    """Raises ValueError naming everything that keeps a training from running: given, wanted, and what to change."""
    for name, value in {"batch_size": batch_size, "seq_len": seq_len, "accumulate": accumulate}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; given {value}")
    sizes = dict(zip(MESH_AXES, mesh.shape(num_devices), strict=True))
    found = [
        *_batch_problems(sizes, batch_size, seq_len, accumulate),
        *_model_problems(model, sizes),
        *_length_problems(model, seq_len),
    ]
    if schedule is not None and num_steps is not None:
        try:
            check_schedule(schedule, num_steps)
        except ValueError as error:
            found.append(str(error))
    if len(found) == 1:
        raise ValueError(found[0])
    if found:
        raise ValueError(f"{len(found)} things do not fit together:\n" + "\n".join(f"- {text}" for text in found))


def _batch_problems(sizes: dict[str, int], batch_size: int, seq_len: int, accumulate: int):
    parts = sizes["data"] * sizes["fsdp"] * accumulate
    if batch_size % parts:
        below, above = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = f"{below} or {above}" if below else str(above)
        yield (
            f"a batch of {batch_size} rows cannot be cut into data {sizes['data']} x fsdp {sizes['fsdp']} x accumulate "
            f"{accumulate} = {parts} equal parts. Set batch_size to {near}, or change accumulate or the mesh."
        )
    if seq_len % sizes["sequence"]:
        yield (
            f"rows of {seq_len} tokens cannot be cut over sequence {sizes['sequence']} of the mesh. Set seq_len to a "
            f"multiple of {sizes['sequence']}, or another sequence axis."
        )


def _model_problems(model: ModelConfig, sizes: dict[str, int]):
    divided = {
        "tensor": ("num_heads", "num_kv_heads", "ffn_dim", *(["vocab_size"] if model.head == "lm" else [])),
        "fsdp": ("d_model",),
    }
    for axis, names in divided.items():
        wrong = [f"{name} {getattr(model, name)}" for name in names if getattr(model, name) % sizes[axis]]
        if wrong:
            fitting = math.gcd(*(getattr(model, name) for name in names))
            yield (
                f"{axis} {sizes[axis]} of the mesh does not divide the model's {' and '.join(wrong)}. "
                f"Set mesh.{axis} to a divisor of {fitting}."
            )
    if model.attention == "ring" and math.prod(sizes.values()) == 1:
        yield "attention=ring goes round a mesh, and there is one device. Set attention to chunked."
    if model.attention in ("cudnn", "cudnn_packed") and sizes["sequence"] > 1:
        yield (
            f"attention={model.attention} works on whole rows, and sequence {sizes['sequence']} of the mesh cuts them. "
            "Set attention to ring, or mesh.sequence to 1."
        )


def _length_problems(model: ModelConfig, seq_len: int):
    longest = model.max_position_embeddings
    match model.rope_scaling:
        case LinearScaling(factor=factor):
            longest, why = math.floor(longest * factor), f"times the factor {factor} of its linear scaling"
        case DynamicNTK():
            why = "and its dynamic NTK scaling is for inference: in training the rotary base stays what it is"
        case YarnScaling(factor=factor, original_max_position_embeddings=trained):
            longest = max(longest, int(factor * trained))
            why = f"and its YaRN scaling reaches {factor} x {trained}"
        case _:
            why = "and it has no scaling"
    if seq_len > longest:
        yield (
            f"rows of {seq_len} tokens are longer than the model's max_position_embeddings "
            f"{model.max_position_embeddings}, {why}. Shorten seq_len to {longest}, or train for the length: raise "
            "max_position_embeddings to it, with a larger rope_theta (internjax.model.rope.ntk_theta gives one)."
        )
