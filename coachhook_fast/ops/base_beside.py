"""The base projection beside the delta's kernels: on a stream of its own, where there is enough to hide.

Neither needs the other before the correction. cuBLAS seldom fills the GPU to the end (two waves of 128 tiles leave 4
of an H100's 132 multiprocessors idle), and the delta's product is bound by memory where the base is bound by
arithmetic, or short where the base is not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Multiply-adds of a base below which it ends before a second stream has begun.
_ENOUGH = 1 << 28


@functools.cache
def _side(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The side stream of the stream with that id: first in line for multiprocessors, since it has the most to do."""
    return torch.cuda.Stream(device, priority=-1)


class Base:
    """A base projection under way.

    Attributes:
        out: [tokens, m]; not to be touched before `join`.
    """

    def __init__(self, out: Tensor, side: torch.cuda.Stream | None = None) -> None:
        self.out = out
        self._side = side

    def join(self) -> None:
        """What the current stream does from now on comes after the base."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._side = None


@contextmanager
def base_beside(
    x: Tensor,  # [tokens, d]
    weight: Tensor,  # [m, d], any strides
    bias: Tensor | None,  # [m]
) -> Iterator[Base]:
    """``x weight^T + bias``, joined at the latest at the end."""
    if not x.is_cuda or x.shape[0] * weight.numel() < _ENOUGH:
        yield Base(torch.nn.functional.linear(x, weight, bias))
        return
    # All memory is the current stream's, so that nothing is given away while the side stream still writes it.
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    current = torch.cuda.current_stream(x.device)
    side = _side(x.device, current.stream_id)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)
    base = Base(out, side)
    try:
        yield base
    finally:
        base.join()
