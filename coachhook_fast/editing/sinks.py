"""Requests whose subject stands at the model's attention sink.

A model without a beginning-of-text token parks its attention on the first token of a text: the hidden state there is
several times longer than elsewhere and says next to nothing of the token, and the keys of all first tokens are nearly
one (cosine .94 to .999 in SmolLM2's layers 4 to 8). An edit at that key would change the beginning of every text, and
the mean of it and of ordinary keys is a key that no text has. So a row whose subject ends there is replaced by another
row of its request: the edit holds wherever something precedes the subject (docs/experiments/sinks.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coachhook_fast.editing.keys import outputs_at
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.request import TokenisedRequest, TokenRow

# A lookup state this many times longer than the shortest of its request stands at a sink: ordinary ones differ by less
# than 1.5, sinks are 2.3 to 7 times as long (SmolLM2).
SINK_RATIO = 2.0


def away_from_sinks(
    partial: PartialModel, last: int, batch: Sequence[TokenisedRequest], *, pad_id: int, max_tokens: int
) -> list[TokenisedRequest]:
    """The batch with every context and bare prompt at a sink replaced by the request's first row that is not, and its
    other rows at sinks left out; run in the base model.

    A request of one row, or with all rows alike, stays as it is.
    """
    rows = [row for tokens in batch for row in _all_rows(tokens)]
    lengths = outputs_at(partial, last, rows, pad_id=pad_id, max_tokens=max_tokens).float().norm(dim=0)
    return [
        _moved(tokens, dict(zip(_all_rows(tokens), own.tolist(), strict=True)))
        for tokens, own in zip(batch, lengths.split([len(_all_rows(tokens)) for tokens in batch]), strict=True)
    ]


def _all_rows(tokens: TokenisedRequest) -> tuple[TokenRow, ...]:
    return (*tokens.asking, *tokens.held, *tokens.keep)


def _moved(tokens: TokenisedRequest, lengths: Mapping[TokenRow, float]) -> TokenisedRequest:
    """`tokens`, given the length of each row's state at its lookup."""
    bound = SINK_RATIO * min(lengths.values())
    if lengths[tokens.bare] <= bound and max(lengths.values()) <= bound:
        return tokens
    ordinary = next((row for row in (*tokens.rows, *lengths) if lengths[row] <= bound), tokens.bare)

    def left(rows: Sequence[TokenRow]) -> tuple[TokenRow, ...]:
        return tuple(row for row in rows if lengths[row] <= bound)

    return replace(
        tokens,
        rows=tuple(row if lengths[row] <= bound else ordinary for row in tokens.rows),
        in_context_only=lengths[tokens.bare] > bound,
        paraphrases=left(tokens.paraphrases),
        keep=left(tokens.keep),
        held=left(tokens.held),
    )
