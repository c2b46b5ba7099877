"""The gate `sequence`: statistics of each sequence's norms, and decisions by z-score.

    count, mean, M2 of the valid tokens of each sequence, merged with the state before (Chan et al.);
    z = (norm - mean) / sqrt(M2 / (count - 1)),  fire = z >= alpha,  count >= 2

Every sum has a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import launch, scratch


@triton.jit
def fill_padding(fire, z, begin, end, BLOCK: tl.constexpr):
    """Tokens of no sequence do not fire, and have no score."""
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(fire + at, tl.zeros((BLOCK,), dtype=tl.int8), mask=at < end)
        tl.store(z + at, tl.full((BLOCK,), float("nan"), tl.float32), mask=at < end)


@triton.jit
def sequence_kernel(
    norm,  # [tokens]
    alpha,  # []
    mask,  # [tokens] bool, with HAS_MASK
    bounds,  # [S + 1] int, with PACKED
    before,  # [S, 3], with HAS_STATE
    fire,  # [tokens] bool
    z,  # [tokens]
    after,  # [S, 3]
    length,  # tokens a sequence, without PACKED
    tokens,  # in all
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    begin = sequence.to(tl.int64) * length
    end = begin + length
    if PACKED:
        # Bounds that leave the tokens, which only a look at them (a host sync) could refuse, stop at their ends.
        begin = tl.maximum(tl.load(bounds + sequence).to(tl.int64), 0)
        end = tl.minimum(tl.load(bounds + sequence + 1).to(tl.int64), tokens)
        if sequence == 0:
            fill_padding(fire, z, 0, tl.minimum(begin, tokens), BLOCK)
        if sequence == tl.num_programs(0) - 1:
            fill_padding(fire, z, tl.maximum(begin, end), tokens, BLOCK)
    count = tl.zeros((), dtype=tl.float32)
    mean = tl.zeros((), dtype=tl.float32)
    m2 = tl.zeros((), dtype=tl.float32)
    if HAS_STATE:
        count += tl.load(before + 3 * sequence)
        mean += tl.load(before + 3 * sequence + 1)
        m2 += tl.load(before + 3 * sequence + 2)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ok = at < end
        if HAS_MASK:
            ok = ok & (tl.load(mask + at, mask=ok, other=0) != 0)
        value = tl.load(norm + at, mask=ok, other=0.0)
        number = tl.sum(ok.to(tl.float32), axis=0)
        block_mean = tl.sum(value, axis=0) / tl.maximum(number, 1.0)
        deviation = tl.where(ok, value - block_mean, 0.0)
        both = count + number
        shift = block_mean - mean
        share = number / tl.maximum(both, 1.0)
        m2 += tl.sum(deviation * deviation, axis=0) + shift * shift * count * share
        mean += shift * share
        count = both
    limit = tl.load(alpha)
    std = tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0))
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < end
        ok = inside
        if HAS_MASK:
            ok = ok & (tl.load(mask + at, mask=ok, other=0) != 0)
        ok = ok & (tl.zeros((BLOCK,), dtype=tl.float32) + count >= 2.0)
        score = (tl.load(norm + at, mask=inside, other=0.0) - mean) / std
        tl.store(z + at, tl.where(ok, score, float("nan")), mask=inside)
        tl.store(fire + at, (ok & (score >= limit)).to(tl.int8), mask=inside)
    tl.store(after + 3 * sequence, count)
    tl.store(after + 3 * sequence + 1, mean)
    tl.store(after + 3 * sequence + 2, m2)


def sequence(
    norm: Tensor,  # [S, q], or [total] with cu_seqlens; contiguous fp32
    alpha: Tensor,  # []
    mask: Tensor | None,  # shape of norm, bool, contiguous
    cu_seqlens: Tensor | None,  # [S + 1]
    state: Tensor | None,  # [S, 3] fp32, contiguous
) -> tuple[Tensor, Tensor, Tensor]:  # fire, z (shape of norm), state [S, 3]
    """The `sequence` gate, one program a sequence. Tokens past ``cu_seqlens[-1]`` are padding."""
    segments = norm.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if segments == 0:  # nobody would write the tokens
        nothing = torch.zeros(norm.shape, dtype=torch.bool, device=norm.device)
        return nothing, torch.full_like(norm, float("nan")), norm.new_empty(0, 3)
    fire = scratch(*norm.shape, dtype=torch.bool, device=norm.device)
    z = scratch(*norm.shape, dtype=torch.float32, device=norm.device)
    after = scratch(segments, 3, dtype=torch.float32, device=norm.device)
    length = norm.shape[-1]
    launch(
        sequence_kernel,
        (segments,),
        norm,
        alpha,
        norm if mask is None else mask.view(torch.int8),
        norm if cu_seqlens is None else cu_seqlens.contiguous(),
        norm if state is None else state,
        fire.view(torch.int8),
        z,
        after,
        length,
        norm.numel(),
        HAS_MASK=mask is not None,
        PACKED=cu_seqlens is not None,
        HAS_STATE=state is not None,
        BLOCK=1024 if length > 256 else 256,
        num_warps=4,
    )
    return fire, z, after
