"""The key memory C = λ E[k kᵀ] + Σ K Kᵀ of one layer, held as its Cholesky factor (docs/method.md section 4).

The factor is packed fp64, d (d + 1) / 2 numbers: as many bytes as the published code's fp32 C (and 4 d more), with
none of its rounding. Solving with it and adding or removing n keys costs O(d² n) and at most 2 (d + n) n
numbers of extra memory besides the result; nothing of size d × d is ever formed, except by :meth:`KeyMemory.matrix`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook_fast.ops import cholesky as ops
from coachhook_fast.ops.reference.cholesky import PANEL, dimension, pack, unpack

_FORMAT = "coachhook-key-memory"
_VERSION = "1"
# How far E[k kᵀ] may be from its transpose, relative to its largest entry: rounding of an accumulated product.
_ASYMMETRY = {torch.float32: 1e-4, torch.float64: 1e-8}


class KeyMemory:
    """C of one layer as its packed Cholesky factor.

    The factor lives on its own device: on an accelerator, or in host memory beside a model that is on one. Keys may
    come in any floating type and from any device; results are fp64 on the keys' device.
    """

    def __init__(self, factor: Tensor) -> None:
        """factor: packed fp64 [d (d + 1) / 2], contiguous, owned by the new object from here on."""
        if factor.dtype != torch.float64 or factor.dim() != 1 or not factor.is_contiguous():
            raise ValueError(
                "factor must be a contiguous float64 [d (d + 1) / 2], got "
                f"{factor.dtype} {list(factor.shape)} with strides {factor.stride()}"
            )
        self.dim = dimension(factor)
        self.factor = factor

    @classmethod
    def from_second_moment(
        cls, moment: Tensor, weight: float, *, device: torch.device | str | None = None
    ) -> KeyMemory:
        """C = weight · moment.

        moment: E[k kᵀ], [d, d], fp32 or fp64. weight: λ, ``mom2_update_weight``. device: where the factor is to
        live (default: where moment is). ValueError if moment is not finite, symmetric and positive definite.
        """
        if moment.dim() != 2 or moment.shape[0] != moment.shape[1] or moment.shape[0] == 0:
            raise ValueError(f"moment must be [d, d], got {list(moment.shape)}")
        if moment.dtype not in _ASYMMETRY:
            raise ValueError(f"moment must be float32 or float64, got {moment.dtype}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight must be positive, got {weight}")
        moment = moment.detach()
        _check_symmetric(moment)
        packed = pack(moment, dtype=torch.float64)
        if device is not None:
            packed = packed.to(device)
        try:
            return cls(ops.chol_factor(packed.mul_(weight)))
        except ValueError as error:
            raise ValueError(f"moment must be positive definite: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the factor: 4 d² + 4 d."""
        return self.factor.nbytes

    @property
    def device(self) -> torch.device:
        return self.factor.device

    def solve(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """X = (C + K Kᵀ)⁻¹ K [d, n] and the leverage s = diag(Kᵀ C⁻¹ K) [n], for K [d, n]."""
        X, s = ops.chol_solve(self.factor, self._keys(K))
        return X.to(K.device), s.to(K.device)

    def update(self, K: Tensor) -> None:
        """C ← C + K Kᵀ for K [d, n]. All or nothing."""
        ops.chol_update(self.factor, self._keys(K))

    def solve_update(self, K: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`solve` with the C before, and :meth:`update`, for about the price of one of them."""
        X, s = ops.chol_solve_update(self.factor, self._keys(K))
        return X.to(K.device), s.to(K.device)

    def downdate(self, K: Tensor) -> None:
        """C ← C − K Kᵀ for K [d, n]; ValueError, with C as before, if that is not positive definite."""
        ops.chol_downdate(self.factor, self._keys(K))

    def clone(self) -> KeyMemory:
        return KeyMemory(self.factor.clone())

    def to(self, device: torch.device | str) -> KeyMemory:
        """The same memory on another device; this object where it is there already."""
        moved = self.factor.to(device)
        return self if moved is self.factor else KeyMemory(moved)

    def matrix(self) -> Tensor:
        """C itself, [d, d] fp64: for tests and inspection."""
        lower = unpack(self.factor)
        return lower @ lower.mT

    def state_dict(self) -> dict[str, Tensor]:
        """{"factor": packed fp64 [d (d + 1) / 2]}, sharing memory with this object."""
        return {"factor": self.factor}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> KeyMemory:
        """The inverse of :meth:`state_dict`; takes the tensor, does not copy it."""
        if set(state) != {"factor"}:
            raise ValueError(f"state must have exactly the key 'factor', got {sorted(state)}")
        return cls(state["factor"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; a reader sees the old file or the new one."""
        save_memories(path, {"factor": self})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> KeyMemory:
        """Read :meth:`save`'s file. On the CPU it is mapped, not read: pages come in as they are used, and changes
        stay private to this process. ValueError for a file of another kind, version or layout."""
        memories = load_memories(path, device=device)
        if set(memories) != {"factor"}:
            raise ValueError(f"path must hold one key memory, {os.fspath(path)!r} has {sorted(memories)}")
        return memories["factor"]

    def __repr__(self) -> str:
        return f"KeyMemory(dim={self.dim}, device={str(self.device)!r}, nbytes={self.nbytes})"

    def _keys(self, K: Tensor) -> Tensor:
        if K.dim() != 2 or K.shape[0] != self.dim:
            raise ValueError(f"K must be [{self.dim}, n], got {list(K.shape)}")
        if not K.dtype.is_floating_point:
            raise ValueError(f"K must be floating point, got {K.dtype}")
        return K.detach().to(self.factor)


def save_memories(path: str | os.PathLike[str], memories: Mapping[str, KeyMemory]) -> None:
    """Write several memories (a name each) to one safetensors file, on disk when this returns."""
    path = Path(path)
    metadata = {"format": _FORMAT, "version": _VERSION, "panel": str(PANEL)}
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: memory.factor for name, memory in memories.items()}, staged, metadata=metadata)
        with open(staged, "rb+") as file:
            os.fsync(file.fileno())
        staged.replace(path)  # never in place: the file may be mapped by a reader, this process among them
    finally:
        staged.unlink(missing_ok=True)


def load_memories(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> dict[str, KeyMemory]:
    """Read :func:`save_memories`' file, mapped on the CPU. ValueError if it is not one, or of another version."""
    expected = {"format": _FORMAT, "version": _VERSION, "panel": str(PANEL)}
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        for key, value in expected.items():
            if metadata.get(key) != value:
                raise ValueError(
                    f"path must be a key memory file with {key} {value!r}, "
                    f"{os.fspath(path)!r} has {metadata.get(key)!r}"
                )
        return {name: KeyMemory(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _check_symmetric(moment: Tensor) -> None:
    """Panel by panel, so that no second [d, d] is formed."""
    d = moment.shape[0]
    largest = worst = 0.0
    for first in range(0, d, PANEL):
        rows, columns = moment[first : first + PANEL, first:], moment[first:, first : first + PANEL].mT
        size = float(rows.abs().max())
        if not (math.isfinite(size) and bool(columns.isfinite().all())):
            raise ValueError("moment must be finite, got NaN or infinity")
        largest = max(largest, size)
        worst = max(worst, float((rows - columns).abs().max()))
    if worst > _ASYMMETRY[moment.dtype] * largest:
        raise ValueError(
            f"moment must be symmetric, but differs from its transpose by {worst:.3g} (largest entry {largest:.3g})"
        )


__all__ = ["KeyMemory", "load_memories", "save_memories"]
