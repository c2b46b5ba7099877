"""The GPU's benchmarks as far as they go without one: cases, checks and rows, with plain calls in place of graphs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from coachhook_fast.bench import decode_step, gated_linear_gpu, gated_problem, graphs, rows
from coachhook_fast.bench.gated_decisions import two_stage_rows
from coachhook_fast.bench.gated_memory import memory_rows

BF16 = torch.bfloat16
TINY_MODEL = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small shape, plain calls in place of graphs, and rates that ask for one round."""

    def captured(calls: Sequence[Callable[[], Any]], rounds: int) -> tuple[Callable[[], None], list[Any]]:
        outputs = [call() for _ in range(rounds) for call in calls]
        return functools.partial(gated_linear_gpu._chain, calls), outputs

    monkeypatch.setattr(gated_problem, "SHAPES", {"gpt-j": (256, 640)})
    monkeypatch.setattr("coachhook_fast.bench.gated_memory.SHAPES", {"gpt-j": (256, 640)})
    monkeypatch.setattr(gated_linear_gpu, "TURNS", 3)
    monkeypatch.setattr(gated_linear_gpu, "EAGER_TURNS", 2)
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "replayed", rows.in_turns)
    monkeypatch.setattr(graphs, "rates", lambda dtype: (1e6, 1e6))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [10, 100, "full"])
def test_cases_are_answered_right(rank: int | str) -> None:
    cases = list(gated_linear_gpu.cases("gpt-j", 12 if rank == 10 else rank, (1, 8, 600), BF16, "cpu", count=2))
    found = rows.complete(row for case in cases for row in gated_linear_gpu.case_rows(case))
    assert all(row["checked"] for row in found)
    assert {row["timing"] for row in found} == {"graph", "eager"}
    gated = {(case.work, case.tokens): case.gated for case in cases}
    if rank == 100:
        assert gated == {
            ("gated projection", 1): 1,
            ("gated projection", 8): 1,
            ("gated projection", 600): 60,
            ("gated projection, relative", 1): 0,
            ("gated projection, relative", 8): 0,
        }
    else:
        assert gated == {("gated projection", tokens): round(0.02 * tokens) for tokens in (1, 8, 600)}


def test_sequence_cases_are_answered_right() -> None:
    found = [
        row
        for case in gated_linear_gpu.sequence_cases(torch.float32, "cpu", count=2)
        for row in gated_linear_gpu.case_rows(case)
    ]
    assert [row["tokens"] for row in found] == [2048, 8]
    assert all(row["checked"] and row["gated_share"] > 0 for row in found)


@pytest.mark.parametrize("wrong", ["nothing corrected", "all corrected", "one entry"])
def test_a_wrong_answer_is_seen(wrong: str) -> None:
    case = next(gated_linear_gpu.cases("gpt-j", 12, (600,), BF16, "cpu", count=1))
    (hook,), (x,) = case.hooks, case.inputs
    out = hook(x)
    if wrong == "one entry":
        out[5, 7] += 1.0
    else:
        out = hook.base(x) if wrong == "nothing corrected" else hook._always(x, hook.served.state)
    assert not gated_problem.checked(hook, x, case.gated, out)


def test_floor_counts_bytes_at_one_token_and_arithmetic_at_many() -> None:
    delta = gated_problem.random_delta(256, 640, 12, BF16)
    floors = functools.partial(gated_problem.floor_seconds, 256, 640, delta)
    plain, ours = floors(1, 0, (1e9, 1e12))
    assert plain == pytest.approx(2 * (256 * 640 + 640 + 256) / 1e9)
    assert ours == pytest.approx(plain + 2 * 12 * 640 / 1e9)
    plain, ours = floors(100_000, 0, (1e12, 1e9))
    assert plain == pytest.approx(2 * 100_000 * 256 * 640 / 1e9)
    assert ours == pytest.approx(plain * (1 + 12 / 256))


def test_parts_name_every_shape_rank_and_benchmark_once() -> None:
    found = gated_linear_gpu.parts(shapes=("gpt2-xl", "gpt-j"), ranks=(10, 100))
    assert list(found)[:3] == ["gpt2-xl, rank 100", "gpt-j, rank 100", "gpt2-xl, rank 10"]
    assert {"sequence gate", "torch.float16", "memory, gpt-j", "two-stage decisions", "decode step"} <= set(found)


def test_memory_and_decisions() -> None:
    found = rows.complete(itertools.chain(memory_rows("gpt-j", BF16, seconds=0.01), two_stage_rows(4000, 2000)))
    assert all(row["checked"] for row in found)
    assert found[0]["added_share_of_twin"] > 0
    assert found[-1]["decisions_that_differ"] == 0


@pytest.mark.parametrize("make", [decode_step.step_rows, decode_step.graph_rows])
def test_decode_steps_are_answered_right(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "TURNS", 2)
    monkeypatch.setattr(decode_step, "RANK", 10)
    found = rows.complete(make("cpu", TINY_MODEL))
    assert [row["tokens"] for row in found] == [1, 8]
    assert all(row["checked"] and row["hooks"] > 1 for row in found)
