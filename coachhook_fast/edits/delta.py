"""LowRankDelta: all edits of one layer as ``Delta = U B``.

docs/method.md section 4: ``Delta = sum_t R_t X_t^T`` has rank at most the number of edits. With orthonormal
columns in ``U``, ``||Delta k|| = ||B k||``, so the gate never needs the ``[m, d]`` matrix. Appending a batch:

    A = U^T R,   Q S = R - U A,   U <- [U Q],   B <- [B + A X^T ; S X^T].

Where ``r (m + d) >= m d`` the factors would be larger than ``Delta`` itself, and ``Delta`` is kept dense.

A delta may carry a metric ``W`` (`whitening.py`): the gate then measures ``||W B k||``, and what is served is
``(U W^-1) (W B)``, the same ``Delta``.

A delta never changes: every operation returns a new one, so a failed batch cannot leave half a state behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# A direction counts as zero when it is below this many units of rounding of what was added or cancelled. Residuals
# carry rounding of their own, amplified by the condition of what U spans: a few units would let noise take a rank.
_ROUNDING_UNITS = 128.0


class LowRankDelta:
    """``Delta = U B``: ``U`` ``[m, r]`` orthonormal, ``B`` ``[r, d]``; dense: ``U`` None, ``B`` ``[m, d]``.

    ``W`` ``[r, r]`` (dense: ``[m, m]``), None for the identity: orthogonal rows. ``append``, ``remove`` and
    ``truncate`` give deltas without one, for theirs is another.

    fp64 or fp32 is meant for editing; a serving copy may have any floating dtype (``to``).
    """

    __slots__ = ("B", "U", "W", "_served")

    U: Tensor | None
    B: Tensor
    W: Tensor | None

    def __init__(self, U: Tensor | None, B: Tensor, W: Tensor | None = None) -> None:
        """Wrap factors whose ``U`` is orthonormal already; ValueError on shapes or dtypes that cannot fit."""
        if B.dim() != 2 or not B.is_floating_point():
            raise ValueError(f"B must be a floating [r, d] matrix, got {B.dtype} {tuple(B.shape)}")
        if U is not None:
            if U.dim() != 2 or U.shape[1] != B.shape[0]:
                raise ValueError(f"U must be [m, {B.shape[0]}] to match B, got {tuple(U.shape)}")
            if U.dtype != B.dtype or U.device != B.device:
                raise ValueError(
                    f"U and B must share dtype and device, got {U.dtype} on {U.device} and {B.dtype} on {B.device}"
                )
        if W is not None and (W.shape != (B.shape[0], B.shape[0]) or W.dtype != B.dtype or W.device != B.device):
            raise ValueError(
                f"W must be [{B.shape[0]}, {B.shape[0]}] of B's {B.dtype} on {B.device}, got {W.dtype} "
                f"{tuple(W.shape)} on {W.device}"
            )
        self.U = U
        self.B = B
        self.W = W
        self._served: LowRankDelta | None = self if W is None else None

    @classmethod
    def zeros(
        cls,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LowRankDelta:
        """The empty delta: rank 0, shape ``[out_features, in_features]``."""
        if out_features < 1 or in_features < 1:
            raise ValueError(f"out_features and in_features must be positive, got {out_features}, {in_features}")
        U = torch.zeros(out_features, 0, dtype=dtype, device=device)
        return cls(U, torch.zeros(0, in_features, dtype=dtype, device=device))

    # ---------------------------------------------------------------- shape and size

    @property
    def is_dense(self) -> bool:
        return self.U is None

    @property
    def rank(self) -> int:
        """``r``: the number of columns of ``U``; for the dense form its upper bound ``min(m, d)``."""
        return min(self.B.shape) if self.U is None else self.B.shape[0]

    @property
    def out_features(self) -> int:
        return self.B.shape[0] if self.U is None else self.U.shape[0]

    @property
    def in_features(self) -> int:
        return self.B.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors (or by the dense matrix)."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    def __repr__(self) -> str:
        form = "dense" if self.is_dense else f"rank {self.rank}"
        return f"LowRankDelta({self.out_features}x{self.in_features}, {form}, {self.dtype}, {self.device})"

    # ---------------------------------------------------------------- edits

    def append(self, R: Tensor, X: Tensor) -> LowRankDelta:
        """``Delta + R X^T`` for residuals ``R`` ``[m, n]`` and solved keys ``X`` ``[d, n]``.

        The rank grows by the number of directions of ``R`` that ``U`` does not span yet, so it never passes
        ``min(edits, m)``. ValueError on wrong shapes or values that are not finite.
        """
        R, X = self._checked(R, X)
        if self.U is None:
            return LowRankDelta(None, torch.addmm(self.B, R, X.T))
        # Unit columns: a request with a small residual and a large X must not be taken for rounding noise.
        scale = torch.linalg.vector_norm(R, dim=0)
        kept = scale > 0
        if not bool(kept.any()):
            return LowRankDelta(self.U, self.B)
        R, X = R[:, kept] / scale[kept], X[:, kept] * scale[kept]
        A, Q, S = _split(self.U, R)
        B = torch.cat([torch.addmm(self.B, A, X.T), S @ X.T])
        return _smaller_form(torch.cat([self.U, Q], dim=1), B)

    def remove(self, R: Tensor, X: Tensor) -> LowRankDelta:
        """``Delta - R X^T``, the rank shrinking by the directions that nothing uses any more.

        In the dense form the rank is not looked for (that is a full SVD; ``truncate`` does it). A batch some 1e4 times
        as large as what is left, removed before, may have left rounding that keeps directions then: to be rid of it
        too, append what is left anew (as ``Editor.rollback`` does).
        """
        R, X = self._checked(R, X)
        after = self.append(-R, X)
        if after.U is None:
            return after
        # What cancels leaves rounding noise of the size of what was there before, not of what is left.
        before = float(torch.linalg.matrix_norm(self.B)) + float(
            torch.linalg.matrix_norm(R) * torch.linalg.matrix_norm(X)
        )
        P, sigma, _ = _row_space(after.B)
        return _rotated(after.U, after.B, P, int((sigma > _rounding(self.dtype) * before).sum()))

    def truncate(self, *, rank: int | None = None, tolerance: float | None = None) -> tuple[LowRankDelta, float]:
        """The nearest delta of smaller rank, and a bound on ``||Delta - Delta'||_2``.

        Give exactly one of ``rank`` (the most directions kept) and ``tolerance`` (the largest bound allowed,
        in the units of ``Delta``; as few directions as that needs are kept). A dense delta becomes factored
        if that is smaller.
        """
        if (rank is None) == (tolerance is None):
            raise ValueError(f"give exactly one of rank and tolerance, got rank={rank}, tolerance={tolerance}")
        if rank is not None and rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {tolerance}")
        P, sigma, noise = _row_space(self.B)
        if rank is None:
            assert tolerance is not None
            rank = int((sigma + noise > tolerance).sum())
        if rank >= sigma.numel():
            return LowRankDelta(self.U, self.B), 0.0
        bound = float(sigma[rank]) + noise
        U = torch.eye(self.out_features, dtype=self.dtype, device=self.device) if self.U is None else self.U
        return _rotated(U, self.B, P, rank), bound

    # ---------------------------------------------------------------- use

    def dense(self) -> Tensor:
        """``Delta`` itself, ``[m, d]``."""
        return self.B.clone() if self.U is None else self.U @ self.B

    def norms(self, keys: Tensor) -> Tensor:
        """What the gate measures for keys ``[..., d]``, at least in fp32: ``[...]``, ``||W B k||_2`` (``||Delta k||_2``
        without a metric)."""
        if keys.dim() < 1 or keys.shape[-1] != self.in_features:
            raise ValueError(f"keys must be [..., {self.in_features}], got {tuple(keys.shape)}")
        dtype = torch.promote_types(torch.promote_types(keys.dtype, self.dtype), torch.float32)
        projected = keys.to(device=self.device, dtype=dtype) @ self.B.to(dtype).T
        if self.W is not None:
            projected = projected @ self.W.to(dtype).T
        return torch.linalg.vector_norm(projected, dim=-1)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRankDelta:
        """A copy in another dtype or on another device (this object where nothing changes)."""
        B = self.B.to(dtype=dtype or self.dtype, device=device or self.device)
        if B is self.B:
            return self
        return LowRankDelta(None if self.U is None else self.U.to(B), B, None if self.W is None else self.W.to(B))

    def with_metric(self, W: Tensor) -> LowRankDelta:
        """The same ``Delta``, measured by ``W``, whose rows are orthogonal and not zero; ValueError on another shape,
        dtype or device."""
        return LowRankDelta(self.U, self.B, W)

    def served(self) -> LowRankDelta:
        """Factors ``(U W^-1, W B)`` for a gate that measures ``||B k||``; ``U`` is not orthonormal then.

        Rows scaled one by one: each direction of ``Delta`` keeps its own rounding, in half precision too.
        """
        if self._served is None:
            assert self.W is not None
            inverse = _inverse(self.W)
            self._served = LowRankDelta(inverse if self.U is None else self.U @ inverse, self.W @ self.B)
        return self._served

    def state_dict(self) -> dict[str, Tensor]:
        """``{"U", "B"}``, or ``{"B"}`` for the dense form, and ``"W"`` where there is a metric; what
        ``from_state_dict`` reads."""
        factors = {"U": self.U, "B": self.B, "W": self.W}
        return {name: tensor for name, tensor in factors.items() if tensor is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> LowRankDelta:
        """The delta that ``state_dict`` wrote; ValueError on missing or unknown keys, or a ``W`` without an inverse."""
        if not {"B"} <= set(state) <= {"U", "B", "W"}:
            raise ValueError(f"state must have the key B, and may have U and W, got {sorted(state)}")
        found = cls(state.get("U"), state["B"], state.get("W"))
        if found.W is not None and found.rank:
            probe = torch.linspace(1.0, 2.0, found.W.shape[0], dtype=found.dtype, device=found.device)
            if not torch.allclose(found.W @ (_inverse(found.W) @ probe), probe, rtol=1e-2):  # NaN is not close either
                raise ValueError("W must be finite with orthogonal rows other than zero")
        return found

    def _checked(self, R: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        m, d = self.out_features, self.in_features
        if R.dim() != 2 or R.shape[0] != m:
            raise ValueError(f"R must be [{m}, n], got {tuple(R.shape)}")
        if X.dim() != 2 or X.shape != (d, R.shape[1]):
            raise ValueError(f"X must be [{d}, {R.shape[1]}], got {tuple(X.shape)}")
        if not bool(torch.isfinite(R).all()):
            raise ValueError("R must be finite, got NaN or infinity")
        if not bool(torch.isfinite(X).all()):
            raise ValueError("X must be finite, got NaN or infinity")
        return R.to(self.B), X.to(self.B)


def _inverse(W: Tensor) -> Tensor:
    """Of a matrix with orthogonal rows."""
    return W.T / W.square().sum(dim=1)


def _rounding(dtype: torch.dtype) -> float:
    return _ROUNDING_UNITS * torch.finfo(dtype).eps


def _split(U: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``R = U A + Q S`` with ``[U Q]`` orthonormal; what of ``R`` lies inside ``U`` gives no column of ``Q``.

    U: ``[m, r]`` orthonormal. R: ``[m, n]``, columns of norm 1. Returns A ``[r, n]``,
    Q ``[m, q]``, S ``[q, n]``.
    """
    A = U.T @ R
    rest = R - U @ A
    again = U.T @ rest  # one projection leaves eps * ||R|| of U in `rest`; the second removes it
    A, rest = A + again, rest - U @ again
    Q, S = torch.linalg.qr(rest)
    # Rank-revealing: a dependent column gives Householder QR an arbitrary direction, which need not be
    # orthogonal to U. Singular directions above the noise lie in the range of `rest`.
    P, sigma, Wt = torch.linalg.svd(S, full_matrices=False)
    room = U.shape[0] - U.shape[1]
    kept = min(int((sigma > _rounding(R.dtype)).sum()), room)
    Q, S = Q @ P[:, :kept], sigma[:kept, None] * Wt[:kept]
    # A direction of size sigma carries eps/sigma of U: clean it once more, now that every column has norm 1.
    leak = U.T @ Q
    A = A + leak @ S
    Q, T = torch.linalg.qr(Q - U @ leak)
    return A, Q, T @ S


def _row_space(B: Tensor) -> tuple[Tensor, Tensor, float]:
    """Left singular vectors ``[k, r]`` (rows), singular values (descending) of ``B``, their rounding error.

    Through a QR of the longer side, so the SVD is of ``min(shape)`` square.
    """
    if B.numel() == 0:
        return B.new_zeros(0, B.shape[0]), B.new_zeros(0), 0.0
    if B.shape[0] <= B.shape[1]:
        T = torch.linalg.qr(B.T, mode="r").R.T  # B = T Q^T
    else:
        T = B
    P, sigma, _ = torch.linalg.svd(T, full_matrices=False)
    return P.T, sigma, float(sigma[0]) * _rounding(B.dtype)


def _rotated(U: Tensor, B: Tensor, P: Tensor, rank: int) -> LowRankDelta:
    """``U B`` restricted to the first ``rank`` left singular vectors of ``B`` (rows of ``P``)."""
    kept = P[:rank]
    return _smaller_form(U @ kept.T, kept @ B)


def _smaller_form(U: Tensor, B: Tensor) -> LowRankDelta:
    (m, r), d = U.shape, B.shape[1]
    return LowRankDelta(None, U @ B) if r * (m + d) >= m * d else LowRankDelta(U, B)
