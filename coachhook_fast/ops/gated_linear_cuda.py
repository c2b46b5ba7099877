"""The CUDA key of the gated projection: which Triton kernels run for which shape. No host sync anywhere.

fp64, and a machine without Triton, run the plain definition.
"""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coachhook_fast.ops import overlapped_product
from coachhook_fast.ops._library import LIBRARY, build_info
from coachhook_fast.ops.overlapped_base import Base, overlapped_base
from coachhook_fast.ops.overlapped_product import Cut
from coachhook_fast.ops.reference import gated_linear as reference
from coachhook_fast.ops.reference.gated_linear import accumulator_dtype, sequence_rows
from coachhook_fast.ops.replayed import Buffers, awaited, kept

if TYPE_CHECKING:
    from coachhook_fast.kernels.delta_norm import Parts

GateOutput = tuple[Tensor, Tensor, Tensor]

# Up to so many tokens, and up to this rank, Triton does all in one launch (where csrc/cuda has not taken the call
# already); beyond, cuBLAS does the base, and the delta's kernels correct it. Measured:
# docs/experiments/gated-linear-gpu-choices.md.
DECODE_TOKENS = 32
DECODE_RANK = 256
# In one launch, B is read as soon as one token is undecided: with 10 % undecided, likelier than not above this.
TWO_STAGE_DECODE_TOKENS = 6
# Multiply-adds of x B^T up to which a sketch does not pay: some token of a few is undecided, which takes the bytes of
# all of B, and two launches more.
EXACT = 3_500_000_000


def decodes(x: Tensor, weight: Tensor, B: Tensor) -> bool:
    """Whether one launch is the best way. It rounds one factor to the other's dtype where they differ, and in fp32 the
    tensor cores are idle."""
    if B.dtype == torch.float32 or not x.dtype == weight.dtype == B.dtype:
        return False
    limit = DECODE_TOKENS if B.shape[0] <= DECODE_RANK else TWO_STAGE_DECODE_TOKENS
    return x.shape[:-1].numel() <= limit


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``[tokens, d]`` with contiguous columns, in the dtype of the delta."""
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _flat(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.bool).reshape(-1).contiguous()


def _check(
    x: Tensor,
    U: Tensor | None,
    B: Tensor,
    *,
    out: Tensor | None = None,
    weight: Tensor | None = None,
    sketch: Tensor | None = None,
    mask: Tensor | None = None,
    fire: Tensor | None = None,
) -> None:
    """ValueError for shapes that the kernels, which go by pointers, would read past; the CPU operator's rules."""
    tokens, m = x.shape[:-1], B.shape[0] if U is None else U.shape[0]
    if B.dim() != 2 or x.shape[-1:] != B.shape[1:]:
        raise ValueError(f"x must be [..., d] and B [r, d], got {list(x.shape)} and {list(B.shape)}")
    if U is not None and (U.shape[1:] != B.shape[:1] or U.dtype != B.dtype):
        raise ValueError(f"U must be [m, {B.shape[0]}] in {B.dtype}, got {list(U.shape)} in {U.dtype}")
    if weight is not None and weight.shape != (m, x.shape[-1]):
        raise ValueError(f"weight must be {[m, x.shape[-1]]}, got {list(weight.shape)}")
    if sketch is not None and (sketch.shape[1:] != B.shape[1:] or len(sketch) == 0 or sketch.dtype != B.dtype):
        raise ValueError(
            f"sketch must be [s, {B.shape[1]}] in {B.dtype}, with rows, got {list(sketch.shape)} in {sketch.dtype}"
        )
    if out is not None and out.shape != (*tokens, m):
        raise ValueError(f"out must be {[*tokens, m]}, got {list(out.shape)}")
    for name, flags in (("mask", mask), ("fire", fire)):
        if flags is not None and flags.numel() != tokens.numel():
            raise ValueError(f"{name} must cover {tokens.numel()} tokens, got {list(flags.shape)}")


def _limits(x: Tensor, threshold: Tensor, gate: str) -> Tensor:
    """``[]``, or ``[tokens]`` fp32 under `relative`."""
    if gate != "relative":
        return threshold
    return reference.relative_limit(reference.key_length(x), threshold.to(torch.float32)).reshape(-1)


def _correct_calibrated(
    base: Base,  # its output is changed in place
    x: Tensor,  # [tokens, d]
    U: Tensor | None,
    B: Tensor,
    tau: Tensor,
    mask: Tensor | None,  # [tokens]
    sketched: bool,
    parts: Parts,  # of the sketch, or of B
    early: bool,
) -> Tensor:  # fire [tokens]
    from coachhook_fast.kernels import gate as gate_kernels
    from coachhook_fast.kernels import listed as listed_kernels
    from coachhook_fast.kernels.launches import scratch

    tokens, lengths = x.shape[0], parts.lengths
    fire = scratch(tokens, dtype=torch.bool, device=x.device)
    if sketched:
        undecided = gate_kernels.decide(parts, tokens, tau, mask, fire=fire, lengths=lengths, first_stage=True)
        parts = listed_kernels.project_listed(x, B, undecided.listed, parts.counts)
        mask, lengths = None, None if lengths is None else lengths[:1]
    if U is None:
        base.join()
        gate_kernels.decide(parts, tokens, tau, mask, fire=fire, lengths=lengths, out=base.out)
    else:
        fired = gate_kernels.decide(parts, tokens, tau, mask, fire=fire, lengths=lengths, keep=True, early=early)
        base.join()
        places = fired.places if sketched else fired.listed
        gate_kernels.correct(base.out, parts.values, U, places, *fired[1:], early=early)
    return fire


def _correct_sequence(
    base: Base,  # its output is changed in place
    x: Tensor,  # [tokens, d]
    shape: torch.Size,  # the tokens' own
    U: Tensor | None,
    B: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    parts: Parts,
) -> tuple[Tensor, Tensor]:  # fire [tokens], state [S, 3]
    from coachhook_fast.kernels import gate as gate_kernels
    from coachhook_fast.kernels import sequence as sequence_kernels
    from coachhook_fast.kernels.launches import scratch

    norm = scratch(x.shape[0], dtype=torch.float32, device=x.device)
    gate_kernels.decide(parts, x.shape[0], norm=norm, keep=U is not None)
    if cu_seqlens is None:
        norm = norm.view(sequence_rows(shape, mask, state), -1)
    state = None if state is None else state.to(torch.float32).contiguous()
    fire, _, after = sequence_kernels.sequence(norm, alpha, _flat(mask), cu_seqlens, state)
    fire = fire.view(-1)
    listed, counts = gate_kernels.list_fired(fire)
    src, a = (x, B) if U is None else (parts.values, U)
    base.join()
    gate_kernels.correct(base.out, src, a, listed, listed, counts[0])
    return fire, after


def _useful(sketch: Tensor | None, tokens: int, B: Tensor, gate: str) -> Tensor | None:
    """The sketch, if it is worth its launches."""
    return None if gate == "sequence" or tokens * B.numel() <= EXACT else sketch


def _cut(x: Tensor, m: int, B: Tensor, sketch: Tensor | None, gate: str) -> Cut | None:
    """The blocks of the first product, where it fits beside the base ``[m, d]``."""
    if gate == "sequence":
        return None
    p = B if sketch is None else sketch
    return overlapped_product.cut_of(x, p, m, lengths=gate == "relative", sketched=sketch is not None)


def _delta(
    base: Base,  # its output is changed in place
    x: Tensor,  # [..., d]
    U: Tensor | None,
    B: Tensor,
    threshold: Tensor,
    sketch: Tensor | None,
    gate: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor | None,
    cut: Cut | None = None,  # of the product, beside a base
) -> tuple[Tensor, Tensor]:  # fire [tokens], state
    from coachhook_fast.kernels import delta_norm as project_kernels

    rows = _rows(x, B.dtype)
    # Three kernels that wait for one another alone. With more, or beside a base that wants the machine too, an early
    # start costs (measured).
    early = gate != "sequence" and sketch is None and U is not None and not base.is_overlapped
    p = B if sketch is None else sketch
    if cut is None:
        parts = project_kernels.project(rows, p, want_length=gate == "relative", early=early)
    else:
        parts = overlapped_product.project(rows, p, cut, want_length=gate == "relative")
    if gate == "sequence":
        return _correct_sequence(base, rows, x.shape[:-1], U, B, threshold, mask, cu_seqlens, state, parts)
    fire = _correct_calibrated(base, rows, U, B, threshold, _flat(mask), sketch is not None, parts, early)
    return fire, torch.empty(0, 3, dtype=accumulator_dtype(B.dtype), device=x.device)


def _has_kernels(x: Tensor, B: Tensor) -> bool:
    return x.numel() > 0 and B.dtype in (torch.float32, torch.bfloat16, torch.float16)


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    U: Tensor | None,
    B: Tensor,
    threshold: Tensor,
    sketch: Tensor | None = None,
    gate: str = "calibrated",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> GateOutput:
    """``ops.gated_linear`` by the dispatch table."""
    reference.check_gate(gate, threshold)
    _check(x, U, B, weight=weight, sketch=sketch, mask=mask)
    if not _has_kernels(x, B):
        out = torch.nn.functional.linear(x, weight, bias)
        return reference.gated_delta(out, x, U, B, threshold, gate, mask, cu_seqlens, state)
    tokens = x.shape[:-1].numel()
    one_each = gate != "sequence" or (cu_seqlens is None and sequence_rows(x.shape[:-1], mask, state) == tokens)
    shape = (*x.shape[:-1], weight.shape[0])
    # one launch takes counters that someone must set to zero: no replay does that
    if one_each and decodes(x, weight, B) and not awaited():
        from coachhook_fast.kernels import decode as decode_kernels
        from coachhook_fast.kernels.machine import processors

        two_stage = tokens <= TWO_STAGE_DECODE_TOKENS
        with _on(x):
            out, fire, after = decode_kernels.decode(
                _rows(x, B.dtype),
                weight,
                None if bias is None else bias.contiguous(),
                U,
                B.contiguous(),
                _limits(x, threshold, gate),
                None if sketch is None or gate == "sequence" or not two_stage else sketch.contiguous(),
                sequence=gate == "sequence",
                mask=_flat(mask),
                state=None if state is None else state.to(torch.float32).contiguous(),
                processors=processors(x.device),
            )
    else:
        with _on(x), kept() as keep:
            rows, sketch = x.reshape(tokens, -1), _useful(sketch, tokens, B, gate)
            cut = _cut(rows, weight.shape[0], B, sketch, gate)
            with overlapped_base(rows, weight, bias, always=cut is not None) as base:
                fire, after = _delta(base, x, U, B, threshold, sketch, gate, mask, cu_seqlens, state, cut)
                buffers = Buffers(x, base.out, U, B, threshold, sketch, mask, cu_seqlens, state, fire, after)
                keep(buffers, base.is_overlapped)
        out = base.out
    return out.view(shape), fire.view(x.shape[:-1]), after


def gated_delta(
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
    """``ops.gated_delta``: the delta's kernels on a copy of the base's output."""
    reference.check_gate(gate, threshold)
    _check(x, U, B, out=out, sketch=sketch, mask=mask)
    if not _has_kernels(x, B):
        return reference.gated_delta(out, x, U, B, threshold, gate, mask, cu_seqlens, state)
    result = out.clone(memory_format=torch.contiguous_format)
    with _on(x), kept() as keep:
        rows = result.view(-1, result.shape[-1])
        sketch = _useful(sketch, rows.shape[0], B, gate)
        fire, after = _delta(Base(rows), x, U, B, threshold, sketch, gate, mask, cu_seqlens, state)
        keep(Buffers(x, rows, U, B, threshold, sketch, mask, cu_seqlens, state, fire, after))
    return result, fire.view(x.shape[:-1]), after


def delta_norm(x: Tensor, B: Tensor) -> Tensor:
    """``ops.delta_norm``."""
    _check(x, None, B)
    if not _has_kernels(x, B):
        return reference.delta_norm(x, B)
    from coachhook_fast.kernels import delta_norm as project_kernels
    from coachhook_fast.kernels import gate as gate_kernels

    with _on(x):
        parts = project_kernels.project(_rows(x, B.dtype), B)
        norm = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        gate_kernels.decide(parts, norm.numel(), norm=norm)
    return norm


def sequence_gate(
    norm: Tensor,
    alpha: Tensor,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: Tensor | None = None,
) -> GateOutput:
    """``ops.sequence_gate``."""
    if norm.numel() == 0 or norm.dtype == torch.float64:
        return reference.sequence_gate(norm, alpha, mask, cu_seqlens, state)
    from coachhook_fast.kernels import sequence as sequence_kernels

    with _on(norm):
        values = norm.to(torch.float32).contiguous()
        state = None if state is None else state.to(torch.float32).contiguous()
        return sequence_kernels.sequence(values, alpha, _flat(mask), cu_seqlens, state)


def correct(out: Tensor, x: Tensor, U: Tensor | None, B: Tensor, fire: Tensor) -> Tensor:
    """``ops.correct``."""
    _check(x, U, B, out=out, fire=fire)
    if not _has_kernels(x, B):
        return reference.correct(out, x, U, B, fire)
    from coachhook_fast.kernels import gate as gate_kernels
    from coachhook_fast.kernels import listed as listed_kernels

    result = out.clone(memory_format=torch.contiguous_format)
    with _on(x):
        rows = _rows(x, B.dtype)
        listed, counts = gate_kernels.list_fired(fire.to(torch.bool).reshape(-1).contiguous())
        target = result.view(-1, result.shape[-1])
        if U is None:
            gate_kernels.correct(target, rows, B, listed, listed, counts[0])
        else:
            parts = listed_kernels.project_listed(rows, B, listed, counts)
            gate_kernels.decide(parts, rows.shape[0], keep=True)
            gate_kernels.correct(target, parts.values, U, None, listed, counts[0])
    return result


if importlib.util.find_spec("triton") is not None:
    for _op in (gated_linear, gated_delta, delta_norm, sequence_gate, correct):
        # csrc/cuda has the key of these two, and sends on what it does not take
        _suffix = "_triton" if build_info().get("cuda") and _op in (gated_linear, gated_delta) else ""
        LIBRARY.impl(f"{_op.__name__}{_suffix}", _op, "CUDA")
