"""The files of a checkpoint: who wrote which, what they should hold, and what a kill may have left of them."""

import concurrent.futures
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from internjax.train import processes

ABOUT, CHECKSUMS, COMMITTED = "about.json", "checksums.json", "COMMITTED"
EXPERIMENT, METRICS = "experiment.json", "metrics.jsonl"  # of the run folder around it
_UNFINISHED = ".orbax-checkpoint-tmp"
_WRITTEN_BY = re.compile(r"(?:.*\.)?process_(\d+)")


def committed_steps(folder: str | Path) -> list[int]:
    """Returns the steps under `folder` that were written to their end, oldest first; nothing is read or verified."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(path.parent.name) for path in folder.glob(f"*/{COMMITTED}") if path.parent.name.isdigit())


def problem(folder: str | Path, step: int, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Returns what is wrong with the files of a committed step, or None when each has the checksum it was given.

    With `share` (i, n) the contents of every n-th file alone are read: n processes verify a step together.
    """
    step_folder = Path(folder) / str(step)
    try:
        listing = (step_folder / CHECKSUMS).read_bytes()
        if hashlib.sha256(listing).hexdigest() != (step_folder / COMMITTED).read_text().strip():
            return f"{CHECKSUMS} is not the one that was committed"
        wanted = json.loads(listing)
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    missing = [name for name in wanted if not (step_folder / name).is_file()]
    if missing:
        return f"{missing[0]} is missing" + (f" with {len(missing) - 1} more files" if missing[1:] else "")
    try:
        sizes = {name: (step_folder / name).stat().st_size for name in wanted}
        names = sorted(wanted, key=lambda name: (-sizes[name], name))[share[0] :: share[1]]
        given = checksums(step_folder, names)
        written_as = json.loads((step_folder / ABOUT).read_text())["step"]
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, KeyError, TypeError):
        return f"{ABOUT} has changed since it was written"
    changed = [name for name in names if given[name] != wanted[name]]
    if changed:
        return f"{changed[0]} has changed since it was written (its sha256 differs)"
    return None if written_as == step else f"it was written as step {written_as}, and its folder was renamed"


def own_files(path: Path) -> list[str]:
    """Returns the files of a step that this process wrote; those that no process put its number on are process 0's."""
    owners = {}
    for file in path.rglob("*"):
        if file.is_file():
            parts = file.relative_to(path).parts
            numbers = [int(match[1]) for part in parts if (match := _WRITTEN_BY.fullmatch(part))]
            owners["/".join(parts)] = numbers[0] if numbers and numbers[0] < processes.count() else 0
    return sorted(name for name, owner in owners.items() if owner == processes.index())


def experiment_of(folder: Path) -> str | None:
    """Returns 16 hex digits of the experiment.json beside a folder of checkpoints, or None where there is none."""
    path = folder.parent / EXPERIMENT
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def require_history(folder: Path, every: int) -> None:
    """Raises ValueError where checkpoints are gone that the run must have had: starting at step 0 would hide it.

    A kill leaves one unfinished step at most, and before the first is committed none can be beyond `every`; the save
    of step 2 * every waits for that of step every.
    """
    if committed_steps(folder):
        return
    lost = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    rows = (folder.parent / METRICS).read_text().split("\n")[:-1] if (folder.parent / METRICS).is_file() else []
    done = max((json.loads(row).get("step", 0) for row in rows[-1:]), default=0)
    if len(lost) > 1 or max(lost, default=0) > every:
        found = f"{folder} has the steps {lost}, but none of them has the file {COMMITTED} that ends a save"
    elif done > 2 * every:
        found = f"{folder} has no checkpoint, but {METRICS} beside it says that {done} steps were done"
    else:
        return
    raise ValueError(
        f"{found}: checkpoints of this run were lost, and it would start again at step 0. Nothing was removed. Put the "
        "missing files back, or start anew in another run folder (or with --fresh)."
    )


def _remove_while_written(path: Path) -> None:
    """Removes a folder into which threads of a failed save may still be writing."""
    for _ in range(40):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.05)
    shutil.rmtree(path)


def checksums(folder: Path, names: list[str]) -> dict[str, str]:
    def sha256(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        return dict(zip(names, pool.map(sha256, names)))


def write_durably(path: Path, text: str) -> None:
    """Writes a whole file or none: a temporary one is synced to disk and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def clear_unfinished(folder: Path) -> None:
    """Removes the folders of steps that were never committed."""
    for path in list(folder.iterdir()):
        is_step = path.name.isdigit() or (_UNFINISHED in path.name and path.name.split(".")[0].isdigit())
        if is_step and not (path / COMMITTED).exists():
            _remove_while_written(path)
