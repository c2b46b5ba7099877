"""Carrying a wished change of a block's output back through the norm after its FFN (Gemma 2 and 3).

Such a block adds norm(y) to the residual stream, y being the down-projection's output; an edit changes y. With the norm
n(y) = g · y / rms(y), the output n(y) + R is reached along t = (n(y) + R) / g, whatever its length; we keep y's rms.
The norm fixes rms(n / g) = 1, so where R would change that, only the direction is reached.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def through_norm(norm: nn.Module, y: Tensor, R: Tensor) -> Tensor:
    """The change of y that gives norm(y) the change R.

    Args:
        norm: an RMS norm over m.
        y: [m, n] down-projection outputs; R: [m, n] wished changes of norm(y).

    Returns:
        [m, n], dtype of R.
    """
    rows = y.T
    n = norm(rows).to(R)
    gain = norm(torch.ones_like(rows[:1])).to(R)
    rms = rows.to(R).square().mean(1, keepdim=True).sqrt()
    wished = (n + R.T) / torch.where(gain.abs() < 1e-6, torch.ones_like(gain), gain)
    return (wished * rms - rows.to(R)).T
