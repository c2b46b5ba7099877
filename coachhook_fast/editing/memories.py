"""The key memories of all edited layers together: made from statistics and a ledger, and changed all or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from coachhook_fast.editing.key_memory import KeyMemory
from coachhook_fast.editing.single_facts import Places
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.edits.removal import removed_keys
from coachhook_fast.statistics.key_statistics import KeyStatistics


def memories_of(edit_set: EditSet, statistics: KeyStatistics, device: torch.device) -> list[KeyMemory]:
    """C = λ E[k kᵀ] + Σ K Kᵀ over the ledger, of each edited layer; ValueError where the statistics are of too little
    text for an inverse."""
    weight = edit_set.config.mom2_update_weight
    assert weight is not None  # resolved when the set was made
    memories = []
    for position, layer in enumerate(edit_set.layers):
        try:
            memory = KeyMemory.from_second_moment(statistics.moments[layer], weight, device=device)
        except ValueError as error:
            raise ValueError(
                f"key statistics of layer {layer}, taken from {statistics.tokens} tokens (text of many more tokens "
                f"than a key has numbers, {edit_set.deltas[position].in_features}, is needed): {error}"
            ) from None
        for batch in edit_set.batches:
            memory.update(batch.layers[position].keys)
        memories.append(memory)
    return memories


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
    """`memories` learn `keys`, or forget them; should one fail, or the block, none does. No memories: nothing to do."""
    with ExitStack() as undo:
        for memory, own in zip(memories, keys, strict=bool(memories)):
            there, back = (memory.downdate, memory.update) if forget else (memory.update, memory.downdate)
            there(own)
            undo.callback(back, own)
        yield
        undo.pop_all()
