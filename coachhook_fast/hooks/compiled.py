"""What lets compiled passes see whole versions, as eager ones do.

`torch.compile(model)` runs the model's forward hooks before it enters compiled code, but takes each for a function of
its own to compile: within, `torch.compiler.is_dynamo_compiling()` is true, and what it does to a thread is lost.
`eagerly` keeps torch from compiling such a hook alone. A caller's compiled function that calls the model still traces
the hook, with the model, in its place. (`torch.compiler.is_compiling()` tells neither: it is true in every thread while
one compiles.)
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

Function = TypeVar("Function", bound=Callable[..., object])
_MOST_KNOWN = 1_000


def eagerly(function: Function) -> Function:
    """`function`, which torch.compile runs as it is, with what it calls, wherever it does not trace its caller too."""
    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))
    return function


def eagerly_alone(function: Function) -> Function:
    """`function` as by `eagerly`, but what it calls may be compiled, so that `get_eval_frame_callback` tells it whether
    it is within a compiled call."""
    set_code_exec_strategy(function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT))
    return function


class Traced:
    """Whether a caller's compiled function has traced a model's hooks: then no pass pins what it reads."""

    def __init__(self) -> None:
        self.was = False

    @contextmanager
    def between_compilations(self) -> Iterator[None]:
        """Where it has, no code is compiled in another thread within the block, which waits until that has ended: a
        trace reads what it traces again and again, and so do the guards that are made after it."""
        compiler = sys.modules.get("torch._dynamo.convert_frame") if self.was else None
        with nullcontext() if compiler is None else compiler.compile_lock:
            yield


@torch._dynamo.assume_constant_result
def tell_traced(traced: Traced) -> None:
    """Called in code that is traced, this runs while the trace is made, and not again."""
    traced.was = True


class FirstPasses:
    """Compiled passes that meet something new go one at a time: threads that miss compiled code together would each
    compile it, and soon more often than torch allows for one function."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[Hashable] = set()
        self._going: dict[Hashable, int] = {}  # what is new, and the thread that goes first

    def begin(self, kind: Hashable, passes: Callable[[int], int]) -> None:
        """Waits while another thread's pass is the first of its kind.

        Args:
            passes: how many passes are under way in a thread; of a thread that Ctrl-C stopped, none ends.
        """
        while kind not in self._known:
            with self._lock:
                first = self._going.get(kind)
                if first is None or first == threading.get_ident() or passes(first) == 0:
                    self._going[kind] = threading.get_ident()
                    return
            time.sleep(0.01)

    def end(self) -> None:
        """This thread's pass has ended."""
        if not self._going:
            return
        with self._lock:
            for kind in [kind for kind, thread in self._going.items() if thread == threading.get_ident()]:
                del self._going[kind]
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known.add(kind)
