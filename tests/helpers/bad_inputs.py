"""What tests/corpus asks of every bad input: one clear error, exit code 2, at once, and nothing changed."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coachhook_fast.cli import main
from coachhook_fast.printable import printable

SECONDS = 5
MEGABYTES = 300
_ASIDE = ("loading ", "coachhook: warning: ", "batch ")


def assert_refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """The error of a command whose input lies in `folder`."""
    before, memory, started = contents(folder), peak(), time.monotonic()
    capsys.readouterr()
    with at_once():
        try:
            code: Any = main(arguments)
        except SystemExit as end:  # argparse leaves this way
            code = end.code
    captured = capsys.readouterr()
    assert time.monotonic() - started < SECONDS
    assert code == 2, captured
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith(_ASIDE)]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith(f"coachhook {arguments[0]}: error: ")
    assert lines[0] == printable(lines[0])
    assert contents(folder) == before
    assert peak() - memory < MEGABYTES
    return lines[0]


@contextmanager
def at_once() -> Iterator[None]:
    """TimeoutError in what waits for longer than SECONDS."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak() -> float:
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def contents(folder: Path) -> dict[str, str]:
    """What every file of the folder is and holds."""
    return {str(path): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(found.st_mode) or found.st_size > 1 << 24:
        return f"{found.st_mode} {found.st_size}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
