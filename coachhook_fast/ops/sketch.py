"""A fixed random projection that decides most tokens without measuring them (docs/method.md section 4).

With ``R`` an ``s x r`` standard normal and ``G = (R / sqrt(s)) B``, the ratio ``||G k||^2 / ||B k||^2`` is
chi^2_s / s for every key ``k`` that does not depend on ``R``. A token that fires has ``||B k|| >= tau``, so
``||G k|| < c tau`` happens to it with probability at most ``P(chi^2_s < s c^2)``. The sketch is stored as ``G
/ c``: "under tau" then means "does not fire".
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor

from coachhook_fast.ops.reference.gated_linear import accumulator_dtype

# Rows of the sketch, and the share of ordinary tokens it leaves undecided at an error of 1e-9 (measured,
# docs/method.md section 4). Used for nothing but the choice of the size below.
UNDECIDED = {64: 0.095, 128: 0.055, 256: 0.035}
# Below this rank all of B costs so little that a second stage cannot pay for itself.
SMALLEST_RANK = 192


def sketch_rows(rank: int) -> int:
    """Rows of the cheapest sketch for ``rank``, counting what undecided tokens read of ``B``; 0: none."""
    if rank < SMALLEST_RANK:
        return 0
    return min(UNDECIDED, key=lambda rows: rows + UNDECIDED[rows] * rank)


@functools.cache
def lower_quantile(rows: int, probability: float) -> float:
    """``c``: the root of chi^2's ``probability`` quantile with ``rows`` degrees of freedom, over ``rows``.

    ValueError unless 0 < probability < 0.5.
    """
    if not 0.0 < probability < 0.5:
        raise ValueError(f"probability must lie between 0 and 0.5, got {probability}")
    half = torch.tensor(rows / 2, dtype=torch.float64)
    low, high = 0.0, float(rows)
    for _ in range(100):
        middle = 0.5 * (low + high)
        if float(torch.special.gammainc(half, torch.tensor(middle / 2, dtype=torch.float64))) < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(low / rows)


@torch.no_grad()
def make_sketch(
    B: Tensor,  # [r, d], or Delta [m, d]
    probability: float,
    rows: int | None = None,
) -> Tensor | None:  # [s, d], dtype and device of B
    """``G / c`` for an error of ``probability`` a firing token; None where measuring every token is cheaper.

    The seed is the content of ``B``: the same edit set gives the same bits, and nothing else touches torch's
    generator.
    """
    rows = sketch_rows(B.shape[0]) if rows is None else rows
    if rows == 0:
        return None
    content = B.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    seed = int.from_bytes(hashlib.blake2b(content.data, digest_size=7).digest(), "little")
    dtype = accumulator_dtype(B.dtype)
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn(rows, B.shape[0], generator=generator, dtype=torch.float64)
    R = R.mul_(1.0 / (math.sqrt(rows) * lower_quantile(rows, probability))).to(dtype=dtype, device=B.device)
    return (R @ B.to(dtype)).to(B.dtype)
