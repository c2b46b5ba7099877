"""Timing on a GPU: captured graphs, replayed in turns, and what the GPU can do at most.

A call that is timed alone is Python and launches at a few tokens. A graph of many calls has neither.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def captured(calls: Sequence[Call], rounds: int) -> tuple[Call, list[Any]]:
    """(replay, outputs): a CUDA graph of all calls, one after the other, `rounds` times, and what they return.

    Every replay writes the same outputs, whose memory is the graph's as long as they live.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(side):  # kernels are compiled and workspaces made outside the capture
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call() for _ in range(rounds) for call in calls]
    return graph.replay, outputs


def replayed(replays: Sequence[Call], turns: int) -> list[list[float]]:
    """Seconds of each, in turns that begin with another one each, on the GPU's own clock.

    All are queued at once, so that no replay waits for the host.
    """
    for replay in replays:
        replay()
    taken: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in replays]
    for turn in range(turns):
        for position in range(len(replays)):
            index = (turn + position) % len(replays)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            replays[index]()
            end.record()
            taken[index].append((begin, end))
    torch.cuda.synchronize()
    return [[begin.elapsed_time(end) / 1e3 for begin, end in pairs] for pairs in taken]


@functools.cache
def rates(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (read and written), and flops a second of a large product in `dtype`."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    size = 8192 if dtype.itemsize == 2 else 4096
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    copy, product = replayed([functools.partial(target.copy_, source), functools.partial(_product, a, b)], 7)
    return 2.0 * source.nbytes / statistics.median(copy), 2.0 * size**3 / statistics.median(product)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
