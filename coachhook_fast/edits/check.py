"""What must hold of an edit set, whoever made it: `store.load` asks all of it, `coachhook verify-edits` shows it.

Serving relies on deltas that are finite, with orthonormal columns in U, for ||Δk|| = ||B k|| holds only then. Going on
and rolling back rely on updates that are finite, fit the deltas, and add up to them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coachhook_fast.edits.delta import LowRankDelta
from coachhook_fast.edits.edit_set import Batch, EditSet, LayerUpdate

MOST_VALUE = 1e12  # fp32 still holds sums of so large squares
_METRIC = (1e-6, 1e6)  # norms of the rows of W; whitening gives 1 / sqrt(1 + r) to 1
_ORTHONORMAL = {torch.float32: 1e-4, torch.float64: 1e-9}  # most of |UᵀU - I|
_AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-8}  # most of |Δ - Σ R Xᵀ| over the root of Σ |r|²|x|²
_PROBES = 8


def check_deltas(deltas: Sequence[LowRankDelta]) -> None:
    """ValueError unless each can be served; the message names the layer's position."""
    for position, delta in enumerate(deltas):
        if delta.dtype not in _ORTHONORMAL:
            raise ValueError(f"{position}.B has dtype {delta.dtype}, expected fp32 or fp64")
        for name, tensor in delta.state_dict().items():
            _check_values(f"{position}.{name}", tensor)
        if delta.U is not None and delta.rank > min(delta.U.shape[0], delta.in_features):
            raise ValueError(f"{position}.U has rank {delta.rank} in {delta.out_features} x {delta.in_features}")
        found, most = orthonormality(delta), _ORTHONORMAL[delta.dtype]
        if found > most:
            raise ValueError(f"{position}.U is not orthonormal: |UᵀU - I| is {found:.3g}, at most {most:g} is rounding")
        if delta.W is not None and delta.rank:
            rows = torch.linalg.vector_norm(delta.W, dim=1)
            if float(rows.min()) < _METRIC[0] or float(rows.max()) > _METRIC[1]:
                raise ValueError(f"{position}.W has rows of norm {float(rows.min()):.3g} to {float(rows.max()):.3g}")


def orthonormality(delta: LowRankDelta) -> float:
    """The largest entry of |UᵀU - I|; 0 for a dense delta or one of rank 0."""
    if delta.U is None or delta.rank == 0:
        return 0.0
    gram = delta.U.T @ delta.U
    gram.diagonal().sub_(1.0)
    return float(gram.abs().max())


def check_updates(edit_set: EditSet) -> None:
    """ValueError unless the batches' updates fit the deltas and add up to them; the message names batch and layer."""
    for batch in edit_set.batches:
        for position, update in enumerate(batch.layers):
            _check_update(batch, position, update, edit_set)
    for position, delta in enumerate(edit_set.deltas):
        columns = sum(batch.layers[position].residuals.shape[1] for batch in edit_set.batches)
        if not delta.is_dense and delta.rank > columns:
            raise ValueError(f"{position}.U has rank {delta.rank}, the ledger's updates have {columns} columns")
        found, most = disagreement(edit_set, position), _AGREEMENT[delta.dtype]
        if not found <= most:
            raise ValueError(
                f"the ledger's updates do not add up to the weights of layer {edit_set.layers[position]}: they are "
                f"{found:.3g} apart, at most {most:g} is rounding"
            )


def disagreement(edit_set: EditSet, position: int) -> float:
    """How far Δ is from Σ R Xᵀ over the ledger, in units of sqrt(Σ |r|² |x|²), along random directions: another Δ
    passes with probability 0."""
    delta = edit_set.deltas[position]
    generator = torch.Generator()
    generator.seed()  # nobody can know them beforehand; the caller's random state is kept
    probes = torch.randn(delta.in_features, _PROBES, dtype=torch.float64, generator=generator)
    total = torch.zeros(delta.out_features, _PROBES, dtype=torch.float64)
    squares = 0.0
    for batch in edit_set.batches:
        R, X = batch.layers[position].residuals, batch.layers[position].directions
        if R.shape[1] == 0:
            continue
        total += R.double() @ (X.double().T @ probes)
        squares += float((_norms(R) * _norms(X)).square().sum())
    served = delta.B.double().cpu() @ probes
    if delta.U is not None:
        served = delta.U.double().cpu() @ served
    apart = float(torch.linalg.vector_norm(served - total, dim=0).max())
    return apart / squares**0.5 if squares else float("inf") if apart else 0.0


def _check_update(batch: Batch, position: int, update: LayerUpdate, edit_set: EditSet) -> None:
    delta, where = edit_set.deltas[position], f"batch {batch.id!r}, {position}"
    m, d = delta.out_features, delta.in_features
    n = update.residuals.shape[1]
    expected = {"keys": (d, None), "residuals": (m, n), "directions": (d, n), "spread": (d, n)}
    for name, (rows, columns) in expected.items():
        tensor = getattr(update, name)
        if tensor is None:
            continue
        found = tuple(tensor.shape)
        if len(found) != 2 or found[0] != rows or columns not in (None, found[1]):
            raise ValueError(f"{where}.{name} must be [{rows}, {'n' if columns is None else columns}], got {found}")
        _check_values(f"{where}.{name}", tensor)
    if update.keys.shape[1] < n:
        raise ValueError(f"{where}.keys has {update.keys.shape[1]} columns for {n} residuals")
    if update.requests is not None and len(update.requests) != update.keys.shape[1]:
        raise ValueError(f"{where}.keys has {update.keys.shape[1]} columns, of the requests {list(update.requests)}")
    if edit_set.config.threshold_whitened and update.spread is None:
        raise ValueError(f"{where}.spread is missing, which threshold_whitened needs")


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    low, high = torch.aminmax(tensor)
    largest = max(-float(low), float(high))
    if not largest <= MOST_VALUE:  # NaN is not either; aminmax passes it on
        raise ValueError(f"{name} must be finite, with values up to {MOST_VALUE:g}, got {largest}")


def _norms(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
