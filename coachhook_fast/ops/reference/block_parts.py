"""What a transformer block computes beside its products and its attention, in plain torch.

    RMSNorm:            y = w ⊙ x r,             r = 1 / √(mean x² + ε)
    SwiGLU's product:   y = silu(g) ⊙ u,         silu(g) = g σ(g)
    rotary embedding:   y = x ⊙ cos + [−x₂; x₁] ⊙ sin,   x = [x₁; x₂] in halves

and their transposed derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor,  # [..., m]
    weight: Tensor,  # [m]
    eps: float,
) -> tuple[Tensor, Tensor]:  # y [..., m], r [...]
    scale = torch.rsqrt(x.square().mean(-1) + eps)
    return weight * (x * scale[..., None]), scale


def rms_norm_backward(
    grad: Tensor,  # [..., m]
    x: Tensor,
    weight: Tensor,
    scale: Tensor,  # [...]: r
) -> Tensor:  # [..., m]
    """dx = r (g − x r² mean(g ⊙ x)) for g = w ⊙ dy."""
    g = grad * weight
    along = (g * x).mean(-1) * scale.square()
    return scale[..., None] * (g - along[..., None] * x)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:  # all of one shape
    return torch.nn.functional.silu(gate) * up


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # dg, du
    """dg = dy ⊙ u ⊙ (σ + silu (1 − σ)),  du = dy ⊙ silu."""
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


def rotary(
    x: Tensor,  # [B, H, S, D], D even
    cos: Tensor,  # [B or 1, S, D]
    sin: Tensor,  # [B or 1, S, D]
    back: bool,  # the transpose of this linear map
) -> Tensor:  # [B, H, S, D], its heads next to each other in memory
    cos, sin = cos[:, None], sin[:, None]
    if back:
        first, second = (x * sin).chunk(2, -1)
        turned = x * cos + torch.cat([second, -first], -1)
    else:
        first, second = x.chunk(2, -1)
        turned = x * cos + torch.cat([-second, first], -1) * sin
    return turned.transpose(1, 2).contiguous().transpose(1, 2)
