"""EditSet: all edits of a model as one immutable value.

An editor makes a new one with every batch and publishes it whole; a batch that fails leaves the old one in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.request import EditRequest

# An edit that a layer answers with less than this share of its batch's longest answer changes nothing there.
_UNCHANGED = 0.05


@dataclass(frozen=True)
class LayerUpdate:
    """What one batch did to one layer: Δ += R Xᵀ, C += K Kᵀ.

    Attributes:
        keys: K [d, n]; residuals: R [m, n]; directions: X [d, n]. R and X have no columns where it was not the layer's
            turn: it only learned the keys.
        alpha: the batch's own bound on α (`sequence`): min over requests of max over tokens of z; inf otherwise.
        spread: E[k kᵀ] X [d, n], what ordinary text makes of the directions; under `threshold_whitened` only.
        requests: the request, by its place in the batch, of each column of K; those of R and X come first. None in edit
            sets of earlier versions.
        alphas: the bound on α of each request of the batch, the least of which is `alpha`; () where nobody noted them.
    """

    keys: Tensor
    residuals: Tensor
    directions: Tensor
    alpha: float = float("inf")
    spread: Tensor | None = None
    requests: tuple[int, ...] | None = None
    alphas: tuple[float, ...] = ()

    @property
    def changed_keys(self) -> Tensor:
        """K [d, N] of the requests that the layer answers anew: what the model said already asks for no change, and
        its key need not pass the gate."""
        own = self.keys[:, : self.residuals.shape[1]]
        answers = (self.residuals @ (self.directions.T @ own.to(self.directions))).norm(dim=0)
        if answers.numel() == 0:
            return own
        return own[:, (answers > _UNCHANGED * answers.max()).to(own.device)]

    def columns(self, count: int) -> tuple[int, ...] | None:
        """`requests` in a batch of `count`; where they were not noted, what is certain without: a layer that all
        requests edit, or none, has them in the batch's order. None where that is not so."""
        if self.requests is not None:
            return self.requests
        whole = self.keys.shape[1] == count and self.residuals.shape[1] in (0, count)
        return tuple(range(count)) if whole else None


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
        outcomes: of its requests, less those that were removed since (`EditSet.numbers` tells which are left).
        layers: what it did to each edited layer; thresholds: each layer's threshold after it, () where something in it
            or before it has been taken out since.
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


REASONS = ("removed", "rolled back", "superseded")


@dataclass(frozen=True)
class Removed:
    """What the ledger keeps of a request that was taken out again.

    Attributes:
        batch: id of the batch that it came with; index: its number there, counted from 0 as the batch was made; edited:
            when that was.
        time: when it was taken out; reason: one of REASONS.
        by: id of the batch in which an edit of the same fact took its place, "" where none did.
    """

    batch: str
    index: int
    edited: str
    request: EditRequest
    time: str
    reason: str
    by: str = ""


@dataclass(frozen=True)
class EditSet:
    """All edits of one base model.

    Attributes:
        model: fingerprint of the base model.
        config: the settings, with `layers` and `mom2_update_weight` resolved.
        contexts: texts that the model wrote, prefixes of every request's prompt.
        deltas, thresholds: one a layer of `config.layers`.
        batches: the ledger, oldest first.
        base: what the base model's parameters were like (models/identity.py), to name what another has otherwise; empty
            in sets of earlier versions.
        statistics: run of the key statistics that the latest batch was made with, "" where it has no name.
        removed: requests that were taken out of the ledger again, in the order in which that was done.
        seen: what a folder held (`store.state_of`) when one of this set's line was last read from it or written to it;
            one mapping for all sets that are made from another by `replace`.
    """

    model: str
    config: EditConfig
    contexts: tuple[str, ...]
    deltas: tuple[LowRankDelta, ...]
    thresholds: tuple[Threshold, ...]
    batches: tuple[Batch, ...] = ()
    statistics: str = ""
    removed: tuple[Removed, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict, repr=False)
    seen: dict[str, tuple[Any, ...]] = field(default_factory=dict, compare=False, repr=False)

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

    def with_removed(self, removed: Sequence[Removed]) -> EditSet:
        return replace(self, removed=(*self.removed, *removed))

    def check_updates(self) -> None:
        """ValueError where the batches came without their updates, which serving needs not (`store.load`)."""
        if any(not batch.layers for batch in self.batches):
            raise ValueError("the edit set was loaded for serving, without its batches' updates: read it by store.load")

    def edit_keys(self, position: int) -> Tensor:
        """K [d, N] of the edits that changed edited layer number `position`, oldest first: what the model said already
        has no residual, and does not count. ValueError where there are no batches at all, or the set was loaded for
        serving."""
        if not self.batches:
            raise ValueError("an edit set without batches has no keys")
        self.check_updates()
        updates = [batch.layers[position] for batch in self.batches]
        device = self.deltas[position].device  # batches that were loaded lie on the CPU
        return torch.cat([update.changed_keys.to(device) for update in updates], dim=1)

    def find(self, batch_id: str) -> Batch:
        """The batch called `batch_id`; ValueError with the known ids where there is none."""
        for batch in self.batches:
            if batch.id == batch_id:
                return batch
        known = [batch.id for batch in self.batches]
        raise ValueError(f"batch_id {batch_id!r} is not in the ledger, which holds {known}")

    def numbers(self, batch: Batch) -> tuple[int, ...]:
        """The number of each outcome of `batch`, counted from 0 as the batch was made: others keep theirs where a
        request was removed."""
        gone = {removed.index for removed in self.removed if removed.batch == batch.id}
        return tuple(number for number in range(len(batch.outcomes) + len(gone)) if number not in gone)

    def place_of(self, batch_id: str, index: int) -> int:
        """Where in its batch's outcomes the request number `index` of the batch stands (see `numbers`).

        Raises:
            TypeError: `index` is no integer.
            ValueError: no such batch, or no such request in it any more; the message says what there is.
        """
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"index must be an integer, got {index!r}")
        gone = next((one for one in self.removed if (one.batch, one.index) == (batch_id, index)), None)
        if gone is not None:
            how = f"{gone.reason} by batch {gone.by!r}" if gone.by else gone.reason
            raise ValueError(f"request {index} of batch {batch_id!r} is not there any more: {how} at {gone.time}")
        numbers = self.numbers(self.find(batch_id))
        if index not in numbers:
            raise ValueError(f"batch {batch_id!r} has no request {index}: it has {list(numbers)}")
        return numbers.index(index)


def _replaced(values: tuple[Any, ...], position: int, value: Any) -> tuple[Any, ...]:
    return (*values[:position], value, *values[position + 1 :])
