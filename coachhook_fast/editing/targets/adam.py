"""Adam over the rows of one tensor, each with a rate of its own and within a ball of its own."""

from __future__ import annotations

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's


class ProjectedAdam:
    """torch.optim.Adam of every row, and after each step the row's projection onto its ball.

    A few operations for all rows, none of which waits for the device: a step may be part of a CUDA graph.

    Attributes:
        rows: [C, m], zero at the start; a leaf that gradients are taken of.
    """

    def __init__(self, rates: Tensor, bounds: Tensor, width: int) -> None:
        """`rates`, `bounds` [C]: learning rate and largest norm of each row of `width`."""
        self._rates, self._bounds = rates[:, None], bounds[:, None]
        self.rows = rates.new_zeros(rates.numel(), width).requires_grad_()
        self._mean, self._square = (torch.zeros_like(self.rows, requires_grad=False) for _ in range(2))
        self._steps = torch.zeros((), dtype=torch.float64, device=rates.device)

    @torch.no_grad()
    def step(self, gradients: Tensor, going: Tensor) -> None:
        """Moves the rows `going` [C] bool by `gradients` [C, m]; a row that once was left out has no further steps."""
        self._steps += 1
        self._mean.lerp_(gradients, 1 - _BETA1)
        self._square.mul_(_BETA2).addcmul_(gradients, gradients, value=1 - _BETA2)
        sizes = self._rates / (1 - _BETA1**self._steps)
        roots = self._square.sqrt() / (1 - _BETA2**self._steps).sqrt() + _EPSILON
        moved = self.rows - sizes * self._mean / roots
        moved *= (self._bounds / moved.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        self.rows.copy_(torch.where(going[:, None], moved, self.rows))

    def select(self, kept: Tensor) -> None:
        """Goes on with the rows `kept` alone."""
        self.rows = self.rows.detach()[kept].requires_grad_()
        self._mean, self._square = self._mean[kept], self._square[kept]
        self._rates, self._bounds = self._rates[kept], self._bounds[kept]
