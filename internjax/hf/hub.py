"""Models and data sets of the hubs, by name: hf:ORG/NAME[@REVISION] and modelscope:ORG/NAME[@REVISION].

The hubs' own clients fetch the files and keep them, imported when a name asks for one, so their variables hold:
HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE; MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN. What was
fetched before is found without a network. Weights are fetched as safetensors only: no pickle, and no code.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Hub = Literal["hf", "modelscope"]
PACKAGES: dict[str, str] = {"hf": "huggingface_hub", "modelscope": "modelscope_hub"}
_NAME = re.compile(r"(hf|modelscope):([^@+]+)(?:@([^+]+))?")
_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")

MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "README.md"]
# Weights in the layouts of other programs lie in subfolders or are named so, and are as large as the ones to read.
OTHER_LAYOUTS = ["*/*", "consolidated*"]
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".md")
DATA_FILES = [f"*{suffix}{packed}" for suffix in _DATA_SUFFIXES for packed in ("", ".gz", ".zst")]


def on_hub(name: str) -> bool:
    """Whether a name is one of a hub."""
    return _NAME.fullmatch(name) is not None


def fetch_model(name: str) -> Path:
    """Returns the local folder of a hub's model; raises ValueError that tells the way without the hub."""
    folder = _fetch(name, "model", allow=MODEL_FILES, ignore=OTHER_LAYOUTS)
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{name} has no safetensors (fetched: {found}). Weights in pickles can run code and are not fetched: "
            "take a revision that has safetensors, or save the model with safe_serialization=True and give that folder"
        )
    return folder


def resolve_data(name: str | os.PathLike) -> Path:
    """Returns the path of a data set: a local path as it is, hf: and modelscope: names as the folder of their files.

    Only data files (JSON, parquet, Arrow, tables and text, compressed or not) are fetched, never a loading script.
    Raises ValueError where nothing is there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not on_hub(os.fspath(name)):
        raise ValueError(
            f"no data at {os.fspath(name)!r}; give a file, a folder, hf:ORG/NAME or modelscope:ORG/NAME "
            "(ORG/NAME@REVISION for another revision)"
        )
    folder = _fetch(os.fspath(name), "dataset", allow=DATA_FILES, ignore=[])
    if not any(path.is_file() for path in folder.rglob("*")):
        raise ValueError(
            f"{name} holds no data files that are read here ({', '.join(_DATA_SUFFIXES)}); data sets made by a script "
            "are not run. Export it (datasets.load_dataset(...).to_json(FILE)) and give that file"
        )
    return folder


def push(folder: str | os.PathLike, repository: str, *, private: bool = True) -> str:
    """Uploads a model or adapter folder to the Hugging Face hub as one commit; returns the address of the repository.

    `repository` is [hf:]ORG/NAME[@BRANCH]; it is made where it does not exist, private unless asked otherwise. Raises
    ValueError where the folder is no model or the hub does not take it; the folder stays as it is.
    """
    folder = Path(folder)
    found = _target(repository)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} is no model or adapter folder, so it is not pushed; give the folder of one")
    remedy = f"{folder} is untouched; check HF_TOKEN (a token that may write) and the name, then push again"
    client = _client("hf", remedy)
    api = client.HfApi()
    try:
        api.create_repo(found[2], private=private, exist_ok=True)
        message = f"Upload {folder.resolve().name}"
        api.upload_folder(repo_id=found[2], folder_path=folder, revision=found[3], commit_message=message)
    except Exception as error:
        raise ValueError(f"{folder} could not be pushed to {found[2]} ({_reason(error)}). {remedy}") from error
    return f"{api.endpoint}/{found[2]}"


def check_push(repository: str) -> None:
    """Raises ValueError where `push` could not even begin: another name than it takes, or no client."""
    _client("hf", f"{_target(repository)[2]} could not be pushed to without it")


def _target(repository: str) -> re.Match:
    found = _NAME.fullmatch(repository if on_hub(repository) else f"hf:{repository}")
    if found is None or found[1] != "hf" or "/" not in found[2] or not _REPOSITORY.fullmatch(found[2]):
        raise ValueError(f"a folder is pushed to hf:ORG/NAME or ORG/NAME (@BRANCH may follow); given {repository!r}")
    return found


def _fetch(name: str, kind: Literal["model", "dataset"], *, allow: list[str], ignore: list[str]) -> Path:
    found = _NAME.fullmatch(name)
    if found is None or not _REPOSITORY.fullmatch(found[2]):
        raise ValueError(
            f"{name!r} is no name of a hub; give hf:ORG/NAME or modelscope:ORG/NAME (@REVISION may follow)"
        )
    hub, repository, revision = found.groups()
    what = "config.json, *.safetensors, tokenizer files" if kind == "model" else "its JSON or parquet files"
    manual = f"Without it: download the files of {repository} ({what}) by any means into a folder and give that folder"
    download: dict[str, Callable[..., str | os.PathLike]] = {"hf": _from_hugging_face, "modelscope": _from_modelscope}
    client = _client(hub, manual)
    try:
        return Path(download[hub](client, repository, kind, revision, allow, ignore))
    except Exception as error:
        raise ValueError(f"{name} could not be fetched ({_reason(error)}). {manual}") from error


def _from_hugging_face(client, repository: str, kind: str, revision: str | None, allow: list[str], ignore: list[str]):
    return client.snapshot_download(
        repository, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore
    )


def _from_modelscope(client, repository: str, kind: str, revision: str | None, allow: list[str], ignore: list[str]):
    # This client knows no variable for it, and who forbids the network to one hub means the network.
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return client.HubApi().download_repo(
        repository,
        kind,
        revision=revision,
        allow_patterns=allow,
        ignore_patterns=ignore or None,
        local_files_only=offline,
    )


def _client(hub: str, manual: str):
    """Returns the module of a hub's client."""
    import importlib

    package = PACKAGES[hub]
    # Read when the client is imported; it would report what runs it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"{hub}: names need the package {package} (pip install {package.replace('_', '-')}). {manual}"
        ) from None


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
