"""The rows of some requests, cut down to what a step of the target optimisation must compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coachhook_fast.block_masks import BlockMasks, select_masks
from coachhook_fast.config import EditConfig
from coachhook_fast.forward import PartialModel, TokenBatch, align_rows, real_places
from coachhook_fast.prefix_cache import PrefixCache
from coachhook_fast.request import TokenisedRequest


@dataclass(frozen=True)
class TargetRows:
    """The rows of some requests from the lookup position on, with all that comes before them as fixed tensors.

    Request i has rows i·R … i·R + R − 1: its contexts with prompt and target and, unless every request has a context
    that begins in the same way, "{subject} is a" last.

    Attributes:
        hidden: [N, q, m] clean output of the last edited block from the lookup column on.
        cache: keys and values of the columns before, in the blocks above.
        masks: attention masks of the blocks; None where the model must make them in every pass.
        places: where in the flattened [N, q] the tokens stand that are no padding; None where none is.
        request, row, column, targets, weights: [P], one entry a predicted target token: its request, the row within
            the request, the column that predicts it (0 is the lookup position), the token, and its share of the loss
            (1 / contexts / target tokens).
        fixed_request, fixed_row, fixed_column, fixed_weights: [F], one entry a place whose prediction should stay as it
            was without δ: the subject's last token of "{subject} is a" and, where it counts, the target's last token.
    """

    tokens: TokenBatch
    hidden: Tensor
    cache: PrefixCache
    masks: BlockMasks | None
    places: Tensor | None
    rows_each: int
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
        own_kl_row = any(needs_kl_row(tokens, whole_rows) for tokens in batch)
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
            if own_kl_row:
                texts.append(list(tokens.kl.prompt if whole_rows else tokens.kl.prompt[: tokens.kl.lookup + 1]))
                lookups.append(tokens.kl.lookup)
            like_kl = len(tokens.rows) if own_kl_row else tokens.row_like_kl
            assert like_kl is not None
            fixed.append((position, like_kl, 0))
            fixed_weights.append(config.kl_factor)
        padded = align_rows(texts, lookups, pad_id, partial.device)
        _, below = partial.run(padded.columns(0), until=last, outputs=[last])
        hidden = below.outputs[last]
        cache = PrefixCache.fill(partial, last, padded, hidden)
        hidden, inputs = hidden[:, padded.lookup :], padded.columns(padded.lookup)
        # The `sequence` gate, for which rows are whole, reads the model's own mask.
        masks = None if whole_rows else partial.masks(inputs, hidden, **cache.options(partial.model))
        request, row_number, column, targets = torch.tensor(predictions, device=partial.device).unbind(1)
        fixed_request, fixed_row, fixed_column = torch.tensor(fixed, device=partial.device).unbind(1)
        return cls(
            tokens=padded,
            hidden=hidden,
            cache=cache,
            masks=masks,
            places=real_places(padded.attention_mask[:, padded.lookup :]),
            rows_each=len(batch[0].rows) + own_kl_row,
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
        rows = (kept[:, None] * self.rows_each + torch.arange(self.rows_each, device=kept.device)).flatten()
        renumbered = torch.full((int(self.request.max()) + 1,), -1, device=kept.device)
        renumbered[kept] = torch.arange(kept.numel(), device=kept.device)
        mine, fixed = renumbered[self.request] >= 0, self.fixed_of(kept)
        tokens = self.tokens.select(rows)
        return replace(
            self,
            tokens=tokens,
            places=real_places(tokens.attention_mask[:, tokens.lookup :]),
            masks=None if self.masks is None else select_masks(self.masks, rows),
            hidden=self.hidden[rows],
            cache=self.cache.select(rows),
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

    def fixed_of(self, kept: Tensor) -> Tensor:
        """[F] bool: the entries of the requests `kept`."""
        return torch.isin(self.fixed_request, kept)


def needs_kl_row(tokens: TokenisedRequest, whole_rows: bool) -> bool:
    """Whether the request's KL term needs a row of its own; where rows are whole their statistics differ."""
    return whole_rows or tokens.row_like_kl is None
