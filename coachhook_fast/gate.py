"""The two gates: threshold rules, and what the `sequence` gate knows of the tokens at hand.

`calibrated`: a token takes the edit where ||Δk|| >= τ. τ comes from the norms of Δ over a stored sample of ordinary
text's keys, so it needs no sequence, no state and no neighbouring tokens.

`sequence` (the paper's): z = (||Δk|| - mean) / std over the valid tokens of the token's own sequence, unbiased std; a
token takes the edit where z >= α. Its statistics live in a `SequenceContext`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from coachhook_fast.config import EditConfig

GATES = ("calibrated", "sequence")
THRESHOLD_RULES = ("zscore", "fpr")


@dataclass(frozen=True)
class Threshold:
    """A layer's threshold: τ (`calibrated`, in units of ||Δk||) or α (`sequence`, in standard deviations).

    `mean` and `std` describe ||Δk|| over ordinary text and serve to show a token's z under `calibrated`.
    """

    value: float
    mean: float = float("nan")
    std: float = float("nan")


def calibrated_threshold(norms: Tensor, config: EditConfig) -> Threshold:
    """τ of the `calibrated` gate from the norms ||Δk|| of ordinary keys.

    Args:
        norms: [N] fp32 or fp64, ||Δk|| over the stored sample of corpus keys.
        config: `threshold_rule` "zscore": τ = mean + threshold_z * std; "fpr": the quantile that a share
            `threshold_fpr` of the sample passes.

    Raises:
        ValueError: fewer than two norms, or a norm is not finite.
    """
    values = norms.detach().to(torch.float64)
    if values.numel() < 2 or not bool(torch.isfinite(values).all()):
        raise ValueError(f"norms must hold two or more finite values, got {values.numel()} with {values}")
    mean, std = float(values.mean()), float(values.std())
    if config.threshold_rule == "fpr":
        # Counting from the top: torch.quantile refuses more than 16 million values.
        passing = max(1, round(config.threshold_fpr * values.numel()))
        value = float(values.topk(passing).values[-1])
    else:
        value = mean + config.threshold_z * std
    return Threshold(value, mean, std)


class StateStore(Protocol):
    """Running statistics per sequence, one row (count, mean, M2) a layer; see integrations/transformers.py."""

    def load(self, index: int) -> Tensor | None: ...

    def store(self, index: int, state: Tensor) -> None: ...


class SequenceContext:
    """What the `sequence` gate must know of the running forward pass; shared by the hooks of one model.

    Attributes:
        mask: [B, q] bool, True for real tokens among those of this forward pass; None where all are real.
        cu_seqlens: [S + 1] int32, boundaries of packed sequences; None where each row is one sequence.
        states: where the running state of cached decoding is kept; None without a cache.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.mask: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.states: StateStore | None = None

    def load(self, index: int) -> Tensor | None:
        """[B, 3] (count, mean, M2) before the tokens of this pass in edited layer `index`; None at the start."""
        return None if self.states is None else self.states.load(index)

    def store(self, index: int, state: Tensor) -> None:
        """Keeps the [B, 3] state after the tokens of this pass."""
        if self.states is not None:
            self.states.store(index, state)
