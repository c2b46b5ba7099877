"""Memory of the gated projection: bytes that a hook layer adds, and the peak of a forward pass."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from coachhook_fast.bench import rows as common
from coachhook_fast.bench.gated_problem import SHAPES, floor_cost, keys, random_delta, unchanged
from coachhook_fast.hooks.layer import HookLinear

EDITS = (100, 1000, 10_000)


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator (or the GPU's) held during `work`, above what it held before."""
    if torch.cuda.is_available():
        gc.collect()  # or what was garbage before is given back meanwhile
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def memory_rows(
    shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 1.0
) -> Iterator[common.Row]:
    """Bytes that a hook layer adds against the published twin's, and a forward pass's peak."""
    torch.manual_seed(0)
    m, d = SHAPES[shape]
    base = nn.Linear(d, m, dtype=dtype, device=device).requires_grad_(False)
    x = keys(512, d, dtype, device)
    for edits in EDITS:
        dense = min(edits, m) * (m + d) >= m * d
        delta = random_delta(m, d, "full" if dense else edits, dtype, device)
        hook = HookLinear(base)
        hook.set_delta(delta, 1e9)
        state = hook.served.state
        added = delta.nbytes + (0 if state.sketch is None else state.sketch.nbytes)
        twin = common.baseline("published_hook").PublishedHook(base.weight, base.bias, delta.dense(), 2.2)
        forwards = [functools.partial(hook, x), functools.partial(twin, x[None])]
        with torch.inference_mode():
            for work in forwards:
                work()  # what a first call makes and keeps (workspaces, compiled kernels) is no peak of a forward
            ours, theirs, plain = (peak_bytes(work) for work in (*forwards, functools.partial(base, x)))
            taken, twin_taken = common.timed(forwards, seconds)
            right = unchanged(hook(x), base(x))
        yield common.row(
            f"memory of a hook layer, {edits} edits; a forward of {x.shape[0]} tokens",
            "published hook",
            taken,
            twin_taken,
            floor_seconds=statistics.median(twin_taken) * floor_cost(m, d, delta, 0.0) / 2.0,
            checked=right,
            dtype=dtype,
            shape=f"{shape} {m}x{d}",
            timing="eager",
            edits=edits,
            added_bytes=added,
            twin_bytes=base.weight.nbytes,
            added_share_of_twin=added / base.weight.nbytes,
            peak_forward_bytes=ours,
            published_peak_forward_bytes=theirs,
            plain_peak_forward_bytes=plain,
        )
