"""Whitening: differences measured against how ordinary text spreads (`EditConfig.threshold_whitened`).

What Δ answers to ordinary keys is far from round: edits of a layer share directions, along which every token moves a
little, while along others hardly any does. The L2 norm lets the first drown the second. So the gate measures

    ||W B k||,   W = diag(λ_i / mean(λ) + 1)^-1/2 Vᵀ,   V diag(λ) Vᵀ = B E[k kᵀ] Bᵀ,

the Mahalanobis norm of Δk over ordinary text, shrunk half-way to the plain one. W is a change of coordinates,
Δ = (U W⁻¹) (W B), so serving costs what it costs without. Measured in docs/experiments/whitening.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook_fast.edits.delta import LowRankDelta

# In units of the mean of λ; three tenths to one are as good (docs/experiments/whitening.md).
_RIDGE = 1.0


def whitened(delta: LowRankDelta, R: Tensor, spread: Tensor) -> LowRankDelta:
    """`delta` with the metric W.

    Args:
        delta: R Xᵀ.
        R: [m, N] residuals of its updates.
        spread: [d, N], E[k kᵀ] X. From these B E[k kᵀ] Bᵀ = B spread (Uᵀ R)ᵀ follows without the statistics, so that a
            batch can be rolled back where they are gone.
    """
    if delta.rank == 0:
        return delta
    A = R.double() if delta.U is None else delta.U.double().T @ R.double()  # B = A Xᵀ
    moment = (delta.B.double() @ spread.double()) @ A.T
    values, vectors = torch.linalg.eigh((moment + moment.T) / 2)
    values = values.clamp(min=0.0)
    scale = (values / values.mean().clamp(min=torch.finfo(values.dtype).tiny) + _RIDGE).rsqrt()
    return delta.with_metric((scale[:, None] * vectors.T).to(delta.B))
