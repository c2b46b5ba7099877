"""The published weight update's linear algebra, written plainly: a dense C, an LU solve for every layer and batch.

CoachHooK, MEMIT and their descendants carry C = λ E[k kᵀ] + Σ K Kᵀ as a dense matrix and call a general solver.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve_update(
    C: Tensor,  # [d, d] fp64, changed in place
    K: Tensor,  # [d, n] fp64
) -> Tensor:  # X = (C + K K^T)^-1 K [d, n]
    X = torch.linalg.solve(C + K @ K.T, K)
    C += K @ K.T
    return X


def refactorise(
    C: Tensor,  # [d, d] fp64, symmetric positive definite
    K: Tensor,  # [d, n] fp64
) -> Tensor:  # the Cholesky factor of C - K K^T
    return torch.linalg.cholesky(C - K @ K.T)
