"""What a MODEL argument means: the one grammar of train, finetune, eval, serve, chat, quantize, convert and rlhf.

1. A path that exists, or a run's name under runs/: a model folder, an adapter folder (its base is resolved from
   adapter_config.json), or a run folder (its model/, else its newest good checkpoint).
2. hf:ORG/NAME[@REVISION] or modelscope:ORG/NAME[@REVISION]: fetched by the hub's own client.
3. RUN@STEP: the checkpoint of that step.
4. BASE+ADAPTER[+ADAPTER ...]: a model of the kinds above with adapters on it.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from internjax.hf.adapter import CONFIG as ADAPTER_CONFIG
from internjax.hf.adapter import read_adapter_config
from internjax.hf.hub import fetch_model, on_hub

RUNS = Path("runs")
CONFIG, ABOUT, EXPERIMENT = "config.json", "internjax.json", "experiment.json"
MODEL, ARCHITECTURE, CHECKPOINTS = "model", "architecture", "checkpoints"


class Source(NamedTuple):
    """Where a model comes from."""

    folder: Path
    """Folder of config.json and tokenizer; the weights lie there too, unless they are a checkpoint's."""
    checkpoints: Path | None
    """Folder of checkpoints that hold the weights."""
    step: int | None
    """Which checkpoint; None is the newest good one."""
    trained_adapter: Path | None
    """Where the checkpoint holds an adapter, on the weights of `folder`: the folder of its adapter_config.json."""
    adapters: tuple[Path, ...]
    """Adapter folders on top, in order."""
    frozen: Path | None = None
    """Where the checkpoint holds only what was trained of the weights: the model folder that has the others."""


def resolve(model: str | os.PathLike, *, adapters: Iterable[str | os.PathLike] = ()) -> Source:
    """Returns where MODEL lies; raises ValueError listing what was found there instead."""
    source = _resolve(os.fspath(model), seen=())
    return source._replace(adapters=(*source.adapters, *(_adapter_folder(os.fspath(each)) for each in adapters)))


def adapter_base(source: Source) -> Path:
    """Returns the folder that an adapter trained on `source` names as its base.

    Raises ValueError where no folder holds those weights: a checkpoint, or a model with adapters on it.
    """
    if source.checkpoints is None and not source.adapters:
        return source.folder
    what = "a checkpoint" if source.checkpoints is not None else "a model with adapters on it"
    raise ValueError(
        f"an adapter needs a folder as its base, and this base is {what}; write one first with "
        "`python -m internjax.hf convert MODEL FOLDER` and train on FOLDER"
    )


def _resolve(text: str, *, seen: tuple[str, ...]) -> Source:
    path = _existing(text)
    if path is not None:
        return _resolve_folder(path, seen=seen)
    if on_hub(text):
        return _resolve_folder(fetch_model(text), seen=seen)
    if found := re.fullmatch(r"(.+)@(\d+)", text):
        run = _existing(found[1])
        if run is not None and _kind(run) == "run":
            return _from_checkpoint(run, int(found[2]), seen=seen)
        raise ValueError(f"{found[1]!r} in {text!r} is no run folder: {_listing(found[1], run)}")
    # A name may hold a plus itself, so the longest base that exists wins.
    for cut in reversed([match.start() for match in re.finditer(r"\+", text)]):
        base, rest = text[:cut], text[cut + 1 :]
        if _existing(base) is not None or base.startswith(("hf:", "modelscope:")) or re.fullmatch(r".+@\d+", base):
            return resolve(base, adapters=[rest] if _existing(rest) is not None else rest.split("+"))
    raise ValueError(
        f"no model {text!r}: {_listing(text, None)}. Give a Hugging Face folder, an adapter folder, BASE+ADAPTER, a "
        "run (a name under runs/ or a path), RUN@STEP, hf:ORG/NAME or modelscope:ORG/NAME"
    )


def _existing(text: str) -> Path | None:
    for path in (Path(text).expanduser(), RUNS / text):
        if text and path.exists():
            return path
    return None


def _kind(folder: Path) -> str | None:
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / CONFIG).is_file():
        return "model"
    if (folder / EXPERIMENT).is_file() or (folder / CHECKPOINTS).is_dir():
        return "run"
    return None


def _resolve_folder(folder: Path, *, seen: tuple[str, ...]) -> Source:
    match _kind(folder):
        case "model":
            return Source(folder, None, None, None, ())
        case "adapter":
            return _from_adapter(folder, seen=seen)
        case "run":
            if _kind(folder / MODEL) is not None:
                return _resolve_folder(folder / MODEL, seen=seen)
            return _from_checkpoint(folder, None, seen=seen)
    raise ValueError(
        f"{folder} is no model: it has neither {CONFIG} (Hugging Face), {ADAPTER_CONFIG} (adapter) nor {EXPERIMENT} "
        f"(run). {_listing(str(folder), folder)}"
    )


def _from_adapter(folder: Path, *, seen: tuple[str, ...]) -> Source:
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base model; write BASE+{folder}")
    if str(folder) in seen:
        raise ValueError(f"{folder} is an adapter whose base is itself; write BASE+{folder}")
    # PEFT writes a path as it was given, so it may be meant from here or from where the adapter lies.
    for candidate in (Path(base), folder / base):
        if candidate.exists():
            source = _resolve_folder(candidate, seen=(*seen, str(folder)))
            return source._replace(adapters=(*source.adapters, folder))
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", base):
        raise ValueError(f"{folder} is an adapter of {base!r}, which is not a folder here; write hf:{base}+{folder}")
    raise ValueError(f"{folder} is an adapter of {base!r}, which does not exist; write BASE+{folder}")


def _from_checkpoint(run: Path, step: int | None, *, seen: tuple[str, ...]) -> Source:
    architecture = run / ARCHITECTURE
    if not (run / CHECKPOINTS).is_dir() or _kind(architecture) is None:
        raise ValueError(
            f"the run {run} has no {MODEL}/ folder and no checkpoints with an {ARCHITECTURE}/ folder to read them by: "
            f"{_listing(str(run), run)}. Let the run reach its first checkpoint"
        )
    if _kind(architecture) == "adapter":
        base = _from_adapter(architecture, seen=seen)
        if base.checkpoints is not None:
            raise ValueError(f"{run} trains an adapter on the checkpoint {base.checkpoints}; export that one first")
        return base._replace(
            checkpoints=run / CHECKPOINTS, step=step, trained_adapter=architecture, adapters=base.adapters[:-1]
        )
    frozen = read_json(architecture / ABOUT).get("frozen") if (architecture / ABOUT).is_file() else None
    if frozen is not None and _kind(Path(frozen)) != "model":
        raise ValueError(
            f"checkpoints of {run} hold what it trained alone; what it froze is that of the model {frozen}, which is "
            f'not there any more. Put it back, or name where it is as "frozen" in {architecture / ABOUT}'
        )
    return Source(architecture, run / CHECKPOINTS, step, None, (), None if frozen is None else Path(frozen))


def _adapter_folder(text: str) -> Path:
    path = _existing(text)
    if path is not None and _kind(path) == "run":
        path = path / MODEL
    if path is None or _kind(path) != "adapter":
        raise ValueError(f"{text!r} is no adapter: it has no {ADAPTER_CONFIG}. {_listing(text, path)}")
    return path


def _listing(text: str, path: Path | None) -> str:
    """Says what lies at a wrong argument, or beside it."""
    if path is not None and path.is_file():
        return f"{path} is a file"
    folder = path if path is not None else Path(text).expanduser().parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    listed = ", ".join(names[:12]) + (", ..." if names[12:] else "")
    runs = ", ".join(sorted(entry.name for entry in RUNS.iterdir() if entry.is_dir())[:12]) if RUNS.is_dir() else ""
    return f"found in {folder}: {listed or 'nothing'}" + (f"; runs: {runs}" if runs else "")


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file of a model folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from where the folder came from") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; restore it from where the folder came from")
    return values
