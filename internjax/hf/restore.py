"""Parameters of a run's checkpoint, streamed by tensorstore: leaf by leaf, in blocks of layers, read-only.

The run may be going on: a step counts once it is committed and its files have the checksums that were committed with
it, nothing is locked or written, and a step that the run removes meanwhile is an error that says so.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from internjax.hf.families import family_of
from internjax.hf.loading import fill, home_of, load_params, logical_axes, on_host
from internjax.hf.mapping import leaf_shapes, set_leaf
from internjax.hf.resolve import CONFIG, read_json
from internjax.hf.weights import list_tensors
from internjax.kernels.quant_matmul import Scheme
from internjax.model.config import ModelConfig
from internjax.model.quantize import QuantArray, Quantised
from internjax.train import processes
from internjax.train.checkpoint_files import ABOUT, COMMITTED, committed_steps, problem

ARRAYS, METADATA = "trainable", "_METADATA"


def good_step(checkpoints: Path, step: int | None) -> int:
    """Returns `step`, by default the newest, after verifying that its files are as they were committed.

    Damaged newer steps are passed over and named. Raises ValueError where the step is not there or none is good.
    """
    steps = processes.first("steps to stream", lambda: committed_steps(checkpoints))
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {checkpoints}; there are: {steps or 'none'}")
    damaged = {}
    for candidate in [step] if step is not None else steps[::-1]:
        own = problem(checkpoints, candidate, share=(processes.index(), processes.count()))
        found = [json.loads(text) for text in processes.gather("verify to stream", json.dumps(own))]
        wrong = next((text for text in found if text), None)
        if wrong is None:
            for skipped, reason in damaged.items():
                print(f"{checkpoints}: the checkpoint of step {skipped} is skipped: {reason}", file=sys.stderr)
            return candidate
        damaged[candidate] = wrong
    listed = "; ".join(f"step {number}: {reason}" for number, reason in damaged.items()) or "there is none"
    raise ValueError(
        f"no checkpoint in {checkpoints} is good ({listed}). Put undamaged files there, or name another run"
    )


def stream_params(
    checkpoints: Path,
    step: int,
    config: ModelConfig,
    *,
    mesh: Mesh | None = None,
    quantize: Scheme | Quantised | None = None,
    frozen: Path | None = None,
) -> dict:
    """Returns the parameters that a verified step holds, on the mesh, quantised as they come if asked.

    What it does not hold is read from the model folder `frozen`, in the dtype of what was trained. Beside them the host
    holds three times one block of layers, as long as the checkpoint was written in: as it was read, unpacked, and
    whole. Raises ValueError for a checkpoint of something else, where the step goes away meanwhile, and where the
    frozen part is not bit by bit the one that was trained with; a quantised one cannot be compared.
    """
    folder = checkpoints / str(step)
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        recorded, wanted = about["trainable"], leaf_shapes(config)
        absent = [path for path in wanted if path not in recorded] if frozen is not None else []
        _check(recorded, config, folder, absent=absent)
        axes = logical_axes(config, mesh)
        stored = [path for path in wanted if path not in absent]
        largest = max((_num_bytes(*recorded[path]) for path in stored if not path.startswith("layers.")), default=0)
        params = {}
        if absent:
            dtype = _dtype(recorded[stored[0]][1])
            params = _frozen_params(frozen, absent, config, dtype, mesh=mesh, quantize=quantize)
            if quantize is None:
                _check_frozen(params, about["base"], folder, frozen)
        for path in stored:
            shape, dtype = recorded[path]
            home = home_of(path, config, _dtype(dtype), mesh=mesh, axes=axes, quantize=quantize, turned=False)
            small = on_host(_num_bytes(shape, dtype), largest)
            (leaf,) = fill([home], _blocks(_open(folder / ARRAYS, path), home.num_layers), on_host=small)
            set_leaf(params, path, leaf)
        return params
    except (OSError, ValueError) as error:
        if (folder / COMMITTED).exists():
            raise
        raise ValueError(
            f"the checkpoint {folder} was removed while it was read (a run keeps its newest few); take a newer step"
        ) from error


def _frozen_params(base: Path, paths: list[str], config: ModelConfig, dtype: np.dtype, *, mesh, quantize) -> dict:
    """Returns these leaves of a model folder in the dtype that they were frozen in."""
    family = family_of(read_json(base / CONFIG))
    params = load_params(list_tensors(base), family, config, where=base, mesh=mesh, quantize=quantize, only=paths)

    def cast(leaf):
        if isinstance(leaf, QuantArray):
            return dataclasses.replace(leaf, dtype=str(dtype))  # what it is restored to
        if leaf.dtype == dtype:
            return leaf
        new = leaf.astype(dtype)
        leaf.delete()
        return new

    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantArray))


def _check_frozen(params: dict, wanted: str | None, folder: Path, base: Path) -> None:
    from internjax.train.checkpoint import fingerprint  # Orbax takes as long to import as the rest of this file

    given = fingerprint(params)
    if given != wanted:
        raise ValueError(
            f"the checkpoint {folder} was trained beside frozen parameters with the fingerprint {wanted}, those of "
            f"{base} have {given}: the folder has changed since. Put back the model that the run started from"
        )


def _check(recorded: Mapping[str, Any], config: ModelConfig, folder: Path, *, absent: list[str]) -> None:
    for path, own in leaf_shapes(config).items():
        if path in absent:
            continue
        wanted = (config.num_layers, *own) if path.startswith("layers.") else own
        found = tuple(recorded[path][0]) if path in recorded else None
        if found != wanted:
            raise ValueError(
                f"the checkpoint {folder} has {found or 'nothing'} as {path}, the model beside it wants {wanted}; its "
                "state is not this model's parameters. Open the run's model/"
            )


def _open(folder: Path, path: str):
    """Returns the tensorstore of one array, opened for reading only."""
    import tensorstore

    metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    if metadata.get("use_ocdbt", True):
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}, "path": path}
    else:
        store = {"driver": "file", "path": f"{(folder / path).resolve()}/"}
    return tensorstore.open({"driver": driver, "kvstore": store}, read=True, write=False, open=True).result()


def _blocks(store, num_layers: int | None):
    """Returns the function that reads one layer. Chunks are read once: what one holds beyond a layer is kept."""
    if num_layers is None:
        return lambda layer: [np.asarray(store.read().result())]
    length = max(1, store.chunk_layout.read_chunk.shape[0])
    block: list[np.ndarray] = []

    def read(layer: int) -> list[np.ndarray]:
        if layer % length == 0:
            block.clear()
            block.append(np.asarray(store[layer : layer + length].read().result()))
        return [block[0][layer % length]]

    return read


def _dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _num_bytes(shape: list[int], dtype: str) -> int:
    return int(np.prod(shape)) * _dtype(dtype).itemsize
