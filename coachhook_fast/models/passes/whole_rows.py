"""The tokens of a step of the target optimisation with all that stands before them, in every step anew.

For models that keep more than keys and values of the tokens before: states of recurrent blocks and of convolutions,
which no fixed cache gives back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.models.architectures import text_config
from coachhook_fast.models.passes.forward import PartialModel, TokenBatch


@dataclass(frozen=True)
class WholeRows:
    """Rows from their first token on.

    Attributes:
        hidden: [N, T, m] clean output of block `last`.
        masks: None, the model makes them in every pass.
    """

    partial: PartialModel
    last: int
    tokens: TokenBatch
    hidden: Tensor
    masks: None = None

    @classmethod
    def of(cls, partial: PartialModel, last: int, tokens: TokenBatch) -> WholeRows:
        _, below = partial.run(tokens.columns(0), until=last, outputs=[last])
        return cls(partial, last, tokens, below.outputs[last])

    def logits(self, shifts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        at, lookup = self.hidden, self.tokens.lookup
        here = at[:, lookup : lookup + 1] + shifts.to(at.dtype)[:, None]
        shifted = torch.cat([at[:, :lookup], here, at[:, lookup + 1 :]], dim=1)
        with self.partial.gathered_logits(rows, columns + lookup):
            result, _ = self.partial.run(self.tokens.columns(0), resume=(self.last, shifted))
        logits: Tensor = result.logits[0]
        return logits

    def select(self, kept: Tensor) -> WholeRows:
        return replace(self, tokens=self.tokens.select(kept), hidden=self.hidden[kept])


def is_recurrent(partial: PartialModel) -> bool:
    """Whether blocks of the model keep states beside keys and values."""
    kinds = getattr(text_config(partial.model), "layer_types", None) or ()
    stateful = getattr(partial.model, "_is_stateful", False)
    return bool(stateful) or any("attention" not in kind or "linear" in kind for kind in kinds)
