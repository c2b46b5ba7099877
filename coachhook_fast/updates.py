"""Steps 2 and 3 of a batch: every edited layer takes its share of what is left, then thresholds follow.

METHOD.md section 2. Nothing here is committed: the caller holds the old edit set and the key memories stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.delta import LowRankDelta
from coachhook_fast.edit_set import EditSet, LayerUpdate
from coachhook_fast.forward import PartialModel
from coachhook_fast.gate import Threshold
from coachhook_fast.hooks import Hooks
from coachhook_fast.keys import KeyCollector
from coachhook_fast.memory import KeyMemory
from coachhook_fast.post_norm import through_norm
from coachhook_fast.request import TokenisedRequest, TokenRow
from coachhook_fast.thresholds import reachable_alphas

Observer = Callable[..., None]

# A residual below so many roundings of its value (at most 1 %, in half precision) is noise: a fact that the model held
# already asks for no change.
_ROUNDINGS = 64
_LARGEST_NOISE = 0.01


@dataclass(frozen=True)
class Updated:
    """What the steps found.

    Attributes:
        edits: the edit set with new deltas and thresholds, not yet with the batch.
        layers: each layer's update.
        strengths: s [L, n].
    """

    edits: EditSet
    layers: tuple[LayerUpdate, ...]
    strengths: Tensor


def update_layers(
    partial: PartialModel,
    hooks: Hooks,
    memories: Sequence[KeyMemory],
    edits: EditSet,
    batch: Sequence[TokenisedRequest],
    values: Tensor,
    threshold: Callable[[int, LowRankDelta, Tensor], Threshold],
    *,
    namesakes: Sequence[TokenRow],
    pad_id: int,
    tell: Observer,
) -> Updated:
    """Step 2, layer by layer, with keys and outputs read anew at each; leaves the result published in `hooks`.

    Args:
        values: V [m, n], for the output of the last layer whose turn it is; the layers whose turn it is not learn the
            batch's keys (in `LayerUpdate.keys`) and change nothing.
        namesakes: texts that the edits should pass by (see namesakes.py).
        threshold: (position, new delta, keys [d, N] of all edits) -> the layer's threshold with it.
        tell: observer, see `Editor.edit`.
    """
    config, count, turn = edits.config, len(edits.layers), edits.turn
    limits: dict[str, Any] = {"pad_id": pad_id, "max_tokens": config.max_batch_tokens}
    last, whole = edits.layers[turn[-1]], config.gate == "sequence"
    collector = KeyCollector.of_requests(partial, edits.layers, batch, last=last, whole_prompts=whole, **limits)
    others = KeyCollector(partial, edits.layers, namesakes, each=1, last=None, **limits)
    rounding = torch.finfo(next(partial.model.parameters()).dtype).eps
    noise = min(_ROUNDINGS * rounding, _LARGEST_NOISE) * values.norm(dim=0)
    updates, strengths = [], []
    for position, layer in enumerate(edits.layers):
        # Temporary hooks on the layers not yet updated, validated ones on those that are.
        hooks.set_modes(["always" if p in turn and p >= position else "gated" for p in range(count)])
        readings = collector.read(position)
        K = readings.keys.to(torch.float64)
        N = others.read(position).keys.to(K) if namesakes and position in turn else K[:, :0]
        X, s = (found[..., : K.shape[1]] for found in memories[position].solve(torch.cat([K, N], dim=1)))
        strengths.append(s)
        old = edits.deltas[position]
        if position not in turn:
            nothing = old.B.new_zeros(old.out_features, 0), old.B.new_zeros(old.in_features, 0)
            updates.append(LayerUpdate(K, nothing[0], nothing[1]))
            continue
        assert readings.outputs is not None
        R = (values - readings.outputs.to(values)) / sum(p >= position for p in turn)
        R = torch.where(R.norm(dim=0) > noise, R, 0.0)
        if readings.before_norm is not None:
            norm = partial.layout.post_norm(partial.model, layer)
            assert norm is not None
            R = through_norm(norm, readings.before_norm, R)
        tell("update", layer, K=K, R=R, X=X, s=s, N=N)
        update = LayerUpdate(K, R.to(old.dtype), X.to(old.dtype))
        delta = old.append(update.residuals, update.directions)
        own = torch.cat([edits.own_keys(position).to(K), K], dim=1) if edits.batches else K
        edits = edits.with_layer(position, delta, threshold(position, delta, own))
        hooks.publish(edits)
        updates.append(update)
    hooks.enable()
    return Updated(edits, tuple(updates), torch.stack(strengths))


def lower_alphas(partial: PartialModel, hooks: Hooks, updated: Updated, batch: Sequence[TokenisedRequest]) -> Updated:
    """Step 3 of the `sequence` gate: α <- min(α, what the batch's own texts reach)."""
    bounds = reachable_alphas(partial, hooks, updated.edits, batch)
    lowered = [Threshold(min(old.value, new)) for old, new in zip(updated.edits.thresholds, bounds, strict=True)]
    layers = tuple(replace(update, alpha=alpha) for update, alpha in zip(updated.layers, bounds, strict=True))
    return replace(updated, edits=updated.edits.with_thresholds(lowered), layers=layers)
