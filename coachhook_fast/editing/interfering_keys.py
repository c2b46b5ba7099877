"""Interfering keys: keys of edits that other layers made, and that a new edit would answer to.

A layer learns those keys with a small weight (`EditConfig.other_layers_weight`), so that many leave room for new ones.
The few that a new edit would answer to all the same are shown to the solve in full, as hard negatives are, and like
them not remembered (docs/experiments/interfering-keys.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook_fast.edits.edit_set import EditSet

# Interfering keys are answered to with more than this share of an edit key's answer; so many are shown at most.
_SHARE = 0.2
_MOST = 64

# From here on it is the same subject, edited anew: to pass it by would be to pass the new edit by.
_SAME = 0.9


def interfering_keys(edits: EditSet, position: int, K: Tensor, X: Tensor, batch: Tensor) -> Tensor:
    """[d, h] keys that an update by `X` would answer to, the nearest first.

    Args:
        position: the edited layer's.
        K: [d, n] edit keys; X: [d, n], (C + K Kᵀ)⁻¹ K.
        batch: [d, b] keys of the batch's other requests, as the layer learns them.
    """
    learnt = [update.keys[:, update.residuals.shape[1] :] for update in (b.layers[position] for b in edits.batches)]
    others = [keys.to(K) for keys in (*learnt, batch) if keys.shape[1]]
    if not others:
        return K[:, :0]
    assert edits.config.other_layers_weight is not None  # resolved when the set was made
    root = edits.config.other_layers_weight**0.5  # what a learnt key is scaled with

    def answers(keys: Tensor, scale: float) -> Tensor:
        """[n, keys], in proportion to the keys' lengths where τ is."""
        return (X.T @ keys).abs() / (keys.norm(dim=0) if edits.config.threshold_relative else scale)

    own = answers(K, 1.0).diagonal()[:, None]
    shares = [(answers(keys, root) / own).amax(dim=0) for keys in others]
    near = [(share > _SHARE) & (share < _SAME) for share in shares]
    kept = torch.cat([keys[:, these] for keys, these in zip(others, near, strict=True)], dim=1)
    nearest = torch.cat([share[these] for share, these in zip(shares, near, strict=True)])
    return kept[:, nearest.topk(min(_MOST, nearest.numel())).indices] / root
