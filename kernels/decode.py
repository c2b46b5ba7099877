"""Few tokens: base, delta, norm, gate and correction in one launch.

    P = W0 k + b,  c = B k,  M = ||c||,  fire = M >= tau  or  z >= alpha,  out = P + fire * U c

Decoding is bound by the bytes of W0 and B, so the grid streams both: column tiles times `SPLIT` slices of d,
partial sums in a workspace, added by whichever slice of a tile arrives last, always in the order of the slices.
A tile of W0 that is done then waits for the tiles of B, decides (every tile the same, from the same sums) and
corrects its own columns.

A program's work is the ticket it draws when it starts: tickets of the sketch, then of B, then of W0. Whatever a
program waits for has a lower ticket, so it has started already and waits for lower tickets only: no assumption
about how many programs fit on the machine. With a sketch, tiles of B are read only if it left a token undecided.
`counters` must be zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .delta_norm import tile_product
from .machine import cdiv

MAX_TOKENS = 64


@triton.jit
def wait_for(counter, target):
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()


@triton.jit
def announce(counter):
    tl.debug_barrier()  # every thread's stores come before the release below
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def tile_norms(sums, first, tiles, token, BLOCK_T: tl.constexpr):
    """``[BLOCK_T]`` norms from the tiles' sums ``[tiles, BLOCK_T]``, in the order of the tiles."""
    total = tl.zeros((BLOCK_T,), dtype=tl.float32)
    part = sums + first * BLOCK_T + token
    for _ in range(tiles):
        total += tl.load(part, cache_modifier=".cg")
        part += BLOCK_T
    return tl.sqrt(total)


@triton.jit
def limits(threshold, token, row_ok, PER_TOKEN: tl.constexpr):
    """The threshold of all tokens, or of each: loaded where it is used, since registers are few."""
    if PER_TOKEN:
        limit = tl.load(threshold + token, mask=row_ok, other=float("inf"))
    else:
        limit = tl.load(threshold)
    return limit


@triton.jit
def decode_kernel(
    x,  # [tokens, d]
    w,  # [m, d]
    bias,  # [m]
    u,  # [m, r]
    b,  # [r, d], rows contiguous
    sketch,  # [s, d], rows contiguous
    threshold,  # []: tau or alpha; [tokens] with PER_TOKEN
    mask,  # [tokens] bool
    before,  # [tokens, 3]
    out,  # [tokens, m]
    fire,  # [tokens] bool
    after,  # [tokens, 3]
    c,  # [BLOCK_T, r] workspace
    sums,  # [tiles of sketch and B, BLOCK_T] workspace
    partial,  # [tiles, SPLIT, BLOCK_T, BLOCK_N] workspace
    counters,  # [3 + tiles] int32, zero: tickets, tiles of the sketch done, tiles of B done, arrivals of each tile
    tokens,
    m,
    r,
    s,
    d,
    x_row,
    w_row,
    w_col,
    u_row,
    u_col,
    HAS_BIAS: tl.constexpr,
    FACTORED: tl.constexpr,
    TWO_STAGE: tl.constexpr,
    SEQUENCE: tl.constexpr,  # every token is the only new one of its sequence
    HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CAST_C: tl.constexpr,
):
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    tile = ticket // SPLIT
    split = ticket % SPLIT
    sketch_tiles = 0
    if TWO_STAGE:
        sketch_tiles = tl.cdiv(s, BLOCK_N)
    delta_tiles = tl.cdiv(r, BLOCK_N)
    first_base = sketch_tiles + delta_tiles

    token = tl.arange(0, BLOCK_T)
    row_ok = token < tokens
    column = tl.arange(0, BLOCK_N)
    slice_size = tl.cdiv(tl.cdiv(d, BLOCK_D), SPLIT) * BLOCK_D
    begin = split * slice_size
    end = min(begin + slice_size, d)

    if tile >= first_base:
        cols = (tile - first_base) * BLOCK_N + column
        acc = tile_product(
            x, token, row_ok, x_row, w, cols, cols < m, w_row, w_col, begin, end, BLOCK_T, BLOCK_N, BLOCK_D, False
        )
    elif tile >= sketch_tiles:
        cols = (tile - sketch_tiles) * BLOCK_N + column
        if TWO_STAGE:
            wait_for(counters + 1, sketch_tiles)
            rough = tile_norms(sums, 0, sketch_tiles, token, BLOCK_T)
            limit = limits(threshold, token, row_ok, PER_TOKEN)
            open_question = row_ok & ((rough >= limit) | (rough != rough))
            if tl.max(open_question.to(tl.int32), axis=0) == 0:
                end = begin  # nobody asks: B is not read
        acc = tile_product(
            x, token, row_ok, x_row, b, cols, cols < r, d, 1, begin, end, BLOCK_T, BLOCK_N, BLOCK_D, False
        )
    else:
        cols = tile * BLOCK_N + column
        acc = tile_product(
            x, token, row_ok, x_row, sketch, cols, cols < s, d, 1, begin, end, BLOCK_T, BLOCK_N, BLOCK_D, False
        )

    if SPLIT > 1:
        area = partial + tile.to(tl.int64) * SPLIT * BLOCK_T * BLOCK_N + token[:, None] * BLOCK_N + column[None, :]
        tl.store(area + split * BLOCK_T * BLOCK_N, acc)
        if announce(counters + 3 + tile) < SPLIT - 1:
            return
        tl.debug_barrier()
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        for other in range(SPLIT):
            acc += tl.load(area + other * BLOCK_T * BLOCK_N, cache_modifier=".cg")

    if tile < first_base:
        tl.store(sums + tile * BLOCK_T + token, tl.sum(acc * acc, axis=1))
        if tile >= sketch_tiles:
            tl.store(c + token.to(tl.int64)[:, None] * r + cols[None, :], acc, mask=(cols < r)[None, :])
            announce(counters + 2)
        else:
            announce(counters + 1)
    else:
        wait_for(counters + 2, delta_tiles)
        norm = tile_norms(sums, sketch_tiles, delta_tiles, token, BLOCK_T)
        limit = limits(threshold, token, row_ok, PER_TOKEN)
        valid = row_ok
        if HAS_MASK:
            valid = valid & (tl.load(mask + token, mask=row_ok, other=0) != 0)
        if SEQUENCE:
            count = tl.zeros((BLOCK_T,), dtype=tl.float32)
            mean = tl.zeros((BLOCK_T,), dtype=tl.float32)
            m2 = tl.zeros((BLOCK_T,), dtype=tl.float32)
            if HAS_STATE:
                count += tl.load(before + 3 * token, mask=row_ok, other=0.0)
                mean += tl.load(before + 3 * token + 1, mask=row_ok, other=0.0)
                m2 += tl.load(before + 3 * token + 2, mask=row_ok, other=0.0)
            shift = tl.where(valid, norm - mean, 0.0)
            m2 += shift * shift * count / (count + 1.0)
            mean += shift / (count + 1.0)
            count += valid.to(tl.float32)
            score = (norm - mean) / tl.sqrt(m2 / tl.maximum(count - 1.0, 1.0))
            decision = valid & (count >= 2.0) & (score >= limit)
        else:
            decision = valid & (norm >= limit)
            if TWO_STAGE:
                rough = tile_norms(sums, 0, sketch_tiles, token, BLOCK_T)
                decision = decision & ((rough >= limit) | (rough != rough))
        col_ok = cols < m
        if HAS_BIAS:
            acc += tl.load(bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        if tl.max(decision.to(tl.int32), axis=0) > 0:
            if FACTORED:
                acc += tile_product(
                    c, token, decision, r, u, cols, col_ok, u_row, u_col, 0, r, BLOCK_T, BLOCK_N, BLOCK_R, CAST_C
                )
            else:
                c_at = c + token.to(tl.int64)[:, None] * r + cols[None, :]
                acc += tl.load(c_at, mask=decision[:, None] & col_ok[None, :], other=0.0, cache_modifier=".cg")
        out_at = out + token.to(tl.int64)[:, None] * m + cols[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])
        if tile == first_base:
            tl.store(fire + token, decision.to(tl.int8), mask=row_ok)
            if SEQUENCE:
                tl.store(after + 3 * token, count, mask=row_ok)
                tl.store(after + 3 * token + 1, mean, mask=row_ok)
                tl.store(after + 3 * token + 2, m2, mask=row_ok)


def blocks(dtype: torch.dtype, tokens: int, *, lean: bool = False) -> dict[str, int]:
    """Tile sizes: one block of tokens, narrow columns so that there are programs for every multiprocessor.

    lean: for a sketch with a limit a token, whose registers would spill on sm_100.
    """
    size = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    wide = dtype != torch.float32
    return {
        "BLOCK_T": size,
        "BLOCK_N": 32 if wide else 16,
        "BLOCK_D": (64 if size == 64 or lean else 128) if wide else 16,
        "BLOCK_R": 32 if wide else 16,
        "num_warps": 4,
        "num_stages": 4 if wide else 3,
    }


def slices(tiles: int, d: int, block_d: int, processors: int) -> int:
    """`SPLIT`: two programs a multiprocessor, at most 8 slices, none under four blocks of d."""
    return max(1, min(8, cdiv(2 * processors, tiles), d // (4 * block_d)))


def decode(
    x: Tensor,  # [tokens <= 64, d], columns contiguous
    weight: Tensor,  # [m, d], any strides
    bias: Tensor | None,  # [m]
    U: Tensor | None,  # [m, r], any strides; None: B is Delta
    B: Tensor,  # [r, d], contiguous
    threshold: Tensor,  # [] fp32, or [tokens] under `calibrated`
    sketch: Tensor | None = None,  # [s, d], contiguous; `calibrated` only
    *,
    sequence: bool = False,
    mask: Tensor | None = None,  # [tokens] bool
    state: Tensor | None = None,  # [tokens, 3] fp32, contiguous
    processors: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # out [tokens, m], fire [tokens], state [tokens, 3] ([0, 3])
    """The whole gated projection of at most 64 tokens. `sequence`: each token is the only new one of its sequence."""
    tokens, d = x.shape
    m, r, s = weight.shape[0], B.shape[0], 0 if sketch is None else sketch.shape[0]
    config = blocks(x.dtype, tokens, lean=sketch is not None and threshold.dim() > 0)
    block_t, block_n = config["BLOCK_T"], config["BLOCK_N"]
    delta_tiles = cdiv(r, block_n) + cdiv(s, block_n)
    tiles = delta_tiles + cdiv(m, block_n)
    split = slices(tiles, d, config["BLOCK_D"], processors)
    out = torch.empty(tokens, m, dtype=x.dtype, device=x.device)
    fire = torch.empty(tokens, dtype=torch.bool, device=x.device)
    after = torch.empty(tokens if sequence else 0, 3, dtype=torch.float32, device=x.device)
    sizes = (block_t * r, delta_tiles * block_t, tiles * split * block_t * block_n if split > 1 else 0)
    c, sums, partial = torch.empty(sum(sizes), dtype=torch.float32, device=x.device).split(sizes)
    decode_kernel[(tiles * split,)](
        x,
        weight,
        x if bias is None else bias,
        x if U is None else U,
        B,
        x if sketch is None else sketch,
        threshold,
        fire.view(torch.int8) if mask is None else mask.view(torch.int8),
        sums if state is None else state,
        out,
        fire.view(torch.int8),
        after,
        c,
        sums,
        partial,
        torch.zeros(3 + tiles, dtype=torch.int32, device=x.device),
        tokens,
        m,
        r,
        s,
        d,
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if U is None else U.stride(0),
        0 if U is None else U.stride(1),
        HAS_BIAS=bias is not None,
        FACTORED=U is not None,
        TWO_STAGE=sketch is not None,
        SEQUENCE=sequence,
        HAS_MASK=mask is not None,
        HAS_STATE=state is not None,
        PER_TOKEN=threshold.dim() > 0,
        SPLIT=split,
        CAST_C=x.dtype != torch.float32,
        **config,
    )
    return out, fire, after
