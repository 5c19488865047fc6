"""Places on the device for adapters of one base model, filled and emptied while requests are served.

Every place has room for all targets at the largest rank, so whatever is loaded, the compiled programs stay the same.

N places, I input features, O output features, r largest rank; leaves may have a leading axis of layers.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from internjax import sharding
from internjax.model.lora import Lora, nodes, put_node, select, target_path, with_gains


class RowAdapters(NamedTuple):
    """Adapters side by side, and which of them every row is computed with (-1: none)."""

    stacked: dict
    ids_B: np.ndarray


def lora_of(adapters: Lora | RowAdapters | None) -> Lora | None:
    """Returns what the model applies: one adapter for all rows, one for each, or none."""
    return select(*adapters) if isinstance(adapters, RowAdapters) else adapters


class Place(NamedTuple):
    """Where an adapter stands, and how often this place was filled: with that, two of one name are told apart."""

    index: int
    version: int


NO_ADAPTER = Place(-1, 0)


class AdapterPlaces:
    """N places for adapters, and what each holds."""

    def __init__(self, params: dict, *, num_places: int, rank: int, targets: Sequence[str], dtype: str):
        """`stacked` holds factors of `rank` columns in `dtype` for the kernels of `targets`, and gains as DoRA has."""
        if num_places < 1 or rank < 1:
            raise ValueError(f"adapters need a place and a rank of at least 1, given {num_places} places, rank {rank}")
        self._params, self._rank, self._dtype = params, rank, dtype
        self._paths = [target_path(target) for target in targets]
        missing = [target for target, path in zip(targets, self._paths) if _kernel(params, path) is None]
        if missing:
            raise ValueError(
                f"the model has no {', '.join(missing)} that an adapter could change; leave it out of targets"
            )
        self._names: list[str | None] = [None] * num_places
        self._versions = [0] * num_places
        # With the kernels, so that no step has to fetch it from elsewhere.
        everywhere = sharding.replicated(sharding.mesh_of(params))
        fill = {"gain": jnp.ones}
        empty = {
            path: {key: fill.get(key, jnp.zeros)(leaf.shape, leaf.dtype) for key, leaf in node.items()}
            for path, node in self._shapes(num_places)
        }
        self.stacked = jax.device_put(_tree(empty), everywhere)
        # Nothing is donated: a step that is about to be dispatched may still hold the stack.
        self._put = jax.jit(functools.partial(_put), out_shardings=everywhere)

    @property
    def num_compiled(self) -> int:
        """Programs compiled so far."""
        return self._put._cache_size()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be asked for."""
        return tuple(name for name in self._names if name is not None)

    def find(self, name: str | None) -> Place:
        """Returns the place of an adapter, NO_ADAPTER for None; raises ValueError for a name that is not there."""
        if name is None:
            return NO_ADAPTER
        if name not in self.names:
            raise ValueError(f"adapter {name!r} is not loaded; there are: {', '.join(self.names) or 'none'}")
        index = self._names.index(name)
        return Place(index, self._versions[index])

    def prepare(self, name: str, lora: Lora) -> dict:
        """Returns an adapter as `load` puts it into a place, in the host's memory: whatever the sizes of one, nothing
        is compiled for it. Raises ValueError for one that does not fit."""
        found = dict(nodes(jax.device_get(lora.weights)))
        if not found:
            raise ValueError(f"adapter {name!r} changes no kernel: it has no factors")
        unknown = [".".join(path) for path in found if path not in self._paths]
        rank = max(node["a"].shape[-1] for node in found.values())
        if unknown or rank > self._rank:
            room = f"rank {self._rank} on {', '.join('.'.join(path) for path in self._paths)}"
            given = f"rank {rank}" + (f", and {', '.join(unknown)}" if unknown else "")
            raise ValueError(
                f"adapter {name!r} has {given}; there is room for {room}. Start with more room for adapters."
            )
        return self._padded(found, lora.scale)

    def load(self, name: str, prepared: dict) -> None:
        """Puts a prepared adapter into a free place; raises ValueError where none is free or the name is taken."""
        if name in self.names:
            raise ValueError(f"an adapter {name!r} is loaded already; unload it first, or choose another name")
        if None not in self._names:
            raise ValueError(f"all {len(self._names)} places are taken: {', '.join(self.names)}; unload one of them")
        index = self._names.index(None)
        self.stacked = self._put(self._params, self.stacked, prepared, np.int32(index))
        self._names[index] = name
        self._versions[index] += 1

    def unload(self, name: str) -> None:
        """Empties the place of an adapter that no row uses."""
        self._names[self.find(name).index] = None

    def warmup(self) -> None:
        """Compiles the program that `load` runs; what is loaded already stays."""
        jax.block_until_ready(self._put(self._params, self.stacked, self._padded({}, 1.0), np.int32(0)))

    def _shapes(self, count: int) -> list[tuple[tuple[str, ...], dict[str, jax.ShapeDtypeStruct]]]:
        """Returns the path and the leaves of every kernel that `count` adapters may change."""
        shapes = []
        for path in self._paths:
            *lead, inputs, outputs = _kernel(self._params, path).shape
            sizes = {
                "a": ((*lead, count, inputs, self._rank), self._dtype),
                "b": ((*lead, count, self._rank, outputs), self._dtype),
                "scale": ((*lead, count), "float32"),
                "gain": ((*lead, count, outputs), "float32"),
            }
            shapes.append((path, {key: jax.ShapeDtypeStruct(*size) for key, size in sizes.items()}))
        return shapes

    def _padded(self, found: Mapping[tuple[str, ...], Mapping[str, Any]], scale: float) -> dict:
        """Returns an adapter as large as a place: what is not in `found` adds nothing.

        A node's `columns` are the gains of its kernel's columns or, where it is `turned`, DoRA's magnitudes, of which
        the gains are still to be found.
        """
        padded = {}
        for path, shapes in self._shapes(1):
            node, columns = found.get(path, {}), shapes["gain"]
            given = node.get("magnitude", node.get("gain", np.ones(1, np.float32)))
            axis = len(columns.shape) - 2
            padded[path] = {
                "a": _filled(node.get("a"), shapes["a"], axis),
                "b": _filled(node.get("b"), shapes["b"], axis),
                "scale": np.full(shapes["scale"].shape, scale if node else 0.0, np.float32),
                "columns": np.broadcast_to(np.expand_dims(given, axis) if node else given, columns.shape),
                "turned": np.array("magnitude" in node),
            }
        return _tree(padded)


def _tree(of_path: Mapping[tuple[str, ...], dict]) -> dict:
    tree: dict = {}
    for path, node in of_path.items():
        put_node(tree, path, node)
    return tree


def _kernel(params: dict, path: tuple[str, ...]) -> jax.Array | None:
    return functools.reduce(lambda tree, name: tree.get(name, {}), path, params).get("kernel")


def places_bytes(params: dict, *, num_places: int, rank: int, targets: Sequence[str], dtype: str) -> int:
    """Returns the bytes of the places for adapters of these sizes, each device's."""
    places = functools.partial(AdapterPlaces, params, num_places=num_places, rank=rank, targets=targets, dtype=dtype)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(lambda: places().stacked)))


def _filled(leaf: np.ndarray | None, like: jax.ShapeDtypeStruct, axis: int) -> np.ndarray:
    """Returns one adapter's leaf at the place 0 of `axis`, with zeros behind it in every other axis up to `like`."""
    filled = np.zeros(like.shape, like.dtype)
    if leaf is not None:
        leaf = np.expand_dims(leaf, axis)
        filled[tuple(slice(size) for size in leaf.shape)] = leaf
    return filled


def _put(params: dict, stacked: dict, one: dict, index: jax.Array) -> dict:
    """Returns the stack with the one adapter in place `index`."""
    changed: dict = {}
    added = dict(nodes(one))
    for path, node in nodes(stacked):
        axis = node["a"].ndim - 3
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=axis)
        new = added[path] | {"gain": _gains(params, path, added[path], axis)}
        put_node(changed, path, {key: put(leaf, new[key].astype(leaf.dtype)) for key, leaf in node.items()})
    return changed


def _gains(params: dict, path: tuple[str, ...], node: dict, axis: int) -> jax.Array:
    """Returns what the columns of a kernel with this adapter are multiplied by, `[..., 1, O]`."""

    def of_magnitudes():
        # The scale goes into one factor: it is no constant of this program.
        a = node["a"].astype(jnp.float32) * node["scale"][..., None, None]
        alone = {"a": a, "b": node["b"], "magnitude": node["columns"]}
        lora = Lora(_tree({path: {key: jnp.squeeze(leaf, axis) for key, leaf in alone.items()}}), 1.0)
        ((_, found),) = nodes(with_gains(lora, params).weights)
        return jnp.expand_dims(found["gain"], axis)

    return jax.lax.cond(node["turned"], of_magnitudes, lambda: node["columns"])
