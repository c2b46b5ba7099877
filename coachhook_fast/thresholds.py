"""Finding the thresholds of both gates from a model's own keys and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coachhook_fast.config import EditConfig
from coachhook_fast.delta import LowRankDelta
from coachhook_fast.edit_set import EditSet
from coachhook_fast.forward import PartialModel
from coachhook_fast.gate import Threshold, calibrated_threshold
from coachhook_fast.hooks import Hooks
from coachhook_fast.request import TokenisedRequest

# Inference computes the same z in other batches and kernels, and must still reach α: α is lowered by this many units of
# rounding of the model's dtype, and by 2 % at most (half precision, where rounding is as large).
_ROUNDING_UNITS = 64
_LARGEST_MARGIN = 0.02


def calibrate(delta: LowRankDelta, keys: torch.Tensor, config: EditConfig) -> Threshold:
    """τ of the `calibrated` gate for `delta`, from the sample `keys` [S, d] of ordinary text."""
    if delta.rank == 0:
        return Threshold(float("inf"))
    return calibrated_threshold(delta.norms(keys.to(delta.device)), config)


@torch.no_grad()
def reachable_alphas(
    partial: PartialModel, hooks: Hooks, edited: EditSet, batch: Sequence[TokenisedRequest]
) -> list[float]:
    """For each layer, min over requests of the largest z that inference reaches on the request's own text.

    What inference sees: texts without padding, through the gated model, in which the layers below already have the
    thresholds found here; once the bare prompt and once the prompt with its target, whichever reaches less. A text
    without z (one token, or Δ = 0) says nothing; inf where no text has one.
    """
    texts = [row for tokens in batch for row in (tokens.bare.prompt, tokens.bare.prompt + tokens.bare.target)]
    bounds: list[float] = []
    for position, layer in enumerate(edited.layers):
        reached = []
        for text in texts:
            ids = torch.tensor([text], device=partial.device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            _, recorded = partial.run(inputs, until=layer, keys=[layer])
            keys = recorded.keys[layer]
            z = hooks.hooks[position].trace(keys).z
            if not bool(z.isnan().all()):
                margin = min(_ROUNDING_UNITS * torch.finfo(keys.dtype).eps, _LARGEST_MARGIN)
                reached.append((1.0 - margin) * float(z.nan_to_num(-torch.inf).max()))
        bounds.append(min(reached, default=float("inf")))
        lowered = Threshold(min(edited.thresholds[position].value, bounds[-1]))
        edited = edited.with_layer(position, edited.deltas[position], lowered)
        hooks.publish(edited)
    return bounds
