"""Plain definition of the delta's product in slices of d (csrc/cuda/delta_product.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 64  # columns


@torch.no_grad()
def delta_product(
    x: Tensor,  # [tokens, d]
    p: Tensor,  # [r, d]
    block: int,  # tokens together: of no consequence here
    slices: int,
    want_length: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(values, lengths, counts)``: ``c_i = x[:, i] p[:, i]^T`` ``[slices * tokens, r in whole steps of 16]`` fp32,
    ``||x[:, i]||^2`` ``[slices, tokens]`` (``[0]`` unless asked for), and two zeros, int32.

    Slice i is every ``slices``-th tile of 64 columns, counted from the last tile.
    """
    (tokens, d), r = x.shape, p.shape[0]
    from_end = (d - 1) // TILE - torch.arange(d, device=x.device) // TILE
    values = x.new_zeros(slices, tokens, -(-r // 16) * 16, dtype=torch.float32)
    lengths = x.new_zeros(slices if want_length else 0, tokens, dtype=torch.float32)
    for i in range(slices):
        mine = from_end % slices == i
        values[i, :, :r] = x[:, mine].float() @ p[:, mine].float().T
        if want_length:
            lengths[i] = x[:, mine].float().square().sum(dim=1)
    counts = torch.zeros(2, dtype=torch.int32, device=x.device)
    return values.view(slices * tokens, -1), lengths, counts
