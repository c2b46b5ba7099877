"""Steps 2 and 3 of a batch: every edited layer takes its share of what is left, then thresholds follow.

docs/method.md section 2. Nothing here is committed: the caller holds the old edit set, and the key memories stay as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.editing.calibration import reachable_alphas
from coachhook_fast.editing.interfering_keys import interfering_keys
from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.keys import KeyCollector
from coachhook_fast.editing.schedule import Assignment
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import EditSet, LayerUpdate
from coachhook_fast.edits.removal import whitened_by
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.models.post_norm import through_norm
from coachhook_fast.request import TokenisedRequest, TokenRow

Observer = Callable[..., None]

# A residual below so many roundings of its value (at most 1 %, in half precision) is noise: a fact that the model held
# already asks for no change.
_ROUNDINGS = 64
_LARGEST_NOISE = 0.01


# How much longer than asked for an update is made, at most, so that it goes in whole.
_LARGEST_GAIN = 3.0

_NO_REQUESTS = Assignment((), -1, ())


@dataclass(frozen=True)
class BatchUpdate:
    """What the steps found.

    Attributes:
        edits: the edit set with new deltas and thresholds, not yet with the batch.
        layers: each layer's update.
        leverages: s [L, n].
    """

    edits: EditSet
    layers: tuple[LayerUpdate, ...]
    leverages: Tensor


def update_layers(
    partial: PartialModel,
    hooks: Hooks,
    memories: Sequence[KeyMemory],
    edits: EditSet,
    batch: Sequence[TokenisedRequest],
    assignments: Sequence[Assignment],
    values: Tensor,
    threshold: Callable[[int, LowRankDelta, Tensor], Threshold],
    *,
    moments: Mapping[int, Tensor],
    hard_negatives: Sequence[TokenRow],
    pad_id: int,
    tell: Observer,
) -> BatchUpdate:
    """Step 2, layer by layer, with keys and outputs read anew at each; leaves the result published in `hooks`.

    Args:
        assignments: which requests edit which layers. The other layers learn a request's keys, with
            `other_layers_weight` (in `LayerUpdate.keys`, behind those of their own requests), and change nothing.
        values: V [m, n], each for the output of the last layer that its request edits.
        hard_negatives: texts that the edits should pass by (see hard_negatives.py).
        moments: E[k kᵀ] [d, d] of each edited layer.
        threshold: (position, new delta, keys [d, N] of all edits) -> τ of `calibrated` with it; the `sequence` gate's α
            stands until `lower_alphas`.
        tell: observer, see `Editor.edit`.
    """
    config, count = edits.config, len(edits.layers)
    limits: dict[str, Any] = {"pad_id": pad_id, "max_tokens": config.pass_tokens}
    whole = config.gate == "sequence"
    collector = KeyCollector.of_requests(partial, edits.layers, batch, whole_prompts=whole, **limits)
    assert config.other_layers_weight is not None  # resolved when the set was made
    others = KeyCollector(partial, edits.layers, hard_negatives, each=1, **limits)
    rounding = torch.finfo(next(partial.model.parameters()).dtype).eps
    noise = min(_ROUNDINGS * rounding, _LARGEST_NOISE) * values.norm(dim=0)
    updates, leverages = [], []
    for position, layer in enumerate(edits.layers):
        assignment = next((part for part in assignments if position in part.positions), _NO_REQUESTS)
        own = list(assignment.requests)
        order = own + [index for index in range(len(batch)) if index not in assignment.requests]
        # Temporary hooks on the layers not yet updated, validated ones on those that are.
        hooks.force_modes(["always" if p in assignment.positions and p >= position else "gated" for p in range(count)])
        readings = collector.read(position, last=assignment.last if own else None)
        weights = torch.ones(len(batch), dtype=torch.float64, device=partial.device)
        weights[len(own) :] = config.other_layers_weight
        K = readings.keys.to(weights)[:, order] * weights.sqrt()
        N = others.read(position).keys.to(K) if hard_negatives and own else K[:, :0]
        X, s = memories[position].solve(torch.cat([K, N], dim=1))
        mine = K[:, : len(own)]
        near = interfering_keys(edits, position, mine, X[:, : len(own)], K[:, len(own) :]) if own else N
        if near.shape[1]:
            N = torch.cat([N, near], dim=1)
            X, _ = memories[position].solve(torch.cat([K, N], dim=1))
        X, s = X[:, : len(own)], s[: len(batch)] / weights
        leverages.append(torch.empty_like(s).index_copy(0, torch.tensor(order, device=s.device), s))
        old = edits.deltas[position]
        if not own:
            nothing = old.B.new_zeros(old.out_features, 0), old.B.new_zeros(old.in_features, 0)
            update = LayerUpdate(K, nothing[0], nothing[1], requests=tuple(order))
            updates.append(replace(update, spread=nothing[1]) if config.threshold_whitened else update)
            continue
        assert readings.outputs is not None
        R = (values - readings.outputs.to(values)) / sum(p >= position for p in assignment.positions)
        R = torch.where(R.norm(dim=0) > noise, R, 0.0)[:, own]
        if readings.before_norm is not None:
            norm = partial.layout.post_norm(partial.model, layer)
            assert norm is not None
            R = through_norm(norm, readings.before_norm[:, own], R)
        R = R / partial.gain
        if config.specific:
            X = _in_full(mine, X)
        tell("update", layer, K=K, R=R, X=X, s=s, N=N)
        update = LayerUpdate(K, R.to(old.dtype), X.to(old.dtype), requests=tuple(order))
        delta = old.append(update.residuals, update.directions)
        if config.threshold_whitened:
            moment = moments[layer]
            update = replace(update, spread=(moment @ X.to(moment)).to(update.directions))
            delta = whitened_by(delta, [*(batch.layers[position] for batch in edits.batches), update])
        mine = update.changed_keys
        mine = torch.cat([edits.edit_keys(position).to(K), mine], dim=1) if edits.batches else mine
        standing = edits.thresholds[position]
        edits = edits.with_layer(position, delta, standing if whole else threshold(position, delta, mine))
        hooks.publish(edits)
        updates.append(update)
    hooks.force_modes(["gated"] * count)
    return BatchUpdate(edits, tuple(updates), torch.stack(leverages))


def _in_full(K: Tensor, X: Tensor) -> Tensor:
    """X (Kᵀ X)⁻¹: with these directions Δ gives the edit keys R itself, where the ridge of C leaves them s / (1 + s) of
    it. A direction of which less than one in `_LARGEST_GAIN` would go in is scaled by that at most.

    The inverse is taken into X, which mixes the batch's keys anyway, and not into R: each request keeps its own
    residual, so that nothing of it is left in the others' when it is removed.
    """
    values, vectors = torch.linalg.eigh(((K.T @ X.to(K)) + (X.to(K).T @ K)) / 2)
    gains = values.clamp(min=1 / _LARGEST_GAIN).reciprocal()
    return X @ ((vectors * gains) @ vectors.T).to(X)


def lower_alphas(
    partial: PartialModel, hooks: Hooks, updated: BatchUpdate, batch: Sequence[TokenisedRequest]
) -> BatchUpdate:
    """Step 3 of the `sequence` gate: α <- min(α, what the batch's own texts reach).

    What each request reaches is noted too, so that one can be removed without the others: at the α that all have
    agreed on, for the layers above see what those below let through.
    """
    bounds = reachable_alphas(partial, hooks, updated.edits, batch)
    lowered = [Threshold(min(old.value, new)) for old, new in zip(updated.edits.thresholds, bounds, strict=True)]
    edits = updated.edits.with_thresholds(lowered)
    each = [bounds] if len(batch) == 1 else [reachable_alphas(partial, hooks, edits, [tokens]) for tokens in batch]
    layers = tuple(
        replace(update, alpha=alpha, alphas=tuple(alphas))
        for update, alpha, alphas in zip(updated.layers, bounds, zip(*each, strict=True), strict=True)
    )
    return replace(updated, edits=edits, layers=layers)
