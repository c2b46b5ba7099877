"""The tokens of a step of the target optimisation, from the lookup position on: δ in, logits out.

All that does not depend on δ comes with them as fixed tensors: the clean output of the last edited block, and the keys
and values of the tokens before in the blocks above.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from coachhook_fast.models.passes.block_masks import BlockMasks
from coachhook_fast.models.passes.forward import PartialModel, TokenBatch
from coachhook_fast.models.passes.packed_rows import PackedRows, packed_modules
from coachhook_fast.models.passes.padded_rows import PaddedRows
from coachhook_fast.models.passes.whole_rows import WholeRows, is_recurrent


class StepRows(Protocol):
    """Rows of tokens whose first one each is at the lookup position."""

    @property
    def masks(self) -> BlockMasks | None:
        """Attention masks of the blocks; None where the model must make them in every pass."""

    def logits(self, shifts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """[P, V] logits at the given (row, column) positions, with `shifts` [N, m] added to the last edited block's
        output at column 0."""

    def select(self, kept: Tensor) -> StepRows:
        """The rows `kept` (positions, ascending)."""


def step_rows(partial: PartialModel, last: int, tokens: TokenBatch, whole_rows: bool) -> StepRows:
    """The rows `tokens` above block `last`: packed where that is possible, else padded; whole in recurrent models.

    Args:
        whole_rows: the `sequence` gate is at work, which reads the model's own mask.
    """
    if is_recurrent(partial):
        return WholeRows.of(partial, last, tokens)
    padded = PaddedRows.of(partial, last, tokens, whole_rows)
    modules = packed_modules(partial, last, whole_rows)
    return padded if modules is None or padded.masks is None else PackedRows.of(padded, modules)
