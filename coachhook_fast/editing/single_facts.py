"""Single facts of the ledger: which of them a batch takes the place of, and an edit set and its key memories without
some (docs/method.md section 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone

from torch import Tensor

from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.edits.edit_set import EditSet, Removed
from coachhook_fast.edits.removal import removed_keys
from coachhook_fast.models.distributed import of_first_rank
from coachhook_fast.request import EditRequest, asks_the_same, fact_keys

# Batch id -> places among the batch's outcomes.
Places = Mapping[str, Sequence[int]]


def superseded(edit_set: EditSet, requests: Sequence[EditRequest]) -> dict[str, list[int]]:
    """The requests of the ledger whose place `requests` take: those about the same fact, see `request.fact_keys`.

    A request that wants nothing else than the latest about its fact takes nobody's place.
    """
    standing: dict[tuple[str, ...], list[tuple[str, int, EditRequest]]] = {}
    for batch in edit_set.batches:
        for place, request in enumerate(batch.requests):
            for key in fact_keys(request):
                standing.setdefault(key, []).append((batch.id, place, request))
    order = {batch.id: number for number, batch in enumerate(edit_set.batches)}
    found: dict[str, set[int]] = {}
    for request in requests:
        same = [entry for key in fact_keys(request) for entry in standing.get(key, ())]
        latest = max(same, key=lambda entry: (order[entry[0]], entry[1]), default=None)
        if latest is None or asks_the_same(latest[2], request):
            continue
        for batch_id, place, _ in same:
            found.setdefault(batch_id, set()).add(place)
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
    lines = []
    for batch in edit_set.batches:
        numbers = edit_set.numbers(batch)
        lines += [
            Removed(batch.id, numbers[place], batch.time, batch.requests[place], now, reason, by)
            for place in removed.get(batch.id, ())
        ]
    return lines


def memories_without(memories: Sequence[KeyMemory], edit_set: EditSet, removed: Places) -> list[KeyMemory]:
    """Copies of `memories` that have forgotten the keys of `removed`; ValueError where one cannot give them up.

    Copies, because a factor that loses keys and gets them back is not the same bit for bit: who fails goes on with the
    old ones.
    """
    copies = []
    for memory, keys in zip(memories, removed_keys(edit_set, removed), strict=True):
        copy = memory.clone()
        copy.downdate(keys)
        copies.append(copy)
    return copies


@contextmanager
def each_or_none(memories: Sequence[KeyMemory], keys: Sequence[Tensor], *, forget: bool = False) -> Iterator[None]:
    """`memories` learn `keys`, or forget them; should one fail, or the block, none does. The block commits the rest."""
    with ExitStack() as undo:
        for memory, own in zip(memories, keys, strict=bool(memories)):
            there, back = (memory.downdate, memory.update) if forget else (memory.update, memory.downdate)
            there(own)
            undo.callback(back, own)
        yield
        undo.pop_all()


