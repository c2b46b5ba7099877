"""The base projection, overlapped with the delta's kernels: on a stream of its own, where that pays.

Neither needs the other before the correction: of few tokens the delta's launches vanish behind the base, of very many
its product runs on what the last tiles of the base leave idle. Figures: docs/experiments/gated-linear-gpu-choices.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Tokens up to which it pays, up to which with at most so many elements of a weight, and from which on it does again
# (measured; between these both sides want all of the GPU, and it costs up to a tenth).
_FEW, _SOME, _SMALL, _MANY = 64, 256, 1 << 24, 2048
# Outside of a CUDA graph the base must take longer than the host needs for another stream: elements of a weight with
# few tokens, multiply-adds with many.
_LARGE, _LONG = 1 << 25, 1 << 37


def _is_worth_it(tokens: int, elements: int) -> bool:
    if torch.cuda.is_current_stream_capturing():
        return tokens <= (_SOME if elements <= _SMALL else _FEW) or tokens >= _MANY
    return tokens * elements >= _LONG or (tokens <= _FEW and elements >= _LARGE)


@functools.cache
def _side(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The side stream of the stream with that id: first in line for multiprocessors, since it has the most to do."""
    return torch.cuda.Stream(device, priority=-1)


class Base:
    """A base projection under way.

    Attributes:
        out: [tokens, m]; not to be touched before `join`.
        is_overlapped: whether another stream computes it.
    """

    def __init__(self, out: Tensor, side: torch.cuda.Stream | None = None) -> None:
        self.out = out
        self.is_overlapped = side is not None
        self._side = side

    def join(self) -> None:
        """What the current stream does from now on comes after the base."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)
            self._side = None


@contextmanager
def overlapped_base(
    x: Tensor,  # [tokens, d]
    weight: Tensor,  # [m, d], any strides
    bias: Tensor | None,  # [m]
    always: bool = False,
) -> Iterator[Base]:
    """``x weight^T + bias``, joined at the latest at the end; overlapped where that pays, or ``always``."""
    if not always and not (x.is_cuda and _is_worth_it(x.shape[0], weight.numel())):
        yield Base(torch.nn.functional.linear(x, weight, bias))
        return
    # All memory is the current stream's, so that nothing is given away while the side stream still writes it.
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    current = torch.cuda.current_stream(x.device)
    side = _side(x.device, current.stream_id)
    side.wait_stream(current)
    base = Base(out, side)
    try:  # from here on: a graph under way refuses to end with a stream that was not joined
        with torch.cuda.stream(side):
            if bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias, x, weight.T, out=out)
        yield base
    finally:
        base.join()
