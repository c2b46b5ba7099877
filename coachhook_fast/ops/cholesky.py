"""``torch.ops.coachhook.chol_*``: the solver of the key memory, on packed Cholesky factors.

L [*, d (d + 1) / 2] is a packed lower factor (``coachhook_fast.ops.reference.cholesky`` has the layout) of C [*, d, d],
fp64 or fp32, contiguous; K [*, d, n] are keys of its type and device. Leading dimensions are factors of one shape.

====================  ==========================================================================================
chol_factor(C)        the factor of a packed symmetric matrix
chol_solve(L, K)      X = (C + K Kᵀ)⁻¹ K [*, d, n] and s = diag(Kᵀ C⁻¹ K) [*, n]; L does not change
chol_update(L, K)     C ← C + K Kᵀ, in place
chol_solve_update     both, in one pass over L and one back substitution
chol_downdate(L, K)   C ← C − K Kᵀ, in place; ValueError where that is not positive definite
====================  ==========================================================================================

A call that raises leaves L as it was. Without the extension the reference definitions run, at O(d³).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coachhook_fast.ops import _library
from coachhook_fast.ops.reference import cholesky as reference

_PANEL = _library.build_info().get("panel", reference.PANEL)
if _PANEL != reference.PANEL:
    raise ImportError(
        f"the built extension packs factors in panels of {_PANEL} columns, this package in {reference.PANEL}: "
        "rebuild it"
    )


def _fake_factor(C: Tensor) -> Tensor:
    return torch.empty_like(C, memory_format=torch.contiguous_format)


def _fake_solve(L: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    if K.dim() != L.dim() + 1:
        raise ValueError(f"K must be [*, d, n] for L [*, d (d + 1) / 2] of {list(L.shape)}, got {list(K.shape)}")
    return K.new_empty(K.shape), K.new_empty((*K.shape[:-2], K.shape[-1]))


def _fake_change(L: Tensor, K: Tensor) -> None:
    _fake_solve(L, K)


_library.define("chol_factor(Tensor C) -> Tensor", reference.chol_factor, _fake_factor)
_library.define("chol_solve(Tensor L, Tensor K) -> (Tensor, Tensor)", reference.chol_solve, _fake_solve)
_library.define("chol_update(Tensor(a!) L, Tensor K) -> ()", reference.chol_update, _fake_change)
_library.define(
    "chol_solve_update(Tensor(a!) L, Tensor K) -> (Tensor, Tensor)", reference.chol_solve_update, _fake_solve
)
_library.define("chol_downdate(Tensor(a!) L, Tensor K) -> ()", reference.chol_downdate, _fake_change)

chol_factor = torch.ops.coachhook.chol_factor
chol_solve = torch.ops.coachhook.chol_solve
chol_update = torch.ops.coachhook.chol_update
chol_solve_update = torch.ops.coachhook.chol_solve_update
chol_downdate = torch.ops.coachhook.chol_downdate
