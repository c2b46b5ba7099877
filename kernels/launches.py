"""Every launch of a kernel goes through `launch`, so that the launches of a call can be recorded and replayed.

In a plain call of a few hundred tokens the host needs longer for Python and Triton's launcher than the GPU for the
work. But which kernels run, on which grid and with which numbers depends on shapes, strides and dtypes alone, never on
values: one recording serves all calls of a kind, whatever their tensors' addresses (csrc/cuda/replay.h).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .machine import capability


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """What the kernels before it wrote is there from here on. The next may be brought in."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


class Place(NamedTuple):
    """Where a pointer points."""

    buffer: int  # index; -1: the null pointer
    offset: int  # bytes from the buffer's first


class Launch(NamedTuple):
    kernel: Any  # the JITFunction
    compiled: Any  # what it compiled to; None in the interpreter
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # those before the constants, tensors and integers
    constants: dict[str, Any]


@dataclass
class Recording:
    """The launches of a call, and its memory."""

    launches: list[Launch] = field(default_factory=list)
    # Kept until the recording ends: no address is given out twice.
    scratch: list[Tensor] = field(default_factory=list)

    def places(self, buffers: Sequence[Tensor | None]) -> list[list[Place | int]] | None:
        """Every launch's arguments by what they point into: ``buffers``, and after them ``scratch``.

        None where an argument points elsewhere: to what an operation that was not recorded has made, such as a copy
        of an input; or where two buffers share memory, so that a pointer could mean either.
        """
        named = [*buffers, *self.scratch]
        starts = [0 if tensor is None else tensor.data_ptr() for tensor in named]
        owners: dict[int, int] = {}
        for index, tensor in enumerate(named):
            if tensor is None or tensor.numel() == 0:
                continue
            first = owners.setdefault(tensor.untyped_storage().data_ptr(), index)
            if first != index < len(buffers):
                return None  # scratch may be handed out as a result, and is a buffer then

        def place(argument: Any) -> Place | int | None:
            if not isinstance(argument, Tensor):
                return int(argument)
            if argument.data_ptr() == 0:
                return Place(-1, 0)
            index = owners.get(argument.untyped_storage().data_ptr())
            if index is None:
                return None
            return Place(index, argument.data_ptr() - starts[index])

        found = [[place(argument) for argument in launch.arguments] for launch in self.launches]
        return None if any(None in row for row in found) else found  # type: ignore[return-value]


_RECORDING: ContextVar[Recording | None] = ContextVar("recording", default=None)


def is_recording() -> bool:
    return _RECORDING.get() is not None


@contextmanager
def recording() -> Iterator[Recording]:
    """Records what is launched, and all `scratch`, in this thread until it ends."""
    token = _RECORDING.set(Recording())
    try:
        yield _RECORDING.get()  # type: ignore[misc]
    finally:
        _RECORDING.reset(token)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, early: bool | None = None, **constants: Any
) -> None:
    """``kernel[grid](*arguments, **constants)``.

    early: of a kernel with `after_previous`: whether it may start while the kernel before it in the stream ends
        (programmatic dependent launch, sm_90 on). That pays where the one does wait for the other and for nothing else.
    """
    if early is not None:
        constants["EARLY"] = early and capability(arguments[0].device) >= 90  # type: ignore[union-attr]
        if constants["EARLY"]:
            constants["launch_pdl"] = True
    compiled = kernel[grid](*arguments, **constants)
    current = _RECORDING.get()
    if current is not None:
        current.launches.append(Launch(kernel, compiled, grid, arguments, constants))


def scratch(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty`` for what the kernels alone write and read: a replay has memory of its own for it."""
    made = torch.empty(shape, dtype=dtype, device=device)
    current = _RECORDING.get()
    if current is not None:
        current.scratch.append(made)
    return made
