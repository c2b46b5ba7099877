"""Normalised gradient descent over the rows of one tensor, each with a length of step of its own and within a ball.

Adam moves every coordinate by about the rate, whatever its gradient: most of a first step goes where the loss does not
ask for it, and what a value should leave alone is touched all the same. A step along the gradient itself is as long and
reaches lower losses in as many steps (docs/experiments/specificity.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOMENTUM = 0.5
# Steps fall along half a cosine to this share in the last of those planned; further ones are of the second share.
_LAST, _FURTHER = 0.1, 0.4


class NormalisedDescent:
    """Interface and projection as of `ProjectedAdam`; nothing in a step waits for the device.

    Attributes:
        rows: [C, m], zero at the start; a leaf that gradients are taken of.
    """

    def __init__(self, lengths: Tensor, bounds: Tensor, width: int, steps: int) -> None:
        """`lengths`, `bounds` [C]: of each row of `width`, its first step and its largest norm; `steps`: how many are
        planned."""
        self._lengths, self._bounds = lengths[:, None], bounds[:, None]
        self.rows = lengths.new_zeros(lengths.numel(), width).requires_grad_()
        self._mean = torch.zeros_like(self.rows, requires_grad=False)
        self._planned = steps
        self._steps = torch.zeros((), dtype=torch.float64, device=lengths.device)

    @torch.no_grad()
    def step(self, gradients: Tensor, going: Tensor) -> None:
        """Moves the rows `going` [C] bool by `gradients` [C, m]; a row that once was left out has no further steps."""
        way = self._steps / max(1, self._planned - 1)
        share = _LAST + (1 - _LAST) * 0.5 * (1 + torch.cos(math.pi * way.clamp(max=1.0)))
        share = torch.where(self._steps < self._planned, share, _FURTHER)
        self._steps += 1
        self._mean.lerp_(gradients, 1 - _MOMENTUM)
        directions = self._mean / self._mean.norm(dim=1, keepdim=True).clamp(min=1e-30)
        moved = self.rows - self._lengths * share.to(self._lengths) * directions
        moved *= (self._bounds / moved.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        self.rows.copy_(torch.where(going[:, None], moved, self.rows))

    def select(self, kept: Tensor) -> None:
        """Goes on with the rows `kept` alone."""
        self.rows = self.rows.detach()[kept].requires_grad_()
        self._mean = self._mean[kept]
        self._lengths, self._bounds = self._lengths[kept], self._bounds[kept]
