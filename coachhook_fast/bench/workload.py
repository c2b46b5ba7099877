"""What the editing benchmarks work on: SmolLM2, CounterFact records where the data folder is there, WikiText keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coachhook_fast.bench.rows import once
from coachhook_fast.editing.targets.optimise import Target
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.models.passes.products import linear
from coachhook_fast.request import EditRequest, TokenisedRequest

_ROOT = Path(__file__).resolve().parents[2]


def data_folder() -> Path | None:
    """$COACHHOOK_DATA, or shared/data beside the checkout."""
    folder = Path(os.environ.get("COACHHOOK_DATA") or _ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def requests(count: int) -> tuple[list[EditRequest], str]:
    """`count` requests and where they come from: CounterFact, else the demo's own facts."""
    from coachhook_fast.evaluate.datasets import read_records

    folder = data_folder()
    path = folder / "counterfact-edit.json" if folder else _ROOT / "examples" / "facts.jsonl"
    return [record.request for record in read_records(path)[:count]], path.name


def corpus() -> Any:
    """WikiText where it is there, else None (the model's own text)."""
    folder = data_folder()
    return folder / "wikitext2-test.raw" if folder else None


def gemm_rate(
    rows: int = 1024,
    inner: int = 576,
    columns: int = 1536,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """Measured flops a second of a product of a block's shape, by what the editor's passes use: the rate of the floor.

    Machines are noisy: of several moments, the one with the highest rate says what the machine can do.
    """
    a, b = (torch.randn(size, inner, device=device, dtype=dtype) for size in (rows, columns))
    taken = [once(lambda: linear(a, b)) for _ in range(12)]
    return 2.0 * rows * inner * columns / sorted(taken)[3]


def needed_flops(partial: PartialModel, last: int, batch: Sequence[TokenisedRequest], found: Sequence[Target]) -> float:
    """What the target values `found` cannot avoid, over all steps: upper blocks forward and backward for the tokens
    from the lookup position on, the head at predicted positions; and the lower blocks once."""
    size = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in partial.blocks]
    head: Any = partial.model.get_output_embeddings()  # type: ignore[operator]
    total = 0.0
    for tokens, target in zip(batch, found, strict=True):
        upper = sum(len(r.prompt) + len(r.target) - 1 - r.lookup for r in tokens.rows) + 1
        predicted = sum(len(r.target) for r in tokens.rows) + 1
        total += (target.steps + 1) * 4.0 * (upper * sum(size[last + 1 :]) + predicted * head.weight.numel())
        total += 2.0 * sum(len(r.prompt) + len(r.target) for r in tokens.rows) * sum(size)
    return total
