"""The packed factor's layout, and the plain definition of every operator on it.

A packed lower triangle holds d (d + 1) / 2 elements in panels of ``PANEL`` columns: a panel is its own triangle,
row by row, then the rows below it as an ordinary row-major [rows, width] block. csrc/solver/packed_factor.h has the
same layout. The definitions here unpack, refactorise and pack again: right by inspection, and O(d^3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 128


def packed_size(d: int) -> int:
    return d * (d + 1) // 2


def dimension(packed: Tensor) -> int:
    """d of a packed [*, d (d + 1) / 2]; ValueError if there is none."""
    size = packed.shape[-1] if packed.dim() else 0
    d = (math.isqrt(8 * size + 1) - 1) // 2
    if d < 1 or packed_size(d) != size:
        raise ValueError(f"L must hold d (d + 1) / 2 elements for some d, got {list(packed.shape)}")
    return d


def _panels(d: int) -> Iterator[tuple[int, int, int, int]]:
    """(first column, end column, offset of the triangle, offset of the block below) of each panel."""
    for first in range(0, d, PANEL):
        end = min(first + PANEL, d)
        triangle = packed_size(d) - packed_size(d - first)
        yield first, end, triangle, triangle + packed_size(end - first)


def pack(matrix: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The lower triangle of [*, d, d] as a packed [*, d (d + 1) / 2]; what is above it is not read."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"matrix must be [*, d, d], got {list(matrix.shape)}")
    d = matrix.shape[-1]
    packed = matrix.new_empty(*matrix.shape[:-2], packed_size(d), dtype=dtype)
    for first, end, triangle, rect in _panels(d):
        width, below = end - first, d - end
        rows, columns = torch.tril_indices(width, width, device=matrix.device)
        packed[..., triangle:rect] = matrix[..., first:end, first:end][..., rows, columns]
        block = packed[..., rect : rect + below * width]
        block.unflatten(-1, (below, width)).copy_(matrix[..., end:, first:end])
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The lower triangular [*, d, d] of a packed [*, d (d + 1) / 2], zero above the diagonal."""
    d = dimension(packed)
    matrix = packed.new_zeros(*packed.shape[:-1], d, d)
    for first, end, triangle, rect in _panels(d):
        width, below = end - first, d - end
        rows, columns = torch.tril_indices(width, width, device=packed.device)
        matrix[..., first + rows, first + columns] = packed[..., triangle:rect]
        block = packed[..., rect : rect + below * width]
        matrix[..., end:, first:end] = block.unflatten(-1, (below, width))
    return matrix


def _check(L: Tensor, K: Tensor) -> None:
    for name, tensor in (("L", L), ("K", K)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float64 or float32, got {tensor.dtype}")
    if K.dtype != L.dtype:
        raise TypeError(f"K must have L's type {L.dtype}, got {K.dtype}")
    d = dimension(L)
    if not L.is_contiguous():
        raise ValueError(f"L must be contiguous, got strides {L.stride()}")
    if K.dim() != L.dim() + 1 or K.shape[-2] != d or K.shape[:-2] != L.shape[:-1]:
        raise ValueError(
            f"K must be [*, d, n] for L [*, d (d + 1) / 2] of {list(L.shape)} (d = {d}), got {list(K.shape)}"
        )
    diagonal = unpack(L).diagonal(dim1=-2, dim2=-1)
    if not bool(((diagonal > 0) & diagonal.isfinite()).all()):
        raise ValueError(f"L must have a positive diagonal, got {float(diagonal.min())}")
    if K.numel() and not math.isfinite(norm := float(torch.linalg.vector_norm(K))):
        raise ValueError(f"K must be finite, got a norm of {norm}")


def _cholesky(matrix: Tensor, message: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise ValueError(f"{message}: the leading minor of order {int(info.max())} is not")
    return factor


def chol_factor(
    C: Tensor,  # [*, d (d + 1) / 2], a packed symmetric matrix
) -> Tensor:  # its packed factor
    lower = unpack(C)
    if not bool(C.isfinite().all()):
        raise ValueError("C must be finite")
    return pack(_cholesky(lower + lower.tril(-1).mT, "C must be positive definite"))


def chol_solve(
    L: Tensor,  # [*, d (d + 1) / 2]
    K: Tensor,  # [*, d, n]
) -> tuple[Tensor, Tensor]:  # X [*, d, n] = (C + K K^T)^-1 K; s [*, n] = diag(K^T C^-1 K)
    _check(L, K)
    factor = unpack(L)
    s = torch.linalg.solve_triangular(factor, K, upper=False).square().sum(-2)
    after = _cholesky(factor @ factor.mT + K @ K.mT, "C + K K^T must be positive definite")
    return torch.cholesky_solve(K, after), s


def chol_update(L: Tensor, K: Tensor) -> None:  # C <- C + K K^T
    _check(L, K)
    factor = unpack(L)
    L.copy_(pack(_cholesky(factor @ factor.mT + K @ K.mT, "C + K K^T must be positive definite")))


def chol_solve_update(L: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:  # chol_solve, then chol_update
    solution = chol_solve(L, K)
    chol_update(L, K)
    return solution


def chol_downdate(L: Tensor, K: Tensor) -> None:  # C <- C - K K^T
    _check(L, K)
    factor = unpack(L)
    message = "C - K K^T must stay positive definite"
    Y = torch.linalg.solve_triangular(factor, K, upper=False)
    remaining = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device) - Y.mT @ Y
    _cholesky(remaining, message)  # better conditioned than the difference below
    L.copy_(pack(_cholesky(factor @ factor.mT - K @ K.mT, message)))
