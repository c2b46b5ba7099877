"""Versions: what the hooks of one model serve, as one value that is replaced whole.

A forward pass pins the version that is current when it begins, for its own thread, and every hook reads the pinned
one; publishing another is one assignment. So a pass sees one whole edit set however many threads publish meanwhile, and
neither side ever waits for the other. Under torch.compile the published tuple is read once, with the graph's inputs,
which pins it too; a new version of the same shapes recompiles nothing (see `HookLinear.reserve`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

Entry = TypeVar("Entry")


class _Pass(threading.local):
    """The pass that runs in this thread: how deeply passes are nested, and the entries they see; and how this thread
    views what is published."""

    def __init__(self) -> None:
        self.depth = 0
        self.entries: Any = None
        self.view: Any = None
        self.view_open = [False]  # by the block itself, which another thread may end


class Versions(Generic[Entry]):
    """An immutable tuple of entries, one a hook."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._published = tuple(entries)
        self._pass = _Pass()
        self._lock = threading.Lock()
        self.switch = threading.Lock()  # held while modes are changed by what they are

    def current(self) -> tuple[Entry, ...]:
        """The entries pinned by this thread's pass, else the published ones."""
        pinned = self._pass.entries
        return self._viewed() if pinned is None else pinned

    def _viewed(self) -> tuple[Entry, ...]:
        return self._pass.view(self._published) if self._pass.view_open[0] else self._published

    @contextmanager
    def viewed(self, view: Callable[[tuple[Entry, ...]], tuple[Entry, ...]]) -> Iterator[None]:
        """Within the block this thread's passes see `view` of what is published; blocks do not nest.

        Raises:
            ValueError: within another such block.
            RuntimeError: at the end, where another thread ends it: passes there saw what is published.
        """
        self.check_not_viewed()
        thread, is_open = threading.get_ident(), [True]
        self._pass.view, self._pass.view_open = view, is_open
        try:
            yield
        finally:
            is_open[0] = False
            if threading.get_ident() != thread:
                raise RuntimeError("a select() block was ended by another thread than the one that began it")
            self._pass.view = None

    def check_not_viewed(self) -> None:
        """ValueError within a `viewed` block of this thread."""
        if self._pass.view_open[0]:
            raise ValueError("this thread has selected edit sets for the rows of its batches: leave select() first")

    def published(self) -> tuple[Entry, ...]:
        return self._published

    def change(self, change: Callable[[int, Entry], Entry]) -> None:
        """Publishes `change(position, entry)` of every entry: later passes see all of it, those under way go on with
        what they have."""
        with self._lock:
            self._published = tuple(change(position, entry) for position, entry in enumerate(self._published))

    def replace(self, position: int, change: Callable[[Entry], Entry]) -> None:
        """Publishes the current entries with one of them changed."""
        self.change(lambda other, entry: change(entry) if other == position else entry)

    def pin(self, outer: Callable[[], int]) -> None:
        """A pass begins in this thread; one within another sees what the outer one sees.

        Args:
            outer: how many passes are under way around this one; asked only where some seem to be, for a pass that
                Ctrl-C ended never unpinned.
        """
        if torch.compiler.is_compiling():
            return
        if self._pass.depth > 0:
            self._pass.depth = max(0, outer())
        if self._pass.depth == 0:
            self._pass.entries = self._viewed()
        self._pass.depth += 1

    def unpin(self) -> None:
        """The pass has ended, by an error too."""
        if torch.compiler.is_compiling():
            return
        if self._pass.depth > 0:
            self._pass.depth -= 1
        if self._pass.depth == 0:
            self._pass.entries = None

    def forget_pass(self) -> None:
        """No pass is under way in this thread, however the last one ended."""
        self._pass.depth, self._pass.entries = 0, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Versions[Entry]:
        return Versions(copy.deepcopy(self._published, memo))

    def __reduce__(self) -> Any:
        return Versions, (self._published,)
