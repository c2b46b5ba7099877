"""The rows of `coachhook bench gated-linear` on a GPU.

Rows against the plain projection are of replays of CUDA graphs ("timing": "graph") of several layers, whose weights
together exceed any L2, so that they come from memory as in a model. The published hook asks the host which tokens are
gated and cannot be captured: rows against it are of chains of plain calls on both sides ("timing": "eager"). What is
checked is what the timed graph wrote.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coachhook_fast.bench import decode_step, graphs
from coachhook_fast.bench import gated_problem as problem
from coachhook_fast.bench import rows as common
from coachhook_fast.bench.gated_decisions import two_stage_rows
from coachhook_fast.bench.gated_memory import memory_rows
from coachhook_fast.hooks.gate import SequenceContext
from coachhook_fast.hooks.layer import HookLinear
from coachhook_fast.ops.reference.gated_linear import sequence_gate

TOKENS = (1, 8, 64, 128, 512, 2048, 8192)
RELATIVE_TOKENS = (1, 8, 128, 2048)
LAYER_BYTES = 200e6  # of a graph's layers together: several times an H200's L2
GRAPH_SECONDS = 1e-3  # that a replay takes at least, beside which its launch does not show
TURNS = 21
EAGER_TURNS = 7
EAGER_CALLS = 10  # in a chain of few tokens, which ends with the one synchronisation of ours


@dataclass
class Case:
    """Layers and the tokens of each, of which `gated` a layer take the edit."""

    work: str
    shape: str
    rank: int | str
    gated: int
    hooks: list[HookLinear]
    inputs: list[Tensor]  # [..., d]
    twins: list[Any] = field(default_factory=list)  # published hooks; none: no rows against them

    @property
    def tokens(self) -> int:
        return self.inputs[0].shape[:-1].numel()


def layers(
    shape: str, rank: int | str, dtype: torch.dtype, device: str, count: int | None = None, gate: str = "calibrated"
) -> list[HookLinear]:
    """Hooks with weights and deltas of their own, as many as `LAYER_BYTES` asks for, at least two."""
    torch.manual_seed(0)
    m, d = problem.SHAPES[shape]
    hooks = []
    for _ in range(count or max(2, math.ceil(LAYER_BYTES / (m * d * dtype.itemsize)))):
        hook = HookLinear(nn.Linear(d, m, dtype=dtype, device=device).requires_grad_(False), gate=gate)
        delta = problem.random_delta(m, d, rank, dtype, device)
        hook.set_delta(delta, problem.ordinary_limit(delta))
        hooks.append(hook)
    return hooks


def cases(
    shape: str, rank: int | str, tokens: Sequence[int], dtype: torch.dtype, device: str, count: int | None = None
) -> Iterator[Case]:
    """2 % of the tokens gated; at rank 100 also none and 10 % (at least one), and tau relative to the key's length."""
    hooks = layers(shape, rank, dtype, device, count)
    d = hooks[0].in_features
    published = common.baseline("published_hook").PublishedHook
    twins = [published(hook.weight, hook.bias, hook.get_delta_weight(), 2.2) for hook in hooks]

    def make_keys(length: int) -> list[Tensor]:
        return [problem.keys(length, d, torch.float32, device) for _ in hooks]

    for length in tokens:
        shares = {round(problem.SHARE * length), *((0, max(1, round(0.1 * length))) if rank == 100 else ())}
        for gated in sorted(shares):
            inputs = [
                problem.place(hook.delta, x, hook.threshold, gated).to(dtype)
                for hook, x in zip(hooks, make_keys(length), strict=True)
            ]
            yield Case("gated projection", shape, rank, gated, hooks, inputs, twins)
        if rank == 100 and length in RELATIVE_TOKENS:
            inputs = [x.to(dtype) for x in make_keys(length)]
            others = [HookLinear(hook.base) for hook in hooks]
            for other, hook, x in zip(others, hooks, inputs, strict=True):
                tau = problem.relative_limit(hook.delta, x.float())
                other.set_delta(hook.delta, tau, relative=True)
            yield Case("gated projection, relative", shape, rank, 0, others, inputs, twins)


class _Running:
    """A `StateStore` that gives every sequence the same past and keeps nothing."""

    def __init__(self, states: Tensor) -> None:
        self._states = states

    def load(self, index: int) -> Tensor:
        return self._states

    def store(self, index: int, states: Tensor) -> None:
        pass


def sequence_cases(dtype: torch.dtype, device: str, shape: str = "gpt-j", count: int | None = None) -> Iterator[Case]:
    """The `sequence` gate: one prompt of 2 048 tokens, and one new token of each of 8 sequences."""
    hooks = layers(shape, 100, dtype, device, count, gate="sequence")
    deltas, d = [hook.delta for hook in hooks], hooks[0].in_features
    for sequences, length in ((1, 2048), (8, 1)):
        inputs, gated = [], max(1, round(problem.SHARE * sequences * length))
        for hook, delta in zip(hooks, deltas, strict=True):
            x = problem.keys(sequences * length, d, torch.float32, device)
            x = problem.place(delta, x, problem.ordinary_limit(delta), gated).to(dtype)
            norm = delta.norms(x)
            states = None
            if length == 1:
                past = delta.norms(problem.keys(512, d, torch.float32, device))
                moments = (100.0, float(past.mean()), 99.0 * float(past.var()))  # count, mean, M2
                states = torch.tensor(moments, device=device).expand(sequences, 3).contiguous()
            z = sequence_gate(norm.view(sequences, length), norm.new_tensor(0.0), state=states)[1].flatten()
            fire = torch.zeros_like(z, dtype=torch.bool)
            fire[problem.gated_places(sequences * length, gated).to(device)] = True
            hook.set_delta(delta, float(z[fire].min() + z[~fire].max()) / 2)
            hook.context = None if states is None else _context(states)
            inputs.append(x.view(sequences, length, d))
        work = f"gated projection, sequence gate, {sequences} of {length} tokens"
        yield Case(work, shape, 100, gated, hooks, inputs)


def _context(states: Tensor) -> SequenceContext:
    context = SequenceContext()
    context.states = _Running(states)
    return context


def case_rows(case: Case) -> Iterator[common.Row]:
    """Ours against the plain projection by graphs, and against the published hook by plain calls."""
    (m, d), dtype = problem.SHAPES[case.shape], case.inputs[0].dtype
    delta, tokens, count = case.hooks[0].delta, case.tokens, len(case.hooks)
    plain_floor, floor = problem.floor_seconds(m, d, delta, tokens, case.gated, graphs.rates(dtype))
    rounds = max(1, math.ceil(GRAPH_SECONDS / (count * plain_floor)))
    pairs = list(zip(case.hooks, case.inputs, strict=True))
    ours = [functools.partial(hook, x) for hook, x in pairs]
    plain = [functools.partial(hook.base, x) for hook, x in pairs]
    with torch.inference_mode():
        ours_replay, outputs = graphs.captured(ours, rounds)
        plain_replay, _ = graphs.captured(plain, rounds)
        timings = graphs.replayed([ours_replay, plain_replay], TURNS)
        right = all(problem.checked(*pair, case.gated, out) for pair, out in zip(pairs, outputs, strict=False))
    row = functools.partial(_row, case, checked=right, floor=floor, plain_floor=plain_floor)
    yield row("plain projection", *timings, calls=count * rounds, timing="graph")
    del outputs, ours_replay, plain_replay
    if case.twins:
        repeats = math.ceil(EAGER_CALLS / count) if tokens <= 512 else 1
        theirs = [functools.partial(twin, x[None]) for twin, x in zip(case.twins, case.inputs, strict=True)]
        chains = [functools.partial(_chain, calls * repeats) for calls in (ours, theirs)]
        with torch.inference_mode():
            for chain in chains:
                chain()
            timings = common.in_turns(chains, EAGER_TURNS)
        yield row("published hook", *timings, calls=count * repeats, timing="eager")


def _chain(calls: Sequence[graphs.Call]) -> None:
    for call in calls:
        call()


def _row(
    case: Case,
    name: str,
    ours: list[float],
    theirs: list[float],
    *,
    calls: int,
    timing: str,
    checked: bool,
    floor: float,
    plain_floor: float,
) -> common.Row:
    hook, tokens = case.hooks[0], case.tokens
    sketch = hook.served.state.sketch
    return common.row(
        f"{case.work}, rank {case.rank}, {case.gated} of {tokens} tokens gated",
        name,
        [seconds / calls for seconds in ours],
        [seconds / calls for seconds in theirs],
        floor_seconds=floor,
        checked=checked,
        dtype=case.inputs[0].dtype,
        shape=f"{case.shape} {hook.out_features}x{hook.in_features}",
        timing=timing,
        cost=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        floor_cost=problem.floor_cost(hook.out_features, hook.in_features, hook.delta, case.gated / tokens),
        plain_floor_seconds=plain_floor,
        layers=len(case.hooks),
        rank=case.rank,
        tokens=tokens,
        gated_share=case.gated / tokens,
        sketch_rows=0 if sketch is None else sketch.shape[0],
    )


Cases = Callable[..., Iterator[Case]]


def _all_cases(shapes: Sequence[str], ranks: Sequence[int | str], tokens: Sequence[int]) -> dict[str, Cases]:
    """By name, what takes (device, count) and gives the cases; rank 100, of which most is asked, first."""
    bf16 = torch.bfloat16
    found: dict[str, Cases] = {}
    for rank, shape in itertools.product(sorted(ranks, key=lambda rank: rank != 100), shapes):
        found[f"{shape}, rank {rank}"] = functools.partial(cases, shape, rank, tokens, bf16)
    found["sequence gate"] = functools.partial(sequence_cases, bf16)
    for dtype in (torch.float16, torch.float32):
        found[str(dtype)] = functools.partial(cases, "gpt-j", 100, (1, 128, 2048), dtype)
    return found


def parts(
    shapes: Sequence[str] = tuple(problem.SHAPES),
    ranks: Sequence[int | str] = (10, 100, 1000, "full"),
    tokens: Sequence[int] = TOKENS,
    decisions: int = 1_000_000,
) -> dict[str, Callable[[], Iterator[common.Row]]]:
    """By name, in the order they should run: what yields the rows of each part."""

    def rows_of(make: Cases) -> Iterator[common.Row]:
        return (row for case in make("cuda") for row in case_rows(case))

    found: dict[str, Callable[[], Iterator[common.Row]]] = {
        name: functools.partial(rows_of, make) for name, make in _all_cases(shapes, ranks, tokens).items()
    }
    for shape in shapes:
        found[f"memory, {shape}"] = functools.partial(memory_rows, shape, torch.bfloat16, "cuda", 0.1)
    found["two-stage decisions"] = functools.partial(two_stage_rows, decisions, 65_536, "cuda")
    found["decode step"] = functools.partial(decode_step.step_rows, "cuda")
    found["decode step, graph"] = functools.partial(decode_step.graph_rows, "cuda")
    return found


def compile_ahead(workers: int = 12) -> None:
    """Calls every case once, in several processes, so that Triton's cache on disk holds what the rows will run."""
    names = list(_all_cases(tuple(problem.SHAPES), (10, 100, 1000, "full"), TOKENS))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, names))


def _compile(name: str) -> None:
    make = _all_cases(tuple(problem.SHAPES), (10, 100, 1000, "full"), TOKENS)[name]
    with torch.inference_mode():
        for case in make("cuda", count=1):
            case.hooks[0](case.inputs[0])
    torch.cuda.synchronize()
