"""Files that others may have made, and files that we make among them.

A file is looked at before it is opened and again before it is read: it must be a regular one, so that no FIFO or device
holds anybody up, of a size that is known and within a stated limit, and, in a folder that came from elsewhere, no link
that leads out of it. What we write goes under a name that did not exist, never through a link, and takes the place of
its predecessor by being renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MiB = 1 << 20
MOST_JSON = 64 * MiB  # a manifest: some 80 000 edits
MOST_SETTINGS = 1 * MiB  # a YAML file
MOST_FACTS = 512 * MiB  # ZsRE's training set, the largest in use, has 150 MB
MOST_LINE = 4 * MiB  # characters of a corpus' line, or paragraph, in one piece
MOST_TENSORS = 64 * 1024 * MiB  # ten dense layers of a model of 400 billion weights
STAGING = r"\.\d+(-[0-9a-f]{8})?\.tmp"  # what follows the name of a file while it is written

_PLAIN = os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link",
}  # fmt: skip


# -------------------------------------------------------------------- reading


@contextmanager
def opened(path: Path, *, most: int, within: Path | None = None) -> Iterator[BinaryIO]:
    """A regular file of at most `most` bytes, open for reading.

    Args:
        within: a folder that came from elsewhere: the file must lie in it when all links are followed. Files of the
            Hugging Face cache, links into the `blobs` beside its `snapshots`, do. None: the user named the file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, too large, or outside `within`; the message names it.
    """
    place = path if within is None else _resolved_within(path, within)
    _check_regular(os.stat(place), path, most)  # before it is opened: opening a FIFO waits, and a device may act
    flags = os.O_RDONLY | (_PLAIN if within is not None else _PLAIN & ~getattr(os, "O_NOFOLLOW", 0))
    handle = os.open(place, flags)
    try:
        _check_regular(os.fstat(handle), path, most)
    except BaseException:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: Path, *, most: int, within: Path | None = None) -> bytes:
    """What the file holds; see `opened`."""
    with opened(path, most=most, within=within) as file:
        size = os.fstat(file.fileno()).st_size  # as much is set aside, not the most that is allowed
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{path} changed from {size} bytes while it was read")
    return content


def read_text(path: Path, *, most: int, within: Path | None = None) -> str:
    """The file's UTF-8 text; see `opened`. ValueError where it is something else."""
    try:
        return read_bytes(path, most=most, within=within).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file of any size that the user named, the longest in pieces of MOST_LINE characters.

    Raises:
        FileNotFoundError, ValueError: as `opened`; or it is something else than UTF-8 text.
    """
    with opened(path, most=sys.maxsize) as file, io.TextIOWrapper(file, encoding="utf-8") as text:
        try:
            while line := text.readline(MOST_LINE):
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def check_readable(path: Path, *, most: int) -> None:
    """For files that a library reads later: what `opened` raises."""
    with opened(path, most=most):
        pass


def parse_json(text: str) -> Any:
    """The value that `text` spells. ValueError where it spells none, twice the same key, a number that JSON has not
    (NaN, Infinity), or nests deeper than can be read."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def digest_of(path: Path) -> str | None:
    """sha256 of a regular file, read in pieces; None where there is none or it is a link."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        digest = hashlib.sha256()
        with opened(path, most=MOST_TENSORS) as file:
            while piece := file.read(MiB):
                digest.update(piece)
        return digest.hexdigest()
    except FileNotFoundError:
        return None


def _resolved_within(path: Path, folder: Path) -> Path:
    try:
        home, place = folder.resolve(), path.resolve()
    except RuntimeError as error:  # before Python 3.13: a link that leads to itself
        raise ValueError(f"{path} is a link that leads nowhere: {error}") from None
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(place.is_relative_to(each) for each in allowed):
        raise ValueError(f"{path} is a link out of its folder, to {place}")
    return place


def _check_regular(found: os.stat_result, path: Path, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')}, not a regular file")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size} bytes, at most {most} are read")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is there twice")
        found[name] = value
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number in JSON")


# -------------------------------------------------------------------- writing


def write_synced(path: Path, content: bytes) -> None:
    """`content` under `path`, all of it or what was there before, even if the power fails; `sync_folder` makes the new
    name itself last. A link under that name makes way, what it leads to stays."""
    staging, handle = _staged(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def _staged(path: Path) -> tuple[Path, int]:
    """A file beside `path` that did not exist, and its handle."""
    while True:
        staging = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            return staging, os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAIN, 0o666)
        except FileExistsError:
            continue


def check_new_folder(path: Path) -> None:
    """What `new_folder` would refuse, told before the work is done. ValueError: something but an empty folder stands
    under the name, or what it is to lie in is no folder or cannot be written."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link that leads nowhere")
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder")
        if any(path.iterdir()):
            raise ValueError(f"{path} is a folder that is not empty")
    home = next(parent for parent in path.resolve().parents if parent.exists())
    if not home.is_dir():
        raise ValueError(f"{path} cannot be made: {home} is not a folder")
    if not os.access(home, os.W_OK):
        raise ValueError(f"{path} cannot be made: {home} cannot be written")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends: whole, or after an error not at all.

    Raises:
        ValueError: as `check_new_folder`; OSError: the name was taken meanwhile, or the system's own.
    """
    check_new_folder(path)
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        sync_folder(staging)
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the renames themselves durable; not every system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_own(path: Path) -> int:
    """A handle, for reading and writing, of a file that only we write, made where it is not there.

    Raises:
        ValueError: under that name is a link, a file with a second name, or no regular file: writing to it would write
            elsewhere.
    """
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(os.lstat(path).st_mode))}, not a regular file")
    except FileNotFoundError:
        pass
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
    try:
        found = os.fstat(handle)
        _check_regular(found, path, MOST_JSON)
        if found.st_nlink > 1:
            raise ValueError(f"{path} has {found.st_nlink} names: writing to it would write elsewhere")
    except BaseException:
        os.close(handle)
        raise
    return handle
