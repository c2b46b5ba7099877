"""Writers of one folder take turns, and each says who it is: a lock that the system releases when its holder dies."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from coachhook_fast import files

LOCK = ".lock"
PATIENCE = 120.0  # seconds that a writer waits for another
_MOST_WORDS = 500


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One writer at a time, named in the lock's file; systems without flock go without.

    Raises:
        ValueError: the lock is no file of its own, or another writer holds it for longer than PATIENCE; the message
            says who.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / LOCK
    with open(files.open_own(path), "r+b", buffering=0) as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ValueError(f"{path} has been held for {PATIENCE:g} s by {holder(folder)}") from None
                time.sleep(0.01)
        before = file.read(_MOST_WORDS)
        _write(file.fileno(), json.dumps(_ourselves()).encode())
        try:
            yield
        except BaseException:
            _write(file.fileno(), before)  # who refrained is not the one that wrote last
            raise


def holder(folder: Path) -> str:
    """Who holds the lock of `folder`, or held it last, as it said itself."""
    try:
        said = files.parse_json(files.read_text(folder / LOCK, most=_MOST_WORDS, within=folder))
        process, host, since = said["process"], said["host"], said["since"]
        if not isinstance(process, int) or not isinstance(host, str) or not isinstance(since, str):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError):
        return "a process that does not say which"
    return f"process {process} on {host!r} since {since!r}"


def _ourselves() -> dict[str, object]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"process": os.getpid(), "host": platform.node()[:100], "since": since}


def _write(handle: int, content: bytes) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, content, 0)
    except OSError:  # a full disk: the lock holds all the same
        return
