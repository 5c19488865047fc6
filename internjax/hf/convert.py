"""Conversion of any MODEL into a Hugging Face folder, and the check of a folder that was written so."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from internjax.hf.families import Layout, family_of
from internjax.hf.loading import placer
from internjax.hf.mapping import get_leaf, set_leaf
from internjax.hf.open import open_model
from internjax.hf.provenance import provenance_of
from internjax.hf.resolve import ABOUT, CONFIG, read_json
from internjax.hf.save import Proof, file_hashes, proof_logits, save_model
from internjax.model.config import DType
from internjax.model.lora import Lora, merge
from internjax.model.quantize import dequantize_params

# Logits in float32 on another device or with another number of threads: sums in another order, nothing more.
TOLERANCE = 1e-3


def convert(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    layout: Layout | None = None,
    dtype: DType | None = None,
    shard_size: str | int = "5GB",
    overwrite: bool = False,
    merge_adapters: Iterable[str | os.PathLike] = (),
    allow_unknown: tuple[str, ...] = (),
) -> Proof:
    """Writes MODEL `source` as a Hugging Face folder and returns the proof. Adapters are merged; this is printed.

    A quantised folder (AWQ, GPTQ) is written as it is, unless adapters are merged into it: then it is restored.
    `merge_adapters` are adapter folders on top of those that MODEL names. Memory holds one model at a time, and besides
    it two tensors on the host. A run that is going on is only read from.
    """
    merge_adapters = [os.fspath(adapter) for adapter in merge_adapters]
    model = open_model(source, adapters=merge_adapters, allow_unknown=allow_unknown)
    params, provenance = model.params, provenance_of(model.source)
    source_logits = proof_logits(model.config, params, lora=model.lora)
    quantization = model.quantization
    if model.lora is not None:
        if quantization is not None:
            # What an adapter adds lies between the levels of the grid.
            params, quantization = dequantize_params(params), None
            print(f"{source} is quantised; with adapters merged into it {folder} is not")
        merge_in_place(params, model.lora)
        print(f"adapters are merged into the weights of {folder}")
    provenance |= {"converted from": "+".join([str(source), *merge_adapters])}
    return save_model(
        folder,
        config=model.config,
        params=params,
        tokenizer=model.tokenizer,
        generation=model.generation,
        layout=layout,
        dtype=dtype,
        shard_size=shard_size,
        provenance=provenance,
        overwrite=overwrite,
        source_logits=source_logits,
        use_up=True,
        quantization=quantization,
    )


def merge_in_place(params: dict, lora: Lora) -> None:
    """Merges adapters into the parameters, whose buffers are used up; layer by layer, so that no second copy is made.

    Raises ValueError for an adapter that does not fit the parameters.
    """
    leaves = jax.tree_util.tree_leaves_with_path(lora.weights)
    for place in dict.fromkeys(tuple(entry.key for entry in path[:-1]) for path, _ in leaves):
        path = ".".join((*place, "kernel"))
        node, kernel = get_leaf(lora.weights, ".".join(place)), get_leaf(params, path)
        if kernel.ndim == 2:
            set_leaf(params, path, _merged(path, kernel, node, lora))
            continue
        for layer in range(kernel.shape[0]):
            one = _merged(path, kernel[layer : layer + 1], jax.tree.map(lambda x: x[layer : layer + 1], node), lora)  # noqa: B023
            kernel = placer(None)(kernel, one[0], layer)
        set_leaf(params, path, kernel)


def _merged(path: str, kernel: jax.Array, node: dict, lora: Lora) -> jax.Array:
    tree: dict = {}
    weights: dict = {}
    set_leaf(tree, path, kernel)
    set_leaf(weights, path.removesuffix(".kernel"), node)
    return get_leaf(merge(tree, dataclasses.replace(lora, weights=weights)), path)


class Checked(NamedTuple):
    """What `check` found: files with the recorded sha256, and how far the logits are from the recorded ones."""

    num_files: int
    max_logit_difference: float


def check(folder: str | os.PathLike) -> Checked:
    """Verifies a folder that `save_model` wrote: every file's sha256, then the recorded logits, computed anew.

    Raises ValueError naming what is missing, added or changed.
    """
    folder = Path(folder)
    about = _about(folder)
    wanted, found = about["files"], file_hashes(folder)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} has changed" for name in wanted if name in found and found[name] != wanted[name]]
    faults += [f"{name} was added" for name in found if name not in wanted]
    if faults:
        raise ValueError(f"{folder} is not as it was written: {'; '.join(faults)}. Export or copy it again")
    model = open_model(folder)
    row = proof_logits(model.config, model.params, token_ids=about["proof"]["token_ids"])[0]
    recorded = np.asarray(about["proof"]["logits"], np.float32)
    difference = float(np.abs(row[:, : recorded.shape[1]] - recorded).max())
    if not difference <= TOLERANCE * max(1.0, float(np.abs(recorded).max())):
        raise ValueError(
            f"{folder}: the files are as they were written, but the logits differ by {difference:g} from those "
            "recorded; this installation computes something else. Compare the versions of jax"
        )
    return Checked(len(wanted), difference)


def _about(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one that save_model or convert has written")
    if not (folder / ABOUT).is_file():
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"{folder} is no model folder: it has neither {CONFIG} nor {ABOUT}. Give one that convert or a run has "
                f"written; of an adapter, `python -m internjax.hf convert {folder} NEW` writes the merged model"
            )
        name = family_of(read_json(folder / CONFIG)).name
        raise ValueError(
            f"{folder} is a {name} folder without {ABOUT}, so nothing is recorded to compare with; "
            f"`python -m internjax.hf convert {folder} NEW` writes one that has it"
        )
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        about["files"], about["proof"]["token_ids"], about["proof"]["logits"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABOUT} cannot be read ({error!r}); export the folder again") from error
    return about
