"""``torch.ops.coachhook.gated_linear`` and its parts: schemas, fakes, gradients, autocast.

One definition (``reference/gated_linear.py``) runs where no kernel is registered; csrc/gated_linear takes the CPU key,
 csrc/cuda (few tokens) and ``ops/gated_linear_cuda.py`` (Triton) the CUDA key. No op changes an
argument. The decision is a constant to autograd:

    grad_x = g W + fire * (g U) B,   grad_W = g^T x,   grad_b = sum g.

Under autocast the base projection is autocast's; the delta keeps its own dtype, so the gate does not move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coachhook_fast.ops._library import LIBRARY, build_info, define
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.reference.gated_linear import accumulator_dtype, key_length, sequence_rows

GateOutput = tuple[Tensor, Tensor, Tensor]


def delta_norm(
    x: Tensor,  # [..., d]
    B: Tensor,  # [r, d]
) -> Tensor:  # [...], fp32 (fp64 for fp64)
    """``||B k||_2`` of every token."""
    return torch.ops.coachhook.delta_norm(x, B)


def sequence_gate(
    norm: Tensor,  # [S, q], or [total] with cu_seqlens
    alpha: Tensor,  # []
    mask: Tensor | None = None,  # shape of norm, bool
    cu_seqlens: Tensor | None = None,  # [S + 1]
    state: Tensor | None = None,  # [S, 3]: count, mean, M2
) -> GateOutput:  # fire, z (shape of norm), state [S, 3]
    """``z >= alpha`` against all valid tokens so far (``reference.sequence_gate``)."""
    return torch.ops.coachhook.sequence_gate(norm, alpha, mask, cu_seqlens, state)


def correct(
    out: Tensor,  # [..., m]
    x: Tensor,  # [..., d]
    U: Tensor | None,  # [m, r], None: B is Delta
    B: Tensor,  # [r, d]
    fire: Tensor,  # [...] bool
) -> Tensor:  # [..., m]
    """``out + U (B k)`` where ``fire``, else ``out`` bit for bit."""
    return torch.ops.coachhook.correct(out, x, U, B, fire)


def gated_delta(
    out: Tensor,  # [..., m]: any base's output
    x: Tensor,  # [..., d]
    U: Tensor | None,  # [m, r], None: B is Delta
    B: Tensor,  # [r, d]
    threshold: Tensor,  # []: tau or alpha
    sketch: Tensor | None = None,  # [s, d]: ||sketch k|| < tau decides against firing; not under sequence
    gate: str = "calibrated",
    mask: Tensor | None = None,  # [S, q] bool
    cu_seqlens: Tensor | None = None,  # [S + 1]
    state: Tensor | None = None,  # [S, 3]
) -> GateOutput:  # out [..., m], fire [...], state [S, 3] ([0, 3] but under sequence)
    """Gate and correction of a base's output; ``out`` itself is not changed."""
    return torch.ops.coachhook.gated_delta(out, x, U, B, threshold, sketch, gate, mask, cu_seqlens, state)


def gated_linear(
    x: Tensor,  # [..., d]
    weight: Tensor,  # [m, d], any strides
    bias: Tensor | None,  # [m]
    U: Tensor | None,  # [m, r], None: B is Delta
    B: Tensor,  # [r, d]
    threshold: Tensor,  # []
    sketch: Tensor | None = None,  # [s, d]
    gate: str = "calibrated",
    mask: Tensor | None = None,  # [S, q] bool
    cu_seqlens: Tensor | None = None,  # [S + 1]
    state: Tensor | None = None,  # [S, 3]
) -> GateOutput:  # out [..., m], fire [...], state [S, 3] ([0, 3] but under sequence)
    """Base projection, gate and correction in one op."""
    return torch.ops.coachhook.gated_linear(x, weight, bias, U, B, threshold, sketch, gate, mask, cu_seqlens, state)


__all__ = ["correct", "delta_norm", "gated_delta", "gated_linear", "key_length", "sequence_gate"]


# -------------------------------------------------------------------------------- plain definitions and fakes
# The dispatcher leaves trailing arguments out where they equal the schema's defaults, so these repeat them.


def _plain_delta(
    out: Tensor,
    x: Tensor,
    U: Tensor | None,
    B: Tensor,
    threshold: Tensor,
    sketch: Tensor | None = None,
    gate: str = "calibrated",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> GateOutput:
    # The sketch only saves work; the plain definition measures every token.
    with torch.autocast(x.device.type, enabled=False):
        return reference.gated_delta(out, x, U, B, threshold, gate, mask, cu_seqlens, state)


def _plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *delta: Any) -> GateOutput:
    with torch.autocast(x.device.type, enabled=False):
        out = torch.nn.functional.linear(x, weight, bias)
    return _plain_delta(out, x, *delta)


def _fake_norm(x: Tensor, B: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=accumulator_dtype(B.dtype))


def _fake_sequence_gate(
    norm: Tensor,
    alpha: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> GateOutput:
    dtype = accumulator_dtype(norm.dtype)
    segments = norm.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    z = torch.empty_like(norm, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.empty_like(z, dtype=torch.bool), z, norm.new_empty(segments, 3, dtype=dtype)


def _fake_correct(out: Tensor, x: Tensor, U: Tensor | None, B: Tensor, fire: Tensor) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _fake_delta(
    out: Tensor,
    x: Tensor,
    U: Tensor | None,
    B: Tensor,
    threshold: Tensor,
    sketch: Tensor | None = None,
    gate: str = "calibrated",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> GateOutput:
    if gate != "sequence":
        segments = 0
    elif cu_seqlens is not None:
        segments = cu_seqlens.shape[0] - 1
    else:
        segments = sequence_rows(x.shape[:-1], mask, state)
    after = x.new_empty(segments, 3, dtype=accumulator_dtype(B.dtype))
    result = torch.empty_like(out, memory_format=torch.contiguous_format)
    return result, x.new_empty(x.shape[:-1], dtype=torch.bool), after


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *delta: Any) -> GateOutput:
    return _fake_delta(x.new_empty((*x.shape[:-1], weight.shape[0])), x, *delta)


_DELTA = (
    "Tensor? U, Tensor B, Tensor threshold, Tensor? sketch=None, str gate='calibrated', "
    "Tensor? mask=None, Tensor? cu_seqlens=None, Tensor? state=None) -> (Tensor, Tensor, Tensor)"
)

define("delta_norm(Tensor x, Tensor B) -> Tensor", reference.delta_norm, _fake_norm)
define(
    "sequence_gate(Tensor norm, Tensor alpha, Tensor? mask=None, Tensor? cu_seqlens=None, "
    "Tensor? state=None) -> (Tensor, Tensor, Tensor)",
    reference.sequence_gate,
    _fake_sequence_gate,
)
define(
    "correct(Tensor out, Tensor x, Tensor? U, Tensor B, Tensor fire) -> Tensor",
    reference.correct,
    _fake_correct,
)
# An extension with csrc/cuda takes the CUDA key of these two, and sends what it leaves to Triton to "..._triton".
for _suffix in ("", "_triton") if build_info().get("cuda") else ("",):
    define(f"gated_delta{_suffix}(Tensor out, Tensor x, {_DELTA}", _plain_delta, _fake_delta)
    define(f"gated_linear{_suffix}(Tensor x, Tensor weight, Tensor? bias, {_DELTA}", _plain_linear, _fake_linear)


# -------------------------------------------------------------------------------- gradients


def _delta_grad(grad: Tensor, base: Tensor, U: Tensor | None, B: Tensor, fire: Tensor) -> Tensor:
    """``base + fire * (g U) B``: the correction with the factors' roles exchanged."""
    return correct(base, grad, None if U is None else B.T, B.T if U is None else U.T, fire)


def _save_correct(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, U, B, fire = inputs
    ctx.save_for_backward(U, B, fire)
    ctx.x_dtype = x.dtype


def _backward_correct(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    U, B, fire = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[1]:
        grad_x = _delta_grad(grad, _zeros_for(grad, B, ctx.x_dtype), U, B, fire)
    return grad, grad_x, None, None, None


def _zeros_for(grad: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_zeros((*grad.shape[:-1], B.shape[1]), dtype=dtype)


def _save_delta(ctx: Any, inputs: tuple[Any, ...], output: GateOutput) -> None:
    _, x, U, B = inputs[:4]
    ctx.save_for_backward(U, B, output[1])
    ctx.x_dtype = x.dtype


def _backward_delta(ctx: Any, grad: Tensor, _fire: Any, _state: Any) -> tuple[Tensor | None, ...]:
    U, B, fire = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[1]:
        grad_x = _delta_grad(grad, _zeros_for(grad, B, ctx.x_dtype), U, B, fire)
    return grad, grad_x, *([None] * 8)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: GateOutput) -> None:
    x, weight, _, U, B = inputs[:5]
    ctx.save_for_backward(x if weight.requires_grad else None, weight, U, B, output[1])


def _backward_linear(ctx: Any, grad: Tensor, _fire: Any, _state: Any) -> tuple[Tensor | None, ...]:
    x, weight, U, B, fire = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[0]:
        grad_x = _delta_grad(grad, grad @ weight, U, B, fire)
    if ctx.needs_input_grad[1]:
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_x, grad_weight, grad_bias, *([None] * 8)


for _name, _backward, _save in (
    ("correct", _backward_correct, _save_correct),
    ("gated_delta", _backward_delta, _save_delta),
    ("gated_linear", _backward_linear, _save_linear),
):
    torch.library.register_autograd(f"coachhook::{_name}", _backward, setup_context=_save, lib=LIBRARY)


# -------------------------------------------------------------------------------- autocast


def _autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *delta: Any) -> GateOutput:
    # Autocast is still on here: it casts the base projection (and keeps its cache of cast weights).
    return torch.ops.coachhook.gated_delta(torch.nn.functional.linear(x, weight, bias), x, *delta)


for _device in ("AutocastCPU", "AutocastCUDA"):
    LIBRARY.impl("gated_linear", _autocast_linear, _device)
