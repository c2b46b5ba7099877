"""The tokens of a step of the target optimisation as rows of one length."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.models.passes.block_masks import BlockMasks, select_masks
from coachhook_fast.models.passes.forward import PartialModel, TokenBatch
from coachhook_fast.models.passes.prefix_cache import PrefixCache


@dataclass(frozen=True)
class PaddedRows:
    """Rows as long as the longest of them, for every model; on a GPU their steps may be recorded.

    Attributes:
        hidden: [N, q, m] clean output of block `last` from the lookup column on.
        cache: keys and values of the columns before, in the blocks above.
        masks: attention masks of the blocks; None where the model must make them in every pass.
        places: `tokens.places` from the lookup column on, found once and not in every step.
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
        _, below = partial.run(tokens.columns(0), until=last, outputs=[last], places=tokens.places())
        hidden = below.outputs[last]
        cache = PrefixCache.fill(partial, last, tokens, hidden)
        hidden, inputs = hidden[:, tokens.lookup :], tokens.columns(tokens.lookup)
        masks = None if whole_rows else partial.masks(inputs, hidden, **cache.options(partial.model))
        return cls(partial, last, tokens, hidden, cache, masks, tokens.places(tokens.lookup))

    def logits(self, shifts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        hidden = self.hidden
        shifted = torch.cat([hidden[:, :1] + shifts.to(hidden.dtype)[:, None], hidden[:, 1:]], dim=1)
        with self.partial.gathered_logits(rows, columns):
            result, _ = self.partial.run(
                self.tokens.columns(self.tokens.lookup),
                resume=(self.last, shifted),
                masks=self.masks,
                places=self.places,
                **self.cache.options(self.partial.model),
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
            places=tokens.places(tokens.lookup),
        )
