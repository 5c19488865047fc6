"""Device meshes, and the one table that maps logical array axes to mesh axes.

Parameters and activations name their axes logically ("embed", "heads", "batch", ...); `RULES` says where each lives.
Meshes have Auto axis types: the compiler propagates shardings between the constraints that the model states.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

LogicalAxes = tuple[str | None, ...]

OptimizerState = Literal["as_parameters", "over_data"]

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters: `embed` is split over fsdp (gathered when used), the other side of a matrix over tensor.
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "norm": None,
    "score": None,
    "rank": None,
    # Activations.
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_ffn": "tensor",
    "act_vocab": "tensor",
}

# The last mesh of several devices made in this process. A logical constraint without a mesh would be a silent no-op,
# so `constrain` refuses to run unmeshed once such a mesh exists.
_configured_mesh: Mesh | None = None
_unconstrained = contextvars.ContextVar("unconstrained", default=False)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1 and takes all devices that are left."""

    data: int = 1
    """Replicas of the parameters, each with its share of the batch."""
    fsdp: int = -1
    """Shards of the parameters and optimizer state, gathered when used; the batch is split over it as well."""
    sequence: int = 1
    """Shards of the sequence dimension of activations."""
    tensor: int = 1
    """Shards of heads, feed-forward width and vocabulary."""
    optimizer_state: OptimizerState = "as_parameters"
    """Optimizer state, gradients and update: cut as the parameters are, or over the replicas (`data`) as well. With
    data=-1, fsdp=1, optimizer_state=over_data every device holds the whole parameters and a share of the rest (ZeRO-1).
    """

    def shape(self, num_devices: int) -> tuple[int, int, int, int]:
        """Returns the resolved axis sizes for `num_devices`; raises ValueError when they do not multiply to it."""
        sizes = [self.data, self.fsdp, self.sequence, self.tensor]
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes must be positive, with at most one -1 that fills the rest; given {self}")
        fixed = int(np.prod([size for size in sizes if size != -1]))
        if -1 in sizes and num_devices % fixed == 0:
            sizes[sizes.index(-1)] = num_devices // fixed
        if int(np.prod([size for size in sizes if size != -1])) != num_devices or -1 in sizes:
            raise ValueError(
                f"{self} does not fit {num_devices} devices: the sizes must multiply to {num_devices}. "
                "Change one of them or set one to -1."
            )
        return tuple(sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with axes data, fsdp, sequence, tensor over `devices` (default: all visible ones)."""
    global _configured_mesh
    devices = jax.devices() if devices is None else list(devices)
    mesh = jax.make_mesh(
        config.shape(len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )
    _configured_mesh = mesh if mesh.size > 1 else None
    return mesh


def mesh_of(params: dict) -> Mesh:
    """Returns the mesh that parameters live on; for parameters on one device, a mesh of that device."""
    placed = jax.tree.leaves(params)[0].sharding
    if isinstance(placed, NamedSharding):
        return placed.mesh
    (device,) = placed.device_set
    shape = (1,) * len(MESH_AXES)
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=[device])


def meshes_beside(mesh: Mesh, count: int) -> list[Mesh]:
    """Returns `count` meshes of one shape that share no device: `mesh`, then others over devices that it leaves.

    Raises ValueError where there are too few.
    """
    free = [device for device in jax.devices() if device not in mesh.devices]
    if not 1 <= count <= 1 + len(free) // mesh.size:
        raise ValueError(
            f"{count} replicas on {mesh.size} devices each are asked for; this process sees {len(jax.devices())} "
            f"devices, enough for 1 to {1 + len(free) // mesh.size}"
        )
    shape, names, types = mesh.devices.shape, mesh.axis_names, mesh.axis_types
    starts = range(0, (count - 1) * mesh.size, mesh.size)
    parts = [free[start : start + mesh.size] for start in starts]
    return [mesh, *(jax.make_mesh(shape, names, axis_types=types, devices=part) for part in parts)]


def moved(tree: Any, mesh: Mesh) -> Any:
    """Returns the tree on another mesh, every array cut over its axes as before; what lay on one device is on all."""

    def place(leaf):
        spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, jax.tree.map(jnp.asarray, tree))


def use(mesh: Mesh):
    """Returns the context manager under which every step of a sharded computation runs."""
    return jax.set_mesh(mesh)


@contextlib.contextmanager
def unconstrained() -> Iterator[None]:
    """Within it `constrain` returns its input: for tracing whose activations are thrown away (initialisation)."""
    token = _unconstrained.set(True)
    try:
        yield
    finally:
        _unconstrained.reset(token)


def partition_spec(logical_axes: LogicalAxes) -> PartitionSpec:
    """Returns the mesh axes of each dimension; raises ValueError for an unknown name or a mesh axis used twice."""
    spec, used = [], set()
    for name in logical_axes:
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(RULES)}")
        axes = None if name is None else RULES[name]
        for axis in () if axes is None else (axes,) if isinstance(axes, str) else axes:
            if axis in used:
                raise ValueError(f"logical axes {logical_axes} put two dimensions on the mesh axis {axis!r}")
            used.add(axis)
        spec.append(axes)
    return PartitionSpec(*spec)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def axis_size(mesh: Any, axes: str | tuple[str, ...] | None) -> int:
    """Returns into how many parts the mesh axes, taken together, cut a dimension; 1 without axes."""
    return int(np.prod([mesh.shape[name] for name in _names(axes)], dtype=int))


def constrain(x: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
    """Returns `x` with its activation sharding stated to the compiler under the current mesh.

    A dimension that its mesh axes do not divide stays whole (a batch of 1 while decoding). Raises RuntimeError when a
    mesh of several devices was made but none is set: the constraint would silently do nothing.
    """
    if _unconstrained.get():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        if _configured_mesh is not None:
            raise RuntimeError(
                f"a mesh of {_configured_mesh.size} devices exists but none is set, so shardings would be ignored. "
                "Run the step under `with internjax.sharding.use(mesh):`."
            )
        return x
    assert len(logical_axes) == x.ndim, f"{logical_axes} does not name the {x.ndim} dimensions of {x.shape}"
    spec = [
        axes if size % axis_size(mesh, axes) == 0 else None
        for size, axes in zip(x.shape, partition_spec(logical_axes), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def shardings(axes_tree: Any, abstract_tree: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of `abstract_tree`, whose logical axes stand in `axes_tree`.

    Both trees have the same structure; a leaf of `axes_tree` is a tuple of logical names. Raises ValueError naming the
    leaf and the dimension when a mesh axis does not divide it.
    """

    def sharding(path, leaf, axes):
        spec = partition_spec(axes)
        for dim, (size, names) in enumerate(zip(leaf.shape, spec, strict=True)):
            parts = axis_size(mesh, names)
            if size % parts:
                raise ValueError(
                    f"{jax.tree_util.keystr(path)} has shape {leaf.shape}; mesh axis {names!r} of size {parts} does "
                    f"not divide its dimension {dim} ({axes[dim]}, {size}). Choose a mesh whose sizes divide it."
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, abstract_tree, axes_tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batch arrays `[B, T]`."""
    return NamedSharding(mesh, partition_spec(("batch", "sequence")))


def process_rows(mesh: Mesh | None, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a batch of `batch_size` that the devices of this process hold, ascending.

    All of them in a job of one process. Where the mesh splits time or heads between processes, several hold the same
    rows. Raises ValueError when the mesh does not divide the rows.
    """
    if mesh is None:
        return tuple(range(batch_size))
    placed = NamedSharding(mesh, PartitionSpec(batch_sharding(mesh).spec[0]))
    check_rows(mesh, batch_size)
    held = placed.addressable_devices_indices_map((batch_size,)).values()
    return tuple(sorted({row for (rows,) in held for row in range(*rows.indices(batch_size))}))


def check_rows(mesh: Mesh, num_rows: int) -> None:
    """Raises ValueError when the data and fsdp axes do not divide a number of rows."""
    axes = batch_sharding(mesh).spec[0]
    parts = axis_size(mesh, axes)
    if num_rows % parts:
        sizes = " x ".join(f"{name} {mesh.shape[name]}" for name in _names(axes))
        raise ValueError(
            f"{num_rows} rows cannot be split evenly over {sizes} = {parts} shards of the mesh. Give a multiple of "
            f"{parts} rows, or a mesh with more of its devices on sequence or tensor."
        )


def over_data(placed: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Returns the sharding of an array that is cut over the replicas (`data`) too; `placed` where they divide nothing.

    What this leaves on a device is its share of an update that every replica would compute otherwise (ZeRO, arXiv
    1910.02054, stage 1). The longest dimension is cut, the last one only if no other can be: neighbours of the last
    axis share scales where moments have 8 bits.
    """
    mesh, spec = placed.mesh, [*placed.spec] + [None] * (len(shape) - len(placed.spec))
    parts = [axis_size(mesh, axes) * mesh.shape["data"] for axes in spec]
    fits = [dim for dim, size in enumerate(shape) if size and size % parts[dim] == 0]
    if mesh.shape["data"] == 1 or not fits or any("data" in _names(axes) for axes in spec):
        return placed
    longest = max(fits, key=lambda dim: (dim < len(shape) - 1, shape[dim]))
    spec[longest] = (*_names(spec[longest]), "data")
    return NamedSharding(mesh, PartitionSpec(*spec))
