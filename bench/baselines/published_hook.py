"""The published validated hook (docs/method.md section 3), written plainly: two full projections and a boolean gather.

P = W0 k + b,  O = Wh k + b,  M = ||O - P||_2,  z = (M - mean M) / std M,  output O where z >= alpha, else P
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class PublishedHook:
    """Holds the twin ``Wh = W0 + Delta`` ``[m, d]`` beside the base's ``W0``, like the authors' code."""

    def __init__(self, weight: Tensor, bias: Tensor | None, delta: Tensor, alpha: float) -> None:
        self.weight, self.bias = weight, bias
        self.hook_weight = weight + delta
        self.alpha = alpha

    def __call__(self, x: Tensor) -> Tensor:  # [B, T, d] -> [B, T, m]
        outputs = F.linear(x, self.weight, self.bias)
        new = F.linear(x, self.hook_weight, self.bias)
        norm = torch.linalg.vector_norm(new - outputs, dim=-1)
        z = (norm - norm.mean(-1, keepdim=True)) / norm.std(-1, keepdim=True)
        gated = z >= self.alpha
        outputs[gated] = new[gated]
        return outputs
