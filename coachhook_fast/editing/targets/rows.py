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
    the same way, "{subject} is a" last.

    Attributes:
        inputs: what the blocks above the last edited one run over.
        row_request: [N] the request of every row.
        request, row, column, targets, weights: [P], one entry a predicted target token: its request, the row within
            the request, the column that predicts it (0 is the lookup position), the token, and its share of the loss
            (1 / contexts / target tokens).
        fixed_request, fixed_row, fixed_column, fixed_weights: [F], one entry a place whose prediction should stay as it
            was without δ: the subject's last token of "{subject} is a" and, where it counts, the target's last token.
    """

    inputs: StepRows
    row_request: Tensor
    request: Tensor
    row: Tensor
    column: Tensor
    targets: Tensor
    weights: Tensor
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
        fixed: list[tuple[int, int, int]] = []
        fixed_weights: list[float] = []
        row_request: list[int] = []
        for position, tokens in enumerate(batch):
            for number, row in enumerate(tokens.rows):
                continues = number == len(tokens.rows) - 1 and config.continuation_factor > 0
                fed = row.target if whole_rows or continues else row.target[:-1]
                texts.append([*row.prompt, *fed])
                lookups.append(row.lookup)
                first = len(row.prompt) - 1 - row.lookup
                predictions += [(position, number, first + i, token) for i, token in enumerate(row.target)]
                weights += [1.0 / len(tokens.rows) / len(row.target)] * len(row.target)
                if continues:
                    fixed.append((position, number, first + len(row.target)))
                    fixed_weights.append(config.continuation_factor)
            own_kl_row = whole_rows or tokens.row_like_kl is None  # whole rows' statistics differ
            if own_kl_row:
                texts.append(list(tokens.kl.prompt if whole_rows else tokens.kl.prompt[: tokens.kl.lookup + 1]))
                lookups.append(tokens.kl.lookup)
            like_kl = len(tokens.rows) if own_kl_row else tokens.row_like_kl
            assert like_kl is not None
            fixed.append((position, like_kl, 0))
            fixed_weights.append(config.kl_factor)
            row_request += [position] * (len(tokens.rows) + own_kl_row)
        inputs = step_rows(partial, last, align_rows(texts, lookups, pad_id, partial.device), whole_rows)
        request, row_number, column, targets = torch.tensor(predictions, device=partial.device).unbind(1)
        fixed_request, fixed_row, fixed_column = torch.tensor(fixed, device=partial.device).unbind(1)
        return cls(
            inputs=inputs,
            row_request=torch.tensor(row_request, device=partial.device),
            request=request,
            row=row_number,
            column=column,
            targets=targets,
            weights=torch.tensor(weights, dtype=torch.float64, device=partial.device),
            fixed_request=fixed_request,
            fixed_row=fixed_row,
            fixed_column=fixed_column,
            fixed_weights=torch.tensor(fixed_weights, dtype=torch.float64, device=partial.device),
        )

    def select(self, kept: Tensor) -> TargetRows:
        """The rows of the requests `kept` (positions, ascending)."""
        renumbered = torch.full((int(self.request.max()) + 1,), -1, device=kept.device)
        renumbered[kept] = torch.arange(kept.numel(), device=kept.device)
        mine, fixed = renumbered[self.request] >= 0, self.fixed_of(kept)
        row_request = renumbered[self.row_request]
        return replace(
            self,
            inputs=self.inputs.select((row_request >= 0).nonzero()[:, 0]),
            row_request=row_request[row_request >= 0],
            request=renumbered[self.request][mine],
            row=self.row[mine],
            column=self.column[mine],
            targets=self.targets[mine],
            weights=self.weights[mine],
            fixed_request=renumbered[self.fixed_request][fixed],
            fixed_row=self.fixed_row[fixed],
            fixed_column=self.fixed_column[fixed],
            fixed_weights=self.fixed_weights[fixed],
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of every predicted target token, then of every fixed place: [P + F] each."""
        first = torch.searchsorted(self.row_request, torch.cat([self.request, self.fixed_request]))
        return first + torch.cat([self.row, self.fixed_row]), torch.cat([self.column, self.fixed_column])

    def fixed_of(self, kept: Tensor) -> Tensor:
        """[F] bool: the entries of the requests `kept`."""
        return torch.isin(self.fixed_request, kept)
