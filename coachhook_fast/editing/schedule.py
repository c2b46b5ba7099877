"""Round-robin over the layers: which of them the requests of a batch edit (`EditConfig.round_robin`,
docs/experiments/round-robin.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.request import TokenisedRequest, by_subject

# A batch is shared out over so many more layers as each then has about so many of its requests: one layer cannot hold
# hundreds, and target values of a few requests at a time would be found more slowly.
_REQUESTS_A_GROUP = 16


@dataclass(frozen=True)
class Assignment:
    """Some layers and the requests of a batch that edit them.

    Attributes:
        positions: places among the edited layers, ascending; last: the last of these blocks.
        requests: places in the batch, ascending.
    """

    positions: tuple[int, ...]
    last: int
    requests: tuple[int, ...]


def assign(edits: EditSet, batch: Sequence[TokenisedRequest]) -> list[Assignment]:
    """The batch shared out in its order over the next groups of layers; requests about one subject stay together."""
    order = edits.round_robin_order
    parts = min(len(order), -(-len(batch) // _REQUESTS_A_GROUP))
    shares: list[list[int]] = [[] for _ in range(parts)]
    done = 0
    for members in by_subject(batch):
        shares[done * parts // len(batch)] += members
        done += len(members)
    return [
        Assignment(positions, edits.layers[positions[-1]], tuple(sorted(requests)))
        for positions, requests in zip(order, shares, strict=False)
        if requests
    ]


def in_batch_order(parts: Sequence[Tensor], assignments: Sequence[Assignment]) -> Tensor:
    """[m, n] with the columns of the assignments' `parts`, each [m, requests], in the batch's order."""
    requests = torch.tensor([request for assignment in assignments for request in assignment.requests])
    whole = torch.cat(list(parts), dim=1)
    return whole[:, requests.argsort().to(whole.device)]
