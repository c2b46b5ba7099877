"""Versions: what the hooks of one model serve, as one value that is replaced whole.

A forward pass pins the version that is current when it begins, for its own thread, and every hook reads the pinned
one; publishing another is one assignment. So a pass sees one whole version however many threads publish meanwhile, and
no pass waits for an operator. Operators take turns (`turn`): what one of them computes from what is published stands
when it publishes.

Compiled passes do the same (compiled.py): the pin is set before compiled code is entered, so that its guards, its trace
and its inputs read one pinned tuple, and a new version of the same shapes recompiles nothing (see
`HookLinear.reserve`). Where a caller's own compiled function calls the model, its hooks are traced with it and nothing
is pinned: the published tuple is read once, with the graph's inputs, and operators wait while torch compiles.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from coachhook_fast.hooks.compiled import FirstPasses, Traced


class _Served(Protocol):
    @property
    def kind(self) -> Hashable: ...  # what code compiled for it depends on


Entry = TypeVar("Entry", bound=_Served)


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
        self._operators = threading.RLock()
        self._first = FirstPasses()
        self.traced = Traced()

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

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block this thread alone changes what is published; passes go on meanwhile."""
        with self._operators:
            yield

    def change(self, change: Callable[[int, Entry], Entry]) -> None:
        """Publishes `change(position, entry)` of every entry: later passes see all of it, those under way go on with
        what they have."""
        with self.turn():
            changed = tuple(change(position, entry) for position, entry in enumerate(self._published))
            with self.traced.between_compilations():
                self._published = changed

    def replace(self, position: int, change: Callable[[Entry], Entry]) -> None:
        """Publishes the current entries with one of them changed."""
        self.change(lambda other, entry: change(entry) if other == position else entry)

    def pin(self, passes: Callable[[int], int], compiled: bool) -> None:
        """A pass begins in this thread; one within another sees what the outer one sees.

        Args:
            passes: how many passes of the model are under way in a thread, this one included; asked only where some
                seem to be, for a pass that Ctrl-C ended never unpinned.
            compiled: the pass may enter compiled code.
        """
        mine = self._pass
        if mine.depth > 0:
            mine.depth = max(0, passes(threading.get_ident()) - 1)
        if mine.depth == 0:
            mine.entries = self._viewed()
            if compiled:
                self._first.begin(tuple(entry.kind for entry in mine.entries), passes)
        mine.depth += 1

    def unpin(self) -> None:
        """The pass has ended, by an error too."""
        if self._pass.depth > 0:
            self._pass.depth -= 1
        if self._pass.depth == 0:
            self._pass.entries = None
            self._first.end()

    def forget_pass(self) -> None:
        """No pass is under way in this thread, however the last one ended."""
        self._pass.depth, self._pass.entries = 0, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Versions[Entry]:
        return Versions(copy.deepcopy(self._published, memo))

    def __reduce__(self) -> Any:
        return Versions, (self._published,)
