"""Single facts of the ledger: which of them a batch takes the place of, and what is noted of those that are taken out
(docs/method.md section 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from coachhook_fast.edits.edit_set import EditSet, Removed
from coachhook_fast.models.distributed import of_first_rank
from coachhook_fast.request import EditRequest, asks_the_same, fact_keys

# Batch id -> places among the batch's outcomes.
Places = Mapping[str, Sequence[int]]


def superseded(edit_set: EditSet, requests: Sequence[EditRequest]) -> dict[str, list[int]]:
    """The requests of the ledger whose place `requests` take: those about the same fact, see `request.fact_keys`.

    A request that wants nothing else than the latest about its fact takes nobody's place.
    """
    standing: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # fact -> (batch, place), oldest first
    for number, batch in enumerate(edit_set.batches):
        for place, fact in enumerate(batch.requests):
            for key in fact_keys(fact):
                standing.setdefault(key, []).append((number, place))
    found: dict[str, set[int]] = {}
    for request in requests:
        same = sorted({entry for key in fact_keys(request) for entry in standing.get(key, ())})
        if not same:
            continue
        latest, at = same[-1]
        if asks_the_same(edit_set.batches[latest].requests[at], request):
            continue
        for number, place in same:
            found.setdefault(edit_set.batches[number].id, set()).add(place)
    return {batch_id: sorted(places) for batch_id, places in found.items()}


def left_of(edit_set: EditSet, removed: Places) -> list[EditRequest]:
    """The facts of the ledger without `removed`, oldest first."""
    return [
        request
        for batch in edit_set.batches
        for place, request in enumerate(batch.requests)
        if place not in removed.get(batch.id, ())
    ]


def removals(edit_set: EditSet, removed: Places, reason: str, *, by: str = "") -> list[Removed]:
    """What the ledger is to say of the requests `removed` of `edit_set`, which still has them."""
    now = of_first_rank(datetime.now(timezone.utc).isoformat(timespec="seconds"))
    return [
        Removed(batch.id, edit_set.numbers(batch)[place], batch.time, batch.requests[place], now, reason, by)
        for batch in edit_set.batches
        for place in removed.get(batch.id, ())
    ]
