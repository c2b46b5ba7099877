"""Taking requests out of an edit set again, one by one or a batch at a time, as if they had never been in.

What that means is stated in docs/method.md section 7: the other requests keep what was found for them, and all that is
made of them is made anew from them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditSet, LayerUpdate
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.edits.whitening import whitened

Calibrate = Callable[[int, LowRankDelta, Tensor], Threshold]


def without_requests(edit_set: EditSet, removed: Mapping[str, Collection[int]], calibrate: Calibrate) -> EditSet:
    """The edit set as if the requests `removed` had never been made.

    Columns of the others in K, R, X and E[kkᵀ]X stay as they are, bit for bit, though they were found while the removed
    ones stood beside or before them. Δ is Σ R Xᵀ over them, built anew where a column of it is gone, and so is its
    metric W. C, which the caller keeps, is to lose the columns that `removed_keys` gives. τ is found anew for layers
    whose Δ is another; α is the least bound of the others. A batch without any request left is out of the ledger: to
    remove all of its requests is to roll it back, bit for bit.

    Args:
        removed: batch id -> places among the batch's outcomes.
        calibrate: (position, delta, keys [d, N]) -> τ, asked only under `calibrated` and where the ledger does not hold
            the answer.

    Raises:
        ValueError: no such batch or place, no place at all, or a batch of an earlier version, which did not note which
            of its requests edit which layer.

    Examples:
        >>> fewer = without_requests(edit_set, {"1f0c2ab3d4e5": [2]}, calibrate)
    """
    edit_set.check_updates()
    removed = {batch_id: _checked(edit_set.find(batch_id), places) for batch_id, places in removed.items()}
    rest: list[Batch] = []
    first, changed = len(edit_set.batches), set()
    for batch in edit_set.batches:
        places = removed.get(batch.id, frozenset())
        if not places:
            rest.append(batch)
            continue
        first = min(first, len(rest))
        changed |= {at for at, update in enumerate(batch.layers) if _owns_any(batch, update, places)}
        if len(places) < len(batch.outcomes):
            rest.append(_reduced(batch, places))
    left = replace(edit_set, batches=tuple(rest))
    known = rest[-1].thresholds if rest and first == len(rest) else ()
    deltas, thresholds = list(edit_set.deltas), list(edit_set.thresholds)
    for at in range(len(deltas)):
        if edit_set.config.gate == "sequence":
            thresholds[at] = Threshold(min([edit_set.config.alpha, *(batch.layers[at].alpha for batch in rest)]))
        if at not in changed:
            continue
        deltas[at] = _replayed(left, at)
        if edit_set.config.gate == "sequence":
            continue
        if not rest:
            thresholds[at] = Threshold(math.inf)
        elif known:
            thresholds[at] = known[at]
        else:
            thresholds[at] = calibrate(at, deltas[at], left.edit_keys(at))
    # The thresholds after later batches were found with the removed requests among the edits.
    batches = _with_thresholds(rest, first, thresholds)
    return replace(edit_set, deltas=tuple(deltas), thresholds=tuple(thresholds), batches=batches)


def without(edit_set: EditSet, batch_id: str, calibrate: Calibrate) -> EditSet:
    """The edit set as if the batch had never been made, see `without_requests`; ValueError where there is none."""
    places = range(len(edit_set.find(batch_id).outcomes))
    return without_requests(edit_set, {batch_id: places}, calibrate)


def removed_keys(edit_set: EditSet, removed: Mapping[str, Collection[int]]) -> list[Tensor]:
    """K [d, n] of each edited layer that C loses with the requests `removed`; arguments and errors as for
    `without_requests`."""
    found: list[list[Tensor]] = [[] for _ in edit_set.layers]
    for batch_id, places in removed.items():
        batch = edit_set.find(batch_id)
        wanted = _checked(batch, places)
        for keys, update in zip(found, batch.layers, strict=True):
            if len(wanted) == len(batch.outcomes):
                keys.append(update.keys)
            else:
                gone = [column for column, request in enumerate(_columns(batch, update)) if request in wanted]
                keys.append(update.keys[:, gone])
    return [torch.cat([one.to(keys[0]) for one in keys], dim=1) for keys in found]


def recalibrated(edit_set: EditSet, calibrate: Calibrate) -> EditSet:
    """The edit set with τ of every layer found anew, as its config wants it now; `calibrate` as for
    `without_requests`."""
    thresholds = [calibrate(at, delta, edit_set.edit_keys(at)) for at, delta in enumerate(edit_set.deltas)]
    batches = _with_thresholds(edit_set.batches, 0, thresholds)
    return replace(edit_set, thresholds=tuple(thresholds), batches=batches)


def whitened_by(delta: LowRankDelta, updates: Sequence[LayerUpdate]) -> LowRankDelta:
    """`delta` measured as `threshold_whitened` wants it; ValueError where an update knows no `spread`.

    Args:
        updates: all that `delta` is the sum of.
    """
    spreads = [update.spread.to(delta.B) for update in updates if update.spread is not None]
    if len(spreads) < len(updates):
        raise ValueError("threshold_whitened is true, but the edit set holds batches that were made without")
    residuals = [update.residuals.to(delta.B) for update in updates]  # batches that were loaded lie on the CPU
    return whitened(delta, torch.cat(residuals, dim=1), torch.cat(spreads, dim=1))


def _checked(batch: Batch, places: Collection[int]) -> frozenset[int]:
    count = len(batch.outcomes)
    wrong = [place for place in places if isinstance(place, bool) or not isinstance(place, int)]
    if wrong or not places or not all(0 <= place < count for place in places):
        raise ValueError(f"places in batch {batch.id!r} must be one or more of 0 to {count - 1}, got {list(places)}")
    return frozenset(places)


def _columns(batch: Batch, update: LayerUpdate) -> tuple[int, ...]:
    found = update.columns(len(batch.outcomes))
    if found is None:
        raise ValueError(
            f"batch {batch.id!r} was made by an earlier version, which did not note which of its "
            f"{len(batch.outcomes)} requests edit which layer: none can be removed alone; roll the whole batch back"
        )
    return found


def _owns_any(batch: Batch, update: LayerUpdate, places: Collection[int]) -> bool:
    """Whether one of the requests at `places` edits the layer of `update`."""
    if len(places) == len(batch.outcomes):
        return update.residuals.shape[1] > 0
    return any(request in places for request in _columns(batch, update)[: update.residuals.shape[1]])


def _reduced(batch: Batch, places: Collection[int]) -> Batch:
    """`batch` without the requests at `places`."""
    kept = [place for place in range(len(batch.outcomes)) if place not in places]
    outcomes = tuple(batch.outcomes[place] for place in kept)
    return replace(batch, outcomes=outcomes, layers=tuple(_cut(batch, update, kept) for update in batch.layers))


def _cut(batch: Batch, update: LayerUpdate, kept: Sequence[int]) -> LayerUpdate:
    """The columns of the requests at the places `kept`, in tensors of their own; those are counted anew."""
    requests = _columns(batch, update)
    columns = [column for column, request in enumerate(requests) if request in kept]
    own = [column for column in columns if column < update.residuals.shape[1]]
    alphas = tuple(update.alphas[place] for place in kept) if update.alphas else ()
    return LayerUpdate(
        keys=update.keys[:, columns],
        residuals=update.residuals[:, own],
        directions=update.directions[:, own],
        alpha=min(alphas) if alphas else update.alpha,
        spread=None if update.spread is None else update.spread[:, own],
        requests=tuple(kept.index(requests[column]) for column in columns),
        alphas=alphas,
    )


def _replayed(edit_set: EditSet, position: int) -> LowRankDelta:
    """Δ of a layer from the ledger alone."""
    old = edit_set.deltas[position]
    delta = LowRankDelta.zeros(old.out_features, old.in_features, dtype=old.dtype, device=old.device)
    updates = [batch.layers[position] for batch in edit_set.batches]
    for update in updates:
        delta = delta.append(update.residuals, update.directions)
    return whitened_by(delta, updates) if edit_set.config.threshold_whitened and updates else delta


def _with_thresholds(batches: Sequence[Batch], place: int, thresholds: Sequence[Threshold]) -> tuple[Batch, ...]:
    """`batches`, of which those from `place` on no longer know what τ was after them; after the last it is this."""
    known = [*batches[:place], *(replace(batch, thresholds=()) for batch in batches[place:])]
    return (*known[:-1], *(replace(batch, thresholds=tuple(thresholds)) for batch in known[-1:]))
