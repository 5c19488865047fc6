"""Safetensors files, read and written one tensor at a time; a model may be sharded over several files.

A file is 8 bytes of header length, a JSON header (name -> dtype, shape, offsets), and the tensors' bytes. A folder of
several files has model.safetensors.index.json with the file of every tensor. Nothing here runs code from a file.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """Where a tensor lies: its file, its dtype as the file spells it, its shape, its bytes from `start` on."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a model folder by name; reads headers only.

    Raises ValueError where there are no safetensors, a shard of the index is missing, a file is truncated or damaged,
    or a tensor is not in the file that the index names.
    """
    if (folder / INDEX).is_file():
        weight_map = _read_index(folder / INDEX)
        files = sorted(set(weight_map.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of the {len(files)} files that {INDEX} names are missing "
                f"({', '.join(missing[:3])}{', ...' if missing[3:] else ''}); download them again"
            )
        tensors = {}
        for name in files:
            tensors |= read_header(folder / name)
        absent = sorted(name for name in weight_map if name not in tensors)
        if absent:
            raise ValueError(
                f"{folder}: {INDEX} places {absent[0]} in {weight_map[absent[0]]}, which does not hold it"
                f"{f' (and {len(absent) - 1} more)' if absent[1:] else ''}; the files are of different checkpoints"
            )
        return tensors
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no such folder"
    pickled = "pytorch_model" in found
    raise ValueError(
        f"{folder} has no {SINGLE} and no {INDEX} (found: {found or 'nothing'}). "
        + (
            "Weights in pytorch_model*.bin are pickles, which can run code and are not read: save them with "
            "safe_serialization=True"
            if pickled
            else "Give a folder that holds safetensors"
        )
    )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Returns the tensors of one file; raises ValueError where the file is cut short or is no safetensors file."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES or 8 + length > size:
            raise ValueError(f"{file} is not a whole safetensors file ({size} bytes); download or copy it again")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {
                name: TensorInfo(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in entries.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} has a damaged header ({error!r}); download or copy it again") from error
    end = max((info.start + info.nbytes for info in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(
            f"{file} is cut short: its tensors end at byte {end:,}, the file has {size:,}; download or copy it again"
        )
    return tensors


def read_tensor(info: TensorInfo) -> np.ndarray:
    """Returns a tensor in memory of its own, so that it does not change when the file does."""
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise ValueError(f"{info.file} holds {info.dtype} values; readable are {', '.join(DTYPES)}")
    count = int(np.prod(info.shape))
    if count * dtype.itemsize != info.nbytes:
        raise ValueError(f"{info.file}: a tensor {info.shape} of {info.dtype} cannot have {info.nbytes} bytes")
    values = np.fromfile(info.file, dtype, count, offset=info.start)
    if values.size != count:
        raise ValueError(f"{info.file} ended {count - values.size} values too early while it was read")
    return values.reshape(info.shape)


class Plan(NamedTuple):
    """A tensor to be written: dtype and shape are known at once, its values are fetched when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def parse_size(text: str | int) -> int:
    """Returns a number of bytes: "5GB", "200MB", "64KB" (powers of ten), or a number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if not found or float(found[1]) <= 0:
        raise ValueError(f"a size is a positive number with KB, MB, GB or TB; given {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def write_model(folder: Path, plans: Mapping[str, Plan], *, shard_size: str | int = "5GB") -> None:
    """Writes tensors into files of at most `shard_size` (a larger tensor has a file of its own), with their index.

    Peak memory is one tensor. The files are synced to disk when this returns.
    """
    limit, shards = parse_size(shard_size), [{}]
    for name, plan in plans.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + plan.nbytes > limit:
            shards.append({})
        shards[-1][name] = plan
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(plan.nbytes for plan in plans.values())
    write_text(
        folder / INDEX,
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n",
    )


def write_file(file: Path, plans: Mapping[str, Plan]) -> None:
    """Writes one safetensors file, tensor after tensor, and syncs it to disk."""
    # Wider types first keeps every tensor aligned to its item size.
    ordered = sorted(plans.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, plan in ordered:
        offsets = [start, start + plan.nbytes]
        header[name] = {"dtype": _CODES[plan.dtype], "shape": list(plan.shape), "data_offsets": offsets}
        start += plan.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, plan in ordered:
            values = _cast(name, plan.fetch(), plan.dtype)
            assert values.shape == plan.shape, f"{name}: {values.shape} was planned as {plan.shape}"
            stream.write(values.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def _cast(name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns the values as they are written; raises ValueError where float16 is too small for them."""
    if dtype == np.float16 and values.dtype != dtype and values.size:
        largest = max(float(values.max()), -float(values.min()))
        if float(np.finfo(np.float16).max) < largest < np.inf:
            raise ValueError(
                f"{name} has values up to {largest:.3g}, float16 ends at 65504; store the model as bfloat16 or float32"
            )
    return np.ascontiguousarray(values, dtype)


def write_text(file: Path, text: str) -> None:
    """Writes a text file and syncs it to disk."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def check_names(
    found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]], *, where: Path, ignored: Iterable[str] = ()
) -> None:
    """Raises one ValueError that names missing and unexpected tensors and wrong shapes."""
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted and name not in set(ignored)]
    differing = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    faults = []
    for title, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 3} more" if names[3:] else ""
            faults.append(f"{title}: {', '.join(names[:3])}{more}")
    if differing:
        name = differing[0]
        more = f" and {len(differing) - 1} more" if differing[1:] else ""
        faults.append(f"wrong shape: {name} is {found[name].shape}, config.json asks for {wanted[name]}{more}")
    if faults:
        raise ValueError(f"{where}: the tensors do not fit config.json ({'; '.join(faults)}); take both from one place")


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        # A name with a path in it could point outside the folder.
        assert all(Path(name).name == name for name in weight_map.values())
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{file} is not a valid index ({error!r}); download it again") from error
