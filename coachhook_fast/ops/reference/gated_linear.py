"""The gated projection in plain torch (docs/method.md section 3), with the traps of the published code closed.

    P = W0 k + b,   c = B k,   M = ||c||_2  (= ||Delta k||, U orthonormal),   O = P + U c
    calibrated:  fire = M >= tau
    relative:    fire = M >= tau ||k||      (`calibrated` with a threshold of its own for every token)
    sequence:    z = (M - mean M) / std M over the valid tokens of the sequence so far;   fire = z >= alpha
    out = O where fire, else P

Norms, statistics and decisions are in fp32 (fp64 for fp64 inputs) whatever the input dtype, and the norm
comes from ``c`` itself, never from the difference of two rounded outputs. NaN compares false: such a token
does not fire.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the operators decide by; "relative" is the gate `calibrated` with τ of ||Δk|| / ||k||.
RULES = ("calibrated", "relative", "sequence")


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32: the dtype of norms, statistics, thresholds and running state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_norm(
    x: Tensor,  # [..., d]
    B: Tensor,  # [r, d]
) -> Tensor:  # [...], accumulator dtype
    """``||B k||_2`` of every token."""
    dtype = accumulator_dtype(B.dtype)
    return torch.linalg.vector_norm(x.to(dtype) @ B.to(dtype).T, dim=-1)


@torch.no_grad()
def key_length(x: Tensor) -> Tensor:  # [..., d] -> [...], accumulator dtype
    """``||k||_2`` of every token."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=accumulator_dtype(x.dtype))


def relative_limit(
    length: Tensor,  # [...]: ||k||
    tau: Tensor,  # []
) -> Tensor:  # [...], dtype of tau
    """``tau ||k||`` of every token: what `relative` compares ``||Delta k||`` with. A key of zeros gets the smallest
    positive number: it does not fire."""
    return (tau * length.to(tau.dtype)).clamp(min=torch.finfo(tau.dtype).tiny)


def sequence_gate(
    norm: Tensor,  # [S, q], or [total] with cu_seqlens
    alpha: Tensor,  # []
    mask: Tensor | None = None,  # shape of norm, bool, True = a real token
    cu_seqlens: Tensor | None = None,  # [S + 1] int; tokens from cu_seqlens[-1] on are padding
    state: Tensor | None = None,  # [S, 3]: count, mean, M2 of the tokens before these
) -> tuple[Tensor, Tensor, Tensor]:  # fire (shape of norm), z (shape of norm), state [S, 3]
    """``z >= alpha`` against all valid tokens so far; unbiased std; under two tokens, or padding: never.

    The statistics of these tokens are merged with ``state`` by Chan's formula, which does not cancel.
    """
    dtype = accumulator_dtype(norm.dtype)
    valid = torch.ones_like(norm, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    if cu_seqlens is None:
        segment = torch.arange(norm.shape[0], device=norm.device)[:, None].expand_as(norm)
        segments = norm.shape[0]
    else:
        position = torch.arange(norm.shape[0], device=norm.device)
        segments = cu_seqlens.shape[0] - 1
        segment = torch.searchsorted(cu_seqlens[1:].to(torch.int64), position, right=True)
        valid = valid & (segment < segments)
        segment = segment.clamp(max=segments - 1)
    values = torch.where(valid, norm.to(dtype), 0.0)  # whatever sits in the padding, NaN included, stays out

    def total(per_token: Tensor) -> Tensor:  # [S]
        zeros = torch.zeros(segments, dtype=dtype, device=norm.device)
        return zeros.index_add(0, segment.reshape(-1), per_token.reshape(-1))

    count = total(valid.to(dtype))
    mean = total(values) / count.clamp(min=1.0)
    deviation = torch.where(valid, values - mean[segment], 0.0)
    m2 = total(deviation * deviation)
    if state is not None:
        count0, mean0, m20 = state.to(dtype).unbind(-1)
        both = count0 + count
        shift = mean - mean0
        share = count / both.clamp(min=1.0)
        mean = mean0 + shift * share
        m2 = m20 + m2 + shift * shift * count0 * share
        count = both
    std = torch.sqrt(m2 / (count - 1.0))  # count 1: 0/0, NaN
    z = torch.where(valid, (norm.to(dtype) - mean[segment]) / std[segment], torch.nan)
    fire = (z >= alpha.to(dtype)) & (count >= 2.0)[segment]
    return fire, z, torch.stack([count, mean, m2], dim=-1)


def correct(
    out: Tensor,  # [..., m]
    x: Tensor,  # [..., d]
    U: Tensor | None,  # [m, r], None: B is Delta
    B: Tensor,  # [r, d]
    fire: Tensor,  # [...] bool
) -> Tensor:  # [..., m], dtype of out
    """``out + U (B k)`` where ``fire``, else ``out`` bit for bit."""
    dtype = accumulator_dtype(B.dtype)
    return add(out, x.to(dtype) @ B.to(dtype).T, U, fire)


def add(
    out: Tensor,  # [..., m]
    c: Tensor,  # [..., r], accumulator dtype: B k
    U: Tensor | None,  # [m, r], None: c is Delta k
    fire: Tensor,  # [...] bool
) -> Tensor:  # [..., m], dtype of out
    """``out + U c`` where ``fire``, else ``out`` bit for bit."""
    if U is not None:
        c = c @ U.to(c.dtype).T
    return torch.where(fire[..., None], (out.to(c.dtype) + c).to(out.dtype), out)


def sequence_rows(shape: torch.Size, mask: Tensor | None, state: Tensor | None) -> int:
    """How many sequences the tokens hold: the mask knows, else the leading dimensions, else the state."""
    if mask is not None:
        return mask.shape[0]
    if len(shape) > 1:
        return shape[:-1].numel()
    return 1 if state is None else state.shape[0]


def decide(
    norm: Tensor,  # [...]
    threshold: Tensor,  # []: tau or alpha
    gate: str,  # one of RULES
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
    length: Tensor | None = None,  # [...]: ||k||, with relative
) -> tuple[Tensor, Tensor]:  # fire [...], state [S, 3] ([0, 3] but under sequence)
    """The decision for every token; tokens off the mask do not fire."""
    if gate != "sequence":
        if gate == "relative":
            assert length is not None
            threshold = relative_limit(length, threshold)
        fire = norm >= threshold.to(norm.dtype)
        if mask is not None:
            fire = fire & mask.reshape(norm.shape).to(torch.bool)
        return fire, norm.new_zeros(0, 3)
    if cu_seqlens is not None:
        grid = norm.reshape(-1)
    else:
        grid = norm.reshape(sequence_rows(norm.shape, mask, state), -1)
    mask = None if mask is None else mask.reshape(grid.shape)
    fire, _, state = sequence_gate(grid, threshold, mask, cu_seqlens, state)
    return fire.reshape(norm.shape), state


def check_gate(gate: str, threshold: Tensor) -> None:
    """ValueError unless `gate` is one of RULES and the threshold a scalar tensor."""
    if gate not in RULES:
        raise ValueError(f"gate must be one of {RULES}, got {gate!r}")
    if threshold.dim() > 0:
        raise ValueError(f"threshold must have no dimension, got {list(threshold.shape)}")


def gated_delta(
    out: Tensor,  # [..., m]: the base's output
    x: Tensor,  # [..., d]
    U: Tensor | None,
    B: Tensor,
    threshold: Tensor,
    gate: str = "calibrated",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # out [..., m], fire [...], state [S, 3]
    """The delta's part of the gated projection on any base's output."""
    check_gate(gate, threshold)
    with torch.no_grad():
        length = key_length(x) if gate == "relative" else None
        fire, state = decide(delta_norm(x, B), threshold, gate, mask, cu_seqlens, state, length)
    return correct(out, x, U, B, fire), fire, state


def gated_linear(
    x: Tensor,  # [..., d]
    weight: Tensor,  # [m, d]
    bias: Tensor | None,  # [m]
    U: Tensor | None,  # [m, r] orthonormal, None: B is Delta
    B: Tensor,  # [r, d]
    threshold: Tensor,  # []
    gate: str = "calibrated",
    mask: Tensor | None = None,  # [S, q] bool
    cu_seqlens: Tensor | None = None,  # [S + 1]
    state: Tensor | None = None,  # [S, 3]
) -> tuple[Tensor, Tensor, Tensor]:  # out [..., m], fire [...], state [S, 3]
    """Base projection and gated delta."""
    out = torch.nn.functional.linear(x, weight, bias)
    return gated_delta(out, x, U, B, threshold, gate, mask, cu_seqlens, state)
