"""Members of .tar (also .tar.gz, .tgz, .tar.bz2, .tar.xz, .tar.zst) and .zip archives, as files, without unpacking.

A member is a stream that is read before the next one is asked for; nothing is written to disk. What a folder would not
give is not given either: hidden files, links, names that lead out of the archive. What cannot be read is set aside as
"archive/member: reason".
"""

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from data_pipelines.readers import SKIPPED_FOLDERS, BadRow, File, UntilDamage, opened, set_aside, uncompressed_suffix

ARCHIVE_SUFFIXES = {".tar", ".zip"}
"""As `readers.uncompressed_suffix` gives them."""
END_MARK = bytes(512)


class Member(NamedTuple):
    """refusal: why its bytes are not to be read, if they are not."""

    name: str
    refusal: str | None
    open: Callable[[], BinaryIO]


def member_files(file: File, *, is_read: Callable[[str], bool], on_bad_row: BadRow = None) -> Iterator[File]:
    """The members of an archive whose names `is_read` accepts, as files of a repository named like the archive.

    A first folder that has the archive's name is not repeated: r.tar.gz with r/a.py gives "r/a.py".
    """
    repository = archive_name(file.name)
    own = f"{repository.rpartition('/')[2]}/"
    members = _zip_members if uncompressed_suffix(file.path) == ".zip" else _tar_members
    for member in members(file, on_bad_row):
        inside = member.name.removeprefix("./").rstrip("/")
        parts = PurePosixPath(inside).parts
        if any(part.startswith(".") and part != ".." or part in SKIPPED_FOLDERS for part in parts):
            continue
        if refusal := member.refusal or _refusal(inside):
            set_aside(f"{file.path}/{inside}: {refusal}", on_bad_row)
            continue
        if not is_read(inside):
            continue
        path, name = file.path / inside, f"{repository}/{inside.removeprefix(own)}"
        try:
            with member.open() as stream:
                yield File(path, name, repository, stream)
        except DAMAGE as error:
            set_aside(f"{path}: cannot be read ({error}); copy the archive again", on_bad_row)


DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)


def archive_name(name: str) -> str:
    """The name without what says that it is an archive: "folder/r" of "folder/r.tar.gz"."""
    stem, _, last = name.rpartition("/")
    for suffix in (*(f".tar{end}" for end in (".gz", ".bz2", ".xz", ".zst", "")), ".tgz", ".zip"):
        if last.lower().endswith(suffix) and len(last) > len(suffix):
            last = last[: -len(suffix)]
            break
    return f"{stem}/{last}" if stem else last


def _refusal(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "a name that leads out of the archive; not read"
    if uncompressed_suffix(path) in ARCHIVE_SUFFIXES:
        return "an archive in an archive; not read, give it by itself"
    return None


def _tar_members(file: File, on_bad_row: BadRow) -> Iterator[Member]:
    """Members in their order, reading the archive once from front to back."""
    with opened(file) as content:
        whole = UntilDamage(content)
        try:
            with tarfile.open(fileobj=whole, mode="r|", errorlevel=0) as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # tarfile would keep them all
                    if member.isdir():
                        continue
                    refusal = None if member.isreg() else "a link, or no plain file; not followed"
                    yield Member(member.name, refusal, lambda member=member: archive.extractfile(member))
        except tarfile.TarError as error:
            raise ValueError(
                f"{file.path}: not a readable tar archive ({whole.damage or error}); copy it again"
            ) from error
        tail = whole.tail
        while whole.read(1 << 16):
            pass  # to the check sum of a compression
    if whole.damage or tail != END_MARK:
        reason = whole.damage or "it has no end mark"
        set_aside(f"{file.path}: the archive is cut off or damaged ({reason}); copy it again", on_bad_row)


def _zip_members(file: File, on_bad_row: BadRow) -> Iterator[Member]:
    """Members in the order of the archive's directory."""
    try:
        archive = zipfile.ZipFile(file.path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{file.path}: not a readable zip archive ({error}); copy it again") from error
    with archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            refusal = None
            if stat.S_ISLNK(member.external_attr >> 16):
                refusal = "a link, or no plain file; not followed"
            elif member.flag_bits & 1:
                refusal = "encrypted; not read, decrypt the archive first"
            yield Member(member.filename, refusal, lambda member=member: archive.open(member))
