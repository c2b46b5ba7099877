"""A second model over the same weights, which one thread edits while others run the first."""

from __future__ import annotations

import copy

from torch import nn

from coachhook_fast.hooks.hooks import ATTRIBUTE

_SHARED = "_coachhook_shared_weights"


def shared_weight_copy(model: nn.Module) -> nn.Module:
    """A second model over the same parameters and buffers: edit the one while other threads run the other.

    An editor runs its model in parts, with temporary hooks, which passes of other threads must not meet. No weight is
    copied.

    Raises:
        ValueError: the model has hooks; take the copy first.
    """
    if hasattr(model, ATTRIBUTE):
        raise ValueError("model has hooks already: take its shared-weight copy before installing any")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, memo=dict(shared))
    setattr(other, _SHARED, True)
    return other


def shares_weights(model: nn.Module) -> bool:
    """Whether other threads may run a model of the same weights meanwhile."""
    return hasattr(model, _SHARED)
