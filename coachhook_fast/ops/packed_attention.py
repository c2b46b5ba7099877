"""``torch.ops.coachhook.packed_attention``: attention of packed rows behind a fixed prefix of each.

``ops.reference.packed_attention`` has the definition and every argument's shape. fp32 and fp64; in C++ on
CPU, the definition anywhere else. Gradients of q, k and v; none of the prefix and the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coachhook_fast.ops import _library
from coachhook_fast.ops.reference import packed_attention as reference

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v"


def _fake(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Any, starts: Any, most: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(*q.shape[:2], prefix_k.shape[2] + most)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prefix_k: Any, prefix_v: Any, weights: Any, starts: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_library.define(
    f"packed_attention({_INPUTS}, Tensor? mask, Tensor cu_seqlens, int max_seqlen, float scale) -> (Tensor, Tensor)",
    reference.packed_attention,
    _fake,
)
_library.define(
    f"packed_attention_backward(Tensor grad, {_INPUTS}, Tensor weights, Tensor cu_seqlens, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    reference.packed_attention_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefix_k, prefix_v, _, cu_seqlens, _, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, prefix_k, prefix_v, output[1], cu_seqlens)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    found = torch.ops.coachhook.packed_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return *found, *([None] * 6)


torch.library.register_autograd("coachhook::packed_attention", _backward, setup_context=_save, lib=_library.LIBRARY)

packed_attention = torch.ops.coachhook.packed_attention
