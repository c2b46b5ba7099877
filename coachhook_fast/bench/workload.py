"""What the editing benchmarks work on: SmolLM2, CounterFact records where the data folder is there, WikiText keys."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from coachhook_fast.products import linear
from coachhook_fast.request import EditRequest

_ROOT = Path(__file__).resolve().parents[2]


def data_folder() -> Path | None:
    """$COACHHOOK_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("COACHHOOK_DATA") or _ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def requests(count: int) -> tuple[list[EditRequest], str]:
    """`count` requests and where they come from: CounterFact, else the demo's own facts."""
    from coachhook_fast.datasets import read_records

    folder = data_folder()
    path = folder / "counterfact-edit.json" if folder else _ROOT / "examples" / "facts.jsonl"
    return [record.request for record in read_records(path)[:count]], path.name


def corpus() -> Any:
    """WikiText where it is there, else None (the model's own text)."""
    folder = data_folder()
    return folder / "wikitext2-test.raw" if folder else None


def gemm_rate(rows: int = 1024, inner: int = 576, columns: int = 1536) -> float:
    """Measured flops a second of an fp32 product of a block's shape, by what the editor's passes use: the rate of the
    floor.

    Machines are noisy: of several moments, the one with the highest rate says what the machine can do.
    """
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    taken = []
    for _ in range(12):
        begin = time.perf_counter()
        linear(a, b)
        taken.append(time.perf_counter() - begin)
    return 2.0 * rows * inner * columns / sorted(taken)[3]
