"""The ranks of a torchrun, for the steps that share work out."""

from __future__ import annotations

import torch.distributed as dist


def ranks() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
