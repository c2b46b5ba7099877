"""EditSet: all edits of a model as one immutable value.

An editor makes a new one with every batch and publishes it whole; a batch that fails leaves the old one in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.edits.whitening import whitened
from coachhook_fast.request import EditRequest


@dataclass(frozen=True)
class LayerUpdate:
    """What one batch did to one layer: Δ += R Xᵀ, C += K Kᵀ.

    Attributes:
        keys: K [d, n]; residuals: R [m, n]; directions: X [d, n]. R and X have no columns where it was not the layer's
            turn: it only learned the keys.
        alpha: the batch's own bound on α (`sequence`): min over requests of max over tokens of z; inf otherwise.
        spread: E[k kᵀ] X [d, n], what ordinary text makes of the directions; under `threshold_whitened` only.
    """

    keys: Tensor
    residuals: Tensor
    directions: Tensor
    alpha: float = float("inf")
    spread: Tensor | None = None


@dataclass(frozen=True)
class EditOutcome:
    """How one request went in.

    Attributes:
        loss: last loss of its target value; steps: Adam steps taken.
        leverage: s = kᵀ C⁻¹ k a layer; the layer takes the share s / (1 + s) of its residual (METHOD section 6).
        residual_left: ||V - final output|| / ||V - first output||; 0 where the edit went in whole, 1 where nothing did.
        in_context_only: the subject opens the prompt at the model's attention sink: the edit holds behind other text
            only, and that is where `residual_left` was measured (see editing/sinks.py).
        said: whether the model, asked greedily in the bare prompt right after the batch, said the target; answer: what
            it said, up to the first token that is not the target's; said_paraphrases: the share of its paraphrases,
            given and found, that gave the target. None in edit sets of earlier versions.
    """

    request: EditRequest
    loss: float
    steps: int
    leverage: tuple[float, ...]
    residual_left: float
    in_context_only: bool = False
    said: bool | None = None
    answer: str = ""
    said_paraphrases: float | None = None


@dataclass(frozen=True)
class Batch:
    """A ledger line: one committed batch.

    Attributes:
        layers: what it did to each edited layer; thresholds: each layer's threshold after it, () where an earlier batch
            has been rolled back since.
    """

    id: str
    time: str
    outcomes: tuple[EditOutcome, ...]
    seconds: float
    layers: tuple[LayerUpdate, ...]
    thresholds: tuple[Threshold, ...]
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        return tuple(outcome.request for outcome in self.outcomes)


@dataclass(frozen=True)
class EditSet:
    """All edits of one base model.

    Attributes:
        model: fingerprint of the base model.
        config: the settings, with `layers` and `mom2_update_weight` resolved.
        contexts: texts that the model wrote, prefixes of every request's prompt.
        deltas, thresholds: one a layer of `config.layers`.
        batches: the ledger, oldest first.
        statistics: run of the key statistics that the latest batch was made with, "" where it has no name.
        seen: ids of the batches in a folder when one of this set's line was last read from it or written to it; one
            mapping for all sets that are made from another by `replace`.
    """

    model: str
    config: EditConfig
    contexts: tuple[str, ...]
    deltas: tuple[LowRankDelta, ...]
    thresholds: tuple[Threshold, ...]
    batches: tuple[Batch, ...] = ()
    statistics: str = ""
    seen: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        assert self.config.layers is not None  # resolved when the set was made
        return self.config.layers

    @property
    def round_robin_order(self) -> list[tuple[int, ...]]:
        """Groups of positions that are edited together (`EditConfig.round_robin`), the next to be edited first: those
        that hold the fewest edits, so that a rollback or a large batch is made up for; of several the ones in the
        middle, so that few edits stand where keys separate best."""
        groups, count = self.config.round_robin, len(self.layers)
        assert groups is not None  # resolved when the set was made

        def rank(group: tuple[int, ...]) -> tuple[int, float]:
            held = sum(batch.layers[group[0]].residuals.shape[1] for batch in self.batches)
            return held, abs(sum(group) / len(group) - (count - 1) / 2)

        return sorted((tuple(range(start, count, groups)) for start in range(groups)), key=rank)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All facts edited so far, oldest first."""
        return tuple(request for batch in self.batches for request in batch.requests)

    @property
    def num_edits(self) -> int:
        return sum(len(batch.outcomes) for batch in self.batches)

    def with_layer(self, position: int, delta: LowRankDelta, threshold: Threshold) -> EditSet:
        """This set with one layer's delta and threshold replaced."""
        return replace(
            self,
            deltas=_replaced(self.deltas, position, delta),
            thresholds=_replaced(self.thresholds, position, threshold),
        )

    def with_thresholds(self, thresholds: Sequence[Threshold]) -> EditSet:
        return replace(self, thresholds=tuple(thresholds))

    def with_batch(self, batch: Batch) -> EditSet:
        return replace(self, batches=(*self.batches, batch))

    def check_updates(self) -> None:
        """ValueError where the batches came without their updates, which serving needs not (`store.load`)."""
        if any(not batch.layers for batch in self.batches):
            raise ValueError("the edit set was loaded for serving, without its batches' updates: read it by store.load")

    def edit_keys(self, position: int) -> Tensor:
        """K [d, N] of all edits made in edited layer number `position`, oldest first; ValueError where there are no
        batches at all, or the set was loaded for serving."""
        if not self.batches:
            raise ValueError("an edit set without batches has no keys")
        self.check_updates()
        updates = [batch.layers[position] for batch in self.batches]
        device = self.deltas[position].device  # batches that were loaded lie on the CPU
        return torch.cat([update.keys[:, : update.residuals.shape[1]].to(device) for update in updates], dim=1)

    def find(self, batch_id: str) -> Batch:
        """The batch called `batch_id`; ValueError with the known ids where there is none."""
        for batch in self.batches:
            if batch.id == batch_id:
                return batch
        known = [batch.id for batch in self.batches]
        raise ValueError(f"batch_id {batch_id!r} is not in the ledger, which holds {known}")


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


def without(edit_set: EditSet, batch_id: str, calibrate: Callable[[int, LowRankDelta, Tensor], Threshold]) -> EditSet:
    """The edit set as if the batch had never been made: Δ replayed from the other batches' updates.

    Args:
        calibrate: (position, delta, keys [d, N]) -> τ, asked only under `calibrated` and where the ledger does not hold
            the answer.

    Raises:
        ValueError: no such batch.
    """
    edit_set.find(batch_id)
    edit_set.check_updates()
    place = [batch.id for batch in edit_set.batches].index(batch_id)
    rest = (*edit_set.batches[:place], *edit_set.batches[place + 1 :])
    known = rest[-1].thresholds if rest and place == len(rest) else ()
    deltas, thresholds = [], []
    for position, delta in enumerate(edit_set.deltas):
        replayed = LowRankDelta.zeros(delta.out_features, delta.in_features, dtype=delta.dtype, device=delta.device)
        for batch in rest:
            replayed = replayed.append(batch.layers[position].residuals, batch.layers[position].directions)
        if edit_set.config.threshold_whitened and rest:
            replayed = whitened_by(replayed, [batch.layers[position] for batch in rest])
        deltas.append(replayed)
        if edit_set.config.gate == "sequence":
            alphas = [batch.layers[position].alpha for batch in rest]
            thresholds.append(Threshold(min([edit_set.config.alpha, *alphas])))
        elif not rest:
            thresholds.append(Threshold(math.inf))
        elif known:
            thresholds.append(known[position])
        else:
            thresholds.append(calibrate(position, replayed, replace(edit_set, batches=rest).edit_keys(position)))
    # The thresholds after later batches were found with the batch among the edits.
    rest = _recalibrated(rest, place, thresholds)
    return replace(edit_set, deltas=tuple(deltas), thresholds=tuple(thresholds), batches=rest)


def recalibrated(edit_set: EditSet, calibrate: Callable[[int, LowRankDelta, Tensor], Threshold]) -> EditSet:
    """The edit set with τ of every layer found anew, as its config wants it now; `calibrate` as for `without`."""
    thresholds = [calibrate(at, delta, edit_set.edit_keys(at)) for at, delta in enumerate(edit_set.deltas)]
    batches = _recalibrated(edit_set.batches, 0, thresholds)
    return replace(edit_set, thresholds=tuple(thresholds), batches=batches)


def _recalibrated(batches: Sequence[Batch], place: int, thresholds: Sequence[Threshold]) -> tuple[Batch, ...]:
    """`batches`, of which those from `place` on no longer know what τ was after them; after the last it is this."""
    known = [*batches[:place], *(replace(batch, thresholds=()) for batch in batches[place:])]
    return (*known[:-1], *(replace(batch, thresholds=tuple(thresholds)) for batch in known[-1:]))


def _replaced(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])
