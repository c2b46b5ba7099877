"""Edit sets without a model, saved, changed by hand, and read back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from coachhook_fast import EditConfig, EditRequest, EditSet
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditOutcome, LayerUpdate
from coachhook_fast.edits.manifest import MANIFEST, read_manifest
from coachhook_fast.edits.threshold import Threshold

M, D, LAYERS = 24, 45, (1, 2)


def batch_number(number: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(number)

    def matrix(rows: int) -> torch.Tensor:
        return torch.randn(rows, 2, generator=generator, dtype=dtype)

    layers = tuple(LayerUpdate(matrix(D).double(), matrix(M), matrix(D)) for _ in LAYERS)
    outcomes = tuple(
        EditOutcome(EditRequest("{} is", f"Ann {number}", "red"), 0.1, 3, (1.0, 2.0), 0.2) for _ in range(2)
    )
    return Batch(
        f"batch{number:04d}", "2025-01-01T00:00:00+00:00", outcomes, 1.5, layers, (Threshold(1.0 + number),) * 2
    )


def edit_set(batches: int, model: str = "0123456789abcdef", dtype: torch.dtype = torch.float32) -> EditSet:
    config = EditConfig(layers=LAYERS, mom2_update_weight=10.0)
    deltas = [LowRankDelta.zeros(M, D, dtype=dtype) for _ in LAYERS]
    made = [batch_number(number, dtype) for number in range(batches)]
    for batch in made:
        deltas = [delta.append(up.residuals, up.directions) for delta, up in zip(deltas, batch.layers, strict=True)]
    thresholds = made[-1].thresholds if made else (Threshold(float("inf")),) * 2
    return EditSet(model, config, ("The cat.",), tuple(deltas), tuple(thresholds), tuple(made))


def assert_same(found: EditSet, expected: EditSet) -> None:
    assert (found.model, found.config, found.contexts) == (expected.model, expected.config, expected.contexts)
    assert [batch.id for batch in found.batches] == [batch.id for batch in expected.batches]
    for mine, theirs in zip(found.deltas, expected.deltas, strict=True):
        assert torch.equal(mine.dense(), theirs.dense())
    for mine, theirs in zip(found.batches, expected.batches, strict=True):
        assert mine.outcomes == theirs.outcomes
        for one, other in zip(mine.layers, theirs.layers, strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.residuals, other.residuals)


def change(folder: Path, edit: Any) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def with_tensors(folder: Path, kind: str, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """Exchanges the tensor file of the weights, or of the first batch, and names it in the manifest."""
    content = tensors if isinstance(tensors, bytes) else to_bytes(tensors)
    digest = hashlib.sha256(content).hexdigest()
    entry = {"file": f"{kind}-{digest[:16]}.safetensors", "sha256": digest}
    (folder / entry["file"]).write_bytes(content)
    change(folder, lambda m: m.update(weights=entry) if kind == "weights" else m["batches"][0].update(tensors=entry))


def tensors_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    manifest = read_manifest(folder)
    entry = manifest["weights"] if kind == "weights" else manifest["batches"][0]["tensors"]
    return from_bytes((folder / entry["file"]).read_bytes())
