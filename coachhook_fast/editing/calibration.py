"""Finding the thresholds of both gates from a model's own keys and texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coachhook_fast.config import EditConfig
from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import EditSet
from coachhook_fast.edits.threshold import Threshold
from coachhook_fast.hooks.hooks import Hooks
from coachhook_fast.models.passes.forward import PartialModel
from coachhook_fast.request import TokenisedRequest

# Inference computes the same z in other batches and kernels, and must still reach α: α is lowered by this many units of
# rounding of the model's dtype, and by 2 % at most (half precision, where rounding is as large).
_ROUNDING_UNITS = 64
_LARGEST_MARGIN = 0.02

# Few edits stand so far out that a share of the way would shut out other wordings: "edit_keys" stops at so many
# threshold_z (docs/experiments/gates.md).
_MOST_Z = 3.0

# The more edits a layer holds, the nearer their keys are to ordinary text: where threshold_edit_share would leave τ
# under threshold_z standard deviations, it goes up to this share of the way (docs/experiments/whitening.md).
_CROWDED_SHARE = 0.85

# The edits that "edit_keys" lets go: a few stand at keys that ordinary text shares.
_EDIT_QUANTILE = 0.05


def calibrate(delta: LowRankDelta, keys: torch.Tensor, own: torch.Tensor, config: EditConfig) -> Threshold:
    """τ of the `calibrated` gate for `delta`, from `keys` [S, d] of ordinary text and the edits' own, `own` [d, N]."""
    if delta.rank == 0 or own.shape[1] == 0:
        return Threshold(float("inf"))
    keys = keys.to(delta.device)
    relative = bool(config.threshold_relative)
    return calibrated_threshold(measure(delta, keys, relative), measure(delta, own.T.to(keys), relative), config)


def measure(delta: LowRankDelta, keys: torch.Tensor, relative: bool) -> torch.Tensor:
    """[N] what τ is compared with for `keys` [N, d]: ||Δk||, or ||Δk|| / ||k||."""
    norms = delta.norms(keys)
    if not relative:
        return norms
    return norms / torch.linalg.vector_norm(keys, dim=1, dtype=norms.dtype).clamp(min=torch.finfo(norms.dtype).tiny)


def calibrated_threshold(norms: torch.Tensor, own: torch.Tensor, config: EditConfig) -> Threshold:
    """τ of the `calibrated` gate from what it is compared with (`measure`), for ordinary keys and the edits' own.

    Args:
        norms: [S] fp32 or fp64, over the stored sample of corpus keys, with this mean and std.
        own: [N], over the keys of all edits.
        config: `threshold_rule` "zscore": τ = mean + threshold_z * std; "fpr": the quantile that a share
            `threshold_fpr` of the sample passes; "edit_keys": the share `threshold_edit_share` of the way from the mean
            to the 5 % quantile of `own`, or up to .85 where that is under mean + threshold_z std; at least the quantile
            of "fpr" and at most mean + 3 threshold_z std.

    Raises:
        ValueError: fewer than two norms, or a norm is not finite.
    """
    values = norms.detach().to(torch.float64)
    if values.numel() < 2 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"norms must hold two or more finite values, got {values.numel()} with {values}")
    mean, std = float(values.mean()), float(values.std())
    if config.threshold_rule == "zscore":
        return Threshold(mean + config.threshold_z * std, mean, std)
    # Counting from the top: torch.quantile refuses more than 16 million values.
    passing = max(1, round(config.threshold_fpr * values.numel()))
    ordinary = float(values.topk(passing).values[-1])
    if config.threshold_rule == "fpr":
        return Threshold(ordinary, mean, std)
    low = float(own.detach().to(torch.float64).quantile(_EDIT_QUANTILE))
    share, deviation = config.threshold_edit_share, config.threshold_z * std
    wished = max(share * (low - mean), min(max(share, _CROWDED_SHARE) * (low - mean), deviation))
    return Threshold(max(ordinary, mean + min(wished, _MOST_Z * deviation)), mean, std)


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
