"""Decisions of the two-stage gate on a million tokens against measuring each of them, and the undecided share."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.bench import rows as common
from coachhook_fast.bench.gated_problem import keys, ordinary_limit, random_delta
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.hooks.states import HookState

SHAPE = (576, 1536)  # SmolLM2's, where a million exact norms take seconds


def two_stage_rows(tokens: int = 1_000_000, chunk: int = 4000, device: str = "cpu") -> Iterator[common.Row]:
    torch.manual_seed(0)
    m, d = SHAPE
    delta = random_delta(m, d, "full", torch.float32, device)
    base = nn.Linear(d, m, device=device).requires_grad_(False)
    one, two = HookLinear(base, miss_probability=None), HookLinear(base)
    tau = ordinary_limit(delta)
    for hook in (one, two):
        hook.set_delta(delta, tau)
    sketch = two.served.state.sketch
    assert sketch is not None
    counts = torch.zeros(3, dtype=torch.int64, device=device)  # decisions that differ, fired, undecided
    taken: tuple[list[float], list[float]] = ([], [])
    for start in range(0, tokens, chunk):
        x = keys(min(chunk, tokens - start), d, torch.float32, device)
        out = torch.zeros(x.shape[0], m, device=device)
        decided: list[Tensor] = []
        for index, state in enumerate((one.served.state, two.served.state)):
            taken[index].append(common.once(functools.partial(_decide, state, x, out, decided)))
        undecided = torch.linalg.vector_norm(x @ sketch.T, dim=-1) >= two.threshold
        counts += torch.stack([(decided[0] != decided[1]).sum(), decided[0].sum(), undecided.sum()])
    differ, fired, open_questions = counts.tolist()
    rows = sketch.shape[0] + open_questions / tokens * m
    yield common.row(
        f"two-stage gate, {tokens} tokens by {chunk}",
        "all of B for every token",
        taken[1],
        taken[0],
        floor_seconds=statistics.median(taken[0]) * rows / m,
        checked=differ == 0 and fired > 0,
        dtype=torch.float32,
        shape=f"smollm2 {m}x{d}",
        timing="eager",
        tokens=tokens,
        fired=fired,
        decisions_that_differ=differ,
        undecided_share=open_questions / tokens,
        sketch_rows=sketch.shape[0],
    )


def _decide(state: HookState, x: Tensor, out: Tensor, decided: list[Any]) -> None:
    _, fire, _ = torch.ops.coachhook.gated_delta(out, x, state.U, state.B, state.threshold, state.sketch)
    decided.append(fire)
