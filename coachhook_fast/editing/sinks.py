"""Requests whose subject stands at the model's attention sink.

A model without a beginning-of-text token parks its attention on the first token of a text: the hidden state there is
several times longer than elsewhere and says next to nothing of the token, and the keys of all first tokens are nearly
one (cosine .94 to .999 in SmolLM2's layers 4 to 8). An edit at that key would change the beginning of every text, and
the mean of it and of ordinary keys is a key that no text has. So a row whose subject ends there is replaced by another
row of its request: the edit holds wherever something precedes the subject (docs/notes/sinks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coachhook_fast.editing.keys import outputs_at
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.request import TokenisedRequest

# A lookup state this many times longer than the shortest of its request stands at a sink: ordinary ones differ by less
# than 1.5, sinks are 2.3 to 7 times as long (SmolLM2).
SINK_RATIO = 2.0


def away_from_sinks(
    partial: PartialModel, last: int, batch: Sequence[TokenisedRequest], *, pad_id: int, max_tokens: int
) -> list[TokenisedRequest]:
    """The batch with every row at a sink replaced by the request's first row that is not; run in the base model.

    A request of one row, or with all rows alike, stays as it is.
    """
    each = len(batch[0].rows)
    rows = [row for tokens in batch for row in tokens.rows]
    outputs = outputs_at(partial, last, rows, pad_id=pad_id, max_tokens=max_tokens)
    lengths = outputs.float().norm(dim=0).view(len(batch), each)
    moved = []
    for tokens, at_sink in zip(batch, (lengths > SINK_RATIO * lengths.amin(1, keepdim=True)).tolist(), strict=True):
        ordinary = tokens.rows[at_sink.index(False)]
        kept = tuple(ordinary if sink else row for row, sink in zip(tokens.rows, at_sink, strict=True))
        moved.append(replace(tokens, rows=kept, in_context_only=at_sink[-1]))
    return moved
