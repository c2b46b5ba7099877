"""The rows of some requests, cut down to what a step of the target optimisation must compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.config import EditConfig
from coachhook_fast.models.passes.forward import PartialModel, align_rows
from coachhook_fast.models.passes.step_rows import StepRows, step_rows
from coachhook_fast.request import TokenisedRequest


@dataclass(frozen=True)
class TargetRows:
    """The rows of some requests from the lookup position on, with all that comes before them as fixed tensors.

    Rows are in the requests' order. A request has its contexts with prompt and target and, unless one of them begins in
    the same way, "{subject} is a", then its prompts to keep.

    Attributes:
        inputs: what the blocks above the last edited one run over.
        row_request: [N] the request of every row; row_kept: [N] its number among the request's prompts to keep, or -1.
        request, row, column, targets, weights: [P], one entry a predicted target token: its request, the row within
            the request, the column that predicts it (0 is the lookup position), the token, and its share of the loss
            (1 / contexts / target tokens); bare: whether it is the bare prompt's.
        fixed_request, fixed_row, fixed_column, fixed_weights: [F], one entry a place whose prediction should stay as it
            was without δ: the subject's last token of "{subject} is a", the last token of each prompt to keep and,
            where it counts, the target's last token.
    """

    inputs: StepRows
    row_request: Tensor
    row_kept: Tensor
    request: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    weights: Tensor
    bare: Tensor
    fixed_request: Tensor
    fixed_row: Tensor
    fixed_column: Tensor
    fixed_weights: Tensor

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        partial: PartialModel,
        last: int,
        batch: Sequence[TokenisedRequest],
        config: EditConfig,
        pad_id: int,
        whole_rows: bool,
    ) -> TargetRows:
        texts: list[list[int]] = []
        lookups: list[int] = []
        predictions: list[tuple[int, int, int, int]] = []
        weights: list[float] = []
        bare: list[bool] = []
        fixed: list[tuple[int, int, int]] = []
        fixed_weights: list[float] = []
        row_request: list[int] = []
        row_kept: list[int] = []
        for position, tokens in enumerate(batch):
            for number, row in enumerate((*tokens.asking, *tokens.held)):
                continues = number == len(tokens.rows) - 1 and config.continuation_factor > 0
                fed = row.target if whole_rows or continues else row.target[:-1]
                texts.append([*row.prompt, *fed])
                lookups.append(row.lookup)
                first = len(row.prompt) - 1 - row.lookup
                predictions += [(position, number, first + i, token) for i, token in enumerate(row.target)]
                bare += [number == len(tokens.rows) - 1] * len(row.target)
                weights += [1.0 / len(tokens.asking) / len(row.target)] * len(row.target)
                if continues:
                    fixed.append((position, number, first + len(row.target)))
                    fixed_weights.append(config.continuation_factor)
            own_kl_row = whole_rows or tokens.row_like_kl is None  # whole rows' statistics differ
            if own_kl_row:
                texts.append(list(tokens.kl.prompt if whole_rows else tokens.kl.prompt[: tokens.kl.lookup + 1]))
                lookups.append(tokens.kl.lookup)
            like_kl = len(tokens.asking) + len(tokens.held) if own_kl_row else tokens.row_like_kl
            assert like_kl is not None
            fixed.append((position, like_kl, 0))
            fixed_weights.append(config.kl_factor)
            first_kept = len(tokens.asking) + len(tokens.held) + own_kl_row
            for number, row in enumerate(tokens.keep, first_kept):
                texts.append(list(row.prompt))
                lookups.append(row.lookup)
                fixed.append((position, number, len(row.prompt) - 1 - row.lookup))
                fixed_weights.append(config.keep_factor / len(tokens.keep))
            row_request += [position] * (first_kept + len(tokens.keep))
            row_kept += [-1] * first_kept + list(range(len(tokens.keep)))
        inputs = step_rows(partial, last, align_rows(texts, lookups, pad_id, partial.device), whole_rows)
        request, row_number, column, targets = torch.tensor(predictions, device=partial.device).unbind(1)
        fixed_request, fixed_row, fixed_column = torch.tensor(fixed, device=partial.device).unbind(1)
        return cls(
            inputs=inputs,
            row_request=torch.tensor(row_request, device=partial.device),
            row_kept=torch.tensor(row_kept, device=partial.device),
            request=request,
            row=row_number,
            column=column,
            targets=targets,
            weights=torch.tensor(weights, dtype=torch.float64, device=partial.device),
            bare=torch.tensor(bare, device=partial.device),
            fixed_request=fixed_request,
            fixed_row=fixed_row,
            fixed_column=fixed_column,
            fixed_weights=torch.tensor(fixed_weights, dtype=torch.float64, device=partial.device),
        )

    def select(self, kept: Tensor) -> TargetRows:
        """The rows of the requests `kept` (positions, ascending), which are counted anew."""
        renumbered = torch.full((int(self.row_request.max()) + 1,), -1, device=kept.device)
        renumbered[kept] = torch.arange(kept.numel(), device=kept.device)
        rows = self._of_rows(torch.isin(self.row_request, kept))
        return replace(
            rows,
            row_request=renumbered[rows.row_request],
            request=renumbered[rows.request],
            fixed_request=renumbered[rows.fixed_request],
        )

    def parts(self, count: int) -> list[TargetRows]:
        """The rows in `count` parts, each with all rows but only every `count`-th of a request's prompts to keep, which
        count so many times as much there."""
        if count == 1:
            return [self]
        found = []
        for part in range(count):
            rows = self._of_rows((self.row_kept < 0) | (self.row_kept % count == part))
            is_kept = rows.row_kept[rows._first(rows.fixed_request) + rows.fixed_row] >= 0
            found.append(replace(rows, fixed_weights=torch.where(is_kept, count, 1.0) * rows.fixed_weights))
        return found

    def _of_rows(self, kept: Tensor) -> TargetRows:
        """The rows where `kept` [N] is true, of the same requests."""
        new = kept.cumsum(0) - 1
        at, fixed_at = self._first(self.request) + self.row, self._first(self.fixed_request) + self.fixed_row
        mine, fixed = kept[at], kept[fixed_at]
        rows = replace(
            self,
            inputs=self.inputs.select(kept.nonzero()[:, 0]),
            row_request=self.row_request[kept],
            row_kept=self.row_kept[kept],
            request=self.request[mine],
            row=new[at][mine],
            column=self.column[mine],
            targets=self.targets[mine],
            weights=self.weights[mine],
            bare=self.bare[mine],
            fixed_request=self.fixed_request[fixed],
            fixed_row=new[fixed_at][fixed],
            fixed_column=self.fixed_column[fixed],
            fixed_weights=self.fixed_weights[fixed],
        )
        return replace(
            rows, row=rows.row - rows._first(rows.request), fixed_row=rows.fixed_row - rows._first(rows.fixed_request)
        )

    def _first(self, requests: Tensor) -> Tensor:
        """The first row of each of `requests`."""
        return torch.searchsorted(self.row_request, requests.contiguous())

    def log_p(self, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """[P, V] and [F, V] log p at the predicted tokens and at the fixed places, with `shifts` [requests, m] added at
        the lookup positions; fp32 at least."""
        logits = self.inputs.logits(shifts.index_select(0, self.row_request), *self.places())
        logits = logits.to(shifts.device, torch.promote_types(logits.dtype, torch.float32))
        # A split, whose way back is one copy; those of two slices fill and add tensors as large as the logits.
        of_targets, of_fixed = logits.split([self.targets.numel(), logits.shape[0] - self.targets.numel()])
        return of_targets.log_softmax(-1), of_fixed.log_softmax(-1)

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every predicted target token, then of every fixed place: [P + F] each."""
        first = self._first(torch.cat([self.request, self.fixed_request]))
        return first + torch.cat([self.row, self.fixed_row]), torch.cat([self.column, self.fixed_column])

    def fixed_of(self, kept: Tensor) -> Tensor:
        """[F] bool: the entries of the requests `kept`."""
        return torch.isin(self.fixed_request, kept)
