"""The tokens of a step of the target optimisation as rows of one length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.block_masks import BlockMasks, select_masks
from coachhook_fast.forward import PartialModel, TokenBatch, real_places
from coachhook_fast.prefix_cache import PrefixCache


@dataclass(frozen=True)
class PaddedRows:
    """Rows as long as the longest of them, for every model; on a GPU their steps may be recorded.

    Attributes:
        hidden: [N, q, m] clean output of block `last` from the lookup column on.
        cache: keys and values of the columns before, in the blocks above.
        masks: attention masks of the blocks; None where the model must make them in every pass.
        places: where in the flattened [N, q] the tokens stand that are no padding; None where none is.
    """

    partial: PartialModel
    last: int
    tokens: TokenBatch
    hidden: Tensor
    cache: PrefixCache
    masks: BlockMasks | None
    places: Tensor | None

    @classmethod
    def of(cls, partial: PartialModel, last: int, tokens: TokenBatch, whole_rows: bool) -> PaddedRows:
        """The rows `tokens`. `whole_rows`: the `sequence` gate is at work, which reads the model's own mask."""
        _, below = partial.run(tokens.columns(0), until=last, outputs=[last])
        hidden = below.outputs[last]
        cache = PrefixCache.fill(partial, last, tokens, hidden)
        hidden, inputs = hidden[:, tokens.lookup :], tokens.columns(tokens.lookup)
        masks = None if whole_rows else partial.masks(inputs, hidden, **cache.options(partial.model))
        return cls(partial, last, tokens, hidden, cache, masks, _places(tokens))

    def logits(self, shifts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        hidden = self.hidden
        shifted = torch.cat([hidden[:, :1] + shifts.to(hidden.dtype)[:, None], hidden[:, 1:]], dim=1)
        partial = self.partial
        with partial.gathered_logits(rows, columns), partial.ffns_at(self.places):
            result, _ = partial.run(
                self.tokens.columns(self.tokens.lookup),
                resume=(self.last, shifted),
                masks=self.masks,
                **self.cache.options(partial.model),
            )
        logits: Tensor = result.logits[0]
        return logits

    def select(self, kept: Tensor) -> PaddedRows:
        tokens = self.tokens.select(kept)
        return replace(
            self,
            tokens=tokens,
            hidden=self.hidden[kept],
            cache=self.cache.select(kept),
            masks=None if self.masks is None else select_masks(self.masks, kept),
            places=_places(tokens),
        )


def _places(tokens: TokenBatch) -> Tensor | None:
    """Once, and not in every step: it asks the device how many there are."""
    return real_places(tokens.attention_mask[:, tokens.lookup :])
