"""``torch.ops.coachhook.rms_norm``, ``silu_product`` and ``rotary``: one operation each, forward and back.

``coachhook_fast.ops.reference.block_parts`` has the definitions. fp32 and fp64; in C++ on CPU, the definition anywhere
else. Gradients of what a block computes; none of weights, cosines and sines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coachhook_fast.ops import _library
from coachhook_fast.ops.reference import block_parts as reference


def _fake_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _fake_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fake_product(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_product_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _fake_rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    B, H, S, D = x.shape
    return x.new_empty(B, S, H, D).transpose(1, 2)


for _schema, _definition, _fake in (
    ("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", reference.rms_norm, _fake_norm),
    (
        "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor",
        reference.rms_norm_backward,
        _fake_norm_backward,
    ),
    ("silu_product(Tensor gate, Tensor up) -> Tensor", reference.silu_product, _fake_product),
    (
        "silu_product_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
        reference.silu_product_backward,
        _fake_product_backward,
    ),
    ("rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", reference.rotary, _fake_rotary),
):
    _library.define(_schema, _definition, _fake)

rms_norm = torch.ops.coachhook.rms_norm
silu_product = torch.ops.coachhook.silu_product
rotary = torch.ops.coachhook.rotary


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward_norm(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return torch.ops.coachhook.rms_norm_backward(grad, *ctx.saved_tensors), None, None


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(torch.ops.coachhook.silu_product_backward(grad, *ctx.saved_tensors))


def _save_rotary(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _backward_rotary(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return rotary(grad, *ctx.saved_tensors, not ctx.back), None, None, None


for _name, _backward, _save in (
    ("rms_norm", _backward_norm, _save_norm),
    ("silu_product", _backward_product, _save_product),
    ("rotary", _backward_rotary, _save_rotary),
):
    torch.library.register_autograd(f"coachhook::{_name}", _backward, setup_context=_save, lib=_library.LIBRARY)
