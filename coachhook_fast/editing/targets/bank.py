"""The bank's states in the cache: to read its wordings takes as long as some edits, and is the same for every edit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coachhook_fast.models.caches import cache_tensors, cached_tensors
from coachhook_fast.models.distributed import ranks
from coachhook_fast.models.loading import cache_dir


def cached_states(
    model_id: str, rows: Sequence[Sequence[int]], blocks: Sequence[int], read: Callable[[], Tensor]
) -> Tensor:
    """What `read()` gives, fp32, from the cache where the same model has read the same tokens before.

    Under torchrun nothing is taken from it: ranks that read and ranks that do not would wait for one another.

    Args:
        model_id: fingerprint; rows: token ids of each text; blocks: those whose states are read.
    """
    if ranks()[1] > 1:
        return read()
    described = json.dumps([model_id, list(map(list, rows)), list(blocks)])
    path = cache_dir() / "wordings" / f"{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"
    found = cached_tensors(path, "states").get("states")
    if found is None or found.dtype != torch.float32 or not bool(found.isfinite().all()):
        found = read()
        cache_tensors(path, {"states": found.contiguous()})
    return found
