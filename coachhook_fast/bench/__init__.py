"""`coachhook bench NAME`: each benchmark is a function that returns its rows (`coachhook_fast.bench.rows`)."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

_MODULES = {
    "gated-linear": "gated_linear",
    "serving": "serving",
    "solve": "solve",
    "statistics": "statistics",
    "targets": "targets",
}


def _benchmark(module: str) -> Callable[..., list[dict[str, Any]]]:
    def run(**options: Any) -> list[dict[str, Any]]:
        from coachhook_fast.bench.rows import complete, machine

        benchmark = importlib.import_module(f"coachhook_fast.bench.{module}").run
        unknown = sorted(set(options) - set(inspect.signature(benchmark).parameters))
        if unknown:
            raise ValueError(f"this benchmark takes no {', '.join(unknown)}")
        machine()  # before the run: a commit made meanwhile is not what was timed
        return complete(benchmark(**options))

    return run


BENCHMARKS = {
    name: _benchmark(module)
    for name, module in _MODULES.items()
    if importlib.util.find_spec(f"coachhook_fast.bench.{module}") is not None
}
