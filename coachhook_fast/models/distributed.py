"""The ranks of a torchrun, for the steps that share work out and for what all must agree on."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from coachhook_fast.models.tensor_parallel import is_tensor_parallel


def ranks() -> tuple[int, int]:
    """(this rank, number of ranks); (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def workers(model: nn.Module) -> tuple[int, int]:
    """`ranks`, as far as each has a whole model to work with; (0, 1) where they share one out."""
    return (0, 1) if is_tensor_parallel(model) else ranks()


def of_first_rank(value: Any) -> Any:
    """`value` as rank 0 has it."""
    if ranks()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def everywhere(true: bool) -> bool:
    """Whether it is true on every rank."""
    count = ranks()[1]
    if count == 1:
        return true
    answers: list[Any] = [None] * count
    dist.all_gather_object(answers, true)
    return all(answers)
