"""Folders that appear whole or not at all."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """Gives a temporary sibling folder to write into; it takes the name `path` when the block ends without an error.

    An existing `path` is replaced only with `overwrite`, and only when it is empty or holds `marker`, the file that
    tells a folder of the same kind. On an error nothing is left and `path` is as it was. What a process that was killed
    left there, `.NAME.new-*` and `.NAME.old-*`, is removed.
    """
    path = Path(path).absolute()
    check_target(path, overwrite=overwrite, marker=marker)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left(path)
    new, held = _held_folder(path)
    old = new.with_name(new.name.replace(".new-", ".old-"))
    try:
        yield new
        sync_tree(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}. Nothing of it is left; make room there or make "
            "it writable, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(held)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        _remove_left(path)


def _held_folder(path: Path) -> tuple[Path, int]:
    """A new folder `.NAME.new-*` beside the path, and a descriptor that holds its lock while this process lives."""
    while True:
        new = path.with_name(f".{path.name}.new-{uuid.uuid4().hex[:8]}")
        new.mkdir()
        descriptor = os.open(new, os.O_RDONLY)
        if _locked(descriptor) is not False and new.exists():
            return new, descriptor
        os.close(descriptor)  # another process found it before it was locked, and removes it


def _locked(descriptor: int) -> bool | None:
    """Whether a folder is locked now; None where the file system has no locks on folders."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_left(path: Path) -> None:
    """Removes what processes that are dead left beside the path: new folders, and old ones that were replaced."""
    left = re.compile(rf"\.{re.escape(path.name)}\.(new|old)-[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):
        for entry in [entry for entry in path.parent.iterdir() if left.fullmatch(entry.name)]:
            if ".old-" in entry.name:
                # Without a folder at the path it is the only one there is, or about to come back.
                if path.exists():
                    shutil.rmtree(entry, ignore_errors=True)
                continue
            descriptor = os.open(entry, os.O_RDONLY)
            if _locked(descriptor):
                shutil.rmtree(entry, ignore_errors=True)
            os.close(descriptor)


def check_target(path: Path, *, overwrite: bool, marker: str) -> None:
    """Raises ValueError where `new_folder` would not take the name."""
    if not path.exists():
        return
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a folder")
    found = sorted(entry.name for entry in path.iterdir())
    if not found:
        return
    listed = ", ".join(found[:5]) + (", ..." if found[5:] else "")
    if marker not in found:
        raise ValueError(f"{path} is not empty and has no {marker} ({listed}): it is not replaced. Give another name")
    if not overwrite:
        raise ValueError(f"{path} exists already ({listed}). Give another name, or overwrite=True (--overwrite)")


def sync_tree(folder: Path) -> None:
    """Returns when every file and folder below is on disk: a name that is given to it then never shows half of it."""
    for entry in [*folder.rglob("*"), folder]:
        if not entry.is_symlink():
            _sync(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
