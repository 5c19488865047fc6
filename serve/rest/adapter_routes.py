"""Adapters that come and go while a server runs: vLLM's POST /v1/load_lora_adapter and /v1/unload_lora_adapter.

A request names a folder; none is read that is not below the one folder given to the server, whatever links lie there.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response

from internjax.hf.open import Model
from serve.operation.refusal import Refusal
from serve.pipeline import Pipeline
from serve.rest.protocol import refuse_adapter
from serve.rest.requests import LoadAdapterRequest, UnloadAdapterRequest

log = logging.getLogger("serve")


def add_adapter_routes(app: FastAPI, pipeline: Pipeline, *, root: Path, model_name: str) -> None:
    """Adds both routes. Raises ValueError where `root` is no folder."""
    if not root.is_dir():
        raise ValueError(f"the folder of adapters {root} is not there; make it, or name another")
    root = root.resolve()

    @app.post("/v1/load_lora_adapter")
    def load(body: LoadAdapterRequest) -> Response:
        refuse_adapter(body)
        if body.lora_name in (model_name, *pipeline.adapters):
            taken = f"{body.lora_name!r} is served already; unload it first, or choose another name"
            raise Refusal(taken, param="lora_name")
        folder = folder_below(root, body.lora_path)
        try:
            pipeline.load_adapter(body.lora_name, folder)
        except (ValueError, OSError) as error:
            log.info("adapter %r not loaded: %s", body.lora_name, error)
            raise Refusal(_without_places(str(error), root, pipeline.model), param="lora_path") from error
        log.info("adapter %r loaded from %s", body.lora_name, folder)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload(body: UnloadAdapterRequest) -> Response:
        refuse_adapter(body)
        if body.lora_name not in pipeline.adapters:
            there = ", ".join(pipeline.adapters) or "none"
            raise Refusal(
                f"the adapter {body.lora_name!r} is not loaded; there are: {there}", param="lora_name", status=404
            )
        try:
            pipeline.unload_adapter(body.lora_name)
        except RuntimeError as error:
            raise Refusal(str(error), param="lora_name", status=409) from error
        log.info("adapter %r unloaded", body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _without_places(told: str, root: Path, model: Model | None) -> str:
    """What is wrong with a folder, with its name as clients know it: where things lie here is not theirs to know."""
    told = told.replace(f"{root}{os.sep}", "")
    if model is not None and model.source is not None:
        told = told.replace(str(model.source.folder), model.source.folder.name)
    return told


def folder_below(root: Path, given: str) -> Path:
    """The folder that a request names, relative to `root` or in full. Raises Refusal for one that is not below it.

    So is one with a file that is a link to elsewhere. Of what lies outside nothing is told, not even whether it is.
    """
    outside = Refusal(
        "lora_path must name a folder below the server's folder of adapters (--adapter-root), without links that "
        f"lead out of it; given {given!r:.200}",
        param="lora_path",
    )
    try:
        folder = (root / given).resolve()
        if root not in folder.parents:
            raise outside
        if not folder.is_dir():
            raise Refusal(f"there is no folder {given!r:.200}", param="lora_path", status=404)
        if not all(path.resolve().is_relative_to(root) for path in folder.iterdir()):
            raise outside
    except (OSError, ValueError, RuntimeError) as error:  # a name that cannot be, a loop of links
        raise outside from error
    return folder
