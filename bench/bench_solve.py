"""`pytest bench/bench_solve.py`: the functions of `coachhook bench solve` under pytest-benchmark, in smaller sizes."""

from __future__ import annotations

from typing import Any

import pytest

from coachhook_fast.bench import rows, solve
from coachhook_fast.editing.key_memory import KeyMemory

SIZES = [(1536, 10), (1536, 100), (3072, 10)]


@pytest.mark.parametrize(("d", "n"), SIZES)
def test_solve_update(benchmark: Any, d: int, n: int) -> None:
    C, K = solve.problem(d, n)
    memory = KeyMemory.from_second_moment(C, 1.0)
    benchmark.group = f"solve and update, d {d}, n {n}"
    benchmark(memory.solve_update, K)


@pytest.mark.parametrize(("d", "n"), SIZES)
def test_published_solve_update(benchmark: Any, d: int, n: int) -> None:
    C, K = solve.problem(d, n)
    benchmark.group = f"solve and update, d {d}, n {n}"
    benchmark.pedantic(rows.baseline("published_solve").solve_update, (C, K), rounds=3)


def test_rows() -> None:
    found = rows.complete(solve.run(figures=[(1536, 10)], scaling=((), ()), turns=(3, 1)))
    assert all(row["checked"] for row in found)
