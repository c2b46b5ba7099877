"""Down-projections whose columns are shared out over ranks: tensor-parallel transformers.

Each rank holds the columns of W0, of B and of the keys that are its own, and all of U. The base's output is whole on
every rank, so the correction is made from whole coordinates:

    c = Σ_ranks B_rank k_rank,   M = ||c||,   out + U c where the gate fires

One all-reduce of r numbers a token. Every rank gets the same bits of c, so all decide alike.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.reference.gated_linear import accumulator_dtype


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether ranks share the model's weights out: all of them then run every pass, and none can work on its own."""
    return any(is_distributed(parameter) for parameter in model.parameters())


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, without importing them where nobody has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor that may be a DTensor."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ColumnShard:
    """This rank's columns of a down-projection, and the gated projection's parts on them.

    Attributes:
        group: the ranks that share it.
        start, stop: this one's columns of `size`.
    """

    group: Any
    start: int
    stop: int
    size: int

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's columns of `tensor`, which holds all [..., d] or these only."""
        return tensor[..., self.start : self.stop] if tensor.shape[-1] == self.size else tensor

    @torch.no_grad()
    def whole(self, own: Tensor) -> Tensor:
        """[..., d] of all ranks' columns of it."""
        width = -(-self.size // self.group.size())  # the first ranks hold so many, the last what is left
        padded = nn.functional.pad(own, (0, width - own.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.group.size())]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat(parts, dim=-1)[..., : self.size]

    def coordinates(self, x: Tensor, B: Tensor) -> Tensor:
        """c [..., r] in fp32 or fp64, from this rank's columns of keys and B (or from whole keys)."""
        dtype = accumulator_dtype(B.dtype)
        with torch.autocast(x.device.type, enabled=False):
            partial = self.own(x).to(dtype) @ B.to(dtype).T
        return _Sum.apply(partial, self.group)  # type: ignore[no-any-return]

    def delta_norm(self, x: Tensor, B: Tensor) -> Tensor:
        """``ops.delta_norm``."""
        return torch.linalg.vector_norm(self.coordinates(x, B), dim=-1)

    @torch.no_grad()
    def key_length(self, x: Tensor) -> Tensor:
        """``ops.key_length``."""
        total = reference.key_length(self.own(x)).square()
        dist.all_reduce(total, group=self.group)
        return total.sqrt()

    def correct(self, out: Tensor, x: Tensor, U: Tensor | None, B: Tensor, fire: Tensor) -> Tensor:
        """``ops.correct``."""
        c = self.coordinates(x, B)
        with torch.autocast(x.device.type, enabled=False):
            return reference.add(out, c, U, fire)

    def gated_delta(
        self,
        out: Tensor,
        x: Tensor,
        U: Tensor | None,
        B: Tensor,
        threshold: Tensor,
        _: Any,
        gate: str,
        mask: Any,
        cu_seqlens: Any,
        state: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``ops.gated_delta``; a sketch would need an all-reduce of its own and is not used."""
        c = self.coordinates(x, B)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(c, dim=-1)
            length = self.key_length(x) if gate == "relative" else None
            fire, state = reference.decide(norm, threshold, gate, mask, cu_seqlens, state, length)
        with torch.autocast(x.device.type, enabled=False):
            return reference.add(out, c, U, fire), fire, state


class _Sum(torch.autograd.Function):
    """Sum over ranks. What follows is computed by every rank alike, so each has the whole gradient already."""

    @staticmethod
    def forward(_: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def column_shard(base: nn.Module) -> ColumnShard | None:
    """This rank's columns of `base`, a row-parallel nn.Linear of tensor-parallel transformers; None where it is whole.

    Raises:
        ValueError: the weight is shared out in another way (FSDP, column-parallel).
    """
    weight: Any = getattr(base, "weight", None)
    if not is_distributed(weight):
        return None
    axes = [axis for axis, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not axes:
        return None
    if len(axes) > 1 or not weight.placements[axes[0]].is_shard(1) or type(base) is not nn.Linear:
        raise ValueError(
            f"base_layer is a {type(base).__name__} whose weight is distributed as {weight.placements}: edits need "
            "a down-projection that is whole, or shared out by columns as in transformers' tensor-parallel plans"
        )
    mesh, size = weight.device_mesh, int(weight.shape[1])
    width = -(-size // mesh.size(axes[0]))
    start = min(mesh.get_local_rank(axes[0]) * width, size)
    return ColumnShard(mesh.get_group(axes[0]), start, min(start + width, size), size)
