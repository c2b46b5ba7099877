"""The decision and its consequence, without the host ever knowing how many tokens fire.

    norm[t] = sqrt(sum_j sums[j, t])
    calibrated:  fire = norm >= tau[t]   (a sketch's first stage: undecided = not norm < tau)
    sequence:    count, mean, M2 of the valid tokens of each sequence, merged with the state before (Chan et al.);
                 z = (norm - mean) / sqrt(M2 / (count - 1)),  fire = z >= alpha,  count >= 2
    listed = the tokens that fire, in order, and how many
    out[listed] += src[listed] A^T

Fixed orders everywhere and no atomics: the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .delta_norm import tile_product


@triton.jit
def threshold_kernel(
    sums,  # [tiles, tokens]
    tau,  # [], or [tokens] with PER_TOKEN
    mask,  # [tokens] bool, with HAS_MASK
    norm,  # [tokens], with STORE_NORM
    fire,  # [tokens] bool, one an entry
    rows,  # [tokens] int32, with LISTED: token of each entry
    token_fire,  # [tokens] bool, with LISTED: one a token
    count,  # [] int32, with LISTED: entries from here on are not there
    tokens,
    tiles,
    FIRST_STAGE: tl.constexpr,
    DECIDE: tl.constexpr,
    STORE_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LISTED: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < tokens
    here = ok
    if LISTED:
        here = ok & (at < tl.load(count))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part = sums + at
    for _ in range(tiles):
        total += tl.load(part, mask=here, other=0.0)
        part += tokens
    value = tl.sqrt(total)
    if STORE_NORM:
        tl.store(norm + at, value, mask=ok)
    if DECIDE:
        token = at
        if LISTED:
            token = tl.load(rows + at, mask=here, other=0)
        if PER_TOKEN:
            limit = tl.load(tau + token, mask=here, other=float("inf"))
        else:
            limit = tl.load(tau)
        if FIRST_STAGE:
            decision = here & ((value >= limit) | (value != value))  # a NaN goes on to the exact norm
        else:
            decision = here & (value >= limit)
        if HAS_MASK:
            decision = decision & (tl.load(mask + at, mask=ok, other=0) != 0)
        tl.store(fire + at, decision.to(tl.int8), mask=ok)
        if LISTED:
            tl.store(token_fire + token, decision.to(tl.int8), mask=here)


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


@triton.jit
def list_kernel(
    fire,  # [tokens] bool
    tokens_of,  # [tokens] int32, with MAPPED: token of each entry
    places,  # [tokens] int32 out: entries that fire
    listed,  # [tokens] int32 out, with MAPPED: their tokens
    count,  # [] int32 out
    tokens,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    before = tl.zeros((), dtype=tl.int32)
    for start in range(0, block * BLOCK, BLOCK):  # every program counts what came before: no chain, no atomics
        earlier = tl.load(fire + start + tl.arange(0, BLOCK))
        before += tl.sum((earlier != 0).to(tl.int32), axis=0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    here = (tl.load(fire + at, mask=at < tokens, other=0) != 0).to(tl.int32)
    position = before + tl.cumsum(here, axis=0) - here
    tl.store(places + position, at, mask=here != 0)
    if MAPPED:
        tl.store(listed + position, tl.load(tokens_of + at, mask=here != 0, other=0), mask=here != 0)
    if block == tl.num_programs(0) - 1:
        tl.store(count, before + tl.sum(here, axis=0))


@triton.jit
def correct_kernel(
    out,  # [tokens, m]
    src,  # [*, n]: c, or the activations where Delta is dense
    a,  # [m, n]: U, or Delta
    places,  # [tokens] int32: rows of src
    listed,  # [tokens] int32: rows of out
    count,  # [] int32
    m,
    n,
    src_row,
    a_row,
    a_col,
    CAST_X: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    limit = tl.load(count)
    entry = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T >= limit:
        return
    row_ok = entry < limit
    row = tl.load(places + entry, mask=row_ok, other=0)
    token = tl.load(listed + entry, mask=row_ok, other=0)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_ok = cols < m
    acc = tile_product(
        src, row, row_ok, src_row, a, cols, col_ok, a_row, a_col, 0, n, BLOCK_T, BLOCK_N, BLOCK_D, CAST_X
    )
    at = out + token.to(tl.int64)[:, None] * m + cols[None, :]
    ok = row_ok[:, None] & col_ok[None, :]
    tl.store(at, (tl.load(at, mask=ok, other=0.0).to(tl.float32) + acc).to(out.dtype.element_ty), mask=ok)


def threshold(
    sums: Tensor,  # [tiles, tokens]
    tau: Tensor | None,  # [] or [tokens]; None: the norms only
    mask: Tensor | None = None,  # [tokens] bool
    *,
    rows: Tensor | None = None,  # [tokens] int32: the token of each entry of `sums` ...
    count: Tensor | None = None,  # [] int32: ... and how many entries exist
    token_fire: Tensor | None = None,  # [tokens] bool, with `rows`: decisions by token, written where listed
    first_stage: bool = False,
    want_norm: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # fire [tokens] bool by entry, norm [tokens]
    """Norms from the tiles' partial sums, in the order of the tiles, and the `calibrated` decision."""
    tiles, tokens = sums.shape
    fire = None if tau is None else torch.empty(tokens, dtype=torch.bool, device=sums.device)
    norm = torch.empty(tokens, dtype=torch.float32, device=sums.device) if want_norm else None
    threshold_kernel[(triton.cdiv(tokens, 256),)](
        sums,
        sums if tau is None else tau,
        sums if mask is None else mask.view(torch.int8),
        sums if norm is None else norm,
        sums if fire is None else fire.view(torch.int8),
        sums if rows is None else rows,
        sums if token_fire is None else token_fire.view(torch.int8),
        sums if count is None else count,
        tokens,
        tiles,
        FIRST_STAGE=first_stage,
        DECIDE=tau is not None,
        STORE_NORM=want_norm,
        HAS_MASK=mask is not None,
        LISTED=rows is not None,
        PER_TOKEN=tau is not None and tau.dim() > 0,
        BLOCK=256,
        num_warps=4,
    )
    return fire, norm


def sequence(
    norm: Tensor,  # [S, q], or [total] with cu_seqlens; contiguous fp32
    alpha: Tensor,  # []
    mask: Tensor | None,  # shape of norm, bool, contiguous
    cu_seqlens: Tensor | None,  # [S + 1]
    state: Tensor | None,  # [S, 3] fp32, contiguous
) -> tuple[Tensor, Tensor, Tensor]:  # fire, z (shape of norm), state [S, 3]
    """The `sequence` gate, one program a sequence. Tokens past ``cu_seqlens[-1]`` are padding."""
    segments = norm.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    fire = torch.zeros(norm.shape, dtype=torch.bool, device=norm.device)
    z = torch.full_like(norm, float("nan"))
    after = torch.empty(segments, 3, dtype=torch.float32, device=norm.device)
    length = norm.shape[-1]
    sequence_kernel[(segments,)](
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


def list_fired(
    fire: Tensor,  # [tokens] bool
    tokens_of: Tensor | None = None,  # [tokens] int32: token of each entry; None: entry i is token i
) -> tuple[Tensor, Tensor, Tensor]:  # places [tokens], listed [tokens], count [], int32
    """The entries that fire, in order, and their tokens. Entries from `count` on are not written."""
    tokens = fire.shape[0]
    places = torch.empty(tokens, dtype=torch.int32, device=fire.device)
    listed = places if tokens_of is None else torch.empty_like(places)
    count = torch.empty((), dtype=torch.int32, device=fire.device)
    list_kernel[(triton.cdiv(tokens, 1024),)](
        fire.view(torch.int8),
        places if tokens_of is None else tokens_of,
        places,
        listed,
        count,
        tokens,
        MAPPED=tokens_of is not None,
        BLOCK=1024,
        num_warps=4,
    )
    return places, listed, count


def correct(
    out: Tensor,  # [tokens, m] contiguous, changed in place
    src: Tensor,  # [*, n], columns contiguous
    a: Tensor,  # [m, n]
    places: Tensor,  # [tokens] int32
    listed: Tensor,  # [tokens] int32
    count: Tensor,  # [] int32
) -> None:
    """``out[listed[i]] += a src[places[i]]`` for ``i < count``; the grid is sized for every token and leaves early."""
    tokens, m = out.shape
    fp32 = a.dtype == torch.float32
    size = {"BLOCK_T": 16 if tokens <= 1024 else 32, "BLOCK_N": 64, "BLOCK_D": 32 if fp32 else 64}
    grid = (triton.cdiv(tokens, size["BLOCK_T"]), triton.cdiv(m, size["BLOCK_N"]))
    correct_kernel[grid](
        out,
        src,
        a,
        places,
        listed,
        count,
        m,
        a.shape[1],
        src.stride(0),
        a.stride(0),
        a.stride(1),
        CAST_X=src.dtype != a.dtype,
        num_warps=4,
        num_stages=3,
        **size,
    )
