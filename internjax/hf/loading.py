"""Parameters from tensors and tensors from parameters, by a family's table; one layer's tensor at a time.

A large tensor goes straight to where it will live: it is placed on the mesh, turned into a kernel there, quantised
there if wished, and written into its layer of the stacked leaf, which is updated in place. The host holds one tensor.
"""

import dataclasses
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
from internjax.hf.quantized import (
    FIELDS_OF,
    Quantization,
    check_storable,
    check_symmetric,
    check_words,
    is_packed,
    orders_of,
    pack,
    packed_tensors,
    unpack,
    unpack_on_device,
    zero_biases,
)
from internjax.hf.weights import DTYPES, Plan, TensorInfo, check_names, read_tensor
from internjax.kernels.quant_matmul import Scheme
from internjax.model import decoder
from internjax.model.config import ModelConfig, in_shape
from internjax.model.quantize import QuantArray, Quantised, fitting_group, quantize_array
from internjax.model.quantize import logical_axes as quantized_axes

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
    quantization: Quantization | None = None,
    only: Collection[str] | None = None,
) -> dict:
    """Returns the parameter tree of a folder's tensors in the dtypes they are stored in.

    On a mesh every leaf has the sharding of its logical axes. `quantize` turns every kernel into a QuantArray;
    `quantization` says which are quantised in the folder, and how. `only` are the dotted paths of the leaves to read,
    by default all. Raises ValueError naming tensors that are missing, unexpected, of a wrong shape or of a type that is
    no float.
    """
    if quantization is not None and quantize is not None:
        raise ValueError(f"{where} is quantised already ({quantization}); open it without quantize= (--quantize)")
    table = family.rows(config)
    packed = [row for row in table if is_packed(row, quantization, config)]
    plain = [row for row in table if row not in packed]
    wanted = {name: tensor_shape(row, config) for row in plain for name in tensor_names(row, config)}
    repeated = {family.head} & set(tensors) if config.tie_embeddings else set()
    ignored = {name for name in tensors if re.fullmatch(IGNORED_TENSORS, name)} | repeated
    words = {}
    for row in packed:
        for layer in packed_tensors(row, tensors, quantization, config):
            words |= dict(layer.values())
    ignored |= zero_biases(tensors, packed, wanted, config)
    check_names(tensors, wanted | words, where=where, ignored=ignored)
    check_words(tensors, words, where=where)
    for name in wanted:
        if tensors[name].dtype not in FLOATS:
            raise ValueError(
                f"{where}: {name} holds {tensors[name].dtype} values; weights of {', '.join(FLOATS)} are read. "
                "Take the unquantised checkpoint; quantize= makes 8- and 4-bit weights of it"
            )
    embedding = next(row.name for row in table if row.leaves == ("embed.embedding",))
    if repeated:
        if not np.array_equal(read_tensor(tensors[family.head]), read_tensor(tensors[embedding])):
            raise ValueError(
                f"{where}: config.json ties the embeddings, but {family.head} differs from {embedding}; "
                "set tie_word_embeddings to false, or remove the one that was not trained"
            )
    axes = logical_axes(config, mesh)
    largest = max(tensors[name].nbytes for name in wanted)
    restored = str(DTYPES[tensors[embedding].dtype])
    params: dict = {}
    for row in table:
        kept = [path for path in row.leaves if only is None or path in only]
        if kept and row in packed:
            how = {"largest": largest, "mesh": mesh, "axes": axes, "dtype": restored}
            leaves = _load_packed(row, tensors, config, quantization, **how)
        elif kept:
            leaves = _load_row(row, tensors, config, largest=largest, mesh=mesh, axes=axes, quantize=quantize)
        if kept:
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


def _load_packed(
    row: Row, tensors, config: ModelConfig, quantization: Quantization, *, largest: int, mesh, axes, dtype: str
) -> dict[str, QuantArray]:
    """Returns the leaves of a row whose kernels are quantised in the folder; see `fill` for what the host holds.

    dtype: what they are restored to.
    """
    names = [
        {part: name for part, (name, _) in layer.items()}
        for layer in packed_tensors(row, tensors, quantization, config)
    ]
    g_idx = [layer.pop("g_idx") for layer in names if "g_idx" in layer]
    orders = orders_of({name: read_tensor(tensors[name]) for name in g_idx}, quantization)
    infos = [{part: tensors[name] for part, name in layer.items()} for layer in names]
    how = {"split": row.split, "quantization": quantization, "config": in_shape(config), "dtype": dtype}

    def read(layer: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        read = {part: read_tensor(info) for part, info in infos[layer].items()}
        check_symmetric(read["qzeros"], quantization, name=names[layer]["qzeros"])
        return read, orders[layer] if orders else None

    def shardings(stacks) -> list:
        return [_stack_shardings(path, stack, mesh, axes) for path, stack in zip(row.leaves, stacks, strict=True)]

    if on_host(sum(info.nbytes for each in infos for info in each.values()), largest):
        layers = [unpack(*read(layer), **how) for layer in range(len(infos))]
        stacks = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
        leaves = [_put(jax.tree.map(jnp.asarray, s), home) for s, home in zip(stacks, shardings(stacks), strict=True)]
    else:
        everywhere = None if mesh is None else sharding.replicated(mesh)
        leaves, homes = [], []
        for layer in range(len(infos)):
            parts = unpack_on_device(*jax.device_put(read(layer), everywhere), **how)
            if not leaves:
                stack = lambda array: jax.ShapeDtypeStruct((len(infos), *array.shape), array.dtype)  # noqa: E731
                stacks = jax.tree.map(stack, parts)
                homes = shardings(stacks)
                leaves = [_zeros(stack, home) for stack, home in zip(stacks, homes, strict=True)]
            for index, part in enumerate(parts):
                # Each step ends before the next begins, as in `fill`.
                leaves[index] = jax.block_until_ready(placer(homes[index])(leaves[index], part, layer))
    if not row.per_layer:
        leaves = [jax.tree.map(lambda array: array[0], leaf) for leaf in leaves]
    return dict(zip(row.leaves, leaves, strict=True))


def _stack_shardings(path: str, stack: QuantArray, mesh: Mesh | None, axes) -> tuple | None:
    """Returns the shardings of the arrays of a QuantArray of several layers, or of one stacked."""
    if mesh is None:
        return None
    own = get_leaf(axes, path)
    own = own if path.startswith("layers.") else ("layers", *own)
    placed = quantized_axes({path: stack}, {path: own})
    return tuple(jax.tree.leaves(sharding.shardings(placed, {path: stack}, mesh)))


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
    leaves = [None if home.num_layers is None else _zeros(home.abstract, home.shardings) for home in homes]
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
            leaf = (
                _put(leaf, home.shardings)
                if home.num_layers is None
                else placer(home.shardings)(leaves[index], leaf, layer)
            )
            leaves[index] = jax.block_until_ready(leaf)
            del leaf
    return leaves


def _transfer(part: np.ndarray, home: "Home") -> jax.Array:
    return jax.block_until_ready(jnp.asarray(part) if home.raw is None else jax.device_put(part, home.raw))


def _quantized(leaf: jax.Array, home: "Home"):
    """Returns a leaf that is in place, quantised if its home says so."""
    if home.scheme is None:
        return leaf
    return _put(quantize_array(leaf, scheme=home.scheme, group=home.group, double=home.double), home.shardings)


def _put(leaf, shardings: tuple | None):
    """Returns the arrays of a leaf on their shardings."""
    if shardings is None:
        return leaf
    arrays, structure = jax.tree.flatten(leaf)
    return jax.tree.unflatten(structure, [jax.device_put(a, s) for a, s in zip(arrays, shardings, strict=True)])


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
    scheme = how.scheme if is_kernel(leaf) and (how.head or not leaf.startswith("head.")) else None
    transpose = turned and is_kernel(leaf)
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


def _zeros(abstract, shardings: tuple | None):
    arrays, structure = jax.tree.flatten(abstract)
    return jax.tree.unflatten(structure, _zero_arrays(tuple((a.shape, str(a.dtype)) for a in arrays), shardings)())


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


def plan_tensors(
    params: dict,
    family: Family,
    config: ModelConfig,
    *,
    dtype: np.dtype | None,
    quantization: Quantization | None = None,
) -> dict[str, Plan]:
    """Returns the tensors to write for a parameter tree; each is fetched from the device when its turn comes.

    With `dtype` None every tensor keeps its own; quantised kernels always do, which `quantization` says how to pack.
    Raises ValueError for a tree that is not the config's, for quantised leaves that it does not hold as they are, and
    for arrays of which this process sees only a part.
    """
    shapes = leaf_shapes(config)
    plans = {}
    for row in family.rows(config):
        packed = is_packed(row, quantization, config)
        how = quantization if packed else None
        leaves = [_exportable(params, leaf, shapes[leaf], config, how) for leaf in row.leaves]
        if packed:
            plans |= _packed_plans(row, leaves, config, quantization)
            continue
        own = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves))
        for layer, name in enumerate(tensor_names(row, config)):
            fetch = functools.partial(_fetch, row, leaves, layer if row.per_layer else None, config)
            plans[name] = Plan(tensor_shape(row, config), np.dtype(own if dtype is None else dtype), fetch)
    return plans


def _exportable(
    params: dict, path: str, shape: tuple[int, ...], config: ModelConfig, quantization: Quantization | None
) -> jax.Array | QuantArray:
    try:
        leaf = get_leaf(params, path)
    except (KeyError, TypeError):
        raise ValueError(f"the parameters have no {path}, the config wants one of shape {shape}") from None
    wanted = (config.num_layers, *shape) if path.startswith("layers.") else shape
    if leaf.shape != wanted:
        raise ValueError(f"{path} has shape {leaf.shape}, the config wants {wanted}; give their own config")
    if isinstance(leaf, QuantArray):
        check_storable(path, leaf, quantization)
    elif quantization is not None:
        raise ValueError(
            f"{path} is not quantised, and the folder would say {quantization}; quantise all kernels of the layers, or "
            "name those left whole in it"
        )
    if not all(getattr(array, "is_fully_addressable", True) for array in jax.tree.leaves(leaf)):
        raise ValueError(
            f"{path} is spread over several processes; save a checkpoint and convert it on one host "
            "(python -m internjax.hf convert RUN FOLDER)"
        )
    return leaf


def _packed_plans(row: Row, leaves: list[QuantArray], config: ModelConfig, quantization: Quantization) -> dict:
    plans = {}
    for layer, names in enumerate(packed_tensors(row, None, quantization, config)):
        for part, (name, shape) in names.items():
            dtype = functools.reduce(jnp.promote_types, (leaf.scales.dtype for leaf in leaves))
            fetch = functools.partial(_fetch_packed, part, row, leaves, layer, config, quantization)
            plans[name] = Plan(shape, np.dtype(dtype if part == "scales" else np.int32), fetch)
    return plans


def _fetch_packed(part: str, row: Row, leaves: list, layer: int, config: ModelConfig, quantization: Quantization):
    def on_host(leaf: QuantArray) -> QuantArray:
        fields = {name: getattr(leaf, name) for name in FIELDS_OF[part] if getattr(leaf, name) is not None}
        return dataclasses.replace(
            leaf, **{name: np.asarray(array[layer] if row.per_layer else array) for name, array in fields.items()}
        )

    return pack(part, [on_host(leaf) for leaf in leaves], row=row, quantization=quantization, config=config)


def _fetch(row: Row, leaves: list, layer: int | None, config: ModelConfig) -> np.ndarray:
    parts = []
    for path, leaf in zip(row.leaves, leaves, strict=True):
        part = leaf if layer is None else leaf[layer]
        # Turned around on the device, which is much faster at it than NumPy.
        parts.append(np.asarray(part.T if is_kernel(path) else part))
    return row.fuse(parts, config)
