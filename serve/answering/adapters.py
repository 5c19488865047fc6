"""Adapter folders as a server takes them: read for the model that is served, each under a name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from internjax.decode.device import AdapterRoom
from internjax.hf.adapter import Adapter, check_copies, load_adapter
from internjax.hf.open import Model
from internjax.hf.weights import list_tensors


def read_adapter(folder: str | os.PathLike, model: Model) -> Adapter:
    """Returns the adapter of a PEFT folder for `model`. Raises ValueError for one of another base."""
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} has no adapter_config.json; give an adapter folder in PEFT's layout")
    adapter = load_adapter(folder, model_config=model.config)
    if model.source is None:
        return adapter
    base = Path(adapter.base or "")
    if adapter.base and base.is_dir() and not base.samefile(model.source.folder):
        raise ValueError(
            f"the adapter {folder} was trained on {base}, and {model.source.folder} is served; give one of this base"
        )
    if adapter.copies:
        check_copies(adapter, list_tensors(model.source.folder), where=folder)
    return adapter


def room_for(adapters: Mapping[str, Adapter], *, num_places: int | None, rank: int | None) -> AdapterRoom | None:
    """Returns the room that the engine keeps: for these adapters, and for others up to the numbers given."""
    num_places = len(adapters) if num_places is None else num_places
    if num_places < len(adapters):
        raise ValueError(f"{len(adapters)} adapters are given and there is room for {num_places}; ask for more room")
    if not num_places:
        if rank is not None:
            raise ValueError("a rank of adapters is given, and neither adapters nor room for any; leave it out")
        return None
    usual = AdapterRoom(num_places)
    ranks = [adapter.config.rank for adapter in adapters.values()]
    return AdapterRoom(
        num_places,
        rank=max(ranks, default=usual.rank) if rank is None else rank,
        targets=_joined([usual.targets, *(adapter.config.targets for adapter in adapters.values())]),
    )


def _joined(targets: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(target for each in targets for target in each))
