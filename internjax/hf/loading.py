"""Parameters from tensors and tensors from parameters, by a family's table; one layer's tensor at a time.

A large tensor goes straight to where it will live: it is placed on the mesh, turned into a kernel there, quantised
there if wished, and written into its layer of the stacked leaf, which is updated in place. The host holds one tensor.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internjax import sharding
from internjax.hf.mapping import (
    IGNORED_TENSORS,
    Family,
    Row,
    get_leaf,
    is_kernel,
    leaf_shapes,
    set_leaf,
    tensor_names,
    tensor_shape,
)
from internjax.hf.weights import DTYPES, Plan, TensorInfo, check_names, read_tensor
from internjax.kernels.quant_matmul import Scheme
from internjax.model import decoder
from internjax.model.config import ModelConfig
from internjax.model.quantize import QuantArray, Quantised, fitting_group, quantize_array

FLOATS = ("F32", "BF16", "F16")
GROUP = 128
HOST_STACK_BYTES = 64 << 20


def load_params(
    tensors: Mapping[str, TensorInfo],
    family: Family,
    config: ModelConfig,
    *,
    where: Any,
    mesh: Mesh | None = None,
    quantize: Scheme | Quantised | None = None,
    only: Collection[str] | None = None,
) -> dict:
    """Returns the parameter tree of a folder's tensors in the dtypes they are stored in.

    On a mesh every leaf has the sharding of its logical axes. `quantize` turns every kernel into a QuantArray. `only`
    are the dotted paths of the leaves to read, by default all. Raises ValueError naming tensors that are missing,
    unexpected, of a wrong shape or of a type that is no float.
    """
    table = family.rows(config)
    wanted = {name: tensor_shape(row, config) for row in table for name in tensor_names(row, config)}
    repeated = {family.head} & set(tensors) if config.tie_embeddings else set()
    ignored = {name for name in tensors if re.fullmatch(IGNORED_TENSORS, name)} | repeated
    check_names(tensors, wanted, where=where, ignored=ignored)
    for name in wanted:
        if tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"{where}: {name} holds {tensors[name].dtype} values; weights of {', '.join(FLOATS)} are read. "
                "Take the unquantised checkpoint; quantize= makes 8- and 4-bit weights of it"
            )
    if repeated:
        table_name = next(row.name for row in table if row.leaves == ("embed.embedding",))
        if not np.array_equal(read_tensor(tensors[family.head]), read_tensor(tensors[table_name])):
            raise ValueError(
                f"{where}: config.json ties the embeddings, but {family.head} differs from {table_name}; "
                "set tie_word_embeddings to false, or remove the one that was not trained"
            )
    axes = logical_axes(config, mesh)
    largest = max(tensors[name].nbytes for name in wanted)
    params: dict = {}
    for row in table:
        kept = [path for path in row.leaves if only is None or path in only]
        if kept:
            leaves = _load_row(row, tensors, config, largest=largest, mesh=mesh, axes=axes, quantize=quantize)
            for path in kept:
                set_leaf(params, path, leaves[path])
    return params


def _load_row(row: Row, tensors, config: ModelConfig, *, largest: int, mesh, axes, quantize) -> dict[str, Any]:
    """Returns the leaves of one row by their paths."""
    names = tensor_names(row, config)
    dtype = functools.reduce(jnp.promote_types, (DTYPES[tensors[name].dtype] for name in names))
    homes = [home_of(leaf, config, dtype, mesh=mesh, axes=axes, quantize=quantize) for leaf in row.leaves]

    def read(layer: int) -> list[np.ndarray]:
        return row.split(read_tensor(tensors[names[layer]]), config)

    leaves = fill(homes, read, on_host=on_host(sum(tensors[name].nbytes for name in names), largest))
    return dict(zip(row.leaves, leaves, strict=True))


def on_host(num_bytes: int, largest: int) -> bool:
    """Whether a leaf of so many bytes is put together on the host, where nothing has to be compiled for it.

    Only where that takes no more memory than the largest tensor does, which is held once in any case.
    """
    return num_bytes <= min(HOST_STACK_BYTES, max(largest, 1 << 20))


def fill(homes: list["Home"], read: Callable[[int], list[np.ndarray]], *, on_host: bool) -> list:
    """Returns leaves of equally many layers, each in its home. `read(layer)` gives one array of each leaf.

    Beside the leaves the host holds one result of `read` and one copy of it.
    """
    if on_host:
        stacks = [np.empty(home.shape, home.dtype) for home in homes]
        for layer in range(homes[0].num_layers or 1):
            for stack, home, part in zip(stacks, homes, read(layer), strict=True):
                (stack if home.num_layers is None else stack[layer])[...] = part.T if home.transpose else part
        return [
            _quantized(jnp.asarray(s) if h.full is None else jax.device_put(s, h.full), h)
            for s, h in zip(stacks, homes)
        ]
    leaves = [None if home.num_layers is None else _zeros(home) for home in homes]
    for layer in range(homes[0].num_layers or 1):
        parts = read(layer)[::-1]
        for index, home in enumerate(homes):
            # Each step ends before the next begins, and nothing keeps what it was made of: else the host holds many.
            leaf = _prepare(
                _transfer(parts.pop(), home),
                str(home.dtype),
                transpose=home.transpose,
                scheme=home.scheme,
                group=home.group,
                double=home.double,
            )
            leaf = _put(leaf, home) if home.num_layers is None else placer(home.shardings)(leaves[index], leaf, layer)
            leaves[index] = jax.block_until_ready(leaf)
            del leaf
    return leaves


def _transfer(part: np.ndarray, home: "Home") -> jax.Array:
    return jax.block_until_ready(jnp.asarray(part) if home.raw is None else jax.device_put(part, home.raw))


def _quantized(leaf: jax.Array, home: "Home"):
    """Returns a leaf that is in place, quantised if its home says so."""
    if home.scheme is None:
        return leaf
    return _put(quantize_array(leaf, scheme=home.scheme, group=home.group, double=home.double), home)


def _put(leaf, home: "Home"):
    """Returns the arrays of a leaf on their shardings."""
    if home.shardings is None:
        return leaf
    arrays, structure = jax.tree.flatten(leaf)
    return jax.tree.unflatten(structure, [jax.device_put(a, s) for a, s in zip(arrays, home.shardings, strict=True)])


def logical_axes(config: ModelConfig, mesh: Mesh | None) -> dict | None:
    """Returns the logical axes of the parameters on a mesh; None without one."""
    if mesh is None:
        return None
    with sharding.use(mesh):
        return decoder.logical_axes(config)


class Home(NamedTuple):
    """Where and how one leaf will live."""

    shape: tuple[int, ...]
    """Of the leaf before it is quantised, stacked layers included."""
    dtype: np.dtype
    num_layers: int | None
    """Of a stacked leaf; None for one that stands alone."""
    abstract: Any
    """The leaf as it will be, an array or a QuantArray."""
    shardings: tuple | None
    """Of its arrays in order; None without a mesh."""
    full: NamedSharding | None
    """Of the leaf before it is quantised."""
    raw: NamedSharding | None
    """Of one layer's tensor as it is read, a kernel still transposed."""
    transpose: bool
    """Whether it is read as Hugging Face stores it, and so is to be turned around."""
    scheme: Scheme | None
    group: int
    """Input rows per scale."""
    double: bool
    """Whether scales are quantised as well."""


def home_of(
    leaf: str,
    config: ModelConfig,
    dtype,
    *,
    mesh: Mesh | None,
    axes,
    quantize: Scheme | Quantised | None,
    turned: bool = True,
) -> Home:
    """Returns the home of the leaf at a path. `turned`: kernels are read as Hugging Face stores them, [O, I]."""
    own = leaf_shapes(config)[leaf]
    num_layers = config.num_layers if leaf.startswith("layers.") else None
    shape = own if num_layers is None else (num_layers, *own)
    how = quantize if isinstance(quantize, Quantised) else Quantised(quantize, GROUP, double=False)
    scheme, transpose = (how.scheme, turned) if is_kernel(leaf) else (None, False)
    group = fitting_group(own[0], largest=how.group)
    abstract = jax.ShapeDtypeStruct(shape, dtype)
    if scheme is not None:
        quantized = functools.partial(quantize_array, scheme=scheme, group=group, double=how.double)
        abstract = jax.eval_shape(quantized, abstract)
    placed = full = raw = None
    if mesh is not None:
        leaf_axes = get_leaf(axes, leaf)
        # Every array of a QuantArray is split as its kernel is.
        arrays = {f"{leaf}[{i}]": array for i, array in enumerate(jax.tree.leaves(abstract))}
        found = sharding.shardings(dict.fromkeys(arrays, leaf_axes), arrays, mesh)
        placed = tuple(found[name] for name in arrays)
        spec = sharding.partition_spec(leaf_axes if num_layers is None else leaf_axes[1:])
        raw = NamedSharding(mesh, PartitionSpec(*(reversed(spec) if transpose else spec)))
        full = NamedSharding(mesh, sharding.partition_spec(leaf_axes))
    return Home(shape, np.dtype(dtype), num_layers, abstract, placed, full, raw, transpose, scheme, group, how.double)


@functools.partial(jax.jit, static_argnames=("dtype", "transpose", "scheme", "group", "double"))
def _prepare(tensor: jax.Array, dtype: str, *, transpose: bool, scheme: Scheme | None, group: int, double: bool):
    tensor = tensor.astype(dtype)
    tensor = tensor.T if transpose else tensor
    return tensor if scheme is None else quantize_array(tensor, scheme=scheme, group=group, double=double)


def _zeros(home: Home):
    arrays, structure = jax.tree.flatten(home.abstract)
    return jax.tree.unflatten(structure, _zero_arrays(tuple((a.shape, str(a.dtype)) for a in arrays), home.shardings)())


@functools.cache
def _zero_arrays(shapes: tuple, shardings: tuple | None):
    make = lambda: tuple(jnp.zeros(shape, dtype) for shape, dtype in shapes)  # noqa: E731
    return jax.jit(make, out_shardings=shardings)


@functools.cache
def placer(shardings: tuple | None):
    """Returns the function that writes one layer into its stack, in place. Cached, so that layers share a program."""

    def write(stack_arrays, layer_arrays, index):
        return tuple(stack.at[index].set(layer) for stack, layer in zip(stack_arrays, layer_arrays, strict=True))

    compiled = jax.jit(write, donate_argnums=0, out_shardings=shardings)

    def place(stack, layer, index: int):
        arrays, structure = jax.tree.flatten(stack)
        return jax.tree.unflatten(structure, compiled(tuple(arrays), tuple(jax.tree.leaves(layer)), index))

    return place


def plan_tensors(params: dict, family: Family, config: ModelConfig, *, dtype: np.dtype | None) -> dict[str, Plan]:
    """Returns the tensors to write for a parameter tree; each is fetched from the device when its turn comes.

    With `dtype` None every tensor keeps its own. Raises ValueError for a tree that is not the config's, for quantised
    leaves, and for arrays of which this process sees only a part.
    """
    shapes = leaf_shapes(config)
    plans = {}
    for row in family.rows(config):
        leaves = [_exportable(params, leaf, shapes[leaf], config) for leaf in row.leaves]
        own = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves))
        for layer, name in enumerate(tensor_names(row, config)):
            fetch = functools.partial(_fetch, row, leaves, layer if row.per_layer else None, config)
            plans[name] = Plan(tensor_shape(row, config), np.dtype(own if dtype is None else dtype), fetch)
    return plans


def _exportable(params: dict, path: str, shape: tuple[int, ...], config: ModelConfig) -> jax.Array:
    try:
        leaf = get_leaf(params, path)
    except (KeyError, TypeError):
        raise ValueError(f"the parameters have no {path}, the config wants one of shape {shape}") from None
    if isinstance(leaf, QuantArray):
        raise ValueError(
            f"{path} is quantised ({leaf.scheme}), and a Hugging Face folder holds plain floats: export the parameters "
            "before they were quantised, or restore them with internjax.model.quantize.dequantize"
        )
    wanted = (config.num_layers, *shape) if path.startswith("layers.") else shape
    if leaf.shape != wanted:
        raise ValueError(f"{path} has shape {leaf.shape}, the config wants {wanted}; give their own config")
    if not getattr(leaf, "is_fully_addressable", True):
        raise ValueError(
            f"{path} is spread over several processes; save a checkpoint and convert it on one host "
            "(python -m internjax.hf convert RUN FOLDER)"
        )
    return leaf


def _fetch(row: Row, leaves: list, layer: int | None, config: ModelConfig) -> np.ndarray:
    parts = []
    for path, leaf in zip(row.leaves, leaves, strict=True):
        part = leaf if layer is None else leaf[layer]
        # Turned around on the device, which is much faster at it than NumPy.
        parts.append(np.asarray(part.T if is_kernel(path) else part))
    return row.fuse(parts, config)
