"""Second moments as the published code takes them: a pass a layer, documents in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.models.passes.forward import PartialModel


@torch.no_grad()
def second_moments(
    partial: PartialModel, sequences: Sequence[Sequence[int]], layers: Sequence[int], *, rows: int, pad_id: int
) -> dict[int, Tensor]:
    """layer -> E[k kᵀ] [d, d] over all tokens, in batches of `rows` sequences, each pass up to its layer."""
    moments: dict[int, Any] = {}
    for layer in layers:
        total: Any = 0.0
        count = 0
        for start in range(0, len(sequences), rows):
            batch = sequences[start : start + rows]
            width = max(map(len, batch))
            ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
            _, recorded = partial.run({"input_ids": ids, "attention_mask": mask}, until=layer, keys=[layer])
            keys = recorded.keys[layer][mask.bool()]
            total = total + keys.T @ keys
            count += keys.shape[0]
        moments[layer] = total / count
    return moments
