"""The delta's product, in slices of d.

    c[i]  = x[:, slice i] P[:, slice i]^T     [tokens, r]   fp32, P is B, a sketch of it, or dense Delta
    l[i]  = sum of x[:, slice i]^2            [tokens]      fp32, for `relative`

A rank of 100 is one column tile: without slices there would be a program for every 128 tokens, and most of the
machine idle. Whoever reads the slices (gate.py) adds them in their order; nothing is added atomically: the same
input gives the same bits. A slice is every n-th block of d, and all go from the last blocks to the first: those are
what the base, which ended there, has left in L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import after_previous, is_recording, launch, scratch
from .machine import capability, cdiv, processors, width


@triton.jit
def columns(start, end, BLOCK_D: tl.constexpr, DOWN: tl.constexpr):
    """The block of d at ``start``: with DOWN, as far from the last block's begin as ``start`` is from 0.

    A product or sum goes through every STEP-th block from ``begin`` on, up to ``end``.
    """
    if DOWN:
        start = (tl.cdiv(end, BLOCK_D) - 1) * BLOCK_D - start
    return start + tl.arange(0, BLOCK_D)


@triton.jit
def tile_product(
    x,  # rows of activations, columns contiguous
    rows,  # [BLOCK_T] which rows
    row_ok,  # [BLOCK_T]
    x_row,
    w,  # [*, d] with any strides
    cols,  # [BLOCK_N] which rows of w
    col_ok,  # [BLOCK_N]
    w_row,
    w_col,
    begin,
    end,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAST_X: tl.constexpr,  # x comes in another dtype than w (the fp32 c of a 16-bit U)
    STEP: tl.constexpr = 1,
    DOWN: tl.constexpr = False,
):
    """fp32 ``[BLOCK_T, BLOCK_N]`` of ``x[rows, D] w[cols, D]^T``, D as `columns` has it."""
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    w_rows = w + cols.to(tl.int64)[None, :] * w_row
    acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(begin, end, STEP * BLOCK_D):
        at = columns(start, end, BLOCK_D, DOWN)
        ok = at < end
        a = tl.load(x_rows + at[None, :], mask=row_ok[:, None] & ok[None, :], other=0.0)
        b = tl.load(w_rows + at.to(tl.int64)[:, None] * w_col, mask=ok[:, None] & col_ok[None, :], other=0.0)
        if CAST_X:
            a = a.to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def tile_length(
    x, rows, row_ok, x_row, begin, end,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_T]`` of ``||x[rows, D]||^2``, D as in `tile_product`, from the end."""
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    square = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in tl.range(begin, end, STEP * BLOCK_D, num_stages=3):
        at = columns(start, end, BLOCK_D, True)
        a = tl.load(x_rows + at[None, :], mask=row_ok[:, None] & (at < end)[None, :], other=0.0).to(tl.float32)
        square += a * a
    return tl.sum(square, axis=1)


@triton.jit
def project_kernel(
    x,  # [tokens, d]
    p,  # [r, d]
    c,  # [SPLIT, tokens, c_row]
    lengths,  # [SPLIT, tokens], with HAS_LENGTH
    counts,  # [2] int32: set to zero for the lists that come after
    tokens,
    r,
    d,
    x_row,
    p_row,
    p_col,
    c_row,
    HAS_LENGTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,  # token blocks that share a tile of P while it is in L2
    EARLY: tl.constexpr,
):
    after_previous(EARLY)
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(counts, 0)
        tl.store(counts + 1, 0)
    token_blocks = tl.cdiv(tokens, BLOCK_T)
    units = tl.cdiv(r, BLOCK_N) * SPLIT
    if HAS_LENGTH:
        units += SPLIT
    first = pid // (GROUP * units) * GROUP
    group = min(token_blocks - first, GROUP)
    block = first + pid % (GROUP * units) % group
    unit = pid % (GROUP * units) // group
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    row_ok = token < tokens
    begin = unit % SPLIT * BLOCK_D
    place = (unit % SPLIT * tokens + token).to(tl.int64)

    if HAS_LENGTH:
        # Programs of their own, at the same time as the product's: they find x in L2. (Squares of the product's own
        # tile would be cheaper, but Triton 3.6 then overwrites it in shared memory while wgmma still reads it.)
        if unit < SPLIT:
            square = tile_length(x, token, row_ok, x_row, begin, d, BLOCK_T, BLOCK_D, SPLIT)
            tl.store(lengths + place, square, mask=row_ok)
            return
        unit -= SPLIT
    cols = unit // SPLIT * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tile_product(
        x, token, row_ok, x_row, p, cols, cols < r, p_row, p_col, begin, d,
        BLOCK_T, BLOCK_N, BLOCK_D, False, SPLIT, True,
    )  # fmt: skip
    tl.store(c + place[:, None] * c_row + cols[None, :], acc, mask=row_ok[:, None] & (cols < c_row)[None, :])


def blocks(dtype: torch.dtype, tokens: int, r: int, capability: int) -> dict[str, int]:
    """Tile sizes, none of which spills (fp32 `ieee` products run on the CUDA cores; wgmma, sm_90 on, needs fewer
    registers)."""
    if dtype == torch.float32:
        size = 16 if tokens <= 16 else 32
        return {"BLOCK_T": size, "BLOCK_N": 32, "BLOCK_D": 16, "num_warps": 4, "num_stages": 3}
    size, columns = min(128 if tokens > 1024 else 64, width(tokens)), min(128, width(r))
    warps = 8 if size * columns > 64 * (128 if capability >= 90 else 64) else 4
    stages = 4 if capability == 90 else 3
    return {"BLOCK_T": size, "BLOCK_N": columns, "BLOCK_D": 64, "num_warps": warps, "num_stages": stages}


def slices(tiles: int, d: int, block_d: int, programs: int) -> int:
    """Up to `programs` programs, at most 16 slices, none under four blocks of d."""
    return max(1, min(16, programs // tiles, d // (4 * block_d)))


class Parts(NamedTuple):
    """``P k`` in slices, to be added in their order."""

    values: Tensor  # [rows, width >= r] fp32: slice by slice; as many rows a slice as there are tokens
    split: int  # slices; with `rows`, the most there are (listed.slices_of)
    counts: Tensor  # [2] int32, zero: how many tokens the first and the second list hold
    lengths: Tensor | None = None  # [split, tokens]: ||k||^2 in slices
    rows: Tensor | None = None  # [tokens] int32: only these tokens, as many as counts[0] says
    block: int = 1  # listed tokens that are measured together


# Multiply-adds in fp32 from which on cuBLAS does them: `ieee` products are far from what the CUDA cores can do. A
# call whose launches are all ours is replayed, which is worth more to small ones.
LARGE_FP32, LARGE_FP32_RECORDED = 1 << 20, 1 << 27


def project(
    x: Tensor,  # [tokens, d], columns contiguous
    p: Tensor,  # [r, d]
    *,
    want_length: bool = False,
    early: bool = False,  # see launch
) -> Parts:
    """The delta's product; a large one in fp32 as exact as the base (TF32 where torch may use it)."""
    (tokens, d), r = x.shape, p.shape[0]
    if x.dtype == torch.float32 and tokens * r * d >= (LARGE_FP32_RECORDED if is_recording() else LARGE_FP32):
        square = torch.linalg.vector_norm(x, dim=1).square()[None] if want_length else None
        return Parts(torch.mm(x, p.T), 1, torch.zeros(2, dtype=torch.int32, device=x.device), square)
    config = blocks(x.dtype, tokens, r, capability(x.device))
    token_blocks, tiles = cdiv(tokens, config["BLOCK_T"]), cdiv(r, config["BLOCK_N"])
    # narrow tiles fit twice on a multiprocessor
    programs = processors(x.device) * (2 if config["BLOCK_N"] <= 64 else 1)
    split = slices(token_blocks * tiles, d, config["BLOCK_D"], programs)
    split = 1 << (split.bit_length() - 1)  # few values: each is a kernel to compile
    c_row = cdiv(r, 16) * 16
    values = scratch(split * tokens, c_row, dtype=torch.float32, device=x.device)
    counts = scratch(2, dtype=torch.int32, device=x.device)
    lengths = scratch(split, tokens, dtype=torch.float32, device=x.device) if want_length else None
    launch(
        project_kernel,
        (token_blocks * (tiles + want_length) * split,),
        x,
        p,
        values,
        values if lengths is None else lengths,
        counts,
        tokens,
        r,
        d,
        x.stride(0),
        p.stride(0),
        p.stride(1),
        c_row,
        HAS_LENGTH=want_length,
        SPLIT=split,
        GROUP=8,
        early=early,
        **config,
    )
    return Parts(values, split, counts, lengths)
